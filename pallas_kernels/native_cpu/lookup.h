// The lookup of packed experts, forward and backward. See pallas_kernels/expert_lookup/xla.py.
#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"
#include "lanes.h"
#include "layout.h"

namespace peer {

// The packed experts of one layer.
struct Pool {
  const int32_t* words;
  const float* scales;  // [2, N]
  int64_t num_experts;
  int64_t vector_words;  // W

  const int32_t* Vector(int64_t id, int vector) const {
    return words + VectorPlace(id, vector) * vector_words;
  }
  const float* Scale(int64_t id, int vector) const {
    return scales + NumberPlace(num_experts, id, vector);
  }
  bool Holds(int32_t id) const { return id >= 0 && id < num_experts; }
  // Asks for what a lookup reads of a vector of an expert, and its scale.
  void Prefetch(int64_t id, int vector) const {
    const int32_t* from = Vector(id, vector);
    for (int64_t word = 0; word < vector_words; word += 16) __builtin_prefetch(from + word);
    __builtin_prefetch(Scale(id, vector));
  }
};

// Arrays of T tokens with K experts each.
struct Tokens {
  Activation activation;
  int64_t chosen, width;  // K, D
  const int32_t* ids;     // [T, K]
  const float *gates, *bias;  // [T, K]; the bias may be null
  const float *x, *dy;        // [T, D]; dy is null in a forward pass
};

struct Gradients {
  float* dx;                                      // [T, D]
  float *gates, *c_down, *c_up, *down_scale, *up_scale;  // [T, K]
};

// A vector of D numbers by plane: each plane begins at a whole vector of lanes and ends in zeros.
template <int kBits>
class ByPlane {
 public:
  explicit ByPlane(int64_t words)
      : words_(words), stride_(RoundUp(words)), data_(kPlanes * stride_) {}
  void Read(const float* from) {
    Copy([&](int plane, int64_t words) {
      std::memcpy(at(plane), from + plane * words_, 4 * words);
    });
  }
  void Write(float* to) const {
    Copy([&](int plane, int64_t words) {
      std::memcpy(to + plane * words_, at(plane), 4 * words);
    });
  }
  float* at(int plane) { return data_.data() + plane * stride_; }
  const float* at(int plane) const { return data_.data() + plane * stride_; }

  static constexpr int kPlanes = 32 / kBits;

 private:
  // Calls `copy(plane, words)` for runs of words, which are as long as possible.
  template <class OneRun>
  void Copy(const OneRun& copy) const {
    if (stride_ == words_) return copy(0, kPlanes * words_);
    for (int plane = 0; plane < kPlanes; ++plane) copy(plane, words_);
  }

  int64_t words_, stride_;
  std::vector<float> data_;
};

// The experts of one token that are in the pool, and numbers of each.
struct Active {
  // `Find` writes whole vectors of lanes.
  explicit Active(int64_t chosen)
      : place(chosen + kLanes), id(chosen + kLanes), code_x(chosen), code_dy(chosen), mixing(chosen) {
    for (auto* each : {&vectors[kDown], &vectors[kUp]}) each->resize(chosen);
    for (auto* each : {&gate, &bias, &down_scale, &up_scale}) each->resize(chosen);
  }
  int64_t count = 0;
  std::vector<int32_t> place, id;
  std::vector<const int32_t*> vectors[2];
  std::vector<float> code_x, code_dy, mixing, gate, bias, down_scale, up_scale;

  void Find(const Pool& pool, const int32_t* ids, int64_t chosen) {
    count = 0;
    int64_t k = 0;
#ifdef __AVX512F__
    for (; k + kLanes <= chosen; k += kLanes) {
      const __m512i some = _mm512_loadu_si512(ids + k);
      const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(k), (__m512i)Numbered());
      const __mmask16 held = _mm512_cmplt_epu32_mask(some, _mm512_set1_epi32(pool.num_experts));
      _mm512_storeu_si512(&place[count], _mm512_maskz_compress_epi32(held, places));
      _mm512_storeu_si512(&id[count], _mm512_maskz_compress_epi32(held, some));
      count += __builtin_popcount(held);
    }
#endif
    for (; k < chosen; ++k) {
      place[count] = k;
      id[count] = ids[k];
      count += pool.Holds(ids[k]);
    }
  }
  void PrefetchFrom(const Pool& pool, int64_t from, int vector) const {
    for (int64_t i = from; i < count; ++i) pool.Prefetch(id[i], vector);
  }
  void ReadNumbers(const Pool& pool, const float* gates, const float* biases) {
    for (int64_t i = 0; i < count; ++i) {
      vectors[kDown][i] = pool.Vector(id[i], kDown);
      vectors[kUp][i] = pool.Vector(id[i], kUp);
      down_scale[i] = *pool.Scale(id[i], kDown);
      up_scale[i] = *pool.Scale(id[i], kUp);
      gate[i] = gates[place[i]];
      bias[i] = biases ? biases[place[i]] : 0;
    }
  }
};

// The product of a vector's codes with x.
template <int kBits, bool kWhole>
INLINE float Dot(const int32_t* words, const ByPlane<kBits>& x, int64_t count) {
  Floats sums[4] = {};
  for (int64_t at = 0; at < count; at += kLanes) {
    const Words packed = LoadWords<kWhole>(words + at, count - at);
#pragma GCC unroll 16
    for (int plane = 0; plane < x.kPlanes; ++plane)
      sums[plane % 4] += FloatCode<kBits>(packed, plane) * LoadFloats(x.at(plane) + at);
  }
  return SumOfLanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / kCodeUnit<kBits>;
}

// y = sum_i mixing_i * (codes of vector i). Meanwhile it asks for `up` of the next token's experts.
template <int kBits, bool kWhole>
INLINE void Mix(const Active& active, int vector, ByPlane<kBits>& y, const Pool& pool,
                const Active& next) {
  constexpr int kTogether = y.kPlanes < 8 ? y.kPlanes : 8;
  const int64_t count = pool.vector_words;
  const int64_t passes = y.kPlanes / kTogether * (RoundUp(count) / kLanes);
  int64_t pass = 0;
  for (int first = 0; first < y.kPlanes; first += kTogether)
    for (int64_t at = 0; at < count; at += kLanes, ++pass) {
      Floats sums[kTogether] = {};
      // Requests are spread over all passes. Many at once would have to wait for each other.
      int64_t asked = pass;
      for (int64_t i = 0; i < active.count; ++i) {
        if (i == asked && i < next.count) pool.Prefetch(next.id[i], kUp);
        asked += i == asked ? passes : 0;
        const int32_t* words = active.vectors[vector][i];
        const Words packed = LoadWords<kWhole>(words + at, count - at) >> (kBits * first);
        const Floats factor = AllEqual(active.mixing[i]);
#pragma GCC unroll 8
        for (int plane = 0; plane < kTogether; ++plane)
          sums[plane] += factor * FloatCode<kBits>(packed, plane);
      }
#pragma GCC unroll 8
      for (int plane = 0; plane < kTogether; ++plane)
        Store(y.at(first + plane) + at, sums[plane] / kCodeUnit<kBits>);
    }
}

// Calls `one_token(token, active, next)` for the tokens first .. last - 1.
template <class OneToken>
INLINE void ForTokens(const Pool& pool, const Tokens& in, int64_t first, int64_t last,
                      const OneToken& one_token) {
  Active active(in.chosen), next(in.chosen);
  next.Find(pool, in.ids + first * in.chosen, in.chosen);
  next.PrefetchFrom(pool, 0, kDown);
  next.PrefetchFrom(pool, 0, kUp);
  for (int64_t token = first; token < last; ++token) {
    std::swap(active, next);
    next.Find(pool, in.ids + (token + 1) * in.chosen, token + 1 < last ? in.chosen : 0);
    active.ReadNumbers(pool, in.gates + token * in.chosen,
                       in.bias ? in.bias + token * in.chosen : nullptr);
    one_token(token, active, next);
  }
}

template <int kBits, bool kWhole>
void ForwardTokens(const Pool& pool, const Tokens& in, float* y, int64_t first, int64_t last) {
  ByPlane<kBits> x_planes(pool.vector_words), y_planes = x_planes;
  ForTokens(pool, in, first, last, [&](int64_t token, Active& active, const Active& next) {
    x_planes.Read(in.x + token * in.width);
    for (int64_t i = 0; i < active.count; ++i) {
      if (i < next.count) pool.Prefetch(next.id[i], kDown);
      active.code_x[i] = Dot<kBits, kWhole>(active.vectors[kDown][i], x_planes, pool.vector_words);
    }
    next.PrefetchFrom(pool, active.count, kDown);
    WithKind(in.activation, [&](auto kind) {
      for (int64_t i = 0; i < active.count; ++i) {
        const float hidden = active.code_x[i] * active.down_scale[i] + active.bias[i];
        active.mixing[i] = active.gate[i] * Value(kind, hidden) * active.up_scale[i];
      }
    });
    Mix<kBits, kWhole>(active, kUp, y_planes, pool, next);
    next.PrefetchFrom(pool, active.count, kUp);
    y_planes.Write(y + token * in.width);
  });
}

template <int kBits, bool kWhole>
void BackwardTokens(const Pool& pool, const Tokens& in, const Gradients& out, int64_t first,
                    int64_t last) {
  ByPlane<kBits> x_planes(pool.vector_words), dy_planes = x_planes, dx_planes = x_planes;
  const int64_t pairs = first * in.chosen, num_pairs = (last - first) * in.chosen;
  for (float* each : {out.gates, out.c_down, out.c_up, out.down_scale, out.up_scale})
    std::memset(each + pairs, 0, 4 * num_pairs);
  std::vector<float> gates(in.chosen), c_down(in.chosen), c_up(in.chosen);
  ForTokens(pool, in, first, last, [&](int64_t token, Active& active, const Active& next) {
    x_planes.Read(in.x + token * in.width);
    dy_planes.Read(in.dy + token * in.width);
    for (int64_t i = 0; i < active.count; ++i) {
      if (i < next.count) pool.Prefetch(next.id[i], kDown);
      const int32_t *down = active.vectors[kDown][i], *up = active.vectors[kUp][i];
      active.code_x[i] = Dot<kBits, kWhole>(down, x_planes, pool.vector_words);
      active.code_dy[i] = Dot<kBits, kWhole>(up, dy_planes, pool.vector_words);
    }
    next.PrefetchFrom(pool, active.count, kDown);
    WithKind(in.activation, [&](auto kind) {
      for (int64_t i = 0; i < active.count; ++i) {
        const float hidden = active.code_x[i] * active.down_scale[i] + active.bias[i];
        const float value = Value(kind, hidden), up_dy = active.code_dy[i] * active.up_scale[i];
        gates[i] = value * up_dy;
        c_up[i] = active.gate[i] * value;
        c_down[i] = Slope(kind, hidden) * (active.gate[i] * up_dy);
        active.mixing[i] = c_down[i] * active.down_scale[i];
      }
    });
    for (int64_t i = 0; i < active.count; ++i) {
      const int64_t pair = token * in.chosen + active.place[i];
      out.gates[pair] = gates[i];
      out.c_down[pair] = c_down[i];
      out.c_up[pair] = c_up[i];
      out.down_scale[pair] = c_down[i] * active.code_x[i];
      out.up_scale[pair] = c_up[i] * active.code_dy[i];
    }
    Mix<kBits, kWhole>(active, kDown, dx_planes, pool, next);
    next.PrefetchFrom(pool, active.count, kUp);
    dx_planes.Write(out.dx + token * in.width);
  });
}

}  // namespace peer

// The update of packed experts from a factored gradient. See pallas_kernels/expert_update.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"
#include "layout.h"

namespace peer {

// Random bits from counters. See pallas_kernels/counter_hash.py.
constexpr uint32_t kGolden = 0x9E3779B9u;
template <class Word>
INLINE Word Absorb(Word state, Word counter) {
  state = (state + kGolden) ^ counter;
  state = (state ^ (state >> 16)) * 0x7FEB352Du;
  state = (state ^ (state >> 15)) * 0x846CA68Bu;
  return state ^ (state >> 16);
}
INLINE Ints RoundStochastically(Floats value, Words random) {
  const Floats one = AllEqual(1.0f), none = {};
  const Floats towards_zero = ToFloats(ToInts(value));
  const Floats floor = towards_zero - (towards_zero > value ? one : none);
  const Floats uniform = ToFloats((Ints)(random >> 8)) * 0x1p-24f;
  return ToInts(floor + (uniform < value - floor ? one : none));
}

// Numbers of the rule. See `pallas_kernels.expert_update.rule`.
struct Rule {
  float learning_rate, weight_decay, beta2;
  // Numbers of the formats of codes and accumulators.
  int bits, accumulator_bits;
  int32_t low, high;             // limits of values
  float too_small, too_large;    // of the sum of squares of values: bounds of the present scale
  float outer;                   // square of a value from which on it is an outer one
  float rung, held;              // factor of scales; share of squares that decides a scale
  float largest_step, epsilon;   // bound of a step; number that is added to a root
};

// The arrays of one layer. Accumulators are null where they have no bits.
struct Trained {
  int32_t *words, *accumulators;
  float *scales, *moments;  // [2, N]
  int64_t num_experts, width;
  int64_t first_expert = 0;  // its number in the whole pool, on which random bits depend
};

struct Gradient {
  const int32_t* ids;            // [T, K]
  const float *c_down, *c_up;    // [T, K]
  const float *x, *dy;           // [T, D]
  int64_t tokens, chosen;
};

// See `pallas_kernels.expert_update.Statistics`.
struct Statistics {
  double experts = 0, rows = 0, clipped = 0, grown = 0, step_size = 0;
  void Add(const Statistics& more) {
    experts += more.experts;
    rows += more.rows;
    clipped += more.clipped;
    grown += more.grown;
    step_size += more.step_size;
  }
};

// The pairs that have a gradient, sorted by expert with tokens in order, and the experts of them.
class SortedPairs {
 public:
  SortedPairs(const Gradient& gradient, int64_t num_experts) {
    const int64_t pairs = gradient.tokens * gradient.chosen;
    sorted_.reserve(pairs);
    for (int64_t i = 0; i < pairs; ++i) {
      const int32_t id = gradient.ids[i];
      if (id >= 0 && id < num_experts && (gradient.c_down[i] != 0 || gradient.c_up[i] != 0))
        sorted_.push_back((uint64_t)id << 32 | (uint32_t)i);
    }
    Sort(num_experts);
    for (size_t i = 0; i < sorted_.size(); ++i)
      if (i == 0 || sorted_[i] >> 32 != sorted_[i - 1] >> 32) first_.push_back(i);
    num_hit_ = first_.size();
    first_.push_back(sorted_.size());
  }
  int64_t num_hit() const { return num_hit_; }
  int64_t expert(int64_t hit) const { return sorted_[first_[hit]] >> 32; }
  int64_t first(int64_t hit) const { return first_[hit]; }
  int64_t pair(int64_t i) const { return (uint32_t)sorted_[i]; }

 private:
  void Sort(int64_t num_experts) {  // by digits, which keeps the order of equal experts
    constexpr int kDigit = 11;
    std::vector<uint64_t> other(sorted_.size());
    for (int shift = 32; (num_experts - 1) >> (shift - 32); shift += kDigit) {
      int64_t place[(1 << kDigit) + 1] = {};
      auto digit = [&](uint64_t each) { return each >> shift & ((1 << kDigit) - 1); };
      for (uint64_t each : sorted_) ++place[digit(each) + 1];
      for (int i = 0; i < 1 << kDigit; ++i) place[i + 1] += place[i];
      for (uint64_t each : sorted_) other[place[digit(each)]++] = each;
      std::swap(sorted_, other);
    }
  }

  std::vector<uint64_t> sorted_;  // expert in the upper half, pair in the lower
  std::vector<int64_t> first_;
  int64_t num_hit_;
};

// Calls `run.operator()<bits>()` for a number of bits of codes.
template <class Run>
INLINE void WithBits(int bits, const Run& run) {
  if (bits == 8) run.template operator()<8>();
  if (bits == 4) run.template operator()<4>();
  if (bits == 2) run.template operator()<2>();
}

// Unpacks codes in the order of columns: values = combine(values, code).
//
// The lanes beyond the last word of a plane fall on the first columns of the next plane, which are
// therefore written later.
template <class Combine>
inline void Unpack(int bits, const int32_t* words, int64_t width, int32_t* values,
                   const Combine& combine) {
  WithBits(bits, [&]<int kBits>() {
    const int64_t count = width * kBits / 32;
    for (int64_t at = RoundUp(count) - kLanes; at >= 0; at -= kLanes) {
      const Words packed = LoadWords<false>(words + at, count - at);
#pragma GCC unroll 16
      for (int plane = 0; plane < 32 / kBits; ++plane) {
        int32_t* to = values + plane * count + at;
        Store(to, combine(LoadInts(to), Code<kBits>(packed, plane)));
      }
    }
  });
}

// Packs the low bits of code_of(values), which are in the order of columns.
template <class CodeOf>
inline void Pack(int bits, const int32_t* values, int64_t width, int32_t* words,
                 const CodeOf& code_of) {
  WithBits(bits, [&]<int kBits>() {
    const int64_t count = width * kBits / 32;
    for (int64_t at = 0; at < count; at += kLanes) {
      Words packed = {};
#pragma GCC unroll 16
      for (int plane = 0; plane < 32 / kBits; ++plane) {
        const Words code = (Words)code_of(LoadInts(values + plane * count + at));
        packed |= (code & ((1u << kBits) - 1)) << (kBits * plane);
      }
      std::memcpy(words + at, &packed, 4 * (count - at < kLanes ? count - at : kLanes));
    }
  });
}

// Moves one vector of codes, unless its gradient is zero or not finite. `gradient` has zeros beyond
// the last column.
inline void MoveVector(const Rule& rule, const float* gradient, int64_t width, int32_t* words,
                       int32_t* accumulators, float* scale, float* moment, uint32_t state,
                       int32_t* values, Statistics& statistics) {
  const int shift = rule.accumulator_bits;
  Floats square_sums[2] = {}, size = {};
  for (int64_t c = 0; c < width; c += 2 * kLanes)
    for (int half = 0; half < 2; ++half) {
      const Floats g = LoadFloats(gradient + c + half * kLanes);
      square_sums[half] += g * g;
      size += (Floats)((Ints)g & 0x7fffffff);
    }
  const float mean_square = SumOfLanes(square_sums[0] + square_sums[1]) / width;
  if (!(mean_square > 0 && mean_square < std::numeric_limits<float>::infinity())) return;

  const float fresh = *moment == 0 ? mean_square
                                   : rule.beta2 * *moment + (1 - rule.beta2) * mean_square;
  const float factor = 1.0f / std::max(std::sqrt(fresh) + rule.epsilon, std::sqrt(mean_square));
  const float rate = rule.learning_rate * factor / *scale * (float)(1 << shift);
  const float decay = rule.learning_rate * rule.weight_decay;
  Words column;
  for (int i = 0; i < kLanes; ++i) column[i] = i;

  const int64_t padded = RoundUp(width);
  Unpack(rule.bits, words, width, values, [&](Ints, Ints code) { return code << shift; });
  if (shift) Unpack(shift, accumulators, width, values, [](Ints v, Ints low) { return v + low; });
  std::fill(values + width, values + padded, 0);

  // Copies, because the compiler must assume that stores of values change the rule.
  const Ints low = Ints{} + rule.low, high = Ints{} + rule.high;
  const Floats outer_limit = AllEqual(rule.outer);
  const Floats shortest = AllEqual(-rule.largest_step), longest = AllEqual(rule.largest_step);
  Floats squares = {}, outer = {};
  Ints stops = {};
  for (int64_t c = 0; c < width; c += kLanes) {
    const Ints value = LoadInts(values + c);
    Floats step = -rate * LoadFloats(gradient + c) - decay * ToFloats(value);
    step = step < shortest ? shortest : step;
    step = step > longest ? longest : step;
    const Words random = Absorb(Words{} + state, column + (uint32_t)c);
    const Ints moved = value + RoundStochastically(step, random);
    const Floats square = ToFloats(moved) * ToFloats(moved);
    squares += square;
    outer += square > outer_limit ? square : Floats{};
    stops -= (moved < low) | (moved > high);
    Store(values + c, moved);
  }
  const float square_sum = SumOfLanes(squares), held = rule.held * square_sum;
  const float stopped = SumOfLanes(stops);
  float by = 1;
  if (square_sum > rule.too_large || stopped * ((float)rule.high * rule.high) > held)
    by = rule.rung;
  else if (square_sum > 0 && square_sum < rule.too_small && SumOfLanes(outer) < held)
    by = 1 / rule.rung;
  if (by != 1)
    for (int64_t c = 0; c < width; c += kLanes) {
      const Words random = Absorb(Words{} + state, column + (uint32_t)c);
      const Floats value = ToFloats(LoadInts(values + c)) / by;
      Store(values + c, RoundStochastically(value, (random << 24) + (1u << 23)));
    }

  const Ints half = Ints{} + ((1 << shift) >> 1);
  auto inside = [&](Ints value) {
    value = value < low ? low : value;
    return value > high ? high : value;
  };
  if (shift) Pack(shift, values, width, accumulators, inside);  // the low bits of the values
  Pack(rule.bits, values, width, words, [&](Ints v) { return (inside(v) + half) >> shift; });
  *moment = fresh;
  *scale *= by;
  statistics.rows += 1;
  statistics.clipped += stopped;
  statistics.grown += by > 1;
  statistics.step_size += rate * SumOfLanes(size);
}

// Rewrites the hit experts first .. last - 1 of a layer.
//
// `states[m]` is the state of the hash before the expert's number, of `down` (0) or `up` (1).
inline void UpdateExperts(const Rule& rule, const Trained& pool, const Gradient& gradient,
                   const SortedPairs& pairs, const uint32_t* states, int64_t first, int64_t last,
                   Statistics& statistics) {
  constexpr int64_t kAhead = 6;
  const int64_t width = pool.width, padded = RoundUp(width) + kLanes;
  const int64_t words = width * rule.bits / 32;
  const int64_t accumulator_words = width * rule.accumulator_bits / 32;
  std::vector<float> sums[2] = {std::vector<float>(padded), std::vector<float>(padded)};
  std::vector<int32_t> values(padded + kLanes);
  auto prefetch = [&](int64_t hit) {
    const int64_t expert = pairs.expert(hit);
    for (int vector : {kDown, kUp}) {
      const int64_t at = VectorPlace(expert, vector);
      for (int64_t word = 0; word < words; word += 16)
        __builtin_prefetch(pool.words + at * words + word, 1);
      for (int64_t word = 0; word < accumulator_words; word += 16)
        __builtin_prefetch(pool.accumulators + at * accumulator_words + word, 1);
      const int64_t place = NumberPlace(pool.num_experts, expert, vector);
      __builtin_prefetch(pool.scales + place, 1);
      __builtin_prefetch(pool.moments + place, 1);
    }
  };
  for (int64_t hit = first; hit < std::min(last, first + kAhead); ++hit) prefetch(hit);
  for (int64_t hit = first; hit < last; ++hit) {
    if (hit + kAhead < last) prefetch(hit + kAhead);
    for (int64_t i = pairs.first(hit); i < pairs.first(hit + 1); ++i) {
      const int64_t pair = pairs.pair(i), row = pair / gradient.chosen * width;
      const float *x = gradient.x + row, *dy = gradient.dy + row;
      const float c_down = gradient.c_down[pair], c_up = gradient.c_up[pair];
      float *__restrict down = sums[0].data(), *__restrict up = sums[1].data();
      if (i == pairs.first(hit))
        for (int64_t c = 0; c < width; ++c) down[c] = c_down * x[c], up[c] = c_up * dy[c];
      else
        for (int64_t c = 0; c < width; ++c) down[c] += c_down * x[c], up[c] += c_up * dy[c];
    }
    const int64_t expert = pairs.expert(hit);
    statistics.experts += 1;
    for (int vector : {kDown, kUp}) {
      const int64_t place = NumberPlace(pool.num_experts, expert, vector);
      const int64_t at = VectorPlace(expert, vector);
      MoveVector(
          rule, sums[vector].data(), width, pool.words + at * words,
          pool.accumulators + at * accumulator_words, pool.scales + place, pool.moments + place,
          Absorb(states[vector], (uint32_t)(pool.first_expert + expert)), values.data(), statistics);
    }
  }
}

}  // namespace peer

// Product keys: the largest of all sums of two rows of scores, and the gradient of scores.
// See pallas_kernels/product_keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"

namespace peer {

// Orders floats as integers: -NaN < -inf < ... < -0 < +0 < ... < inf < NaN.
INLINE int32_t Ordered(float score) {
  int32_t bits;
  std::memcpy(&bits, &score, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
// A score with its place: larger is better, and of equals the lower place.
INLINE int64_t Ranked(float score, int32_t place) {
  return (int64_t)((uint64_t)(uint32_t)Ordered(score) << 32 | (uint32_t)~place);
}
INLINE int32_t PlaceOf(int64_t ranked) { return ~(int32_t)(uint32_t)ranked; }

// Finds the k largest scores of a row, best first; of equals, the lower place first.
class TopK {
 public:
  explicit TopK(int64_t size) : found_(size + kGroups), rank_(size + kGroups) {}

  void Find(const float* scores, int64_t size, int64_t k, float* best, int32_t* place) {
    const int64_t count =
        size >= 2 * kGroups && k <= kGroups ? Candidates(scores, size, k) : All(scores, size);
    if (count <= kGroups) {
      PutByRank(count, k, place);
    } else {
      const auto begin = found_.begin();
      std::partial_sort(begin, begin + k, begin + count, std::greater<int64_t>());
      for (int64_t i = 0; i < k; ++i) place[i] = PlaceOf(found_[i]);
    }
    for (int64_t i = 0; i < k; ++i) best[i] = scores[place[i]];
  }

 private:
  static constexpr int64_t kGroups = 64;

  int64_t All(const float* scores, int64_t size) {
    for (int64_t i = 0; i < size; ++i) found_[i] = Ranked(scores[i], i);
    return size;
  }

  // Collects few scores with the k largest among them: those that reach a lower bound, which is
  // the k-th largest of the maxima of 64 interleaved groups.
  int64_t Candidates(const float* scores, int64_t size, int64_t k) {
    constexpr int kVectors = kGroups / kLanes;
    const int64_t whole = size / kGroups * kGroups;
    Ints largest[kVectors];
    for (auto& each : largest) each = Ints{} + std::numeric_limits<int32_t>::min();
    for (int64_t i = 0; i < whole; i += kGroups)
      for (int v = 0; v < kVectors; ++v) {
        Ints bits = Load<Ints>(scores + i + v * kLanes);
        bits ^= (bits >> 31) & 0x7fffffff;
        largest[v] = bits > largest[v] ? bits : largest[v];
      }
    int32_t of_group[kGroups];
    for (int v = 0; v < kVectors; ++v) Store(of_group + v * kLanes, largest[v]);
    int32_t bound = std::numeric_limits<int32_t>::max();
    for (int32_t each : of_group) {
      Ints larger = {};
      for (auto& vector : largest) larger -= vector > each;
      if (SumOfLanes(larger) < k) bound = std::min(bound, each);
    }
    int64_t count = 0;
    auto take = [&](int64_t i) {
      found_[count] = Ranked(scores[i], i);
      count += Ordered(scores[i]) >= bound;
    };
    for (int64_t group = 0; group < kGroups; ++group)
      if (of_group[group] >= bound)
        for (int64_t i = group; i < whole; i += kGroups) take(i);
    for (int64_t i = whole; i < size; ++i) take(i);
    return count;
  }

  // Puts each in its place, which is the number of those that are better: no branch to predict.
  void PutByRank(int64_t count, int64_t k, int32_t* place) {
    const int64_t padded = (count + 7) / 8 * 8;
    std::fill(found_.begin() + count, found_.begin() + padded, std::numeric_limits<int64_t>::min());
    std::fill(rank_.begin(), rank_.begin() + padded, 0);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t other = found_[j];
      for (int64_t i = 0; i < padded; ++i) rank_[i] += other > found_[i];
    }
    for (int64_t i = 0; i < count; ++i)
      if (rank_[i] < k) place[rank_[i]] = PlaceOf(found_[i]);
  }

  std::vector<int64_t> found_, rank_;
};

// ids[row] = the k pairs i * n2 + j with the largest scores1[row, i] + scores2[row, j].
inline void TopPairs(const float* scores1, int64_t n1, const float* scores2, int64_t n2, int64_t k,
                     int32_t* ids, int64_t first, int64_t last) {
  const int64_t k1 = std::min(k, n1), k2 = std::min(k, n2);
  TopK top(std::max(n1, n2));
  std::vector<float> best1(k1), best2(k2);
  std::vector<int32_t> place1(k1), place2(k2), taken(k1);
  std::vector<int64_t> head(k1);
  for (int64_t row = first; row < last; ++row) {
    top.Find(scores1 + row * n1, n1, k1, best1.data(), place1.data());
    top.Find(scores2 + row * n2, n2, k2, best2.data(), place2.data());
    // The sums of each i descend. The largest of the k1 heads is the next best.
    for (int64_t i = 0; i < k1; ++i) {
      taken[i] = 0;
      head[i] = Ranked(best1[i] + best2[0], i);
    }
    for (int64_t c = 0; c < k; ++c) {
      int64_t best = std::numeric_limits<int64_t>::min();
      for (int64_t i = 0; i < k1; ++i) best = std::max(best, head[i]);
      const int32_t i = PlaceOf(best);
      ids[row * k + c] = place1[i] * n2 + place2[taken[i]];
      head[i] = ++taken[i] < k2 ? Ranked(best1[i] + best2[taken[i]], i)
                                : std::numeric_limits<int64_t>::min();
    }
  }
}

// The gradient of one head's chosen scores, which goes straight to its queries and sub-keys. The
// queries of a token begin `stride` numbers after those of the token before.
inline void ScoreGradient(const float* __restrict d_scores, const int32_t* __restrict index,
                          const float* __restrict query, const float* __restrict keys,
                          float* __restrict d_query, float* __restrict d_keys, int64_t tokens,
                          int64_t k, int64_t num_keys, int64_t width, int64_t stride) {
  std::fill(d_keys, d_keys + num_keys * width, 0.0f);
  for (int64_t token = 0; token < tokens; ++token, query += stride, d_query += stride) {
    std::fill(d_query, d_query + width, 0.0f);
    for (int64_t c = 0; c < k; ++c) {
      const float d_score = *d_scores++;
      const int64_t at = *index++ * width;
      for (int64_t i = 0; i < width; ++i) {
        d_query[i] += d_score * keys[at + i];
        d_keys[at + i] += d_score * query[i];
      }
    }
  }
}

}  // namespace peer

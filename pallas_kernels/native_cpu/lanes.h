// Vectors of floats and integers, and the codes in them. See pallas_kernels/packing.py.
#pragma once

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

namespace peer {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));

constexpr int64_t RoundUp(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

template <class Vector, class Element>
INLINE Vector Load(const Element* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
INLINE Floats LoadFloats(const float* from) { return Load<Floats>(from); }
INLINE Ints LoadInts(const int32_t* from) { return Load<Ints>(from); }
template <class Vector, class Element>
INLINE void Store(Element* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// Reads `count` words, and zeros beyond them. `kWhole` promises that a vector is full.
template <bool kWhole>
INLINE Words LoadWords(const int32_t* from, int64_t count) {
  if (kWhole || count >= kLanes) return Load<Words>(from);
  Words words = {};
  std::memcpy(&words, from, 4 * count);
  return words;
}

INLINE Floats AllEqual(float value) { return value - Floats{}; }
INLINE Floats ToFloats(Ints ints) { return __builtin_convertvector(ints, Floats); }
INLINE Ints ToInts(Floats floats) { return __builtin_convertvector(floats, Ints); }

// Sums the lanes as a tree: always in the same order.
template <class Vector>
INLINE auto SumOfLanes(Vector vector) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) vector[i] += vector[i + half];
  return vector[0];
}

// Code number `plane` of each word, in two's complement.
template <int kBits>
INLINE Ints Code(Words words, int plane) {
  return (Ints)(words << (32 - kBits - kBits * plane)) >> (32 - kBits);
}

// The codes of a plane as floats, times `kCodeUnit`: at the top of a word, and not shifted down.
template <int kBits>
constexpr float kCodeUnit = (float)(1u << (32 - kBits));
template <int kBits>
INLINE Floats TopCode(Words words, int plane) {
  constexpr uint32_t kMask = ~0u << (32 - kBits);
  return ToFloats((Ints)((words << (32 - kBits - kBits * plane)) & kMask));
}

}  // namespace peer

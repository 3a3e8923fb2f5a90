// Vectors of floats and integers, and the codes in them. See pallas_kernels/packing.py.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

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

INLINE Ints Numbered() {
  Ints lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}
INLINE Floats AllEqual(float value) { return value - Floats{}; }
INLINE Floats ToFloats(Ints ints) { return __builtin_convertvector(ints, Floats); }
INLINE Ints ToInts(Floats floats) { return __builtin_convertvector(floats, Ints); }

template <class Element, int kCount>
struct LanesOf {
  typedef Element Vector __attribute__((vector_size(sizeof(Element) * kCount)));
};

// Sums the lanes as a tree: always in the same order. A loop over lanes would go through memory.
template <class Element, int kCount>
INLINE Element SumOf(typename LanesOf<Element, kCount>::Vector vector) {
  if constexpr (kCount == 2) {
    return vector[0] + vector[1];
  } else {
    using Half = typename LanesOf<Element, kCount / 2>::Vector;
    const Element* lanes = (const Element*)&vector;
    return SumOf<Element, kCount / 2>(Load<Half>(lanes) + Load<Half>(lanes + kCount / 2));
  }
}
template <class Vector>
INLINE auto SumOfLanes(Vector vector) {
  return SumOf<std::remove_cvref_t<decltype(vector[0])>, kLanes>(vector);
}

// Code number `plane` of each word, in two's complement.
template <int kBits>
INLINE Ints Code(Words words, int plane) {
  return (Ints)(words << (32 - kBits - kBits * plane)) >> (32 - kBits);
}

// The codes of a plane as floats, times `kCodeUnit`.
#ifdef __AVX512F__
// One instruction reads the lowest four bits of each lane as a place in a table.
template <int kBits>
constexpr bool kByTable = kBits <= 4;
#else
template <int kBits>
constexpr bool kByTable = false;
#endif
template <int kBits>
constexpr float kCodeUnit = kByTable<kBits> ? 1 : (float)(1u << (32 - kBits));

template <int kBits>
INLINE Floats FloatCode(Words words, int plane) {
#ifdef __AVX512F__
  if constexpr (kByTable<kBits>) {
    Floats table;
    for (int place = 0; place < kLanes; ++place)
      table[place] = (float)((int32_t)((uint32_t)place << (32 - kBits)) >> (32 - kBits));
    return (Floats)_mm512_permutexvar_ps((__m512i)(words >> (kBits * plane)), (__m512)table);
  }
#endif
  // At the top of a word, and not shifted down.
  constexpr uint32_t kMask = ~0u << (32 - kBits);
  return ToFloats((Ints)((words << (32 - kBits - kBits * plane)) & kMask));
}

}  // namespace peer

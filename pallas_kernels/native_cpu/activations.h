// Activations of experts and their slopes. See pallas_kernels/activations.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"

namespace peer {

enum class Activation : int64_t { kGelu, kRelu, kRelu2 };

// e^x to 2 units in the last place, as a polynomial after taking out powers of two (Cephes).
INLINE float Exp(float x) {
  constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float shifted = x * 1.44269504f + kRounds;
  const float power = shifted - kRounds;
  const float rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f})
    series = series * rest + c;
  const float value = series * rest * rest + rest + 1.0f;
  uint32_t bits, shift;
  std::memcpy(&bits, &value, 4);
  std::memcpy(&shift, &shifted, 4);
  bits += shift << 23;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// erf(x) as a rational function; the one that XLA uses.
INLINE float Erf(float x) {
  x = std::min(std::max(x, -3.832506856900711f), 3.832506856900711f);
  const float z = x * x;
  float over = 0.00022905065861350646f;
  for (float c : {0.0034082910107109506f, 0.050955695062380861f, 0.18520832239976145f,
                  1.128379143519084f})
    over = over * z + c;
  float under = -1.1791602954361697e-7f;
  for (float c : {0.000023547966471313185f, 0.0010179625278914885f, 0.014070470171167667f,
                  0.11098505178285362f, 0.49746925110067538f, 1.0f})
    under = under * z + c;
  return x * over / under;
}

INLINE float NormalCdf(float h) { return 0.5f + 0.5f * Erf(h * 0.70710678f); }

INLINE float Value(Activation kind, float h) {
  if (kind == Activation::kGelu) return h * NormalCdf(h);
  const float positive = h < 0 ? 0 : h;
  return kind == Activation::kRelu ? positive : positive * positive;
}

INLINE float Slope(Activation kind, float h) {
  if (kind == Activation::kGelu) return NormalCdf(h) + h * (Exp(-0.5f * h * h) * 0.39894228f);
  if (kind == Activation::kRelu) return h > 0 ? 1.0f : 0.0f;
  return 2 * (h < 0 ? 0 : h);
}

// Calls `loop(kind)` with a constant, so that the loop is compiled for each kind.
template <class Loop>
INLINE void WithKind(Activation kind, const Loop& loop) {
  if (kind == Activation::kGelu) loop(std::integral_constant<Activation, Activation::kGelu>());
  if (kind == Activation::kRelu) loop(std::integral_constant<Activation, Activation::kRelu>());
  if (kind == Activation::kRelu2) loop(std::integral_constant<Activation, Activation::kRelu2>());
}

}  // namespace peer

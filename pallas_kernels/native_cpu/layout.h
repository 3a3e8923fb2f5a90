// Where the arrays of a pool hold an expert. See pallas_kernels/storage.py.
#pragma once

#include <cstdint>

namespace peer {

constexpr int kDown = 0, kUp = 1;

// The place of a vector, in vectors: `down` of an expert is before its `up`.
constexpr int64_t VectorPlace(int64_t expert, int vector) { return 2 * expert + vector; }

// The place of a number of a vector, such as its scale, in an array [2, N].
constexpr int64_t NumberPlace(int64_t num_experts, int64_t expert, int vector) {
  return vector * num_experts + expert;
}

}  // namespace peer

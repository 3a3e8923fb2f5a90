// Pages of 2 MiB for large arrays.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // since Linux 6.1
#endif

namespace peer {

// Asks Linux to keep an array in pages of 2 MiB, so that reading at random places seldom waits for
// an address to be translated. The first call moves the array, which takes up to a second for 256
// MiB; later ones take microseconds. Where Linux refuses, nothing changes.
inline void UseHugePages(const void* array, int64_t num_bytes) {
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = ((uintptr_t)array + kPage - 1) / kPage * kPage;
  const uintptr_t end = ((uintptr_t)array + num_bytes) / kPage * kPage;
  if (end < begin + 2 * kPage) return;
  if (madvise((void*)begin, end - begin, MADV_HUGEPAGE) == 0)
    madvise((void*)begin, end - begin, MADV_COLLAPSE);
}

}  // namespace peer

// A loop over pieces of work on a pool of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace peer {

// Calls `body(first, last, piece)` for the pieces of [0, size), on the caller and on the pool.
//
// The pieces do not depend on the number of threads. The caller works, too, and waits only for
// pieces that have begun, so that a busy pool delays it and never blocks it. The pool has
// `num_threads()` and `Schedule(function)`.
template <class Pool, class Body>
void ForPieces(Pool& pool, int64_t size, int64_t piece_size, const Body& body) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const int64_t pieces = (size + piece_size - 1) / piece_size;
  if (pieces <= 0) return;
  auto progress = std::make_shared<Progress>();
  // A helper that starts late finds no piece left, and does not touch `body`, which may be gone.
  auto work = [progress, pieces, size, piece_size, body = &body] {
    int64_t mine = 0;
    for (int64_t i; (i = progress->next.fetch_add(1)) < pieces; ++mine)
      (*body)(i * piece_size, std::min(size, (i + 1) * piece_size), i);
    if (mine && progress->done.fetch_add(mine) + mine == pieces) {
      std::lock_guard<std::mutex> lock(progress->mutex);
      progress->all_done.notify_all();
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), pieces) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done.load() == pieces; });
}

}  // namespace peer

// Entry points for XLA: typed handlers that check nothing but formats. The Python side has checked
// the shapes.

#include "huge_pages.h"
#include "lookup.h"
#include "product_keys.h"
#include "threads.h"
#include "update.h"
#include "xla/ffi/api/ffi.h"

namespace peer {
namespace {

namespace ffi = ::xla::ffi;

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U32 = ffi::Buffer<ffi::U32>;
using F32Out = ffi::ResultBuffer<ffi::F32>;
using S32Out = ffi::ResultBuffer<ffi::S32>;

constexpr int64_t kPairsOfPiece = 2048;  // least number of (token, expert) pairs
constexpr int64_t kPiecesOfThread = 4, kHitsOfPiece = 256, kRowsOfPiece = 64;

// Calls `run.operator()<bits, whole>()` for a number of bits of codes. Vectors of lanes are `whole`
// if each vector of an expert fills them.
template <class Run>
ffi::Error ForFormat(int64_t bits, const Pool& pool, const Run& run) {
  const bool whole = pool.vector_words % kLanes == 0;
  auto run_with = [&]<int kBits>() {
    whole ? run.template operator()<kBits, true>() : run.template operator()<kBits, false>();
    return ffi::Error::Success();
  };
  if (bits == 8) return run_with.template operator()<8>();
  if (bits == 4) return run_with.template operator()<4>();
  if (bits == 2) return run_with.template operator()<2>();
  return ffi::Error::InvalidArgument("codes have 8, 4 or 2 bits");
}

Pool PoolOf(const S32& words, const F32& scales, const S32& layer, int64_t width, int64_t bits) {
  const int64_t at = layer.typed_data()[0], num_experts = scales.dimensions().back();
  const auto shape = words.dimensions();
  const int64_t size = shape[shape.size() - 2] * shape[shape.size() - 1];
  UseHugePages(words.typed_data(), words.size_bytes());
  UseHugePages(scales.typed_data(), scales.size_bytes());
  return {words.typed_data() + at * size, scales.typed_data() + at * 2 * num_experts, num_experts,
          width * bits / 32};
}

// A thread waits for the experts of the first token of a piece, so that pieces are not small.
int64_t TokensOfPiece(const ffi::ThreadPool& threads, const S32& ids) {
  const int64_t tokens = ids.dimensions()[0], chosen = ids.dimensions()[1];
  const int64_t even = tokens / (kPiecesOfThread * std::max<int64_t>(1, threads.num_threads()));
  return std::max({(int64_t)1, kPairsOfPiece / std::max<int64_t>(1, chosen), even});
}

const float* OrNull(const F32& numbers) {
  return numbers.element_count() ? numbers.typed_data() : nullptr;
}

ffi::Error Forward(ffi::ThreadPool threads, S32 words, F32 scales, S32 layer, S32 ids, F32 gates,
                   F32 x, F32 bias, F32Out y, int64_t bits, int64_t activation) {
  const int64_t chosen = ids.dimensions()[1], width = x.dimensions()[1];
  const Pool pool = PoolOf(words, scales, layer, width, bits);
  const Tokens in{(Activation)activation, chosen, width, ids.typed_data(), gates.typed_data(),
                  OrNull(bias), x.typed_data(), nullptr};
  return ForFormat(bits, pool, [&]<int kBits, bool kWhole>() {
    ForPieces(threads, ids.dimensions()[0], TokensOfPiece(threads, ids),
              [&](int64_t first, int64_t last, int64_t) {
                ForwardTokens<kBits, kWhole>(pool, in, y->typed_data(), first, last);
              });
  });
}

ffi::Error Backward(ffi::ThreadPool threads, S32 words, F32 scales, S32 layer, S32 ids, F32 gates,
                    F32 x, F32 bias, F32 dy, F32Out dx, F32Out d_gates, F32Out c_down, F32Out c_up,
                    F32Out d_down_scale, F32Out d_up_scale, int64_t bits, int64_t activation) {
  const int64_t chosen = ids.dimensions()[1], width = x.dimensions()[1];
  const Pool pool = PoolOf(words, scales, layer, width, bits);
  const Tokens in{(Activation)activation, chosen, width, ids.typed_data(), gates.typed_data(),
                  OrNull(bias), x.typed_data(), dy.typed_data()};
  const Gradients out{dx->typed_data(), d_gates->typed_data(), c_down->typed_data(),
                      c_up->typed_data(), d_down_scale->typed_data(), d_up_scale->typed_data()};
  return ForFormat(bits, pool, [&]<int kBits, bool kWhole>() {
    ForPieces(threads, ids.dimensions()[0], TokensOfPiece(threads, ids),
              [&](int64_t first, int64_t last, int64_t) {
                BackwardTokens<kBits, kWhole>(pool, in, out, first, last);
              });
  });
}

ffi::Error TopPairsOfRows(ffi::ThreadPool threads, F32 scores1, F32 scores2, S32Out ids) {
  const int64_t k = ids->dimensions().back(), rows = ids->element_count() / k;
  ForPieces(threads, rows, kRowsOfPiece, [&](int64_t first, int64_t last, int64_t) {
    TopPairs(scores1.typed_data(), scores1.dimensions().back(), scores2.typed_data(),
             scores2.dimensions().back(), k, ids->typed_data(), first, last);
  });
  return ffi::Error::Success();
}

ffi::Error ScoreGradientOfHeads(ffi::ThreadPool threads, F32 query, F32 keys, S32 index,
                                F32 d_scores, F32Out d_query, F32Out d_keys) {
  const int64_t heads = index.dimensions()[0], tokens = index.dimensions()[1];
  const int64_t k = index.dimensions()[2], num_keys = keys.dimensions()[1];
  const int64_t width = keys.dimensions()[2];
  ForPieces(threads, heads, 1, [&](int64_t head, int64_t, int64_t) {
    const int64_t pairs = head * tokens * k, own_keys = head * num_keys * width;
    ScoreGradient(d_scores.typed_data() + pairs, index.typed_data() + pairs,
                  query.typed_data() + head * width, keys.typed_data() + own_keys,
                  d_query->typed_data() + head * width, d_keys->typed_data() + own_keys, tokens, k,
                  num_keys, width, heads * width);
  });
  return ffi::Error::Success();
}

// XLA copies what it cannot alias.
template <class In, class Out>
void CopyUnlessAliased(const In& in, Out& out) {
  if (in.untyped_data() != out->untyped_data())
    std::memcpy(out->untyped_data(), in.untyped_data(), in.size_bytes());
}

ffi::Error Update(ffi::ThreadPool threads, S32 words, F32 scales, S32 accumulators, F32 moments,
                  S32 ids, F32 c_down, F32 c_up, F32 x, F32 dy, F32 rule, U32 seeds,
                  S32Out new_words, F32Out new_scales, S32Out new_accumulators, F32Out new_moments,
                  F32Out statistics, int64_t bits, int64_t accumulator_bits, int64_t purpose,
                  ffi::Span<const float> numbers) {
  CopyUnlessAliased(words, new_words);
  CopyUnlessAliased(scales, new_scales);
  CopyUnlessAliased(accumulators, new_accumulators);
  CopyUnlessAliased(moments, new_moments);
  UseHugePages(new_words->typed_data(), words.size_bytes());
  UseHugePages(new_scales->typed_data(), scales.size_bytes());
  UseHugePages(new_accumulators->typed_data(), accumulators.size_bytes());
  UseHugePages(new_moments->typed_data(), moments.size_bytes());
  const int64_t count = ids.dimensions()[0], tokens = ids.dimensions()[1];
  const int64_t layers = scales.dimensions()[0];
  const int64_t first_layer = seeds.typed_data()[2], first_expert = seeds.typed_data()[3];
  const int64_t chosen = ids.dimensions()[2], width = x.dimensions()[2];
  const int64_t num_experts = scales.dimensions()[2], pairs = tokens * chosen;
  const float* three = rule.typed_data();
  const Rule how{three[0], three[1], three[2], (int)bits, (int)accumulator_bits, (int32_t)numbers[0], (int32_t)numbers[1],
                 numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7],
                 numbers[8]};
  for (int64_t number = 0; number < count; ++number) {
    const int64_t layer = first_layer + number;
    const Trained pool{
        new_words->typed_data() + layer * (words.element_count() / layers),
        new_accumulators->typed_data() + layer * (accumulators.element_count() / layers),
        new_scales->typed_data() + layer * 2 * num_experts,
        new_moments->typed_data() + layer * 2 * num_experts, num_experts, width, first_expert};
    const Gradient gradient{ids.typed_data() + number * pairs,
                            c_down.typed_data() + number * pairs,
                            c_up.typed_data() + number * pairs,
                            x.typed_data() + number * tokens * width,
                            dy.typed_data() + number * tokens * width, tokens, chosen};
    uint32_t states[2], state = kGolden;
    for (uint32_t counter : {seeds.typed_data()[0], (uint32_t)purpose, seeds.typed_data()[1],
                             (uint32_t)layer})
      state = Absorb(state, counter);
    for (uint32_t vector = 0; vector < 2; ++vector) states[vector] = Absorb(state, vector);

    const SortedPairs sorted(gradient, num_experts);
    // Counts of each piece, so that their sum does not depend on which thread is first.
    std::vector<Statistics> counts((sorted.num_hit() + kHitsOfPiece - 1) / kHitsOfPiece);
    ForPieces(threads, sorted.num_hit(), kHitsOfPiece,
              [&](int64_t first, int64_t last, int64_t piece) {
                UpdateExperts(how, pool, gradient, sorted, states, first, last, counts[piece]);
              });
    Statistics total;
    for (const Statistics& each : counts) total.Add(each);
    int64_t row = 0;
    for (double each : {total.experts, total.rows, total.clipped, total.grown, total.step_size})
      statistics->typed_data()[row++ * count + number] = each;
  }
  return ffi::Error::Success();
}

// Reads rows at random places: what a lookup would cost if it did nothing else.
ffi::Error ReadRows(ffi::ThreadPool threads, S32 words, S32 ids, S32Out sum, int64_t row_words) {
  constexpr int64_t kAhead = 16;
  UseHugePages(words.typed_data(), words.size_bytes());
  const int64_t rows = ids.element_count(), piece = 4096;
  std::vector<int32_t> sums((rows + piece - 1) / piece);
  auto row_of = [&](int64_t i) { return words.typed_data() + ids.typed_data()[i] * row_words; };
  ForPieces(threads, rows, piece, [&](int64_t first, int64_t last, int64_t number) {
    Words all = {};
    for (int64_t i = first; i < last; ++i) {
      if (i + kAhead < last)
        for (int64_t at = 0; at < row_words; at += 16) __builtin_prefetch(row_of(i + kAhead) + at);
      for (int64_t at = 0; at < row_words; at += kLanes) all ^= Load<Words>(row_of(i) + at);
    }
    sums[number] = SumOfLanes((Ints)all);
  });
  sum->typed_data()[0] = 0;
  for (int32_t each : sums) sum->typed_data()[0] ^= each;
  return ffi::Error::Success();
}

}  // namespace
}  // namespace peer

using peer::F32;
using peer::S32;
using peer::U32;
using xla::ffi::Ffi;
using xla::ffi::Span;
using xla::ffi::ThreadPool;

XLA_FFI_DEFINE_HANDLER_SYMBOL(peer_lookup_forward, peer::Forward,
    Ffi::Bind().Ctx<ThreadPool>()
        .Arg<S32>().Arg<F32>().Arg<S32>().Arg<S32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Ret<F32>()
        .Attr<int64_t>("bits").Attr<int64_t>("activation"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(peer_lookup_backward, peer::Backward,
    Ffi::Bind().Ctx<ThreadPool>()
        .Arg<S32>().Arg<F32>().Arg<S32>().Arg<S32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>()
        .Attr<int64_t>("bits").Attr<int64_t>("activation"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(peer_top_pairs, peer::TopPairsOfRows,
    Ffi::Bind().Ctx<ThreadPool>().Arg<F32>().Arg<F32>().Ret<S32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(peer_score_gradient, peer::ScoreGradientOfHeads,
    Ffi::Bind().Ctx<ThreadPool>()
        .Arg<F32>().Arg<F32>().Arg<S32>().Arg<F32>()
        .Ret<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(peer_update, peer::Update,
    Ffi::Bind().Ctx<ThreadPool>()
        .Arg<S32>().Arg<F32>().Arg<S32>().Arg<F32>()
        .Arg<S32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<U32>()
        .Ret<S32>().Ret<F32>().Ret<S32>().Ret<F32>().Ret<F32>()
        .Attr<int64_t>("bits").Attr<int64_t>("accumulator_bits").Attr<int64_t>("purpose")
        .Attr<Span<const float>>("numbers"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(peer_read_rows, peer::ReadRows,
    Ffi::Bind().Ctx<ThreadPool>().Arg<S32>().Arg<S32>().Ret<S32>().Attr<int64_t>("row_words"));

// What the loader compares before it registers anything: the version of XLA's interface, and the
// digest of the sources.
extern "C" const int32_t peer_interface[2] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
extern "C" const char peer_sources[] = PEER_SOURCES;

// Runs every native kernel without Python and XLA, on 1 to 8 threads of the standard library, and
// compares the results bit by bit. Sanitizers watch it. Arrays are as small as they can be, so that
// each access outside of one is seen.
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <thread>

#include "../../pallas_kernels/native_cpu/lookup.h"
#include "../../pallas_kernels/native_cpu/product_keys.h"
#include "../../pallas_kernels/native_cpu/threads.h"
#include "../../pallas_kernels/native_cpu/update.h"

namespace {

using namespace peer;

class Threads {
 public:
  explicit Threads(int number) : number_(number) {}
  ~Threads() {
    for (std::thread& each : started_) each.join();
  }
  int64_t num_threads() const { return number_; }
  void Schedule(std::function<void()> work) { started_.emplace_back(std::move(work)); }

 private:
  int number_;
  std::vector<std::thread> started_;
};

std::mt19937 random_bits(1);

std::vector<float> Normal(int64_t size) {
  std::normal_distribution<float> normal;
  std::vector<float> result(size);
  for (float& each : result) each = normal(random_bits);
  return result;
}

std::vector<int32_t> Integers(int64_t size, int32_t low, int32_t high) {
  std::uniform_int_distribution<int32_t> uniform(low, high);
  std::vector<int32_t> result(size);
  for (int32_t& each : result) each = uniform(random_bits);
  return result;
}

// Everything that a run computes, as bits.
struct Results {
  std::vector<uint32_t> bits;
  template <class Element>
  void Add(const std::vector<Element>& array) {
    const size_t before = bits.size();
    bits.resize(before + array.size());
    if (!array.empty()) std::memcpy(bits.data() + before, array.data(), 4 * array.size());
  }
};

struct Case {
  int bits, accumulator_bits;
  int64_t width, num_experts, tokens, chosen;
  Activation activation;
  std::vector<int32_t> words, accumulators, ids;
  std::vector<float> scales, moments, gates, bias, x, dy;

  Case(int bits, int accumulator_bits, int64_t width, int64_t num_experts, int64_t tokens,
       int64_t chosen, Activation activation)
      : bits(bits), accumulator_bits(accumulator_bits), width(width), num_experts(num_experts),
        tokens(tokens), chosen(chosen), activation(activation) {
    const int32_t least = std::numeric_limits<int32_t>::min();
    words = Integers(num_experts * 2 * width * bits / 32, least, -(least + 1));
    accumulators = Integers(num_experts * 2 * width * accumulator_bits / 32, least, -(least + 1));
    ids = Integers(tokens * chosen, -2, num_experts + 1);
    scales = Normal(2 * num_experts);
    for (float& each : scales) each = 0.01f + 0.1f * each * each;
    moments.assign(2 * num_experts, 0.0f);
    gates = Normal(tokens * chosen);
    bias = Normal(tokens * chosen);
    x = Normal(tokens * width);
    dy = Normal(tokens * width);
  }
};

template <int kBits, bool kWhole>
void LookUpAndUpdate(Case each, Threads& threads, Results& results) {
  const Pool pool{each.words.data(), each.scales.data(), each.num_experts, each.width * kBits / 32};
  const Tokens in{each.activation, each.chosen, each.width, each.ids.data(), each.gates.data(),
                  each.bias.data(), each.x.data(), each.dy.data()};
  std::vector<float> y(each.tokens * each.width), dx = y;
  std::vector<std::vector<float>> of_pairs(5, std::vector<float>(each.tokens * each.chosen));
  const Gradients out{dx.data(), of_pairs[0].data(), of_pairs[1].data(), of_pairs[2].data(),
                      of_pairs[3].data(), of_pairs[4].data()};
  ForPieces(threads, each.tokens, 3, [&](int64_t first, int64_t last, int64_t) {
    ForwardTokens<kBits, kWhole>(pool, in, y.data(), first, last);
    BackwardTokens<kBits, kWhole>(pool, in, out, first, last);
  });
  results.Add(y);
  results.Add(dx);
  for (const auto& array : of_pairs) results.Add(array);

  const Gradient gradient{each.ids.data(), of_pairs[1].data(), of_pairs[2].data(), each.x.data(),
                          each.dy.data(), each.tokens, each.chosen};
  const float high = 7 << each.accumulator_bits;
  const Rule rule{0.02f, 0.1f, 0.99f, kBits, each.accumulator_bits, (int32_t)-high, (int32_t)high,
                  each.width * 4.0f, each.width * high * high / 4, high * high / 2, 1.1892071f,
                  0.5f, 1048576.0f, 1e-12f};
  const Trained trained{each.words.data(), each.accumulators.data(), each.scales.data(),
                        each.moments.data(), each.num_experts, each.width};
  const SortedPairs pairs(gradient, each.num_experts);
  const uint32_t states[2] = {1, 2};
  std::vector<Statistics> counts((pairs.num_hit() + 4) / 5);
  ForPieces(threads, pairs.num_hit(), 5, [&](int64_t first, int64_t last, int64_t piece) {
    UpdateExperts(rule, trained, gradient, pairs, states, first, last, counts[piece]);
  });
  Statistics total;
  for (const Statistics& part : counts) total.Add(part);
  results.Add(each.words);
  results.Add(each.accumulators);
  results.Add(each.scales);
  results.Add(each.moments);
  results.Add(std::vector<float>{(float)total.experts, (float)total.rows, (float)total.clipped,
                                 (float)total.grown, (float)total.step_size});
}

void Retrieve(int64_t n1, int64_t n2, int64_t k, Threads& threads, Results& results) {
  const int64_t rows = 20, width = 5, heads = 4, tokens = rows / heads;
  const std::vector<float> scores1 = Normal(rows * n1), scores2 = Normal(rows * n2);
  std::vector<int32_t> ids(rows * k);
  ForPieces(threads, rows, 3, [&](int64_t first, int64_t last, int64_t) {
    TopPairs(scores1.data(), n1, scores2.data(), n2, k, ids.data(), first, last);
  });
  results.Add(ids);
  for (int32_t& each : ids) each /= n2;
  const std::vector<float> query = Normal(tokens * heads * width), keys = Normal(heads * n1 * width);
  const std::vector<float> d_scores = Normal(rows * k);
  std::vector<float> d_query = query, d_keys = keys;
  ForPieces(threads, heads, 1, [&](int64_t head, int64_t, int64_t) {
    const int64_t own = head * n1 * width;
    ScoreGradient(d_scores.data() + head * tokens * k, ids.data() + head * tokens * k,
                  query.data() + head * width, keys.data() + own, d_query.data() + head * width,
                  d_keys.data() + own, tokens, k, n1, width, heads * width);
  });
  results.Add(d_query);
  results.Add(d_keys);
}

Results Everything(int number) {
  random_bits.seed(1);
  Threads threads(number);
  Results results;
  LookUpAndUpdate<4, true>({4, 4, 64 * kLanes / 8, 40, 21, 9, Activation::kGelu}, threads, results);
  LookUpAndUpdate<4, false>({4, 0, 104, 3, 7, 30, Activation::kRelu}, threads, results);
  LookUpAndUpdate<8, false>({8, 8, 12, 50, 7, 2, Activation::kRelu2}, threads, results);
  LookUpAndUpdate<2, false>({2, 4, 304, 20, 7, 5, Activation::kGelu}, threads, results);
  Retrieve(200, 130, 16, threads, results);
  Retrieve(3, 7, 21, threads, results);
  Retrieve(70, 1, 65, threads, results);
  return results;
}

}  // namespace

int main() {
  const Results expected = Everything(1);
  for (int threads = 2; threads <= 8; threads += 3)
    if (Everything(threads).bits != expected.bits) {
      std::printf("%d threads compute other bits than one\n", threads);
      return 1;
    }
  std::printf("%zu numbers\n", expected.bits.size());
}

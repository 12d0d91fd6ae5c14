// value_loss on the CPU. Tokens in fixed chunks over threads, added in order: no result depends on the number of threads.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "tulu_core.h"

namespace {
constexpr int64_t kChunk = 4096;
struct Sums {
  double total = 0.0, column[4] = {};
};
}  // namespace

extern "C" int tulu_value_loss_cpu(const float* values, const float* old_values, const float* returns, const float* weights,
                                   int64_t tokens, float clip, float scale, float* gradient, float* loss, float* sums,
                                   int threads) {
  if (tokens < 0 || threads < 1) return TULU_INVALID;
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<Sums> partial(static_cast<size_t>(chunks));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Sums& sum = partial[static_cast<size_t>(chunk)];
    const int64_t stop = (chunk + 1) * kChunk < tokens ? (chunk + 1) * kChunk : tokens;
    for (int64_t k = chunk * kChunk; k < stop; ++k) {
      const float v = values[k], moved = v - old_values[k];
      const bool far = moved > clip || moved < -clip;
      const float held = moved > clip ? old_values[k] + clip : moved < -clip ? old_values[k] - clip : v;
      const float error = v - returns[k], held_error = held - returns[k];
      const float square = error * error, held_square = held_error * held_error;
      const bool use_held = far && held_square > square;
      const float half = 0.5f * (use_held ? held_square : square);
      const float weight = weights ? scale * weights[k] : scale;
      gradient[k] = use_held ? 0.0f : weight * error;
      sum.total += weight * half;
      sum.column[0] += half;
      sum.column[1] += far;
      sum.column[2] += square;
      sum.column[3] += v;
    }
  }
  Sums all;
  for (const Sums& sum : partial) {
    all.total += sum.total;
    for (int c = 0; c < 4; ++c) all.column[c] += sum.column[c];
  }
  *loss = static_cast<float>(all.total);
  for (int c = 0; c < 4; ++c) sums[c] = static_cast<float>(all.column[c]);
  return 0;
}

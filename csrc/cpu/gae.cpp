// Generalised advantage estimation on the CPU: segments over threads, each a reverse scan in double.
#include <cstdint>

#include "tulu_core.h"

extern "C" int tulu_gae_cpu(const float* rewards, const float* values, const int64_t* starts, const float* bootstrap,
                            int64_t segments, float gamma, float lambda, float* advantages, float* returns, int threads) {
  if (segments < 0 || threads < 1) return TULU_INVALID;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (threads > 1 && segments > 8)
  for (int64_t s = 0; s < segments; ++s) {
    double next_value = bootstrap ? bootstrap[s] : 0.0, advantage = 0.0;
    for (int64_t k = starts[s + 1] - 1; k >= starts[s]; --k) {
      const double value = values[k];
      advantage = rewards[k] + gamma * next_value - value + static_cast<double>(gamma) * lambda * advantage;
      advantages[k] = static_cast<float>(advantage);
      returns[k] = static_cast<float>(advantage + value);
      next_value = value;
    }
  }
  return 0;
}

// The gated activation silu(gate) * up of a SwiGLU MLP in one pass forward and one backward (fp32, rows over threads).
#include <cstdint>

#include "exponential.h"
#include "tulu_core.h"

namespace {

constexpr int kBlock = 1024;

// silu(gate) = gate / (1 + exp(-gate)); exp overflows to a quotient of 0, as it should.
TULU_CLONES void forward_row(const float* __restrict gate, const float* __restrict up, float* __restrict out, int64_t n) {
  float minus[kBlock], power[kBlock], tail[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = static_cast<int>(n - begin < kBlock ? n - begin : kBlock);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      const float x = -gate[begin + i];
      minus[i] = x > 80.0f ? 80.0f : (x < -80.0f ? -80.0f : x);
    }
    tulu::exponentials(minus, count, power, tail);
#pragma omp simd
    for (int i = 0; i < count; ++i) out[begin + i] = gate[begin + i] / (1.0f + power[i]) * up[begin + i];
  }
}

// d silu = s (1 + gate (1 - s)) with s = 1 / (1 + exp(-gate)).
TULU_CLONES void backward_row(const float* __restrict gate, const float* __restrict up, const float* __restrict grad,
                              float* __restrict grad_gate, float* __restrict grad_up, float* __restrict out, int64_t n) {
  float minus[kBlock], power[kBlock], tail[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = static_cast<int>(n - begin < kBlock ? n - begin : kBlock);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      const float x = -gate[begin + i];
      minus[i] = x > 80.0f ? 80.0f : (x < -80.0f ? -80.0f : x);
    }
    tulu::exponentials(minus, count, power, tail);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      const float g = gate[begin + i], u = up[begin + i], d = grad[begin + i];
      const float sigmoid = 1.0f / (1.0f + power[i]), silu = g / (1.0f + power[i]);  // as the forward pass
      out[begin + i] = silu * u;
      grad_up[begin + i] = d * silu;
      grad_gate[begin + i] = d * u * sigmoid * (1.0f + g * (1.0f - sigmoid));
    }
  }
}

}  // namespace

extern "C" int tulu_gated_forward_cpu(const float* both, float* out, int64_t rows, int64_t width, int threads) {
  if (rows < 0 || width < 0 || threads < 1) return TULU_INVALID;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 8)
  for (int64_t r = 0; r < rows; ++r) forward_row(both + 2 * r * width, both + (2 * r + 1) * width, out + r * width, width);
  return 0;
}

extern "C" int tulu_gated_backward_cpu(const float* both, const float* grad, float* grad_both, float* out, int64_t rows,
                                       int64_t width, int threads) {
  if (rows < 0 || width < 0 || threads < 1) return TULU_INVALID;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 8)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t gate = 2 * r * width, up = gate + width;
    backward_row(both + gate, both + up, grad + r * width, grad_both + gate, grad_both + up, out + r * width, width);
  }
  return 0;
}

// Inner loops, written so that the compiler vectorises them; compiled once per instruction set with TULU_ISA = its name.
// Only static functions and no library calls: a function shared with another object file could be linked from the wrong one.
#include "row_kernels.h"

#include <cfloat>

#define TULU_CONCAT_(a, b) a##b
#define TULU_CONCAT(a, b) TULU_CONCAT_(a, b)
#define TULU_STRING_(a) #a
#define TULU_STRING(a) TULU_STRING_(a)

namespace tulu {
namespace {

// exp(x) for x <= 88, about 1 ulp: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients of Cephes expf).
// Below the smallest normal number the result is 0; NaN stays NaN.
inline float fast_exp(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  const float shifted = bounded * 1.44269504088896341f + shifter;
  const float k = shifted - shifter;
  const float r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  const uint32_t power = (static_cast<uint32_t>(bits) - 0x4B400000u + 127u) << 23;
  float two_k;
  __builtin_memcpy(&two_k, &power, 4);
  const float result = p * two_k;
  return x < -87.0f ? 0.0f : result;
}

// tanh(x), polynomial of Cephes tanhf below 0.625.
inline float fast_tanh(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float bounded = magnitude > 20.0f ? 20.0f : magnitude;
  const float far = 1.0f - 2.0f / (fast_exp(2.0f * bounded) + 1.0f);
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = p * s * x + x;
  const float signed_far = x < 0.0f ? -far : far;
  return magnitude < 0.625f ? near : signed_far;
}

float maximum(const float* z, int64_t n) {
  float m = -FLT_MAX;
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < n; ++j) m = z[j] > m ? z[j] : m;
  return m;
}

template <bool CAP>
inline void exp_sums_of(const float* z, int64_t n, float scale, float inverse_cap, float m, float* sum, float* dot) {
  // Partial sums of a bounded number of terms: the rounding error does not grow with the vocabulary.
  double total = 0.0, total_dot = 0.0;
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = begin + 4096 < n ? begin + 4096 : n;
    float s = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : s, d)
    for (int64_t j = begin; j < end; ++j) {
      const float x = scale * (CAP ? fast_tanh(z[j] * inverse_cap) : z[j]);
      const float shift = x - m;
      const float e = fast_exp(shift);
      s += e;
      d += e * shift;
    }
    total += s;
    total_dot += d;
  }
  *sum = static_cast<float>(total);
  *dot = static_cast<float>(total_dot);
}

void exp_sums(const float* z, int64_t n, float inv_temperature, float softcap, float m, float* sum, float* dot) {
  if (softcap != 0.0f)
    exp_sums_of<true>(z, n, inv_temperature * softcap, 1.0f / softcap, m, sum, dot);
  else
    exp_sums_of<false>(z, n, inv_temperature, 0.0f, m, sum, dot);
}

void gradient(const float* z, float* out, int64_t n, float inv_temperature, float softcap, float m, float log_sum, float a,
              float b) {
  if (softcap != 0.0f) {
    const float scale = inv_temperature * softcap, inverse_cap = 1.0f / softcap;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float t = fast_tanh(z[j] * inverse_cap);
      const float shift = scale * t - m;
      out[j] = fast_exp(shift - log_sum) * (a + b * shift) * inv_temperature * (1.0f - t * t);
    }
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float shift = z[j] * inv_temperature - m;
    out[j] = fast_exp(shift - log_sum) * (a + b * shift) * inv_temperature;
  }
}

}  // namespace

extern const RowKernels TULU_CONCAT(row_kernels_, TULU_ISA);
const RowKernels TULU_CONCAT(row_kernels_, TULU_ISA) = {TULU_STRING(TULU_ISA), maximum, exp_sums, gradient};

}  // namespace tulu

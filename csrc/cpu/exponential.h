/* exp and its tail on arrays, vectorised by the compiler. */
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define TULU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TULU_CLONES
#endif

namespace tulu {

// e[i] = exp(x[i]) and tail[i] = exp(x[i]) - 1 - x[i] with all its digits near 0, for |x[i]| <= 80; NaN stays NaN.
TULU_CLONES static void exponentials(const float* __restrict x, int n, float* __restrict e, float* __restrict tail) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
    const float shifted = x[i] * 1.44269504088896341f + shifter;
    const float k = shifted - shifter;
    const float r = (x[i] - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;  // (exp(r) - 1 - r) / r^2, coefficients of Cephes expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float square = p * r * r;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    const uint32_t power = (static_cast<uint32_t>(bits) - 0x4B400000u + 127u) << 23;
    float two_k;
    std::memcpy(&two_k, &power, 4);
    const float value = (square + r + 1.0f) * two_k;
    e[i] = value;
    tail[i] = k == 0.0f ? square : value - 1.0f - x[i];
  }
}

}  // namespace tulu

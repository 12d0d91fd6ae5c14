/* The inner loops of the row passes, compiled once per instruction set (row_kernels.cpp) and chosen at run time. */
#pragma once
#include <cstdint>

namespace tulu {

struct RowKernels {
  const char* name;
  /* max over z[0..n) */
  float (*maximum)(const float* z, int64_t n);
  /* sum of exp(x - m) and of exp(x - m) (x - m), x = transform(z) */
  void (*exp_sums)(const float* z, int64_t n, float inv_temperature, float softcap, float m, float* sum, float* dot);
  /* out = dz of exp(x - m - log_sum) (a + b (x - m)) */
  void (*gradient)(const float* z, float* out, int64_t n, float inv_temperature, float softcap, float m, float log_sum, float a,
                   float b);
};

extern const RowKernels row_kernels_baseline;
#ifdef TULU_X86_KERNELS
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;
#endif

}  // namespace tulu

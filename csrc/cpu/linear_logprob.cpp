// Row passes of linear_logprob on the CPU: rows over threads, targets in scalar code, the rest in the chosen inner loops.
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "row_kernels.h"
#include "tulu_core.h"

namespace tulu {
namespace {

std::vector<const RowKernels*> usable_kernels() {
  std::vector<const RowKernels*> found;
#ifdef TULU_X86_KERNELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&row_kernels_avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&row_kernels_avx2);
#endif
  found.push_back(&row_kernels_baseline);
  return found;
}

const std::vector<const RowKernels*>& usable() {
  static const std::vector<const RowKernels*> kernels = usable_kernels();
  return kernels;
}

std::atomic<const RowKernels*> chosen{nullptr};

const RowKernels& kernels() {
  const RowKernels* restricted = chosen.load();
  return restricted ? *restricted : *usable().front();
}

struct Value {
  float x;      // transformed logit
  float slope;  // dx / dz
};

Value transform(float z, float inv_temperature, float softcap) {
  if (softcap == 0.0f) return {z * inv_temperature, inv_temperature};
  const float t = std::tanh(z / softcap);
  return {softcap * t * inv_temperature, inv_temperature * (1.0f - t * t)};
}

}  // namespace
}  // namespace tulu

extern "C" {

const char* tulu_cpu_isas(void) {
  struct Names {
    char text[64] = "";
    Names() {
      for (const auto* k : tulu::usable()) {
        if (text[0] != '\0') std::strcat(text, ",");
        std::strcat(text, k->name);
      }
    }
  };
  static const Names names;
  return names.text;
}

int tulu_set_cpu_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    tulu::chosen = nullptr;
    return 0;
  }
  for (const auto* k : tulu::usable())
    if (std::strcmp(name, k->name) == 0) {
      tulu::chosen = k;
      return 0;
    }
  return TULU_UNKNOWN_ISA;
}

int tulu_has_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

int tulu_linear_logprob_forward_cpu(const float* logits, int64_t ld, int64_t rows, int64_t cols, int64_t first,
                                    const int64_t* target, const int64_t* row_start, float* maximum, float* sum, float* dot,
                                    float* picked, float inv_temperature, float softcap, int threads) {
  if (rows < 0 || cols < 0 || ld < cols || threads < 1) return TULU_INVALID;
  if (cols == 0) return 0;
  const tulu::RowKernels& kernels = tulu::kernels();
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const float* z = logits + r * ld;
    // The transformation is increasing: the maximum of the block is the transformed maximum of the logits.
    const float block_maximum = tulu::transform(kernels.maximum(z, cols), inv_temperature, softcap).x;
    const float old_maximum = maximum[r];
    const float m = block_maximum > old_maximum ? block_maximum : old_maximum;
    float block_sum, block_dot;
    kernels.exp_sums(z, cols, inv_temperature, softcap, m, &block_sum, &block_dot);
    if (sum[r] != 0.0f) {
      const float scale = std::exp(old_maximum - m);
      block_dot += scale * (dot[r] + (old_maximum - m) * sum[r]);
      block_sum += scale * sum[r];
    }
    maximum[r] = m;
    sum[r] = block_sum;
    dot[r] = block_dot;
    for (int64_t k = row_start[r]; k < row_start[r + 1]; ++k) {
      const int64_t column = target[k] - first;
      if (column >= 0 && column < cols) picked[k] = tulu::transform(z[column], inv_temperature, softcap).x;
    }
  }
  return 0;
}

int tulu_linear_logprob_backward_cpu(const float* logits, int64_t ld, const int64_t* logits_row, float* out, int64_t ld_out,
                                     int64_t rows, int64_t cols, int64_t first, const int64_t* target, const int64_t* row_start,
                                     const float* stats, const float* grad, float inv_temperature, float softcap, int threads) {
  if (rows < 0 || cols < 0 || ld < cols || ld_out < cols || threads < 1) return TULU_INVALID;
  const tulu::RowKernels& kernels = tulu::kernels();
  (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<tulu::Value> values;  // of the row's targets, read before the pass overwrites them
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const float* z = logits + (logits_row ? logits_row[r] : r) * ld;
      float* dz = out + r * ld_out;
      const int64_t begin = row_start[r], end = row_start[r + 1];
      if (begin == end) {
        std::memset(dz, 0, static_cast<size_t>(cols) * sizeof(float));
        continue;
      }
      const float m = stats[4 * begin], log_sum = stats[4 * begin + 1], centred = stats[4 * begin + 2];
      float g1 = 0.0f, g2 = 0.0f;
      values.clear();
      for (int64_t k = begin; k < end; ++k) {
        g1 += grad[4 * k + 1];
        g2 += grad[4 * k + 2];
        const int64_t column = target[k] - first;
        const bool inside = column >= 0 && column < cols;
        values.push_back(inside ? tulu::transform(z[column], inv_temperature, softcap) : tulu::Value{0.0f, 0.0f});
      }
      const float a = g1 + g2 * (1.0f - centred);
      kernels.gradient(z, dz, cols, inv_temperature, softcap, m, log_sum, a, g2);
      // A target's gradient is computed again in one sum: p - 1 of a confident token must not be rounded in between.
      for (int64_t k = begin; k < end; ++k) {
        const int64_t column = target[k] - first;
        if (column < 0 || column >= cols) continue;
        const tulu::Value value = values[static_cast<size_t>(k - begin)];
        const float shift = value.x - m;
        float dx = std::exp(shift - log_sum) * (a + g2 * shift);
        for (int64_t other = begin; other < end; ++other)
          if (target[other] == target[k]) dx += grad[4 * other + 3];
        dz[column] = dx * value.slope;
      }
    }
  }
  return 0;
}

const char* tulu_error_string(int code) {
  if (code == 0) return "no error";
  if (code == TULU_INVALID) return "invalid sizes";
  if (code == TULU_UNKNOWN_ISA) return "no such instruction set in this build or on this processor";
#ifdef TULU_WITH_CUDA
  if (code > 0) return tulu_cuda_error_string(code);
#endif
  return "unknown error";
}

}  // extern "C"

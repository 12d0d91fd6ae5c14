// Row passes of linear_logprob on the GPU; what they compute: tulu_core.h. Deterministic: no atomics.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "tulu_core.h"

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
// Columns that one block of the backward pass handles.
constexpr int kBackwardColumns = 8192;

// Running statistics of a set of transformed logits: maximum, sum of exp(x - m), sum of exp(x - m) (x - m).
struct Stats {
  float m, s, d;

  __device__ void rescale(float maximum) {
    const float scale = __expf(m - maximum);
    // An empty set has m = -FLT_MAX: the difference is huge but finite, and the sums are 0.
    d = scale * (d + (m - maximum) * s);
    s *= scale;
    m = maximum;
  }
  __device__ void add(float x) {
    const float e = __expf(x - m);
    s += e;
    d += e * (x - m);
  }
  __device__ void merge(const Stats& other) {
    Stats o = other;
    const float maximum = fmaxf(m, o.m);
    rescale(maximum);
    o.rescale(maximum);
    s += o.s;
    d += o.d;
  }
};

template <bool CAP>
__device__ __forceinline__ float transform(float z, float inv_temperature, float softcap) {
  return CAP ? softcap * tanhf(z / softcap) * inv_temperature : z * inv_temperature;
}

// One block per row.
template <bool CAP, bool VECTOR>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const float* __restrict__ logits, int64_t ld, int64_t cols, int64_t first, const int64_t* __restrict__ target,
                   const int64_t* __restrict__ row_start, float* __restrict__ maximum, float* __restrict__ sum,
                   float* __restrict__ dot, float* __restrict__ picked, float inv_temperature, float softcap) {
  const int64_t row = blockIdx.x;
  const float* z = logits + row * ld;
  Stats stats{-FLT_MAX, 0.0f, 0.0f};
  if (VECTOR) {
    for (int64_t j = threadIdx.x * 4; j < cols; j += kThreads * 4) {
      const float4 v = *reinterpret_cast<const float4*>(z + j);
      const float x0 = transform<CAP>(v.x, inv_temperature, softcap), x1 = transform<CAP>(v.y, inv_temperature, softcap);
      const float x2 = transform<CAP>(v.z, inv_temperature, softcap), x3 = transform<CAP>(v.w, inv_temperature, softcap);
      const float top = fmaxf(fmaxf(x0, x1), fmaxf(x2, x3));
      if (top > stats.m) stats.rescale(top);
      stats.add(x0);
      stats.add(x1);
      stats.add(x2);
      stats.add(x3);
    }
  } else {
    for (int64_t j = threadIdx.x; j < cols; j += kThreads) {
      const float x = transform<CAP>(z[j], inv_temperature, softcap);
      if (x > stats.m) stats.rescale(x);
      stats.add(x);
    }
  }
  for (int offset = 16; offset; offset >>= 1) {
    Stats other;
    other.m = __shfl_xor_sync(0xffffffffu, stats.m, offset);
    other.s = __shfl_xor_sync(0xffffffffu, stats.s, offset);
    other.d = __shfl_xor_sync(0xffffffffu, stats.d, offset);
    stats.merge(other);
  }
  __shared__ Stats shared[kWarps];
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = stats;
  __syncthreads();
  if (threadIdx.x == 0) {
    Stats total{maximum[row], sum[row], dot[row]};
    for (int w = 0; w < kWarps; ++w) total.merge(shared[w]);
    maximum[row] = total.m;
    sum[row] = total.s;
    dot[row] = total.d;
  }
  for (int64_t k = row_start[row] + threadIdx.x; k < row_start[row + 1]; k += kThreads) {
    const int64_t column = target[k] - first;
    if (column >= 0 && column < cols) picked[k] = transform<CAP>(z[column], inv_temperature, softcap);
  }
}

__device__ __forceinline__ void store(float* out, float value) { *out = value; }
__device__ __forceinline__ void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16(value); }

// Block (x, y): row x, columns y * kBackwardColumns and on. Each thread reads and writes the same elements, so `out` may be
// `logits`; the pointers are therefore not __restrict__.
template <bool CAP, typename OUT>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const float* logits, int64_t ld, const int64_t* __restrict__ logits_row, OUT* out, int64_t ld_out,
                    int64_t cols, int64_t first, const int64_t* __restrict__ target, const int64_t* __restrict__ row_start,
                    const float* __restrict__ stats, const float* __restrict__ grad, float inv_temperature, float softcap) {
  const int64_t row = blockIdx.x;
  const float* z = logits + (logits_row ? logits_row[row] : row) * ld;
  OUT* dz = out + row * ld_out;
  const int64_t begin = row_start[row], end = row_start[row + 1];
  const int64_t from = static_cast<int64_t>(blockIdx.y) * kBackwardColumns;
  const int64_t to = from + kBackwardColumns < cols ? from + kBackwardColumns : cols;
  if (begin == end) {
    for (int64_t j = from + threadIdx.x; j < to; j += kThreads) store(dz + j, 0.0f);
    return;
  }
  const float m = stats[4 * begin], log_sum = stats[4 * begin + 1], centred = stats[4 * begin + 2];
  float g1 = 0.0f, g2 = 0.0f;
  for (int64_t k = begin; k < end; ++k) {
    g1 += grad[4 * k + 1];
    g2 += grad[4 * k + 2];
  }
  const float a = g1 + g2 * (1.0f - centred);
  for (int64_t j = from + threadIdx.x; j < to; j += kThreads) {
    float x, slope;
    if (CAP) {
      const float t = tanhf(z[j] / softcap);
      x = softcap * t * inv_temperature;
      slope = inv_temperature * (1.0f - t * t);
    } else {
      x = z[j] * inv_temperature;
      slope = inv_temperature;
    }
    const float shift = x - m;
    float dx = __expf(shift - log_sum) * (a + g2 * shift);
    // Nearly every row has one target; a shared prompt row has one per response.
    for (int64_t k = begin; k < end; ++k)
      if (target[k] - first == j) dx += grad[4 * k + 3];
    store(dz + j, dx * slope);
  }
}

template <typename OUT>
void launch_backward(const float* logits, int64_t ld, const int64_t* logits_row, OUT* out, int64_t ld_out, int64_t rows,
                     int64_t cols, int64_t first, const int64_t* target, const int64_t* row_start, const float* stats,
                     const float* grad, float inv_temperature, float softcap, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>((cols + kBackwardColumns - 1) / kBackwardColumns));
  const auto kernel = softcap != 0.0f ? backward_kernel<true, OUT> : backward_kernel<false, OUT>;
  kernel<<<grid, kThreads, 0, stream>>>(logits, ld, logits_row, out, ld_out, cols, first, target, row_start, stats, grad,
                                        inv_temperature, softcap);
}

}  // namespace

extern "C" {

int tulu_linear_logprob_forward_cuda(const float* logits, int64_t ld, int64_t rows, int64_t cols, int64_t first,
                                     const int64_t* target, const int64_t* row_start, float* maximum, float* sum, float* dot,
                                     float* picked, float inv_temperature, float softcap, void* stream) {
  if (rows < 0 || cols < 0 || ld < cols || rows > INT32_MAX) return TULU_INVALID;
  if (rows == 0 || cols == 0) return 0;
  const bool vector = ld % 4 == 0 && cols % 4 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const bool cap = softcap != 0.0f;
  const auto kernel = cap ? (vector ? forward_kernel<true, true> : forward_kernel<true, false>)
                          : (vector ? forward_kernel<false, true> : forward_kernel<false, false>);
  kernel<<<static_cast<unsigned>(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      logits, ld, cols, first, target, row_start, maximum, sum, dot, picked, inv_temperature, softcap);
  return static_cast<int>(cudaGetLastError());
}

int tulu_linear_logprob_backward_cuda(const float* logits, int64_t ld, const int64_t* logits_row, void* out, int64_t ld_out,
                                      int out_is_bf16, int64_t rows, int64_t cols, int64_t first, const int64_t* target,
                                      const int64_t* row_start, const float* stats, const float* grad, float inv_temperature,
                                      float softcap, void* stream) {
  if (rows < 0 || cols < 0 || ld < cols || ld_out < cols || rows > INT32_MAX || cols > 65535LL * kBackwardColumns)
    return TULU_INVALID;
  if (rows == 0 || cols == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (out_is_bf16)
    launch_backward(logits, ld, logits_row, static_cast<__nv_bfloat16*>(out), ld_out, rows, cols, first, target, row_start, stats,
                    grad, inv_temperature, softcap, s);
  else
    launch_backward(logits, ld, logits_row, static_cast<float*>(out), ld_out, rows, cols, first, target, row_start, stats, grad,
                    inv_temperature, softcap, s);
  return static_cast<int>(cudaGetLastError());
}

const char* tulu_cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // extern "C"

/* C ABI of libtulu_core: raw pointers, sizes and a stream; no torch, no Python, no BLAS.
 *
 * Row passes of linear_logprob over one block of logits [rows, cols] (fp32, rows `ld` elements apart) that holds the
 * vocabulary ids first..first+cols-1. Row r owns the targets row_start[r] .. row_start[r+1]-1 (indices into target, picked,
 * stats and grad); targets are ids of the whole vocabulary. x = inv_temperature * softcap * tanh(z / softcap), without the
 * cap when softcap is 0.
 *
 * forward   adds the block to each row's running (maximum, sum of exp(x - m), sum of exp(x - m) (x - m)) and writes
 *           picked[k] = x[target] for targets inside the block. Start from (-FLT_MAX, 0, 0).
 * backward  writes d loss / d z to `out` (may be `logits` itself when it is fp32 and logits_row is null). Row r reads row
 *           logits_row[r] of logits, or row r when that is null. stats and grad are [K, 4]: maximum, log of
 *           the sum, centred mean (last sum / first sum), picked, and the upstream gradients of the last three.
 *           dx_j = p_j (g1 + g2 (1 - centred) + g2 (x_j - m)) + sum over targets equal to j of g3, with g1, g2 summed over
 *           the row's targets in order. Rows without targets get zeros.
 *
 * Functions return 0, TULU_INVALID (bad sizes) or a positive CUDA error code; see tulu_error_string.
 */
#ifndef TULU_CORE_H
#define TULU_CORE_H

#include <stdint.h>

#if defined(__GNUC__)
#define TULU_API __attribute__((visibility("default")))
#else
#define TULU_API
#endif

#define TULU_INVALID (-1)
#define TULU_UNKNOWN_ISA (-2)

#ifdef __cplusplus
extern "C" {
#endif

TULU_API const char* tulu_error_string(int code);

/* Instruction sets compiled in and usable on this processor, best first, comma separated: "avx512,avx2,baseline". */
TULU_API const char* tulu_cpu_isas(void);
/* Restricts the CPU kernels to one of them, for tests; "auto" is the best. 0 or TULU_UNKNOWN_ISA. */
TULU_API int tulu_set_cpu_isa(const char* name);
TULU_API int tulu_has_openmp(void);

TULU_API int tulu_linear_logprob_forward_cpu(const float* logits, int64_t ld, int64_t rows, int64_t cols, int64_t first,
                                             const int64_t* target, const int64_t* row_start, float* maximum, float* sum,
                                             float* dot, float* picked, float inv_temperature, float softcap, int threads);

TULU_API int tulu_linear_logprob_backward_cpu(const float* logits, int64_t ld, const int64_t* logits_row, float* out,
                                              int64_t ld_out, int64_t rows, int64_t cols, int64_t first, const int64_t* target,
                                              const int64_t* row_start, const float* stats, const float* grad,
                                              float inv_temperature, float softcap, int threads);

#ifdef TULU_WITH_CUDA
/* Device pointers; `stream` is a cudaStream_t of the current device. */
TULU_API int tulu_linear_logprob_forward_cuda(const float* logits, int64_t ld, int64_t rows, int64_t cols, int64_t first,
                                              const int64_t* target, const int64_t* row_start, float* maximum, float* sum,
                                              float* dot, float* picked, float inv_temperature, float softcap, void* stream);

/* out is fp32, or bf16 (not aliasing logits) when out_is_bf16. */
TULU_API int tulu_linear_logprob_backward_cuda(const float* logits, int64_t ld, const int64_t* logits_row, void* out,
                                               int64_t ld_out, int out_is_bf16, int64_t rows, int64_t cols, int64_t first,
                                               const int64_t* target, const int64_t* row_start, const float* stats,
                                               const float* grad, float inv_temperature, float softcap, void* stream);

TULU_API const char* tulu_cuda_error_string(int code);
#endif

#ifdef __cplusplus
}
#endif

#endif

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

/* One call of preference_loss; formulas in kernels/preference_loss/reference.py. K scored tokens, Q sequences, P pairs.
 * Pointers that may be null: logprobs and sequence_id (when policy_sums is given), policy_sums, reference (no reference),
 * lengths (counted from sequence_id), weights, alignment. pairs: [P, 2], -1 for a missing side (unpaired kind only). */
typedef struct {
  const float* logprobs;
  const int64_t* sequence_id;
  const double* policy_sums;
  const double* reference;
  const double* lengths;
  const int64_t* pairs;
  const double* weights;
  const double* alignment;
  int64_t tokens, sequences, pair_count;
  int code;           /* 0 sigmoid, 1 squared distance, 2 hinge, 3 log odds, 4 unpaired sigmoid */
  int mean;           /* scores are per-token means */
  int subtract;       /* scores are relative to the reference */
  int round_to_float; /* sums are rounded to fp32, as the reference's were */
  int wpo;
  double beta, softplus_down, softplus_up, margin_shift, sft_weight, desirable_weight, undesirable_weight, kl, odds_limit;
} TuluPreference;

#define TULU_PREFERENCE_METRICS 13
#define TULU_PREFERENCE_BAD_SEQUENCE_ID (-101) /* outside 0 .. Q-1, or decreasing */
#define TULU_PREFERENCE_BAD_PAIR (-102)        /* outside 0 .. Q-1, or a missing side where none may be */

/* Writes d loss / d log-prob [tokens], or with policy_sums d loss / d sum [sequences], and the sums over pairs [13] in the
 * order of kernels/preference_loss/problem.py. Deterministic, whatever the number of threads. */
TULU_API int tulu_preference_loss_cpu(const TuluPreference* problem, float* coefficients, double* metrics, int threads);
/* policy_loss of fp32 columns [tokens]; NULL for a column that is not there. The formulas are in the Python reference.
 *
 * sums [sequences, 5]: sequence sums that were reduced over ranks, or NULL to add them up here when sequences > 0. gradient is
 * that of the log-probs before the factor in `stats`; active holds 0 or 1; loss is one number; stats [32].
 */
typedef struct {
  const float *logprobs, *behaviour, *advantages;
  const int64_t* ids;
  const float *old, *reference, *weights, *entropy, *sums;
  float *gradient, *gradient_entropy;
  uint8_t* active;
  float *loss, *stats;
} TuluPolicyArrays;

typedef struct {
  int kind;                /* ratio of the token 0, of the sequence 1, of the token without gradient 2 */
  int kl_kind;             /* 1, 2, 3 */
  int importance;          /* none 0, truncated 1, masked 2 */
  int sequence_importance; /* the importance weight is the sequence's */
  int sequence_mean;       /* a token's loss is divided by its sequence's length */
  int count_units;         /* the loss is divided by nothing 0, non-empty sequences 1, the tokens of `sums` 2 */
  float lowest, highest, dual_clip, kl_coef, importance_low, importance_high, entropy_coef, scale;
} TuluPolicySettings;

/* Also TULU_INVALID when an id is outside 0..sequences-1 and sequences > 0. */
TULU_API int tulu_policy_loss_cpu(const TuluPolicyArrays* arrays, const TuluPolicySettings* settings, int64_t tokens,
                                  int64_t sequences, int threads);

/* loss = scale sum weight / 2 max((v - r)^2, (clip(v, old +- clip) - r)^2); weights may be NULL; sums [4]: the same sum
 * without weights and scale, values moved too far, (v - r)^2, v. */
TULU_API int tulu_value_loss_cpu(const float* values, const float* old_values, const float* returns, const float* weights,
                                 int64_t tokens, float clip, float scale, float* gradient, float* loss, float* sums,
                                 int threads);

/* Generalised advantage estimation of the segments starts[s]..starts[s+1]-1; bootstrap may be NULL for zeros. */
TULU_API int tulu_gae_cpu(const float* rewards, const float* values, const int64_t* starts, const float* bootstrap,
                          int64_t segments, float gamma, float lambda, float* advantages, float* returns, int threads);

/* silu(gate) * up of rows [gate | up] of 2 * width; backward also makes `out` again. out [rows, width]. */
TULU_API int tulu_gated_forward_cpu(const float* both, float* out, int64_t rows, int64_t width, int threads);
TULU_API int tulu_gated_backward_cpu(const float* both, const float* grad, float* grad_both, float* out, int64_t rows,
                                     int64_t width, int threads);

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

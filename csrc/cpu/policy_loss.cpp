// policy_loss on the CPU: the formulas are in kernels/policy_loss/reference.py, the columns in kernels/policy_loss/problem.py.
// Tokens in fixed chunks over threads, each with its own row of statistics, added in order: no result depends on threads.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "tulu_core.h"

#include "exponential.h"

namespace {

constexpr float kMaxLogRatio = 40.0f;
constexpr int kTile = 512;
constexpr int64_t kChunk = 4096;

// As in problem.py.
enum Column {
  kLoss, kPolicy, kRatio, kClipLow, kClipHigh, kClipped, kDualClip, kBehaviourKl, kK1, kK2, kK3,
  kImportance, kImportanceLimited, kEntropy, kActive, kTokens, kUnits, kViolations, kSums,
  kRatioMax = kSums, kImportanceMax, kRatioMin, kScale, kColumns = 32
};
enum Sum { kLogRatioSum, kLogImportanceSum, kLength, kPositive, kNegative, kSumColumns };
enum Kind { kTokenRatio, kSequenceRatio, kDetachedRatio };
enum Importance { kNone, kTruncated, kMasked };

struct Row {
  double column[kColumns] = {};
  Row() {
    column[kRatioMax] = column[kImportanceMax] = -std::numeric_limits<double>::infinity();
    column[kRatioMin] = std::numeric_limits<double>::infinity();
  }
  void high(Column c, float x) { if (!(column[c] >= x)) column[c] = x; }
  void low(Column c, float x) { if (!(column[c] <= x)) column[c] = x; }
};

float bound(float x) {
  const float capped = x > kMaxLogRatio ? kMaxLogRatio : x;
  return capped < -kMaxLogRatio ? -kMaxLogRatio : capped;
}

struct Weight {
  float value;
  bool limited;
};

Weight limit_importance(float raw, const tulu_policy_settings& s) {
  if (s.importance == kTruncated) return raw > s.importance_high ? Weight{s.importance_high, true} : Weight{raw, false};
  const bool limited = raw < s.importance_low || raw > s.importance_high;
  return {limited ? 0.0f : raw, limited};
}

// Table [Q, 5] of the sequence sums, in double: one thread, in the order of tokens.
std::vector<float> sequence_sums(const tulu_policy_arrays& a, const tulu_policy_settings& s, int64_t tokens,
                                 int64_t sequences) {
  std::vector<double> sums(static_cast<size_t>(sequences * kSumColumns), 0.0);
  float log_weight[kTile], weight[kTile], unused[kTile];
  const float* old = a.old ? a.old : a.behaviour;
  for (int64_t begin = 0; begin < tokens; begin += kTile) {
    const int count = static_cast<int>(tokens - begin < kTile ? tokens - begin : kTile);
    for (int i = 0; i < count; ++i) log_weight[i] = bound(old[begin + i] - a.behaviour[begin + i]);
    if (s.importance != kNone && !s.sequence_importance) tulu::exponentials(log_weight, count, weight, unused);
    for (int i = 0; i < count; ++i) {
      const int64_t k = begin + i;
      double* sum = &sums[static_cast<size_t>(a.ids[k] * kSumColumns)];
      double weighted = a.advantages[k];
      if (a.weights) weighted *= a.weights[k];
      if (s.importance != kNone && !s.sequence_importance) weighted *= limit_importance(weight[i], s).value;
      sum[kLogRatioSum] += a.logprobs[k] - old[k];
      sum[kLogImportanceSum] += old[k] - a.behaviour[k];
      sum[kLength] += 1.0;
      sum[a.advantages[k] > 0.0f ? kPositive : kNegative] += weighted;
    }
  }
  return std::vector<float>(sums.begin(), sums.end());
}

void tile(const tulu_policy_arrays& a, const tulu_policy_settings& s, const float* sums, int64_t begin, int count, Row& row) {
  float level[kTile], ratio[kTile], log_weight[kTile], raw[kTile], x[kTile], behaviour_kl[kTile], kl_exp[kTile], kl_tail[kTile],
      unused[kTile];
  const float* old = a.old ? a.old : a.behaviour;
  const bool by_sequence = sums != nullptr;
  for (int i = 0; i < count; ++i) {
    const int64_t k = begin + i;
    level[i] = a.logprobs[k] - old[k];
    x[i] = bound(a.logprobs[k] - a.behaviour[k]);
  }
  tulu::exponentials(x, count, unused, behaviour_kl);
  if (s.kind == kSequenceRatio)
    for (int i = 0; i < count; ++i) {
      const float* sum = sums + a.ids[begin + i] * kSumColumns;
      level[i] = sum[kLogRatioSum] / (sum[kLength] > 1.0f ? sum[kLength] : 1.0f);
    }
  for (int i = 0; i < count; ++i) x[i] = bound(level[i]);
  tulu::exponentials(x, count, ratio, unused);
  if (s.importance != kNone) {
    for (int i = 0; i < count; ++i) {
      const int64_t k = begin + i;
      log_weight[i] = bound(s.sequence_importance ? sums[a.ids[k] * kSumColumns + kLogImportanceSum] : old[k] - a.behaviour[k]);
    }
    tulu::exponentials(log_weight, count, raw, unused);
  }
  if (a.reference) {
    for (int i = 0; i < count; ++i) x[i] = -bound(a.logprobs[begin + i] - a.reference[begin + i]);
    tulu::exponentials(x, count, kl_exp, kl_tail);
  }
  const float lowest = s.lowest, highest = s.highest, dual_clip = s.dual_clip;
  for (int i = 0; i < count; ++i) {
    const int64_t k = begin + i;
    const float advantage = a.advantages[k], r = ratio[i];
    const float* sum = by_sequence ? sums + a.ids[k] * kSumColumns : nullptr;
    const float length = by_sequence ? (sum[kLength] > 1.0f ? sum[kLength] : 1.0f) : 1.0f;
    const float factor = s.sequence_mean ? s.scale / length : s.scale;
    const float weight = a.weights ? factor * a.weights[k] : factor;
    Weight importance{1.0f, false};
    if (s.importance != kNone) importance = limit_importance(raw[i], s);
    bool low = r < lowest, high = r > highest;
    float slope, policy;
    if (s.kind == kDetachedRatio) {
      slope = -advantage * (low ? lowest : high ? highest : r);
      policy = slope * a.logprobs[k];
    } else {
      const bool beyond = std::fabs(level[i]) > kMaxLogRatio, dual = r > dual_clip, positive = advantage > 0.0f;
      policy = -advantage * (positive ? (high ? highest : r) : (low ? lowest : dual ? dual_clip : r));
      if (s.kind == kTokenRatio) {
        slope = beyond || (positive ? high : low || dual) ? 0.0f : -advantage * r;
      } else {
        slope = beyond ? 0.0f : -r * ((high ? 0.0f : sum[kPositive]) + (low || dual ? 0.0f : sum[kNegative])) / length;
      }
      row.column[kDualClip] += dual && advantage < 0.0f;
      low = low && advantage < 0.0f;
      high = high && positive;
    }
    float total = importance.value * policy;
    float grad = s.kind == kSequenceRatio ? slope * factor * (s.sequence_importance ? importance.value : 1.0f)
                                          : weight * importance.value * slope;
    row.column[kPolicy] += total;
    if (a.reference) {
      const float difference = a.logprobs[k] - a.reference[k], d = -x[i], k2 = 0.5f * d * d;
      row.column[kK1] += d;
      row.column[kK2] += k2;
      row.column[kK3] += kl_tail[i];
      const float kl = s.kl_kind == 1 ? d : s.kl_kind == 2 ? k2 : kl_tail[i];
      const float kl_slope = s.kl_kind == 1 ? 1.0f : s.kl_kind == 2 ? d : d - kl_tail[i];
      total += s.kl_coef * kl;
      if (!(std::fabs(difference) > kMaxLogRatio)) grad += weight * s.kl_coef * kl_slope;
    }
    bool live = grad != 0.0f;
    if (a.entropy) {
      total -= s.entropy_coef * a.entropy[k];
      const float grad_entropy = -s.entropy_coef * weight;
      a.gradient_entropy[k] = grad_entropy;
      live = live || grad_entropy != 0.0f;
      row.column[kEntropy] += a.entropy[k];
    }
    a.gradient[k] = grad;
    a.active[k] = live;
    row.column[kLoss] += weight * total;
    row.column[kRatio] += r;
    row.column[kBehaviourKl] += behaviour_kl[i];
    row.column[kImportance] += importance.value;
    row.column[kImportanceLimited] += importance.limited;
    row.column[kClipLow] += low;
    row.column[kClipHigh] += high;
    row.column[kClipped] += low || high;
    row.column[kActive] += live;
    row.high(kRatioMax, r);
    row.low(kRatioMin, r);
    row.high(kImportanceMax, importance.value);
  }
  row.column[kTokens] += count;
}

}  // namespace

extern "C" {

int tulu_policy_loss_cpu(const tulu_policy_arrays* arrays, const tulu_policy_settings* settings, int64_t tokens,
                         int64_t sequences, int threads) {
  if (tokens < 0 || sequences < 0 || threads < 1) return TULU_INVALID;
  const tulu_policy_arrays& a = *arrays;
  const tulu_policy_settings& s = *settings;
  for (int64_t k = 0; sequences > 0 && k < tokens; ++k)
    if (a.ids[k] < 0 || a.ids[k] >= sequences) return TULU_INVALID;
  std::vector<float> own;
  const float* sums = a.sums;
  if (!sums && sequences > 0) {
    own = sequence_sums(a, s, tokens, sequences);
    sums = own.data();
  }
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<Row> rows(static_cast<size_t>(chunks));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t stop = (chunk + 1) * kChunk < tokens ? (chunk + 1) * kChunk : tokens;
    for (int64_t begin = chunk * kChunk; begin < stop; begin += kTile)
      tile(a, s, sums, begin, static_cast<int>(stop - begin < kTile ? stop - begin : kTile), rows[static_cast<size_t>(chunk)]);
  }
  Row total;
  for (const Row& row : rows) {
    for (int c = 0; c < kSums; ++c) total.column[c] += row.column[c];
    total.high(kRatioMax, static_cast<float>(row.column[kRatioMax]));
    total.high(kImportanceMax, static_cast<float>(row.column[kImportanceMax]));
    total.low(kRatioMin, static_cast<float>(row.column[kRatioMin]));
  }
  double scale = 1.0;
  if (s.count_units != 0) {
    for (int64_t q = 0; q < sequences; ++q) {
      const float length = sums[q * kSumColumns + kLength];
      total.column[kUnits] += s.count_units == 1 ? (length > 0.0f ? 1.0 : 0.0) : length;
    }
    scale = 1.0 / (total.column[kUnits] > 1.0 ? total.column[kUnits] : 1.0);
  }
  total.column[kLoss] *= scale;
  total.column[kScale] = scale;
  for (int c = 0; c < kColumns; ++c) a.stats[c] = static_cast<float>(total.column[c]);
  *a.loss = a.stats[kLoss];
  return 0;
}

}  // extern "C"

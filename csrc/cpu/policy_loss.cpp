// policy_loss on the CPU: the formulas are in kernels/policy_loss/reference.py, the columns in kernels/policy_loss/problem.py.
// Tokens in fixed chunks over threads, each with its own row of statistics, added in order: no result depends on threads.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
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

inline float bound(float x) {
  const float capped = x > kMaxLogRatio ? kMaxLogRatio : x;
  return capped < -kMaxLogRatio ? -kMaxLogRatio : capped;
}

struct Weight {
  float value;
  bool limited;
};

inline Weight limit_importance(float raw, const TuluPolicySettings& s) {
  if (s.importance == kTruncated) return raw > s.importance_high ? Weight{s.importance_high, true} : Weight{raw, false};
  const bool limited = raw < s.importance_low || raw > s.importance_high;
  return {limited ? 0.0f : raw, limited};
}

// Table [Q, 5] of the sequence sums, in double: one thread, in the order of tokens.
std::vector<float> sequence_sums(const TuluPolicyArrays& a, const TuluPolicySettings& s, int64_t tokens,
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

// Sums of a tile's values in float, then added to the row in double.
double sum(const float* x, int count) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < count; ++i) total += x[i];
  return total;
}

struct Extremes {
  float low, high;
};

Extremes extremes(const float* x, int count) {
  float low = x[0], high = x[0];
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  return {low, high};
}

// One pass of simple loops for the compiler to vectorise; flags are 0 or 1 in float.
TULU_CLONES void tile(const TuluPolicyArrays& a, const TuluPolicySettings& s, const float* sums, int64_t begin, int count,
                      Row& row) {
  float x[kTile] = {}, level[kTile], ratio[kTile], behaviour_kl[kTile], unused[kTile], length[kTile], weight[kTile],
      importance[kTile], limited[kTile], low[kTile], high[kTile], clipped[kTile], dual[kTile], policy[kTile], grad[kTile],
      total[kTile], live[kTile];
  const float *logprobs = a.logprobs + begin, *behaviour = a.behaviour + begin, *advantages = a.advantages + begin;
  const float* old = (a.old ? a.old : a.behaviour) + begin;
  const int64_t* ids = a.ids + begin;
  const float lowest = s.lowest, highest = s.highest, dual_clip = s.dual_clip;

  for (int i = 0; i < count; ++i) x[i] = bound(logprobs[i] - behaviour[i]);
  tulu::exponentials(x, count, unused, behaviour_kl);
  if (s.kind == kSequenceRatio || s.sequence_mean)
    for (int i = 0; i < count; ++i) {
      const float tokens = sums[ids[i] * kSumColumns + kLength];
      length[i] = tokens > 1.0f ? tokens : 1.0f;
    }
  if (s.kind == kSequenceRatio)
    for (int i = 0; i < count; ++i) level[i] = sums[ids[i] * kSumColumns + kLogRatioSum] / length[i];
  else
    for (int i = 0; i < count; ++i) level[i] = logprobs[i] - old[i];
  for (int i = 0; i < count; ++i) x[i] = bound(level[i]);
  tulu::exponentials(x, count, ratio, unused);

  if (s.importance == kNone) {
    for (int i = 0; i < count; ++i) importance[i] = 1.0f, limited[i] = 0.0f;
  } else {
    if (s.sequence_importance)
      for (int i = 0; i < count; ++i) x[i] = bound(sums[ids[i] * kSumColumns + kLogImportanceSum]);
    else
      for (int i = 0; i < count; ++i) x[i] = bound(old[i] - behaviour[i]);
    tulu::exponentials(x, count, importance, unused);
    for (int i = 0; i < count; ++i) {
      const Weight chosen = limit_importance(importance[i], s);
      importance[i] = chosen.value;
      limited[i] = chosen.limited ? 1.0f : 0.0f;
    }
  }
  for (int i = 0; i < count; ++i) weight[i] = s.scale;
  if (s.sequence_mean)
    for (int i = 0; i < count; ++i) weight[i] /= length[i];
  const bool sequence_ratio = s.kind == kSequenceRatio;
  if (sequence_ratio)  // the gradient's factor of the sequence: without the token's weight
    for (int i = 0; i < count; ++i) grad[i] = weight[i] * (s.sequence_importance ? importance[i] : 1.0f);
  if (a.weights)
    for (int i = 0; i < count; ++i) weight[i] *= a.weights[begin + i];

  if (s.kind == kDetachedRatio) {
    for (int i = 0; i < count; ++i) {
      const float r = ratio[i], held = r < lowest ? lowest : r > highest ? highest : r;
      low[i] = r < lowest ? 1.0f : 0.0f;
      high[i] = r > highest ? 1.0f : 0.0f;
      dual[i] = 0.0f;
      policy[i] = -advantages[i] * held * logprobs[i];
      grad[i] = weight[i] * importance[i] * (-advantages[i] * held);
    }
  } else {
    for (int i = 0; i < count; ++i) {
      const float advantage = advantages[i], r = ratio[i];
      const float held_up = r > highest ? highest : r;
      const float held_down = r < lowest ? lowest : r > dual_clip ? dual_clip : r;
      const bool positive = advantage > 0.0f, negative = advantage < 0.0f;
      policy[i] = -advantage * (positive ? held_up : held_down);
      low[i] = (r < lowest) & negative ? 1.0f : 0.0f;
      high[i] = (r > highest) & positive ? 1.0f : 0.0f;
      dual[i] = (r > dual_clip) & negative ? 1.0f : 0.0f;
    }
    if (sequence_ratio)
      for (int i = 0; i < count; ++i) {
        const float r = ratio[i], *of = sums + ids[i] * kSumColumns;
        const float up = r > highest ? 0.0f : of[kPositive];
        const float down = r < lowest || r > dual_clip ? 0.0f : of[kNegative];
        grad[i] = std::fabs(level[i]) > kMaxLogRatio ? 0.0f : grad[i] * (-r * (up + down) / length[i]);
      }
    else
      for (int i = 0; i < count; ++i) {
        const float advantage = advantages[i], r = ratio[i];
        const float up = r > highest ? 0.0f : 1.0f;
        const float down = r < lowest ? 0.0f : r > dual_clip ? 0.0f : 1.0f;
        const float inner = std::fabs(level[i]) > kMaxLogRatio ? 0.0f : advantage > 0.0f ? up : down;
        const float pull = weight[i] * importance[i] * (-advantage * r);
        grad[i] = inner == 0.0f ? 0.0f : pull;
      }
  }
  for (int i = 0; i < count; ++i) {
    clipped[i] = low[i] + high[i] > 0.0f ? 1.0f : 0.0f;
    policy[i] *= importance[i];
    total[i] = policy[i];
  }
  if (a.reference) {
    const float* reference = a.reference + begin;
    float d[kTile], k2[kTile], tail[kTile];
    for (int i = 0; i < count; ++i) {
      d[i] = bound(logprobs[i] - reference[i]);
      x[i] = -d[i];
      k2[i] = 0.5f * d[i] * d[i];
    }
    tulu::exponentials(x, count, unused, tail);
    const float* kl = s.kl_kind == 1 ? d : s.kl_kind == 2 ? k2 : tail;
    for (int i = 0; i < count; ++i) {
      const float slope = s.kl_kind == 1 ? 1.0f : s.kl_kind == 2 ? d[i] : d[i] - tail[i];
      total[i] += s.kl_coef * kl[i];
      grad[i] += std::fabs(logprobs[i] - reference[i]) > kMaxLogRatio ? 0.0f : weight[i] * s.kl_coef * slope;
    }
    row.column[kK1] += sum(d, count);
    row.column[kK2] += sum(k2, count);
    row.column[kK3] += sum(tail, count);
  }
  for (int i = 0; i < count; ++i) live[i] = grad[i] != 0.0f ? 1.0f : 0.0f;
  if (a.entropy) {
    const float* entropy = a.entropy + begin;
    for (int i = 0; i < count; ++i) {
      total[i] -= s.entropy_coef * entropy[i];
      x[i] = -s.entropy_coef * weight[i];
      live[i] = x[i] != 0.0f ? 1.0f : live[i];
    }
    std::memcpy(a.gradient_entropy + begin, x, sizeof(float) * static_cast<size_t>(count));
    row.column[kEntropy] += sum(entropy, count);
  }
  for (int i = 0; i < count; ++i) {
    a.gradient[begin + i] = grad[i];
    a.active[begin + i] = live[i] != 0.0f ? 1 : 0;
    total[i] *= weight[i];
  }
  row.column[kLoss] += sum(total, count);
  row.column[kPolicy] += sum(policy, count);
  row.column[kRatio] += sum(ratio, count);
  row.column[kBehaviourKl] += sum(behaviour_kl, count);
  row.column[kImportance] += sum(importance, count);
  row.column[kImportanceLimited] += sum(limited, count);
  row.column[kClipLow] += sum(low, count);
  row.column[kClipHigh] += sum(high, count);
  row.column[kClipped] += sum(clipped, count);
  row.column[kDualClip] += sum(dual, count);
  row.column[kActive] += sum(live, count);
  row.column[kTokens] += count;
  const Extremes ratios = extremes(ratio, count), weights = extremes(importance, count);
  row.high(kRatioMax, ratios.high);
  row.low(kRatioMin, ratios.low);
  row.high(kImportanceMax, weights.high);
}

}  // namespace

extern "C" {

int tulu_policy_loss_cpu(const TuluPolicyArrays* arrays, const TuluPolicySettings* settings, int64_t tokens,
                         int64_t sequences, int threads) {
  if (tokens < 0 || sequences < 0 || threads < 1) return TULU_INVALID;
  const TuluPolicyArrays& a = *arrays;
  const TuluPolicySettings& s = *settings;
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

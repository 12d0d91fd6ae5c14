// preference_loss on the CPU: sums per sequence, one closed form per pair, coefficients per token.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "tulu_core.h"

namespace {

enum Code { kSigmoid, kSquare, kHinge, kOdds, kUnpaired };
using Metrics = std::array<double, TULU_PREFERENCE_METRICS>;

double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }
double softplus(double z) { return std::max(z, 0.0) + std::log1p(std::exp(-std::fabs(z))); }

// Eight running sums in fixed places: independent additions for the processor, the same result for any thread count.
double sum_of(const float* x, int64_t count) {
  double lanes[8] = {0.0};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8)
    for (int i = 0; i < 8; ++i) lanes[i] += static_cast<double>(x[k + i]);
  for (int i = 0; k < count; ++k, ++i) lanes[i] += static_cast<double>(x[k]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

struct Odds {
  double value, slope;
};

Odds log_odds(double x, double limit) {
  const double bounded = std::min(x, -limit);
  const double complement = -std::expm1(bounded);  // 1 - p
  return {bounded - std::log(complement), x <= -limit ? 1.0 / complement : 0.0};
}

struct Side {
  bool present;
  double sum, length, divisor, score, confidence;  // confidence: exp of the mean (aligned) log-prob
};

struct PairResult {
  Metrics metrics;
  double slope_chosen, slope_rejected;  // d loss / d sum
};

Side side_of(const TuluPreference& p, const double* sums, const double* lengths, int64_t q) {
  if (q < 0) return {false, 0.0, 0.0, 1.0, 0.0, 1.0};
  Side side{true, sums[q], lengths[q], std::max(lengths[q], 1.0), sums[q], 1.0};
  if (p.subtract) side.score -= p.reference[q];
  if (p.mean) side.score /= side.divisor;
  if (p.wpo) side.confidence = std::exp((side.sum - (p.alignment ? p.alignment[q] : 0.0)) / side.divisor);
  return side;
}

PairResult pair_of(const TuluPreference& p, const Side& chosen, const Side& rejected, double weight) {
  const double reward_chosen = p.beta * chosen.score, reward_rejected = p.beta * rejected.score;
  const double margin = reward_chosen - reward_rejected;
  double loss = 0.0, slope_chosen = 0.0, slope_rejected = 0.0;  // of f, by the scores
  switch (p.code) {
    case kSigmoid: {
      const double z = margin - p.margin_shift;
      loss = p.softplus_down * softplus(-z) + p.softplus_up * softplus(z);
      slope_chosen = p.beta * (p.softplus_up * sigmoid(z) - p.softplus_down * sigmoid(-z));
      slope_rejected = -slope_chosen;
      break;
    }
    case kSquare: {
      const double distance = chosen.score - rejected.score - 0.5 / p.beta;
      loss = distance * distance;
      slope_chosen = 2.0 * distance;
      slope_rejected = -slope_chosen;
      break;
    }
    case kHinge:
      loss = std::max(0.0, 1.0 - margin);
      slope_chosen = margin <= 1.0 ? -p.beta : 0.0;
      slope_rejected = -slope_chosen;
      break;
    case kOdds: {
      const Odds odds_chosen = log_odds(chosen.score, p.odds_limit), odds_rejected = log_odds(rejected.score, p.odds_limit);
      const double z = odds_chosen.value - odds_rejected.value, pull = p.beta * sigmoid(-z);
      loss = p.beta * softplus(-z);
      slope_chosen = -pull * odds_chosen.slope;
      slope_rejected = pull * odds_rejected.slope;
      break;
    }
    default: {
      const double z = p.beta * std::max(p.kl, 0.0);
      if (chosen.present) {
        loss += p.desirable_weight * sigmoid(z - reward_chosen);
        slope_chosen = -p.desirable_weight * p.beta * sigmoid(z - reward_chosen) * sigmoid(reward_chosen - z);
      }
      if (rejected.present) {
        loss += p.undesirable_weight * sigmoid(reward_rejected - z);
        slope_rejected = p.undesirable_weight * p.beta * sigmoid(reward_rejected - z) * sigmoid(z - reward_rejected);
      }
    }
  }
  const double factor = weight * chosen.confidence * rejected.confidence;
  const double sft = weight * p.sft_weight * -chosen.sum / chosen.divisor;
  const double sft_slope = chosen.present ? -weight * p.sft_weight / chosen.divisor : 0.0;
  return {{factor * loss + sft, reward_chosen, reward_rejected, margin, margin > 0.0 ? 1.0 : 0.0, chosen.sum, rejected.sum,
           chosen.length, rejected.length, chosen.present ? 1.0 : 0.0, rejected.present ? 1.0 : 0.0, sft, factor},
          factor * slope_chosen / (p.mean ? chosen.divisor : 1.0) + sft_slope,
          factor * slope_rejected / (p.mean ? rejected.divisor : 1.0)};
}

}  // namespace

extern "C" int tulu_preference_loss_cpu(const TuluPreference* problem, float* coefficients, double* metrics, int threads) {
  const TuluPreference& p = *problem;
  if (p.tokens < 0 || p.sequences < 0 || p.pair_count < 0 || threads < 1) return TULU_INVALID;
  for (int64_t i = 0; i < p.pair_count; ++i) {
    const int64_t chosen = p.pairs[2 * i], rejected = p.pairs[2 * i + 1];
    const int64_t lowest = p.code == kUnpaired ? -1 : 0;
    if (std::min(chosen, rejected) < lowest || std::max(chosen, rejected) >= p.sequences || (chosen < 0 && rejected < 0))
      return TULU_PREFERENCE_BAD_PAIR;
  }
  const size_t sequences = static_cast<size_t>(p.sequences);
  std::vector<double> sums(sequences), lengths(sequences), slopes(sequences);
  std::vector<int64_t> start;
  if (p.policy_sums == nullptr) {
    start.resize(sequences + 1);
    int64_t q = -1;  // sequences 0 .. q have their start
    for (int64_t k = 0; k < p.tokens; ++k) {
      const int64_t id = p.sequence_id[k];
      if (id == q && q >= 0) continue;
      if (id < std::max<int64_t>(q, 0) || id >= p.sequences) return TULU_PREFERENCE_BAD_SEQUENCE_ID;
      while (q < id) start[static_cast<size_t>(++q)] = k;
    }
    while (q < p.sequences) start[static_cast<size_t>(++q)] = p.tokens;
  }
  (void)threads;
  const bool parallel = threads > 1 && p.tokens > 16384;  // a team of threads costs more than a small loop
  (void)parallel;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (parallel)
  for (int64_t q = 0; q < p.sequences; ++q) {
    const size_t i = static_cast<size_t>(q);
    if (p.policy_sums == nullptr) {
      sums[i] = sum_of(p.logprobs + start[i], start[i + 1] - start[i]);
      lengths[i] = static_cast<double>(start[i + 1] - start[i]);
    } else {
      sums[i] = p.policy_sums[q];
    }
    if (p.lengths != nullptr) lengths[i] = p.lengths[q];
    if (p.round_to_float) sums[i] = static_cast<double>(static_cast<float>(sums[i]));
  }
  std::vector<PairResult> results(static_cast<size_t>(p.pair_count));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && p.pair_count > 1024)
  for (int64_t i = 0; i < p.pair_count; ++i) {
    const Side chosen = side_of(p, sums.data(), lengths.data(), p.pairs[2 * i]);
    const Side rejected = side_of(p, sums.data(), lengths.data(), p.pairs[2 * i + 1]);
    results[static_cast<size_t>(i)] = pair_of(p, chosen, rejected, p.weights ? p.weights[i] : 1.0);
  }
  std::fill(metrics, metrics + TULU_PREFERENCE_METRICS, 0.0);
  // In the order of pairs: a sequence may be in several of them.
  for (int64_t i = 0; i < p.pair_count; ++i) {
    const PairResult& result = results[static_cast<size_t>(i)];
    for (int m = 0; m < TULU_PREFERENCE_METRICS; ++m) metrics[m] += result.metrics[static_cast<size_t>(m)];
    const int64_t chosen = p.pairs[2 * i], rejected = p.pairs[2 * i + 1];
    if (chosen >= 0) slopes[static_cast<size_t>(chosen)] += result.slope_chosen;
    if (rejected >= 0) slopes[static_cast<size_t>(rejected)] += result.slope_rejected;
  }
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (parallel)
  for (int64_t q = 0; q < p.sequences; ++q) {
    const float slope = static_cast<float>(slopes[static_cast<size_t>(q)]);
    if (p.policy_sums != nullptr)
      coefficients[q] = slope;
    else
      std::fill(coefficients + start[static_cast<size_t>(q)], coefficients + start[static_cast<size_t>(q) + 1], slope);
  }
  return 0;
}

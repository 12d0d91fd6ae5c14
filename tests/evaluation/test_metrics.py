"""Bootstrap intervals: right on known cases, seeded, and covering the truth about as often as they say."""

import numpy as np
import pytest

from tulu_hpc.evaluation.metrics import estimate


def interval(values, seed=0, samples=1000, confidence=0.95):
    return estimate(values, samples=samples, confidence=confidence, seed=seed)


def test_mean_and_degenerate_interval():
    found = interval([[1.0]] * 20)
    assert (found.score, found.low, found.high, found.prompts, found.draws) == (1.0, 1.0, 1.0, 20, 1)
    assert interval([[1.0, 0.0], [1.0, 1.0]]).score == 0.75


def test_interval_of_a_large_sample_is_the_normal_one():
    values = [[float(i < 300)] for i in range(1000)]
    found = interval(values, samples=4000)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert found.low == pytest.approx(0.3 - half, abs=0.004) and found.high == pytest.approx(0.3 + half, abs=0.004)
    assert interval(values, confidence=0.5).high < found.high


def test_answers_to_one_prompt_stay_together():
    """Ten equal answers to each prompt tell no more than one: the interval must not shrink."""
    single = [[float(i % 2)] for i in range(50)]
    repeated = [answers * 10 for answers in single]
    one, ten = interval(single), interval(repeated)
    assert (one.low, one.high) == (ten.low, ten.high) and ten.draws == 10


def test_seeded():
    values = [[(i * 37 % 101) / 101] for i in range(40)]
    assert interval(values, seed=1) == interval(values, seed=1)
    assert interval(values, seed=1) != interval(values, seed=2)


def test_coverage():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        draws = generator.random((80, 2)) < 0.4
        found = interval(draws.astype(float).tolist(), seed=seed, samples=300)
        hits += found.low <= 0.4 <= found.high
    assert 0.90 <= hits / 300 <= 0.99


@pytest.mark.parametrize("values", [[], [[]], [[1.0], [1.0, 0.0]]])
def test_unequal_or_missing_answers(values):
    with pytest.raises(ValueError, match="same number"):
        interval(values)

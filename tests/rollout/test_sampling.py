"""Tokens are drawn from the distribution they claim, by numbers that depend on the seed alone.

Statistical bounds are at 5 standard deviations of fixed seeds: they hold for these seeds, not by chance at each run.
"""

import pytest
import torch

from tulu_hpc.rollout.sampling import _blocked_cumsum, derive_seed, draw, uniform_numbers

LAST = 1.0 - 2.0**-53  # the largest number below 1


def draw_many(logits_V, uniform, temperature=1.0, top_p=1.0):
    count = len(uniform)
    return draw(logits_V.expand(count, -1), torch.full((count,), temperature), torch.full((count,), top_p), uniform)


@pytest.mark.parametrize(("vocabulary", "temperature"), [(5, 1.0), (7, 0.5), (1500, 1.0), (1024, 2.0)])
def test_frequencies(vocabulary, temperature):
    """1500 and 1024: more than one block, with and without a partial one."""
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    count = 40_000
    tokens, logprobs = draw_many(logits, uniform_numbers([3], count)[0], temperature)
    wanted = torch.log_softmax(logits / temperature, -1)
    frequency = torch.bincount(tokens, minlength=vocabulary) / count
    deviation = (wanted.exp() * (1 - wanted.exp()) / count).sqrt()
    assert ((frequency - wanted.exp()).abs() <= 5 * deviation + 1 / count).all()
    assert torch.equal(logprobs, wanted[tokens])


def test_every_token_has_its_stretch_of_the_unit_interval():
    logits = torch.randn(1300, generator=torch.Generator().manual_seed(0))
    cdf = torch.softmax(logits, -1).double().cumsum(0)
    middle = cdf - torch.softmax(logits, -1).double() / 2
    tokens, _ = draw_many(logits, middle / cdf[-1])
    assert torch.equal(tokens, torch.arange(1300))


def test_the_ends_of_the_interval_give_possible_tokens():
    for vocabulary in (3, 512, 513, 2000):
        logits = torch.full((vocabulary,), -torch.inf)
        logits[1], logits[vocabulary - 2] = 0.3, 0.1
        tokens, logprobs = draw_many(logits, torch.tensor([0.0, LAST], dtype=torch.float64))
        assert tokens.tolist() == [1, vocabulary - 2]
        assert logprobs.isfinite().all()


def test_top_p_draws_from_the_nucleus_and_reports_the_whole_distribution():
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    tokens, logprobs = draw_many(probabilities.log(), uniform_numbers([0], 20_000)[0], top_p=0.75)
    counts = torch.bincount(tokens, minlength=5)
    assert counts[[0, 2]].tolist() == [0, 0]  # 0.4 + 0.3 < 0.75 <= 0.4 + 0.3 + 0.15
    assert torch.allclose(counts / 20_000, torch.tensor([0.0, 0.4, 0.0, 0.3, 0.15]) / 0.85, atol=0.02)
    assert torch.allclose(logprobs.exp(), probabilities[tokens])
    alone, _ = draw_many(probabilities.log(), uniform_numbers([0], 100)[0], top_p=1e-6)
    assert (alone == 1).all()


def test_rows_keep_their_own_settings():
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
    uniform = torch.tensor([0.9, 0.9, 0.2, 0.2], dtype=torch.float64)
    temperature, top_p = torch.tensor([0.0, 1.0, 0.0, 0.7]), torch.tensor([1.0, 1.0, 1.0, 0.5])
    tokens, logprobs = draw(logits, temperature, top_p, uniform)
    for row in range(4):
        token, logprob = draw(
            logits[row : row + 1], temperature[row : row + 1], top_p[row : row + 1], uniform[row : row + 1]
        )
        assert (int(token[0]), float(logprob[0])) == (int(tokens[row]), float(logprobs[row]))
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax()
    assert torch.allclose(logprobs[0], torch.log_softmax(logits[0], -1)[tokens[0]])  # greedy: at temperature 1


def test_uniform_numbers_belong_to_the_seed():
    alone = uniform_numbers([11], 5)
    assert torch.equal(uniform_numbers([7, 11], 40)[1, :5], alone[0])
    assert alone.min() >= 0 and alone.max() < 1
    assert not torch.equal(uniform_numbers([12], 5), alone)
    numbers = uniform_numbers(range(2000), 10)
    assert abs(float(numbers.mean()) - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5


def test_derived_seeds_are_stable_and_separate():
    assert derive_seed("rollout", 0, 1, 2, 3) == 8107820055951265550
    seeds = {derive_seed("a", i, j) for i in range(30) for j in range(30)}
    assert len(seeds) == 900 and derive_seed("a", 11) != derive_seed("a", 1, 1) and derive_seed(1) != derive_seed("1")


@pytest.mark.parametrize("size", [1, 511, 512, 513, 3000])
def test_deterministic_cumulative_sum(size):
    """The form used on CUDA, here on the CPU: the sums of torch.cumsum, and monotone."""
    weights = torch.rand(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    found = _blocked_cumsum(weights)
    assert torch.allclose(found, weights.cumsum(-1), rtol=1e-13, atol=0)
    assert (found.diff(dim=-1) >= 0).all()

"""The parts of a rollout step that are plain functions, against values worked out by hand."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch

from tests.rlvr.tiny_rlvr import rlvr_config
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.curation.preference import PreferenceStatistics, ScoredSample, binarise
from tulu_hpc.data.datasets import Prompt
from tulu_hpc.data.records import Message, RlvrRecord
from tulu_hpc.objectives.advantages import group_advantages
from tulu_hpc.rollout.engine import Completion
from tulu_hpc.stages import rlvr, rlvr_packs, rlvr_rollouts
from tulu_hpc.stages.rlvr_metrics import RolloutStats, rollout_metrics
from tulu_hpc.stages.rlvr_mismatch import Mismatch, breach, mismatch_metrics


def test_advantages() -> None:
    rewards = [10.0, 0.0, 0.0, 10.0, 0.0]
    deviation = statistics.stdev(rewards)
    assert group_advantages(rewards) == pytest.approx([(r - 4) / (deviation + 1e-8) for r in rewards], rel=1e-12)
    assert group_advantages(rewards, "centered") == [6.0, -4.0, -4.0, 6.0, -4.0]
    assert sum(group_advantages([0.1, 0.2, 0.7]) or [1]) == pytest.approx(0, abs=1e-12)
    assert group_advantages([3.0, 3.0]) is None and group_advantages([0.1] * 8, "centered") is None
    scaled = group_advantages([100.0, 0.0, 0.0, 100.0, 0.0])
    assert scaled == pytest.approx(group_advantages(rewards), rel=1e-6)  # standardised: the reward's scale drops out
    for bad in ([1.0], [], [1.0, math.nan]):
        with pytest.raises(ValueError, match="two finite"):
            group_advantages(bad)


def prompts(count: int) -> list[Prompt]:
    return [Prompt([i], RlvrRecord([Message("user", str(i))], ["1"], ["gsm8k"], "s", str(i))) for i in range(count)]


def test_prompts_are_epochs_without_gaps(tmp_path: Path) -> None:
    config = rlvr_config(tmp_path, tmp_path / "r", rlvr__prompts_per_step=4)
    chosen = [rlvr_rollouts.prompts_from(prompts(10), config, 4 * step, 4) for step in range(5)]
    order = [int(prompt.record.id) for step in chosen for prompt in step]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    again = rlvr_rollouts.prompts_from(prompts(10), config, 8, 4)
    assert again == chosen[2]  # a function of the position alone
    other = rlvr_config(tmp_path, tmp_path / "r", rlvr__prompts_per_step=4, run__seed=4)
    assert rlvr_rollouts.prompts_from(prompts(10), other, 0, 4) != chosen[0]
    plain = rlvr_config(tmp_path, tmp_path / "r", rlvr__prompts_per_step=4, data__shuffle=False)
    assert [p.record.id for p in rlvr_rollouts.prompts_from(prompts(10), plain, 8, 4)] == ["8", "9", "0", "1"]


def test_minibatches_share_the_prompts(tmp_path: Path) -> None:
    config = rlvr_config(tmp_path, tmp_path / "r", rlvr__prompts_per_step=7, rlvr__minibatches=3)
    assert [rlvr_packs.minibatch_of(number, config) for number in range(7)] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout__temperature": 0.0}, "temperature"),
        ({"rlvr__minibatches": 7}, "minibatches"),
        ({"train__pack_rows": 39}, "pack_rows"),
        ({"rollout__stop": ["."]}, r"rollout\.stop"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rlvr.check(rlvr_config(tmp_path, tmp_path / "r", **changes))


def test_mismatch() -> None:
    first, second = Mismatch(), Mismatch()
    first.add(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]))
    second.add(torch.tensor([-1.0]), torch.tensor([-0.9]))
    second.add(torch.empty(0), torch.empty(0))
    found = mismatch_metrics([first, second])
    assert found["rollout/logprob_error_mean"] == pytest.approx(0.2, rel=1e-6)
    assert found["rollout/logprob_error_max"] == pytest.approx(0.5)
    assert found["rollout/token_mult_prob_error"] == pytest.approx((math.exp(0.5) + 1 + math.exp(0.1)) / 3)
    assert mismatch_metrics([Mismatch()]) == {}
    k3 = (math.exp(0.5) - 1 - 0.5 + math.exp(-0.1) - 1 + 0.1) / 3
    assert found["rollout/mismatch_kl"] == pytest.approx(k3, rel=1e-6)


def test_breach() -> None:
    first, second, broken = Mismatch(), Mismatch(), Mismatch()
    first.add(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]))
    second.add(torch.tensor([-1.0]), torch.tensor([-0.9]))
    broken.add(torch.tensor([math.nan, 0.0]), torch.tensor([0.0, 0.0]))
    assert breach([second], 0.2, 2.0) is None and breach([Mismatch()], 0.2, 2.0) is None
    assert "up to 0.5 (limit 0.2) over 3 tokens" in (breach([first, second], 0.2, 2.0) or "")
    assert "by up to nan" in (breach([second, broken], 0.2, 2.0) or "")
    # Without a limit of the largest difference, as in bf16, the mean still counts, a NaN in it too.
    assert breach([first, second], None, 1.3) is None
    assert "1.251 on average (limit 1.2)" in (breach([first, second], None, 1.2) or "")
    assert "nan" in (breach([second, broken], None, 1.3) or "")


def test_rollout_metrics_add_up_over_replicas() -> None:
    one, two = RolloutStats(groups=1, live_groups=1), RolloutStats(groups=1)
    answer = Completion([5, 6, 1], [-1.0, -1.0, -1.0], "stop", 1, 0)
    cut = Completion([5, 6, 7, 8, 9], [-1.0] * 5, "length", None, 0)
    one.add("gsm8k", 10.0, 1.0, answer, True)
    one.add("gsm8k", -10.0, -1.0, cut, False)
    two.add("ifeval", 5.0, 0.5, answer, True)
    found = rollout_metrics([one, two])
    assert found["rollout/reward"] == pytest.approx(5 / 3) and found["rollout/accuracy"] == pytest.approx(0.5)
    assert found["rollout/accuracy/gsm8k"] == 0.5 and found["rollout/accuracy/ifeval"] == 0.5
    assert found["rollout/length"] == pytest.approx(11 / 3) and found["rollout/eos_rate"] == pytest.approx(2 / 3)
    assert found["rollout/live_groups"] == 0.5


def samples(*scores: float, unfinished: tuple[int, ...] = ()) -> list[ScoredSample]:
    return [ScoredSample(f"answer {i}", score, i not in unfinished) for i, score in enumerate(scores)]


def test_binarise() -> None:
    pair = binarise(samples(0.0, 1.0, 0.5), seed=0)
    assert pair is not None and pair.chosen.text == "answer 1" and pair.rejected.score < 1
    assert binarise(samples(1.0, 1.0), seed=0) is None
    assert binarise([], seed=0) is None
    # Cut off: worth nothing, never chosen.
    assert binarise(samples(1.0, 0.0, unfinished=(0,)), seed=0) is None
    pair = binarise(samples(1.0, 0.5, unfinished=(0,)), seed=0)
    assert pair is not None and (pair.chosen.text, pair.rejected.text) == ("answer 1", "answer 0")
    assert binarise([ScoredSample("  ", 1.0), ScoredSample("b", 0.0)], seed=0) is None
    assert binarise([ScoredSample("same", 1.0), ScoredSample("same", 0.5)], seed=0) is None


def test_binarise_draws_evenly_and_by_the_seed() -> None:
    group = samples(1.0, 1.0, 0.0, 0.25, 0.0)
    pairs = [binarise(group, seed=seed) for seed in range(600)]
    assert binarise(group, seed=7) == pairs[7]
    for texts, side in ((["answer 0", "answer 1"], "chosen"), (["answer 2", "answer 3", "answer 4"], "rejected")):
        counts = [sum(getattr(pair, side).text == text for pair in pairs) for text in texts]
        assert sum(counts) == 600 and min(counts) > 600 / len(texts) * 0.8


def test_preference_statistics() -> None:
    statistics_ = PreferenceStatistics()
    for group, source in (
        (samples(1.0, 0.0), "a"),
        (samples(1.0, 1.0), "a"),
        (samples(1.0, 0.0, unfinished=(0,)), "b"),
    ):
        statistics_.add(group, binarise(group, seed=0), source)
    found = statistics_.summary()
    assert (found["prompts"], found["pairs"], found["samples"], found["finished"]) == (3, 1, 6, 5)
    assert (found["no_pair_equal_scores"], found["no_pair_unfinished"]) == (1, 1)
    assert found["prompts_by_source"] == {"a": 2, "b": 1} and found["pairs_by_source"] == {"a": 1}
    assert found["mean_score"] == pytest.approx(0.5) and found["mean_chosen_score"] == 1.0

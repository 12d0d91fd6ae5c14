"""Rewards per token, advantages and the value loss, against values worked out by hand; settings that are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rlvr.tiny_ppo import ppo_config
from tests.rlvr.tiny_rlvr import rlvr_config
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.data.datasets import Prompt
from tulu_hpc.data.packed_batch import Item, TokenSequence, pack
from tulu_hpc.data.records import Message, RlvrRecord
from tulu_hpc.objectives.value import sequence_offsets, token_advantages, token_rewards, value_terms
from tulu_hpc.parallel.layout import Layout
from tulu_hpc.rollout.engine import Completion
from tulu_hpc.stages import rlvr, rlvr_values
from tulu_hpc.stages.rlvr_packs import pack_for
from tulu_hpc.stages.rlvr_rollouts import Group


def test_rewards_lie_on_the_last_token() -> None:
    """Answers of 3, 1 and 2 tokens: verified, unverified, and one without end-of-text."""
    offsets = sequence_offsets(torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    assert offsets.tolist() == [0, 3, 4, 6]
    rewards, kl = token_rewards(torch.tensor([10.0, 0.0, -10.0]), offsets)
    assert rewards.tolist() == [0, 0, 10, 0, 0, -10] and kl.tolist() == [0] * 6
    policy = torch.tensor([-1.0, -2.0, -0.5, -1.0, -3.0, -1.0], requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -0.5, -2.0, -3.0, -1.25])
    differences = [0.5, -1.0, 0.0, 1.0, 0.0, 0.25]
    estimates = {
        "k1": differences,
        "k2": [d * d / 2 for d in differences],
        "k3": [math.exp(-d) - 1 + d for d in differences],
    }
    for kind, wanted in estimates.items():
        rewards, kl = token_rewards(
            torch.tensor([10.0, 0.0, -10.0]),
            offsets,
            logprobs_K=policy,
            reference_logprobs_K=reference,
            kl_coef=0.2,
            kl_kind=kind,  # type: ignore[arg-type]
        )
        assert kl.tolist() == pytest.approx(wanted, abs=1e-6)
        answers = [0, 0, 10, 0, 0, -10]
        assert rewards.tolist() == pytest.approx([r - 0.2 * d for r, d in zip(answers, wanted, strict=True)], abs=1e-6)
        assert not rewards.requires_grad


def test_advantages_of_two_answers() -> None:
    rewards, values = torch.tensor([0.0, 0.0, 10.0, -10.0]), torch.tensor([1.0, 2.0, 4.0, 3.0])
    advantages, returns = token_advantages(rewards, values, torch.tensor([0, 3, 4]), gamma=1.0, lam=0.95)
    last = 10.0 - 4.0
    middle = (4.0 - 2.0) + 0.95 * last
    first = (2.0 - 1.0) + 0.95 * middle
    assert advantages.tolist() == pytest.approx([first, middle, last, -13.0])
    assert returns.tolist() == pytest.approx([first + 1, middle + 2, last + 4, -10.0])


def test_value_terms() -> None:
    values = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    old, returns = torch.tensor([1.0, 2.5, 3.0]), torch.tensor([2.0, 2.5, 10.0])
    terms = value_terms(values, old_values_K=old, returns_K=returns, clip=0.2, coef=0.1, global_tokens=6)
    # Errors 1, then 0.5 (unclipped is the larger one), then 10 - 3.2 of the value that may move to 3.2 only.
    wanted = [0.5, 0.125, 6.8**2 / 2]
    assert terms.loss.item() == pytest.approx(0.1 * sum(wanted) / 6)
    terms.loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.1 / 6 * -1.0, 0.1 / 6 * -0.5, 0.0])
    metrics = {name: (float(total), count) for name, (total, count) in terms.metrics.items()}
    assert metrics["loss"] == (pytest.approx(sum(wanted)), 3.0)
    assert metrics["clip_fraction"] == (2.0, 3.0) and metrics["value"] == (8.0, 3.0)
    empty = torch.zeros(0, requires_grad=True)
    nothing = value_terms(empty, old_values_K=empty, returns_K=empty, clip=None, coef=1.0, global_tokens=1)
    assert nothing.loss.item() == 0.0
    with pytest.raises(ValueError, match="0 tokens"):
        value_terms(empty, old_values_K=empty, returns_K=empty, clip=None, coef=1.0, global_tokens=0)


def test_columns_travel_by_answer(tmp_path: Path) -> None:
    """Also those of a group that is cut over two packs."""
    config = ppo_config(tmp_path, tmp_path / "r", rlvr__samples_per_prompt=3, train__pack_rows=5)
    record = RlvrRecord([Message("user", "a")], ["1"], ["gsm8k"], "s", "id")
    answers = [Completion(list(range(1, 2 + size)), [-1.0] * (1 + size), "stop", 1, 0) for size in range(3)]
    group = Group(4, Prompt([5, 6, 7], record), answers, [10.0, 0.0, 0.0], [10.0, 0.0, -10.0], None)
    rewards = {12: torch.zeros(1), 13: torch.ones(2), 14: torch.tensor([2.0, 3.0, 4.0])}
    items = rlvr_values._value_items(config, [group], rewards)
    assert items[0][0] == 4 and items[0][1].per_sequence["sample"] == [12.0, 13.0, 14.0]
    packs = pack_for([items[0][1]], config, Layout(), ParallelSection(), 0)
    assert len(packs) == 2
    parts = [rlvr_values.by_sample(each, each.per_target["rewards"]) for each in packs]
    found = {number: column.tolist() for part in parts for number, column in part.items()}
    assert found == {number: column.tolist() for number, column in rewards.items()}
    assert rlvr_values.by_sample(pack([]), torch.zeros(0)) == {}


@pytest.mark.parametrize(
    ("changes", "old"),
    [
        ({"rlvr__old_logprobs": "engine"}, -1.0),
        ({"rlvr__old_logprobs": "trainer"}, -2.0),
        ({"rlvr__old_logprobs": "engine", "rlvr__importance": "token"}, -2.0),
    ],
)
def test_kl_in_the_reward_is_that_of_the_ratios_denominator(
    tmp_path: Path, changes: dict[str, Any], old: float
) -> None:
    config = ppo_config(tmp_path, tmp_path / "r", rlvr__kl_coef=0.5, **changes)
    columns = {"behaviour_logprobs": -1.0, "old_logprobs": -2.0, "reference_logprobs": -4.0}
    item = Item(
        "group",
        [TokenSequence(torch.tensor([1, 2]))],
        prompt=torch.tensor([5, 6]),
        per_sequence={"reward": [10.0], "sample": [3.0]},
        per_target={name: [torch.full((2,), value)] for name, value in columns.items()},
    )
    rewards, (kl,) = rlvr_values.reward_columns(config, [pack([item])])
    assert kl.tolist() == [old + 4] * 2
    assert rewards[3].tolist() == [-0.5 * (old + 4), 10 - 0.5 * (old + 4)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rlvr__kind": "grpo", "rlvr__samples_per_prompt": 1, "rlvr__kl_in": "loss"}, "at least 2"),
        ({"rlvr__kind": "grpo", "rlvr__samples_per_prompt": 2}, "kl_in: reward is for ppo"),
        ({"rlvr__kind": "grpo", "rlvr__samples_per_prompt": 2, "rlvr__kl_in": "loss"}, "value model belongs to"),
        ({"rlvr__dual_clip": 1.0}, "greater than 1"),
        ({"rlvr__advantage": "centered"}, "ppo has a value model"),
        ({"rlvr__dynamic_sampling": True}, "under ppo every answer teaches"),
        ({"value__lam": 1.5}, "less than or equal to 1"),
        ({"value__clip": 0.0}, "greater than 0"),
        ({"value__model": {"path": "x", "fp32_head": True}}, "scalar head computes in fp32"),
        ({"value__parallel": {"tensor": 2, "tp_comm_overlap": True}}, "buffers for one model"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ppo_config(tmp_path, tmp_path / "r", **changes)


def test_ppo_needs_a_value_model_and_few_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give value\.model\.path"):
        rlvr_config(tmp_path, tmp_path / "r", rlvr__kind="ppo")
    config = ppo_config(tmp_path, tmp_path / "r", rlvr__prompts_per_step=2**20, rlvr__samples_per_prompt=16)
    with pytest.raises(ConfigError, match=r"below 2\^24"):
        rlvr.check(config)

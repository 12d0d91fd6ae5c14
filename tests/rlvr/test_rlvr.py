"""RLVR runs of a tiny model: it learns, it resumes bit for bit, and no layout changes it.

Not proven here: that rewards of a real task rise (the quickstart shows that), and anything about a rollout server.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.forked import WorkerError
from tests.rlvr import tiny_rlvr
from tests.rlvr.tiny_rlvr import in_processes, metrics, rlvr_config, run_and_die, same_metrics
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.rollout import embedded
from tulu_hpc.stages import rlvr, rlvr_rollouts
from tulu_hpc.training.checkpoint import valid_steps


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent do not survive a fork
    return tiny_rlvr.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of four steps with two epochs of two minibatches."""
    run = tmp_path_factory.mktemp("whole") / "run"
    in_processes(rlvr.run, rlvr_config(inputs, run, rlvr__epochs=2, rlvr__minibatches=2))
    return run


def test_reward_rises(inputs: Path, tmp_path: Path) -> None:
    """The task is to end the answer in time without capitals, which the random model hardly ever does."""
    config = rlvr_config(
        inputs,
        tmp_path / "run",
        train__steps=24,
        train__save_every=None,
        rlvr__prompts_per_step=8,
        rlvr__samples_per_prompt=8,
        rollout__max_sequences=64,
    )
    in_processes(rlvr.run, config)
    rows = metrics(tmp_path / "run")
    rewards = [row["rollout/reward"] for row in rows]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 3
    assert all(0 <= row["rollout/reward"] <= 10 for row in rows)
    kl = [row["train/kl"] for row in rows if row["train/updates"]]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0.01
    assert all(row.get("rollout/logprob_error_max", 0) < 1e-4 for row in rows)
    assert all(row.get("train/ratio", 1.0) == pytest.approx(1.0, abs=1e-4) for row in rows)  # one update: on-policy
    wanted = {"rollout/eos_rate", "rollout/length", "rollout/accuracy/ifeval", "timing/rollout", "timing/train"}
    assert wanted <= rows[0].keys()


def test_later_updates_of_a_step_are_off_policy(whole: Path) -> None:
    rows = metrics(whole)
    assert sum(row["train/updates"] + row["train/skipped_updates"] for row in rows) == 16
    assert all(row["train/skipped_steps"] == 0 for row in rows if row["train/updates"]), "no spike"
    assert any(abs(row["train/ratio"] - 1) > 1e-4 for row in rows if row["train/updates"] > 1)
    assert all(row.get("rollout/logprob_error_max", 0) < 1e-4 for row in rows)  # counted before the first update only


def test_resumed_run_equals_the_uninterrupted_one(inputs: Path, whole: Path, tmp_path: Path) -> None:
    config = rlvr_config(inputs, tmp_path / "run", rlvr__epochs=2, rlvr__minibatches=2, train__async_save=False)
    for dies_after, saved in ((3, True), (0, True)):
        with pytest.raises(WorkerError, match="Stopped"):
            in_processes(lambda _config, n=dies_after: run_and_die(rlvr.run, _config, n), config)
        assert bool(valid_steps(tmp_path / "run" / "checkpoints")) == saved
    in_processes(rlvr.run, config)
    assert same_metrics(tmp_path / "run") == same_metrics(whole)


def test_a_finished_run_is_left_alone(inputs: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_text()
    in_processes(rlvr.run, rlvr_config(inputs, whole, rlvr__epochs=2, rlvr__minibatches=2))
    assert (whole / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {}),
        (2, {"parallel__tensor": 2}),
        (2, {"parallel__pipeline": 2}),
        (2, {"parallel__context": 2}),
        (4, {"parallel__tensor": 2}),
    ],
)
def test_layouts_do_not_change_a_run(
    inputs: Path, whole: Path, tmp_path: Path, world: int, parallel: dict[str, Any]
) -> None:
    config = rlvr_config(
        inputs, tmp_path / "run", rlvr__epochs=2, rlvr__minibatches=2, train__save_every=None, **parallel
    )
    in_processes(rlvr.run, config, world)
    for found, wanted in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        for name in ("rollout/reward", "rollout/new_tokens", "train/tokens", "train/updates"):
            assert found.get(name) == wanted.get(name), name
        for name in ("train/loss", "train/kl", "train/grad_norm", "train/clip_fraction"):
            assert found.get(name, 0.0) == pytest.approx(wanted.get(name, 0.0), rel=1e-4, abs=1e-5), name


def test_without_reference_and_with_penalty(inputs: Path, tmp_path: Path) -> None:
    config = rlvr_config(
        inputs,
        tmp_path / "run",
        rlvr__kl_coef=0.0,
        rlvr__no_eos_penalty=-10.0,
        rlvr__normalisation="sequence_mean",
        rlvr__advantage="centered",
        train__steps=1,
    )
    in_processes(rlvr.run, config)
    (row,) = metrics(tmp_path / "run")
    assert "train/kl" not in row and row["timing/reference"] < row["timing/step"]
    ended = row["rollout/eos_rate"]
    assert row["rollout/reward"] == pytest.approx(10 * row["rollout/accuracy"] - 10 * (1 - ended))


def _with_a_wrong_engine(config: RlvrConfig) -> None:
    generate = embedded.EmbeddedEngine.generate_batch

    def wrong(self: Any, requests: Any) -> Any:
        found = generate(self, requests)
        found[0].logprobs[0] += 0.01
        return found

    embedded.EmbeddedEngine.generate_batch = wrong  # type: ignore[method-assign]  # of this forked process only
    # Rewards that differ in every group, so that the first answer is trained on.
    scores = iter(range(10**6))
    rlvr_rollouts.group_advantages = lambda rewards, kind: [float(next(scores)) for _ in rewards]
    rlvr.run(config)


def test_an_engine_that_disagrees_stops_the_run(inputs: Path, tmp_path: Path) -> None:
    config = rlvr_config(inputs, tmp_path / "run", train__steps=2)
    with pytest.raises(WorkerError, match=r"MismatchError.*up to 0\.01"):
        in_processes(_with_a_wrong_engine, config)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"messages": [{"role": "user", "content": "a"}], "ground_truth": "x", "dataset": "gsm8k"}', "not a number"),
        ('{"messages": [{"role": "user", "content": "a"}], "ground_truth": "1", "dataset": "gsm"}', "unknown verifier"),
        ('{"messages": [{"role": "user", "content": "a"}], "dataset": "gsm8k"}', "ground_truth"),
    ],
)
def test_prompts_that_cannot_be_verified(inputs: Path, tmp_path: Path, row: str, words: str) -> None:
    good = (inputs / "prompts.jsonl").read_text()
    (tmp_path / "bad.jsonl").write_text(good + row + "\n")
    config = rlvr_config(inputs, tmp_path / "run", data__path=str(tmp_path / "bad.jsonl"), train__steps=1)
    with pytest.raises(WorkerError, match=f"bad.jsonl:13: .*{words}"):
        in_processes(rlvr.run, config)
    skipping = rlvr_config(
        inputs, tmp_path / "skip", data__path=str(tmp_path / "bad.jsonl"), data__on_error="skip", train__steps=1
    )
    in_processes(rlvr.run, skipping)
    assert len(metrics(tmp_path / "skip")) == 1


def test_own_verifiers(inputs: Path, tmp_path: Path) -> None:
    """A module of one's own gives the reward; the prompts name a verifier that exists nowhere else."""
    (tmp_path / "own_verifiers.py").write_text(
        "from tulu_hpc.verifiers import Verdict, register\n"
        "@register('half')\n"
        "def half(completion, truth, record):\n"
        "    return Verdict(0.5)\n"
    )
    data = tmp_path / "prompts.jsonl"
    data.write_text((inputs / "prompts.jsonl").read_text().replace('"ifeval"', '"half"'))
    changes = {"data__path": str(data), "train__steps": 1, "verifier__modules": ["own_verifiers"]}
    config = rlvr_config(inputs, tmp_path / "run", **changes)

    def run(config: RlvrConfig) -> None:
        sys.path.insert(0, str(tmp_path))
        rlvr.run(config)

    in_processes(run, config)
    (row,) = metrics(tmp_path / "run")
    assert row["rollout/reward"] == pytest.approx(5 * row["rollout/eos_rate"])
    with pytest.raises(WorkerError, match="own_verifiers"):
        in_processes(rlvr.run, rlvr_config(inputs, tmp_path / "other", **changes))


def test_changed_prompts_are_not_resumed(inputs: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text((inputs / "prompts.jsonl").read_text())
    config = rlvr_config(inputs, tmp_path / "run", data__path=str(data), train__async_save=False)
    with pytest.raises(WorkerError, match="Stopped"):
        in_processes(lambda _config: run_and_die(rlvr.run, _config, 2), config)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(WorkerError, match=r"prompts of data\.path have changed"):
        in_processes(rlvr.run, config)

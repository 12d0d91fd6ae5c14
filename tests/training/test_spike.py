"""The policy on spikes of the gradient norm: which steps it leaves out, alike on all ranks and across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.forked import run_forked
from tests.training import tiny
from tulu_hpc.config.sections import OptimizerSection, ParallelSection, SpikeSection
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.training import checkpoint, saver
from tulu_hpc.training.spike import SpikeError, SpikeGuard
from tulu_hpc.training.step import train_step


def guard(**options: Any) -> SpikeGuard:
    return SpikeGuard(SpikeSection(**{"policy": "skip", "factor": 3.0, "window": 4, "min_history": 2, **options}))


def verdicts(guard: SpikeGuard, norms: list[float]) -> list[bool]:
    found = []
    for step, norm in enumerate(norms, start=1):
        found.append(guard.is_spike(norm))
        if found[-1]:
            guard.refuse(step, norm)
        else:
            guard.accept(norm)
    return found


def test_a_spike_is_judged_by_the_median_of_what_was_trained_on() -> None:
    # Too little history for the first two; then 3 x median of [9, 1] is 15.
    assert verdicts(guard(), [9.0, 1.0, 15.1, 15.0, 1.0, 1.0]) == [False, False, True, False, False, False]
    watched = guard()
    verdicts(watched, [1.0, 1.0, 1.0, 1.0, 100.0, 3.1, 2.9])
    assert watched.skipped == 2 and watched.norms == [1.0, 1.0, 1.0, 2.9], "spikes do not enter the history"
    assert watched.in_a_row == 0


def test_without_a_policy_everything_passes_and_nothing_is_kept() -> None:
    free = guard(policy="none")
    assert not any(verdicts(free, [1.0, 1.0, 1.0, 1e9])) and free.norms == []


def test_raise_and_too_many_in_a_row_stop() -> None:
    with pytest.raises(SpikeError, match="step 3: the gradient norm is 50, above 3 = "):
        verdicts(guard(policy="raise"), [1.0, 1.0, 50.0])
    with pytest.raises(SpikeError, match="after 2 steps left out in a row"):
        verdicts(guard(max_in_a_row=2), [1.0, 1.0, 50.0, 50.0, 50.0])


def test_settings_that_can_never_apply_are_refused() -> None:
    with pytest.raises(ValueError, match="min_history 9 is more than window 4"):
        SpikeSection(window=4, min_history=9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


SECTION = OptimizerSection(
    lr=1e-3, clip_grad=0.0, spike=SpikeSection(policy="skip", factor=4.0, window=8, min_history=2)
)
SPIKES = (3, 5)
STEPS = 7


def run(model: Path, parallel: ParallelSection, folder: Path, first: int, save_at: int | None, policy: str) -> Any:
    """Steps `first`+1..STEPS; the loss of steps in SPIKES is 1000 times as large."""
    groups = initialize(layout_of(parallel), seed=1)
    section = SECTION.model_copy(update={"spike": SECTION.spike.model_copy(update={"policy": policy})})
    trainer = tiny.make_trainer(model, groups, parallel, optimizer=section)
    if first:
        assert checkpoint.load_latest(trainer, folder) == (first, {})
    skipped, states = [], []
    for step in range(first + 1, STEPS + 1):
        items = tiny.make_items("ssss", seed=step)
        data = tiny.global_batch(items, groups, parallel, pack_rows=64)
        factor = 1000.0 if step in SPIKES else 1.0

        def loss(output: Any, batch: Any, factor: float = factor) -> Terms:
            return tiny.sft_only(4.0 / factor)(output, batch)

        result = train_step(trainer, data.packs, loss)
        assert result.step == step
        trainer.synchronise_parameters()
        states.append([p.detach().clone() for each in trainer.models for p in each.parameters()])
        skipped += [step] if result.skipped else []
        if step == save_at:
            saver.save(trainer, folder, {})
    return {"skipped": skipped, "count": trainer.spikes.skipped, "states": states, "norms": trainer.spikes.norms}


@pytest.mark.parametrize(
    "parallel",
    [ParallelSection(pipeline=2), ParallelSection(overlap_grad_reduce=True, overlap_param_gather=True)],
    ids=["dp2 pp2", "dp4 overlapped"],
)
def test_skipped_alike_on_all_ranks_and_after_a_resume(model: Path, tmp_path: Path, parallel: ParallelSection) -> None:
    whole = run_forked(4, lambda: run(model, parallel, tmp_path, 0, 4, "skip"))
    resumed = run_forked(4, lambda: run(model, parallel, tmp_path, 4, None, "skip"))
    for full, rest in zip(whole, resumed, strict=True):
        assert full["skipped"] == list(SPIKES) and rest["skipped"] == [5]
        assert full["count"] == rest["count"] == 2
        assert full["norms"] == rest["norms"] == whole[0]["norms"]
        for at in range(1, STEPS + 1):
            moved = at == 1 or any(
                not torch.equal(a, b) for a, b in zip(full["states"][at - 2], full["states"][at - 1], strict=True)
            )
            assert moved == (at not in SPIKES), at
        for ours, theirs in zip(full["states"][4:], rest["states"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "bitwise"


def test_raise_names_the_samples_and_changes_nothing(model: Path, tmp_path: Path) -> None:
    def body() -> str:
        with pytest.raises(SpikeError) as caught:
            run(model, ParallelSection(), tmp_path, 0, None, "raise")
        return str(caught.value)

    messages = run_forked(2, body)
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 3: ") and all(f"s{i}" in messages[0] for i in range(4))

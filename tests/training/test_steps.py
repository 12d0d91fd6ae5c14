"""Normalisation, schedule, reference cache, and what a step does when something is missing or wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.parallel.forked import run_forked
from tests.training import tiny
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import ModelSection, OptimizerSection, ParallelSection
from tulu_hpc.data.packed_batch import pack
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.training.normalisation import global_counts
from tulu_hpc.training.runner import Runner
from tulu_hpc.training.schedule import Schedule
from tulu_hpc.training.step import train_step
from tulu_hpc.training.trainer import build_trainer, load_model

PLAIN = ParallelSection()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


def one_sft_step(model: Path, letters: str, normalisation: str, **options: Any) -> dict[str, Any]:
    """Gradient and metrics of one global batch of sequences."""
    groups = initialize(layout_of(PLAIN), seed=1)
    trainer = tiny.make_trainer(model, groups, PLAIN)
    data = tiny.global_batch(tiny.make_items(letters), groups, PLAIN, **options)
    counts = global_counts(data.packs, groups)
    loss = tiny.sft_only(8.0 if normalisation == "sum" else float(counts.targets))
    trainer.zero_grad()
    trainer.runner.forward_backward(trainer.runner.prepare(data.packs), loss)
    gradient = tiny.gradients(trainer)
    result = train_step(trainer, data.packs, loss)
    empty = tiny.empty_pack_count(data.packs)
    return {"gradient": gradient, "metrics": result.metrics, "counts": counts, "packs": len(data.packs), "empty": empty}


@pytest.mark.parametrize("normalisation", ["sum", "token_mean"])
def test_gradient_does_not_depend_on_packs_or_ranks(model: Path, normalisation: str) -> None:
    ways = {
        "many packs": (1, {"pack_rows": 32}),
        "dp2": (2, {"pack_rows": 1000}),
        "dp2 many packs": (2, {"pack_rows": 40}),
    }
    wanted = run_forked(1, lambda: one_sft_step(model, "sssss", normalisation, pack_rows=1000))[0]
    assert wanted["packs"] == 1
    for name, (world, options) in ways.items():
        found = run_forked(world, lambda options=options: one_sft_step(model, "sssss", normalisation, **options))[0]
        assert found["counts"].targets == wanted["counts"].targets, name
        assert found["metrics"]["loss"] == pytest.approx(wanted["metrics"]["loss"], abs=1e-6), name
        assert tiny.largest_difference(found["gradient"], wanted["gradient"], relative=True) <= 1e-5, name


def test_mean_of_means_would_be_caught(model: Path) -> None:
    """What the test above protects from: dividing each rank's sum by its own count gives another gradient."""

    def wrong() -> dict[str, Any]:
        groups = initialize(layout_of(PLAIN), seed=1)
        trainer = tiny.make_trainer(model, groups, PLAIN)
        data = tiny.global_batch(tiny.make_items("sssss"), groups, PLAIN, pack_rows=1000)
        own = sum(p.num_targets for p in data.packs)
        trainer.zero_grad()
        batches = trainer.runner.prepare(data.packs)
        trainer.runner.forward_backward(batches, tiny.sft_only(float(own * groups.dp_size)))
        return tiny.gradients(trainer)

    wanted = run_forked(1, wrong)[0]
    found = run_forked(2, wrong)[0]
    assert tiny.largest_difference(found, wanted, relative=True) > 1e-3


def test_a_rank_without_data_takes_part(model: Path) -> None:
    wanted = run_forked(1, lambda: one_sft_step(model, "s", "token_mean", pack_rows=100))[0]
    results = run_forked(2, lambda: one_sft_step(model, "s", "token_mean", pack_rows=100))
    assert sorted(result["empty"] for result in results) == [0, 1]
    for result in results:
        assert result["metrics"] == pytest.approx(wanted["metrics"], abs=1e-6)
    assert tiny.largest_difference(results[0]["gradient"], wanted["gradient"], relative=True) <= 1e-5


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.29])
def test_schedule_is_that_of_transformers(kind: Any, warmup: float) -> None:
    from transformers import get_scheduler

    schedule = Schedule(lr=3e-4, total_steps=100, kind=kind, warmup_ratio=warmup)
    assert schedule.warmup_steps == round(100 * warmup)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=schedule.warmup_steps, num_training_steps=100)
    for step in range(100):
        assert schedule.lr_at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_gradients_of_less_precision_than_the_model_are_refused(model: Path) -> None:
    """megatron would give such a model fp32 gradients and say nothing."""
    with pytest.raises(ValueError, match=r"optimizer\.gradient_dtype is bfloat16 but model\.dtype is float32"):
        build_trainer(
            model=ModelSection(path=str(model)),
            parallel=ParallelSection(),
            optimizer=OptimizerSection(lr=1e-3, gradient_dtype="bfloat16"),
            recompute="none",
            total_steps=1,
            groups=cast(Groups, None),  # refused before anything is built
            architecture=Architecture.from_hf(model),
        )


def test_schedule_ends_at_the_final_ratio() -> None:
    for kind in ("linear", "cosine"):
        assert Schedule(lr=1.0, total_steps=10, kind=kind, final_ratio=0.1).lr_at(10) == pytest.approx(0.1)


@pytest.mark.parametrize("options", [{}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}])
def test_logprobs_on_every_rank(model: Path, options: dict[str, Any]) -> None:
    def compute(parallel: ParallelSection) -> list[torch.Tensor]:
        groups = initialize(layout_of(parallel), seed=1)
        chunks = load_model(ModelSection(path=str(model)), groups, tiny.ARCHITECTURE)
        packs = [pack(tiny.make_items(letters), multiple=2) for letters in ("sp", "gps", "s")]
        found = Runner.create(chunks, groups, tiny.ARCHITECTURE).logprobs(packs)
        assert [f.numel() for f in found] == [p.num_targets for p in packs]
        return found

    wanted = run_forked(1, compute, PLAIN)[0]
    for found in run_forked(2, compute, ParallelSection(**options)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)

"""NaN planted in an activation, a gradient, a weight or a loss: found, named, agreed on by all ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.forked import run_forked
from tests.training import tiny
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.models.build import unwrap
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.training.step import NonFiniteError, train_step
from tulu_hpc.training.trainer import Trainer

Plant = Callable[[Trainer], Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


def module(trainer: Trainer, layer: int, name: str) -> torch.nn.Module | None:
    """A module of the whole model's layer (from 0), None on ranks that do not have it."""
    for chunk in trainer.models:
        for each in unwrap(chunk).decoder.layers:
            if each.layer_number == layer + 1:
                return each.get_submodule(name)
    return None


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        return gradients[0] * math.inf


def in_output(trainer: Trainer) -> None:
    """NaN in one row of layer 2's MLP output, on the last tensor-parallel rank and in every micro-batch."""
    groups = trainer.groups
    found = module(trainer, 2, "mlp.linear_fc1")
    if found is not None and groups.tp_rank == groups.tp_size - 1:

        def poison(_module: Any, _args: Any, output: Any) -> Any:
            first, *rest = output
            return (torch.where(torch.arange(len(first))[:, None, None] == 1, math.nan, first), *rest)

        found.register_forward_hook(poison, prepend=True)


def in_gradient(trainer: Trainer) -> None:
    """Infinity times the gradient inside layer 1's output projection of attention."""
    found = module(trainer, 1, "self_attention.linear_proj")
    if found is not None:
        forward = found.forward
        found.forward = lambda x, *args, **kwargs: forward(_Poison.apply(x), *args, **kwargs)  # type: ignore[method-assign]


def in_weight(trainer: Trainer) -> None:
    found = module(trainer, 3, "mlp.linear_fc2")
    if found is not None and trainer.groups.tp_rank == 0:
        with torch.no_grad():
            found.weight[0, 0] = math.inf  # type: ignore[index,operator]


def step(model: Path, parallel: ParallelSection, plant: Plant, folder: Path, mode: Any = "on_failure") -> Any:
    groups = initialize(layout_of(parallel), seed=1)
    trainer = tiny.make_trainer(model, groups, parallel, recompute="full" if folder.name == "recomputed" else "none")
    trainer.watch.mode, trainer.watch.directory = mode, folder
    plant(trainer)
    before = [p.detach().clone() for each in trainer.models for p in each.parameters()]
    items = tiny.make_items("sspgss")
    data = tiny.global_batch(items, groups, parallel, pack_rows=64)
    with pytest.raises(NonFiniteError) as caught:
        train_step(trainer, data.packs, tiny.mixed_loss(groups, items))
    after = [p.detach() for each in trainer.models for p in each.parameters()]
    unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {"message": str(caught.value), "report": caught.value.report, "unchanged": unchanged, "step": trainer.step}


LAYOUTS = {
    "one": (1, ParallelSection()),
    "tp2 pp2": (4, ParallelSection(tensor=2, pipeline=2)),
    "dp2 cp2": (4, ParallelSection(context=2, overlap_grad_reduce=True, overlap_param_gather=True)),
}
PLACES: dict[str, tuple[Plant, str, int, tuple[str, ...]]] = {
    "output": (in_output, "decoder.layers.2.mlp.linear_fc1", 2, ("output",)),
    "gradient": (in_gradient, "decoder.layers.1.self_attention.linear_proj", 1, ("gradient of input",)),
    "weight": (in_weight, "decoder.layers.3.mlp.linear_fc2.weight", 3, ("value",)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_module_rank_and_samples(model: Path, tmp_path: Path, layout: str, place: str) -> None:
    world, parallel = LAYOUTS[layout]
    plant, name, layer, kinds = PLACES[place]
    results = run_forked(world, lambda: step(model, parallel, plant, tmp_path))
    assert len({result["message"] for result in results}) == 1, "every rank raises the same"
    assert all(result["unchanged"] and result["step"] == 0 for result in results)
    first = results[0]["report"]["first"]
    assert (first["module"], first["layer"]) == (name, layer)
    assert first["kind"] in kinds
    if layout == "tp2 pp2":
        assert first["pp"] == (0 if layer < 2 else 1)
        assert place == "gradient" or first["tp"] == (1 if place == "output" else 0)
    if place != "weight":
        samples = {item.id for item in tiny.make_items("sspgss")}
        assert first["sample_ids"] and set(first["sample_ids"]) <= samples
    written = json.loads((tmp_path / "non_finite" / "step_1.json").read_text())
    assert written["first"] == first
    assert len(written["ranks"]) == world


@pytest.mark.parametrize("mode", ["on_failure", "always"])
@pytest.mark.parametrize("place", ["output", "gradient"])
def test_found_under_recomputation_too(model: Path, tmp_path: Path, place: str, mode: str) -> None:
    plant, name, _, kinds = PLACES[place]
    (result,) = run_forked(1, lambda: step(model, ParallelSection(), plant, tmp_path / "recomputed", mode))
    first = result["report"]["first"]
    assert first["module"] == name and first["kind"] in kinds


def test_a_report_that_cannot_be_written_hides_nothing(model: Path, tmp_path: Path) -> None:
    """Every rank raises the same error, so that all go on alike."""
    (tmp_path / "non_finite").write_text("a file")
    first, second = run_forked(2, step, model, ParallelSection(), in_output, tmp_path)
    assert "step_1.json cannot be written: " in first["message"] and "no parameter was changed" in first["message"]
    assert first["message"] == second["message"]


def broken_sample(model: Path, parallel: ParallelSection, broken: str) -> Any:
    """One sample's log-probs are infinite, but its gradient is not: only the loss shows it."""
    groups = initialize(layout_of(parallel), seed=1)
    trainer = tiny.make_trainer(model, groups, parallel)
    data = tiny.global_batch(tiny.make_items("sssss"), groups, parallel, pack_rows=64)

    def loss(output: Any, batch: Any) -> Terms:
        ids = batch.batch.item_ids
        constant = math.inf if broken in ids else 0.0
        return Terms(output.logprobs_K.sum() + constant, {"loss": (output.logprobs_K.detach().sum(), 1.0)})

    with pytest.raises(NonFiniteError) as caught:
        train_step(trainer, data.packs, loss)
    own = [pack.item_ids for pack in data.packs if broken in pack.item_ids]
    return {"report": caught.value.report, "packs": own, "message": str(caught.value)}


def test_a_loss_with_finite_gradient_is_noticed_by_all_ranks(model: Path) -> None:
    results = run_forked(4, lambda: broken_sample(model, ParallelSection(pipeline=2), "s3"))
    (pack,) = {tuple(ids) for result in results for ids in result["packs"]}
    for result in results:
        assert "a loss is not finite" in result["message"]
        assert set(result["report"]["sample_ids"]) == set(pack)


def test_only_the_sequences_affected_are_named(model: Path) -> None:
    """A token whose embedding row is infinite spoils the samples that contain it, and no others of the pack."""

    def body() -> Any:
        groups = initialize(layout_of(ParallelSection()), seed=1)
        trainer = tiny.make_trainer(model, groups, ParallelSection())
        items = tiny.make_items("sssss")
        data = tiny.global_batch(items, groups, ParallelSection(), pack_rows=1000)
        victim = items[2].responses[0].tokens[0]
        rows = trainer.models[0].embedding.word_embeddings.weight
        with torch.no_grad():
            rows[victim] = math.nan
        with pytest.raises(NonFiniteError) as caught:
            train_step(trainer, data.packs, tiny.sft_only(5.0))
        holding = [i.id for i in items if bool((i.responses[0].tokens[:-1] == victim).any())]
        return caught.value.report, holding

    ((report, holding),) = run_forked(1, body)
    assert set(report["sample_ids"]) == set(holding) and 0 < len(holding) < 5
    assert report["first"]["module"] == "embedding.word_embeddings.weight"

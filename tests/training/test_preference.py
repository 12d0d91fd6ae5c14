"""Preference losses in the trainer: every kind against transformers, shared prompts, resident reference, metrics by
source; all of it at several layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.parallel.forked import run_forked
from tests.training import tiny, tiny_run
from tulu_hpc.config.loader import load_config
from tulu_hpc.config.schema import DpoConfig, DpoSection, SftConfig
from tulu_hpc.config.sections import LoopSection, ParallelSection
from tulu_hpc.data.datasets import WEIGHT
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.kernels import preference_loss
from tulu_hpc.kernels.preference_loss.problem import KINDS
from tulu_hpc.objectives.sources import source_names
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.stages import dpo, sft
from tulu_hpc.training.step import train_step

LETTERS = "pppppp"
# Every kind that the kernel has, and every option that the configuration has.
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo", "beta": 0.3},
    "dpo smoothed": {"kind": "dpo", "beta": 0.3, "label_smoothing": 0.1},
    "dpo with sft term": {"kind": "dpo", "beta": 0.3, "sft_weight": 0.2},
    "dpo with weights of pairs": {"kind": "dpo", "beta": 0.3, "sft_weight": 0.2, "weight_field": "quality"},
    "wpo": {"kind": "dpo", "beta": 0.3, "weighting": "wpo"},
    "wpo aligned": {"kind": "dpo", "beta": 0.3, "weighting": "wpo", "wpo_alignment": True, "weight_field": "quality"},
    "dpo_norm": {"kind": "dpo_norm", "beta": 2.0},
    "cdpo": {"kind": "cdpo", "beta": 0.3, "label_smoothing": 0.2},
    "robust": {"kind": "robust", "beta": 0.3, "label_smoothing": 0.2},
    "simpo": {"kind": "simpo", "beta": 2.0, "gamma": 0.5},
    "ipo": {"kind": "ipo", "beta": 0.2},
    "hinge": {"kind": "hinge", "beta": 0.3},
    "orpo": {"kind": "orpo", "beta": 0.5},
    "kto": {"kind": "kto", "beta": 0.3, "kl_baseline": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.7},
}
WAYS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process": {}, "prompts repeated": {"share": False}},
    2: {"tp2": {"tensor": 2}, "cp2": {"context": 2}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


def pairs() -> list[Item]:
    items = tiny.make_items(LETTERS, seed=2)
    for index, item in enumerate(items):
        item.source = "odd" if index % 2 else "even"
        item.per_sequence[WEIGHT] = [0.25 + index] * 2
    return items


def gradients_of_all(model: Path, ways: dict[str, dict[str, Any]]) -> dict[tuple[str, str], Any]:
    """(way, loss) -> gradients and metrics of one global batch, through the stage's own loss function."""
    found = {}
    for way, options in ways.items():
        parallel = ParallelSection(**{k: v for k, v in options.items() if k in ParallelSection.model_fields})
        groups = initialize(layout_of(parallel), seed=1)
        trainer = tiny.make_trainer(model, groups, parallel, optimizer=tiny.OPTIMIZER.model_copy(update={"lr": 1e-9}))
        data = tiny.global_batch(pairs(), groups, parallel, pack_rows=64, share=options.get("share", True))
        run: Any = SimpleNamespace(groups=groups)
        for name, section in LOSSES.items():
            config: Any = SimpleNamespace(dpo=DpoSection(**section))
            dpo.prepare(config, trainer)
            loss = dpo.batch_loss(run, config, data, source_names(pairs()))
            trainer.metric_names = []
            trainer.zero_grad()
            trainer.runner.forward_backward(trainer.runner.prepare(data.packs), loss)
            gradients = tiny.gradients(trainer)
            found[way, name] = (gradients, train_step(trainer, data.packs, loss).metrics)
    return found


@pytest.fixture(scope="module")
def results(model: Path) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for world, ways in WAYS.items():
        per_rank = run_forked(world, gradients_of_all, model, ways)
        for key, (_, metrics) in per_rank[0].items():
            assert all(rank[key][1] == metrics for rank in per_rank), "all ranks report the same"
        found.update(per_rank[0])
    return found


@pytest.fixture(scope="module")
def hf_answers(model: Path) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of each loss by transformers, sequence by sequence, and the formulas in plain torch."""
    theirs = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    items, answers = pairs(), {}
    logprobs, ids, alignments = [], [], []
    for number, (item, response) in enumerate((i, r) for i in items for r in i.responses):
        table = theirs(torch.cat((item.prompt, response.tokens))[None]).logits[0].log_softmax(-1)
        start = len(item.prompt) - 1
        logprobs.append(table[start : start + len(response)].gather(1, response.tokens[:, None])[:, 0])
        ids += [number] * len(response)
        # log sum p^2, which the trainer takes from two passes of the head
        alignments.append(table[start : start + len(response)].detach().double().exp().square().sum(1).log().sum())
    references = torch.tensor([sums for item in items for sums in item.per_sequence["reference_logprobs"]])
    for name, section in LOSSES.items():
        options = {"kl" if key == "kl_baseline" else key: value for key, value in section.items()}
        if options.pop("weight_field", None):
            options["weights_P"] = torch.tensor([item.per_sequence[WEIGHT][0] for item in items])
        if options.pop("wpo_alignment", None):
            options["alignment_sums_Q"] = torch.stack(alignments)
        out = preference_loss(
            torch.cat(logprobs),
            torch.tensor(ids),
            references,
            torch.arange(2 * len(items)).view(-1, 2),
            backend="reference",
            **options,
        )
        loss = out.loss / len(items)
        theirs.zero_grad()
        loss.backward(retain_graph=True)
        gradients = {n: p.grad.clone() for n, p in theirs.named_parameters() if p.grad is not None}
        answers[name] = (loss.item(), gradients)
    return answers


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_that_of_transformers(
    results: dict[tuple[str, str], Any], hf_answers: dict[str, tuple[float, dict[str, Tensor]]], name: str
) -> None:
    loss, wanted = hf_answers[name]
    for ways in WAYS.values():
        for way in ways:
            gradients, metrics = results[way, name]
            assert metrics["loss"] == pytest.approx(loss, abs=1e-5, rel=1e-5), way
            assert tiny.largest_difference(gradients, wanted, relative=True) <= 1e-5, way


SOAK_WAYS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp2 without sequence parallelism": {"tensor": 2, "sequence": False},
        "pp2": {"pipeline": 2},
        "pp2 vpp2": {"pipeline": 2, "virtual_pipeline": 2},
        "cp2 zigzag": {"context": 2, "context_split": "zigzag"},
        "cp2 prompts repeated": {"context": 2, "share": False},
        "dp2": {},
    },
    4: {
        "tp2 pp2": {"tensor": 2, "pipeline": 2},
        "cp2 tp2": {"context": 2, "tensor": 2},
        "cp2 pp2": {"context": 2, "pipeline": 2},
        "cp2 dp2": {"context": 2},
        "tp2 dp2": {"tensor": 2},
        "dp4": {},
    },
}


@pytest.mark.soak
def test_every_loss_at_every_layout(
    model: Path, hf_answers: dict[str, tuple[float, dict[str, Tensor]]], soak_figures: Callable[..., None]
) -> None:
    worst = worst_loss = 0.0
    cases = 0
    for world, ways in SOAK_WAYS.items():
        for (way, name), (gradients, metrics) in run_forked(world, gradients_of_all, model, ways, timeout=900)[
            0
        ].items():
            loss, wanted = hf_answers[name]
            difference = tiny.largest_difference(gradients, wanted, relative=True)
            assert difference <= 1e-5, (way, name)
            assert metrics["loss"] == pytest.approx(loss, abs=1e-5, rel=1e-5), (way, name)
            worst, worst_loss = max(worst, difference), max(worst_loss, abs(metrics["loss"] - loss))
            cases += 1
    soak_figures(cases=cases, worst_gradient=worst, worst_loss=worst_loss)


def test_no_loss_or_option_is_left_out() -> None:
    assert {section["kind"] for section in LOSSES.values()} == set(KINDS)
    assert set(KINDS) == set(DpoSection.model_fields["kind"].annotation.__args__)  # type: ignore[union-attr]
    used = {key for section in LOSSES.values() for key in section}
    # `records` and `kl_estimate` in test_labelled.py
    assert used | {"reference", "reference_cache", "records", "kl_estimate"} == set(DpoSection.model_fields)


def test_shared_prompts_are_the_default_and_exact(results: dict[tuple[str, str], Any]) -> None:
    assert LoopSection().prefix_sharing
    for name in LOSSES:
        (shared, metrics), (repeated, same) = results["one process", name], results["prompts repeated", name]
        assert tiny.largest_difference(shared, repeated, relative=True) <= 1e-5, name
        assert metrics == pytest.approx(same, abs=2e-5, rel=1e-5), name


def test_metrics_by_source_make_up_the_whole(results: dict[tuple[str, str], Any]) -> None:
    for (_, name), (_, metrics) in results.items():
        for metric in ("loss", "rewards/accuracies", "rewards/margins"):
            halves = [metrics[f"{metric}/{source}"] for source in ("even", "odd")]  # three pairs each
            assert sum(halves) / 2 == pytest.approx(metrics[metric], abs=2e-5), (name, metric)
            assert metric == "rewards/accuracies" or halves[0] != halves[1]


# ---------------------------------------------------------------------------------------------------- as users run it

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process": {}},
    2: {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "cp2": {"context": 2}, "dp2": {}},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))
    for name in ("preferences", "sft"):
        rows = (folder / f"{name}.jsonl").read_text().splitlines()
        # A rare source first: with one sequence per step and rank, most ranks of most steps see none of it.
        tagged = [f'{{"source": "{"rare" if i == 0 else "common"}", {row[1:]}' for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(tagged) + "\n")
    return folder


def dpo_runs(inputs: Path, folder: Path, layouts: dict[str, dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    losses = {}
    for name, parallel in layouts.items():
        for kind in ("cached", "resident"):
            run = folder / f"{name} {kind}"
            values = tiny_run.config(inputs, run, "dpo", train__steps=3, train__export_hf=False, dpo__reference=kind)
            values["parallel"] = parallel
            values["train"].pop("save_every")
            folder.mkdir(exist_ok=True)
            path = folder / f"{name} {kind} {torch.distributed.get_rank()}.yaml"
            dpo.run(load_config(tiny_run.write_config(values, path), (), DpoConfig))
            losses[name, kind] = tiny_run.losses(run)
            assert (run / "reference").exists() is (kind == "cached")
    return losses


def test_resident_reference_is_the_cached_one_at_any_layout(inputs: Path, tmp_path: Path) -> None:
    found = {}
    for world, layouts in LAYOUTS.items():
        found.update(run_forked(world, dpo_runs, inputs, tmp_path / str(world), layouts)[0])
    wanted = found["one process", "cached"]
    assert wanted[0] == pytest.approx(0.6931472, abs=1e-5) and abs(wanted[2] - wanted[0]) > 1e-3
    for key, losses in found.items():
        assert losses == pytest.approx(wanted, abs=1e-5), key


def phases_of_the_reference(inputs: Path, run: Path) -> list[str]:
    """The phase of the step's clock in which a resident reference reads the packs, per step."""
    seen: list[str] = []
    fit, add_sums = dpo.training_run.fit, dpo.reference.add_sums

    def fitting(run: Any, trainer: Any, *rest: Any) -> None:
        def adding(*arguments: Any) -> None:
            seen.append(trainer.clock._stack[-1])
            add_sums(*arguments)

        dpo.reference.add_sums = adding
        fit(run, trainer, *rest)

    dpo.training_run.fit = fitting  # of this forked process
    values = tiny_run.config(inputs, run, "dpo", train__steps=2, train__export_hf=False, dpo__reference="resident")
    dpo.run(load_config(tiny_run.write_config(values, run.with_suffix(".yaml")), (), DpoConfig))
    return seen


def test_a_resident_reference_is_no_time_of_the_loader(inputs: Path, tmp_path: Path) -> None:
    assert run_forked(1, phases_of_the_reference, inputs, tmp_path / "run") == [["forward", "forward"]]


def sft_and_dpo(inputs: Path, folder: Path) -> None:
    for verb, schema, stage in (("sft", SftConfig, sft), ("dpo", DpoConfig, dpo)):
        values = tiny_run.config(inputs, folder / verb, verb, train__steps=6, train__export_hf=False)
        values["train"].pop("save_every")
        values["train"]["global_batch_size"] = 2
        values["data"]["shuffle"] = False
        values["train"] |= {"keep_best": 1, "best_metric": "loss/rare"}  # of the first step only
        path = folder / f"{verb} {torch.distributed.get_rank()}.yaml"
        stage.run(load_config(tiny_run.write_config(values, path), (), schema))


def test_a_rank_and_a_step_without_a_source(inputs: Path, tmp_path: Path) -> None:
    import json

    run_forked(2, sft_and_dpo, inputs, tmp_path)
    for verb in ("sft", "dpo"):
        rows = [json.loads(line) for line in (tmp_path / verb / "metrics.jsonl").read_text().splitlines()]
        shown = [sorted(name for name in row if name.endswith(("/rare", "/common"))) for row in rows]
        metrics = ("loss",) if verb == "sft" else ("loss", "rewards/accuracies", "rewards/margins")
        assert shown[0] == sorted(f"{m}/{s}" for m in metrics for s in ("rare", "common"))
        assert shown[1:] == [sorted(f"{m}/common" for m in metrics)] * 5
        assert rows[1]["loss/common"] == pytest.approx(rows[1]["train/loss"], abs=1e-6)

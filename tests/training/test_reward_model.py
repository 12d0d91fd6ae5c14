"""The reward model: loss and gradients equal transformers', training equal at any layout, and `rm` as users run it."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, LlamaForSequenceClassification

from tests.parallel.forked import run_forked, single_process
from tests.training import tiny, tiny_run
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.loader import load_config
from tulu_hpc.config.schema import RewardModelConfig
from tulu_hpc.config.sections import ModelSection, ParallelSection
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.data.readout import with_readout
from tulu_hpc.models.convert import save_hf
from tulu_hpc.models.scalar_head import RowValues
from tulu_hpc.objectives.reward import pair_scores, reward_terms
from tulu_hpc.objectives.sources import source_names
from tulu_hpc.objectives.terms import Terms, own_targets
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.stages import reward_model
from tulu_hpc.training.pair_sums import PackOptions
from tulu_hpc.training.runner import LossFn, target_values
from tulu_hpc.training.step import train_step
from tulu_hpc.training.trainer import Trainer, build_trainer

STEPS = ["pppppp", "ppppp", "pppp"]
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process": {}, "prompts repeated": {"share": False}, "small packs": {"pack_rows": 48}},
    2: {
        "tp2 sp": {"tensor": 2},
        "tp2": {"tensor": 2, "sequence": False},
        "pp2": {"pipeline": 2},
        "pp2 vpp2": {"pipeline": 2, "virtual_pipeline": 2},
        "cp2": {"context": 2},
        "dp2 overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    },
    4: {"tp2 sp pp2": {"tensor": 2, "pipeline": 2}, "cp2 tp2 sp": {"context": 2, "tensor": 2}},
}
CASES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts]
SOURCES = ("one", "two", "three")
CONFIGS = Path(__file__).parents[2] / "configs"


def make_pairs(letters: str, seed: int) -> list[Item]:
    """Pairs of three sources; the last is rare, so that ranks and steps without it occur."""
    items = [with_readout(item) for item in tiny.make_items(letters, seed=seed)]
    for index, item in enumerate(items):
        item.per_sequence = {}
        item.source = SOURCES[2 if (seed, index) == (1, 0) else index % 2]
    return items


def loss_of(groups: Groups, pairs: int) -> LossFn:
    group = groups.pg.cp if groups.cp_size > 1 else None

    def loss(output: RowValues, batch: RankBatch) -> Terms:
        pack = batch.batch
        scores_P2 = pair_scores(
            target_values(output, batch),
            sequence_id_K=own_targets(pack.sequence_id_K, batch),
            num_sequences=pack.num_sequences,
            pairs_P2=pack.pairs_P2,
            cp_group=group,
        )
        return reward_terms(
            scores_P2, global_pairs=pairs, cp_group=group, sources=pack.sources, source_names=sorted(SOURCES)
        )

    return loss


def make_trainer(model: Path, groups: Groups, parallel: ParallelSection) -> Trainer:
    return build_trainer(
        model=ModelSection(path=str(model)),
        parallel=parallel,
        optimizer=tiny.OPTIMIZER,
        recompute="none",
        total_steps=10,
        groups=groups,
        architecture=Architecture.from_hf(model),
        head="value",
        new_head_seed=3,
    )


def train(model: Path, options: dict[str, Any]) -> dict[str, Any]:
    parallel = ParallelSection(**{k: v for k, v in options.items() if k in ParallelSection.model_fields})
    packing = {"pack_rows": 96} | {k: v for k, v in options.items() if k not in ParallelSection.model_fields}
    groups = initialize(layout_of(parallel), seed=1)
    trainer = make_trainer(model, groups, parallel)
    held_out = make_pairs("ppppp", seed=9)
    result: dict[str, Any] = {"norms": [], "metrics": []}
    for step, letters in enumerate(STEPS):
        items = make_pairs(letters, seed=step)
        data = tiny.global_batch(items, groups, parallel, **packing)
        loss = loss_of(groups, len(items))
        if step == 0:
            trainer.zero_grad()
            trainer.runner.forward_backward(trainer.runner.prepare(data.packs), loss)
            result["gradients"] = tiny.gradients(trainer)
        outcome = train_step(trainer, data.packs, loss)
        evaluated = reward_model.evaluate(trainer, held_out, PackOptions(96))
        result["norms"].append(outcome.grad_norm)
        result["metrics"].append({**outcome.metrics, **evaluated})
    result["weights"] = tiny.weights(trainer)
    return result


def train_all(model: Path, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: train(model, options) for name, options in layouts.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def results(model: Path) -> dict[tuple[int, str], Any]:
    found = {}
    for world, layouts in LAYOUTS.items():
        per_rank = run_forked(world, train_all, model, layouts)
        for name in layouts:
            for rank in per_rank[1:]:
                assert rank[name]["metrics"] == per_rank[0][name]["metrics"], "all ranks report the same"
            found[world, name] = per_rank[0][name]
    return found


@pytest.mark.parametrize(("world", "name"), CASES)
def test_same_training_at_any_layout(results: dict[tuple[int, str], Any], world: int, name: str) -> None:
    compare(results[world, name], results[1, "one process"])


def draw(generator: random.Random) -> tuple[int, dict[str, Any]]:
    """A world of 1, 2 or 4 processes and a layout for it, with what else must not matter."""
    world = generator.choice([1, 2, 2, 4, 4])
    degrees = {"tensor": 1, "pipeline": 1, "context": 1}
    left = world
    while left > 1:
        degree = generator.choice(["tensor", "pipeline", "context", "data"])
        if degree != "tensor" or degrees["tensor"] == 1:  # the model has two key/value heads
            if degree != "data":
                degrees[degree] *= 2
            left //= 2
    options: dict[str, Any] = {name: value for name, value in degrees.items() if value > 1}
    if degrees["pipeline"] == 2 and generator.random() < 0.5:
        options["virtual_pipeline"] = 2
    if degrees["tensor"] > 1 and generator.random() < 0.3:
        options["sequence"] = False
    options["distributed_optimizer"] = generator.random() < 0.7
    options["overlap_grad_reduce"] = options["overlap_param_gather"] = (
        options["distributed_optimizer"] and generator.random() < 0.4
    )
    options["context_split"] = generator.choice(["greedy", "contiguous", "zigzag"])
    options["share"] = generator.random() < 0.7
    options["pack_rows"] = generator.choice([56, 96, 400])
    return world, options


@pytest.mark.soak
def test_same_training_at_random_layouts(
    results: dict[tuple[int, str], Any], model: Path, soak_figures: Callable[..., None]
) -> None:
    seed = int(os.environ.get("TULU_HPC_DRAW_SEED", time.time_ns() % 10**6))
    print(f"TULU_HPC_DRAW_SEED={seed}")
    generator = random.Random(seed)
    wanted, worst = results[1, "one process"], 0.0
    for number in range(40):
        world, options = draw(generator)
        found = run_forked(world, train, model, options, timeout=600)[0]
        try:
            compare(found, wanted)
        except AssertionError as error:
            raise AssertionError(f"draw {number} of seed {seed}: {world} processes, {options}: {error}") from error
        worst = max(worst, tiny.largest_difference(found["gradients"], wanted["gradients"], relative=True))
    soak_figures(draws=40, seed=seed, worst_gradient=worst)


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for step, metrics in enumerate(wanted["metrics"]):
        assert found["metrics"][step] == pytest.approx(metrics, abs=1e-5, rel=1e-5), step
        assert found["norms"][step] == pytest.approx(wanted["norms"][step], rel=1e-5)
    assert tiny.largest_difference(found["gradients"], wanted["gradients"], relative=True) <= 1e-5
    assert tiny.largest_difference(found["weights"], wanted["weights"], relative=False) <= 1e-4


def test_a_source_is_reported_by_the_steps_that_have_it(results: dict[tuple[int, str], Any]) -> None:
    for found in results.values():
        for step, metrics in enumerate(found["metrics"]):
            for name in SOURCES:
                there = name != "three" or step == 1
                for metric in ("loss", "rewards/accuracies", "rewards/margins"):
                    assert (f"{metric}/{name}" in metrics) is there, (step, name)
            count = len(STEPS[step])
            items = make_pairs(STEPS[step], step)
            sizes = {name: sum(item.source == name for item in items) for name in source_names(items)}
            weighted = sum(metrics[f"loss/{name}"] * size for name, size in sizes.items())
            assert weighted / count == pytest.approx(metrics["loss"], abs=1e-5)


def hf_scores(theirs: LlamaForSequenceClassification, items: list[Item]) -> Tensor:
    """[P, 2], sequence by sequence; the read-out token that `with_readout` appends is left off."""
    scores = [theirs(torch.cat((i.prompt, r.tokens[:-1]))[None]).logits[0, 0] for i in items for r in i.responses]
    return torch.stack(scores).view(-1, 2)


def test_loss_and_gradients_are_those_of_transformers(
    results: dict[tuple[int, str], Any], model: Path, tmp_path: Path
) -> None:
    with single_process() as groups:
        trainer = make_trainer(model, groups, ParallelSection())
        save_hf(trainer.models, tmp_path / "rm", trainer.architecture, groups, source=model)
    theirs = LlamaForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32).eval()
    scores = hf_scores(theirs, make_pairs(STEPS[0], seed=0))
    loss = -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()
    loss.backward()
    found = results[1, "one process"]
    metrics = found["metrics"][0]
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx((scores[:, 0] - scores[:, 1]).mean().item(), abs=1e-5)
    assert metrics["rewards/accuracies"] == pytest.approx((scores[:, 0] > scores[:, 1]).float().mean().item())
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert tiny.largest_difference(found["gradients"], gradients, relative=True) <= 1e-5


# ---------------------------------------------------------------------------------------------------- as users run it


def write_preferences(path: Path, count: int, seed: int) -> None:
    """Answers with the word `cat` are better; two sources, one named by `source`, one by `dataset`."""
    generator = random.Random(seed)
    with path.open("w") as file:
        for index in range(count):
            prompt = {"role": "user", "content": tiny_run.text(generator, 2, 8)}
            words = [word for word in tiny_run.text(generator, 3, 6).split() if word != "cat"]
            answers = {}
            for side, word in (("chosen", "cat"), ("rejected", "sum")):
                answers[side] = [*words]
                answers[side].insert(generator.randint(0, len(words)), word)
            row: dict[str, Any] = {
                side: [prompt, {"role": "assistant", "content": " ".join(text)}] for side, text in answers.items()
            }
            row["source" if index % 2 else "dataset"] = f"set{index % 2}"
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))
    write_preferences(folder / "preferences.jsonl", 480, seed=1)
    write_preferences(folder / "held_out.jsonl", 40, seed=2)
    return folder


def run_config(inputs: Path, run: Path, **changes: Any) -> RewardModelConfig:
    options = {
        "train__save_every": None,
        "rm__eval_path": str(inputs / "held_out.jsonl"),
    }
    values = tiny_run.config(inputs, run, "rm", **{**options, **changes})
    run.parent.mkdir(parents=True, exist_ok=True)
    return load_config(tiny_run.write_config(values, run.with_suffix(".yaml")), (), RewardModelConfig)


def metric_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_quickstart_learns_and_exports(inputs: Path, tmp_path: Path) -> None:
    """The quickstart's file, on other data and a smaller model."""
    changes = [
        f"run.root={tmp_path}",
        "run.threads=1",
        f"model.path={inputs / 'model'}",
        f"data.path={inputs / 'preferences.jsonl'}",
        f"rm.eval_path={inputs / 'held_out.jsonl'}",
        "rm.eval_every=10",
        "optimizer.lr=5e-3",
    ]
    config = load_config(CONFIGS / "quickstart/rm.yaml", changes, RewardModelConfig)
    run = run_forked(1, lambda: reward_model.run(config))[0]
    assert run == tmp_path / "rm"
    rows = metric_rows(run)
    evaluated = [row for row in rows if "eval/rewards/accuracies" in row]
    assert [row["step"] for row in evaluated] == [10, 20, 30]
    last = evaluated[-1]
    assert rows[0]["rewards/accuracies"] < 0.8, "the first batch is scored by the head as it was drawn"
    assert last["eval/rewards/accuracies"] >= 0.9
    for name in ("set0", "set1"):
        assert f"rewards/accuracies/{name}" in rows[5] and f"eval/loss/{name}" in last
    # The export gives transformers the same scores: held-out metrics recomputed from the text.
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    theirs = LlamaForSequenceClassification.from_pretrained(run / "hf", dtype=torch.float32).eval()
    margins = []
    for line in (inputs / "held_out.jsonl").read_text().splitlines():
        row = json.loads(line)
        scores = []
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(row[side], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            assert int(ids[0, -1]) == tokenizer.eos_token_id, "the score is read at the end-of-text"
            with torch.no_grad():
                scores.append(float(theirs(ids).logits[0, 0]))
        margins.append(scores[0] - scores[1])
    assert last["eval/rewards/margins"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)


def test_a_held_out_pair_that_fits_no_pack_is_refused_before_training(inputs: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w " * 60}]
    row = {
        side: [*turns, {"role": "assistant", "content": word * 40}]
        for side, word in [("chosen", "a "), ("rejected", "b ")]
    }
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    changes = {"rm__eval_path": str(tmp_path / "long.jsonl"), "data__max_length": 4096, "train__steps": 2}

    def body() -> None:
        with pytest.raises(ValueError, match=r"a pair of \d+ rows does not fit into a pack of 128"):
            reward_model.run(run_config(inputs, tmp_path / "run", **changes))

    run_forked(1, body)
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "nothing was trained"


def test_a_reward_model_may_be_trained_further(inputs: Path, tmp_path: Path) -> None:
    """Its head is kept: a second run starts from the held-out metrics that the first one ended with."""

    def both() -> None:
        reward_model.run(run_config(inputs, tmp_path / "first", train__steps=4))
        further = {"model__path": str(tmp_path / "first" / "hf"), "train__steps": 1, "optimizer__lr": 1e-9}
        reward_model.run(run_config(inputs, tmp_path / "second", **further))

    run_forked(1, both)
    (*_, last), (only,) = metric_rows(tmp_path / "first"), metric_rows(tmp_path / "second")
    for name in ("eval/loss", "eval/rewards/margins", "eval/rewards/accuracies"):
        assert only[name] == pytest.approx(last[name], rel=1e-5), name


def test_resumes_bit_for_bit(inputs: Path, tmp_path: Path) -> None:
    changes = {"train__steps": 5, "train__save_every": 2, "rm__eval_every": 2, "parallel__tensor": 2}

    def whole() -> Path:
        return reward_model.run(run_config(inputs, tmp_path / "whole", **changes))

    def stopped() -> None:
        config = run_config(inputs, tmp_path / "parts", **changes)
        original = reward_model.batch_loss
        steps = []

        def failing(*arguments: Any) -> LossFn:
            steps.append(1)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return original(*arguments)

        reward_model.batch_loss = failing
        try:
            reward_model.run(config)
        except KeyboardInterrupt:
            pass
        finally:
            reward_model.batch_loss = original
        assert len(steps) == 4

    def resumed() -> Path:
        return reward_model.run(run_config(inputs, tmp_path / "parts", **changes))

    run_forked(2, whole)
    run_forked(2, stopped)
    run_forked(2, resumed)
    kept = ("train/loss", "rewards/margins", "eval/loss", "eval/rewards/margins", "train/grad_norm")
    whole_rows, part_rows = (
        [{name: row[name] for name in ("step", *kept) if name in row} for row in metric_rows(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert whole_rows == part_rows
    for file in (tmp_path / "whole" / "hf").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "parts" / "hf" / file.name).read_bytes()

"""Answers without a partner (kto on rows with a label), and weights of rows: from the file to the gradient.

The truth is transformers in fp64 with the formulas written out here, one answer at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.parallel.forked import run_forked
from tests.training import tiny, tiny_run
from tulu_hpc.config.loader import ConfigError, load_config
from tulu_hpc.config.schema import DpoConfig, DpoSection
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.data.datasets import LABEL, WEIGHT
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.stages import dpo, kto_baseline
from tulu_hpc.telemetry.metrics import read_metrics
from tulu_hpc.training import reference
from tulu_hpc.training.step import train_step

BETA, KL, DESIRABLE, UNDESIRABLE = 0.3, 0.4, 1.3, 0.6
SECTION = {
    "kind": "kto",
    "records": "labels",
    "weight_field": "quality",
    "beta": BETA,
    "kl_baseline": KL,
    "desirable_weight": DESIRABLE,
    "undesirable_weight": UNDESIRABLE,
}
WAYS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process": {}},
    2: {"tp2": {"tensor": 2}, "cp2": {"context": 2}, "pp2": {"pipeline": 2}, "dp2": {}},
}


def answers() -> list[Item]:
    """Eight answers, five of them desirable, of two sources."""
    generator = torch.Generator().manual_seed(4)
    items = []
    for index in range(8):
        response = tiny.sequence(generator, 2, 14)
        columns = {
            LABEL: [float(index % 3 != 1)],
            WEIGHT: [0.5 + 0.25 * index],
            reference.COLUMN: [-4.6 * len(response) + index % 4],
        }
        prompt = tiny.sequence(generator, 3, 12).tokens
        item = Item("sequence", [response], prompt=prompt, per_sequence=columns, id=str(index))
        item.source = "odd" if index % 2 else "even"
        items.append(item)
    return items


def results_of(model: Path, ways: dict[str, dict[str, Any]]) -> dict[str, tuple[Any, dict[str, float]]]:
    found = {}
    for name, options in ways.items():
        parallel = ParallelSection(**options)
        groups = initialize(layout_of(parallel), seed=1)
        trainer = tiny.make_trainer(model, groups, parallel, optimizer=tiny.OPTIMIZER.model_copy(update={"lr": 1e-9}))
        data = tiny.global_batch(answers(), groups, parallel, pack_rows=48)
        run: Any = SimpleNamespace(groups=groups)
        config: Any = SimpleNamespace(dpo=DpoSection(**SECTION))  # type: ignore[arg-type]
        loss = dpo.batch_loss(run, config, data, ["even", "odd"])
        trainer.zero_grad()
        trainer.runner.forward_backward(trainer.runner.prepare(data.packs), loss)
        found[name] = (tiny.gradients(trainer), train_step(trainer, data.packs, loss).metrics)
    return found


def truth(model: Path, items: list[Item], kl: float = KL) -> tuple[dict[str, float], dict[str, Tensor]]:
    """KTO [2402.01306 eq. 8] in fp64: w lambda (1 - sigmoid(+-beta (log-ratio - z))), mean over the answers."""
    theirs = LlamaForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    losses, rewards = [], []
    for item in items:
        (response,), (label,) = item.responses, item.per_sequence[LABEL]
        table = theirs(torch.cat((item.prompt, response.tokens))[None]).logits[0].log_softmax(-1)
        start = len(item.prompt) - 1
        scored = table[start : start + len(response)].gather(1, response.tokens[:, None])
        log_ratio = scored.sum() - item.per_sequence[reference.COLUMN][0]
        value = torch.sigmoid(BETA * (log_ratio - kl) if label else BETA * (kl - log_ratio))
        losses.append(item.per_sequence[WEIGHT][0] * (DESIRABLE if label else UNDESIRABLE) * (1 - value))
        rewards.append(BETA * log_ratio.item())
    loss = torch.stack(losses).mean()
    loss.backward()
    good = [bool(item.per_sequence[LABEL][0]) for item in items]
    right = [(reward > 0) == label for reward, label in zip(rewards, good, strict=True)]
    odd = [each.item() for item, each in zip(items, losses, strict=True) if item.source == "odd"]
    metrics = {
        "loss": loss.item(),
        "rewards/chosen": sum(r for r, g in zip(rewards, good, strict=True) if g) / sum(good),
        "rewards/rejected": sum(r for r, g in zip(rewards, good, strict=True) if not g) / (len(good) - sum(good)),
        "rewards/accuracies": sum(right) / len(right),
        "loss/odd": sum(odd) / len(odd),
    }
    return metrics, {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}


def test_kto_on_labels_is_the_formula_at_every_layout(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "hf")
    wanted, gradients = truth(model, answers())
    assert 0 < wanted["rewards/accuracies"] < 1, "otherwise the metric proves nothing"
    for world, ways in WAYS.items():
        for name, (found, metrics) in run_forked(world, results_of, model, ways)[0].items():
            assert {key: metrics[key] for key in wanted} == pytest.approx(wanted, abs=2e-5, rel=1e-5), name
            assert tiny.largest_difference(found, gradients, relative=True) <= 1e-5, name
            assert not any(key.startswith("rewards/margins") for key in metrics), "one side alone has no margin"


def test_which_answer_goes_with_which_prompt() -> None:
    items = answers()
    items[3].prompt = items[2].prompt  # rows 2 and 3 answer one prompt
    others = kto_baseline.mismatched(items, 60)
    taken = [
        next(
            i
            for i, row in enumerate(items)
            if row.responses[0].tokens is not None and torch.equal(row.responses[0].tokens, other.responses[0].tokens)
        )
        for other in others
    ]
    assert taken == [1, 2, 4, 4, 5, 6, 7, 0] and [other.id for other in others] == [item.id for item in items]
    assert all(torch.equal(other.prompt, item.prompt) for other, item in zip(others, items, strict=True))
    longest = max(len(item.prompt) for item in items)
    short = kto_baseline.mismatched(items, longest)
    assert 0 < len(short) < len(items), "no room is left after the longest prompt"
    assert max(len(each.prompt) + len(each.responses[0]) for each in short) == longest
    for item in items:
        item.prompt = items[0].prompt
    assert kto_baseline.mismatched(items, 60) == []


def others_with_reference() -> list[Item]:
    others = kto_baseline.mismatched(answers(), 60)[:-1]  # one row is without
    for index, other in enumerate(others):
        other.per_sequence = {reference.COLUMN: [-6.6 * len(other.responses[0]) + index % 3]}
    return others


def estimates_of(model: Path, ways: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """The baseline, and the loss that is computed with it."""
    found = {}
    for name, options in ways.items():
        parallel = ParallelSection(**options)
        groups = initialize(layout_of(parallel), seed=1)
        trainer = tiny.make_trainer(model, groups, parallel)
        data = tiny.global_batch(answers(), groups, parallel, pack_rows=48)
        by_id = {each.id: each for each in others_with_reference()}
        kl = kto_baseline.Baseline(by_id, trainer.runner, None, reference.PackOptions(48)).estimate(data.packs)
        section = SECTION | {"kl_baseline": 0.0, "kl_estimate": True}
        config: Any = SimpleNamespace(dpo=DpoSection(**section))  # type: ignore[arg-type]
        run: Any = SimpleNamespace(groups=groups)
        metrics = train_step(trainer, data.packs, dpo.batch_loss(run, config, data, (), kl)).metrics
        assert metrics["kl"] == pytest.approx(kl, rel=1e-6)
        found[name] = (kl, metrics["loss"])
    return found


def test_the_estimated_baseline_at_every_layout(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "hf")
    theirs = LlamaForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    ratios = []
    for other in others_with_reference():
        (tokens,) = (response.tokens for response in other.responses)
        table = theirs(torch.cat((other.prompt, tokens))[None]).logits[0].log_softmax(-1)
        start = len(other.prompt) - 1
        scored = table[start : start + len(tokens)].gather(1, tokens[:, None])
        ratios.append(scored.sum().item() - other.per_sequence[reference.COLUMN][0])
    wanted = sum(ratios) / len(ratios)
    losses = {truth(model, answers(), kl=max(0.0, wanted))[0]["loss"]}
    assert wanted > 0.1, "a baseline of 0 would prove little"
    for world, ways in WAYS.items():
        for name, (kl, loss) in run_forked(world, estimates_of, model, ways)[0].items():
            assert kl == pytest.approx(wanted, abs=2e-5), name
            assert loss == pytest.approx(*losses, abs=1e-5), name


# ---------------------------------------------------------------------------------------------------- as users run it


def write_labels(folder: Path) -> Path:
    """The preference pairs as labelled answers, the desirable ones first and not in turns."""
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    with (folder / "labels.jsonl").open("w") as file:
        for side, label in (("chosen", True), ("rejected", False)):
            for number, row in enumerate(rows):
                prompt, answer = row[side]
                record = {"prompt": [prompt], "completion": answer["content"], "label": label, "quality": 1 + number}
                file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tiny_run.write_inputs(tmp_path_factory.mktemp("inputs")))


def settings(inputs: Path, run: Path, **changes: Any) -> dict[str, Any]:
    values = tiny_run.config(inputs, run, "dpo", train__steps=3, train__export_hf=False, **changes)
    values["telemetry"]["peak_tflops"] = 1
    values["data"]["path"] = str(inputs / "labels.jsonl")
    values["train"].pop("save_every")
    values["dpo"] = {"kind": "kto", "records": "labels", "beta": 0.5, **values["dpo"]} | {"kind": "kto", "beta": 0.5}
    return values


KINDS = {1: ("cached", "resident", "estimated cached"), 2: ("cached", "estimated resident")}


def runs(inputs: Path, folder: Path, ways: dict[str, dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    losses = {}
    for name, parallel in ways.items():
        for kind in KINDS[torch.distributed.get_world_size()]:
            run = folder / f"{name} {kind}"
            values = settings(inputs, run, dpo__reference=kind.split()[-1], dpo__weight_field="quality")
            values |= {"parallel": parallel}
            values["dpo"]["kl_estimate"] = kind.startswith("estimated")
            folder.mkdir(exist_ok=True)
            path = tiny_run.write_config(values, folder / f"{name} {kind} {torch.distributed.get_rank()}.yaml")
            dpo.run(load_config(path, (), DpoConfig))
            losses[name, kind] = tiny_run.losses(run)
    return losses


def test_a_run_on_labels_with_either_reference(inputs: Path, tmp_path: Path) -> None:
    found = {}
    for world, ways in {1: {"one process": {}}, 2: {"cp2": {"context": 2}, "dp2": {}}}.items():
        found.update(run_forked(world, runs, inputs, tmp_path / str(world), ways)[0])
    wanted = found["one process", "cached"]
    assert abs(wanted[2] - 0.5 * wanted[0]) > 1e-3
    estimated = found["one process", "estimated cached"]
    for key, losses in found.items():
        assert losses == pytest.approx(estimated if key[1].startswith("est") else wanted, abs=2e-5), key
    rows = read_metrics(tmp_path / "1" / "one process estimated cached" / "metrics.jsonl")
    assert abs(rows[0]["train/kl"]) < 1e-4 and rows[2]["train/kl"] > 0.05, "it moves away from the reference"
    assert abs(estimated[2] - wanted[2]) > 1e-3
    first = read_metrics(tmp_path / "1" / "one process cached" / "metrics.jsonl")[0]
    # The policy is the reference: every answer is at sigmoid(0).
    assert first["train/loss"] == pytest.approx(0.5 * first["train/weights"], rel=1e-5) and first["train/weights"] > 2


def cached_again(inputs: Path, folder: Path) -> list[str]:
    """A second run over the same cache, then over one whose first row is another's."""
    for name in ("first", "second"):
        values = settings(inputs, folder / name, dpo__reference_cache=str(folder / "cache"))
        dpo.run(load_config(tiny_run.write_config(values, folder / f"{name}.yaml"), (), DpoConfig))
    import numpy as np
    import xxhash

    (shard,) = (folder / "cache").rglob("shard_*.npy")
    table = np.load(shard)
    table["chosen"] += 1.0
    np.save(folder / "changed.npy", table)
    content = (folder / "changed.npy").read_bytes()
    shard.unlink()
    (shard.parent / f"shard_000000_{xxhash.xxh3_128_hexdigest(content)}.npy").write_bytes(content)
    values = settings(inputs, folder / "third", dpo__reference_cache=str(folder / "cache"))
    with pytest.raises(reference.ReferenceError) as caught:
        dpo.run(load_config(tiny_run.write_config(values, folder / "third.yaml"), (), DpoConfig))
    return [str(caught.value)]


def test_the_cache_of_labelled_answers_is_found_and_checked(inputs: Path, tmp_path: Path) -> None:
    ((message,),) = run_forked(1, cached_again, inputs, tmp_path)
    assert "the response of sequence" in message and "has log-prob" in message
    assert tiny_run.losses(tmp_path / "first") == tiny_run.losses(tmp_path / "second")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 1}, "label: is 1, need true"),
        ({"label": None}, "label: is missing, need true"),
        ({"label": "good"}, 'label: is "good", need true'),
        ({"completion": None}, "completion: is missing"),
        ({"completion": [{"role": "user", "content": "hm"}]}, "completion: does not begin with an assistant turn"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "prompt[0]: the prompt ends with an assistant turn"),
        ({"quality": None}, "quality: is missing, it is the weight of the row"),
        ({"quality": -1}, "quality: is -1, need a weight: a number from 0 to 1e+06"),
        ({"quality": True}, "quality: is true, need a weight"),
        ({"quality": "much"}, 'quality: is "much", need a weight'),
        ({"quality": float("nan")}, "quality: is NaN, need a weight"),
    ],
)
def test_bad_rows_are_named(inputs: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = [json.loads(line) for line in (inputs / "labels.jsonl").read_text().splitlines()]
    rows[4] |= change
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    values = settings(inputs, tmp_path / "run", dpo__weight_field="quality")
    values["data"]["path"] = str(path)
    config = load_config(tiny_run.write_config(values, tmp_path / "dpo.yaml"), (), DpoConfig)
    from tulu_hpc.stages import training_data

    with pytest.raises(ValueError) as caught:
        training_data.preview(config, rows=2)
    assert str(caught.value).startswith(f"{path}:5: {message}")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "dpo", "records": "labels"}, "labels are answers without a partner, dpo needs pairs"),
        ({"kind": "dpo", "wpo_alignment": True}, "wpo_alignment belongs to weighting: wpo"),
        ({"kind": "dpo", "weight_field": ""}, "weight_field"),
        ({"kind": "kto", "records": "rows"}, "records"),
        ({"kind": "kto", "kl_estimate": True}, "kl_estimate needs records: labels"),
        ({"kind": "kto", "records": "labels", "kl_estimate": True, "kl_baseline": 1}, "takes the place of kl_baseline"),
        ({"kind": "dpo", "kl_estimate": True}, "belong to kto"),
    ],
)
def test_options_that_do_not_fit(inputs: Path, tmp_path: Path, section: dict[str, Any], message: str) -> None:
    values = settings(inputs, tmp_path / "run")
    values["dpo"] = section
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_run.write_config(values, tmp_path / "dpo.yaml"), (), DpoConfig)

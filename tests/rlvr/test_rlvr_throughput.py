"""What a rollout step says about the speed of its models, against the exact FLOPs of the answers it trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.forked import run_forked
from tests.rlvr import tiny_ppo, tiny_rlvr
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.flops import Work, forward_flops, hardware_flops, item_work, model_flops
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.stages import rlvr, rlvr_packs
from tulu_hpc.telemetry.step_clock import PHASES

PEAK_TFLOPS = 0.25
STEPS = 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent do not survive a fork
    return tiny_ppo.write_inputs(tmp_path_factory.mktemp("inputs"))


Packed = list[list[Item]]  # items of every call that packed some, in order


def run_and_keep(config: RlvrConfig) -> tuple[Packed, Packed]:
    """Run the stage; what this rank packed for the policy and for the value model."""
    policy: Packed = []
    value: Packed = []
    original = rlvr_packs.pack_items

    def keep(items: Any, **options: Any) -> Any:
        of_value = bool(items) and "behaviour_logprobs" not in items[0].per_target
        (value if of_value else policy).append(list(items))
        return original(items, **options)

    rlvr_packs.pack_items = keep  # in this forked process only
    rlvr.run(config)
    return policy, value


def work_of(calls: Packed) -> Work:
    return sum((item_work(item) for items in calls for item in items), Work())


def flops_of(record: dict[str, Any], phase: str, world: int) -> float:
    """FLOPs of a phase, from its rate and its time."""
    seconds = sum(record.get(f"timing/{phase}/{part}", 0.0) for part in PHASES)
    prefix = "perf/" if phase == "train" else f"perf/{phase}/"
    assert record[f"{prefix}mfu"] == pytest.approx(record[f"{prefix}tflops_per_gpu"] / PEAK_TFLOPS, rel=1e-9)
    return float(record[f"{prefix}tflops_per_gpu"]) * 1e12 * seconds * world


def test_ppo_counts_every_pass_of_both_models(inputs: Path, tmp_path: Path) -> None:
    world, epochs, minibatches = 2, 2, 2
    config = tiny_ppo.ppo_config(
        inputs,
        tmp_path / "run",
        train__steps=STEPS,
        train__save_every=None,
        train__recompute="full",
        telemetry__peak_tflops=PEAK_TFLOPS,
        telemetry__straggler_every=1,
        telemetry__profile_steps=[2],
        value__parallel={"pipeline": 2},
    )
    kept = run_forked(world, run_and_keep, config)
    records = tiny_rlvr.metrics(tmp_path / "run")
    policy_shape = Architecture.from_hf(inputs / "model")
    value_shape = Architecture.from_hf(inputs / "rm").model_copy(update={"vocab_size": 1})
    assert len(records) == STEPS
    for index, record in enumerate(records):
        calls = slice(index * minibatches, (index + 1) * minibatches)
        work = sum((work_of(policy[calls]) for policy, _ in kept), Work())  # data parallel: shares of the ranks
        value_work = work_of(kept[0][1][calls])  # its two stages have the same packs
        assert work.rows == value_work.rows > 0
        trained, forward = model_flops(policy_shape, work) * epochs, forward_flops(policy_shape, work).total
        assert flops_of(record, "train", world) == pytest.approx(trained, rel=1e-9)
        assert record["perf/hfu"] / record["perf/mfu"] == pytest.approx(
            hardware_flops(policy_shape, work, "full") / model_flops(policy_shape, work), rel=1e-9
        )
        for phase in ("reference", "old_logprobs"):
            assert flops_of(record, phase, world) == pytest.approx(forward, rel=1e-9), phase
            assert record[f"timing/{phase}/forward"] > 0
        assert flops_of(record, "values", world) == pytest.approx(forward_flops(value_shape, value_work).total)
        value_trained = model_flops(value_shape, value_work) * epochs
        assert flops_of(record, "value_train", world) == pytest.approx(value_trained, rel=1e-9)
        seconds = {part: record[f"timing/train/{part}"] for part in PHASES}
        assert all(value > 0 for value in seconds.values()), seconds
        rate = record["perf/tokens_per_second_per_gpu"] * sum(seconds.values()) * world
        assert rate == pytest.approx(work.rows * epochs, rel=1e-9)
        assert record["memory/peak_rss_gib"] > 0.05 and record["straggler/ratio"] >= 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "stragglers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    traces = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert traces == ["step_2_rank_0.json", "step_2_rank_1.json"]


def test_minibatches_that_teach_nothing_are_not_counted(inputs: Path, tmp_path: Path) -> None:
    config = tiny_rlvr.rlvr_config(
        inputs,
        tmp_path / "run",
        train__steps=3,
        rlvr__minibatches=3,
        rlvr__kl_coef=0.0,
        telemetry__peak_tflops=PEAK_TFLOPS,
    )
    ((policy, _),) = run_forked(1, run_and_keep, config)
    shape = Architecture.from_hf(inputs / "model")
    dead = 0
    for index, record in enumerate(tiny_rlvr.metrics(tmp_path / "run")):
        calls = policy[3 * index : 3 * index + 3]
        live = [items for items in calls if items]
        dead += len(calls) - len(live)
        assert record["train/updates"] == len(live)
        assert not any(name.startswith("perf/reference") for name in record), "there is no reference"
        if live:
            assert flops_of(record, "train", 1) == pytest.approx(model_flops(shape, work_of(live)), rel=1e-9)
        else:
            assert "perf/mfu" not in record
    assert dead, "no minibatch was without a gradient: the test proves nothing"

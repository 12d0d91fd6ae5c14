"""What a run writes about its speed, from real runs of the stages on gloo ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.forked import run_forked
from tests.training import tiny, tiny_run
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.schema import SftConfig
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.data.flops import Work, hardware_flops, item_work, model_flops
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.parallel.communication import timed_collectives
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.planner import peak
from tulu_hpc.planner.hardware import GPUS
from tulu_hpc.stages import sft, training_run
from tulu_hpc.telemetry.metrics import TelemetryError, read_metrics
from tulu_hpc.telemetry.step_clock import PHASES, StepClock
from tulu_hpc.training.step import train_step

PEAK_TFLOPS = 0.25
STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


def run_sft(inputs: Path, folder: Path, world: int, **changes: Any) -> list[list[Item]]:
    """Run the stage on `world` ranks; the items of each global batch."""
    values = tiny_run.config(
        inputs,
        folder,
        "sft",
        train__steps=STEPS,
        train__export_hf=False,
        telemetry__peak_tflops=PEAK_TFLOPS,
        telemetry__straggler_every=2,
        **changes,
    )

    def body() -> list[list[Item]]:
        config = SftConfig(**values)
        batches: list[list[Item]] = []
        original = training_run.load_items

        def keep(run: Any) -> Any:
            items, pad_id = original(run)
            by_id = {item.id: item for item in items}
            loader = training_run.make_loader(run, items, pad_id=pad_id)
            batches.extend([by_id[each] for each in data.item_ids] for data in loader)
            return items, pad_id

        training_run.load_items = keep  # in this forked process only
        sft.run(config)
        return batches

    return list(run_forked(world, body)[0])


def flops_of_each_step(records: list[dict[str, float]], world: int) -> list[float]:
    return [each["perf/tflops_per_gpu"] * 1e12 * each["timing/step"] * world for each in records]


def test_flops_times_and_traces_of_a_run(inputs: Path, tmp_path: Path) -> None:
    batches = run_sft(
        inputs, tmp_path, 2, train__recompute="full", telemetry__profile_steps=[2], telemetry__tensorboard=False
    )
    records = read_metrics(tmp_path / "metrics.jsonl")
    architecture = Architecture.from_hf(inputs / "model")
    assert len(records) == len(batches) == STEPS
    for record, items, flops in zip(records, batches, flops_of_each_step(records, 2), strict=True):
        work = sum((item_work(item) for item in items), Work())  # no layout pads here: packs are their items
        assert flops == pytest.approx(model_flops(architecture, work), rel=1e-9)
        assert record["perf/mfu"] == pytest.approx(record["perf/tflops_per_gpu"] / PEAK_TFLOPS, rel=1e-9)
        ratio = hardware_flops(architecture, work, "full") / model_flops(architecture, work)
        assert record["perf/hfu"] / record["perf/mfu"] == pytest.approx(ratio, rel=1e-9)
        rows = record["perf/tokens_per_second_per_gpu"] * record["timing/step"] * 2
        assert rows == pytest.approx(work.rows, rel=1e-9)
        phases = {phase: record[f"timing/{phase}"] for phase in PHASES}
        assert sum(phases.values()) == pytest.approx(record["timing/step"], rel=1e-9)
        assert all(seconds > 0 for seconds in phases.values()), phases
        assert record["memory/peak_rss_gib"] > 0.05
    assert [each["step"] for each in records if "straggler/ratio" in each] == [2, 4]
    lines = [json.loads(line) for line in (tmp_path / "stragglers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert [[rank["rank"] for rank in line["ranks"]] for line in lines] == [[0, 1], [0, 1]]
    traces = sorted((tmp_path / "profile").iterdir())
    assert [path.name for path in traces] == ["step_2_rank_0.json", "step_2_rank_1.json"]
    for path in traces:
        names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
        products = {"aten::mm", "mkldnn::_linear_pointwise"}  # the latter where oneDNN multiplies
        assert products & names and any("Backward" in name for name in names)


def test_averages_over_the_steps_between_two_lines(inputs: Path, tmp_path: Path) -> None:
    batches = run_sft(inputs, tmp_path, 1, train__log_every=3)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 4]
    architecture = Architecture.from_hf(inputs / "model")
    for record, part, per_step in zip(records, (batches[:3], batches[3:]), (3, 1), strict=True):
        work = sum((item_work(item) for items in part for item in items), Work())
        flops = record["perf/tflops_per_gpu"] * 1e12 * record["timing/step"] * per_step
        assert flops == pytest.approx(model_flops(architecture, work), rel=1e-9)


def test_memory_snapshots_without_a_gpu_are_refused(inputs: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from tulu_hpc.telemetry.profiling import StepProfiler

    with pytest.raises(TelemetryError, match=r"telemetry.memory_snapshot_steps: .* on CUDA only"):
        StepProfiler(tmp_path, 0, memory_snapshot_steps=[1])


class Ticks:
    """A clock whose every reading is one second after the last."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1
        return self.now


def count_phases(model: Path, parallel: ParallelSection) -> dict[str, float]:
    """Readings of the clock by phase in one step: the number of intervals, not their length."""
    groups = initialize(layout_of(parallel), seed=1)
    trainer = tiny.make_trainer(model, groups, parallel)
    trainer.clock.__init__(Ticks())  # type: ignore[misc]
    data = tiny.global_batch(tiny.make_items("ssss"), groups, parallel, pack_rows=64)
    with timed_collectives(trainer.clock):
        trainer.clock.start()
        train_step(trainer, data.packs, tiny.sft_only(4.0))
        marks = trainer.clock.stop()
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, len(data.packs))  # the collectives are themselves again
    return {**trainer.clock.seconds(marks), "packs": float(len(data.packs))}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelSection(tensor=2),
        ParallelSection(context=2),
        ParallelSection(pipeline=2),
        ParallelSection(pipeline=2, virtual_pipeline=2),
        ParallelSection(overlap_grad_reduce=True, overlap_param_gather=True),
    ],
    ids=["tp", "cp", "pp", "vpp", "dp"],
)
def test_communication_is_seen_wherever_it_happens(model: Path, parallel: ParallelSection) -> None:
    for found in run_forked(2, lambda: count_phases(model, parallel)):
        assert found["communication"] > 2 * found["packs"], found
        assert found["forward"] >= found["packs"] and found["backward"] >= found["packs"], found


def test_alone_nothing_is_communication(model: Path) -> None:
    (found,) = run_forked(1, lambda: count_phases(model, ParallelSection()))
    assert found["forward"] == found["backward"] == found["packs"]
    # megatron's DDP reduces gradients over the one rank there is.
    assert found["communication"] <= 4, found


def test_a_clock_that_does_not_run_changes_no_collective() -> None:
    def body() -> float:
        value = torch.ones(1)
        with timed_collectives(StepClock()):
            dist.all_reduce(value)
        return float(value)

    assert run_forked(2, body) == [2.0, 2.0]


def test_peak_is_told_by_table_by_user_or_by_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak.peak_of_device(torch.float32, 12.5) == peak.Peak(12.5e12, "telemetry.peak_tflops")
    state = torch.get_rng_state()
    measured = peak.measure(torch.float32, torch.device("cpu"), "this CPU")
    assert torch.equal(state, torch.get_rng_state()), "measuring must not move a run's generator"
    assert 1e8 < measured.flops < 1e14 and "measured on this CPU" in measured.source
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = peak.peak_of_device(torch.bfloat16)
    assert found.flops == GPUS["h100"].bf16_flops and "data sheet of h100" in found.source
    assert all(math.isfinite(gpu.bf16_flops) and math.isfinite(gpu.fp32_flops) for gpu in GPUS.values())

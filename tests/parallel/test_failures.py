"""What one rank cannot write ends every rank, with the same words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.forked import run_forked
from tests.training import tiny_run
from tulu_hpc.config.verbs import load_training_config
from tulu_hpc.parallel.failures import WriteError, WriteFailures, shared_writing
from tulu_hpc.parallel.layout import Layout, initialize
from tulu_hpc.stages import audit, training_run
from tulu_hpc.stages import sft as sft_stage
from tulu_hpc.telemetry.metrics import MetricLogger, TelemetryError
from tulu_hpc.telemetry.profiling import StepProfiler


def told(action: Any) -> str:
    """What was raised, as each rank sees it."""
    try:
        action()
    except (WriteError, TelemetryError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(rank: int, error: Exception) -> list[str]:
    groups = initialize(Layout(), seed=1)

    def once() -> None:
        with shared_writing(groups, "x", also=(TelemetryError,)):
            if groups.rank == rank:
                raise error

    failures = WriteFailures(groups)

    def later() -> None:
        with failures.writing("y"):
            if groups.rank == rank:
                raise OSError("no room")
        with failures.writing("z"):
            if groups.rank == rank:
                raise OSError("again")
        failures.check()

    def stranger() -> None:
        with pytest.raises(KeyError), shared_writing(groups, "x"):
            raise KeyError("not about files")
        groups.barrier()

    return [told(once), told(later), told(stranger)]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_same_words_everywhere(rank: int) -> None:
    both = run_forked(2, refused, rank, OSError("full"))
    late = f"WriteError: y cannot be written: no room (rank {rank})"
    assert both == 2 * [[f"WriteError: x cannot be written: full (rank {rank})", late, "nothing"]]
    other = run_forked(2, refused, rank, TelemetryError("no such sink"))
    assert [each[0] for each in other] == 2 * ["TelemetryError: no such sink"]


def block(path: Path, rank: int) -> None:
    """Put a directory where a file must be written: refused for every user, root too."""
    if rank == 0:
        (path / "in_the_way").mkdir(parents=True)


def unwritable(folder: Path) -> dict[str, str]:
    """What both ranks of a dp2 run say when one file of the main process cannot be written."""
    rank = int(os.environ["RANK"])
    said = {}

    def attempt(name: str, blocked: str | None, **changes: Any) -> None:
        run_dir = folder / name
        values = tiny_run.config(folder, run_dir, "sft", train__steps=2, train__export_hf=False, **changes)
        config = load_training_config(tiny_run.write_config(values, folder / f"{name}.{rank}.yaml"), [], "sft")
        if blocked is not None:
            block(run_dir / blocked, rank)
        said[name] = told(lambda: sft_stage.run(config))  # type: ignore[arg-type]

    attempt("masks", "masks.html", train__preview_rows=2)
    attempt("metrics", "metrics.jsonl")
    attempt("stragglers", "stragglers.jsonl", telemetry__straggler_every=1)
    attempt("finished", "finished.json")
    attempt("trace", "profile/step_1_rank_0.json", telemetry__profile_steps=[1])
    with pytest.MonkeyPatch.context() as patch:
        # torch's own exporter on a full disk: what was buffered is lost, and it only prints that.
        patch.setattr(torch.profiler.profile, "export_chrome_trace", lambda self, path: Path(path).write_text('{"a'))
        attempt("half a trace", None, telemetry__profile_steps=[2])
    with pytest.MonkeyPatch.context() as patch:
        # What needs a GPU does nothing here; the file is written, or not, as there.
        patch.setattr(torch.cuda, "is_available", lambda: True)
        said["snapshot"] = told(lambda: snapshot(folder / "gpu", rank))
    with pytest.MonkeyPatch.context() as patch:
        log = MetricLogger.log

        def full(self: MetricLogger, step: int, metrics: Any) -> None:
            if step == 2 and rank == 0:
                raise OSError(28, os.strerror(28))
            log(self, step, metrics)

        patch.setattr(MetricLogger, "log", full)
        attempt("later", None)
    config = load_training_config(folder / f"later.{rank}.yaml", [], "sft")
    block(folder / "proof" / "audit.json", rank)
    assert isinstance(config, audit.AuditedConfig)
    said["audit"] = told(lambda: audit.run(config, output=folder / "proof", rows=2))
    if rank == 0:
        (folder / "short").write_text("a file where the directory must be")
    said["layers"] = told(lambda: audit.run(config, output=folder / "short", rows=2, layers=1))
    return said


def snapshot(folder: Path, rank: int) -> None:
    """A step with a memory snapshot whose file cannot be written on rank 0."""
    groups = initialize(Layout(), seed=1)
    failures = WriteFailures(groups)
    profiler = StepProfiler(folder, rank, memory_snapshot_steps=[1], writing=failures.writing)
    block(folder / "profile" / "memory_step_1_rank_0.pickle", rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.memory, "_record_memory_history", lambda *_, **__: None)
        patch.setattr(torch.cuda.memory, "_snapshot", lambda *_, **__: {"segments": []})
        with profiler.step(1):
            pass
    failures.check()


def test_files_of_the_main_process_at_dp2(tmp_path: Path) -> None:
    assert training_run.FINISHED == "finished.json"
    first, second = run_forked(2, unwritable, tiny_run.write_inputs(tmp_path))
    assert first == second, "a rank that hears nothing waits in its next collective"
    names = {
        "masks": "masks.html",
        "metrics": "metrics.jsonl",
        "stragglers": "stragglers.jsonl",
        "finished": "finished.json",
        "later": "metrics.jsonl",
        "trace": "step_1_rank_0.json",
        "half a trace": "step_2_rank_0.json",
        "snapshot": "memory_step_1_rank_0.pickle",
        "audit": "proof",
        "layers": "short",
    }
    for case, name in names.items():
        assert first[case].startswith("WriteError: ") and name in first[case], (case, first[case])
        assert first[case].endswith("(rank 0)"), first[case]

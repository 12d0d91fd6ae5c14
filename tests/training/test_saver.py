"""Writing checkpoints: in the background with the content of a synchronous save, whole or not at all, the best kept."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.forked import run_forked, single_process
from tests.training import tiny
from tests.training.small_disk import MountRefused, on_small_disk
from tests.training.test_checkpoint import step
from tulu_hpc.config.sections import ParallelSection, RlvrTrainSection
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.planner.memory import Workload, checkpoint_host_bytes
from tulu_hpc.training import checkpoint
from tulu_hpc.training import snapshot as snapshot_module
from tulu_hpc.training.retention import BEST, Retention, valid_steps
from tulu_hpc.training.saver import MetricError, SaveError, Saver, save
from tulu_hpc.training.snapshot import Part, Snapshot
from tulu_hpc.training.step import NonFiniteError, SpikeError
from tulu_hpc.training.trainer import Trainer

PLAIN = ParallelSection()
OFF = {"distributed_optimizer": False}
WRITE, WRITE_DATA = Snapshot.write, snapshot_module._Writer.write_data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Background writers wait for it."""
    event = threading.Event()

    def write(self: Snapshot) -> Part:
        assert event.wait(60)
        return WRITE(self)

    monkeypatch.setattr(Snapshot, "write", write)
    yield event
    event.set()


def open_trainer(model: Path, parallel: ParallelSection, dtype: str = "float32") -> tuple[Trainer, Groups]:
    groups = initialize(layout_of(parallel), seed=1)
    return tiny.make_trainer(model, groups, parallel, dtype=dtype), groups


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def save_both_ways(
    model: Path, folder: Path, parallel: ParallelSection, dtype: str, gate: threading.Event
) -> list[bool]:
    """A synchronous and a background save of one state; training goes on before the second is written."""
    trainer, groups = open_trainer(model, parallel, dtype)
    for number in range(2):
        step(trainer, groups, parallel, number)
    gate.set()
    save(trainer, folder / "now", {"position": 2})
    gate.clear()
    published = []
    with Saver(trainer, folder / "later", retention=Retention()) as saver:
        saver.save({"position": 2})
        for number in range(2, 4):
            step(trainer, groups, parallel, number)
            saver.poll()
            published.append((folder / "later" / "step_2").exists())
        gate.set()
    return published


LAYOUTS = {
    "one process": (1, {}, "float32"),
    "no distributed optimizer, bf16": (1, {"distributed_optimizer": False}, "bfloat16"),
    "no distributed optimizer": (1, {"distributed_optimizer": False}, "float32"),
    "dp2 bf16": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, "bfloat16"),
    "tp2": (2, {"tensor": 2}, "float32"),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, "float32"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_background_has_the_bytes_of_a_synchronous_save(
    model: Path, tmp_path: Path, gate: threading.Event, name: str
) -> None:
    world, options, dtype = LAYOUTS[name]
    published = run_forked(world, save_both_ways, model, tmp_path, ParallelSection(**options), dtype, gate)
    assert published == [[False, False]] * world, "published while a writer was still waiting"
    now, later = contents(tmp_path / "now" / "step_2"), contents(tmp_path / "later" / "step_2")
    assert now.keys() == later.keys() and len(now) >= 5
    assert all(now[file] == later[file] for file in now)


def test_the_copy_is_needed(
    model: Path, tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above sees a writer that reads the live state."""
    monkeypatch.setattr(snapshot_module, "_Held", lambda planner, plan: planner)
    run_forked(1, save_both_ways, model, tmp_path, PLAIN, "float32", gate)
    now, later = contents(tmp_path / "now" / "step_2"), contents(tmp_path / "later" / "step_2")
    assert now["__0_0.distcp"] != later["__0_0.distcp"]


def test_next_save_waits_for_the_one_before(model: Path, tmp_path: Path, gate: threading.Event) -> None:
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        with Saver(trainer, tmp_path, retention=Retention()) as saver:
            step(trainer, groups, PLAIN, 0)
            saver.save({})
            step(trainer, groups, PLAIN, 1)
            saver.poll()
            assert valid_steps(tmp_path) == []
            threading.Timer(0.05, gate.set).start()
            saver.save({})
            assert valid_steps(tmp_path) == [1]
            step(trainer, groups, PLAIN, 2)
            saver.save({}, wait=True)
            assert valid_steps(tmp_path) == [2, 3]
            saver.save({}, wait=True)  # nothing has changed since
        assert valid_steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("error", [NonFiniteError, SpikeError, RuntimeError])
def test_what_ends_the_loop(model: Path, tmp_path: Path, gate: threading.Event, error: type[Exception]) -> None:
    """An error that hits all ranks publishes what is on its way; after another the ranks cannot count on each other."""
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        step(trainer, groups, PLAIN, 0)
        gate.set()
        with pytest.raises(error), Saver(trainer, tmp_path, retention=Retention()) as saver:
            saver.save({})
            raise error("bad", {}) if error is NonFiniteError else error
        assert valid_steps(tmp_path) == ([] if error is RuntimeError else [1])
        checkpoint.clean(tmp_path, groups)
        assert not list(tmp_path.glob("*.tmp"))


def fail_on_rank_1(model: Path, folder: Path, on_error: Any) -> dict[str, Any]:
    trainer, groups = open_trainer(model, PLAIN)
    broken = True

    def write_data(self: Any, plan: Any, planner: Any) -> Any:
        if broken and groups.rank == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return WRITE_DATA(self, plan, planner)

    snapshot_module._Writer.write_data = write_data  # type: ignore[method-assign]  # of this forked process
    found: dict[str, Any] = {"error": None}
    with Saver(trainer, folder, retention=Retention(), on_error=on_error) as saver:
        broken = False
        step(trainer, groups, PLAIN, 0)
        saver.save({})
        saver.wait()
        broken = True
        step(trainer, groups, PLAIN, 1)
        saver.save({})
        try:
            saver.wait()
        except SaveError as error:
            found["error"] = str(error)
        found["after"] = valid_steps(folder), sorted(path.name for path in folder.iterdir())
        broken = False
        step(trainer, groups, PLAIN, 2)
        saver.save({})
        saver.wait()
        broken = True
        step(trainer, groups, PLAIN, 3)
        with pytest.raises(SaveError):
            saver.save({}, wait=True)
        found["end"] = valid_steps(folder)
    return found


@pytest.mark.parametrize("on_error", ["raise", "continue"])
def test_error_of_a_writer_reaches_all_ranks(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], on_error: str
) -> None:
    found = run_forked(2, fail_on_rank_1, model, tmp_path, on_error)
    message = f"checkpoint step_2 could not be written: {tmp_path / 'step_2.tmp' / '__1_0.distcp'}: "
    message += f"{os.strerror(errno.EIO)} (rank 1)"
    if on_error == "raise":
        assert [each["error"] for each in found] == [message] * 2
    else:
        assert [each["error"] for each in found] == [None] * 2
        assert capfd.readouterr().err.count(f"warning: {message}; training goes on") == 1
    assert found[0]["after"] == found[1]["after"] == ([1], ["step_1"])
    assert found[0]["end"] == [1, 3]


def fill_disk(model: Path, folder: Path, on_error: Any) -> dict[str, Any]:
    """Two ranks save to a disk that holds one checkpoint and part of another."""
    trainer, groups = open_trainer(model, PLAIN)
    found: dict[str, Any] = {}
    with Saver(trainer, folder, retention=Retention(last=1), on_error=on_error) as saver:
        step(trainer, groups, PLAIN, 0)
        saver.save({}, wait=True)
        used = sum(file.stat().st_size for file in (folder / "step_1").iterdir())
        groups.barrier()
        ballast = folder / "ballast"
        if groups.is_main:
            ballast.write_bytes(bytes(max(0, snapshot_module.free_bytes(folder) - used // 2)))
        groups.barrier()
        step(trainer, groups, PLAIN, 1)
        saver.save({})
        try:
            saver.wait()
        except SaveError as error:
            found["error"] = str(error)
        found["names"] = sorted(path.name for path in folder.iterdir())
        groups.barrier()
        if groups.is_main:
            ballast.unlink()
        groups.barrier()
        step(trainer, groups, PLAIN, 2)
        saver.save({}, wait=True)
    fresh = tiny.make_trainer(model, groups, PLAIN)
    found["resumed"] = checkpoint.load_latest(fresh, folder)
    return found


@pytest.mark.parametrize("on_error", ["raise", "continue"])
def test_full_disk(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], on_error: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        found = on_small_disk(disk, 4 * 2**20, lambda: run_forked(2, fill_disk, model, disk, on_error))
    except MountRefused as refused:
        pytest.skip(f"no file system of our own: {refused}")
    text = found[0]["error"] if on_error == "raise" else capfd.readouterr().err
    assert f"checkpoint step_2 could not be written: {disk / 'step_2.tmp'}/" in text
    assert os.strerror(errno.ENOSPC) in text and "(rank " in text and "bytes more are needed" in text
    for each in found:
        assert each["names"] == ["ballast", "step_1"], "the last good one stays, the half-written one is gone"
        assert each["resumed"] == (3, {})


def keep_best(model: Path, folder: Path, retention: Retention, values: list[float], start: int = 0) -> list[int]:
    """A step and a checkpoint per value; which ones are left."""
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        if start:
            assert checkpoint.load_latest(trainer, folder) is not None
        with Saver(trainer, folder, retention=retention, saved_step=start or None) as saver:
            for number, value in enumerate(values, start=start):
                step(trainer, groups, PLAIN, number)
                saver.observe({"train/loss": value, "train/grad_norm": 1.0})
                saver.save({})
    return valid_steps(folder)


def test_best_checkpoints_stay(model: Path, tmp_path: Path) -> None:
    retention = Retention(last=1, best=1, metric="train/loss")
    assert keep_best(model, tmp_path, retention, [3.0, 1.0, 2.0, math.nan]) == [2, 4]
    assert os.readlink(tmp_path / BEST) == "step_2"
    # The value is in the checkpoint: a resumed run knows it. A stale link (a kill before it moved) is put right.
    (tmp_path / BEST).unlink()
    (tmp_path / BEST).symlink_to("step_9")
    assert keep_best(model, tmp_path, retention, [1.5, 1.0], start=4) == [2, 6]
    assert os.readlink(tmp_path / BEST) == "step_2", "of equals the older one"
    assert keep_best(model, tmp_path, retention, [0.5], start=6) == [7]
    assert os.readlink(tmp_path / BEST) == "step_7"
    # By another metric nothing is known about the old ones.
    other = Retention(last=2, best=1, metric="rollout/reward", mode="max")
    assert other.ranked(tmp_path) == []


def test_best_of_several_and_by_maximum(model: Path, tmp_path: Path) -> None:
    retention = Retention(last=1, best=2, metric="train/loss", mode="max")
    assert keep_best(model, tmp_path, retention, [3.0, 1.0, 4.0, 2.0]) == [1, 3, 4]
    assert retention.ranked(tmp_path) == [3, 1, 4]
    assert os.readlink(tmp_path / BEST) == "step_3"


def saver_of(model: Path, folder: Path, metric: str, seen: list[dict[str, float]]) -> list[float]:
    """What a saver counts of the metrics of some steps; known are `train/loss` and `loss/rare`."""
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        with Saver(trainer, folder, retention=Retention(best=1, metric=metric)) as saver:
            for metrics in seen:
                saver.observe(metrics, known=["train/loss", "loss/rare"])
            return saver._values


def test_a_source_that_a_step_has_nothing_of(model: Path, tmp_path: Path) -> None:
    step = {"train/loss": 1.0, "train/grad_norm": 1.0}
    assert saver_of(model, tmp_path, "loss/rare", [step, {**step, "loss/rare": 3.0}, step]) == [3.0]


def test_unknown_metric(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MetricError, match=r"train/lost.*there are train/loss, train/grad_norm"):
        keep_best(model, tmp_path, Retention(best=1, metric="train/lost"), [1.0])
    with pytest.raises(MetricError, match=r"eval/los: .*there are train/grad_norm, eval/loss"):
        saver_of(model, tmp_path, "eval/los", [{"train/grad_norm": 1.0}, {"train/grad_norm": 1.0, "eval/loss": 2.0}])
    for metric in (None, "timing/step"):
        with pytest.raises(ValueError, match="best_metric"):
            RlvrTrainSection(steps=1, keep_best=1, best_metric=metric)


@pytest.mark.parametrize(("options", "dtype"), [({}, "float32"), ({}, "bfloat16"), (OFF, "float32"), (OFF, "bfloat16")])
def test_planner_knows_the_bytes(model: Path, tmp_path: Path, options: dict[str, Any], dtype: str) -> None:
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, ParallelSection(**options), dtype=dtype)
        state = checkpoint.sharded_state(trainer, loading=False)
        taken = Snapshot.take(state, tmp_path, {}, groups, hold=True)
        tensors = sum(item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
                      for item in taken._plan.items if item.tensor_data is not None)  # fmt: skip
        size = 4 if dtype == "float32" else 2
        on = not options
        work = Workload(tiny.ARCHITECTURE, groups.layout, 1, rows=8, dtype_bytes=size, distributed_optimizer=on)
        assert checkpoint_host_bytes(work, 0) == tensors


def test_files_that_cannot_be_made(model: Path, tmp_path: Path) -> None:
    """The directory itself is in the way."""
    (tmp_path / "checkpoints").write_text("a file")
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        step(trainer, groups, PLAIN, 0)
        with pytest.raises(SaveError, match=r"step_1 could not be written.*checkpoints.*Not a directory \(rank 0\)"):
            save(trainer, tmp_path / "checkpoints", {})


def test_every_step_of_publication_can_fail(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call that writes is refused once; the checkpoint before stays the newest, and the next save is fine."""
    calls: list[str] = []

    def refuse(original: Callable[..., Any], name: str, turn: list[int]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            turn[0] -= 1
            if turn[0] == 0:
                calls.append(name)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **options)

        return call

    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        step(trainer, groups, PLAIN, 0)
        save(trainer, tmp_path, {})
        number = refused = 0
        while len(calls) == refused:
            number, refused = number + 1, len(calls) + 1
            step(trainer, groups, PLAIN, number)
            before = valid_steps(tmp_path)
            turn = [refused]
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", refuse(os.fsync, "fsync", turn))
                patch.setattr(Path, "rename", refuse(Path.rename, "rename", turn))
                patch.setattr(Path, "mkdir", refuse(Path.mkdir, "mkdir", turn))
                try:
                    save(trainer, tmp_path, {}, keep_last=99)
                except SaveError:
                    assert not list(tmp_path.glob("*.tmp"))
                else:
                    break
            assert checkpoint.verify(tmp_path / f"step_{before[-1]}", groups) is None
            save(trainer, tmp_path, {}, keep_last=99)
            assert valid_steps(tmp_path) == [*before, trainer.step]
        assert {"fsync", "rename", "mkdir"} == set(calls) and len(calls) >= 8

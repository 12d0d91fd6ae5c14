"""Checkpoints: complete or absent, bitwise at the same layout, loadable at another, and megatron's defects repaired."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer as megatron_distributed
from torch import Tensor

from tests.parallel.forked import run_forked, single_process
from tests.training import tiny
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.training import checkpoint, saver
from tulu_hpc.training import optimizer as repairs
from tulu_hpc.training import trainer as trainer_module
from tulu_hpc.training.step import train_step
from tulu_hpc.training.trainer import Trainer

PLAIN = ParallelSection()
ORIGINAL_COPY = megatron_distributed.DistributedOptimizer._set_main_param_and_optimizer_states


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("tied") / "hf", tiny.TIED)


def step(trainer: Trainer, groups: Groups, parallel: ParallelSection, number: int) -> tuple[float, float]:
    items = tiny.make_items("spgspp", seed=number)
    data = tiny.global_batch(items, groups, parallel, pack_rows=64)
    result = train_step(trainer, data.packs, tiny.mixed_loss(groups, items))
    return result.loss, result.grad_norm


def adam_state(trainer: Trainer) -> list[Tensor]:
    tensors = []
    for inner in repairs.torch_optimizers(trainer.optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                tensors += [parameter.detach().clone(), *(state[k].clone() for k in ("step", "exp_avg", "exp_avg_sq"))]
    return tensors


def save_and_continue(
    model: Path, directory: Path, parallel: ParallelSection, dtype: str = "float32"
) -> dict[str, Any]:
    """Two steps, save, a third step."""
    groups = initialize(layout_of(parallel), seed=1)
    trainer = tiny.make_trainer(model, groups, parallel, dtype=dtype)
    for number in range(2):
        step(trainer, groups, parallel, number)
    saver.save(trainer, directory, {"loader": {"position": 2}})
    third = step(trainer, groups, parallel, 2)
    return {"third": third, "weights": tiny.weights(trainer), "adam": adam_state(trainer), "noise": torch.rand(3)}


def load_and_continue(
    model: Path, directory: Path, parallel: ParallelSection, dtype: str = "float32"
) -> dict[str, Any]:
    """A fresh trainer, load, the third step. Other generators are at another place before the load."""
    groups = initialize(layout_of(parallel), seed=99)
    trainer = tiny.make_trainer(model, groups, parallel, dtype=dtype)
    found = checkpoint.load_latest(trainer, directory)
    assert found == (2, {"loader": {"position": 2}})
    third = step(trainer, groups, parallel, 2)
    return {"third": third, "weights": tiny.weights(trainer), "adam": adam_state(trainer), "noise": torch.rand(3)}


SAME = {
    "one process": (1, {}),
    "no distributed optimizer": (1, {"distributed_optimizer": False}),
    "dp2": (2, {}),
    "tp2 sp": (2, {"tensor": 2}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
}


def assert_bitwise(kept: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    for a, b in zip(kept, resumed, strict=True):
        assert a["third"] == b["third"]
        assert all(torch.equal(x, y) for x, y in zip(a["adam"], b["adam"], strict=True))
        assert torch.equal(a["noise"], b["noise"]), "generators are part of the checkpoint"
    assert all(torch.equal(kept[0]["weights"][k], resumed[0]["weights"][k]) for k in kept[0]["weights"])


@pytest.mark.parametrize("name", SAME)
def test_same_layout_is_bitwise(model: Path, tmp_path: Path, name: str) -> None:
    world, options = SAME[name]
    parallel = ParallelSection(**options)
    kept = run_forked(world, save_and_continue, model, tmp_path, parallel)
    assert_bitwise(kept, run_forked(world, load_and_continue, model, tmp_path, parallel))


@pytest.mark.parametrize(("world", "options"), [(1, {}), (2, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})])
def test_bf16_with_fp32_masters_is_bitwise(model: Path, tmp_path: Path, world: int, options: dict[str, Any]) -> None:
    parallel = ParallelSection(**options)
    kept = run_forked(world, save_and_continue, model, tmp_path, parallel, "bfloat16")
    assert_bitwise(kept, run_forked(world, load_and_continue, model, tmp_path, parallel, "bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("world", "options"), [(2, {"pipeline": 2}), (2, {"pipeline": 2, "virtual_pipeline": 2}), (4, {"pipeline": 2})]
)
def test_several_gradient_buckets_are_bitwise(
    tied_model: Path, tmp_path: Path, world: int, options: dict[str, Any], dtype: str
) -> None:
    """Tied embeddings over pipeline stages: a bucket of their own, padded before the next one (repair 5)."""
    parallel = ParallelSection(**options)
    kept = run_forked(world, save_and_continue, tied_model, tmp_path, parallel, dtype)
    assert_bitwise(kept, run_forked(world, load_and_continue, tied_model, tmp_path, parallel, dtype))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((2, {"tensor": 2}), (1, {})),
        ((1, {}), (2, {"pipeline": 2})),
        ((2, {}), (2, {"tensor": 2})),
        ((2, {"pipeline": 2, "virtual_pipeline": 2}), (2, {"context": 2})),
    ],
)
def test_another_layout_continues_the_same_training(
    model: Path, tmp_path: Path, saved: tuple[int, dict[str, Any]], loaded: tuple[int, dict[str, Any]]
) -> None:
    kept = run_forked(saved[0], save_and_continue, model, tmp_path, ParallelSection(**saved[1]))[0]
    other = run_forked(loaded[0], load_and_continue, model, tmp_path, ParallelSection(**loaded[1]))[0]
    assert other["third"] == pytest.approx(kept["third"], rel=1e-5)
    assert tiny.largest_difference(other["weights"], kept["weights"], relative=False) <= 1e-4


@pytest.mark.parametrize("loaded", [(1, {}), (2, {"tensor": 2}), (2, {})])
def test_several_gradient_buckets_at_another_layout(
    tied_model: Path, tmp_path: Path, loaded: tuple[int, dict[str, Any]]
) -> None:
    kept = run_forked(2, save_and_continue, tied_model, tmp_path, ParallelSection(pipeline=2))[0]
    other = run_forked(loaded[0], load_and_continue, tied_model, tmp_path, ParallelSection(**loaded[1]))[0]
    assert other["third"] == pytest.approx(kept["third"], rel=1e-5)
    assert tiny.largest_difference(other["weights"], kept["weights"], relative=False) <= 1e-4


def test_overlapped_reduction_in_small_buckets(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model of more than 40M parameters per rank has them."""
    original = trainer_module.DistributedDataParallelConfig
    monkeypatch.setattr(
        trainer_module, "DistributedDataParallelConfig", lambda **options: original(**{**options, "bucket_size": 5000})
    )
    parallel = ParallelSection(overlap_grad_reduce=True, overlap_param_gather=True)
    kept = run_forked(2, save_and_continue, model, tmp_path, parallel)
    assert_bitwise(kept, run_forked(2, load_and_continue, model, tmp_path, parallel))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", ["*.distcp", "common.pt", checkpoint.STATE])
def test_damaged_checkpoint_is_passed_over(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], None], file: str
) -> None:
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        for number in range(2):
            step(trainer, groups, PLAIN, number)
            saver.save(trainer, tmp_path, {"n": number})
        target = next((tmp_path / "step_2").glob(file))
        damage(target)
        assert checkpoint.load_latest(trainer, tmp_path) == (1, {"n": 0})
        assert trainer.step == 1
        message = capfd.readouterr().err
        assert "passed over" in message and str(target) in message and "goes on from step 1" in message
        # Out of the way: it is neither taken for the newest nor counted when old ones are deleted.
        assert (tmp_path / "step_2.damaged").is_dir() and checkpoint.valid_steps(tmp_path) == [1]
        damage(next((tmp_path / "step_1").glob(file)))
        with pytest.raises(checkpoint.CheckpointError, match="none of the checkpoints"):
            checkpoint.load_latest(trainer, tmp_path)


def hash_in_shares(model: Path, folder: Path) -> tuple[str | None, list[str]]:
    groups = initialize(layout_of(PLAIN), seed=1)
    trainer = tiny.make_trainer(model, groups, PLAIN)
    step(trainer, groups, PLAIN, 0)
    path = saver.save(trainer, folder, {})
    read: list[str] = []
    original = checkpoint.file_entry
    checkpoint.file_entry = lambda file: (read.append(file.name), original(file))[1]  # of this forked process
    return checkpoint.verify(path, groups), read


def test_ranks_share_the_verification(model: Path, tmp_path: Path) -> None:
    found = run_forked(2, hash_in_shares, model, tmp_path)
    assert [problem for problem, _ in found] == [None, None]
    first, second = (set(read) for _, read in found)
    on_disk = {file.name for file in (tmp_path / "step_1").iterdir()} - {checkpoint.MANIFEST}
    assert first | second == on_disk and not first & second and min(len(first), len(second)) >= 2


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"files": 3}'])
def test_damaged_manifest(model: Path, tmp_path: Path, text: str) -> None:
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        step(trainer, groups, PLAIN, 0)
        path = saver.save(trainer, tmp_path, {})
        (path / checkpoint.MANIFEST).write_text(text)
        problem = checkpoint.verify(path, groups)
        assert problem is not None and str(path / checkpoint.MANIFEST) in problem


def test_unpublished_and_old_checkpoints(model: Path, tmp_path: Path) -> None:
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        assert checkpoint.load_latest(trainer, tmp_path / "nothing") is None
        half = tmp_path / "step_9.tmp"
        half.mkdir()
        (half / checkpoint.MANIFEST).write_text("{}")
        (tmp_path / "step_7").mkdir()  # no manifest: not a checkpoint
        assert checkpoint.valid_steps(tmp_path) == []
        for number in range(3):
            step(trainer, groups, PLAIN, number)
            saver.save(trainer, tmp_path, {}, keep_last=2)
        assert checkpoint.valid_steps(tmp_path) == [2, 3]
        assert not half.exists() and not (tmp_path / "step_1").exists()
        manifest = json.loads((tmp_path / "step_3" / checkpoint.MANIFEST).read_text())
        on_disk = {p.name for p in (tmp_path / "step_3").iterdir()} - {checkpoint.MANIFEST}
        assert set(manifest["files"]) == on_disk


def test_other_format_is_refused(model: Path, tmp_path: Path) -> None:
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        step(trainer, groups, PLAIN, 0)
        path = saver.save(trainer, tmp_path, {})
        state = json.loads((path / checkpoint.STATE).read_text())
        (path / checkpoint.STATE).write_text(json.dumps({**state, "format": 99}))
        with pytest.raises(checkpoint.CheckpointError, match="format 99"):
            checkpoint.load(trainer, path)


class TestRepairs:
    """Each repair of training/optimizer.py, and that megatron fails without it."""

    @staticmethod
    def saved(model: Path, tmp_path: Path, groups: Groups) -> Trainer:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        for number in range(2):
            step(trainer, groups, PLAIN, number)
        saver.save(trainer, tmp_path, {})
        return trainer

    def test_empty_state(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with single_process() as groups:
            self.saved(model, tmp_path, groups)
            fresh = tiny.make_trainer(model, groups, PLAIN)
            assert repairs.optimizer_step(fresh.optimizer) == 0
            for inner in repairs.torch_optimizers(fresh.optimizer):
                inner.state.clear()
            with pytest.raises(AssertionError):
                checkpoint.load_latest(fresh, tmp_path)
            repairs.create_state(fresh.optimizer)
            assert checkpoint.load_latest(fresh, tmp_path) == (2, {})

    def test_state_copy(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with single_process() as groups:
            self.saved(model, tmp_path, groups)
            fresh = tiny.make_trainer(model, groups, PLAIN)
            original = megatron_distributed.DistributedOptimizer
            monkeypatch.setattr(original, "_set_main_param_and_optimizer_states", ORIGINAL_COPY)
            with pytest.raises(KeyError, match="step"):
                checkpoint.load_latest(fresh, tmp_path)

    def test_leaf_views(self, model: Path) -> None:
        with single_process() as groups:
            part = tiny.make_trainer(model, groups, PLAIN).optimizer.chained_optimizers[0]
            parameter = next(iter(part.model_param_group_index_map))
            shard = part._get_main_param_and_optimizer_states(parameter)
            wanted = {name: torch.full_like(tensor, 3.0) for name, tensor in shard.items() if name != "step"}
            with pytest.raises(RuntimeError, match="in-place operation"):
                ORIGINAL_COPY(part, parameter, wanted)
            part._set_main_param_and_optimizer_states(parameter, wanted)
            now = part._get_main_param_and_optimizer_states(parameter)
            assert all(torch.equal(now[name], value) for name, value in wanted.items())

    def test_shared_step(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with single_process() as groups:
            self.saved(model, tmp_path, groups)
            good = tiny.make_trainer(model, groups, PLAIN)
            checkpoint.load_latest(good, tmp_path)
            step(good, groups, PLAIN, 2)
            assert repairs.optimizer_step(good.optimizer) == 3
            monkeypatch.setattr(checkpoint, "unshare_steps", lambda optimizer: None)
            bad = tiny.make_trainer(model, groups, PLAIN)
            checkpoint.load_latest(bad, tmp_path)
            step(bad, groups, PLAIN, 2)
            assert repairs.optimizer_step(bad.optimizer) > 3, "megatron no longer shares the step: drop the repair"
            assert tiny.largest_difference(tiny.weights(bad), tiny.weights(good), relative=False) > 1e-5

    def test_places_in_padded_buckets(self, tied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the repair a resumed run has other weights, and nothing says so."""
        parallel = ParallelSection(pipeline=2)
        monkeypatch.setattr(repairs, "_sharded_state", repairs.MEGATRON_SHARDED_STATE)
        kept = run_forked(2, save_and_continue, tied_model, tmp_path, parallel)[0]
        resumed = run_forked(2, load_and_continue, tied_model, tmp_path, parallel)[0]
        assert tiny.largest_difference(resumed["weights"], kept["weights"], relative=False) > 1e-2

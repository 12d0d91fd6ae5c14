"""SGD with momentum: torch's update, and checkpoints through megatron's optimizers that know Adam only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer as megatron_distributed
from torch import Tensor

from tests.parallel.forked import run_forked, single_process
from tests.training import tiny
from tulu_hpc.config.sections import OptimizerSection, ParallelSection
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.training import checkpoint, saver
from tulu_hpc.training import optimizer as repairs
from tulu_hpc.training.step import train_step
from tulu_hpc.training.trainer import Trainer

SGD = OptimizerSection(kind="sgd", lr=0.1, momentum=0.8, weight_decay=0.05, clip_grad=0.5, schedule="constant")
LAYOUTS = {
    "one process": (1, ParallelSection()),
    "replicated": (1, ParallelSection(distributed_optimizer=False)),
    "dp2": (2, ParallelSection()),
    "pp2": (2, ParallelSection(pipeline=2)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf", tiny.TIED)


def step(trainer: Trainer, groups: Groups, parallel: ParallelSection, number: int) -> float:
    items = tiny.make_items("spgspp", seed=number)
    data = tiny.global_batch(items, groups, parallel, pack_rows=64)
    return train_step(trainer, data.packs, tiny.mixed_loss(groups, items)).loss


def start(model: Path, parallel: ParallelSection, dtype: str) -> tuple[Groups, Trainer]:
    groups = initialize(layout_of(parallel), seed=1)
    return groups, tiny.make_trainer(model, groups, parallel, optimizer=SGD, dtype=dtype)


def save_and_continue(model: Path, directory: Path, parallel: ParallelSection, dtype: str) -> dict[str, Any]:
    groups, trainer = start(model, parallel, dtype)
    for number in range(2):
        step(trainer, groups, parallel, number)
    saver.save(trainer, directory, {})
    return {"loss": step(trainer, groups, parallel, 2), "weights": tiny.weights(trainer)}


def load_and_continue(model: Path, directory: Path, parallel: ParallelSection, dtype: str) -> dict[str, Any]:
    groups, trainer = start(model, parallel, dtype)
    assert checkpoint.load_latest(trainer, directory) == (2, {})
    return {"loss": step(trainer, groups, parallel, 2), "weights": tiny.weights(trainer)}


def test_the_update_is_torchs(model: Path) -> None:
    """Two steps by hand from the gradients: clipped, weight decay added (norms aside), momentum."""
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, ParallelSection(), optimizer=SGD)
        weights = {name: tensor.double() for name, tensor in tiny.weights(trainer).items()}
        momentum: dict[str, Tensor] = {}
        for number in range(2):
            items = tiny.make_items("spgsp", seed=number)
            packs = tiny.global_batch(items, groups, ParallelSection(), pack_rows=64).packs
            loss = tiny.mixed_loss(groups, items)
            trainer.zero_grad()
            trainer.runner.forward_backward(trainer.runner.prepare(packs), loss)
            gradients = tiny.gradients(trainer)
            norm = train_step(trainer, packs, loss).grad_norm
            assert norm > SGD.clip_grad
            for name, weight in weights.items():
                gradient = gradients[name].double() * SGD.clip_grad / norm
                if weight.dim() > 1:
                    gradient = gradient + SGD.weight_decay * weight
                momentum[name] = gradient if number == 0 else 0.8 * momentum[name] + gradient
                weights[name] = weight - SGD.lr * momentum[name]
        assert repairs.optimizer_step(trainer.optimizer) == 2
        for name, found in tiny.weights(trainer).items():
            torch.testing.assert_close(found.double(), weights[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("one process", "float32"),
        ("replicated", "float32"),
        ("replicated", "bfloat16"),
        ("dp2", "float32"),
        ("pp2", "bfloat16"),
    ],
)
def test_a_resumed_run_is_bitwise(model: Path, tmp_path: Path, name: str, dtype: str) -> None:
    world, parallel = LAYOUTS[name]
    kept = run_forked(world, save_and_continue, model, tmp_path, parallel, dtype)[0]
    resumed = run_forked(world, load_and_continue, model, tmp_path, parallel, dtype)[0]
    assert kept["loss"] == resumed["loss"]
    assert all(torch.equal(kept["weights"][name], resumed["weights"][name]) for name in kept["weights"])


def test_another_layout_continues(model: Path, tmp_path: Path) -> None:
    kept = run_forked(2, save_and_continue, model, tmp_path, ParallelSection(pipeline=2), "float32")[0]
    resumed = run_forked(2, load_and_continue, model, tmp_path, ParallelSection(), "float32")[0]
    assert resumed["loss"] == pytest.approx(kept["loss"], rel=1e-5)
    assert tiny.largest_difference(resumed["weights"], kept["weights"], relative=False) <= 1e-5


@pytest.mark.parametrize(("saved", "loaded"), [("one process", "replicated"), ("replicated", "one process")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_other_form_of_the_optimizer_continues(
    model: Path, tmp_path: Path, saved: str, loaded: str, dtype: str
) -> None:
    """With the distributed optimizer, or without it: the momentum has another name there."""
    kept = run_forked(1, save_and_continue, model, tmp_path, LAYOUTS[saved][1], dtype)[0]
    resumed = run_forked(1, load_and_continue, model, tmp_path, LAYOUTS[loaded][1], dtype)[0]
    assert resumed["loss"] == kept["loss"]
    # Without its momentum the third step would be elsewhere by much of the learning rate, 0.1.
    assert tiny.largest_difference(resumed["weights"], kept["weights"], relative=False) <= 1e-6


def test_megatron_alone_refuses_sgd_and_cannot_save_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, ParallelSection(), optimizer=SGD)
        distributed = megatron_distributed.DistributedOptimizer
        monkeypatch.setattr(distributed, "_get_main_param_and_optimizer_states", repairs.MEGATRON_STATES)
        with pytest.raises(KeyError, match="exp_avg"):
            saver.save(trainer, tmp_path, {})
        monkeypatch.setattr(repairs, "use_torch_optimizer", lambda: None)
        monkeypatch.setattr(megatron_distributed, "Adam", torch.optim.Adam)
        with pytest.raises(AssertionError, match="Only Adam"):
            tiny.make_trainer(model, groups, ParallelSection(), optimizer=SGD)


def test_momentum_is_of_sgd() -> None:
    with pytest.raises(ValueError, match="momentum belongs to sgd"):
        OptimizerSection(lr=1.0, momentum=0.9)

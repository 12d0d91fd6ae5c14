"""Which optimizer megatron is made to build, and the state that it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

from tests.parallel.forked import single_process
from tests.training import tiny
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.training.optimizer import optimizer_step, torch_optimizers, unshare_steps


class FusedAdam(torch.optim.AdamW):
    """Stands where Transformer Engine or Apex would put theirs; nobody may make one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        raise AssertionError("the fused Adam of another package was built")


@pytest.mark.parametrize("distributed", [True, False])
def test_torch_adamw_is_used_where_fused_adams_are_installed(
    tmp_path: Path, distributed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(megatron_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
    with single_process() as groups:
        parallel = ParallelSection(distributed_optimizer=distributed)
        trainer = tiny.make_trainer(tiny.write_model(tmp_path / "hf"), groups, parallel)
        inner = torch_optimizers(trainer.optimizer)
        assert inner and all(type(each) is torch.optim.AdamW for each in inner)
        assert optimizer_step(trainer.optimizer) == 0
        state = trainer.optimizer.state_dict()  # reads `step` as torch keeps it
        assert state


def test_loaded_steps_are_separate_tensors_beside_their_parameters(tmp_path: Path) -> None:
    with single_process() as groups:
        trainer = tiny.make_trainer(tiny.write_model(tmp_path / "hf"), groups, ParallelSection())
        shared = torch.tensor(3)
        states = [s for inner in torch_optimizers(trainer.optimizer) for s in inner.state.items()]
        for _parameter, state in states:
            state["step"] = shared
        unshare_steps(trainer.optimizer)
        assert optimizer_step(trainer.optimizer) == 3
        assert len({state["step"].data_ptr() for _, state in states}) == len(states) > 1
        for parameter, state in states:
            assert state["step"].dtype == torch.float32
            assert state["step"].device == parameter.device


def test_norms_are_not_decayed(tmp_path: Path) -> None:
    """megatron marks them and leaves the rest to its own scheduler; without a repair they decay like matrices."""
    with single_process() as groups:
        parallel = ParallelSection(distributed_optimizer=False)  # its parameters keep their shapes
        trainer = tiny.make_trainer(tiny.write_model(tmp_path / "hf"), groups, parallel)
        decays = {(p.dim(), g["weight_decay"]) for g in trainer.optimizer.param_groups for p in g["params"]}
        assert decays == {(1, 0.0), (2, tiny.OPTIMIZER.weight_decay)}

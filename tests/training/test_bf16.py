"""bf16 parameters with fp32 masters: close to fp32, at several layouts, with and without the distributed optimizer.

The bounds are those of bf16 rounding (8 bits) on this model, not a promise for others. Not proven here: bf16 on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.forked import run_forked
from tests.training import tiny
from tests.training.test_layouts import STEPS, run_all

BF16 = {"dtype": "bfloat16"}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"fp32": {}, "one process": BF16, "no distributed optimizer": {**BF16, "distributed_optimizer": False}},
    2: {"tp2 sp": {**BF16, "tensor": 2}, "dp2": BF16, "pp2": {**BF16, "pipeline": 2}},
}
CASES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts if name != "fp32"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    model = tiny.write_model(tmp_path_factory.mktemp("model") / "hf")
    found = {world: run_forked(world, run_all, model, layouts) for world, layouts in LAYOUTS.items()}
    return {(world, name): ranks[0][name] for world, ranks in found.items() for name in LAYOUTS[world]}


@pytest.mark.parametrize(("world", "name"), CASES)
def test_close_to_fp32(results: dict[tuple[int, str], Any], world: int, name: str) -> None:
    found, wanted = results[world, name], results[1, "fp32"]
    for step in range(len(STEPS)):
        assert found["losses"][step] == pytest.approx(wanted["losses"][step], rel=2e-2)
        assert found["norms"][step] == pytest.approx(wanted["norms"][step], rel=5e-2)
    assert found["losses"] != wanted["losses"], "this run was fp32"
    for tensor_name, tensor in found["weights"].items():
        assert tensor.dtype == torch.bfloat16
        # Rounding of the weight itself, and an Adam step of a near-zero gradient may go the other way.
        bound = wanted["weights"][tensor_name].abs() * 2**-8 + 2 * len(STEPS) * tiny.OPTIMIZER.lr
        assert ((tensor.float() - wanted["weights"][tensor_name]).abs() <= bound).all(), tensor_name

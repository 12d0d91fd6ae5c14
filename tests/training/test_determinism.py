"""`run.deterministic`: two runs give the same bits, and an operation that could not is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.forked import run_forked
from tests.training import tiny
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.training import determinism


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.mark.parametrize(
    ("world", "parallel", "dtype"),
    [
        (1, ParallelSection(), "bfloat16"),
        (4, ParallelSection(tensor=2, context=2), "float32"),
        (4, ParallelSection(pipeline=2, overlap_grad_reduce=True, overlap_param_gather=True), "bfloat16"),
    ],
    ids=["one", "tp2 cp2", "dp2 pp2 overlapped"],
)
def test_two_runs_are_bitwise_equal(model: Path, world: int, parallel: ParallelSection, dtype: str) -> None:
    def body() -> Any:
        determinism.configure(deterministic=True, threads=1)
        return tiny.train(model, ["sspg", "spgg", "spgs"], parallel=parallel, dtype=dtype)

    first, second = run_forked(world, body), run_forked(world, body)
    for one, other in zip(first, second, strict=True):
        assert (one["losses"], one["norms"], one["metrics"]) == (other["losses"], other["norms"], other["metrics"])
        assert one["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())
    assert first[0]["weights"]


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_switch_refuses_an_operation_without_a_fixed_order(deterministic: bool) -> None:
    def body() -> str:
        determinism.configure(deterministic=deterministic, threads=1)
        try:
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
        except RuntimeError as error:
            return str(error)
        return ""

    (message,) = run_forked(1, body)
    assert ("does not have a deterministic implementation" in message) == deterministic

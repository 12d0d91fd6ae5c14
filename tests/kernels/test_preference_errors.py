"""What preference_loss refuses, and what its kernel does with ids that nobody checked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_preference_loss import BACKENDS, DEVICE, make_case
from tulu_hpc.kernels import BackendError, preference_loss


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_id_K": torch.tensor([0, 1, 0])}, "non-decreasing"),
        ({"sequence_id_K": torch.tensor([0, 0, 2])}, r"in 0\.\.1"),
        ({"sequence_id_K": torch.tensor([-1, 0, 1])}, r"in 0\.\.1"),
        ({"pairs_P2": torch.tensor([[0, 2]])}, "pairs_P2 must hold"),
        ({"pairs_P2": torch.tensor([[0, -1]])}, "pairs_P2 must hold"),
        ({"pairs_P2": torch.tensor([[-1, -1]]), "kind": "kto"}, "pairs_P2 must hold"),
        ({"pairs_P2": torch.tensor([[-2, 1]]), "kind": "kto"}, "pairs_P2 must hold"),
    ],
)
def test_wrong_ids(change: dict[str, Any], message: str, backend: str) -> None:
    """On the CPU an error; a GPU would have to be waited for, there the loss is NaN."""
    case = {**make_case([2, 1], [[0, 1]]), "kind": "dpo", **change}
    case = {name: x.to(DEVICE.get(backend, "cpu")) if isinstance(x, Tensor) else x for name, x in case.items()}
    if DEVICE.get(backend) == "cuda":
        assert preference_loss(**case, beta=0.1, backend=backend).loss.isnan()
        return
    with pytest.raises(ValueError, match=message):
        preference_loss(**case, beta=0.1, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_id_K": torch.tensor([0, 1, 0])}, "tokens"),
        ({"sequence_id_K": torch.tensor([0, 0, 5])}, "tokens"),
        ({"sequence_id_K": torch.tensor([-3, 0, 1])}, "tokens"),
        ({"pairs_P2": torch.tensor([[0, 9]])}, "tokens"),
        ({"pairs_P2": torch.tensor([[-1, -1]]), "kind": "kto"}, "none"),
        ({"pairs_P2": torch.tensor([[7, 9]])}, "none"),
    ],
)
def test_wrong_ids_inside_the_kernel(change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that a GPU relies on: nothing out of range is read, and the loss is NaN (mostly the gradient too)."""
    from tulu_hpc.kernels.preference_loss import ops

    monkeypatch.setattr(ops, "_check_ids", lambda problem: None)
    case = {**make_case([2, 1], [[0, 1]]), "kind": "dpo", **change}
    case = {name: x.to(DEVICE["triton"]) if isinstance(x, Tensor) else x for name, x in case.items()}
    x = case["logprobs_K"].requires_grad_()
    loss = preference_loss(**case, beta=0.1, backend="triton").loss
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isnan() and (message == "none" or gradient.isnan().any())
    good = {**case, **{k: v.to(x.device) for k, v in make_case([2, 1], [[0, 1]]).items()}, "kind": "dpo"}
    assert torch.isfinite(preference_loss(**good, beta=0.1, backend="triton").loss)


def test_errors() -> None:
    case = make_case([2, 1], [[0, 1]])

    def refused(error: type[Exception], message: str, **change: Any) -> None:
        with pytest.raises(error, match=message):
            preference_loss(**{**case, "beta": 0.1, **change})

    refused(ValueError, "dpo, dpo_norm, cdpo, robust, simpo, ipo, hinge, orpo, kto", kind="dpa")
    refused(ValueError, "beta", beta=0.0)
    refused(ValueError, "label_smoothing", label_smoothing=0.5)
    refused(ValueError, "ipo has no label_smoothing", kind="ipo", label_smoothing=0.1)
    refused(ValueError, "cdpo needs label_smoothing", kind="cdpo")
    refused(ValueError, "gamma is the margin of simpo", gamma=1.0)
    refused(ValueError, "gamma must be finite", kind="simpo", gamma=-1.0)
    refused(ValueError, "sft_weight must be finite", sft_weight=math.nan)
    refused(ValueError, "belong to kto", kl=0.5)
    refused(ValueError, "unpaired", kind="kto", weighting="wpo")
    refused(ValueError, "none or wpo", weighting="wop")
    refused(ValueError, "alignment_sums_Q belongs", alignment_sums_Q=torch.zeros(2))
    refused(ValueError, r"\[P, 2\]", pairs_P2=case["pairs_P2"][0])
    refused(ValueError, r"\[P, 2\]", pairs_P2=case["pairs_P2"].int())
    refused(ValueError, "differ", logprobs_K=case["logprobs_K"][:1])
    refused(TypeError, "float32 or float64", logprobs_K=case["logprobs_K"].bfloat16())
    refused(TypeError, "sequence_id_K int64", sequence_id_K=case["sequence_id_K"].int())
    refused(TypeError, "reference_sums_Q must be float32", reference_sums_Q=torch.zeros(2).half())
    refused(ValueError, r"lengths_Q must have the shape \[2\]", lengths_Q=torch.ones(3))
    refused(ValueError, r"weights_P must have the shape \[1\]", weights_P=torch.ones(2))
    refused(ValueError, "needs lengths_Q", kind="dpo_norm", policy_sums_Q=torch.zeros(2))
    refused(ValueError, "needs lengths_Q", weighting="wpo", policy_sums_Q=torch.zeros(2))
    refused(ValueError, "dpo needs reference_sums_Q", reference_sums_Q=None)
    refused(ValueError, "how many sequences", kind="simpo", reference_sums_Q=None)
    refused(ValueError, "one float", kind="kto", kl=torch.zeros(2))
    refused(ValueError, "one device", lengths_Q=torch.ones(2, device="meta"))
    refused(BackendError, "no backend 'cuda'", backend="cuda")
    refused(BackendError, "no float64", backend="cpu", logprobs_K=case["logprobs_K"].double())

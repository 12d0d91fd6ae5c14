"""policy_loss against TRL's and Liger's GRPO losses: values, gradients, KL and clip fraction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.policy_cases import cast, pack, run
from tulu_hpc.kernels import last_backend


def padded(columns: dict[str, Tensor], lengths: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    return {name: torch.zeros(mask.shape, dtype=c.dtype).masked_scatter(mask, c) for name, c in columns.items()}, mask


# loss type of TRL and Liger, level of its ratio, our options
PEER_CASES = [
    ("grpo", "token", {"kind": "grpo", "normalisation": "sequence_mean", "dual_clip": 1.5}),
    ("dr_grpo", "token", {"kind": "dr_grpo", "normalisation": "constant", "divisor": 4 * 9.0}),
    ("dapo", "token", {"kind": "dapo", "normalisation": "token_mean"}),
    ("grpo", "sequence", {"kind": "gspo", "normalisation": "sequence_mean", "clip_low": 0.05, "clip_high": 0.05}),
    ("cispo", "token", {"kind": "cispo", "normalisation": "token_mean", "clip_low": 1.0, "clip_high": 0.3}),
]


def peer_case(
    options: dict[str, Any], seed: int = 3
) -> tuple[dict[str, Tensor], list[int], dict[str, Tensor], Tensor, dict]:
    lengths = [5, 2, 7, 1]
    columns = pack(lengths, seed=seed)
    columns.pop("weights_K")
    advantages = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns["advantages_K"] = advantages[columns["sequence_id_K"]]
    ours = {"clip_low": 0.2, "clip_high": 0.28, **options, "kl_coef": 0.1}
    ours |= {"importance": "truncated", "importance_high": 1.2}
    table, mask = padded(columns, lengths)
    return columns, lengths, table, mask, ours


def check_trl(loss_type: str, level: str, options: dict[str, Any], seed: int = 3) -> None:
    trainer = pytest.importorskip("trl").GRPOTrainer
    columns, _, table, mask, ours = peer_case(options, seed)
    columns.pop("entropy_K")
    logprobs = table["logprobs_K"].clone().requires_grad_()
    high = 1 + ours["clip_high"] if loss_type == "cispo" else ours["clip_high"]
    same = lambda x, **_: x  # noqa: E731
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, table["entropy_K"], None),
        accelerator=SimpleNamespace(gather=same, reduce=same, gather_for_metrics=same, num_processes=1),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=ours.get("dual_clip"), steps_per_generation=1),
        _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True),
        **{"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None},
        **{"importance_sampling_level": level, "beta": 0.1, "loss_type": loss_type, "max_completion_length": 9},
        **{"epsilon_low": ours["clip_low"], "epsilon_high": high, "current_gradient_accumulation_steps": 1},
        **{"use_vllm": True, "vllm_importance_sampling_correction": True, "_entropy_bonus_enabled": False},
    )
    importance = (table["old_logprobs_K"] - table["behaviour_logprobs_K"]).exp().clamp(max=1.2)
    advantages = table["advantages_K"][:, 0]
    inputs = {
        **{name: torch.zeros(4, 1, dtype=torch.int64) for name in ("prompt_ids", "prompt_mask")},
        **{"completion_ids": torch.zeros(mask.shape, dtype=torch.int64), "completion_mask": mask.long()},
        **{"advantages": advantages, "old_per_token_logps": table["old_logprobs_K"]},
        **{"ref_per_token_logps": table["reference_logprobs_K"], "importance_sampling_ratio": importance},
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(fake, None, inputs)
    (grad,) = torch.autograd.grad(loss, logprobs)
    out, ours_grad, _ = run(columns, **ours)
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-10)
    torch.testing.assert_close(ours_grad / 1.5, grad[mask], rtol=1e-9, atol=1e-12)
    kl = fake._metrics["train"]["kl"][0]
    assert float(out.metrics["policy/kl"]) / int(mask.sum()) == pytest.approx(kl, rel=1e-6)


def check_liger(backend: str, loss_type: str, level: str, options: dict[str, Any], seed: int = 3) -> None:
    peer = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction
    columns, _, table, mask, ours = peer_case(options, seed)
    columns.pop("entropy_K")
    logprobs = table["logprobs_K"].clone().requires_grad_()
    high = 1 + ours["clip_high"] if loss_type == "cispo" else ours["clip_high"]
    loss, metrics = peer.ppo_loss_fn(
        logprobs, mask.double(), table["advantages_K"][:, 0], mask.double(),
        ref_per_token_logps=table["reference_logprobs_K"], old_per_token_logps=table["old_logprobs_K"],
        epsilon_low=ours["clip_low"], epsilon_high=high, beta=0.1, loss_type=loss_type, max_completion_length=9,
        importance_sampling_level=level, delta=ours.get("dual_clip"),
        vllm_is_ratio=(table["old_logprobs_K"] - table["behaviour_logprobs_K"]).exp().clamp(max=1.2),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, logprobs)
    dtype = torch.float64 if backend == "reference" else torch.float32
    out, ours_grad, _ = run(cast(columns, dtype), **ours, backend=backend)
    assert last_backend("policy_loss") == backend
    near = {"rtol": 1e-9, "atol": 1e-12} if backend == "reference" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.loss.double(), loss, **near)
    torch.testing.assert_close(ours_grad.double() / 1.5, grad[mask], **near)
    if loss_type != "cispo":  # a clipped weight counts for us whatever the sign of its advantage
        assert float(out.metrics["policy/clip_fraction"]) / int(mask.sum()) == pytest.approx(float(metrics[1]))


@pytest.mark.parametrize("loss_type, level, options", PEER_CASES)
def test_against_trl(loss_type: str, level: str, options: dict[str, Any]) -> None:
    check_trl(loss_type, level, options)


@pytest.mark.parametrize("loss_type, level, options", PEER_CASES)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_against_liger(backend: str, loss_type: str, level: str, options: dict[str, Any]) -> None:
    check_liger(backend, loss_type, level, options)


@pytest.mark.soak
@pytest.mark.parametrize("peer", ["trl", "liger"])
def test_peers_on_random_cases(peer: str, soak_figures: Callable[..., None]) -> None:
    seeds = range(100, 150)
    for seed in seeds:
        for case in PEER_CASES:
            if peer == "trl":
                check_trl(*case, seed)
            else:
                check_liger("reference", *case, seed)
    soak_figures(cases=len(seeds) * len(PEER_CASES))

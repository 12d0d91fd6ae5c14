"""preference_loss against the losses of TRL and Liger themselves: values, gradients, and the metrics TRL logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tulu_hpc.kernels import LossOutput, preference_loss

PAIRS, LENGTH, BETA = 4, 9, 0.3
CHOSEN_LENGTHS, REJECTED_LENGTHS = [5, 1, 8, 3], [2, 7, 4, 8]
LENGTHS = torch.tensor(CHOSEN_LENGTHS + REJECTED_LENGTHS)  # chosen first, as in TRL's batches
PAIR_TABLE = torch.stack([torch.arange(PAIRS), torch.arange(PAIRS, 2 * PAIRS)], 1)
MASK = torch.arange(LENGTH) < LENGTHS[:, None]


def tables(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Padded log-probs [2P, length], reference sums, and log sum p^2 of each token."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -2 * torch.rand(2 * PAIRS, LENGTH, generator=generator).double() * MASK
    reference = logprobs.sum(1) + torch.randn(2 * PAIRS, generator=generator).double()
    alignment = -torch.rand(2 * PAIRS, LENGTH, generator=generator).double() * MASK
    return logprobs, reference, alignment


def ours(padded: Tensor, reference: Tensor, pairs: Tensor = PAIR_TABLE, **options: Any) -> LossOutput:
    ids = torch.repeat_interleave(torch.arange(2 * PAIRS), LENGTHS)
    return preference_loss(padded[MASK], ids, reference, pairs, **{"beta": BETA, **options})


def same_gradient(found: Tensor, wanted: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    (a,), (b,) = torch.autograd.grad(found, x), torch.autograd.grad(wanted, x)
    torch.testing.assert_close(a[MASK], b[MASK], rtol=1e-6, atol=1e-7)


def trainer(**attributes: Any) -> SimpleNamespace:
    """What the loss methods of TRL's trainers read of `self`."""
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=BETA,
        label_smoothing=0.0,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def outputs(logprobs: Tensor, alignment: Tensor) -> SimpleNamespace:
    nothing = torch.zeros_like(logprobs).detach()
    return SimpleNamespace(
        log_probs=logprobs, log_sum_sq_probs=alignment, entropy=nothing, mean_logits=nothing, is_top1=nothing > 0
    )


def batch() -> dict[str, Tensor]:
    """One prompt token before each completion."""
    mask = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.bool), MASK], 1).long()
    return {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}


def trl_dpo(loss_type: str, x: Tensor, reference: Tensor, alignment: Tensor, smoothing: float, wpo: bool) -> Any:
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    self = trainer(
        ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0], use_weighting=wpo
    )
    self.label_smoothing = smoothing
    inputs = batch() | {"ref_chosen_logps": reference[:PAIRS], "ref_rejected_logps": reference[PAIRS:]}
    loss = dpo_trainer.DPOTrainer._compute_loss(self, lambda **_: outputs(x, alignment), inputs, False)
    return loss, {name: values[-1] for name, values in self._metrics["train"].items()}


TRL_CASES = [
    ("dpo", "sigmoid", 0.0, False),
    ("dpo", "sigmoid", 0.0, True),
    ("dpo_norm", "sigmoid_norm", 0.0, False),
    ("dpo_norm", "sigmoid_norm", 0.0, True),
    ("ipo", "ipo", 0.0, False),
    ("ipo", "ipo", 0.0, True),
    ("robust", "robust", 0.2, False),
    ("robust", "robust", 0.2, True),
    ("hinge", "hinge", 0.0, False),  # with weights TRL multiplies the hinge in place, which has no backward pass
]


def check_trl_dpo(kind: str, loss_type: str, smoothing: float, wpo: bool, seed: int) -> None:
    logprobs, reference, alignment = tables(seed)
    x = logprobs.requires_grad_()
    wanted, metrics = trl_dpo(loss_type, x, reference, alignment, smoothing, wpo)
    options = {"weighting": "wpo", "alignment_sums_Q": alignment.sum(1)} if wpo else {}
    found = ours(x, reference, kind=kind, label_smoothing=smoothing, **options)
    same_gradient(found.loss / PAIRS, wanted, x)
    names = ["logps/chosen", "logps/rejected"]
    if kind not in ("dpo_norm", "ipo"):  # TRL logs rewards of sums also for the losses on means
        names += ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    for name in names:
        assert float(found.metrics[name]) / PAIRS == pytest.approx(metrics[name], rel=1e-6), name


@pytest.mark.parametrize(("kind", "loss_type", "smoothing", "wpo"), TRL_CASES)
def test_trl_dpo(kind: str, loss_type: str, smoothing: float, wpo: bool) -> None:
    check_trl_dpo(kind, loss_type, smoothing, wpo, 3)


@pytest.mark.soak
def test_trl_dpo_on_random_cases(soak_figures: Callable[..., None]) -> None:
    seeds = range(100, 130)
    for seed in seeds:
        for case in TRL_CASES:
            check_trl_dpo(*case, seed)
    soak_figures(cases=len(seeds) * len(TRL_CASES))


def test_trl_label_smoothing() -> None:
    """TRL smooths labels in `aot`, which for a single pair is the smoothed sigmoid loss."""
    logprobs, reference, alignment = tables()
    x = logprobs.requires_grad_()
    wanted, found = torch.zeros(()), torch.zeros(())
    for pair in range(PAIRS):
        rows = [pair, PAIRS + pair]
        dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
        self = trainer(
            ld_alpha=None, f_divergence_type="reverse_kl", loss_types=["aot"], loss_weights=[1.0], use_weighting=False
        )
        self.label_smoothing = 0.1
        inputs = {name: table[rows] for name, table in batch().items()}
        inputs |= {"ref_chosen_logps": reference[rows[:1]], "ref_rejected_logps": reference[rows[1:]]}
        model = outputs(x[rows], alignment[rows])
        wanted = wanted + dpo_trainer.DPOTrainer._compute_loss(self, lambda model=model, **_: model, inputs, False)
    found = ours(x, reference, kind="cdpo", label_smoothing=0.1).loss
    same_gradient(found, wanted, x)


def test_trl_sft_term() -> None:
    """TRL's mean over tokens of the batch is ours with weights that undo the mean over each sequence's tokens."""
    logprobs, reference, alignment = tables()
    x = logprobs.requires_grad_()
    wanted, _ = trl_dpo("sft", x, reference, alignment, 0.0, False)
    tokens = torch.tensor(CHOSEN_LENGTHS).double()
    both = ours(x, reference, sft_weight=1.0, weights_P=tokens).loss - ours(x, reference, weights_P=tokens).loss
    same_gradient(both / tokens.sum(), wanted, x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trl_simpo(smoothing: float) -> None:
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    logprobs, reference, _ = tables()
    x = logprobs.requires_grad_()
    means = x.sum(1) / LENGTHS
    self = trainer(alpha=0.0, loss_type="simpo", simpo_gamma=0.5)
    self.label_smoothing = smoothing
    losses, chosen, _ = cpo_trainer.CPOTrainer.cpo_loss(self, means[:PAIRS], means[PAIRS:])
    found = ours(x, reference, kind="simpo", gamma=0.5, label_smoothing=smoothing)
    same_gradient(found.loss, losses.sum(), x)
    torch.testing.assert_close(found.metrics["rewards/chosen"], chosen.sum())


def test_trl_orpo() -> None:
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    logprobs, reference, _ = tables()
    x = logprobs.requires_grad_()
    means = x.sum(1) / LENGTHS
    ratios, chosen, *_ = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer(), means[:PAIRS], means[PAIRS:])
    found = ours(x, reference, kind="orpo")
    # TRL takes the odds in fp32.
    torch.testing.assert_close(found.loss.float(), (-ratios - means[:PAIRS]).sum().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.metrics["rewards/chosen"].float(), chosen.sum())
    same = ours(x, reference, kind="orpo", sft_weight=0.0).loss
    (a,), (b,) = torch.autograd.grad(same, x), torch.autograd.grad(-ratios.sum(), x)
    torch.testing.assert_close(a[MASK], b[MASK], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl_ratio", [0.4, -1.0])
def test_trl_kto(kl_ratio: float) -> None:
    """Every second sequence is desirable; the KL baseline is clamped at 0."""
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
    logprobs, reference, alignment = tables()
    x = logprobs.requires_grad_()
    label = torch.arange(2 * PAIRS) % 2 == 0
    self = trainer(
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda *_: reference + kl_ratio,
    )
    inputs = batch() | {"label": label, "ref_logps": reference, "ref_KL_logps": reference}
    wanted = kto_trainer.KTOTrainer._compute_loss(self, lambda **_: outputs(x, alignment), inputs, False)
    sequences, missing = torch.arange(2 * PAIRS), torch.full((2 * PAIRS,), -1)
    pairs = torch.stack([sequences.where(label, missing), sequences.where(~label, missing)], 1)
    found = ours(
        x, reference, pairs, kind="kto", kl=torch.tensor(kl_ratio), desirable_weight=1.5, undesirable_weight=0.5
    )
    same_gradient(found.loss / (2 * PAIRS), wanted, x)
    for side in ("chosen", "rejected"):
        count = float(found.metrics[f"counts/{side}"])
        assert count == PAIRS
        for name in (f"rewards/{side}", f"logps/{side}"):
            assert float(found.metrics[name]) / count == pytest.approx(self._metrics["train"][name][-1], rel=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "dpo_norm", "hinge", "robust", "simpo", "orpo"])
def test_liger_chunked_losses(kind: str) -> None:
    """From hidden states: Liger's fused linear preference losses (not compiled), gradients of hidden and weight."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    generator = torch.Generator().manual_seed(0)
    hidden_size, vocab = 16, 40
    hidden = torch.randn(2 * PAIRS, LENGTH, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=generator).mul(0.5).requires_grad_()
    target = torch.randint(0, vocab, (2 * PAIRS, LENGTH), generator=generator)
    reference_hidden = hidden.detach() + 0.1 * torch.randn(hidden.shape, generator=generator)
    lengths = LENGTHS.clone()
    if kind == "orpo":
        lengths[:PAIRS] = 6  # Liger's NLL is a mean over all chosen tokens: equal lengths make it a mean of means
    mask = torch.arange(LENGTH) < lengths[:, None]
    labels = target.where(mask, -100)
    if kind == "simpo":
        loss = chunked.LigerFusedLinearSimPOLoss(beta=BETA, gamma=0.5, compute_nll_loss=False, compiled=False)
    elif kind == "orpo":
        loss = chunked.LigerFusedLinearORPOLoss(beta=BETA, compiled=False)
    else:
        loss = chunked.LigerFusedLinearDPOLoss(
            beta=BETA,
            compiled=False,
            average_log_prob=kind == "dpo_norm",
            loss_type={"dpo": "sigmoid", "dpo_norm": "sigmoid"}.get(kind, kind),
            label_smoothing=0.2 if kind == "robust" else 0.0,
        )
    more = {"ref_input": reference_hidden, "ref_weight": weight.detach()} if kind not in ("simpo", "orpo") else {}
    wanted = loss(weight, hidden, labels, **more)[0]

    def logprobs(states: Tensor) -> Tensor:
        return (states[mask] @ weight.t()).log_softmax(-1).gather(1, target[mask][:, None])[:, 0]

    ids = torch.repeat_interleave(torch.arange(2 * PAIRS), lengths)
    reference = torch.zeros(2 * PAIRS).index_add(0, ids, logprobs(reference_hidden).detach())
    options = {"robust": {"label_smoothing": 0.2}, "simpo": {"gamma": 0.5}}.get(kind, {})
    found = preference_loss(logprobs(hidden), ids, reference, PAIR_TABLE, kind=kind, beta=BETA, **options).loss / PAIRS
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    gradients, wanted_gradients = (torch.autograd.grad(x, (hidden, weight)) for x in (found, wanted))
    for a, b in zip(gradients, wanted_gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_liger_kto() -> None:
    kto = pytest.importorskip("liger_kernel.chunked_loss.kto_loss")
    logprobs, reference, _ = tables()
    x = logprobs.requires_grad_()
    label = torch.arange(2 * PAIRS) < PAIRS
    wanted, chosen, rejected = kto.LigerFusedLinearKTOFunction.preference_loss_fn(
        x.sum(1), label, label, reference, beta=BETA, kl=torch.tensor(0.2)
    )
    found = ours(x, reference, kind="kto", kl=0.2)  # a pair counts as one desirable and one undesirable sequence
    same_gradient(found.loss / (2 * PAIRS), wanted, x)
    torch.testing.assert_close(found.metrics["rewards/chosen"], chosen.detach())
    torch.testing.assert_close(found.metrics["rewards/rejected"], rejected.detach())

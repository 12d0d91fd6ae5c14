"""Problems for the tests of linear_logprob, and the comparison with its definition in float64."""

import torch
from torch import Tensor

from tests.kernels.fuzz import note_error
from tulu_hpc.kernels import last_backend, linear_logprob
from tulu_hpc.kernels.linear_logprob.reference import linear_logprob_dense

BACKENDS = ["reference", "cpu"]


def problem(
    rows: int, hidden: int, vocab: int, targets: int, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator) * scale
    w = torch.randn(vocab, hidden, generator=generator)
    target = torch.randint(0, vocab, (targets,), generator=generator)
    row = torch.randint(0, max(rows, 1), (targets,), generator=generator)
    return h, w, target, row


def values_and_gradients(function, h, w, grads, **arguments):
    """(logprobs, entropy, dh, dw) in float64."""
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    logprobs, entropy = function(h, w, **arguments)
    loss = (logprobs * grads[0].to(logprobs.dtype)).sum() + (entropy * grads[1].to(entropy.dtype)).sum()
    dh, dw = torch.autograd.grad(loss, (h, w))
    return [x.detach().double() for x in (logprobs, entropy, dh, dw)]


def compare(h, w, target, row=None, *, backend, tolerance, seed=7, **arguments):
    """Ours on fp32 copies against the definition in fp64; gradients relative to their largest element."""
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(2, len(target), generator=generator)
    buffer = arguments.pop("max_buffer_bytes", None)
    ours = values_and_gradients(
        lambda a, b, **kw: linear_logprob(
            a, b, target, row_K=row, return_entropy=True, backend=backend, max_buffer_bytes=buffer, **kw
        ),
        h,
        w,
        grads,
        **arguments,
    )
    oracle = values_and_gradients(
        lambda a, b, **kw: linear_logprob_dense(a, b, target, row, **kw), h.double(), w.double(), grads, **arguments
    )
    assert last_backend("linear_logprob") == backend
    for name, mine, want in zip(("logprobs", "entropy", "d hidden", "d weight"), ours, oracle):
        bound = tolerance * max(1.0, float(want.abs().max()) if want.numel() else 0.0)
        error = float((mine - want).abs().max()) if want.numel() else 0.0
        note_error(tolerance * error / bound)
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
    return ours


def sorted_by_row(h, w, target, row):
    """Arguments of the op: rows to use, targets in row order."""
    row, order = row.sort(stable=True)
    rows, counts = row.unique_consecutive(return_counts=True)
    return h, w, target[order], torch.nn.functional.pad(counts.cumsum(0), (1, 0)), rows

"""batch_invariant: bitwise the same log-prob whatever else is in the call."""

import pytest
import torch
from torch import Tensor

from tests.kernels.linear_logprob_cases import BACKENDS, problem, values_and_gradients
from tulu_hpc.kernels import BackendError, last_backend, linear_logprob
from tulu_hpc.kernels.linear_logprob.cpu import CpuRows
from tulu_hpc.kernels.linear_logprob.reference import linear_logprob_dense


def _some_rows(rows: int, generator: torch.Generator) -> Tensor:
    count = int(torch.randint(1, rows + 1, (1,), generator=generator))
    return torch.randint(0, rows, (count,), generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden, vocab", [(5, 7), (16, 70), (33, 1001), (64, 4200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariance_is_bitwise(backend, hidden, vocab, dtype):
    """A row alone, and in calls of every size and order, with other targets, ignored rows and buffers."""
    rows = 70 if backend == "cpu" else 9
    h, w, target, _ = problem(rows, hidden, vocab, rows)
    h, w = h.to(dtype), w.to(dtype)
    options = {"return_entropy": True, "batch_invariant": True, "backend": backend, "temperature": 0.9}
    whole = linear_logprob(h, w, target, **options)
    assert last_backend("linear_logprob") == backend
    oracle, _ = linear_logprob_dense(h.double(), w.double(), target, temperature=0.9)
    torch.testing.assert_close(whole.logprobs_K.double(), oracle, rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(vocab)

    def check(choice: Tensor, **changes) -> None:
        some = linear_logprob(h[choice], w, target[choice], **options, **changes)
        assert torch.equal(some.logprobs_K, whole.logprobs_K[choice])
        assert some.entropy_K is not None and torch.equal(some.entropy_K, whole.entropy_K[choice])

    for row in (0, 1, rows - 1):
        check(torch.tensor([row]))
    for count in range(1, rows + 1, 7 if backend == "cpu" else 1):
        check(torch.arange(count))
    for _ in range(6):
        check(_some_rows(rows, generator), max_buffer_bytes=2 * 2**20)
    check(torch.randperm(rows, generator=generator))
    # Other targets on the same rows, one of them ignored; kept logits.
    order = torch.randint(0, rows, (2 * rows,), generator=generator)
    ids = target[order].index_fill(0, torch.tensor([0]), -100)
    mixed = linear_logprob(h.clone().requires_grad_(), w, ids, row_K=order, **options)
    assert torch.equal(mixed.logprobs_K[1:], whole.logprobs_K[order][1:]) and not mixed.logprobs_K[0].any()


def test_batch_invariance_does_not_depend_on_the_data_of_the_other_rows():
    h, w, target, _ = problem(64, 48, 500, 64)
    alone = linear_logprob(h[3:4], w, target[3:4], batch_invariant=True, backend="cpu").logprobs_K
    h[:3], h[4:] = 1e4, -1e4
    among = linear_logprob(h, w, target, batch_invariant=True, backend="cpu").logprobs_K
    assert torch.equal(among[3:4], alone)


def test_batch_invariant_gradients_are_right():
    h, w, target, row = problem(6, 5, 70, 9)
    generator = torch.Generator().manual_seed(7)
    grads = torch.randn(2, 9, generator=generator)
    for backend in BACKENDS:
        for buffer in (None, 48000):
            mine, oracle = (
                values_and_gradients(function, x, y, grads)
                for function, x, y in (
                    (
                        lambda a, b, backend=backend, buffer=buffer: linear_logprob(
                            a,
                            b,
                            target,
                            row_K=row,
                            return_entropy=True,
                            batch_invariant=True,
                            backend=backend,
                            max_buffer_bytes=buffer,
                        ),
                        h,
                        w,
                    ),
                    (lambda a, b: linear_logprob_dense(a, b, target, row), h.double(), w.double()),
                )
            )
            torch.testing.assert_close(mine, oracle, rtol=1e-4, atol=1e-5)


def test_batch_invariance_that_cannot_be_kept_is_refused(monkeypatch):
    h, w, target, _ = problem(4, 3, 9, 4)
    # A block of 64 x 64, both operands padded to a width of 16, and what is held per row.
    least = 4 * (64 * 64 + 2 * 64 * 16 + 16 * 4)
    message = f"batch_invariant needs max_buffer_bytes of {least} at least, got {least - 1}"
    with pytest.raises(ValueError, match=message):
        linear_logprob(h, w, target, batch_invariant=True, max_buffer_bytes=least - 1)
    linear_logprob(h, w, target, batch_invariant=True, max_buffer_bytes=least)
    monkeypatch.setattr(CpuRows, "invariant_rows", None)
    with pytest.raises(BackendError, match="'cpu' offers no batch_invariant"):
        linear_logprob(h, w, target, batch_invariant=True)

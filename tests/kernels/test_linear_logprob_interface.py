"""linear_logprob as a torch op: opcheck, torch.compile, errors, choice of backend."""

import pytest
import torch

from tests.kernels.linear_logprob_cases import BACKENDS, problem, sorted_by_row
from tulu_hpc.kernels import BackendError, available_backends, last_backend, linear_logprob


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("buffer", "batch_invariant"), [(2**20, False), (4 * 7, False), (40000, True), (2**20, True)])
def test_opcheck(backend, buffer, batch_invariant):
    h, w, target, row = problem(5, 4, 30, 9)
    row[row == 2] = 3  # a row that is not used
    arguments = sorted_by_row(h.requires_grad_(), w.requires_grad_(), target, row)
    settings = (1.0, 0.0, 0, buffer, backend, "", False)
    torch.library.opcheck(
        torch.ops.tulu_hpc.linear_logprob_stats.default, (*arguments, *settings, True, batch_invariant)
    )
    with torch.no_grad():
        stats, kept, gathered = torch.ops.tulu_hpc.linear_logprob_stats(*arguments, *settings, True, batch_invariant)
        arguments = tuple(x.detach() for x in arguments)
        torch.library.opcheck(
            torch.ops.tulu_hpc.linear_logprob_stats_backward.default,
            (torch.randn_like(stats), stats, kept, gathered, *arguments, *settings, True, True),
        )


@pytest.mark.parametrize("with_rows", [False, True])
def test_compiles_without_graph_breaks(with_rows):
    h, w, target, row = problem(9, 4, 30, 9)
    target[3] = -100
    row = row if with_rows else None

    def loss(a, b):
        out = linear_logprob(a, b, target, row_K=row, return_entropy=True)
        return out.logprobs_K.sum() + 0.3 * out.entropy_K.sum()

    h, w = h.requires_grad_(), w.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h, w), loss(h, w))
    mine = torch.autograd.grad(compiled(h, w), (h, w))
    torch.testing.assert_close(mine, torch.autograd.grad(loss(h, w), (h, w)), rtol=1e-5, atol=1e-6)


def test_errors_name_what_is_wrong():
    h, w, target, _ = problem(4, 3, 9, 4)
    with pytest.raises(ValueError, match=r"\[T, H\]"):
        linear_logprob(h, w[:, :2], target)
    with pytest.raises(TypeError, match="float16"):
        linear_logprob(h.half(), w.half(), target)
    with pytest.raises(TypeError, match="both"):
        linear_logprob(h, w.double(), target)
    with pytest.raises(TypeError, match="int64"):
        linear_logprob(h, w, target.int())
    with pytest.raises(ValueError, match="on one device"):
        linear_logprob(h, w.to("meta"), target)
    with pytest.raises(TypeError, match="row_K"):
        linear_logprob(h, w, target, row_K=target[:2])
    with pytest.raises(ValueError, match="give row_K"):
        linear_logprob(h, w, target[:3])
    with pytest.raises(ValueError, match=r"row_K holds .*4"):
        linear_logprob(h, w, target, row_K=torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="target 9 lies outside"):
        linear_logprob(h, w, torch.tensor([0, 1, 9, 3]))
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(h, w, target, temperature=0.0)
    with pytest.raises(ValueError, match="does not hold one logit"):
        linear_logprob(h, w, target, max_buffer_bytes=2)
    with pytest.raises(BackendError, match="no backend 'tritone'"):
        linear_logprob(h, w, target, backend="tritone")
    with pytest.raises(BackendError, match="float64"):
        linear_logprob(h.double(), w.double(), target, backend="cpu")
    if available_backends("linear_logprob")["cuda"] != "usable":
        with pytest.raises(BackendError, match="CUDA"):
            linear_logprob(h, w, target, backend="cuda")


def test_backend_can_be_set_by_environment(monkeypatch):
    h, w, target, _ = problem(4, 3, 9, 4)
    linear_logprob(h, w, target)
    assert last_backend("linear_logprob") == "cpu"
    monkeypatch.setenv("TULU_HPC_LINEAR_LOGPROB_BACKEND", "reference")
    linear_logprob(h, w, target)
    assert last_backend("linear_logprob") == "reference"

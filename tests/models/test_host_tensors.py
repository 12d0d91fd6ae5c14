"""Memory of large host tensors: values, shapes, and that it goes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tulu_hpc.models.host_tensors import host_empty


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (1025, 2049)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_holds_what_is_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if 0 in shape:
        assert host_empty(shape, dtype).shape == shape
        return
    values = torch.randn(shape).to(dtype)
    tensor = host_empty(shape, dtype)
    tensor.copy_(values)
    assert tensor.dtype == dtype and tensor.shape == shape and torch.equal(tensor, values)


def test_memory_goes_back_with_the_last_view() -> None:
    size = 64 << 20
    before = _anonymous()
    tensor = host_empty((size,), torch.uint8).fill_(1)
    view = tensor[:10]
    del tensor
    assert _anonymous() - before > 0.9 * size and view.eq(1).all()
    del view
    assert _anonymous() - before < 0.1 * size


def _anonymous() -> int:
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(found.split()[1]) << 10

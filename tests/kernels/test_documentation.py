"""The example of docs/kernels.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_the_example_runs() -> None:
    match = re.search(r"<!-- example -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert match is not None
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(match[1], names)
    hidden, head, metrics = names["hidden"], names["head"], names["metrics"]
    assert isinstance(hidden, torch.Tensor) and hidden.grad is not None and isinstance(head, torch.Tensor)
    assert head.grad is not None and bool(hidden.grad[[3, 4, 5, 7]].any(1).all())
    assert not hidden.grad[[0, 1, 2, 6, 8]].any()  # rows that predict nothing
    assert isinstance(metrics, dict) and "rewards/margins" in metrics

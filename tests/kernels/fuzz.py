"""More examples for the body of a hypothesis test, and the largest error that its comparisons saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

_errors: list[float] = []


def close(found: Tensor, wanted: Tensor, **options: Any) -> None:
    """`torch.testing.assert_close` to a float64 oracle; notes the largest error, relative where that is above 1.

    Places that are not finite are the same in both once the assertion holds, and have no error to note.
    """
    torch.testing.assert_close(found, wanted, **options)
    finite = wanted.detach().isfinite()
    if finite.any():
        wanted = wanted.detach()[finite]
        error = float((found.detach()[finite].double() - wanted).abs().max())
        note_error(error / max(1.0, float(wanted.abs().max())))


def note_error(error: float) -> None:
    """For comparisons of their own."""
    _errors[:] = [max([error, *_errors])]


@contextmanager
def worst_error() -> Iterator[Callable[[], float]]:
    """Gives a function that returns the largest error noted in the block so far.

    Raises (from that function):
        IndexError: none was noted.
    """
    _errors.clear()
    yield lambda: _errors[0]


def fuzz(test: Callable[..., None], examples: int, **fixed: Any) -> dict[str, Any]:
    """Runs the body of `test` on random examples of its own strategies; `fixed`: its other arguments.

    Without shrinking: a failure names its example. Returns `cases`, how many ran, and `worst`, the largest error noted.
    """
    handle = test.hypothesis  # type: ignore[attr-defined]
    ran = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.fixed_dictionaries(handle._given_kwargs))  # hypothesis keeps them nowhere else
    def run(drawn: dict[str, Any]) -> None:
        nonlocal ran
        handle.inner_test(**drawn, **fixed)
        ran += 1

    with worst_error() as worst:
        run()
        return {"cases": ran, "worst": worst()}

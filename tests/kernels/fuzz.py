"""More examples for the body of a hypothesis test."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


def fuzz(test: Callable[..., None], examples: int, **fixed: Any) -> int:
    """Runs the body of `test` on random examples of its own strategies; `fixed`: its other arguments. Returns how many.

    Without shrinking: a failure names its example.
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

    run()
    return ran

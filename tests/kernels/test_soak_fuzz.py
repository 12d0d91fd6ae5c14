"""Full counts of the random comparisons with the fp64 references: the bodies of the normal tests on more examples.

Triton kernels run in the interpreter where there is no GPU: fewer examples, at the small shapes of those tests.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.kernels import (
    test_gae,
    test_linear_logprob,
    test_linear_logprob_triton,
    test_packed_attention,
    test_packed_attention_triton,
    test_policy_loss,
    test_preference_loss,
    test_rope,
    test_value_loss,
)
from tests.kernels.fuzz import fuzz, worst_error

small_tiles = test_packed_attention_triton.small_tiles  # the fixture

BACKENDS = {
    "linear_logprob": (test_linear_logprob.test_against_the_definition, {"cpu": 1500, "reference": 1000}),
    "packed_attention": (test_packed_attention.test_against_the_definition, {"cpu": 1500, "reference": 1000}),
    "policy_loss": (test_policy_loss.test_backends_against_the_reference, {"cpu": 2000, "triton": 200}),
    "value_loss": (test_value_loss.test_backends_against_the_reference, {"cpu": 2000, "triton": 200}),
    "gae": (test_gae.test_backends_against_the_reference, {"cpu": 2000, "triton": 200}),
    "rope": (test_rope.test_against_the_definition, {"reference": 2000, "triton": 200}),
}
CASES = [(op, backend, examples) for op, (_, found) in BACKENDS.items() for backend, examples in found.items()]


def run(test: Callable[..., None], examples: int, note: Callable[..., None], **fixed: Any) -> None:
    found = fuzz(test, examples, **fixed)
    assert found["cases"] >= examples
    note(**found)


@pytest.mark.soak
@pytest.mark.parametrize(("op", "backend", "examples"), CASES)
def test_fuzz(op: str, backend: str, examples: int, soak_figures: Callable[..., None]) -> None:
    run(BACKENDS[op][0], examples, soak_figures, backend=backend)


@pytest.mark.soak
def test_linear_logprob_triton_fuzz(soak_figures: Callable[..., None]) -> None:
    run(test_linear_logprob_triton.test_against_the_definition, 200, soak_figures)


@pytest.mark.soak
def test_packed_attention_triton_fuzz(small_tiles: None, soak_figures: Callable[..., None]) -> None:
    run(test_packed_attention_triton.test_against_the_definition, 100, soak_figures)


@pytest.mark.soak
@pytest.mark.parametrize(("backend", "examples"), [("cpu", 2000), ("triton", 200)])
def test_preference_loss_fuzz(backend: str, examples: int, soak_figures: Callable[..., None]) -> None:
    with worst_error() as worst:
        ran = test_preference_loss.random_cases(backend, examples)
    assert ran >= examples
    soak_figures(cases=ran, worst=worst())


@pytest.mark.parametrize(("op", "backend"), [(op, backend) for op, backend, _ in CASES])
def test_the_harness_measures(op: str, backend: str) -> None:
    """Two examples of each: they run, on the backend named, and an error is noted."""
    found = fuzz(BACKENDS[op][0], 2, backend=backend)
    assert found["cases"] >= 2 and 0 <= found["worst"] < 0.05

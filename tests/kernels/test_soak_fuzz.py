"""Full counts of the random comparisons with the fp64 references: the bodies of the normal tests on more examples."""

import pytest

from tests.kernels import (
    test_gae,
    test_linear_logprob,
    test_linear_logprob_triton,
    test_packed_attention,
    test_packed_attention_triton,
    test_policy_loss,
    test_preference_loss,
)
from tests.kernels.fuzz import fuzz

small_tiles = test_packed_attention_triton.small_tiles  # the fixture


@pytest.mark.soak
@pytest.mark.parametrize(("backend", "examples"), [("cpu", 1500), ("reference", 1000)])
def test_linear_logprob_fuzz(backend, examples, soak_figures):
    ran = fuzz(test_linear_logprob.test_against_the_definition, examples, backend=backend)
    assert ran >= examples
    soak_figures(cases=ran)


@pytest.mark.soak
def test_linear_logprob_triton_fuzz(soak_figures):
    ran = fuzz(test_linear_logprob_triton.test_against_the_definition, 200)
    assert ran >= 200
    soak_figures(cases=ran)


@pytest.mark.soak
@pytest.mark.parametrize(("backend", "examples"), [("cpu", 1500), ("reference", 1000)])
def test_packed_attention_fuzz(backend, examples, soak_figures):
    ran = fuzz(test_packed_attention.test_against_the_definition, examples, backend=backend)
    assert ran >= examples
    soak_figures(cases=ran)


@pytest.mark.soak
def test_packed_attention_triton_fuzz(small_tiles, soak_figures):
    ran = fuzz(test_packed_attention_triton.test_against_the_definition, 100)
    assert ran >= 100
    soak_figures(cases=ran)


@pytest.mark.soak
@pytest.mark.parametrize(("backend", "examples"), [("cpu", 2000), ("triton", 200)])
def test_preference_loss_fuzz(backend, examples, soak_figures):
    ran = test_preference_loss.random_cases(backend, examples)
    assert ran >= examples
    soak_figures(cases=ran)


@pytest.mark.soak
@pytest.mark.parametrize(("backend", "examples"), [("cpu", 2000), ("triton", 200)])
def test_policy_loss_fuzz(backend, examples, soak_figures):
    ran = fuzz(test_policy_loss.test_backends_against_the_reference, examples, backend=backend)
    assert ran >= examples
    soak_figures(cases=ran)


@pytest.mark.soak
@pytest.mark.parametrize(("backend", "examples"), [("cpu", 2000), ("triton", 200)])
def test_gae_fuzz(backend, examples, soak_figures):
    ran = fuzz(test_gae.test_backends_against_the_reference, examples, backend=backend)
    assert ran >= examples
    soak_figures(cases=ran)

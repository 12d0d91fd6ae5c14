"""Verbs are called in the test process here; what they start must not reach the tests that come after."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A verb that fails after it joined its group leaves the group to the end of the process."""
    yield
    if "tulu_hpc.parallel.layout" in sys.modules:
        sys.modules["tulu_hpc.parallel.layout"].destroy()

"""Triton's interpreter is chosen before triton is imported anywhere; with a GPU its kernels run on that instead."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.soak import write_summary

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

Figures = dict[str, str | int | float]
SOAKED = pytest.StashKey[dict[str, Figures]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-summary", metavar="FILE", help="write what passed on which GPU (tests/gpu) as JSON")
    parser.addoption("--soak-summary", metavar="FILE", help="write the figures of the tests marked soak as JSON")


@pytest.fixture(autouse=True)
def _torch_settings() -> Iterator[None]:
    """A stage that runs in the test process sets threads and determinism; the next test must not inherit them."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SOAKED] = {}


@pytest.fixture
def soak_figures(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`soak_figures(cases=60, worst=3e-6)` notes what a soak test did; call it after the last assertion."""

    def note(**figures: str | int | float) -> None:
        request.config.stash[SOAKED][request.node.nodeid] = figures

    return note


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--soak-summary", None)
    if path:
        write_summary(Path(path), session.config.stash[SOAKED])

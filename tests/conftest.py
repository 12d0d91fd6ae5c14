"""Triton's interpreter is chosen before triton is imported anywhere; with a GPU its kernels run on that instead."""

import os
from collections.abc import Callable
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

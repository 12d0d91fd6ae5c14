"""Triton's interpreter is chosen before triton is imported anywhere; with a GPU its kernels run on that instead."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-summary", metavar="FILE", help="write what passed on which GPU (tests/gpu) as JSON")

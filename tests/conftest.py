"""Triton's interpreter is chosen before triton is imported anywhere; with a GPU its kernels run on that instead."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

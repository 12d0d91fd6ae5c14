"""Stands in for Transformer Engine 2.20.2 on a machine without CUDA: its constructors' arguments around plain torch.

megatron-core's own wrappers run on it, with tensor and sequence parallelism. It proves nothing about the real layers'
kernels, fp8 or communication overlap.
"""

from transformer_engine import common, pytorch

__version__ = "2.20.2"
__all__ = ["common", "pytorch"]

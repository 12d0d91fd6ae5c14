"""Tulu 3 post-training on megatron-core, with fused kernels."""

__version__ = "0.1.0"

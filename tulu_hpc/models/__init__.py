"""Llama on megatron-core: model, Hugging Face conversion, initialisation, decoding with a key/value cache."""

import tulu_hpc.parallel  # noqa: F401  prepares megatron-core where there is no CUDA; must precede its import

"""Builds the model of one rank: the only place that knows megatron's GPTModel and its configuration."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models import cpu_linear
from tulu_hpc.models.attention import CoreAttention, LlamaAttention
from tulu_hpc.models.llama import Llama
from tulu_hpc.models.norm import RMSNorm
from tulu_hpc.models.scalar_head import Head
from tulu_hpc.models.transformer_engine import (
    TransformerEngineOptions,
    check_device,
    config_options,
    layers,
    start_overlap,
)
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups, Layout, LayoutError

Recompute = Literal["none", "selective", "full"]


def padded_vocab(vocab_size: int, tensor: int, multiple: int = 1) -> int:
    """Rows of the embedding and head: `vocab_size` rounded up to a multiple of `multiple * tensor`."""
    step = multiple * tensor
    return (vocab_size + step - 1) // step * step


def local_heads(architecture: Architecture, layout: Layout) -> tuple[int, int]:
    """Query heads and key/value heads of one tensor-parallel rank."""
    check_layout(architecture, layout)
    return architecture.num_attention_heads // layout.tensor, architecture.num_key_value_heads // layout.tensor


def check_layout(architecture: Architecture, layout: Layout) -> None:
    """Refuse a layout that the model cannot be split by.

    Raises:
        LayoutError: naming the key, the model's number and what would fit.
    """
    tensor, kv_heads = layout.tensor, architecture.num_key_value_heads
    if tensor > kv_heads:
        raise LayoutError(
            f"parallel.tensor = {tensor} is more than the model's {kv_heads} key/value heads: a head cannot be split. "
            f"Use parallel.tensor <= {kv_heads} and more parallel.pipeline, parallel.context or data parallelism"
        )
    for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
        if getattr(architecture, name) % tensor:
            raise LayoutError(f"parallel.tensor = {tensor} does not divide {name} = {getattr(architecture, name)}")
    layers_per_chunk(architecture, layout)


def layers_per_chunk(architecture: Architecture, layout: Layout) -> list[list[int]]:
    """Numbers of layers [stage][chunk] of the pipeline.

    Raises:
        LayoutError: the layers cannot be dealt evenly.
    """
    stages, chunks = layout.pipeline, layout.virtual_pipeline or 1
    first, last = layout.first_stage_layers, layout.last_stage_layers
    if (first is not None or last is not None) and (layout.account_for_embedding or layout.account_for_loss):
        raise LayoutError("give either account_for_* or explicit layers of the first and last stage, not both")
    left, even = architecture.num_hidden_layers, stages
    for fixed in (first, last):
        if fixed is not None:
            left, even = left - fixed, even - 1
    left += int(layout.account_for_embedding) + int(layout.account_for_loss)
    if left < 0 or even < 0 or (even == 0 and left) or (even and left % even):
        raise LayoutError(
            f"{architecture.num_hidden_layers} layers cannot be dealt evenly to parallel.pipeline = {stages} stages "
            f"(counting embedding {layout.account_for_embedding}, head {layout.account_for_loss}; "
            f"first {first}, last {last})"
        )
    if even and not left:
        raise LayoutError(
            f"parallel.first_stage_layers = {first} and last_stage_layers = {last} leave no layer of "
            f"{architecture.num_hidden_layers} to the other {even} of {stages} stages"
        )
    per_stage = [left // even if even else 0] * stages
    if first is not None:
        per_stage[0] = first
    if last is not None:
        per_stage[-1] = last
    if any(n % chunks for n in per_stage):
        raise LayoutError(f"stages of {per_stage} layers do not divide into virtual_pipeline = {chunks} chunks")
    counts = [[n // chunks] * chunks for n in per_stage]
    counts[0][0] -= int(layout.account_for_embedding)
    counts[-1][-1] -= int(layout.account_for_loss)
    if counts[0][0] < 0 or counts[-1][-1] < 0:
        raise LayoutError("a stage would have fewer than zero layers; use fewer pipeline stages or chunks")
    return counts


def transformer_config(
    architecture: Architecture,
    layout: Layout,
    *,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    deterministic: bool = False,
    on_cpu: bool = True,
    transformer_engine: TransformerEngineOptions | None = None,
) -> TransformerConfig:
    """megatron's configuration of this model: no fusions that need apex or Transformer Engine, variable row counts."""
    options: dict[str, Any] = {} if transformer_engine is None else config_options(transformer_engine)
    first, last = layout.first_stage_layers, layout.last_stage_layers
    if layout.pipeline == 2 and first is not None:
        last = None  # it follows; megatron divides by the number of stages in between
    if recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        options |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        account_for_embedding_in_pipeline_split=layout.account_for_embedding,
        account_for_loss_in_pipeline_split=layout.account_for_loss,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode=deterministic,
        perform_initialization=False,  # weights are always loaded
        use_cpu_initialization=on_cpu,
        calculate_per_token_loss=True,  # gradients are sums; normalisation happens in the loss
        variable_seq_lengths=True,  # packs differ in rows, also between pipeline stages
        moe_token_dispatcher_type="alltoall",  # demanded by the line above, even for a dense model
        **options,
    )


def build_model(
    architecture: Architecture,
    groups: Groups,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    vocab_multiple: int = 1,
    logprob_buffer_bytes: int | None = None,
    device: torch.device | str | None = None,
    deterministic: bool = False,
    transformer_engine: TransformerEngineOptions | None = None,
    fp32_head: bool = False,
    head: Head = "logprobs",
) -> list[Llama]:
    """The model chunks of this rank, one per virtual pipeline stage, weights NOT initialised (`convert.load_hf`).

    Args:
        architecture: of the whole model.
        groups: of this process; a fake process group will do.
        dtype: of parameters and activations.
        recompute: `selective` recomputes attention in the backward pass, `full` whole layers.
        vocab_multiple: see `padded_vocab`.
        logprob_buffer_bytes: largest buffer of logits; None: the kernel's default.
        device: None: this process's device; "meta": shapes only.
        deterministic: only deterministic kernels inside megatron.
        transformer_engine: use its linear layers and norms, in this way; None: megatron's and ours.
        fp32_head: hold the LM head in fp32 (and compute log-probs and logits with it) whatever `dtype` is.
        head: `value` gives a scalar head (reward and value models) instead of the vocabulary.

    Raises:
        LayoutError: the model cannot be split this way.
        LayerSpecError: Transformer Engine cannot be imported, or the device is a CPU.
    """
    layout = groups.layout
    check_layout(architecture, layout)
    device = default_device() if device is None else torch.device(device)
    config = transformer_config(
        architecture,
        layout,
        dtype=dtype,
        recompute=recompute,
        deterministic=deterministic,
        on_cpu=device.type != "cuda",
        transformer_engine=transformer_engine,
    )
    if transformer_engine is not None and device.type == "meta":  # these layers are given their device
        config.use_cpu_initialization, config.init_model_with_meta_device = False, True
    split = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    split |= {cpu_linear.CpuColumnLinear: 0, cpu_linear.CpuRowLinear: 1, cpu_linear.CpuGatedRowLinear: 1}
    norm: type = RMSNorm
    if transformer_engine is None:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        if cpu_linear.available(device, dtype):
            mlp, attention = layer.submodules.mlp, layer.submodules.self_attention.submodules
            mlp.module, mlp.params = cpu_linear.CpuMLP, {"tp_group": groups.pg.tp}
            mlp.submodules.linear_fc1 = attention.linear_qkv = cpu_linear.CpuColumnLinear
            mlp.submodules.linear_fc2, attention.linear_proj = cpu_linear.CpuGatedRowLinear, cpu_linear.CpuRowLinear
    else:
        layer, norm, theirs = layers()
        split |= theirs
        check_device(device)
        if device.type == "cuda":
            start_overlap(transformer_engine, architecture.hidden_size, layout.tensor, dtype)
    parts = layer.submodules
    parts.self_attention.module = LlamaAttention
    parts.self_attention.submodules.core_attention = CoreAttention
    chunks = []
    last = (layout.virtual_pipeline or 1) - 1
    for index in range(last + 1):
        vp_stage = index if layout.virtual_pipeline else None
        count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=groups.pp_rank)
        with torch.device(device):
            chunk = Llama(
                config,
                TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm),
                vocab_size=padded_vocab(architecture.vocab_size, layout.tensor, vocab_multiple),
                max_sequence_length=architecture.max_position_embeddings,
                pre_process=groups.is_first_stage and index == 0,
                post_process=groups.is_last_stage and index == last,
                position_embedding_type="none",  # Llama rotates by position id itself
                share_embeddings_and_output_weights=architecture.tie_word_embeddings and head == "logprobs",
                parallel_output=True,
                pg_collection=groups.pg,
                vp_stage=vp_stage,
            )
            if head == "value":
                chunk.use_scalar_head()
        _mark_split_weights(chunk, split)
        chunk.finish(architecture, logprob_buffer_bytes)
        if fp32_head and head == "logprobs":
            chunk.keep_head_in_fp32()
        chunks.append(chunk)
    return chunks


def _mark_split_weights(chunk: torch.nn.Module, dimensions: dict[type, int]) -> None:
    """Mark the weights that tensor-parallel ranks split.

    megatron does so only while it initialises weights; without the mark the gradient norm counts them on the first
    tensor-parallel rank alone.
    """
    for module in chunk.modules():
        dimension = dimensions.get(type(module))
        weight: Any = getattr(module, "weight", None)
        if dimension is not None and weight is not None:
            weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dimension, 1


def unwrap(chunk: torch.nn.Module) -> Llama:
    """The Llama inside megatron's wrappers (DistributedDataParallel, Float16Module)."""
    inner: Any = chunk
    while not isinstance(inner, Llama):
        inner = inner.module
    return inner

"""Bytes that one rank needs, by pipeline stage.

What is counted: tensors (weights, gradient buffers, optimizer state, what the forward pass saves for the backward pass,
and the largest temporaries of the backward pass). What is not: CUDA context, NCCL buffers, allocator fragmentation; see
`hardware.RESERVED_BYTES`.

Symbols: T rows of a pack on one context-parallel rank, H hidden, F intermediate, N query heads, Nk key/value heads, D
head dim, V vocabulary rows, t tensor ranks, d ranks that share the optimizer state (data x context).

Weights, gradients, optimizer state per parameter: 2 + 4 + 12/d bytes in bfloat16 with fp32 gradients and the
distributed optimizer (fp32 master, two moments); 4 + 4 + 8/d in float32, which needs no master. SGD has one moment.

Saved per layer and row, in elements, by the layer as built in `models/` (measured in tests/planner):
    residual stream    2 norm inputs and 2 norm outputs: 4H; 2H more where the norm is not fused (CPU)
    attention          fused projection (N + 2Nk)D (v is a view of it), rotated (N + Nk)D, output ND, all / t
    MLP                projection 2F, silu(gate), up, their product: 5F / t
Sequence parallelism divides the residual stream by t too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.kernels.linear_logprob.buffers import extra_bytes
from tulu_hpc.models.build import Recompute, check_layout, layers_per_chunk, padded_vocab
from tulu_hpc.models.scalar_head import Head
from tulu_hpc.parallel.layout import Layout


@dataclass(frozen=True)
class Workload:
    """What is trained, and how.

    Attributes:
        rows: of a pack (micro-batch), before the context-parallel split.
        micro_batches: packs per step and replica; bounds how many a pipeline stage holds. None: enough to fill it.
        scored: share of the rows whose hidden states reach the head.
        dtype_bytes, gradient_bytes: per element.
        moments: fp32 numbers per parameter that the optimizer keeps, beside masters: 2 for AdamW, 1 for SGD.
        data: data-parallel replicas.
        fused_norm: the norm saves its input only (CUDA), not also the normalised rows (CPU). An fp32 model without it
            has the CPU's linear layers, whose MLP makes its activation again.
        resident_copies: further copies of the weights (a reference policy).
        cache_tokens: tokens of the rollout engine's key/value cache on one replica.
        fp32_head: the head (tied: the embedding too) is fp32: 4 + 4 + 8/d bytes per parameter.
        head: `value`: one number per row instead of the vocabulary.
        value: a value model beside it, on the same ranks at a layout of its own; the two take turns.
    """

    architecture: Architecture
    layout: Layout
    data: int
    rows: int
    dtype_bytes: int = 2
    gradient_bytes: int = 4
    distributed_optimizer: bool = True
    moments: int = 2
    recompute: Recompute = "none"
    vocab_multiple: int = 1
    logprob_buffer_bytes: int = 256 * 2**20
    micro_batches: int | None = None
    scored: float = 1.0
    fused_norm: bool = True
    resident_copies: int = 0
    cache_tokens: int = 0
    fp32_head: bool = False
    head: Head = "logprobs"
    value: Workload | None = None


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage; `layers` per virtual chunk, `in_flight` micro-batches whose activations live.

    `value` is the state of a value model, `value_peak` what it needs on top while it is trained; both of its worst
    stage, since its ranks meet the policy's in any combination.
    """

    stage: int
    layers: tuple[int, ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    logits: int
    cache: int
    in_flight: float
    value: int = 0
    value_peak: int = 0

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer state: what stays between steps."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.value

    @property
    def total(self) -> int:
        """Peak: training, that of the value model, and generation take turns."""
        return self.states + max(self.activations + self.logits, self.cache, self.value_peak)

    def terms(self) -> dict[str, int]:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "reference": self.reference,
            "value model": self.value,
            "activations": self.activations,
            "logits": self.logits,
            "kv cache": self.cache,
            "value activations": self.value_peak,
        }


def plan_memory(work: Workload) -> list[StageMemory]:
    """Memory of one rank of every pipeline stage.

    Raises:
        LayoutError: the model cannot be split this way.
    """
    check_layout(work.architecture, work.layout)
    stages = [_stage(work, stage) for stage in range(work.layout.pipeline)]
    if work.value is None:
        return stages
    beside = plan_memory(work.value)
    states, peak = max(each.states for each in beside), max(each.total - each.states for each in beside)
    return [replace(stage, value=states, value_peak=peak) for stage in stages]


def stage_parameters(work: Workload, stage: int) -> int:
    """Parameters of one tensor-parallel rank of a stage, vocabulary padding included."""
    architecture, layout = work.architecture, work.layout
    layers = sum(layers_per_chunk(architecture, layout)[stage])
    hidden, tensor = architecture.hidden_size, layout.tensor
    split = (2 * _q(architecture) + 2 * _kv(architecture)) * hidden + 3 * hidden * architecture.intermediate_size
    count = layers * (split // tensor + 2 * hidden)
    first, last = stage == 0, stage == layout.pipeline - 1
    vocab = padded_vocab(architecture.vocab_size, tensor, work.vocab_multiple) // tensor * hidden
    if first:
        count += vocab
    if last and work.head == "value":
        count += 2 * hidden
    elif last:
        # A tied head on another stage than the embedding is a copy there.
        count += hidden + (0 if architecture.tie_word_embeddings and first else vocab)
    return count


def checkpoint_host_bytes(work: Workload, stage: int) -> int:
    """Host memory of a rank that writes a checkpoint in the background: weights, fp32 masters and moments.

    With the distributed optimizer it is the first data-parallel replica that writes, and it writes all of that.
    """
    masters = work.distributed_optimizer or work.dtype_bytes == 2
    return stage_parameters(work, stage) * (work.dtype_bytes + 4 * work.moments + (4 if masters else 0))


def _fp32_parameters(work: Workload, stage: int) -> int:
    """Parameters that `fp32_head` holds in fp32 on a stage of a model that is not."""
    architecture, layout = work.architecture, work.layout
    holds = stage == layout.pipeline - 1 or (architecture.tie_word_embeddings and stage == 0)
    if not work.fp32_head or not holds or work.head == "value":
        return 0
    return (
        padded_vocab(architecture.vocab_size, layout.tensor, work.vocab_multiple)
        // layout.tensor
        * (architecture.hidden_size)
    )


def _q(architecture: Architecture) -> int:
    return architecture.num_attention_heads * architecture.head_dim


def _kv(architecture: Architecture) -> int:
    return architecture.num_key_value_heads * architecture.head_dim


def _stage(work: Workload, stage: int) -> StageMemory:
    layout = work.layout
    layers = layers_per_chunk(work.architecture, layout)[stage]
    count = stage_parameters(work, stage)
    shards = work.data * layout.context if work.distributed_optimizer else 1
    state_bytes = 4 * work.moments + (4 if work.dtype_bytes == 2 else 0)
    gradient_bytes = 4 if work.dtype_bytes == 4 else work.gradient_bytes
    head = _fp32_parameters(work, stage)
    in_flight = micro_batches_in_flight(layout, stage, work.micro_batches)
    activations, logits = _activations(work, stage, layers, in_flight)
    cache_row = 2 * sum(layers) * (_kv(work.architecture) // layout.tensor) * work.dtype_bytes
    return StageMemory(
        stage=stage,
        layers=tuple(layers),
        parameters=count,
        weights=(count - head) * work.dtype_bytes + head * 4,
        gradients=(count - head) * gradient_bytes + head * 4,
        optimizer=-(-((count - head) * state_bytes + head * 4 * work.moments) // shards),
        reference=((count - head) * work.dtype_bytes + head * 4) * work.resident_copies,
        activations=activations,
        logits=logits,
        cache=work.cache_tokens * cache_row,
        in_flight=in_flight,
    )


def micro_batches_in_flight(layout: Layout, stage: int, micro_batches: int | None = None) -> float:
    """Micro-batches whose activations a stage holds at once, in units of the whole stage.

    1F1B: stage s of p holds p - s. Interleaved with v chunks [2104.04473]: 2 (p - s - 1) + (v - 1) p + 1 chunks, of v.
    """
    stages, chunks = layout.pipeline, layout.virtual_pipeline or 1
    if chunks == 1:
        held: float = stages - stage
    else:
        held = (2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks
    return held if micro_batches is None else min(held, micro_batches)


def layer_elements(work: Workload, *, recompute: Recompute | None = None) -> float:
    """Elements saved for the backward pass per row and layer on one rank."""
    architecture, tensor = work.architecture, work.layout.tensor
    residual = tensor if work.layout.sequence_parallel else 1
    if (recompute or work.recompute) == "full":
        return architecture.hidden_size / residual
    q, kv = _q(architecture), _kv(architecture)
    features = 2 if _makes_activation_again(work) else 5
    streams = (4 if work.fused_norm else 6) * architecture.hidden_size / residual
    attention = ((q + 2 * kv) + (q + kv) + q) / tensor
    return streams + attention + features * architecture.intermediate_size / tensor


def _makes_activation_again(work: Workload) -> bool:
    """Whether the model has the linear layers of an fp32 model on a CPU."""
    return work.dtype_bytes == 4 and not work.fused_norm


def _activations(work: Workload, stage: int, layers: list[int], in_flight: float) -> tuple[int, int]:
    """(activations, logits) at the peak of a stage: the larger of two moments, the backward pass of the head and that
    of the last layer."""
    architecture, layout = work.architecture, work.layout
    rows = -(-work.rows // layout.context)
    hidden, tensor, size = architecture.hidden_size, layout.tensor, work.dtype_bytes
    residual = tensor if layout.sequence_parallel else 1
    # log-sum-exp, fp32, one per row and head
    statistics = 0 if work.recompute == "full" else 4 * architecture.num_attention_heads / tensor
    held = sum(layers)
    saved = rows * held * in_flight * (layer_elements(work) * size + statistics)
    # Backward of an MLP: gradients of gate and up, of its input and output rows, and one weight gradient.
    wide = architecture.intermediate_size / tensor
    layer_peak = rows * (2 * wide + 2 * hidden) * size + 2 * wide * hidden * size if held else 0.0
    if _makes_activation_again(work) and held:
        # Before: the activation, its gradient, those of gate and up; or after it has gone the second weight's gradient.
        layer_peak = max(layer_peak, rows * (4 * wide + 2 * hidden) * size)
    if work.recompute == "full" and held:
        layer_peak += rows * layer_elements(work, recompute="none") * size
    if stage != layout.pipeline - 1:
        return int(saved + layer_peak), 0
    # The head: final norm (in, out, normalised where not fused), gathered hidden rows, gradients of rows and weight.
    if work.head == "value":  # the final norm as below, and an fp32 copy of the rows with its gradient
        head = (2 if work.fused_norm else 3) * rows * hidden / residual * size + 8 * rows * hidden / residual
        return int(saved + max(head, layer_peak)), 0
    scored = int(rows * work.scored)
    vocab = padded_vocab(architecture.vocab_size, tensor, work.vocab_multiple) // tensor
    norm = (2 if work.fused_norm else 3) * rows * hidden / residual * size
    head_size = 4 if work.fp32_head else size
    wide_rows = 4 * rows * hidden / residual if work.fp32_head and size < 4 else 0.0  # an fp32 copy for an fp32 head
    # Sequence parallelism gathers all rows, keeps the scored ones, and scatters a gradient of all.
    gathered = (scored + rows) * hidden * head_size if layout.sequence_parallel else 0
    head = norm + rows * hidden / residual * size + wide_rows + gathered + vocab * hidden * head_size
    logits = extra_bytes(
        scored,
        hidden,
        vocab,
        head_size,
        work.logprob_buffer_bytes,
        cuda=work.fused_norm,
        total_rows=None if layout.sequence_parallel else rows,
    )
    if head + logits >= layer_peak:
        return int(saved + head), logits
    return int(saved + layer_peak), 0

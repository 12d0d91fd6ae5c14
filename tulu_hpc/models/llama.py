"""The Llama model: megatron's GPTModel that reads packs and returns log-probs of the scored tokens.

Shapes: T rows of this rank, K targets of this rank, B sequences decoded together, H hidden, V vocab, Vl its shard.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.kernels import LogprobOutput, linear_logprob
from tulu_hpc.models import embedding_noise
from tulu_hpc.models.cache import DecodeParams
from tulu_hpc.models.rope import angles, inverse_frequencies
from tulu_hpc.models.scalar_head import Head, RowValues, ScalarHead
from tulu_hpc.parallel.context import RankBatch


class TokenLogprobs(NamedTuple):
    """What the last pipeline stage returns for a pack.

    Attributes:
        logprobs_K: [K] fp32 log p(target | what its row sees), of this rank's targets.
        entropy_K: [K] fp32 entropy (nats) of the same distributions, or None when not asked for.
        alignment_K: [K] fp32 log of the sum over the vocabulary of p^2, without gradient, or None when not asked for.
    """

    logprobs_K: Tensor
    entropy_K: Tensor | None
    alignment_K: Tensor | None = None


class Llama(GPTModel):
    """One pipeline chunk of a Llama. Made by `models.build.build_model`; never holds logits of a pack.

    Attributes (besides GPTModel's):
        architecture: shape of the model; `vocab_size` there is without padding.
        logprob_buffer_bytes: largest buffer of logits that may exist at once.
        return_entropy: whether `TokenLogprobs.entropy_K` is computed.
        return_alignment: whether `TokenLogprobs.alignment_K` is computed, by a second pass of the head.
        logprob_temperature: logits are divided by it before the softmax.
        head: what the last stage returns, `TokenLogprobs` or `RowValues`.
    """

    architecture: Architecture
    logprob_buffer_bytes: int | None = None
    return_entropy: bool = False
    return_alignment: bool = False
    logprob_temperature: float = 1.0
    head: Head = "logprobs"

    def finish(self, architecture: Architecture, logprob_buffer_bytes: int | None) -> None:
        """Set what GPTModel's constructor does not know; called once by `build_model`."""
        self.architecture = architecture
        self.logprob_buffer_bytes = logprob_buffer_bytes
        # A plain attribute: neither a parameter nor part of any checkpoint. Moved to the device at first use.
        self._inverse_frequency = inverse_frequencies(architecture)

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark the embedding and head weights for megatron's optimizer and gradient reduction.

        As in megatron, without its all-reduce that copies tied weights to the last stage: weights are always loaded
        after the model is built (and on the meta device there is nothing to copy).
        """
        first, last = self.pre_process, self.post_process
        if first:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        if last and self.output_layer.weight is not None:
            self.output_layer.weight.is_embedding_or_output_parameter = True
        if not self.share_embeddings_and_output_weights:
            return
        if self.config.pipeline_model_parallel_size == 1:
            self.shared_embedding_or_output_weight().zero_out_wgrad = True
        elif first and not last:
            self.shared_embedding_or_output_weight().shared_embedding = True
        elif last and not first:
            weight = self.shared_embedding_or_output_weight()
            weight.shared = True  # counted once in the gradient norm
            weight.shared_embedding = True

    def keep_head_in_fp32(self) -> None:
        """Hold the head's weight in fp32 whatever the dtype of the rest; with tied embeddings that is the embedding's
        weight too. Called by `build_model` before anything refers to the parameters."""
        weights = [getattr(getattr(self, "output_layer", None), "weight", None)]
        if self._is_tied() and self.pre_process:
            weights.append(self.embedding.word_embeddings.weight)
        for weight in weights:
            if weight is not None:  # other stages have no head, that of a tied model on one stage has no weight
                weight.data = weight.data.float()

    def use_scalar_head(self) -> None:
        """Put one number per row in the place of the vocabulary; called once by `build_model`."""
        self.head = "value"
        if self.post_process:
            del self.output_layer
            self.score = ScalarHead(self.config)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Which part of which global tensor this rank holds, for checkpoints."""
        if self.head == "value":  # GPTModel's own looks for the vocabulary head
            return dict(MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata))
        return dict(super().sharded_state_dict(prefix, sharded_offsets, metadata))

    def local_vocab(self) -> tuple[Tensor, int]:
        """This rank's rows of the head without vocabulary padding ([<= Vl, H]) and the first one's token id."""
        weight = self._head()
        start = self.pg_collection.tp.rank() * weight.shape[0]
        valid = min(max(self.architecture.vocab_size - start, 0), weight.shape[0])
        return (weight if valid == weight.shape[0] else weight[:valid]), start

    def _head(self) -> Tensor:
        """The head's weight, complete: it is read past its module, whose hooks wait for weights that are still being
        gathered (overlap_param_gather)."""
        module = self.output_layer
        for key, hook in module._forward_pre_hooks.items():
            if key not in module._forward_pre_hooks_with_kwargs:  # megatron's have none
                hook(module, ())
        return self.shared_embedding_or_output_weight() if self._is_tied() else self.output_layer.weight

    def _is_tied(self) -> bool:
        return bool(self.share_embeddings_and_output_weights)

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, _no_rope, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if decoder_input is not None:
            decoder_input = decoder_input.to(self.config.params_dtype)  # of an embedding tied to an fp32 head
        if self._inverse_frequency.device != position_ids.device:
            self._inverse_frequency = self._inverse_frequency.to(position_ids.device)
        cos_sin = angles(position_ids[0], self._inverse_frequency)
        columns = getattr(kwargs.get("packed_seq_params"), "per_row", {})
        if self.pre_process and embedding_noise.KEY in columns:
            key_T, scale_T = columns[embedding_noise.KEY], columns[embedding_noise.SCALE]
            if self.config.sequence_parallel:
                group = self.pg_collection.tp
                key_T, scale_T = (x.chunk(group.size())[group.rank()] for x in (key_T, scale_T))
            decoder_input = embedding_noise.noisy(decoder_input, key_T, scale_T)
        return (decoder_input, cos_sin, *rest)

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not self.post_process:
            return hidden_states
        hidden_TH = hidden_states[:, 0]
        if self.head == "value":
            return RowValues(self.score(hidden_TH, self.pg_collection.tp))
        if isinstance(packed_seq_params, DecodeParams):
            assert packed_seq_params.logit_rows is not None
            return self._logits(hidden_TH, packed_seq_params.logit_rows)
        if labels is None:
            raise ValueError("Llama returns log-probs of targets: give labels (target_K)")
        out = self._logprobs(hidden_TH, labels, packed_seq_params.row_K, self.logprob_temperature, self.return_entropy)
        if not self.return_alignment:
            return TokenLogprobs(out.logprobs_K, out.entropy_K)
        with torch.no_grad():
            # With logits z and lse the log of the sum of exp: log-prob z_y - lse(z), at half the temperature
            # 2 z_y - lse(2 z); twice the first less the second is lse(2 z) - 2 lse(z) = log sum p^2.
            half = self._logprobs(hidden_TH, labels, packed_seq_params.row_K, self.logprob_temperature / 2, False)
            return TokenLogprobs(out.logprobs_K, out.entropy_K, 2 * out.logprobs_K - half.logprobs_K)

    def _logprobs(
        self, hidden_TH: Tensor, target_K: Tensor, row_K: Tensor, temperature: float, entropy: bool
    ) -> LogprobOutput:
        weight, start = self.local_vocab()
        return linear_logprob(
            hidden_TH.to(weight.dtype),  # an fp32 head in a bf16 model
            weight,
            target_K,
            row_K=row_K,
            temperature=temperature,
            return_entropy=entropy,
            tp_group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
            vocab_start=start,
            max_buffer_bytes=self.logprob_buffer_bytes,
        )

    def _logits(self, hidden_TH: Tensor, rows: Tensor) -> Tensor:
        """[B, V] fp32 logits of the given rows, whole on every tensor-parallel rank, padding cut off."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_TH = tensor_parallel.gather_from_sequence_parallel_region(hidden_TH, group=group)
        shard = _linear_fp32(hidden_TH.index_select(0, rows), self._head())
        if group.size() == 1:
            return shard[:, : self.architecture.vocab_size]
        shards = [torch.empty_like(shard) for _ in range(group.size())]
        torch.distributed.all_gather(shards, shard, group=group)
        return torch.cat(shards, dim=1)[:, : self.architecture.vocab_size]


def _linear_fp32(hidden_BH: Tensor, weight_VlH: Tensor) -> Tensor:
    """[B, Vl] fp32 logits, not rounded to bf16 on the way: the trainer's are not either (`linear_logprob`)."""
    hidden_BH = hidden_BH.to(weight_VlH.dtype)
    if hidden_BH.dtype == torch.float32:
        return F.linear(hidden_BH, weight_VlH)
    if hidden_BH.is_cuda:
        return torch.mm(hidden_BH, weight_VlH.T, out_dtype=torch.float32)
    return F.linear(hidden_BH.float(), weight_VlH.float())


def score(chunk: torch.nn.Module, batch: RankBatch) -> Any:
    """Forward pass of one model chunk (wrapped by megatron or not) on `batch`.

    Returns:
        TokenLogprobs (with a scalar head RowValues) on the last pipeline stage, hidden states elsewhere.
    """
    return chunk(batch.tokens_1T, batch.position_ids_1T, None, labels=batch.target_K, packed_seq_params=batch.params)

"""Generation on the training model with a key/value cache, token-flat.

Prompts are read as one pack (each once, whatever the number of samples drawn from it), at the start or while other
sequences are being decoded; a decoding step reads one row per live sequence. Works at any tensor- and pipeline-parallel
degree and with sequence parallelism; context-parallel ranks do not share work here: each may decode sequences of its
own.

Shapes: B sequences decoded together, V vocab, T rows of a forward pass, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.kernels import plan_attention
from tulu_hpc.models.build import local_heads, unwrap
from tulu_hpc.models.cache import DecodeParams, KVCache, plan_step
from tulu_hpc.models.llama import Llama
from tulu_hpc.parallel.layout import Groups

__all__ = ["DecodeParams", "Decoder", "KVCache"]


class Decoder:
    """Decodes up to `max_sequences` sequences of up to `max_length` tokens (prompt and completion) together.

    `prefill` and `step` are collective over the tensor- and pipeline-parallel ranks of a replica: every rank of it
    calls them with equal arguments. They run without gradients and leave the model as it was.

    Args:
        chunks: of this rank (wrapped by megatron or not).
        groups: of this process.
        architecture: of the model.
        max_sequences, max_length: size of the cache; its memory is taken as it is needed.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: Groups,
        architecture: Architecture,
        max_sequences: int,
        max_length: int,
    ) -> None:
        self.chunks: list[Llama] = [unwrap(chunk) for chunk in chunks]
        self.groups, self.architecture = groups, architecture
        self.heads, self.kv_heads = local_heads(architecture, groups.layout)
        config = self.chunks[0].config
        parameter = next(self.chunks[0].parameters())
        self.device = parameter.device
        self._multiple = groups.tp_size if groups.layout.sequence_parallel else 1
        self._dtype: torch.dtype = config.pipeline_dtype or config.params_dtype
        self.cache = KVCache(
            [layer.layer_number for chunk in self.chunks for layer in chunk.decoder.layers],
            max_sequences=max_sequences,
            max_length=max_length,
            kv_heads=self.kv_heads,
            head_dim=architecture.head_dim,
            dtype=config.params_dtype,
            device=self.device,
        )

    @property
    def num_sequences(self) -> int:
        """Live sequences."""
        return len(self.cache.owner_B)

    def prefill(self, prompts: Sequence[Tensor], copies: Sequence[int]) -> Tensor | None:
        """Forget what was decoded before, read prompts and open all their sequences.

        Args:
            prompts: token ids, int64 [length >= 1] each.
            copies: how many sequences continue each prompt; B = sum(copies), a prompt's copies lie side by side.

        Returns:
            [B, V] fp32 logits of each sequence's next token on the last pipeline stage (on all its tensor-parallel
            ranks), None on other stages.

        Raises:
            ValueError: an empty prompt, or more or longer sequences than the cache holds.
        """
        self.cache.clear()
        places, logits_PV = self.read(prompts, copies)
        owner_B = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(list(copies)))
        self.cache.open([places[owner] for owner in owner_B.tolist()])
        return None if logits_PV is None else logits_PV.index_select(0, owner_B.to(self.device))

    @torch.no_grad()
    def read(self, prompts: Sequence[Tensor], copies: Sequence[int]) -> tuple[list[int], Tensor | None]:
        """Read prompts beside what is being decoded.

        A prompt stays in the cache until `copies` sequences that continue it (opened by `cache.open`) have ended.

        Returns:
            The prompts' places in the cache and the logits [P, V] of what follows each, as `prefill` has them.

        Raises:
            ValueError: an empty prompt, or a longer one than the cache holds.
        """
        if len(prompts) != len(copies) or not prompts:
            raise ValueError(f"{len(prompts)} prompts with {len(copies)} numbers of copies")
        lengths_P = torch.tensor([len(prompt) for prompt in prompts])
        if int(lengths_P.min()) < 1 or min(copies) < 1:
            raise ValueError("every prompt needs at least one token and one copy")
        rows = int(lengths_P.sum())
        padding = -rows % self._multiple
        segments = torch.cat((lengths_P, torch.tensor([padding]))) if padding else lengths_P
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), segments.cumsum(0)))
        tokens_T = torch.cat([*(prompt.cpu() for prompt in prompts), torch.zeros(padding, dtype=torch.int64)])
        positions_T = torch.arange(len(tokens_T)) - torch.repeat_interleave(cu_seqlens[:-1], segments)
        places = self.cache.store(lengths_P.tolist(), list(copies))
        params = DecodeParams(
            cache=self.cache,
            logit_rows=(cu_seqlens[1 : len(prompts) + 1] - 1).to(self.device),
            plan=plan_attention(
                cu_seqlens.int(),
                None,
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.architecture.head_dim,
                device=self.device,
            ),
            place_R=torch.repeat_interleave(torch.tensor(places), lengths_P).to(self.device),
            column_R=positions_T[:rows].to(self.device),
        )
        return places, self._forward(tokens_T.to(self.device), positions_T.to(self.device), params)

    @torch.no_grad()
    def step(self, tokens_B: Tensor, keep: Tensor | None = None) -> Tensor | None:
        """Append one token to each live sequence.

        Args:
            tokens_B: [B] the sampled tokens, of the sequences that stay alive.
            keep: [B] int64 indices of those among the sequences before; None: all. The others are forgotten.

        Returns:
            [B, V] fp32 logits of the next tokens on the last pipeline stage, None on other stages.

        Raises:
            ValueError: a wrong number of tokens, or the cache is full.
        """
        if keep is not None:
            self.cache.keep(keep.cpu())
        count = self.num_sequences
        if len(tokens_B) != count or count == 0:
            raise ValueError(f"{len(tokens_B)} tokens for {count} live sequences")
        positions = self.cache.lengths_B()
        self.cache.advance()
        padding = -count % self._multiple
        tokens = tokens_B.to(self.device)
        if padding:
            tokens = torch.cat((tokens, tokens.new_zeros(padding)))
            positions = torch.cat((positions, positions.new_zeros(padding)))
        rows = torch.arange(count, device=self.device)
        params = DecodeParams(cache=self.cache, logit_rows=rows, step=plan_step(self.cache))
        return self._forward(tokens, positions.to(self.device), params)

    def _forward(self, tokens_T: Tensor, positions_T: Tensor, params: DecodeParams) -> Tensor | None:
        """One forward pass through all pipeline stages and chunks; logits on the last stage."""
        group, stages = self.groups.pg.pp, self.groups.pp_size
        hidden_shape = (len(tokens_T) // self._multiple, 1, self.architecture.hidden_size)
        output = None
        for chunk in self.chunks:
            if not chunk.pre_process:
                received = torch.empty(hidden_shape, dtype=self._dtype, device=self.device)
                dist.recv(received, dist.get_global_rank(group, (self.groups.pp_rank - 1) % stages), group=group)
                chunk.set_input_tensor(received)
            # Evaluation mode of the block alone: no recomputation; nothing else depends on it (no dropout).
            was_training, chunk.decoder.training = chunk.decoder.training, False
            output = chunk(tokens_T[None], positions_T[None], None, packed_seq_params=params)
            chunk.decoder.training = was_training
            if not chunk.post_process:
                dist.send(output, dist.get_global_rank(group, (self.groups.pp_rank + 1) % stages), group=group)
        return output if self.chunks[-1].post_process else None

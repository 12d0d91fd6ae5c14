"""What Hugging Face says about a few samples: the truth that an audit compares with.

Everything here is written against transformers and the data contract alone; no pack, no kernel and no parallel code of
ours takes part, so that a fault there cannot hide.

Shapes: n scored tokens of a response, P probed ones of them, L layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tulu_hpc.data.packed_batch import Item

Place = tuple[str, int]  # id of the item, index of the response
PROBES = 4


@dataclass
class Answers:
    """What the model says about the responses of one item.

    Attributes:
        logprobs: [n] fp32 of each response, with gradient; of a scalar head [1] scores.
        alignments: [n] fp32 of each response: log of the sum over the vocabulary of p^2, without gradient; empty of a
            scalar head.
    """

    logprobs: list[Tensor] = field(default_factory=list)
    alignments: list[Tensor] = field(default_factory=list)


ItemLoss = Callable[[Item, Answers], Tensor]  # this item's share of the loss


@dataclass
class Truth:
    """Results of one process.

    Attributes:
        logprobs: [n] fp32 of each response; of a model with a scalar head its score, [1].
        hidden: [L + 2, P, H] fp32 of each response: output of the embedding, of every layer and of the final norm, at
            the tokens that predict the scored tokens `probes(n)`.
        loss: of all samples.
        gradients: of the loss, under Hugging Face's names.
    """

    logprobs: dict[Place, Tensor] = field(default_factory=dict)
    hidden: dict[Place, Tensor] = field(default_factory=dict)
    loss: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)


def probes(count: int) -> list[int]:
    """Which of `count` scored tokens are compared layer by layer: the first, the last and some between."""
    return sorted({round(i * (count - 1) / (PROBES - 1)) for i in range(PROBES)}) if count else []


def scored_positions(item: Item, response: int) -> list[int]:
    """Positions (prompt included) of the scored tokens of a response; a first token without prompt is not scored."""
    own, start = item.responses[response], item.prompt.numel()
    marks = [True] * len(own) if own.mask is None else own.mask.bool().tolist()
    return [start + t for t, marked in enumerate(marks) if marked and start + t > 0]


def load_model(path: Path, device: torch.device) -> Any:
    """transformers' model in fp32."""
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()


def load_scoring_model(path: Path, new_score: Tensor | None, device: torch.device) -> Any:
    """transformers' sequence classification with one label, in fp32; `new_score` [1, H] is its head if it has none."""
    model = LlamaForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=1)
    if new_score is not None:
        with torch.no_grad():
            model.score.weight.copy_(new_score)
    return model.to(device).eval()


def compute(
    path: Path,
    items: Sequence[Item],
    loss: ItemLoss,
    device: torch.device,
    *,
    scores: bool = False,
    new_score: Tensor | None = None,
    temperature: float = 1.0,
) -> Truth:
    """Run the samples through Hugging Face's model one response at a time, with gradients.

    Args:
        scores: by a scalar head; each response has one target, the place after its last token (`data.readout`).
        new_score: [1, H], the head of a language model that gets one.
        temperature: logits are divided by it.

    Raises:
        ValueError: a sample without any scored token.
    """
    model = load_scoring_model(path, new_score, device) if scores else load_model(path, device)
    truth = Truth()
    outputs: list[Tensor] = []
    stages = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    handles = [stage.register_forward_hook(lambda *call: outputs.append(_tensor(call[2]))) for stage in stages]
    for item in items:
        answers = Answers()
        for index, response in enumerate(item.responses):
            positions = scored_positions(item, index)
            if not positions:
                raise ValueError(f"item {item.id!r}: response {index} has no scored token")
            whole = torch.cat((item.prompt, response.tokens)).to(device)
            outputs.clear()
            before = torch.tensor(positions, device=device) - 1
            if scores:
                model.model(whole[None, :-1], use_cache=False)
                answers.logprobs.append(model.score(outputs[-1][0, before])[:, 0])
            else:
                table = (model(whole[None], use_cache=False).logits[0] / temperature).log_softmax(-1)
                answers.logprobs.append(table[before, whole[before + 1]])
                answers.alignments.append((2 * table[before].detach()).logsumexp(-1))
            rows = before[probes(len(positions))]
            truth.hidden[item.id, index] = torch.stack([each.detach()[0, rows] for each in outputs]).cpu()
            truth.logprobs[item.id, index] = answers.logprobs[-1].detach().cpu()
        share = loss(item, answers)
        share.backward()
        truth.loss += float(share.detach())
    for handle in handles:
        handle.remove()
    truth.gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return truth


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found

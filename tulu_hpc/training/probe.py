"""Hooks on every module that find where a value first stopped being finite, in the forward and the backward pass.

Checks stay on the device as one boolean each and are read only when somebody asks, so watching never waits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tulu_hpc.parallel.context import RankBatch

Kind = Literal["output", "gradient of output", "gradient of input", "gradient of weight"]


@dataclass(frozen=True)
class _Event:
    kind: Kind
    name: str
    chunk: int
    micro_batch: int
    finite: Tensor


@dataclass(frozen=True)
class Finding:
    """The first value that was not finite on this rank.

    Attributes:
        kind: what it was; with `gradient of ...` every output of every module was finite.
        module: dotted name, layers numbered as in the whole model.
        chunk: virtual pipeline chunk of this rank.
        order: how many checks of the micro-batch and chunk came before: comparable between ranks of one stage.
    """

    kind: Kind
    module: str
    chunk: int
    micro_batch: int
    order: int


class Probe:
    """Watches one forward and backward pass of `chunks` over `batches`.

    Args:
        chunks: this rank's models, without megatron's wrappers.
    """

    def __init__(self, chunks: Sequence[nn.Module], batches: Sequence[RankBatch]) -> None:
        self._chunks = list(chunks)
        self._index = {id(batch.params): index for index, batch in enumerate(batches)}
        self._forward_batch = self._backward_batch = 0
        self._events: list[_Event] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Probe:
        for number, chunk in enumerate(self._chunks):
            for name, module in chunk.named_modules():
                place = (number, _whole_model_name(chunk, name))
                self._handles += [
                    module.register_forward_pre_hook(partial(self._before, place), with_kwargs=True),
                    module.register_forward_hook(partial(self._after, place)),
                ]
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad:
                    place = (number, _whole_model_name(chunk, name))
                    self._handles.append(parameter.register_hook(partial(self._weight_gradient, place)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finding(self) -> Finding | None:
        """The first value that was not finite: an output if there is one, else a gradient."""
        bad = [not bool(event.finite) for event in self._events]
        for outputs in (True, False):
            for at, event in enumerate(self._events):
                if bad[at] and (event.kind == "output") == outputs:
                    chosen = event if outputs else self._culprit(bad) or event
                    order = sum(
                        each.micro_batch == event.micro_batch and each.chunk == event.chunk
                        for each in self._events[:at]
                    )
                    return Finding(chosen.kind, chosen.name, chosen.chunk, chosen.micro_batch, order)
        return None

    def _culprit(self, bad: Sequence[bool]) -> _Event | None:
        """The innermost module with finite gradients of its outputs that made one of its inputs that was not."""
        pairs = list(zip(self._events, bad, strict=True))
        received = {
            (event.chunk, event.micro_batch, event.name)
            for event, is_bad in pairs
            if is_bad and event.kind == "gradient of output"
        }

        def module(event: _Event) -> str:
            return event.name.rpartition(".")[0] if event.kind == "gradient of weight" else event.name

        made = [
            event
            for event, is_bad in pairs
            if is_bad
            and event.kind in ("gradient of input", "gradient of weight")
            and (event.chunk, event.micro_batch, module(event)) not in received
        ]
        chosen: _Event | None = None
        for event in made:  # in the order of the backward pass; a module's hooks fire after those around it
            if chosen is None or (
                event.kind == chosen.kind == "gradient of input"
                and (event.chunk, event.micro_batch) == (chosen.chunk, chosen.micro_batch)
                and (not chosen.name or event.name.startswith(f"{chosen.name}."))
            ):
                chosen = event
        return chosen

    def _before(self, place: tuple[int, str], _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        index = self._index.get(id(kwargs.get("packed_seq_params")))
        if index is not None:  # also when a layer is computed again in the backward pass
            self._forward_batch = index
        for tensor in _tensors((args, kwargs.values())):
            if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                tensor.register_hook(partial(self._gradient, "gradient of input", place, self._forward_batch))

    def _after(self, place: tuple[int, str], _module: nn.Module, _args: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.is_floating_point():
                self._note("output", place, self._forward_batch, tensor)
            if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                tensor.register_hook(partial(self._gradient, "gradient of output", place, self._forward_batch))

    def _gradient(self, kind: Kind, place: tuple[int, str], micro_batch: int, gradient: Tensor) -> None:
        self._backward_batch = micro_batch
        self._note(kind, place, micro_batch, gradient)

    def _weight_gradient(self, place: tuple[int, str], gradient: Tensor) -> None:
        self._note("gradient of weight", place, self._backward_batch, gradient)

    def _note(self, kind: Kind, place: tuple[int, str], micro_batch: int, tensor: Tensor) -> None:
        chunk, name = place
        finite = torch.isfinite(tensor.detach()).all()
        self._events.append(_Event(kind, name, chunk, micro_batch, finite))


def bad_parameters(chunks: Sequence[nn.Module]) -> list[str]:
    """Names of the parameters of this rank that hold NaN or infinity, layers numbered as in the whole model."""
    named = [(_whole_model_name(chunk, name), p) for chunk in chunks for name, p in chunk.named_parameters()]
    return [name for name, parameter in named if not bool(torch.isfinite(parameter.detach()).all())]


def layer_of(name: str) -> int | None:
    """The layer (from 0) that a name of the whole model lies in."""
    found = re.search(r"(?:^|\.)layers\.(\d+)", name)
    return int(found[1]) if found else None


def _whole_model_name(chunk: nn.Module, name: str) -> str:
    """`name` with the chunk's own layer number replaced by that of the whole model."""
    found = re.match(r"decoder\.layers\.(\d+)", name)
    if found is None:
        return name or "model"
    layer: Any = chunk.get_submodule(found[0])
    return f"decoder.layers.{layer.layer_number - 1}{name[found.end() :]}"


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list) or (isinstance(values, Iterable) and type(values).__name__ == "dict_values"):
        for value in values:
            yield from _tensors(value)

"""A stream of tensors in pieces of bounded size, each announced to the servers and sent as one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Some tensors as bytes, in order.

    Attributes:
        metadata: name, dtype and shape of each.
        parts: uint8, the bytes of each; where they can be, views of the tensors.
    """

    metadata: list[tuple[str, torch.dtype, tuple[int, ...]]]
    parts: list[Tensor]

    def announcement(self) -> dict[str, Any]:
        """Body of /update_weights."""
        return {
            "update_info": {
                "names": [name for name, _, _ in self.metadata],
                "dtype_names": [str(dtype).removeprefix("torch.") for _, dtype, _ in self.metadata],
                "shapes": [list(shape) for _, _, shape in self.metadata],
            }
        }


def buckets(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterable[Bucket]:
    """Put tensors (on the host) into buckets of at most `limit` bytes; a larger tensor is a bucket of its own.

    Nothing is packed: a bucket holds the tensors' own memory. Beside the bucket that was handed out last, the one that
    is being filled and the tensor at hand, no tensor is held.
    """
    bucket, used = Bucket([], []), 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket.parts and used + size > limit:
            yield bucket
            bucket, used = Bucket([], []), 0
        bucket.metadata.append((name, tensor.dtype, tuple(tensor.shape)))
        bucket.parts.append(tensor.detach().contiguous().view(-1).view(torch.uint8))
        used += size
        del tensor  # before the next one is gathered
    if bucket.parts:
        yield bucket

"""Host memory that is received into again and again: the first touch of a page costs more than copying it."""

from __future__ import annotations

import weakref

import numpy as np
import torch


class HostBuffers:
    """Hands out memory and takes it back once no tensor refers to it: vLLM keeps tensors until their layer is whole.

    Nothing is given back to the system. That is two or three buffers of the largest bucket.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, size: int) -> torch.Tensor:
        """uint8 [size], uninitialised."""
        place = next((place for place, each in enumerate(self._free) if each.size >= size), None)
        if place is None:
            self._free.clear()  # too small for what comes
            memory = np.empty(size, dtype=np.uint8)  # on huge pages, which torch.empty does not ask for
        else:
            memory = self._free.pop(place)
        lease = memory[:size]  # an object of its own, which lives as long as the last tensor made of it
        weakref.finalize(lease, self._free.append, memory)
        return torch.from_numpy(lease)

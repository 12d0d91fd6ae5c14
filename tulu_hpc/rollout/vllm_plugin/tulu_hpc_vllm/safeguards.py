"""What vLLM's own engines lack, whatever the weights travel over.

Names and shapes are checked before anything is received, an update must be complete, and one that broke off is cleaned
up by the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload, layerwise

from tulu_hpc_vllm.expected import check_announced, check_complete, expected_shapes


class Safeguards:
    """For a WeightTransferEngine, before it in the order of base classes."""

    model: torch.nn.Module
    model_config: Any
    _received: frozenset[str] = frozenset()
    _expected: dict[str, tuple[int, ...]] = {}

    def start_weight_update(self) -> None:
        """Begin an update; what an earlier one left half loaded is undone first."""
        self._expected = expected_shapes(self.model_config.hf_config)
        discard_unfinished_reload(self.model)
        self._received = frozenset()
        initialize_layerwise_reload(self.model)

    def check_announced(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        """Refuse tensors that the model does not have, or has been sent.

        Raises:
            ValueError: naming the first.
        """
        check_announced(self._expected, names, shapes, set(self._received))

    def finish_weight_update(self) -> None:
        """Accept a complete update. One of nothing, or an incomplete one (an error), gives the update up."""
        received, self._received = self._received, frozenset()
        try:
            if received:
                self._load_rest()
                check_complete(self._expected, set(received))
                finalize_layerwise_reload(self.model, self.model_config)
                repack_tied_head(self.model, self.model_config.hf_config)
        finally:
            discard_unfinished_reload(self.model)  # nothing is left of it after a complete update

    def _load_rest(self) -> None:
        """Load what has arrived and is not loaded yet, if the engine leaves any."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract in the base class of vLLM 0.25; the trainer has its own sender."""
        raise NotImplementedError("weights are sent by tulu_hpc")


def repack_tied_head(model: torch.nn.Module, config: Any) -> None:
    """A head that shares the embedding's weight is not itself loaded, but on the CPU holds a packed copy of it."""
    head = getattr(model, "lm_head", None)
    if config.tie_word_embeddings and head is not None and hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


def discard_unfinished_reload(model: torch.nn.Module) -> None:
    """Undo a reload that was begun and not finished: the tensors that the kernels use are put back.

    vLLM skips layers that are already being reloaded, so without this a broken update could not be repeated.
    """
    for module in model.modules():
        info = layerwise.get_layerwise_info(module)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(module, info)
            info.reset()
    layerwise.LOADING_LAYERS.clear()

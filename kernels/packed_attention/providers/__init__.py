"""The libraries behind the `flash` backend, and which of them runs on which GPU."""

from typing import NamedTuple

import torch

from tulu_hpc.kernels.packed_attention.providers.aten import Aten
from tulu_hpc.kernels.packed_attention.providers.base import Capability, Provider, State
from tulu_hpc.kernels.packed_attention.providers.cudnn import TransformerEngine
from tulu_hpc.kernels.packed_attention.providers.fa2 import FlashAttention2
from tulu_hpc.kernels.packed_attention.providers.fa3 import FlashAttention3
from tulu_hpc.kernels.packed_attention.providers.fa4 import FlashAttention4

__all__ = ["PROVIDERS", "Capability", "Provider", "Selection", "State", "order", "select"]

PROVIDERS: dict[str, Provider] = {
    each.name: each for each in (Aten(), FlashAttention2(), FlashAttention3(), FlashAttention4(), TransformerEngine())
}
# By major compute capability, best first. On 8.x the package's kernels are newer than torch's copy of them; elsewhere
# torch's come first, because a newer version can be activated under them.
_ORDER = {8: ("fa2", "aten"), 9: ("fa3", "fa4", "aten", "fa2")}
_BLACKWELL = ("fa4", "aten", "fa2")


def order(capability: Capability) -> tuple[str, ...]:
    """Names of the libraries that are tried on such a GPU, best first; what is not among them runs when named."""
    return _ORDER.get(capability[0], _BLACKWELL if capability[0] >= 10 else ("aten",))


class Selection(NamedTuple):
    """The library that runs (None: none takes such tensors), and what was found of every library.

    `problem`: a better library is installed and broken; nothing is chosen past it.
    """

    name: str | None
    findings: dict[str, str]
    problem: str | None = None


def select(
    dtype: torch.dtype,
    head_dim: int,
    capability: Capability,
    deterministic: bool,
    providers: dict[str, Provider] = PROVIDERS,
) -> Selection:
    """The first library of `order` that is installed and takes such tensors."""
    findings: dict[str, str] = {}
    for name in order(capability):
        refusal = providers[name].refusal(dtype, head_dim, capability, deterministic)
        if refusal is not None:
            findings[name] = refusal
            continue
        state = providers[name].state()
        findings[name] = state.text
        if state.kind == "broken":
            return Selection(None, findings, state.text)
        if state.kind == "usable":
            for later in providers.keys() - findings.keys():
                tried = later in order(capability)
                findings[later] = f"{name} comes first" if tried else "runs only when named"
            return Selection(name, findings)
    return Selection(None, findings)

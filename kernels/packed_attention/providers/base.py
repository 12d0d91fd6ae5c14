"""What every attention library behind the `flash` backend has in common.

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim.
"""

import importlib
import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention.plan import VarlenCall
from tulu_hpc.kernels.schema import Wanted, differences, parameters_of

Capability = tuple[int, int]


class State(NamedTuple):
    """`absent`: not installed. `broken`: installed, but it cannot be imported or its functions are not those called."""

    kind: Literal["usable", "absent", "broken"]
    text: str


def common_refusal(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no library takes such tensors, None if one may."""
    if dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256:
        return None
    return f"takes bfloat16 or float16 with a head dim that is a multiple of 8 up to 256, got {dtype} with {head_dim}"


class Provider(ABC):
    """A library's variable-length attention.

    Its forward pass returns the log-sum-exp, its backward pass takes any output and log-sum-exp.

    The last query of an entry sees its last key ("bottom-right" causal). Its functions are loaded, and their signatures
    compared with `wanted`, when the state is first asked for; nothing is imported before.

    Attributes:
        name: as in backend="flash:NAME".
        title: for people.
        distribution: the installed package whose version is reported.
        module: where the functions of `wanted` live.
    """

    name: str
    title: str
    distribution: str
    module: str
    wanted: tuple[Wanted, ...]

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}
        self._state: State | None = None

    def state(self) -> State:
        """Whether the library can be called; looked up once."""
        if self._state is None:
            self._state = self._load()
        return self._state

    def version(self) -> str:
        """Version of the installed package, "of unknown version" where it does not say."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "of unknown version"

    def installed(self) -> bool:
        """Whether the module's file is there. A package that cannot be imported counts as installed."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError as reason:
            # The module or a package around it is missing; anything else that is missing is a broken installation.
            return reason.name is None or not f"{self.module}.".startswith(f"{reason.name}.")
        except Exception:  # the package around it raises at import: `find` says what
            return True

    def find(self, name: str) -> Callable[..., Any]:
        """A function of the library by its name in `wanted`."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), name)
        return found

    def _load(self) -> State:
        if not self.installed():
            return State("absent", f"{self.distribution} is not installed (no module {self.module})")
        label = f"{self.distribution} {self.version()}"
        for wanted in self.wanted:
            try:
                function = self.find(wanted.function)
                problems = differences(parameters_of(function), wanted)
            except Exception as reason:  # a broken library raises anything at import
                text = f"{type(reason).__name__}: {reason}"
                return State("broken", f"{label}: {self.module}.{wanted.function} cannot be loaded: {text}")
            if problems:
                where = f"{label}: {self.module}.{wanted.function}"
                return State("broken", f"{where} is not the function this version was written for: {problems[0]}")
            self.functions[wanted.function] = function
        return State("usable", f"{self.title}, {label}")

    def refusal(self, dtype: torch.dtype, head_dim: int, capability: Capability, deterministic: bool) -> str | None:
        """Why the library does not take such tensors on such a GPU, None if it does; asks for no import."""
        return common_refusal(dtype, head_dim) or self._refusal(head_dim, capability, deterministic)

    def _refusal(self, head_dim: int, capability: Capability, deterministic: bool) -> str | None:
        return None

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        """out [T, N, D] and natural log-sum-exp of the scaled scores [T, N] in fp32 (any strides).

        q [T, N, D], k and v [M, Nk, D] are contiguous and hold the call's rows only.
        """

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        call: VarlenCall,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in their dtype; `lse` [T, N] as from `forward`, or merged over calls."""

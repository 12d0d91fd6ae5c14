"""megatron-core on CPU + gloo, without touching torch for anybody else.

megatron-core has no device abstraction: it asks for "cuda" tensors by name (`device="cuda"`,
`torch.cuda.current_device()`, `Tensor.cuda()`) and compares `Tensor.type()` with "torch.cuda.FloatTensor". Without
CUDA, `install()` puts an import hook in place that hands every `megatron.core` module a *view* of torch, in which those
few names lead to the CPU. All other modules keep the real torch; operations outside megatron pay nothing.

With CUDA, `install()` does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._triton import has_triton_package

_CPU = torch.device("cpu")
_PACKAGE = "megatron.core"
# Factory functions that megatron-core calls with device="cuda" or pin_memory=True.
_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)


def install() -> None:
    """Make megatron-core usable without CUDA; a no-op with CUDA and when called again.

    Best called before megatron-core is imported (importing it then is a second faster); modules that are loaded already
    are adapted too.
    """
    if torch.cuda.is_available() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    with _without_triton():
        has_triton_package()  # torch's compiler, which every optimizer imports, asks again and gets the same answer
    _patch_tensor_methods()
    for module in [module for name, module in sys.modules.items() if _is_megatron(name)]:
        _adapt(module)
        _undo_compilation(module)


def _is_megatron(name: str) -> bool:
    return name == _PACKAGE or name.startswith(_PACKAGE + ".")


class _View(types.ModuleType):
    """A module seen through some replaced names; everything else is looked up in the original."""

    def __init__(self, original: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(original.__name__)
        self.__dict__["_original"] = original
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_original"], name)
        self.__dict__[name] = value  # found directly from now on
        return value


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapper


@functools.cache
def _torch_for_megatron() -> types.ModuleType:
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    rng = {"get_rng_state": get_rng_state, "set_rng_state": set_rng_state, "manual_seed": torch.manual_seed}
    cuda = _View(
        torch.cuda,
        {
            "current_device": lambda: _CPU,  # always used as device=...
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "current_stream": lambda device=None: None,
            "random": _View(torch.cuda.random, rng),  # the "cuda" generator is the CPU one
            **rng,
        },
    )
    return _View(torch, {"cuda": cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}})


def _patch_tensor_methods() -> None:
    """`Tensor.type()` and `Tensor.cuda()` answer differently to megatron-core only."""
    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    def from_megatron() -> bool:
        return _is_megatron(str(sys._getframe(2).f_globals.get("__name__", "")))

    @functools.wraps(real_type)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        if not args and not kwargs and from_megatron():
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    @functools.wraps(real_cuda)
    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if from_megatron() else real_cuda(self, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda = tensor_type, tensor_cuda  # type: ignore[method-assign, assignment]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron.core modules as usual and wraps their loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_megatron(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, str(spec.loader.path))
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        with _without_triton():
            super().exec_module(module)
        _adapt(module)


@contextlib.contextmanager
def _without_triton() -> Iterator[None]:
    """What is imported meanwhile finds no triton: nothing could run on it without CUDA, its library takes 70 MiB."""
    if "triton" in sys.modules:  # imported by somebody, or hidden already
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        yield
    finally:
        del sys.modules["triton"]


def _adapt(module: types.ModuleType) -> None:
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = _torch_for_megatron()
    if module.__name__ == "megatron.core.jit":
        # torch.compile of small elementwise functions: seconds of C++ compilation for nothing here.
        module.disable_jit_fuser()
    if module.__name__ == "megatron.core.tensor_parallel.random":
        _use_cpu_generator(module)


def _undo_compilation(module: types.ModuleType) -> None:
    """Functions of a module imported before `install` are wrapped by torch.compile: take the originals."""
    classes = [value for value in vars(module).values() if isinstance(value, type) and _is_megatron(value.__module__)]
    for owner in (module, *classes):
        for name, value in list(vars(owner).items()):
            original = getattr(value, "_torchdynamo_orig_callable", None)
            if original is not None:
                setattr(owner, name, original)


def _use_cpu_generator(module: types.ModuleType) -> None:
    """The state setter goes around torch.cuda: it queues a lazy CUDA call, which without CUDA never happens."""

    def set_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    module.__dict__["_set_cuda_rng_state"] = set_state
    # The CPU generator *is* the tracked one here, so this warning of every fork is expected.
    logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

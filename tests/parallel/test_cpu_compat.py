"""The CPU view of torch reaches megatron-core and nobody else, and is absent with CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core import jit
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random

from tulu_hpc.parallel import cpu_compat

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the view exists only without CUDA")


@without_cuda
def test_megatron_sees_a_cpu_for_cuda() -> None:
    seen = schedules.torch  # type: ignore[attr-defined]
    assert seen is not torch
    assert seen.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert seen.empty_like(torch.ones(2), device="cuda", pin_memory=True).device.type == "cpu"
    assert seen.cuda.current_device() == torch.device("cpu")
    seen.cuda.synchronize()
    assert seen.Tensor is torch.Tensor
    assert seen.distributed is torch.distributed
    assert megatron_optimizer.torch is seen  # type: ignore[attr-defined]


@without_cuda
def test_nobody_else_does() -> None:
    x = torch.ones(2)
    assert x.type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        x.cuda()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


@without_cuda
def test_tensor_methods_answer_megatron() -> None:
    """Called from a function whose module is megatron's."""
    scope = {"__name__": "megatron.core.optimizer.clip_grads"}
    exec("def ask(x):\n    return x.type(), x.cuda() is x", scope)
    assert scope["ask"](torch.ones(2)) == ("torch.cuda.FloatTensor", True)  # type: ignore[operator]
    scope["__name__"] = "megatron_lookalike"
    assert scope["ask"].__globals__["__name__"] == "megatron_lookalike"  # type: ignore[attr-defined]
    with pytest.raises((AssertionError, RuntimeError)):
        scope["ask"](torch.ones(2))  # type: ignore[operator]


@without_cuda
def test_nothing_is_compiled() -> None:
    assert jit.jit_fuser is jit.noop_decorator


@without_cuda
def test_the_tracked_generator_is_the_cpu_one() -> None:
    tracker = megatron_random.CudaRNGStatesTracker()
    torch.manual_seed(0)
    tracker.add("stream", 5)
    outside = torch.rand(3)
    with tracker.fork("stream"):
        first = torch.rand(3)
    with tracker.fork("stream"):
        second = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.cat((first, second)), torch.rand(6))
    torch.manual_seed(0)
    assert torch.equal(outside, torch.rand(3))


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    ).stdout


@without_cuda
def test_megatron_imported_first_is_adapted() -> None:
    code = """
from megatron.core.fusions import fused_bias_dropout
from megatron.core.pipeline_parallel import schedules
wrapped = hasattr(fused_bias_dropout.bias_dropout_add_fused_train, "_torchdynamo_orig_callable")
import tulu_hpc.parallel
print(wrapped, hasattr(fused_bias_dropout.bias_dropout_add_fused_train, "_torchdynamo_orig_callable"),
      schedules.torch.cuda.current_device())
"""
    assert run(code).split() == ["True", "False", "cpu"]


def test_install_does_nothing_with_cuda() -> None:
    code = """
import sys, torch
torch.cuda.is_available = lambda: True
finders, methods = list(sys.meta_path), (torch.Tensor.type, torch.Tensor.cuda)
import tulu_hpc.parallel
print(sys.meta_path == finders, (torch.Tensor.type, torch.Tensor.cuda) == methods, "megatron.core" in sys.modules)
"""
    assert run(code).split() == ["True", "True", "False"]


def test_install_twice_changes_nothing() -> None:
    before = list(sys.meta_path), torch.Tensor.type
    cpu_compat.install()
    assert before == (list(sys.meta_path), torch.Tensor.type)


def test_private_names_of_megatron_that_we_use_exist() -> None:
    """What models/ overrides or calls and megatron does not promise to keep."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.attention import SelfAttention

    for name in ("_preprocess", "_postprocess", "setup_embeddings_and_output_layer"):
        assert callable(getattr(GPTModel, name))
    assert callable(SelfAttention._checkpointed_attention_forward)
    parts = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    for name in ("input_layernorm", "pre_mlp_layernorm", "self_attention", "mlp"):
        assert hasattr(parts, name)
    assert hasattr(parts.self_attention.submodules, "core_attention")
    assert callable(megatron_random._set_cuda_rng_state)


@without_cuda
def test_training_imports_neither_triton_nor_the_compiler() -> None:
    """In a new process: 90 MiB of every rank; triton itself can still be imported by who wants it."""
    program = """
import sys
import tulu_hpc.stages.dpo, tulu_hpc.stages.sft
assert "triton" not in sys.modules and "torch._dynamo" not in sys.modules
import torch
torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # imports torch's compiler
assert "torch._dynamo" in sys.modules and "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)

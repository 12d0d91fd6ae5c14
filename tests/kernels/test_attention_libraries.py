"""The attention libraries behind backend "flash": signature check, choice, and their adapters around fake kernels.

Not proved here: that the libraries' kernels compute what they should (see fake_libraries); tests/gpu runs them.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from types import SimpleNamespace

import pytest
import torch

from tests.kernels import fake_libraries as fake
from tests.kernels.test_packed_attention import make_plan, oracle, tensors
from tulu_hpc.kernels import BackendError, last_backend, packed_attention
from tulu_hpc.kernels.packed_attention import describe, flash, ops, providers, select
from tulu_hpc.kernels.packed_attention import plan as plan_module
from tulu_hpc.kernels.packed_attention.providers import State
from tulu_hpc.kernels.packed_attention.providers.aten import Aten
from tulu_hpc.kernels.packed_attention.providers.cudnn import TransformerEngine
from tulu_hpc.kernels.packed_attention.providers.fa2 import FlashAttention2
from tulu_hpc.kernels.packed_attention.providers.fa3 import FlashAttention3
from tulu_hpc.kernels.packed_attention.providers.fa4 import FlashAttention4
from tulu_hpc.kernels.schema import Parameter, Wanted, differences, parameters_of

LIBRARIES = {each.name: each for each in (FlashAttention2, FlashAttention3, FlashAttention4, TransformerEngine)}
CU, PREFIX = [0, 7, 12, 20, 24, 25, 31], [(0, 0), (0, 0), (0, 7), (0, 7), (7, 12), (7, 12)]
# Releases whose functions are not those that the adapters were written for, and the parameter that gives them away.
OLDER = {("fa2", "2.6.3"): "window_size_left", ("fa3", "3.0.0.b1"): "window_size_left", ("te", "2.14.0"): "o_format"}
RELEASES = [(name, version) for name, versions in fake.SIGNATURES.items() for version in versions]


def signatures(name: str, version: str | None = None) -> dict[str, inspect.Signature]:
    table = fake.SIGNATURES[name][version or fake.NEWEST[name]]
    return {function: fake.signature(parameters) for function, parameters in table.items()}


@pytest.fixture
def _version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")


# ------------------------------------------------------------------------------------------------- the schema checker
@pytest.mark.parametrize(("name", "version"), RELEASES)
def test_recorded_releases(name, version, monkeypatch, _version):
    provider = LIBRARIES[name]()
    fake.install(monkeypatch, provider, signatures(name, version))
    state = provider.state()
    if (name, version) not in OLDER:
        assert state.kind == "usable", state.text
        assert set(provider.functions) == {wanted.function for wanted in provider.wanted}
        return
    assert state.kind == "broken" and f"{provider.distribution} 9.9: {provider.module}." in state.text
    assert f"'{OLDER[name, version]}'" in state.text


def _changed(declared: inspect.Signature, what: str, name: str) -> inspect.Signature:
    parameters = list(declared.parameters.values())
    place = [p.name for p in parameters].index(name)
    if what == "renamed":
        parameters[place] = parameters[place].replace(name="other")
    elif what == "gone":
        del parameters[place]
    elif what == "default":
        parameters[place] = parameters[place].replace(default="other")
    elif what == "swapped":
        parameters[place], parameters[place + 1] = parameters[place + 1], parameters[place]
    elif what == "new":
        parameters.insert(place + 1, inspect.Parameter("other", inspect.Parameter.POSITIONAL_OR_KEYWORD))
        parameters[place + 2 :] = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters[place + 2 :]]
        parameters[place + 1] = parameters[place + 1].replace(kind=inspect.Parameter.KEYWORD_ONLY)
    return declared.replace(parameters=parameters)


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_planted_difference_is_named(name, monkeypatch, _version):
    """Each parameter that an adapter relies on: renamed, gone, elsewhere, with another default; and a new one."""
    planted = 0
    for number, wanted in enumerate(LIBRARIES[name].wanted):
        plain = signatures(name)
        cases = [(what, p) for p in (*wanted.positional, *wanted.keywords) for what in ("renamed", "gone")]
        cases += [("swapped", p) for p in wanted.positional[:-1]] + [("new", wanted.positional[-1])]
        cases += [(what, p) for p in wanted.defaults for what in ("default", "gone", "renamed")]
        for what, parameter in cases:
            changed = {**plain, wanted.function: _changed(plain[wanted.function], what, parameter)}
            provider = LIBRARIES[name]()
            with monkeypatch.context() as patch:
                fake.install(patch, provider, changed)
                state = provider.state()
            assert state.kind == "broken", (what, parameter)
            blamed = "other" if what == "new" else parameter
            assert f"{provider.module}.{wanted.function}" in state.text and f"'{blamed}'" in state.text, state.text
            planted += 1
        assert number < 2
    assert planted > 60


def test_parameters_of_ops_and_functions():
    """torch ops by their schema: the Python object of a custom op takes (*args, **kwargs)."""
    name = "tulu_hpc_test::signature"

    @torch.library.custom_op(name, mutates_args=("out",))
    def op(x: torch.Tensor, out: torch.Tensor, scale: float, window: int = -1, causal: bool = False) -> None:
        out.copy_(x * scale)

    by_op = parameters_of(op)
    assert [p.name for p in by_op] == ["x", "out", "scale", "window", "causal"]
    assert [p.default for p in by_op[3:]] == [-1, False] and all(p.required for p in by_op[:3])
    assert parameters_of(torch.ops.tulu_hpc_test.signature) == by_op
    plain = parameters_of(lambda x, *rest, scale=1.0, **more: None)
    assert plain == [Parameter("x"), Parameter("scale", 1.0, True)]
    assert differences(plain, Wanted("f", ("x",), (), {"scale": 1.0})) == []
    assert differences(plain, Wanted("f", ("x", "scale"))) == ["parameter 2 must be 'scale', there are 1 by position"]
    assert differences(plain, Wanted("f", (), ("hidden",))) == [
        "it has no parameter 'hidden'",
        "it wants a new argument 'x'",
    ]
    assert differences(plain, Wanted("f", ("x",), ("x",))) == [
        "parameter 'x' is passed by name and its place is taken by position"
    ]
    assert "has the default 1.0, expected 1" in differences(plain, Wanted("f", ("x",), (), {"scale": 1}))[0]
    with pytest.raises(TypeError, match="cannot be read"):
        parameters_of(range)


def test_the_ops_of_this_torch():
    assert Aten().state() == State("usable", f"flash attention inside torch, torch {torch.__version__}")


def test_what_is_not_installed_and_what_is_broken(monkeypatch, _version):
    for provider in (each() for each in LIBRARIES.values()):
        assert provider.state() == State(
            "absent", f"{provider.distribution} is not installed (no module {provider.module})"
        )
    # FlashAttention 4 alone: `flash_attn` is a package without the interface of FlashAttention 2.
    fake.install(monkeypatch, FlashAttention4(), signatures("fa4"))
    assert FlashAttention4().state().kind == "usable" and FlashAttention2().state().kind == "absent"

    def missing_symbol(self, name):
        raise ImportError("undefined symbol: _ZN2at4_ops")

    monkeypatch.setattr(FlashAttention4, "find", missing_symbol)
    state = FlashAttention4().state()
    assert state.kind == "broken" and "cannot be loaded: ImportError: undefined symbol" in state.text


def test_builds_of_flash_attention_3(monkeypatch, _version):
    provider = FlashAttention3()
    fake.install(monkeypatch, provider, signatures("fa3"))
    flags = {"FLASHATTENTION_DISABLE_FP16": True, "FLASHATTENTION_DISABLE_HDIM256": True}
    fake.new_module(monkeypatch, "flash_attn_config", CONFIG={"build_flags": flags})
    assert provider.state().kind == "usable"
    assert provider.refusal(torch.float16, 64, (9, 0), False) == "was built without float16"
    assert provider.refusal(torch.bfloat16, 256, (9, 0), False) == "was built without head dim 256"
    assert provider.refusal(torch.bfloat16, 128, (9, 0), False) is None
    flags["FLASHATTENTION_DISABLE_BACKWARD"] = True
    assert FlashAttention3().state() == State("broken", "flash_attn_3 9.9 was built without BACKWARD")


def test_versions_of_cudnn(monkeypatch, _version):
    for version, kind in (((9, 6, 0), "broken"), ((9, 7, 0), "usable"), ((9, 10, 1), "broken"), ((9, 25, 0), "usable")):
        provider = TransformerEngine()
        fake.install(monkeypatch, provider, signatures("te"))
        fake.new_module(monkeypatch, "transformer_engine.pytorch.utils", get_cudnn_version=lambda v=version: v)
        assert provider.state().kind == kind
        refusal = provider.refusal(torch.bfloat16, 256, (10, 0), False)
        assert (refusal is None) is (version == (9, 25, 0))
    assert provider.refusal(torch.bfloat16, 64, (8, 0), False) is not None
    assert provider.refusal(torch.bfloat16, 64, (12, 0), False) is not None


# ------------------------------------------------------------------------------------------------------- the adapters
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("strategy", ["repeat", "merge"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_adapters_around_fake_kernels(name, strategy, reorder, deterministic, monkeypatch):
    """Everything but the kernels: arguments, layout of the log-sum-exp, alignment, groups of heads, gradients."""
    monkeypatch.setattr(plan_module, "_library", lambda device: "flash")
    monkeypatch.setattr(flash, "deterministic", lambda: deterministic)
    provider = LIBRARIES[name]()
    calls = fake.install(monkeypatch, provider, signatures(name))
    assert provider.state().kind == "usable"
    order = torch.randperm(CU[-1], generator=torch.Generator().manual_seed(1)) if reorder else None
    plan = make_plan(CU, PREFIX, heads=4, kv_heads=2, strategy=strategy, key_order=order)
    q, k, v, grad = tensors(plan, torch.float32)
    backend = flash.Flash(provider)
    out, lse = backend.forward(q, k, v, plan, 0.5)
    found = [out, *backend.backward(grad, q, k, v, out, lse, plan, 0.5)]
    assert lse.shape == (CU[-1], 4) and lse.dtype == torch.float32
    for mine, right in zip(found, oracle(plan, torch.float32, scale=0.5)):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 * len(plan.calls) and len(plan.calls) == (1 if strategy == "repeat" else 2)
    assert [call["deterministic"] for call in calls if "deterministic" in call] == [deterministic] * len(plan.calls)


def test_padded_statistics_are_refused(monkeypatch):
    """cuDNN before 9.6 returns [sequences, heads, longest]; merging it would be wrong."""
    monkeypatch.setattr(plan_module, "_library", lambda device: "flash")
    provider = TransformerEngine()
    fake.install(monkeypatch, provider, signatures("te"))
    assert provider.state().kind == "usable"
    provider.functions["fused_attn_fwd"] = lambda *a, **o: (None, [torch.zeros(6, 4, 64, 1), None])
    plan = make_plan(CU, PREFIX, strategy="repeat")
    q, k, v, _ = tensors(plan, torch.float32)
    with pytest.raises(BackendError, match=r"statistics are \[6, 4, 64, 1\], expected \[31, 4, 1\]"):
        flash.Flash(provider).forward(q, k, v, plan, 0.5)


# --------------------------------------------------------------------------------------------------------- the choice
def _states(**kinds: str) -> dict[str, providers.Provider]:
    """Providers in the given states; their rules on tensors are the real ones."""
    made = {each.name: each() for each in (Aten, *LIBRARIES.values())}
    for name, provider in made.items():
        kind = kinds.get(name, "absent")
        provider._state = State(kind, f"{name} is {kind}")
    return made


@pytest.mark.parametrize(
    ("capability", "installed", "head_dim", "deterministic", "chosen"),
    [
        ((8, 0), "fa2 fa3 fa4 te", 128, False, "fa2"),
        ((8, 9), "fa3 fa4 te", 128, False, "aten"),
        ((9, 0), "fa2 fa3 fa4 te", 128, False, "fa3"),
        ((9, 0), "fa2 fa3 fa4 te", 256, True, "fa4"),
        ((9, 0), "fa2 fa3 te", 256, True, "aten"),
        ((9, 0), "fa2 te", 128, False, "aten"),
        ((10, 0), "fa2 fa3 fa4 te", 128, True, "fa4"),
        ((10, 0), "fa2 fa3 fa4 te", 192, False, "aten"),
        ((10, 3), "fa4", 256, False, "fa4"),
        ((12, 0), "fa4", 128, True, "aten"),
        ((12, 0), "fa4", 128, False, "fa4"),
        ((7, 5), "fa2", 128, False, "aten"),
    ],
)
def test_choice_by_gpu(capability, installed, head_dim, deterministic, chosen):
    made = _states(aten="usable", **dict.fromkeys(installed.split(), "usable"))
    found = providers.select(torch.bfloat16, head_dim, capability, deterministic, made)
    assert found.name == chosen and found.problem is None
    assert set(found.findings) == set(made)
    assert found.findings["te"] == "runs only when named"


def test_nothing_is_chosen_past_a_broken_library():
    made = _states(aten="usable", fa3="broken", fa4="usable")
    found = providers.select(torch.bfloat16, 128, (9, 0), False, made)
    assert found.name is None and found.problem == "fa3 is broken"
    # Behind the chosen one, or for tensors that it does not take, it is no obstacle.
    assert providers.select(torch.bfloat16, 128, (10, 0), False, made).name == "fa4"
    assert providers.select(torch.bfloat16, 256, (9, 0), True, made).name == "fa4"
    assert providers.select(torch.float32, 128, (9, 0), False, made).name is None


def test_through_the_public_function(monkeypatch):
    """backend="flash" resolves to a library's name, which is what runs, is reported and can be named."""
    made = _states(aten="usable", fa3="usable")
    monkeypatch.setattr(flash, "PROVIDERS", made)
    monkeypatch.setattr(providers.select, "__defaults__", (made,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    monkeypatch.setattr(plan_module, "_library", lambda device: "flash")
    monkeypatch.setattr(ops, "refusal", lambda *a: None)  # which wants tensors on CUDA
    fake.install(monkeypatch, made["fa3"], signatures("fa3"))
    made["fa3"]._state = None
    monkeypatch.setattr(ops, "_BACKENDS", {f"flash:{n}": flash.Flash(p) for n, p in made.items()})
    plan = make_plan(CU, PREFIX, strategy="merge")
    q, k, v, grad = tensors(plan, torch.bfloat16)
    q.requires_grad_()
    for backend in ("flash", "flash:fa3"):
        out = packed_attention(q, k, v, plan, backend=backend)
        assert last_backend("packed_attention") == "flash:fa3"
        want = oracle(plan, torch.bfloat16)
        torch.testing.assert_close(out.double(), want[0], rtol=0, atol=0.05)
        torch.testing.assert_close(torch.autograd.grad(out, q, grad)[0].double(), want[1], rtol=0, atol=0.1)
    with pytest.raises(BackendError, match="'flash:fa4' cannot run: fa4 is absent"):
        packed_attention(q, k, v, plan, backend="flash:fa4")
    made["fa3"]._state = State("broken", "flash_attn_3 2.0: no such function")
    with pytest.raises(BackendError, match=r"flash_attn_3 2\.0: no such function\. Repair or remove it"):
        packed_attention(q, k, v, plan, backend="flash")
    with pytest.raises(BackendError, match="has no backend 'flash:fa9'"):
        packed_attention(q, k, v, plan, backend="flash:fa9")
    # The default does not go past it either.
    assert select.default("cuda", torch.bfloat16, 64).backend == "flash"
    cuda = SimpleNamespace(device=torch.device("cuda"), head_dim=64)
    assert describe._library(cuda, torch.bfloat16)[0].startswith(
        "library   none; it will raise, on compute capability 9.0"
    )
    made["fa3"]._state = State("usable", "FlashAttention 3, flash_attn_3 3.0.0")
    lines = describe._library(cuda, torch.bfloat16)
    assert lines[0] == "library   fa3: FlashAttention 3, flash_attn_3 3.0.0, on compute capability 9.0"
    assert "          not te: runs only when named" in lines and "          not aten: fa3 comes first" in lines

"""Transformer Engine's layers behind the same builder: names, configuration, refusals, and megatron-core's wrappers.

Not proved here: the real layers, fp8 and communication overlap, which need CUDA. The stand-in has their arguments and
plain torch inside (tests/models/stand_in).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.kernels.fake_libraries import new_module
from tests.models.reference import architecture
from tulu_hpc.config.layer_spec import check_layer_spec, row_step
from tulu_hpc.config.sections import ModelSection, ParallelSection
from tulu_hpc.data.loader import _usable
from tulu_hpc.models import transformer_engine
from tulu_hpc.models.names import hf_shapes, mapping, merge_shards, read_local
from tulu_hpc.models.transformer_engine import LayerSpecError, TransformerEngineOptions
from tulu_hpc.parallel.layout import layout_of

REPOSITORY = Path(__file__).parents[2]
SHAPE = architecture()
TE = {"layer_spec": "transformer_engine", "dtype": "bfloat16"}
_LAYER = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


# ---------------------------------------------------------------------------------------------------------- the names
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_once_both_ways(tied: bool) -> None:
    """Under Transformer Engine's names, at tensor-parallel size 2: files -> shards -> files, bit for bit."""
    shape = architecture(tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(0)
    files = {name: torch.randn(size, generator=generator) for name, size in hf_shapes(shape).items()}
    rows = -(-shape.vocab_size // 2)
    head, query = shape.head_dim, shape.num_attention_heads // shape.num_key_value_heads
    local = {
        "self_attention.linear_qkv.weight": (shape.num_key_value_heads // 2 * (query + 2) * head, shape.hidden_size),
        "self_attention.linear_proj.weight": (shape.hidden_size, shape.num_attention_heads // 2 * head),
        "mlp.linear_fc1.weight": (shape.intermediate_size, shape.hidden_size),
        "mlp.linear_fc2.weight": (shape.hidden_size, shape.intermediate_size // 2),
    }
    names = {
        "embedding.word_embeddings.weight": (rows, shape.hidden_size),
        "output_layer.weight": (rows, shape.hidden_size),
    }
    names["decoder.final_layernorm.weight"] = (shape.hidden_size,)
    for layer in range(shape.num_hidden_layers):
        names |= {f"decoder.layers.{layer}.{n}": local.get(n, (shape.hidden_size,)) for n in _LAYER}
    if tied:
        del names["output_layer.weight"]
    found: Counter[str] = Counter()
    order = []
    for name, size in names.items():
        mapped = mapping(name, 0, shape)
        read = lambda n, index: files[n][index]  # noqa: E731
        shards = [read_local(mapped, read, torch.Size(size), rank, 2, shape) for rank in range(2)]
        assert all(shard.shape == size for shard in shards)
        for hf_name, tensor in zip(mapped.hf_names, merge_shards(mapped, shards, shape), strict=True):
            found[hf_name] += 1
            order.append((mapped.order, hf_name))
            assert torch.equal(tensor, files[hf_name]), hf_name
    assert found == Counter(files.keys())
    assert [name for _, name in sorted(order, key=lambda each: each[0])] == list(files)


def test_fp8_scales_are_no_weights() -> None:
    with pytest.raises(ValueError, match=r"linear_qkv\._extra_state' holds fp8 scales of Transformer Engine"):
        mapping("decoder.layers.0.self_attention.linear_qkv._extra_state", 0, SHAPE)


# -------------------------------------------------------------------------------------------------- the configuration
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"fp8": "hybrid", "dtype": "bfloat16"}, "fp8: hybrid needs layer_spec: transformer_engine"),
        ({"layer_spec": "transformer_engine", "fp8": "e4m3"}, "fp8: e4m3 needs dtype: bfloat16, got float32"),
        ({**TE, "fp8": "e5m2"}, "Input should be 'none', 'e4m3' or 'hybrid'"),
        ({**TE, "fp8": "hybrid", "fp8_recipe": "delayed"}, "delayed scaling is not supported: .* take tensorwise"),
        ({**TE, "fp8": "hybrid", "fp8_recipe": "rowwise"}, "Input should be 'tensorwise', 'blockwise' or 'mxfp8'"),
        ({"layer_spec": "te"}, "Input should be 'local' or 'transformer_engine'"),
    ],
)
def test_models_that_are_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelSection(path="x", **model)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"tensor": 1}, "tp_comm_overlap needs tensor > 1 with sequence parallelism"),
        ({"tensor": 2, "sequence": False}, "tp_comm_overlap needs tensor > 1 with sequence parallelism"),
        ({"tensor": 2, "context": 2, "context_split": "zigzag"}, "context_split greedy or contiguous"),
    ],
)
def test_layouts_that_are_refused(parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ParallelSection(tp_comm_overlap=True, **parallel)


def test_combinations_that_are_refused() -> None:
    overlap, local = ParallelSection(tensor=2, tp_comm_overlap=True), ModelSection(path="x")
    fp8 = ModelSection(path="x", fp8="hybrid", **TE)  # type: ignore[arg-type]
    blockwise = fp8.model_copy(update={"fp8_recipe": "blockwise"})
    plain = ModelSection(path="x", **TE)  # type: ignore[arg-type]
    for model, parallel, decodes, words in (
        (local, overlap, False, "tp_comm_overlap needs model.layer_spec: transformer_engine"),
        (blockwise, overlap, False, "does not work with model.fp8_recipe: blockwise"),
        (fp8, ParallelSection(), True, "model.fp8: hybrid does not work where this model generates"),
        (plain, overlap, True, "tp_comm_overlap does not work where this model generates"),
    ):
        with pytest.raises(ValueError, match=words):
            check_layer_spec(model, parallel, decodes=decodes)
    for model, parallel, decodes in (
        (local, ParallelSection(), True),
        (plain, ParallelSection(tensor=2), True),
        (fp8, overlap, False),
        (blockwise, ParallelSection(tensor=2), False),
    ):
        check_layer_spec(model, parallel, decodes=decodes)


def test_every_verb_checks_the_combination() -> None:
    from tulu_hpc.config.schema import DpoConfig, EvalConfig, PreferConfig, RlvrConfig, SftConfig

    for schema in (SftConfig, DpoConfig, RlvrConfig, PreferConfig, EvalConfig):
        with pytest.raises(ValidationError) as failure:
            schema.model_validate({**_minimal(schema.__name__), "parallel": {"tensor": 2, "tp_comm_overlap": True}})
        assert "tp_comm_overlap needs model.layer_spec: transformer_engine" in str(failure.value), schema


def _minimal(name: str) -> dict[str, Any]:
    train = {"steps": 1, "global_batch_size": 1}
    common: dict[str, Any] = {"model": {"path": "x"}, "data": {"path": "y"}, "optimizer": {"lr": 1.0}}
    return {
        "SftConfig": {**common, "train": train},
        "DpoConfig": {**common, "train": train},
        "RlvrConfig": {**common, "train": {"steps": 1}, "rlvr": {"prompts_per_step": 1, "samples_per_prompt": 2}},
        "PreferConfig": {"model": {"path": "x"}, "data": {"path": "y"}, "prefer": {"output": "z"}},
        "EvalConfig": {"model": {"path": "x"}, "eval": {"output": "z"}},
    }[name]


@pytest.mark.parametrize(
    ("fp8", "parallel", "rows"),
    [
        ({}, {"tensor": 2, "context": 2}, 4),
        ({"fp8": "hybrid"}, {"tensor": 2, "context": 2}, 64),
        ({"fp8": "hybrid", "fp8_recipe": "blockwise"}, {}, 128),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, {"tensor": 4}, 128),
        ({}, {"tensor": 4, "context": 2, "tp_comm_overlap": True}, 1000),
        ({"fp8": "hybrid"}, {"tensor": 4, "context": 2, "tp_comm_overlap": True}, 896),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, {"tensor": 2, "tp_comm_overlap": True}, 768),
    ],
)
def test_rows_of_a_pack(fp8: dict[str, Any], parallel: dict[str, Any], rows: int) -> None:
    """fp8 wants multiples on every rank; with overlap every pack has the same rows, all that train.pack_rows has."""
    section = ParallelSection(**parallel)
    step = row_step(ModelSection(path="x", **{**TE, **fp8}), section, pack_rows=1000)
    assert layout_of(section, step).row_multiple == rows
    if section.tp_comm_overlap:
        assert _usable(1000, rows) == rows  # what the loader fills a pack with
        with pytest.raises(ValueError, match=r"train\.pack_rows = 3: parallel.tp_comm_overlap needs packs of at least"):
            row_step(ModelSection(path="x", **{**TE, **fp8}), section, pack_rows=3)


# ------------------------------------------------------------------------------------------------------- the refusals
def test_a_missing_package_is_named_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from tulu_hpc.stages import model_source, training_run

    transformer_engine.check_layers("local")
    with pytest.raises(
        LayerSpecError, match=r"cannot be imported here: ModuleNotFoundError: .*set model\.layer_spec: local"
    ):
        transformer_engine.check_layers("transformer_engine")

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("process groups were started first")

    monkeypatch.setattr(training_run, "initialize", too_late)
    monkeypatch.setattr(model_source, "initialize", too_late)
    monkeypatch.setattr(training_run.determinism, "configure", lambda **_: None)
    model = ModelSection(path="x", **TE)  # type: ignore[arg-type]
    run = SimpleNamespace(deterministic=False, threads=1)
    with pytest.raises(LayerSpecError):
        training_run.open_run(SimpleNamespace(model=model, run=run), "sft")  # type: ignore[arg-type]
    with pytest.raises(LayerSpecError):
        model_source.open_model(run, model, ParallelSection())  # type: ignore[arg-type]


def test_communication_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once, with the arguments of Transformer Engine 2.20.2, and refused where the function is another one."""
    made: list[tuple[Any, ...]] = []

    def initialize_ub(
        shape: Any, tp_size: int, use_fp8: bool = False, quantization_modes: Any = None, dtype: Any = torch.bfloat16,
        ub_cfgs: Any = None, bootstrap_backend: Any = None, with_cublasmp: bool = False,
    ) -> None:  # fmt: skip
        made.append((shape, tp_size, quantization_modes, dtype, bootstrap_backend))

    mode = SimpleNamespace(NONE="none", FP8="fp8")
    name = "transformer_engine.pytorch.module.base"
    base = new_module(monkeypatch, name, initialize_ub=initialize_ub, UserBufferQuantizationMode=mode)
    monkeypatch.setattr(transformer_engine, "_buffers", None)
    start = transformer_engine.start_overlap
    start(TransformerEngineOptions(), 64, 2, torch.bfloat16)
    assert made == []
    for _ in range(2):
        start(TransformerEngineOptions("hybrid", overlap_rows=512), 64, 2, torch.bfloat16)
    assert made == [((512, 64), 2, ["fp8"], torch.bfloat16, "nccl")]
    with pytest.raises(
        LayerSpecError, match="has buffers for 512 rows of 64, and cannot make others for 256 rows of 64"
    ):
        start(TransformerEngineOptions(overlap_rows=256), 64, 2, torch.bfloat16)
    monkeypatch.setattr(transformer_engine, "_buffers", None)
    monkeypatch.setattr(base, "initialize_ub", lambda shape, tp_size, use_fp8=False, dtype=None, ub_cfgs=None: None)
    with pytest.raises(LayerSpecError, match=r"initialize_ub is not the function.*no parameter 'quantization_modes'"):
        start(TransformerEngineOptions(overlap_rows=256), 64, 2, torch.bfloat16)


# ------------------------------------------------------------------------------------- megatron-core on the stand-in
def test_the_layers_through_megatron(tmp_path: Path) -> None:
    """The same log-probs and gradients as with the local layers, whole and split over two ranks; HF names both ways."""
    path = os.pathsep.join([str(REPOSITORY / "tests" / "models" / "stand_in"), str(REPOSITORY)])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.models.transformer_engine_program", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert "runs on CUDA" in found["refused"]
    layers = [f"decoder.layers.{i}.{name}" for i in range(SHAPE.num_hidden_layers) for name in _LAYER]
    ends = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]
    assert sorted(found["names"]) == sorted(layers + ends)
    split = sorted(name for name in found["names"] if "norm" not in name)
    assert sorted(found["marked"]["one"]) == sorted(found["marked"]["two"]) == split
    assert found["extra"] == 4 * SHAPE.num_hidden_layers + 1  # the head has an empty one too
    assert found["stream"] == found["stream_two"] == found["hf_names"]
    assert found["exact"] == found["from_checkpoint"] == [True, True]
    assert found["against_local"] <= 1e-5 and found["split"] <= 3e-5
    assert len(found["last_stage"]) == len(_LAYER) * 2 + 2
    assert found["marked_meta"] == [name for name in found["last_stage"] if "norm" not in name]
    assert found["config"] == ["hybrid", "mxfp8", True]

"""Import and export of Hugging Face directories in one process; parallel layouts are in test_layouts.py."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.reference import VOCAB, architecture, hf_model, ours, write_model
from tests.parallel.forked import single_process
from tulu_hpc.config.architecture import Architecture, RopeScaling
from tulu_hpc.models.build import build_model, check_layout, layers_per_chunk, padded_vocab
from tulu_hpc.models.convert import load_hf, save_hf
from tulu_hpc.models.initialise import random_hf_model
from tulu_hpc.models.names import hf_shapes, mapping, merge_shards, read_local
from tulu_hpc.models.safetensors_files import HfDirectory, published
from tulu_hpc.parallel.layout import Groups, Layout, LayoutError, destroy, initialize_fake

LLAMA_405B = Architecture(
    vocab_size=128256,
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    rope_scaling=RopeScaling(factor=8.0),
)


@pytest.fixture
def groups() -> Iterator[Groups]:
    with single_process() as made:
        yield made


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def same(a: Path, b: Path) -> bool:
    left, right = tensors(a), tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [(7, 7), (8, 2), (5, 1)])
def test_what_transformers_saves_we_read_and_the_reverse(
    tied: bool, heads: tuple[int, int], groups: Groups, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=heads[0] * 8,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
        eos_token_id=5,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "chat_template.jinja").write_text("template")

    shape = Architecture.from_hf(tmp_path / "theirs")
    chunks = ours(shape, tmp_path / "theirs", groups)
    save_hf(chunks, tmp_path / "ours", shape, groups, source=tmp_path / "theirs", max_shard_bytes=15_000)
    assert same(tmp_path / "theirs", tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert (tmp_path / "ours" / "chat_template.jinja").read_text() == "template"
    assert (tmp_path / "ours" / "generation_config.json").is_file()
    assert Architecture.from_hf(tmp_path / "ours") == shape

    again = hf_model(tmp_path / "ours")
    assert again.config.eos_token_id == 5
    prompt = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(prompt).logits, again(prompt).logits)


def test_export_in_another_dtype(groups: Groups, tmp_path: Path) -> None:
    shape = architecture(num_hidden_layers=1)
    path = write_model(shape, tmp_path / "model")
    save_hf(ours(shape, path, groups), tmp_path / "out", shape, groups, source=path, dtype=torch.bfloat16)
    original, written = tensors(path), tensors(tmp_path / "out")
    assert all(torch.equal(original[name].bfloat16(), written[name]) for name in original)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_head_saved_beside_tied_embeddings_is_ignored(groups: Groups, tmp_path: Path) -> None:
    shape = architecture(num_hidden_layers=1, tie_word_embeddings=True)
    path = write_model(shape, tmp_path / "model")
    held = load_file(path / "model.safetensors")
    save_file({**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()}, path / "model.safetensors")
    load_hf(build_model(shape, groups, device="cpu"), path, shape, groups)


def spoil_missing(held: dict[str, torch.Tensor]) -> None:
    del held["model.norm.weight"]


def spoil_unexpected(held: dict[str, torch.Tensor]) -> None:
    held["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)


def spoil_shape(held: dict[str, torch.Tensor]) -> None:
    held["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_missing, r"missing \['model.norm.weight'\]"),
        (spoil_unexpected, r"unexpected \['model.layers.0.self_attn.q_proj.bias'\]"),
        (spoil_shape, r"layers.1.mlp.up_proj.weight has shape \(3, 64\), config.json says \(160, 64\)"),
    ],
)
def test_a_directory_that_is_not_the_model_is_refused(spoil: Any, words: str, groups: Groups, tmp_path: Path) -> None:
    shape = architecture(num_hidden_layers=2)
    path = write_model(shape, tmp_path / "model")
    held = load_file(path / "model.safetensors")
    spoil(held)
    save_file(held, path / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        ours(shape, path, groups)


def test_unreadable_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only safetensors"):
        HfDirectory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        HfDirectory(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ValueError, match=r"gone.safetensors"):
        HfDirectory(tmp_path)


def test_publication_is_atomic(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with published(target) as staging:
        (staging / "a").write_text("old")
        assert not target.exists()
    with pytest.raises(RuntimeError, match="midway"), published(target) as staging:
        (staging / "a").write_text("half")
        raise RuntimeError("midway")
    assert (target / "a").read_text() == "old"
    with published(target) as staging:
        (staging / "b").write_text("new")
    assert [file.name for file in target.iterdir()] == ["b"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_writer_killed_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with published(target) as staging:
        (staging / "a").write_text("old")
    rename = os.rename

    def killed(source: Any, destination: Any) -> None:
        if Path(destination) == target:
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt), published(target) as staging:
        (staging / "a").write_text("new")
    monkeypatch.undo()
    assert not target.exists()
    with pytest.raises(RuntimeError, match="midway"), published(target):
        assert (target / "a").read_text() == "old"
        raise RuntimeError("midway")
    assert (target / "a").read_text() == "old"


def test_an_index_that_lies_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}')
    with pytest.raises(ValueError, match=rf"{tmp_path}/model.safetensors: .*\bb\b"):
        HfDirectory(tmp_path).read("b", (slice(None),))
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        with pytest.raises(ValueError, match=rf"{index}: not an index"):
            HfDirectory(tmp_path)


def test_keys_that_config_json_lacks_mean_what_transformers_means(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    shape = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    ours, theirs = Architecture.from_hf(tmp_path), LlamaConfig(**shape)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.num_key_value_heads == theirs.num_key_value_heads and ours.head_dim == theirs.head_dim
    assert (
        ours.tie_word_embeddings == theirs.tie_word_embeddings
        and ours.rope_theta == theirs.rope_parameters["rope_theta"]
    )


@pytest.mark.parametrize("text", ["{", '{"model_type": "llama", "vocab_size": "many"}', '{"model_type": "llama"}'])
def test_a_bad_config_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json: "):
        Architecture.from_hf(tmp_path)


def test_export_failure_reaches_the_caller(groups: Groups, tmp_path: Path) -> None:
    shape = architecture(num_hidden_layers=1)
    path = write_model(shape, tmp_path / "model")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match="export failed"):
        save_hf(ours(shape, path, groups), tmp_path / "file" / "out", shape, groups, source=path)


@pytest.mark.parametrize(("vocab", "size"), [(128264, 8), (131, 2), (7, 4), (12, 8), (100, 3)])
def test_vocabulary_padding_is_zero_and_comes_off_again(vocab: int, size: int) -> None:
    shape = architecture(vocab_size=vocab, hidden_size=8, num_attention_heads=1, num_key_value_heads=1)
    rows = padded_vocab(vocab, size, 16)
    assert rows % (16 * size) == 0
    assert 0 <= rows - vocab < 16 * size
    weight = torch.arange(1, vocab * 8 + 1, dtype=torch.float32).view(vocab, 8)
    mapped = mapping("output_layer.weight", 0, shape)
    shards = [
        read_local(mapped, lambda _name, at: weight[at], torch.Size((rows // size, 8)), rank, size, shape)
        for rank in range(size)
    ]
    assert torch.equal(torch.cat(shards)[:vocab], weight)
    assert not torch.cat(shards)[vocab:].any()
    assert torch.equal(merge_shards(mapped, shards, shape)[0], weight)


def test_names_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match="no Hugging Face name"):
        mapping("decoder.layers.0.mlp.router.weight", 0, architecture())


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tensor=4), r"parallel.tensor = 4 is more than the model's 2 key/value heads.*parallel.tensor <= 2"),
        (Layout(pipeline=3), "4 layers cannot be dealt evenly to parallel.pipeline = 3"),
        (Layout(pipeline=2, virtual_pipeline=4), "do not divide into virtual_pipeline = 4"),
        (Layout(pipeline=2, account_for_loss=True), "cannot be dealt evenly"),
    ],
)
def test_layouts_that_do_not_fit_the_model_are_refused(layout: Layout, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        check_layout(architecture(), layout)
    with pytest.raises(LayoutError, match="does not divide num_key_value_heads = 9"):
        check_layout(architecture(num_attention_heads=9, num_key_value_heads=9, head_dim=8), Layout(tensor=2))


def test_405b_on_the_meta_device() -> None:
    """All parameters of one rank are there; the stages of tp 8 pp 16 add up to the whole."""
    layout = Layout(tensor=8, pipeline=16, sequence=True, account_for_embedding=True, account_for_loss=True)
    try:
        whole = build_model(LLAMA_405B, initialize_fake(Layout(), rank=0, world_size=1), device="meta")
        assert sum(p.numel() for chunk in whole for p in chunk.parameters()) == 405_853_388_800
        assert sum(stage[0] for stage in layers_per_chunk(LLAMA_405B, layout)) == 126
        total = 0
        for stage, same_stages in ((0, 1), (7, 14), (15, 1)):
            groups = initialize_fake(layout, rank=8 * stage + 3, world_size=128)
            (chunk,) = build_model(LLAMA_405B, groups, device="meta", dtype=torch.bfloat16)
            assert groups.pp_rank == stage
            assert {p.device.type for p in chunk.parameters()} == {"meta"}
            sizes = [(p.numel(), p.dim()) for p in chunk.parameters()]
            total += same_stages * sum(n * (8 if dim == 2 else 1) for n, dim in sizes)
        assert total == 405_853_388_800
    finally:
        destroy()


def test_split_weights_are_marked_for_the_gradient_norm() -> None:
    """megatron counts unmarked weights on the first tensor-parallel rank only."""
    try:
        groups = initialize_fake(Layout(tensor=2), rank=1, world_size=2)
        (chunk,) = build_model(architecture(), groups, device="meta")
        for name, parameter in chunk.named_parameters():
            assert getattr(parameter, "tensor_model_parallel", False) == ("norm" not in name), name
    finally:
        destroy()


def test_initialisation_is_seeded_per_tensor(tmp_path: Path) -> None:
    small, large = architecture(num_hidden_layers=1), architecture(num_hidden_layers=2, tie_word_embeddings=True)
    options = {"embedding_std": 0.5, "linear_std": 0.1, "scale_residual_outputs": False}
    random_hf_model(small, tmp_path / "a", seed=3, **options)  # type: ignore[arg-type]
    random_hf_model(small, tmp_path / "b", seed=3, max_shard_bytes=10_000, **options)  # type: ignore[arg-type]
    random_hf_model(large, tmp_path / "c", seed=3, **options)  # type: ignore[arg-type]
    random_hf_model(small, tmp_path / "d", seed=4, **options)  # type: ignore[arg-type]
    a, c, d = tensors(tmp_path / "a"), tensors(tmp_path / "c"), tensors(tmp_path / "d")
    assert same(tmp_path / "a", tmp_path / "b")
    assert {name: tuple(t.shape) for name, t in c.items()} == hf_shapes(large)
    shared = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(a[shared], c[shared])
    assert not torch.equal(a[shared], d[shared])
    assert float(a["model.embed_tokens.weight"].std()) == pytest.approx(0.5, rel=0.05)
    assert float(a[shared].std()) == pytest.approx(0.1, rel=0.1)
    scaled = {**options, "scale_residual_outputs": True}
    random_hf_model(large, tmp_path / "e", seed=3, **scaled)  # type: ignore[arg-type]
    down = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(tensors(tmp_path / "e")[down], c[down] / 2)

"""Hugging Face directory to checkpoint and back in files; what training makes of it is in tests/training."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.reference import VOCAB, architecture, hf_model, write_model
from tests.models.test_convert import LLAMA_405B, tensors
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models import conversion, conversion_job, stored_tensors
from tulu_hpc.models.build import build_model
from tulu_hpc.models.comparison import compare
from tulu_hpc.models.conversion import export_hf, import_hf
from tulu_hpc.models.convert import _parameters
from tulu_hpc.models.model_files import RECORD, open_model, read_record, verify_files
from tulu_hpc.models.names import hf_shapes
from tulu_hpc.models.safetensors_layout import read_header
from tulu_hpc.models.stored_names import stored_parameters
from tulu_hpc.parallel.layout import Layout, destroy, initialize_fake


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and chunks of a few rows, so that tiny tensors have many of each, none ending at a tensor's end."""
    monkeypatch.setattr(stored_tensors.read_blocks, "__defaults__", (0, None, 900))
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(conversion, "COLUMN_BAND_BYTES", 3000)


def differences(left: Path, right: Path, **options: Any) -> list[str]:
    return [f"{each.name}: {each.what}" for each in compare(open_model(left), open_model(right), **options)]


def same_bits(left: Path, right: Path) -> bool:
    a, b = tensors(left), tensors(right)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "dtype"), [((7, 7), "float32"), ((8, 2), "bfloat16"), ((5, 1), "float16")])
def test_there_and_back(tied: bool, heads: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=heads[0] * 8,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
        eos_token_id=5,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "chat_template.jinja").write_text("template")

    record = import_hf(tmp_path / "theirs", tmp_path / "ours", max_shard_bytes=15_000, workers=3)
    assert len(list((tmp_path / "ours").glob("__*.distcp"))) > 2
    assert differences(tmp_path / "theirs", tmp_path / "ours") == []
    export_hf(tmp_path / "ours", tmp_path / "back", max_shard_bytes=20_000, workers=3)
    assert same_bits(tmp_path / "theirs", tmp_path / "back")
    assert (
        differences(tmp_path / "ours", tmp_path / "back") == differences(tmp_path / "back", tmp_path / "theirs") == []
    )

    for name, tensor in tensors(tmp_path / "theirs").items():
        digest = xxhash.xxh3_128(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        assert record["tensors"][name] == {"dtype": dtype, "shape": list(tensor.shape), "xxh3": digest}
    assert read_record(tmp_path / "back")["tensors"] == record["tensors"]
    for made in ("ours", "back"):
        assert verify_files(tmp_path / made) == {}
        assert set(read_record(tmp_path / made)["files"]) == {p.name for p in (tmp_path / made).iterdir()} - {RECORD}
        assert (tmp_path / made / "chat_template.jinja").read_text() == "template"
        assert Architecture.from_hf(tmp_path / made) == Architecture.from_hf(tmp_path / "theirs")
        assert {p.name for p in tmp_path.iterdir()} == {"theirs", "ours", "back"}
    prompt = torch.arange(20)[None]
    with torch.no_grad():
        again = hf_model(tmp_path / "back")
        assert again.config.eos_token_id == 5
        assert torch.equal(hf_model(tmp_path / "theirs")(prompt).logits, again(prompt).logits)


@pytest.mark.usefixtures("small_blocks")
def test_another_dtype_on_either_way(tmp_path: Path) -> None:
    path = write_model(architecture(num_hidden_layers=1), tmp_path / "model")
    original = tensors(path)
    record = import_hf(path, tmp_path / "half", dtype=torch.bfloat16, workers=2)
    export_hf(tmp_path / "half", tmp_path / "single", dtype=torch.float32)
    assert all(torch.equal(original[name].bfloat16().float(), t) for name, t in tensors(tmp_path / "single").items())
    name = "model.layers.0.self_attn.k_proj.weight"
    wanted = xxhash.xxh3_128(original[name].view(-1).view(torch.uint8).numpy()).hexdigest()
    assert record["tensors"][name]["source"] == {"dtype": "float32", "xxh3": wanted}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    (first, *_rest) = differences(path, tmp_path / "half")
    assert first.startswith("model.embed_tokens.weight: dtype float32 in ") and len(_rest) == len(original) - 1
    assert differences(path, tmp_path / "half", dtype=torch.bfloat16) == []
    assert len(differences(path, tmp_path / "single")) > 5


def test_mixed_dtypes_must_be_decided(tmp_path: Path) -> None:
    path = write_model(architecture(num_hidden_layers=1), tmp_path / "model")
    held = load_file(path / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"].bfloat16()
    save_file(held, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is bfloat16"):
        import_hf(path, tmp_path / "out")
    import_hf(path, tmp_path / "out", dtype=torch.float32)
    assert differences(path, tmp_path / "out", dtype=torch.float32) == []


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.usefixtures("small_blocks")
def test_one_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    path = write_model(architecture(), tmp_path / "model")
    import_hf(path, tmp_path / "ours")
    name = "model.layers.2.self_attn.v_proj.weight"
    tensor = open_model(tmp_path / "ours").tensors[name]
    flip(tensor.pieces[-1].file, tensor.pieces[-1].offset + 5)
    with pytest.raises(ValueError, match=rf"ours: {name} is damaged: xxh3 .* conversion.json says"):
        differences(path, tmp_path / "ours")
    with pytest.raises(ValueError, match=rf"ours: {name} is damaged"):
        export_hf(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert list(verify_files(tmp_path / "ours")) == [tensor.pieces[-1].file.name]
    (tmp_path / "ours" / RECORD).unlink()  # nothing to hold it against: only the other model tells
    (found,) = differences(path, tmp_path / "ours")
    assert found.startswith(f"{name}: xxh3 ")
    header = read_header(path / "model.safetensors")
    flip(path / "model.safetensors", header["model.embed_tokens.weight"].pieces[0].offset)
    assert [line.split(":")[0] for line in differences(path, tmp_path / "ours")] == ["model.embed_tokens.weight", name]


def drop_a_tensor(path: Path) -> None:
    held = load_file(path / "model.safetensors")
    del held["model.norm.weight"]
    save_file(held, path / "model.safetensors")


def transpose(path: Path) -> None:
    held = load_file(path / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
    save_file(held, path / "model.safetensors")


def integers(path: Path) -> None:
    held = load_file(path / "model.safetensors")
    held["model.norm.weight"] = torch.zeros(64, dtype=torch.int32)
    save_file(held, path / "model.safetensors")


def cut_off(path: Path) -> None:
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 3)


def no_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"x" * 50)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop_a_tensor, r"model: does not hold .* missing \['model.norm.weight'\]"),
        (transpose, r"layers.1.mlp.up_proj.weight has shape \(3, 64\), config.json says \(160, 64\)"),
        (integers, r"model.safetensors: not a readable safetensors file: model.norm.weight has dtype I32"),
        (cut_off, r"model.safetensors: not a readable safetensors file"),
        (no_header, r"model.safetensors: not a readable safetensors file"),
    ],
)
def test_bad_sources_are_named(spoil: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    path = write_model(architecture(num_hidden_layers=2), tmp_path / "model")
    spoil(path)
    with pytest.raises(ValueError, match=words):
        import_hf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    path = write_model(architecture(num_hidden_layers=2), tmp_path / "model")
    import_hf(path, tmp_path / "ours")

    def spoilt(change: Callable[[Path], object]) -> Path:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "ours", tmp_path / "bad")
        change(tmp_path / "bad")
        return tmp_path / "bad"

    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda p: (p / "__0_0.distcp").unlink(), r"bad/__0_0.distcp: missing"),
        (lambda p: os.truncate(p / "__0_0.distcp", 100), r"bad/__0_0.distcp: .* is not a tensor"),
        (lambda p: (p / ".metadata").write_bytes(b"no"), r"bad/.metadata: not the index"),
        (lambda p: (p / RECORD).write_text("{"), r"bad/conversion.json: not readable"),
        (lambda p: (p / RECORD).write_text('{"format": 9}'), r"bad/conversion.json: format 9, this version reads 1"),
    ]
    for change, words in cases:
        with pytest.raises(ValueError, match=words):
            export_hf(spoilt(change), tmp_path / "out")
    other = architecture(num_hidden_layers=2, intermediate_size=80).to_hf()
    with pytest.raises(ValueError, match=r"linear_fc1.weight has shape \(2, 320, 64\), the config says \(2, 160, 64\)"):
        spoilt(lambda p: (p / "config.json").write_text(json.dumps({**other, "model_type": "llama"})))
        export_hf(tmp_path / "bad", tmp_path / "out")
    with pytest.raises(ValueError, match="is a Hugging Face directory already"):
        export_hf(path, tmp_path / "out")
    with pytest.raises(ValueError, match="is a checkpoint already"):
        import_hf(tmp_path / "ours", tmp_path / "out")
    with pytest.raises(ValueError, match="ours: exists already"):
        import_hf(path, tmp_path / "ours")


def test_a_failing_thread_stops_the_others_and_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full in the middle; what was finished is kept, the damaged and the half are written again."""
    path = write_model(architecture(), tmp_path / "model")
    original = conversion_job._write_note

    def full(file: Path, value: Any) -> None:
        if file.name == "__6_0.distcp.json":
            raise OSError(28, "No space left on device")
        original(file, value)

    monkeypatch.setattr(conversion_job, "_write_note", full)
    with pytest.raises(OSError, match="No space left"):
        import_hf(path, tmp_path / "ours", max_shard_bytes=60_000, workers=2)
    monkeypatch.undo()
    staging = tmp_path / ".ours.converting"
    finished = sorted(p.name.removesuffix(".json") for p in (staging / "progress").glob("__*.json"))
    assert len(finished) >= 4 and not (tmp_path / "ours").exists()
    flip(staging / finished[0], 3000)
    before = {name: (staging / name).stat().st_mtime_ns for name in finished}
    kept: list[bool] = []
    import_hf(path, tmp_path / "ours", max_shard_bytes=60_000, workers=2, done=lambda _n, was: kept.append(was))
    assert sum(kept) == len(finished) - 1
    after = {name: (tmp_path / "ours" / name).stat().st_mtime_ns for name in finished}
    assert [name for name in finished if before[name] != after[name]] == finished[:1]
    assert differences(path, tmp_path / "ours") == [] and verify_files(tmp_path / "ours") == {}


def test_another_plan_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another dtype nor a changed source may reuse files."""
    path = write_model(architecture(num_hidden_layers=2), tmp_path / "model")
    finish = conversion._finish

    def killed(*args: Any) -> Any:
        raise KeyboardInterrupt

    for change in ("dtype", "source"):
        monkeypatch.setattr(conversion, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            import_hf(path, tmp_path / change)
        monkeypatch.setattr(conversion, "_finish", finish)
        if change == "source":
            write_model(architecture(num_hidden_layers=2), path, seed=2)
        kept: list[bool] = []
        dtype = torch.bfloat16 if change == "dtype" else None
        import_hf(path, tmp_path / change, dtype=dtype, done=lambda _n, was: kept.append(was))  # noqa: B023
        assert kept == [False]
        assert differences(path, tmp_path / change, dtype=dtype) == []


def test_two_writers_of_one_target(tmp_path: Path) -> None:
    with (
        conversion_job.staged(tmp_path / "out", {}),
        pytest.raises(ValueError, match="another process is writing"),
        conversion_job.staged(tmp_path / "out", {}),
    ):
        pass


def hf_405b() -> dict[str, tuple[int, ...]]:
    """Every tensor of transformers' model, on the meta device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_405B.to_hf()))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_405b_name_table_against_transformers() -> None:
    """Each of its 1,137 tensors is made of exactly all its rows, once, and has its shape."""
    theirs = hf_405b()
    assert hf_shapes(LLAMA_405B) == theirs and len(theirs) == 1137
    rows: dict[str, list[tuple[int, int]]] = {}
    for parameter in stored_parameters(LLAMA_405B):
        assert parameter.shape[0] == sum(part.count for part in parameter.parts)
        for part in parameter.parts:
            assert parameter.shape[1:] == theirs[part.name][1:]
            rows.setdefault(part.name, []).append((part.start, part.start + part.count))
    assert rows.keys() == theirs.keys()
    for name, ranges in rows.items():
        ranges.sort()
        starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
        assert starts == [0, *ends[:-1]] and ends[-1] == theirs[name][0], name


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=8, pipeline=16, sequence=True, account_for_embedding=True, account_for_loss=True),
        Layout(tensor=4, pipeline=6),
        Layout(tensor=1, pipeline=2, virtual_pipeline=9),
        Layout(tensor=2, pipeline=9, first_stage_layers=10, last_stage_layers=18),
    ],
)
def test_405b_both_ways_at_several_layouts(layout: Layout) -> None:
    """What megatron asks of a checkpoint is what the importer writes, and covers it exactly once; and the model's
    parameters have each Hugging Face name exactly once."""
    wanted: dict[tuple[str, int | None], tuple[int, ...]] = {
        (p.key, p.layer): p.shape for p in stored_parameters(LLAMA_405B)
    }
    names: list[str] = []
    covered: dict[tuple[str, int | None], int] = {}
    try:
        for stage in range(layout.pipeline):
            for tp_rank in {0, layout.tensor - 1}:
                groups = initialize_fake(
                    layout, rank=stage * layout.tensor + tp_rank, world_size=layout.tensor * layout.pipeline
                )
                assert (groups.pp_rank, groups.tp_rank) == (stage, tp_rank)
                chunks = build_model(LLAMA_405B, groups, device="meta", dtype=torch.bfloat16)
                if tp_rank == 0:
                    names += [n for _, _, mapped in _parameters(chunks, LLAMA_405B) for n in mapped.hf_names]
                for chunk in chunks:
                    _check_requests(chunk, wanted, covered, tp_rank, layout)
    finally:
        destroy()
    assert sorted(names) == sorted(hf_shapes(LLAMA_405B))
    shares = len({0, layout.tensor - 1})
    for key, shape in wanted.items():
        whole = torch.Size(shape).numel()
        split = len(shape) == 2
        assert covered[key] == (whole // layout.tensor * shares if split else whole * shares), key


def _check_requests(
    chunk: Any,
    wanted: dict[tuple[str, int | None], tuple[int, ...]],
    covered: dict[tuple[str, int | None], int],
    tp_rank: int,
    layout: Layout,
) -> None:
    """Every tensor that a rank asks for lies inside a parameter of the table, in its own tensor-parallel share."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    request = chunk.sharded_state_dict(metadata={"singleton_local_shards": False})
    apply_factories(request)
    for each in nested_values(request):
        if not isinstance(each, ShardedTensor):
            assert "_extra_state" in each.key
            continue
        layered = each.key.startswith("decoder.layers.")
        layer = each.global_offset[0] if layered else None
        shape = wanted[each.key, layer]
        assert each.global_shape == ((LLAMA_405B.num_hidden_layers, *shape) if layered else shape), each.key
        offset = each.global_offset[1:] if layered else each.global_offset
        assert all(o + n <= whole for o, n, whole in zip(offset, each.local_shape, shape, strict=True))
        if len(shape) == 2:  # the share of this rank: along rows (of gate and up alike) or along columns
            at = next((i for i, n in enumerate(each.local_shape) if n != shape[i]), 0)
            first = offset[at] % (layout.tensor * each.local_shape[at])
            assert first == tp_rank * each.local_shape[at], (each.key, offset)
        covered[each.key, layer] = covered.get((each.key, layer), 0) + torch.Size(each.local_shape).numel()

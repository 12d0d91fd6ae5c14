"""The four data verbs as the command line runs them, on small sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.schema import DecontaminateConfig, InitialiseConfig, MixConfig, PreferConfig, SyntheticConfig
from tulu_hpc.config.sections import DataSection
from tulu_hpc.data.records import read_records
from tulu_hpc.data.rows import RecordError
from tulu_hpc.stages import decontaminate, initialise, mix, prefer, synthesize
from tulu_hpc.stages.tables import format_table

EVALS = ("math_dev", "if_dev", "math_unseen", "if_unseen")
SOURCES = ("sft_math", "sft_instructions", "preference_prompts", "rlvr")


def synthetic_config(root: Path, **changes: Any) -> SyntheticConfig:
    sizes = {"sft_math": 400, "sft_instructions": 200, "preference_prompts": 40, "rlvr_prompts": 60, "eval_rows": 16}
    return SyntheticConfig.model_validate({"synthetic": {"output": str(root), **sizes, "leaks": 8, **changes}})


def decontaminate_config(root: Path, **changes: Any) -> DecontaminateConfig:
    evals = [
        {
            "name": name,
            "path": f"{root}/eval/{name}.jsonl",
            "fields": ["question" if name.startswith("math") else "prompt"],
            "unseen": name.endswith("unseen"),
        }
        for name in EVALS
    ]
    train = [{"name": name, "path": f"{root}/raw/{name}.jsonl"} for name in SOURCES]
    section = {"train": train, "evals": evals, "action": "drop_rows", "output": f"{root}/clean", **changes}
    return DecontaminateConfig.model_validate({"decontaminate": section})


def mix_config(root: Path, **changes: Any) -> MixConfig:
    sources = [
        {"name": "math", "path": f"{root}/clean/sft_math.jsonl", "count": 100},
        {"name": "instructions", "path": f"{root}/clean/sft_instructions.jsonl", "fraction": 0.5},
    ]
    return MixConfig.model_validate({"mix": {"sources": sources, "output": f"{root}/sft.jsonl", **changes}})


def initialise_config(root: Path, **changes: Any) -> InitialiseConfig:
    return InitialiseConfig.model_validate(
        {
            "tokenizer": {"texts": [f"{root}/sft.jsonl"], "vocab_size": 600, **changes},
            "architecture": {
                "vocab_size": 600,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "tie_word_embeddings": True,
            },
            "initialise": {"output": f"{root}/initial"},
        }
    )


def test_from_nothing_to_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synthesize.run(synthetic_config(tmp_path)) == tmp_path
    assert "sft_math             402" in capsys.readouterr().out
    report = decontaminate.run(decontaminate_config(tmp_path, planted=f"{tmp_path}/raw/leaks.json"))
    assert "planted leaks: 8 of 8 found, 8 removed" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["planted"]["found"] == 8
    for source in written["sources"]:
        kind: Any = "sft" if source["name"].startswith("sft") else "rlvr"
        assert len(read_records(tmp_path / "clean" / f"{source['name']}.jsonl", kind)) == source["kept"]
    assert mix.run(mix_config(tmp_path)) == tmp_path / "sft.jsonl"
    assert "instructions" in capsys.readouterr().out
    statistics = json.loads((tmp_path / "sft.statistics.json").read_text())
    mixed = read_records(tmp_path / "sft.jsonl", "sft")
    assert statistics["rows"] == len(mixed) == sum(s["taken"] for s in statistics["sources"])
    assert initialise.run(initialise_config(tmp_path)) == tmp_path / "initial"
    check_model(tmp_path / "initial")


def check_model(path: Path) -> None:
    """transformers loads it as it is, and knows where generation ends."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    assert model.config.vocab_size == len(tokenizer) <= 600
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.pad_token_id == tokenizer.pad_token_id
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>\nHi\n<|assistant|>\n"


def test_everything_is_repeatable(tmp_path: Path) -> None:
    def files(root: Path) -> dict[str, bytes]:
        synthesize.run(synthetic_config(root))
        decontaminate.run(decontaminate_config(root))
        mix.run(mix_config(root))
        initialise.run(initialise_config(root))
        kept = (
            p for p in sorted(root.rglob("*")) if p.is_file() and p.name not in ("report.json", "sft.statistics.json")
        )
        return {str(p.relative_to(root)): p.read_bytes() for p in kept}

    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    assert first == second and "initial/model.safetensors" in first


def test_the_paper_action_drops_a_set_that_an_unseen_evaluation_condemns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthesize.run(synthetic_config(tmp_path, leaks=24))
    decontaminate.run(decontaminate_config(tmp_path, action="paper"))
    assert "drop set" in capsys.readouterr().out
    assert any((tmp_path / "clean" / f"{name}.jsonl").read_text() == "" for name in SOURCES)


def test_problems_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthesize.run(synthetic_config(tmp_path))
    raw = tmp_path / "raw"
    for text, words in (
        ("[", "not a side file of planted leaks: the file: Invalid JSON"),
        ("[]", "not a side file of planted leaks: the file: "),
        ('{"rows": 3}', "not a side file of planted leaks: rows: "),
        ('{"rows": [{"line": 3}]}', "not a side file of planted leaks: rows.0.source: Field required"),
        ('{"rows": [{"source": "rlvr", "line": "3"}]}', "not a side file of planted leaks: rows.0.line: .*integer"),
        ('{"rows": [{"source": "other", "line": 3}]}', "rows.0: source 'other' is not among the training sets"),
        ('{"rows": [{"source": "rlvr", "line": 99}]}', "rows.0: line 99 of 'rlvr', which has 62 rows"),
    ):
        (raw / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=f"bad.json: {words}"):
            decontaminate.run(decontaminate_config(tmp_path, planted=str(raw / "bad.json")))
    decontaminate.run(decontaminate_config(tmp_path))
    with (tmp_path / "clean" / "sft_math.jsonl").open("a") as stream:
        stream.write('{"messages": 3}\n')
    with pytest.raises(RecordError, match=r"clean/sft_math.jsonl:\d+: messages: is 3"):
        mix.run(mix_config(tmp_path))
    sources = [{"name": "math", "path": f"{tmp_path}/clean/sft_math.jsonl", "count": 1000}]
    mix.run(mix_config(tmp_path, on_error="skip", sources=sources))
    printed = capsys.readouterr().out
    assert "math: " in printed and "of the rows asked for do not exist" in printed
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl"):
        initialise.run(initialise_config(tmp_path, texts=["nowhere.jsonl"]))
    assert not (tmp_path / "initial").exists()


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_nothing_that_is_read_is_overwritten(tmp_path: Path) -> None:
    synthesize.run(synthetic_config(tmp_path))
    raw, name = tmp_path / "raw", "sft_math"
    (tmp_path / "link").symlink_to(raw)
    report = tmp_path / "planted" / "report.json"
    report.parent.mkdir()
    report.write_bytes((raw / "leaks.json").read_bytes())
    source = {"name": name, "path": f"{raw}/{name}.jsonl"}
    before = contents(tmp_path)
    for changes, words in (
        ({"output": f"{tmp_path}/eval/../raw"}, r"raw/sft_math\.jsonl would replace .*raw/sft_math\.jsonl"),
        ({"output": f"{tmp_path}/link"}, r"link/sft_math\.jsonl would replace .*raw/sft_math\.jsonl"),
        (
            {"train": [{**source, "name": "rlvr"}, {**source, "path": f"{raw}/rlvr.jsonl"}], "output": str(raw)},
            "replace",
        ),
        ({"train": [{**source, "name": "math_dev"}], "output": f"{tmp_path}/eval"}, r"replace .*eval/math_dev\.jsonl"),
        ({"planted": str(report), "output": str(report.parent)}, r"report\.json would replace .*planted/report\.json"),
        (
            {"train": [{**source, "path": str(raw)}], "output": f"{raw}/clean"},
            r"clean/sft_math\.jsonl lies in .*raw, which",
        ),
    ):
        with pytest.raises(ConfigError, match=f"decontaminate.output: .*{words}"):
            decontaminate.run(decontaminate_config(tmp_path, **changes))
    for source_path, output, words in (
        (f"{raw}/{name}.jsonl", f"{raw}/{name}.jsonl", "would replace"),
        (f"{raw}/{name}.jsonl", f"{tmp_path}/link/{name}.jsonl", "would replace"),
        (str(raw), f"{raw}/mixed/all.jsonl", "lies in"),
    ):
        sources = [{"name": "math", "path": source_path}]
        with pytest.raises(ConfigError, match=rf"mix\.output: .* {words} .*, which is read here; give another output"):
            mix.run(mix_config(tmp_path, sources=sources, output=output))
    assert contents(tmp_path) == before


def prefer_config(root: Path, **changes: Any) -> PreferConfig:
    section = {"output": f"{root}/pairs.jsonl", **changes}
    return PreferConfig.model_validate(
        {"model": {"path": f"{root}/model"}, "data": {"path": f"{root}/prompts"}, "prefer": section}
    )


def test_prefer_does_not_replace_its_prompts(tmp_path: Path) -> None:
    """Refused before the model is opened (there is none)."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.jsonl").write_text("{}\n")
    for output in ("prompts/a.jsonl", "prompts/pairs.jsonl"):
        with pytest.raises(ConfigError, match=r"prefer\.output: .* lies in .*prompts, which is read here"):
            prefer.run(prefer_config(tmp_path, output=f"{tmp_path}/{output}"))
    own = prefer_config(tmp_path).model_copy(update={"data": DataSection(path=[f"{tmp_path}/prompts/a.jsonl"])})
    same = own.model_copy(update={"prefer": own.prefer.model_copy(update={"output": own.data.path[0]})})
    with pytest.raises(ConfigError, match=r"prefer\.output: .*a\.jsonl would replace .*a\.jsonl"):
        prefer.run(same)
    (tmp_path / "prompts").rename(tmp_path / "pairs.jsonl.parts")
    inside = own.model_copy(update={"data": DataSection(path=[f"{tmp_path}/pairs.jsonl.parts/a.jsonl"])})
    with pytest.raises(ConfigError, match=r"pairs\.jsonl\.parts would be replaced, and .*a\.jsonl is read from there"):
        prefer.run(inside)


def test_unfinished_work_is_kept_in_a_directory_of_its_own(tmp_path: Path) -> None:
    parts = tmp_path / "pairs.jsonl.parts"
    parts.mkdir()
    prefer._open_parts(parts, "a")
    (parts / "identity").write_text("b")
    prefer._open_parts(parts, "a")
    assert [path.name for path in parts.iterdir()] == ["identity"] and (parts / "identity").read_text() == "a"
    (parts / "identity").rename(parts / "thesis.tex")
    with pytest.raises(ConfigError, match=r"parts is where unfinished work is kept, and holds something else"):
        prefer._open_parts(parts, "a")
    assert (parts / "thesis.tex").is_file()


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml", ".hidden", "sub/config.json", "weights.bin"])
def test_initialise_replaces_models_only(tmp_path: Path, name: str) -> None:
    synthesize.run(synthetic_config(tmp_path, sft_math=40))
    texts = [f"{tmp_path}/raw/sft_math.jsonl"]
    output = tmp_path / "initial"
    output.mkdir()
    initialise.run(initialise_config(tmp_path, texts=texts))
    first = contents(output)
    initialise.run(initialise_config(tmp_path, texts=texts))
    assert contents(output) == first, "an empty directory and an earlier model are replaced"
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("of somebody")
    before = contents(output)
    entry = name.partition("/")[0]
    with pytest.raises(ConfigError, match=rf"initial would be replaced, and {entry} in it is not part of a model"):
        initialise.run(initialise_config(tmp_path, texts=texts))
    assert contents(output) == before


def test_initialise_does_not_replace_its_texts(tmp_path: Path) -> None:
    (tmp_path / "initial").mkdir()
    (tmp_path / "initial" / "tokenizer.json").write_text("{}")
    config = initialise_config(tmp_path, texts=[f"{tmp_path}/initial/tokenizer.json"])
    with pytest.raises(ConfigError, match=r"initial would be replaced, and .*tokenizer\.json is read from there"):
        initialise.run(config)


def test_an_output_needs_a_directory_to_lie_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a.statistics.json").mkdir()
    for call in (
        lambda: synthesize.run(synthetic_config(tmp_path / "file")),
        lambda: decontaminate.run(decontaminate_config(tmp_path, output=f"{tmp_path}/file/clean")),
        lambda: mix.run(mix_config(tmp_path, output=f"{tmp_path}/file/sub/a.jsonl")),
        lambda: prefer.run(prefer_config(tmp_path, output=f"{tmp_path}/file/a.jsonl")),
        lambda: initialise.run(initialise_config(tmp_path / "file")),
    ):
        with pytest.raises(ConfigError, match=r"^\w+\.output: .* cannot be written, .*file is a file$"):
            call()
    with pytest.raises(ConfigError, match=r"mix\.output: .*a\.statistics\.json is a directory, it must become a file"):
        mix.run(mix_config(tmp_path, output=f"{tmp_path}/a.jsonl"))


def test_a_mixture_without_rows_is_refused(tmp_path: Path) -> None:
    synthesize.run(synthetic_config(tmp_path))
    sources = [{"name": name, "path": f"{tmp_path}/raw/{name}.jsonl", "fraction": 1e-4} for name in SOURCES[:2]]
    with pytest.raises(ValueError, match=r"no row is taken \(sft_math 0 of 402, sft_instructions 0 of 202\)"):
        mix.run(mix_config(tmp_path, sources=sources))
    assert not (tmp_path / "sft.jsonl").exists() and not (tmp_path / "sft.statistics.json").exists()


def test_tables_line_up() -> None:
    assert format_table(["name", "n"], [["a", 5], ["long", 100]]) == "name    n\na       5\nlong  100"

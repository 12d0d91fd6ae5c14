"""The four data verbs as the command line runs them, on small sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tulu_hpc.config.schema import DecontaminateConfig, InitialiseConfig, MixConfig, SyntheticConfig
from tulu_hpc.data.records import RecordError, read_records
from tulu_hpc.stages import decontaminate, initialise, mix, synthesize
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
    (raw / "bad.json").write_text('{"rows": [{"line": 3}]}')
    with pytest.raises(ValueError, match=r"bad.json: not a side file of planted leaks"):
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


def test_sources_are_not_overwritten(tmp_path: Path) -> None:
    synthesize.run(synthetic_config(tmp_path))
    before = (tmp_path / "raw" / "sft_math.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"raw/sft_math\.jsonl: the cleaned file would replace its source"):
        decontaminate.run(decontaminate_config(tmp_path, output=f"{tmp_path}/eval/../raw"))
    sources = [{"name": "math", "path": f"{tmp_path}/raw/sft_math.jsonl"}]
    with pytest.raises(ValueError, match=r"mix\.output .*sft_math\.jsonl: is one of the sources"):
        mix.run(mix_config(tmp_path, sources=sources, output=f"{tmp_path}/raw/sft_math.jsonl"))
    assert (tmp_path / "raw" / "sft_math.jsonl").read_bytes() == before


def test_tables_line_up() -> None:
    assert format_table(["name", "n"], [["a", 5], ["long", 100]]) == "name    n\na       5\nlong  100"

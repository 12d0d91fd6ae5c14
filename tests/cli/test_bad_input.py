"""Every verb on bad input: exit code 2 and one line `error: ...` that names the cause; no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tulu_hpc.cli.main import main

MODEL = "model: {path: DIR/none}\n"
DATA = "data: {path: DIR/none.jsonl}\n"
TRAIN = "optimizer: {lr: 1e-3}\ntrain: {steps: 1, global_batch_size: 2}\n"
FILES = {
    "sft": MODEL + DATA + TRAIN,
    "dpo": MODEL + DATA + TRAIN,
    "rlvr": MODEL
    + "data: {path: DIR/none.jsonl, max_length: 1024}\noptimizer: {lr: 1e-3}\ntrain: {steps: 1}\n"
    + "rlvr: {prompts_per_step: 1, samples_per_prompt: 2}\n",
    "recipe": "steps: [{name: a, verb: sft, config: DIR/none.yaml}]\nreport: {title: t}\n",
    "eval": MODEL + "eval: {output: DIR/out, dev: [{name: a, task: gsm8k, path: DIR/none.jsonl}]}\n",
    "data synthesize": "synthetic: {output: DIR/d, sft_math: 1,"
    " sft_instructions: 1, preference_prompts: 1, rlvr_prompts: 1}\n",
    "data mix": "mix: {output: DIR/o.jsonl, sources: [{name: a, path: DIR/none.jsonl}]}\n",
    "data decontaminate": "decontaminate: {output: DIR/o, train: [{name: a, path: DIR/none.jsonl}],"
    " evals: [{name: e, path: DIR/none.jsonl, fields: [question]}]}\n",
    "data prefer": MODEL + DATA + "prefer: {output: DIR/p.jsonl}\n",
    "convert initialise": "tokenizer: {texts: [DIR/none.jsonl]}\n"
    "architecture: {vocab_size: 8, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1,"
    " num_attention_heads: 1, num_key_value_heads: 1}\ninitialise: {output: DIR/init}\n",
    "plan": MODEL + DATA + TRAIN + "sft: {}\n",
    "launch": MODEL + DATA + TRAIN + "sft: {}\n",
}
REACH_DATA = [verb for verb in FILES if verb not in ("data synthesize", "launch")]


@pytest.fixture(autouse=True)
def _plain_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "TULU_HPC_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def write(tmp_path: Path, verb: str) -> Path:
    path = tmp_path / f"{verb.replace(' ', '_')}.yaml"
    path.write_text(FILES[verb].replace("DIR", str(tmp_path)))
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    captured = capsys.readouterr()
    assert error.value.code == 2, captured
    lines = [line for line in captured.err.splitlines() if "error: " in line]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize("verb", FILES)
def test_missing_file(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.yaml: no such file" in fails(capsys, *verb.split(), "nothing.yaml")


@pytest.mark.parametrize("verb", FILES)
def test_unknown_key(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = fails(capsys, *verb.split(), str(write(tmp_path, verb)), "run.sed=3")
    assert line == "error: command line: run.sed: unknown key; did you mean run.seed?"


@pytest.mark.parametrize("verb", FILES)
def test_wrong_type(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = fails(capsys, *verb.split(), str(write(tmp_path, verb)), "run.seed=many")
    assert line == "error: command line: run.seed: expected a valid integer, got 'many' (string)"


@pytest.mark.parametrize("verb", FILES)
def test_missing_section(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write(tmp_path, verb)
    lines = path.read_text().splitlines()
    drop = next(i for i, line in enumerate(lines) if not line.startswith(("run", "sft: {}")))
    path.write_text("\n".join(lines[:drop] + lines[drop + 1 :]) + "\n")
    assert ": missing" in fails(capsys, *verb.split(), str(path))


@pytest.mark.parametrize("verb", REACH_DATA)
def test_missing_model_or_data(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"{tmp_path}/none" in fails(capsys, *verb.split(), str(write(tmp_path, verb)))


@pytest.mark.parametrize("verb", ["sft", "dpo", "rlvr", "eval", "data prefer"])
def test_not_a_llama(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2 #### 2"}) + "\n")
    (tmp_path / "none" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    line = fails(capsys, *verb.split(), str(write(tmp_path, verb)))
    assert "model_type 'mamba' is not supported" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft"], "Missing argument 'CONFIG'"),
        (["sfft"], "No such command 'sfft'"),
        (["plan", "FILE", "--gpu", "h1000"], "did you mean h100"),
        (["plan", "FILE", "--gpus", "many"], "--gpus"),
        (["launch", "FILE"], "give --gpus-per-node"),
        (["launch", "FILE", "--verb", "mix"], "expected one of sft, dpo, rlvr"),
        (["bench", "nothing"], "no benchmark named 'nothing'"),
    ],
)
def test_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape = "vocab_size: 8, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1"
    path = tmp_path / "f.yaml"
    architecture = "architecture: {" + shape + ", num_key_value_heads: 1}"
    path.write_text("model: {path: m, " + architecture + "}\ndata: {path: d}\n" + TRAIN + "sft: {}\n")
    assert message in fails(capsys, *(str(path) if each == "FILE" else each for each in arguments))


def test_rank_is_named_under_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert fails(capsys, "sft", "nothing.yaml").startswith("[rank 3] error: ")


def test_traceback_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TULU_HPC_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such file"):
        main(["sft", "nothing.yaml"])


@pytest.mark.parametrize("verb", FILES)
def test_print_config_runs_nothing(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        main([*verb.split(), str(write(tmp_path, verb)), "--print-config", "run.seed=7"])
    assert error.value.code == 0
    assert "seed: 7" in capsys.readouterr().out


def test_launch_dry_run_prints_the_job(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        main(["launch", str(write(tmp_path, "launch")), "--nodes", "2", "--gpus-per-node", "4", "--dry-run"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n") and "#SBATCH --nodes=2" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", ["data synthesize", "data mix", "data decontaminate", "convert initialise"])
def test_verbs_of_one_process_refuse_torchrun(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = fails(capsys, *verb.split(), str(write(tmp_path, verb)))
    assert line == "[rank 1] error: this verb is a single process, not 2; run it without torchrun"


def test_one_suite_or_both(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "exclude each other" in fails(capsys, "eval", str(write(tmp_path, "eval")), "--unseen", "--both")


def test_unused_keys_of_a_source_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`count` is a key of a mixture's source; here it would do nothing."""
    path = write(tmp_path, "data decontaminate")
    path.write_text(path.read_text().replace("{name: a, ", "{name: a, count: 3, "))
    assert "decontaminate.train.0.count: unknown key" in fails(capsys, "data", "decontaminate", str(path))


def test_recipe_dry_run_prints_the_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        main(["recipe", "configs/quickstart/recipe.yaml", "--dry-run", f"run.root={tmp_path}/root"])
    assert error.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("synthesize: ") and "-m tulu_hpc data synthesize" in lines[0]
    assert any("--nproc-per-node 2 -m tulu_hpc dpo " in line for line in lines)
    assert not (tmp_path / "root").exists()

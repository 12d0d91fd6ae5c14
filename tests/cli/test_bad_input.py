"""Every verb on bad input: exit code 2 and one line `error: ...` that names the cause; no traceback."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import pytest

from tulu_hpc.cli.main import main
from tulu_hpc.data import rows

MODEL = "model: {path: DIR/none}\n"
DATA = "data: {path: DIR/none.jsonl}\n"
TRAIN = "optimizer: {lr: 1e-3}\ntrain: {steps: 1, global_batch_size: 2}\n"
FILES = {
    "sft": MODEL + DATA + TRAIN,
    "dpo": MODEL + DATA + TRAIN,
    "rm": MODEL + DATA + TRAIN,
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
        (["plan", "FILE", "--gpu", "inf"], "--gpu 'inf': need a number of GiB above 0"),
        (["plan", "FILE", "--gpu", "nan"], "--gpu 'nan': need a number of GiB above 0"),
        (["plan", "FILE", "--gpu", "0"], "--gpu '0': need a number of GiB above 0"),
        (["launch", "FILE", "--gpus-per-node", "1", "--job-name", "a\nb", "--dry-run"], "job-name 'a\\nb': an #SBATCH"),
        (["launch", "FILE", "--gpus-per-node", "1", "--sbatch", "a\nb", "--dry-run"], "sbatch 'a\\nb': one line"),
        (["plan", "FILE", "--gpus", "many"], "--gpus"),
        (["launch", "FILE"], "give --gpus-per-node"),
        (["launch", "FILE", "--verb", "mix"], "expected one of sft, dpo, rm, rlvr"),
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


@pytest.mark.parametrize("verb", FILES)
@pytest.mark.parametrize(
    "text", ["run: {name: \x07}\n", "run: {name: !!binary aGk=}\n", "run: " + "[" * 3000, "run: \xff"]
)
def test_unusable_yaml(verb: str, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write(tmp_path, verb)
    path.write_bytes(text.encode("latin-1"))
    assert fails(capsys, *verb.split(), str(path)).startswith(f"error: {path}")


@pytest.mark.parametrize("verb", FILES)
@pytest.mark.parametrize("value", ["\x07", "\udc80", "[" * 3000])
def test_unusable_override(verb: str, value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = fails(capsys, *verb.split(), str(write(tmp_path, verb)), f"run.name={value}")
    assert line.startswith("error: command line: run.name: not a YAML value: ")


SFT_ROW = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "question": "a b",
    "answer": "#### 1",
}
PACKED = gzip.compress((json.dumps({**SFT_ROW, "noise": random.Random(0).randbytes(3000).hex()}) + "\n").encode())
CONTENTS = {
    "none.jsonl": [
        (b"", "none.jsonl"),
        (b"\xff\n", "none.jsonl:1: not JSON"),
        (b"3\n", "none.jsonl:1: is 3, need an object"),
        (b"[" * 100_000, "none.jsonl:1: nested too deeply"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}], "question": "\\ud800", "answer": "#### 1"}', ":1: "),
    ],
    "none.jsonl.gz": [
        (b"no gzip", "none.jsonl.gz:1: cannot be read from here on: "),
        (PACKED[: len(PACKED) // 2], "none.jsonl.gz:1: cannot be read from here on: "),
    ],
    "none.parquet": [(b"PAR1 no parquet PAR1", "none.parquet:1: cannot be read from here on: ")],
}
READ_FIRST = ["eval", "data mix", "data decontaminate", "convert initialise"]  # those that need no model to read data


@pytest.mark.parametrize("verb", READ_FIRST)
@pytest.mark.parametrize("name", CONTENTS)
def test_malformed_data(verb: str, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write(tmp_path, verb)
    path.write_text(path.read_text().replace("none.jsonl", name))
    for content, message in CONTENTS[name]:
        (tmp_path / name).write_bytes(content)
        line = fails(capsys, *verb.split(), str(path))
        assert message in line and name in line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    (root / "none.jsonl").write_text(json.dumps(SFT_ROW) + "\n")
    with pytest.raises(SystemExit) as end:
        main(["convert", "initialise", str(write(root, "convert initialise"))])
    assert end.value.code == 0
    return root / "init"


@pytest.mark.parametrize("verb", ["sft", "dpo", "rlvr", "data prefer"])
def test_malformed_data_of_a_model(verb: str, model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write(tmp_path, verb)
    text = path.read_text().replace(f"{tmp_path}/none}}", f"{model}}}")
    for name, cases in CONTENTS.items():
        path.write_text(text.replace("none.jsonl", name))
        for content, message in cases:
            (tmp_path / name).write_bytes(content)
            assert message in fails(capsys, *verb.split(), str(path))
            sys.modules["tulu_hpc.parallel.layout"].destroy()


@pytest.mark.parametrize("verb", ["rlvr", "data prefer"])
@pytest.mark.parametrize(
    ("dataset", "truth", "message"),
    [
        ("gsm8k", "nan", "gsm8k: ground truth 'nan' is not a number"),
        ("gsm8k", [None], "gsm8k: the ground truth is null"),
        ("ifeval", {"func_name": ["x"]}, "ifeval: unknown func_name"),
        ("ifeval", {"instruction_id": ["punctuation:no_comma"], "kwargs": [["a"]]}, "ifeval: kwargs must be a list"),
    ],
)
def test_malformed_ground_truth(
    verb: str,
    dataset: str,
    truth: object,
    message: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Named with its line, or left out and counted."""
    path = write(tmp_path, verb)
    path.write_text(path.read_text().replace(f"{tmp_path}/none}}", f"{model}}}"))
    row = {"messages": [{"role": "user", "content": "a"}], "dataset": dataset, "ground_truth": truth}
    (tmp_path / "none.jsonl").write_text("\n" + json.dumps(row) + "\n")
    assert f"none.jsonl:2: ground_truth: {message}" in fails(capsys, *verb.split(), str(path))
    sys.modules["tulu_hpc.parallel.layout"].destroy()
    line = fails(capsys, *verb.split(), str(path), "data.on_error=skip")
    assert f"none.jsonl: no rlvr record; first problem: {tmp_path}/none.jsonl:2: ground_truth: {message}" in line


def test_duplicate_evaluation_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = json.dumps({"question": "1 + 1?", "answer": "2 #### 2"}) + "\n"
    (tmp_path / "none.jsonl").write_text(row + "\n" + row)
    line = fails(capsys, "eval", str(write(tmp_path, "eval")))
    assert line.endswith("none.jsonl:3: the same id as " + f"{tmp_path}/none.jsonl:1")


@pytest.mark.parametrize("path", ["foo/bar.txt", "foo/bar.jsonl", "here/mixture"])
@pytest.mark.parametrize("verb", READ_FIRST)
def test_mistyped_paths_are_not_looked_up_elsewhere(
    verb: str, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} went to the hub")

    monkeypatch.setattr(rows, "_hub_rows", refuse)
    (tmp_path / "here").mkdir()
    config = write(tmp_path, verb)
    config.write_text(config.read_text().replace(f"{tmp_path}/none.jsonl", path))
    assert f"{path}: no such file or directory" in fails(capsys, *verb.split(), str(config))


WRITES = {
    "sft": "run.dir",
    "dpo": "run.dir",
    "rm": "run.dir",
    "rlvr": "run.dir",
    "recipe": "report.output",
    "eval": "eval.output",
    "data synthesize": "synthetic.output",
    "data mix": "mix.output",
    "data decontaminate": "decontaminate.output",
    "data prefer": "prefer.output",
    "convert initialise": "initialise.output",
}


@pytest.mark.parametrize(("verb", "key"), WRITES.items())
def test_output_below_a_file(verb: str, key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Said before anything is read."""
    (tmp_path / "file").write_text("")
    line = fails(capsys, *verb.split(), str(write(tmp_path, verb)), f"{key}={tmp_path}/file/sub/out")
    assert line.startswith(f"error: {key}: {tmp_path}/file/sub/out") and line.endswith(f"{tmp_path}/file is a file")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("verb", "changes", "message"),
    [
        ("data mix", ["mix.output={}"], "mix.output: {0} would replace {0}"),
        ("data prefer", ["prefer.output={}"], "prefer.output: {0} would replace {0}"),
        ("data decontaminate", ["decontaminate.output={}/.."], "a.jsonl would replace {}"),
        ("convert initialise", ["initialise.output={}/.."], "would be replaced"),
    ],
)
def test_inputs_are_not_overwritten(
    verb: str, changes: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = tmp_path / "d" / "a.jsonl"
    data.parent.mkdir()
    data.write_text(json.dumps(SFT_ROW) + "\n")
    path = write(tmp_path, verb)
    path.write_text(path.read_text().replace(f"{tmp_path}/none.jsonl", str(data)))
    changes = [change.format(data).replace("/a.jsonl/..", "") for change in changes]
    assert message.format(data) in fails(capsys, *verb.split(), str(path), *changes)
    assert data.read_text() == json.dumps(SFT_ROW) + "\n" and list(data.parent.iterdir()) == [data]


def test_two_evaluations_of_one_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text(json.dumps(SFT_ROW) + "\n")
    path = write(tmp_path, "data decontaminate")
    one = path.read_text()[path.read_text().index("{name: e") : -3]
    path.write_text(path.read_text().replace(one, f"{one}, {one}"))
    assert "evaluation 'e' is given twice" in fails(capsys, "data", "decontaminate", str(path))


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

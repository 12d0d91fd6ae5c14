"""The driver on real steps that are cheap: synthesize, decontaminate, mix of a few rows.

No model is trained here; that training steps resume bit for bit is tested with the trainer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tulu_hpc.config.loader import ConfigError, load_config
from tulu_hpc.config.schema import InitialiseConfig, RecipeConfig, SftConfig
from tulu_hpc.stages import recipe
from tulu_hpc.stages.child import ChildResult
from tulu_hpc.stages.recipe import RecipeError, resolve_steps, telling_lines
from tulu_hpc.stages.step_files import check_files, files_below, outputs_of

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "configs" / "quickstart"
SIZES = {
    "sft_math": 40,
    "sft_instructions": 20,
    "preference_prompts": 10,
    "rlvr_prompts": 10,
    "eval_rows": 8,
    "leaks": 4,
}
STEPS = [
    {"name": "synthesize", "verb": "data synthesize", "overrides": {f"synthetic.{k}": v for k, v in SIZES.items()}},
    {"name": "decontaminate", "verb": "data decontaminate"},
    {"name": "mix", "verb": "data mix"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A recipe of three steps without evaluations or runs to report."""
    steps = [{**step, "config": str(QUICKSTART / f"{step['name']}.yaml")} for step in STEPS]
    report = {"title": "Tiny <recipe>", "decontamination": "{root}/data/clean/report.json"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run": {"root": str(tmp_path / "root")}, "steps": steps, "report": report}))
    return path


def _load(file: Path, *overrides: str) -> RecipeConfig:
    return load_config(file, overrides, RecipeConfig)


def _root(file: Path) -> Path:
    return file.parent / "root"


def _markers(file: Path) -> list[str]:
    return sorted(path.stem for path in (_root(file) / ".recipe").glob("*.json"))


def _command(file: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "tulu_hpc", "recipe", str(file), *overrides]


def test_complete_then_reused_then_changed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = recipe.run(_load(file))
    first = capsys.readouterr().out
    root = _root(file)
    assert report == root / "report.html" and report.is_file()
    assert "[1/3] synthesize: data synthesize" in first and f"report: {report}" in first and "total time" in first
    assert "[mix] " in first  # the children's output carries the step's name
    assert (root / "data" / "sft.jsonl").stat().st_size > 0
    assert "# " in (root / "logs" / "mix.log").read_text()
    text = report.read_text()
    assert "Tiny &lt;recipe&gt;" in text and "Recall of leaks" in text and "4 of 4" in text

    before = (root / "data" / "sft.jsonl").stat().st_mtime_ns
    recipe.run(_load(file))
    second = capsys.readouterr().out
    assert second.count("reused (made ") == 3 and (root / "data" / "sft.jsonl").stat().st_mtime_ns == before

    with pytest.raises(RecipeError) as error:
        recipe.run(_load(file, "overrides.mix.mix.kind=rlvr", "run.seed=5"))
    assert "synthesize" in str(error.value) and "run.seed: 0 -> 5" in str(error.value)
    with pytest.raises(RecipeError, match=r"step mix .*\n  mix\.kind: 'sft' -> 'rlvr'\n.*remove .*mix\.json"):
        recipe.run(_load(file, "overrides.mix.mix.kind=rlvr"))

    # A missing output is made again, from the same inputs; a changed input is refused.
    (root / "data" / "sft.jsonl").unlink()
    recipe.run(_load(file))
    third = capsys.readouterr().out
    assert "mix: data mix" in third and "sft.jsonl is missing" in third and third.count("reused (made") == 2
    # A missing file is made by the step that made it, not blamed on the one that reads it.
    (root / "data" / "clean" / "sft_math.jsonl").unlink()
    recipe.run(_load(file))
    fourth = capsys.readouterr().out
    assert "decontaminate: data decontaminate" in fourth and "sft_math.jsonl is missing" in fourth
    assert fourth.count("reused (made") == 2
    with (root / "data" / "clean" / "sft_math.jsonl").open("a") as source:
        source.write("\n")
    with pytest.raises(
        RecipeError, match=r"step mix was made from other files: .*clean/sft_math\.jsonl changed since"
    ) as e:
        recipe.run(_load(file))
    assert f"remove {root}/.recipe/decontaminate.json to have step decontaminate write its files again" in str(e.value)
    assert f"or remove {root}/.recipe/mix.json and what the step wrote" in str(e.value)
    (root / ".recipe" / "decontaminate.json").unlink()
    capsys.readouterr()
    recipe.run(_load(file))
    assert capsys.readouterr().out.count("reused (made") == 2


def test_markers_list_every_file(file: Path) -> None:
    recipe.run(_load(file))
    root = _root(file)
    listed = {}
    for name in ("synthesize", "decontaminate", "mix"):
        marker = json.loads((root / ".recipe" / f"{name}.json").read_text())
        listed[name] = {str(Path(path).relative_to(root / "data")) for path in marker["outputs"]}
    sources = ("sft_math", "sft_instructions", "preference_prompts", "rlvr")
    evals = ("math_dev", "if_dev", "math_unseen", "if_unseen")
    assert listed["synthesize"] == {"raw/leaks.json"} | {f"raw/{n}.jsonl" for n in sources} | {
        f"eval/{n}.jsonl" for n in evals
    }
    assert listed["decontaminate"] == {"clean/report.json"} | {f"clean/{n}.jsonl" for n in sources}
    assert listed["mix"] == {"sft.jsonl", "sft.statistics.json"}


def test_weights_and_tokenizer_are_outputs(tmp_path: Path) -> None:
    """A directory that a step makes as a whole stands for every file in it."""
    overrides = [f"run.root={tmp_path}", f"run.dir={tmp_path}/sft"]
    sft = load_config(QUICKSTART / "sft.yaml", overrides, SftConfig)
    assert outputs_of(sft) == [tmp_path / "sft" / "metrics.jsonl", tmp_path / "sft" / "hf"]
    initialise = load_config(QUICKSTART / "initialise.yaml", overrides[:1], InitialiseConfig)
    (output,) = outputs_of(initialise)
    output.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (output / name).write_text("x")
    assert {path.name for path in files_below([output])} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_step_that_does_not_restore_what_is_missing_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a training run that finds itself finished although somebody took a shard of its export."""
    monkeypatch.setattr(recipe, "run_child", lambda *_, **__: ChildResult(0, 1.0, [], None))
    config = load_config(QUICKSTART / "sft.yaml", [f"run.dir={tmp_path}/sft"], SftConfig)
    export = tmp_path / "sft" / "hf"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    (tmp_path / "sft" / "metrics.jsonl").write_text("")
    step = recipe.Step("sft", ["sft"], "sft.yaml", 1, [], config)
    shard = str(export / "model.safetensors")
    message = rf"step sft ended without writing {shard}; log: .*; remove {export} to have all of it written again"
    with pytest.raises(RecipeError, match=message):
        recipe._run_step(step, tmp_path, tmp_path, 0, [shard])
    assert recipe._run_step(step, tmp_path, tmp_path, 0, []).outputs == [
        str(export / "config.json"),
        str(tmp_path / "sft" / "metrics.jsonl"),
    ]


def test_a_run_does_not_replace_the_model_that_it_starts_from(tmp_path: Path) -> None:
    (tmp_path / "sft" / "hf").mkdir(parents=True)
    overrides = [f"run.dir={tmp_path}/sft", f"model.path={tmp_path}/sft/hf"]
    with pytest.raises(ConfigError, match=r"run\.dir: .*sft/hf would be replaced, and .*sft/hf is read from there"):
        check_files(load_config(QUICKSTART / "sft.yaml", overrides, SftConfig))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle_and_continued(file: Path, number: int) -> None:
    """Killed once the second step has begun; the files at the end are those of a run that was left alone."""
    driver = subprocess.Popen(
        _command(file),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.startswith("[2/3]"):
            break
    driver.send_signal(number)
    rest, _ = driver.communicate(timeout=60)
    assert driver.returncode != 0, rest
    assert "mix" not in _markers(file) and "synthesize" in _markers(file)
    again = subprocess.run(_command(file), capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "synthesize: reused" in again.stdout
    quiet = _root(file).with_name("quiet")
    recipe.run(_load(file, f"run.root={quiet}"))
    for name in ("data/sft.jsonl", "data/clean/rlvr.jsonl", "data/eval/if_dev.jsonl"):
        assert (_root(file) / name).read_bytes() == (quiet / name).read_bytes()


def test_failing_step_is_named_with_its_log_and_reason(file: Path) -> None:
    with pytest.raises(RecipeError) as error:
        recipe.run(_load(file, 'overrides.mix.mix.sources=[{name: math, path: "{root}/nothing.jsonl"}]'))
    message = str(error.value)
    assert message.startswith("step mix failed with exit code 2; log: ") and "logs/mix.log" in message
    assert "error: " in message and "nothing.jsonl" in message
    assert _markers(file) == ["decontaminate", "synthesize"]


def test_all_configurations_are_checked_before_the_first_step(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^step mix: overrides: mix\.sourcs: unknown key; did you mean mix\.sources"):
        recipe.run(_load(file, "overrides.mix.mix.sourcs=1"))
    with pytest.raises(ConfigError, match=r"^step mix: mix\.output: .*clean/sft_math\.jsonl would replace") as error:
        recipe.run(_load(file, 'overrides.mix.mix.output="{root}/../clean/sft_math.jsonl"', *_existing(file)))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"overrides\.mixx: no such step; steps are synthesize, decontaminate, mix"):
        recipe.run(_load(file, "overrides.mixx.run.seed=1"))
    assert not _root(file).exists()


def _existing(file: Path) -> list[str]:
    """A source of the mixture that is there before the first step."""
    path = file.parent / "clean" / "sft_math.jsonl"
    path.parent.mkdir()
    path.write_text("{}\n")
    return [f"overrides.mix.mix.sources=[{{name: math, path: {path}}}]"]


def test_unknown_verb_and_repeated_name(file: Path) -> None:
    raw = yaml.safe_load(file.read_text())
    for change, message in (
        ({"verb": "data mxi"}, "step synthesize: unknown verb 'data mxi'"),
        ({"verb": 'data "mix'}, "step synthesize: unknown verb"),
        ({"verb": "data mix --unseen"}, "step synthesize: .*the only options of a step are eval's"),
        ({"verb": "sft", "config": str(QUICKSTART / "sft.yaml"), "overrides": {}}, "step synthesize: .* needs run.dir"),
        ({"name": "mix"}, "'mix' is used twice"),
    ):
        file.write_text(yaml.safe_dump({**raw, "steps": [{**raw["steps"][0], **change}, *raw["steps"][1:]]}))
        with pytest.raises(ConfigError, match=message):
            resolve_steps(_load(file))


def test_two_drivers_do_not_share_a_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_LOCK_WAIT_SECONDS", 0.0)
    state = _root(file) / ".recipe"
    state.mkdir(parents=True)
    lock = recipe._take_lock(state / "lock")
    with pytest.raises(RecipeError, match="another recipe is running there"):
        recipe.run(_load(file))
    os.close(lock)


def test_not_under_torchrun(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="without torchrun"):
        recipe.run(_load(file))


def test_quickstart_resolves_and_hands_down_root_and_seed() -> None:
    config = load_config(QUICKSTART / "recipe.yaml", ["run.root=/tmp/x", "run.seed=7"], RecipeConfig)
    here = Path.cwd()
    os.chdir(REPOSITORY)
    try:
        steps = {step.name: step for step in resolve_steps(config)}
    finally:
        os.chdir(here)
    assert all(step.config.run.seed == 7 for step in steps.values())
    assert steps["rlvr"].config.model.path == "/tmp/x/dpo/hf" and steps["rlvr"].config.run.dir == "/tmp/x/rlvr"
    assert "torch.distributed.run" in steps["sft"].command and "--nproc-per-node" in steps["sft"].command
    assert steps["dpo"].config.parallel.tensor == 2 == steps["dpo"].processes
    assert steps["eval_sft"].command[1:5] == ["-m", "tulu_hpc", "eval", "--both"]


def test_every_override_survives_the_command_line(file: Path) -> None:
    config = _load(file, 'overrides.mix.run.name="a: b, [c] \\"d\\""', "overrides.mix.run.threads=null")
    mix = next(step for step in resolve_steps(config) if step.name == "mix")
    assert mix.config.run.name == 'a: b, [c] "d"' and mix.config.run.threads is None


def test_telling_lines() -> None:
    noise = ["W1 torch/distributed/elastic/multiprocessing/api.py closing", "Traceback", "ChildFailedError"]
    assert telling_lines(["start", "[rank 0] error: bad key", "[rank 1] error: bad key", *noise]) == [
        "[rank 0] error: bad key",
        "[rank 1] error: bad key",
    ]
    assert telling_lines(["one", "RuntimeError: x", *noise]) == ["one", "RuntimeError: x"]
    assert telling_lines(noise) == noise


def test_marker_is_not_trusted_when_it_is_not_ours(file: Path) -> None:
    state = _root(file) / ".recipe"
    state.mkdir(parents=True)
    started = time.monotonic()
    good = {"step": "mix", "verb": "data mix", "inputs": {}, "outputs": [], "seconds": 1.0, "finished": "x"}
    for content in (
        json.dumps({"config": {}}),
        *("", "[]", "3", "null", "{", "[" * 100_000, '"\\ud800"'),
        json.dumps({**good, "config": 3}),
        json.dumps({**good, "config": {"mix": []}}),
        json.dumps({**good, "config": {}, "outputs": [3]}),
        json.dumps({**good, "config": {}, "inputs": ["a"]}),
        json.dumps({**good, "config": {}, "seconds": float("inf")}),
    ):
        (state / "mix.json").write_text(content)
        with pytest.raises(RecipeError, match=r"^\S*mix\.json: not a marker of this version \(.+\); take") as error:
            recipe.run(_load(file))
        assert "\n" not in str(error.value)
    assert time.monotonic() - started < 30

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
from tulu_hpc.config.schema import RecipeConfig
from tulu_hpc.stages import recipe
from tulu_hpc.stages.recipe import RecipeError, resolve_steps, telling_lines

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
    with (root / "data" / "clean" / "sft_math.jsonl").open("a") as source:
        source.write("\n")
    with pytest.raises(RecipeError, match=r"step mix was made from other files: .*clean/sft_math\.jsonl changed since"):
        recipe.run(_load(file))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle_and_continued(file: Path, number: int) -> None:
    """Killed once the second step has begun; the files at the end are those of a run that was left alone."""
    driver = subprocess.Popen(
        _command(file), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
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
    with pytest.raises(ConfigError, match=r"mix\.sourcs: unknown key; did you mean mix\.sources"):
        recipe.run(_load(file, "overrides.mix.mix.sourcs=1"))
    with pytest.raises(ConfigError, match=r"overrides\.mixx: no such step; steps are synthesize, decontaminate, mix"):
        recipe.run(_load(file, "overrides.mixx.run.seed=1"))
    assert not _root(file).exists()


def test_unknown_verb_and_repeated_name(file: Path) -> None:
    raw = yaml.safe_load(file.read_text())
    for change, message in (
        ({"verb": "data mxi"}, "unknown verb 'data mxi'"),
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
    (state / "mix.json").write_text(json.dumps({"config": {}}))
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"mix\.json: not a marker of this version"):
        recipe.run(_load(file))
    assert time.monotonic() - started < 30

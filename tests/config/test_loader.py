"""YAML to typed configuration: merging, overrides, and what the errors say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tulu_hpc.config.loader import ConfigError, dump_yaml, load_config
from tulu_hpc.config.schema import DecontaminateConfig, MixConfig, RecipeConfig, RewardModelConfig, SftConfig

BASE = """\
run: {root: runs/x}
model: {path: "{root}/initial"}
data: {path: "{root}/d.jsonl"}
optimizer:
  lr: 5e-6
train: {steps: 4, global_batch_size: 8}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def load_text(tmp_path: Path, text: str, *overrides: str) -> SftConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides, SftConfig)


def test_round_trip_through_yaml(base: Path, tmp_path: Path) -> None:
    config = load_config(base, ["optimizer.eps=1e-15", "run.name=yes", "model.path='007'"], SftConfig)
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "again.yaml", [], SftConfig) == config
    assert (config.run.name, config.model.path) == ("yes", "007")


@pytest.mark.parametrize(
    ("text", "value"), [("5e-6", 5e-6), ("1e3", 1000.0), (".5", 0.5), ("2", 2.0), ("1.", 1.0), ("+1.5E-3", 0.0015)]
)
def test_numbers_are_yaml_1_2(base: Path, text: str, value: float) -> None:
    assert load_config(base, [f"optimizer.lr={text}"], SftConfig).optimizer.lr == value


@pytest.mark.parametrize("text", ["no", "on", "12:30", "2024-01-01", "1_000", "0777x"])
def test_what_yaml_1_1_would_convert_stays_text(base: Path, text: str) -> None:
    assert load_config(base, [f"run.name={text}"], SftConfig).run.name == text


def test_root_is_substituted_everywhere(base: Path) -> None:
    config = load_config(base, ["run.root=/data/a", "run.dir={root}/sft"], SftConfig)
    assert (config.model.path, config.data.path, config.run.dir) == (
        "/data/a/initial",
        ["/data/a/d.jsonl"],
        "/data/a/sft",
    )


def test_root_default_is_used(tmp_path: Path) -> None:
    assert load_text(tmp_path, BASE.replace("run: {root: runs/x}\n", "")).model.path == "runs/initial"


def test_root_in_root_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.root: '\{root\}/a' cannot contain"):
        load_config(base, ["run.root={root}/a"], SftConfig)


def test_extends_chain_merges_mappings_and_replaces_lists(base: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "middle.yaml").write_text("extends: ../base.yaml\noptimizer: {weight_decay: 0.1}\n")
    (tmp_path / "other.yaml").write_text("data: {path: [a, b]}\noptimizer: {weight_decay: 0.3}\n")
    config = load_text(tmp_path, "extends: [sub/middle.yaml, other.yaml]\noptimizer: {lr: 1}\n")
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.data.path) == (1.0, 0.3, ["a", "b"])


def test_extending_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("extends: config.yaml\n")
    with pytest.raises(ConfigError, match=r"extends itself: .*config\.yaml -> .*b\.yaml -> .*config\.yaml"):
        load_text(tmp_path, "extends: b.yaml\n")


def test_missing_base_names_who_wanted_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file \(extended by .*config\.yaml\)"):
        load_text(tmp_path, "extends: none.yaml\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=4", "command line: train.step: unknown key; did you mean train.steps?"),
        ("lr=1", "command line: lr: unknown key; did you mean optimizer.lr?"),
        ("optimiser.lr=1", "command line: optimiser: unknown key; did you mean optimizer?"),
        ("zzz.q=1", "command line: zzz: unknown key; known here: data, model, optimizer, parallel, run, sft, tele"),
        ("train.steps=abc", "command line: train.steps: expected a valid integer, got 'abc' (string)"),
        ("train.steps='4'", "command line: train.steps: expected a valid integer, got '4' (string)"),
        ("train.steps=true", "command line: train.steps: expected a valid integer, got True (boolean)"),
        ("train.steps=1.5", "command line: train.steps: expected a valid integer, got 1.5 (number)"),
        ("train.steps=0", "command line: train.steps: expected greater than or equal to 1, got 0 (integer)"),
        ("parallel.sequence=yes", "command line: parallel.sequence: expected a valid boolean, got 'yes' (string)"),
        ("run.name=3", "command line: run.name: expected a valid string, got 3 (integer); write it in quotes"),
        ("model.dtype=fp32", "command line: model.dtype: expected 'float32' or 'bfloat16', got 'fp32' (string)"),
        ("train=3", "command line: train: expected a section, got 3 (integer)"),
        ("train.steps.x=3", "command line: train.steps.x: train.steps is 4, not a section with keys"),
        ("train.steps=", "give train.steps or train.epochs"),
        ("steps", "command line: 'steps': expected section.key=value"),
        ("=3", "command line: '=3': expected section.key=value"),
        ("run.name=[", "command line: run.name: not a YAML value: '['"),
        ("run.name=\x07", "command line: run.name: not a YAML value: '\\x07'"),
        ("run.name=\udc80", "command line: run.name: not a YAML value: '\\udc80'"),
        ('run.name="\\ud800"', "command line: 'run.name': holds NUL or half of a surrogate pair"),
        ('run.name="a\\0b"', "command line: 'run.name': holds NUL or half of a surrogate pair"),
        ("run.\udc80=1", "command line: 'run.\\udc80': holds NUL or half of a surrogate pair"),
        ("run.name=!!binary aGk=", "command line: run.name: a bytes is no value here"),
        ("run.name=" + "[" * 3000, "command line: run.name: not a YAML value: '[["),
        ("run.name=&a [*a]", "command line: run.name: not a YAML value: '&a [*a]'"),
        ("run.seed=" + "9" * 5000, "command line: run.seed: not a YAML value: '999"),
        ("run.threads=0", "command line: run.threads: expected greater than or equal to 1, got 0"),
        ("optimizer.lr=.inf", "command line: optimizer.lr: expected a finite number, got inf (number)"),
        ("optimizer.clip_grad=.inf", "command line: optimizer.clip_grad: expected a finite number, got inf (number)"),
        ("train.epochs=.nan", "command line: train.epochs: expected a finite number, got nan (number)"),
        ("optimizer.betas=[0.9,1]", "command line: optimizer.betas.1: expected less than 1, got 1 (integer)"),
        ("optimizer.betas=[-.1,0]", "command line: optimizer.betas.0: expected greater than or equal to 0, got -0.1"),
    ],
)  # fmt: skip
def test_bad_overrides(base: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(base, [override], SftConfig)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            BASE.replace("lr: 5e-6", "lr: 5e-6\n  beta: 3"),
            6,
            "optimizer.beta: unknown key; did you mean optimizer.betas?",
        ),
        (BASE.replace("lr: 5e-6", "lr: fast"), 5, "optimizer.lr: expected a valid number, got 'fast' (string)"),
        (BASE.replace("lr: 5e-6", "weight_decay: 0"), 4, "optimizer.lr: missing"),
        (BASE + "run: {}\n", 7, "run: given twice"),
        (BASE + "  oops: [1\n", 7, "not valid YAML"),
        ("- 1\n", 1, "expected `key: value` at the top level"),
        (BASE + "sft: {}\nx: \x07\n", 8, "not valid YAML: the character U+0007"),
        (BASE + "sft: !!timestamp 2020-01-01\n", 7, "sft: a date is no value here"),
        (BASE + 'sft: {x: "\\ud800"}\n', 7, "'sft.x': holds NUL or half of a surrogate pair"),
        (BASE + f"sft: {'9' * 5000}\n", 7, "not valid YAML: an integer of 5000 digits"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.yaml:{line}: .*{re.escape(message)}"):
        load_text(tmp_path, text)


@pytest.mark.parametrize("text", ["a: " + "[" * 3000, "a: &x [*x]\n"])
def test_nesting_without_end_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: nested too deeply"):
        load_text(tmp_path, text)


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".", "a b", "", "a\n"])
def test_names_that_become_files_are_plain(tmp_path: Path, name: str) -> None:
    step = json.dumps({"name": name, "verb": "sft", "config": "c"})
    (tmp_path / "r.yaml").write_text(f"steps: [{step}]\nreport: {{title: t}}\n")
    with pytest.raises(ConfigError, match=r"r\.yaml:1: steps\.0\.name: .* becomes a file name"):
        load_config(tmp_path / "r.yaml", [], RecipeConfig)
    source = json.dumps({"name": name, "path": "p"})
    evals = "[{name: e, path: p, fields: [q]}]"
    (tmp_path / "d.yaml").write_text(f"decontaminate: {{output: o, train: [{source}], evals: {evals}}}\n")
    with pytest.raises(ConfigError, match=r"d\.yaml:1: decontaminate\.train\.0\.name: .* becomes a file name"):
        load_config(tmp_path / "d.yaml", [], DecontaminateConfig)


def test_a_fraction_is_finite(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("mix: {output: o, sources: [{name: a, path: p, fraction: .inf}]}\n")
    with pytest.raises(ConfigError, match=r"m\.yaml:1: mix\.sources\.0\.fraction: expected a finite number, got inf"):
        load_config(tmp_path / "m.yaml", [], MixConfig)


def test_line_of_a_base_file_is_named(base: Path, tmp_path: Path) -> None:
    base.write_text(BASE + "telemetry: {wandbx: true}\n")
    with pytest.raises(
        ConfigError, match=r"base\.yaml:7: telemetry\.wandbx: unknown key; did you mean telemetry\.wandb\?"
    ):
        load_text(tmp_path, "extends: base.yaml\n")


def test_all_problems_are_listed(base: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(base, ["train.stepz=1", "optimizer.lr=-1"], SftConfig)
    assert len(str(error.value).splitlines()) == 2


def test_items_of_lists_are_checked(tmp_path: Path) -> None:
    text = "steps:\n- name: a\n  verb: sft\n  config: c\n  proceses: 2\nreport: {title: t}\n"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=r"r\.yaml:5: steps\.0\.proceses: unknown key; did you mean steps\.0\.processes\?"
    ):
        load_config(tmp_path / "r.yaml", [], RecipeConfig)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml", [], SftConfig)
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path, [], SftConfig)


def test_shipped_configurations_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another directory `configs/...` is the shipped one; a file of that name in the directory comes first."""
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/quickstart/sft.yaml", [], SftConfig).run.name == "quickstart"
    own = tmp_path / "configs" / "quickstart" / "sft.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(BASE)
    assert load_config("configs/quickstart/sft.yaml", [], SftConfig).train.steps == 4
    with pytest.raises(ConfigError, match=r"configs/quickstart/none\.yaml: no such file"):
        load_config("configs/quickstart/none.yaml", [], SftConfig)


def test_settings_of_reward_models(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"fp32_head is of the vocabulary's head"):
        load_config(base, ["model.fp32_head=true"], RewardModelConfig)
    best = ["train.keep_best=1", "train.best_metric=eval/loss"]
    for schema in (SftConfig, RewardModelConfig):
        with pytest.raises(ConfigError, match="best_metric is eval/loss, but nothing is evaluated"):
            load_config(base, best, schema)
    assert load_config(base, [*best, "rm.eval_path=d"], RewardModelConfig).train.keep_best == 1


def test_settings_that_exclude_each_other(base: Path) -> None:
    with pytest.raises(ConfigError, match="parallel: overlap_param_gather needs distributed_optimizer and overlap_gra"):
        load_config(base, ["parallel.overlap_param_gather=true"], SftConfig)

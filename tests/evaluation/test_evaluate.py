"""`eval` and `data prefer` as stages on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.forked import WorkerError
from tests.rlvr import tiny_rlvr
from tests.rlvr.tiny_rlvr import eval_config, in_processes, prefer_config, rlvr_config, run_and_die
from tulu_hpc.config.schema import PreferConfig
from tulu_hpc.data.records import read_records
from tulu_hpc.stages import evaluate, prefer, rlvr


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent do not survive a fork
    return tiny_rlvr.write_inputs(tmp_path_factory.mktemp("inputs"))


def results(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_dev_never_touches_unseen(inputs: Path, tmp_path: Path) -> None:
    """The unseen file does not exist; only the unseen run notices, and only it is logged."""
    config = eval_config(inputs, tmp_path / "out")
    assert in_processes(evaluate.run, config) == [tmp_path / "out" / "dev.json"]
    found = results(tmp_path / "out" / "dev.json")
    assert found["suite"] == "dev" and list(found["tasks"]) == ["math", "instructions"]
    assert found["tasks"]["math"]["prompts"] == 9 and len(found["tasks"]["math"]["completions"]) == 6
    assert found["model"]["kind"] == "huggingface" and len(found["model"]["fingerprint"]) == 32
    assert found["verifier"]["verdicts"] == (9 + 7) * 3
    for mode in ("greedy", "sampled"):
        score = found["tasks"]["instructions"]["scores"][mode]
        assert 0 <= score["low"] <= score["score"] <= score["high"] <= 1
    with pytest.raises(WorkerError, match=r"unseen\.jsonl: no such file"):
        in_processes(evaluate.run, config, unseen=True)
    assert not (tmp_path / evaluate.UNSEEN_LOG).exists()
    shutil.copy(inputs / "math.jsonl", tmp_path / "unseen.jsonl")
    hidden = [{"name": "hidden", "task": "gsm8k", "path": str(tmp_path / "unseen.jsonl")}]
    complete = eval_config(inputs, tmp_path / "out", eval__unseen=hidden)
    assert in_processes(evaluate.run, complete, unseen=True) == [tmp_path / "out" / "unseen.json"]
    in_processes(evaluate.run_both, complete)
    log = [json.loads(line) for line in (tmp_path / evaluate.UNSEEN_LOG).read_text().splitlines()]
    assert [entry["tasks"] for entry in log] == [["hidden"], ["hidden"]]
    assert results(tmp_path / "out" / "dev.json")["tasks"] == found["tasks"]


def test_processes_share_the_prompts_and_agree(inputs: Path, tmp_path: Path) -> None:
    in_processes(evaluate.run, eval_config(inputs, tmp_path / "one"))
    in_processes(evaluate.run, eval_config(inputs, tmp_path / "two"), 2)
    in_processes(evaluate.run, eval_config(inputs, tmp_path / "tp", parallel__tensor=2), 2)
    wanted = results(tmp_path / "one" / "dev.json")
    for name in ("two", "tp"):
        found = results(tmp_path / name / "dev.json")
        assert found["tasks"] == wanted["tasks"] and found["verifier"]["verdicts"] == wanted["verifier"]["verdicts"]


def test_checkpoints_and_run_directories(inputs: Path, tmp_path: Path) -> None:
    """The newest checkpoint, its run and the export of the run are one model; another layout may read it."""
    config = rlvr_config(inputs, tmp_path / "run", train__steps=6, train__export_hf=True, rlvr__samples_per_prompt=8)
    in_processes(rlvr.run, config)
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    paths = {"hf": tmp_path / "run" / "hf", "run": tmp_path / "run"}
    paths["step"] = tmp_path / "run" / "checkpoints" / f"step_{steps[-1]}"
    found = {}
    for name, path in paths.items():
        changes = {"parallel__pipeline": 2} if name == "step" else {}
        in_processes(
            evaluate.run, eval_config(inputs, tmp_path / name, model__path=str(path), **changes), 1 + len(changes)
        )
        found[name] = results(tmp_path / name / "dev.json")
    assert found["run"]["tasks"] == found["hf"]["tasks"] == found["step"]["tasks"]
    assert found["run"]["model"]["kind"] == "checkpoint" and found["hf"]["model"]["kind"] == "huggingface"
    (paths["step"] / "trainer_state.json").write_text("{}")
    with pytest.raises(WorkerError, match=r"damaged checkpoint.*trainer_state\.json"):
        in_processes(evaluate.run, eval_config(inputs, tmp_path / "bad", model__path=str(paths["step"])))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval__greedy": False, "eval__draws": 0}, "nothing to evaluate"),
        ({"rollout__temperature": 0.0}, "eval.draws"),
        ({"eval__dev": []}, "names no task"),
        ({"eval__dev": [{"name": "a", "task": "mmlu", "path": "x"}]}, "no task 'mmlu'"),
        ({"model__path": "/nowhere"}, "/nowhere"),
        ({"verifier__modules": ["no_such_module"]}, r"verifier\.modules: no_such_module"),
    ],
)
def test_bad_configurations(inputs: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkerError, match=words):
        in_processes(evaluate.run, eval_config(inputs, tmp_path / "out", **changes))


def _prefer(config: Any) -> None:
    prefer.run(config)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefer, "CHUNK_PROMPTS", 2)


def test_preferences_continue_where_they_were(inputs: Path, tmp_path: Path, small_chunks: None) -> None:
    """The same file, bit for bit, from one process, from two, and from one that died after three chunks."""
    whole, resumed, two = (tmp_path / name / "pairs.jsonl" for name in ("whole", "resumed", "two"))
    sampling = {"prefer__samples_per_prompt": 16, "rollout__max_new_tokens": 24}
    in_processes(_prefer, prefer_config(inputs, whole, **sampling))
    pairs = read_records(whole, "preference")
    statistics = json.loads(whole.with_name("pairs.jsonl.stats.json").read_text())
    assert statistics["pairs"] == len(pairs) >= 1 and statistics["prompts"] == 12 and statistics["samples"] == 192
    for line in whole.read_text().splitlines():
        row = json.loads(line)
        assert row["chosen_score"] > 0 and row["chosen"][:-1] == row["rejected"][:-1] == row["prompt"]
    with pytest.raises(WorkerError, match="Stopped"):
        in_processes(lambda config: run_and_die(prefer.run, config, 3), prefer_config(inputs, resumed, **sampling))
    parts = sorted(path.name for path in resumed.with_name("pairs.jsonl.parts").glob("*.jsonl"))
    assert len(parts) == 3 and not resumed.exists()
    with pytest.raises(WorkerError, match="Stopped"):  # three more, and not the first ones again
        in_processes(lambda config: run_and_die(prefer.run, config, 2), prefer_config(inputs, resumed, **sampling))
    in_processes(_prefer, prefer_config(inputs, resumed, **sampling), 2)
    in_processes(_prefer, prefer_config(inputs, two, **sampling), 2)
    assert resumed.read_bytes() == two.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in resumed.parent.iterdir()) == ["pairs.jsonl", "pairs.jsonl.stats.json"]
    # Nothing is sampled again for a complete file; other settings start anew.
    in_processes(lambda config: run_and_die(prefer.run, config, 0), prefer_config(inputs, whole, **sampling))
    with pytest.raises(WorkerError, match="Stopped"):
        in_processes(
            lambda config: run_and_die(prefer.run, config, 0), prefer_config(inputs, whole, **sampling, run__seed=4)
        )


def test_preferences_without_any_pair(inputs: Path, tmp_path: Path) -> None:
    """One token is never enough to answer and end."""
    config = prefer_config(inputs, tmp_path / "pairs.jsonl", rollout__max_new_tokens=1, prefer__prompts=3)
    with pytest.raises(WorkerError, match="no pair from 3 prompts"):
        in_processes(_prefer, config)
    greedy = prefer_config(inputs, tmp_path / "pairs.jsonl", rollout__temperature=0.0)
    with pytest.raises(WorkerError, match="temperature"):
        in_processes(_prefer, greedy)


def test_lost_verdicts_are_said_and_too_many_stop_the_run(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_verifiers.py").write_text(
        "from tulu_hpc.verifiers import Verdict, register\n"
        "@register('broken')\n"
        "def broken(completion, truth, record):\n"
        "    if truth == 'bad':\n"
        "        raise OSError('gone')\n"
        "    return Verdict(float(len(completion) % 2))\n"
    )
    data = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in (inputs / "prompts.jsonl").read_text().splitlines()]

    def run(bad: int, output: str) -> Path:
        for index, row in enumerate(rows):
            row |= {"dataset": "broken", "ground_truth": "bad" if index < bad else f"good {index}"}
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"data__path": str(data), "verifier__modules": ["broken_verifiers"]}
        config = prefer_config(inputs, tmp_path / output, prefer__samples_per_prompt=6, **changes)

        def stage(config: PreferConfig) -> Path:
            sys.path.insert(0, str(tmp_path))
            return prefer.run(config)

        return in_processes(stage, config)

    with pytest.raises(WorkerError, match=r"prefer: 60 of 72 verdicts were lost \(errors 60\), more than"):
        run(10, "many.jsonl")
    assert not (tmp_path / "many.jsonl").exists()
    statistics = json.loads(run(2, "few.jsonl").with_name("few.jsonl.stats.json").read_text())
    assert (statistics["verifier"]["verdicts"], statistics["verifier"]["errors"]) == (72, 12)
    assert "prefer: 12 of 72 verdicts lost (errors 12), each scored 0" in capfd.readouterr().out

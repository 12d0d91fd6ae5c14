"""The vLLM engine under the test body of all engines, and `eval` and `data prefer` on a real server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engines import vllm_server as real
from tests.rlvr import tiny_rlvr
from tests.rlvr.tiny_rlvr import eval_config, in_processes, prefer_config
from tests.rollout.conformance import check_engine
from tests.training import tiny_run
from tulu_hpc.config.schema import EvalConfig, SftConfig
from tulu_hpc.data.tokenizer import load_tokenizer
from tulu_hpc.rollout.engine import Completion, Request
from tulu_hpc.rollout.server import Server
from tulu_hpc.rollout.vllm import VllmEngine
from tulu_hpc.stages import evaluate, prefer, sft

pytestmark = [real.needs_vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent do not survive a fork
    folder = tiny_rlvr.write_inputs(tmp_path_factory.mktemp("inputs"))
    real.write_model(folder, tied=False)
    return folder


@pytest.fixture(scope="module")
def server(inputs: Path) -> Iterator[Server]:
    found = real.start(inputs)
    yield found
    found.stop()


def test_the_vllm_engine(inputs: Path, server: Server) -> None:
    tokenizer, model = load_tokenizer(str(inputs / "model")), real.hf_model(inputs)
    engine = VllmEngine([server.address], vocab_size=model.config.vocab_size, own=[server])
    real.perturb(model, 1)
    asyncio.run(engine.update_weights(iter(real.state(model)), 4))
    check_engine(engine, model, tokenizer, 4, 512)


def results(path: Path) -> Any:
    return json.loads((path / "dev.json").read_text())["tasks"]


def greedy_of(tasks: Any) -> Any:
    return {name: (task["prompts"], task["scores"]["greedy"]) for name, task in tasks.items()}


def first_answers(tasks: Any) -> list[Any]:
    return [each for task in tasks.values() for each in task["completions"] if each["mode"] == "greedy"]


def served_by(server: Server) -> dict[str, Any]:
    return {"rollout__engine": "vllm", "rollout__vllm": {"servers": [str(server.address)]}}


@pytest.mark.parametrize("world", [1, 2])
def test_scores_are_those_of_the_embedded_engine(inputs: Path, tmp_path: Path, server: Server, world: int) -> None:
    """The server had other weights before; a stop string cuts answers; two replicas share the prompts."""
    common = {"rollout__stop": ["e"], "eval__keep_completions": 9}
    in_processes(evaluate.run, eval_config(inputs, tmp_path / "ours", **common), world)
    in_processes(evaluate.run, eval_config(inputs, tmp_path / "vllm", **common, **served_by(server)), world)
    ours, theirs = results(tmp_path / "ours"), results(tmp_path / "vllm")
    assert greedy_of(ours) == greedy_of(theirs)
    assert first_answers(ours) == first_answers(theirs) and first_answers(ours)


def test_a_server_of_its_own(inputs: Path, tmp_path: Path) -> None:
    vllm = {"python": str(real.PYTHON), "kv_cache_mib": 64}
    config = eval_config(inputs, tmp_path / "vllm", rollout__engine="vllm", rollout__vllm=vllm)
    in_processes(evaluate.run, eval_config(inputs, tmp_path / "ours"))
    in_processes(evaluate.run, config)
    assert greedy_of(results(tmp_path / "ours")) == greedy_of(results(tmp_path / "vllm"))


def test_a_checkpoint_read_by_two_ranks(inputs: Path, tmp_path: Path, server: Server) -> None:
    """The server gets what two tensor-parallel ranks read from a checkpoint; its export is gone afterwards."""
    values = tiny_run.config(inputs, tmp_path / "run", "sft", optimizer__lr=0.02, train__steps=4)
    in_processes(sft.run, SftConfig.model_validate(values))
    two = {"model__path": str(tmp_path / "run"), "parallel__tensor": 2}
    in_processes(evaluate.run, eval_config(inputs, tmp_path / "start", **served_by(server)))
    in_processes(evaluate.run, eval_config(inputs, tmp_path / "ours", **two), 2)
    in_processes(evaluate.run, eval_config(inputs, tmp_path / "vllm", **two, **served_by(server)), 2)
    start, ours, theirs = (results(tmp_path / name) for name in ("start", "ours", "vllm"))
    assert greedy_of(ours) == greedy_of(theirs)
    assert first_answers(ours) == first_answers(theirs) != first_answers(start)
    assert not list(tmp_path.rglob("weights-*"))


def evaluate_and_kill(config: EvalConfig) -> None:
    """The run's own server is killed while it generates."""
    generate, killed = VllmEngine.generate, False

    async def kill_meanwhile(engine: VllmEngine, requests: Sequence[Request]) -> list[Completion]:
        nonlocal killed
        under_way = asyncio.create_task(generate(engine, requests))
        if not killed:
            killed = True
            await asyncio.sleep(0.1)
            real.kill(engine.own[0])
        return await under_way

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmEngine, "generate", kill_meanwhile)
        evaluate.run(config)
    assert killed


def test_a_server_that_is_killed(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vllm = {"python": str(real.PYTHON), "kv_cache_mib": 64}
    options = {"rollout__max_sequences": 2, "rollout__max_new_tokens": 60}
    in_processes(evaluate.run, eval_config(inputs, tmp_path / "ours", **options))
    served = eval_config(inputs, tmp_path / "vllm", rollout__engine="vllm", rollout__vllm=vllm, **options)
    in_processes(evaluate_and_kill, served)
    assert greedy_of(results(tmp_path / "ours")) == greedy_of(results(tmp_path / "vllm"))
    assert "was dead and has been started again" in capfd.readouterr().out


def test_preferences(inputs: Path, tmp_path: Path, server: Server) -> None:
    """Pairs or not (a random model seldom earns one), every prompt is sampled and counted."""
    config = prefer_config(inputs, tmp_path / "pairs.jsonl", **served_by(server))
    in_processes(prefer.run, config, 2)
    counts = json.loads((tmp_path / "pairs.jsonl.stats.json").read_text())
    assert counts["samples"] == counts["prompts"] * config.prefer.samples_per_prompt > 0

"""Rows of the public schemas become prompts and verifier records; a function as the engine shows the runner's sums."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tulu_hpc.data.chat_template import ChatTemplate
from tulu_hpc.data.tokenizer import train_tokenizer
from tulu_hpc.evaluation import suites
from tulu_hpc.evaluation.runner import RunOptions, answer_tasks, load_task, make_requests, summarise
from tulu_hpc.evaluation.tasks import GSM8K, GSM8K_TULU, IFEVAL, EvalError, build_prompt, parse_gsm8k, parse_ifeval
from tulu_hpc.rollout.engine import Completion, Request, Sampling
from tulu_hpc.verifiers import Verdict, verify

ROW = {
    "question": "Tom has 2 pens and buys 3 boxes of 4. How many?",
    "answer": "3*4=<<3*4=12>>12\n2+12=<<2+12=14>>14\n#### 14",
}
IF_ROW = {
    "key": 7,
    "prompt": "Name some pets.",
    "instruction_id_list": ["change_case:english_lowercase", "content:words_from_set"],
    "kwargs": [{"num_bullets": None}, {"words": ["cat", "dog"], "at_least": 1}],
}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gsm8k_rows() -> None:
    instance = parse_gsm8k(ROW)
    assert instance.record == {"dataset": "gsm8k", "ground_truth": "14"} and instance.kind == "2 steps"
    assert instance.demonstration == "3*4=12\n2+12=14\nThe answer is 14."
    assert parse_gsm8k({**ROW, "kind": "boxes"}).kind == "boxes"


def test_ifeval_rows() -> None:
    instance = parse_ifeval(IF_ROW)
    assert (instance.id, instance.kind, instance.demonstration) == ("7", "english_lowercase", None)
    assert verify(instance.record, "a cat").score == 1.0 and verify(instance.record, "A cat").score == 0.0


def test_prompt_styles() -> None:
    example, instance = parse_gsm8k({"question": "1+1?", "answer": "1+1=2\n#### 2"}), parse_gsm8k(ROW)
    shown = "1+1=2\nThe answer is 2."
    multi = build_prompt(GSM8K, instance, [example], "multiturn")
    assert [(m.role, m.content) for m in multi.messages] == [
        ("user", "1+1?"),
        ("assistant", shown),
        ("user", ROW["question"]),
    ]
    (turn,) = build_prompt(GSM8K, instance, [example], "chat").messages
    assert turn.content == f"1+1?\n{shown}\n\n{ROW['question']}"
    plain = build_prompt(GSM8K, instance, [], "completion")
    assert plain.messages == [] and plain.text == ROW["question"] + "\n"
    tulu = build_prompt(GSM8K_TULU, instance, [example], "multiturn")
    assert [m.content for m in tulu.messages[:2]] == ["Question: 1+1?", "Answer: " + shown] and tulu.text == "Answer:"
    with pytest.raises(EvalError, match="example"):
        build_prompt(IFEVAL, parse_ifeval(IF_ROW), [parse_ifeval(IF_ROW)], "chat")


def test_suites_are_separate() -> None:
    assert suites.dev_task("gsm8k") is GSM8K and suites._DEV is not suites._UNSEEN
    with pytest.raises(EvalError, match="unseen suite; known: gsm8k, ifeval"):
        suites.unseen_task("gsm8k::tulu")
    with pytest.raises(EvalError, match="development suite"):
        suites.dev_task("nothing")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{\n"], r":1: "),
        ([ROW, {"question": "q"}], r":2: field 'answer'"),
        ([ROW, {**ROW, "answer": "14"}], r":2: .*####"),
        (["[1]\n"], r":1: is \[1\], need an object"),
        ([ROW, "[" * 100_000 + "\n"], r":2: nested too deeply"),
        ([ROW, "\n", {**ROW, "question": "q"}, ROW], r"rows\.jsonl:4: the same id as .*rows\.jsonl:1$"),
        ([{**ROW, "question": "\ud800"}], r":1: '\\ud800' holds half of a surrogate pair"),
        ([{**ROW, "kind": "\ud800"}], r":1: .* holds half of a surrogate pair"),
        ([], "holds no row"),
    ],
)
def test_bad_files(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(EvalError, match=words):
        load_task("t", GSM8K, write(tmp_path / "rows.jsonl", rows))


def test_bad_ifeval_rows_and_missing_files(tmp_path: Path) -> None:
    path = write(
        tmp_path / "if.jsonl", [IF_ROW, {**IF_ROW, "instruction_id_list": ["no:such", "content:words_from_set"]}]
    )
    with pytest.raises(EvalError, match=r"if\.jsonl:2: .*no:such"):
        load_task("t", IFEVAL, path)
    assert len(load_task("t", IFEVAL, path, limit=1).instances) == 1
    with pytest.raises(EvalError, match="no such file"):
        load_task("t", IFEVAL, str(tmp_path / "none.jsonl"))
    write(tmp_path / "if.jsonl", [IF_ROW, {**IF_ROW, "key": 8}])
    with pytest.raises(EvalError, match=r"if\.jsonl:2: the same question and answer as .*if\.jsonl:1$"):
        load_task("t", IFEVAL, path)
    other = {**IF_ROW, "prompt": "Name other pets.", "key": None}
    write(tmp_path / "if.jsonl", [{**IF_ROW, "key": None}, other])
    assert len(load_task("t", IFEVAL, path).instances) == 2, "a key that is null is none"
    (tmp_path / "bytes.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(EvalError, match=r"bytes\.jsonl:1: not JSON: .*utf-8"):
        load_task("t", GSM8K, str(tmp_path / "bytes.jsonl"))


def test_every_file_that_records_may_have(tmp_path: Path) -> None:
    """Parquet too, as the public sets come; a file that is cut off is an error with its line."""
    rows = [{**ROW, "question": f"{n}?"} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    plain = load_task("t", GSM8K, write(tmp_path / "rows.jsonl", rows)).instances
    assert load_task("t", GSM8K, str(tmp_path / "rows.parquet")).instances == plain
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode())[:-9])
    with pytest.raises(EvalError, match=r"cut\.jsonl\.gz:1: cannot be read from here on"):
        load_task("t", GSM8K, str(tmp_path / "cut.jsonl.gz"))


def test_few_shot_needs_its_own_rows(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [ROW])
    shots = write(tmp_path / "shots.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    assert len(load_task("t", GSM8K, rows, few_shot=1, few_shot_path=shots).examples) == 1
    with pytest.raises(EvalError, match="needs few_shot_path"):
        load_task("t", GSM8K, rows, few_shot=1)
    with pytest.raises(EvalError, match="1 rows, but few_shot = 2"):
        load_task("t", GSM8K, rows, few_shot=2, few_shot_path=shots)
    with pytest.raises(EvalError, match="also evaluated"):
        load_task("t", GSM8K, rows, few_shot=1, few_shot_path=rows)


OPTIONS = RunOptions(
    greedy=True,
    draws=2,
    sampling=Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9, stop_token_ids=(1,)),
    bootstrap_samples=100,
    confidence=0.9,
    keep_completions=2,
    seed=0,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["1 2 3 4 answer is pets cat dog Cat"] * 4, vocab_size=320)


def test_runner_sums(tmp_path: Path, tokenizer: Any) -> None:
    """Greedy answers are right and shown, sampled ones are wrong for the second prompt and cut off."""
    rows = [{"question": f"{n}+1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in (1, 2, 3)]
    tasks = [
        load_task("math", GSM8K, write(tmp_path / "m.jsonl", rows)),
        load_task("if", IFEVAL, write(tmp_path / "i.jsonl", [IF_ROW])),
    ]
    template = ChatTemplate.load("tulu", tokenizer)
    seen: list[Request] = []

    def answer(request: Request) -> Completion:
        greedy = request.sampling.temperature == 0
        prompt = tokenizer.decode(request.token_ids)
        if "pets" in prompt:
            text = "Sure:\na cat"  # loose, not strict
        else:
            number = int(prompt.split("+")[0].split()[-1][-1]) if "+" in prompt else 0
            text = f"{number}+1={number + 1}" if greedy or number != 2 else "The answer is 9."
        ids = tokenizer.encode(text, add_special_tokens=False) + ([1] if greedy else [])
        reason: Any = "stop" if greedy else "length"
        return Completion(ids, [-1.0] * len(ids), reason, 1 if greedy else None, 0, request.id)

    def generate(requests: Any) -> list[Completion]:
        seen.extend(requests)
        return [answer(request) for request in requests]

    def check(pairs: Any) -> list[Verdict]:
        return [verify(record, text) for record, text in pairs]

    shares = [[0, 2], [0]], [[1], []]  # two processes
    parts = [
        answer_tasks(tasks, share, OPTIONS, tokenizer=tokenizer, template=template, generate=generate, verify=check)[0]
        for share in shares
    ]
    math = summarise(tasks[0], parts[0][0] + parts[1][0], OPTIONS)
    assert math["scores"]["greedy"]["score"] == 1.0 and math["scores"]["greedy"]["draws"] == 1
    assert math["scores"]["sampled"]["score"] == pytest.approx(2 / 3) and math["scores"]["sampled"]["draws"] == 2
    assert math["metrics"]["greedy"]["finished"] == 1.0 and math["metrics"]["sampled"]["finished"] == 0.0
    assert math["metrics"]["sampled"]["shows_working"] == pytest.approx(2 / 3)
    assert math["by_kind"] == {"1 step": {"prompts": 3, "greedy": 1.0, "sampled": pytest.approx(2 / 3)}}
    assert [(kept["mode"], kept["score"]) for kept in math["completions"]] == [
        ("greedy", 1.0),
        ("sampled", 1.0),
        ("greedy", 1.0),
        ("sampled", 0.0),
    ]
    instructions = summarise(tasks[1], parts[0][1] + parts[1][1], OPTIONS)
    assert instructions["scores"]["greedy"]["score"] == 1.0  # the paper's metric is loose
    assert instructions["metrics"]["greedy"]["strict"] == 0.0
    assert len({(tuple(request.token_ids), request.seed, request.sampling.temperature) for request in seen}) == 12


def test_seeds_belong_to_the_question(tmp_path: Path, tokenizer: Any) -> None:
    """Neither a limit nor the order of rows changes what is drawn for a question."""
    rows = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in (1, 2)]
    template = ChatTemplate.load("tulu", tokenizer)
    both = load_task("t", GSM8K, write(tmp_path / "a.jsonl", rows))
    turned = load_task("t", GSM8K, write(tmp_path / "b.jsonl", rows[::-1]), limit=1)
    wanted = [request for _, _, request in make_requests(both, [1], OPTIONS, tokenizer, template)]
    assert [request for _, _, request in make_requests(turned, [0], OPTIONS, tokenizer, template)] == wanted
    assert [request.sampling.temperature for request in wanted] == [0.0, 0.7, 0.7]
    assert wanted[1].seed != wanted[2].seed

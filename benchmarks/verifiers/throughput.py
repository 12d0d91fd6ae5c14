"""Verdicts per second and core of every kind of verifier, through the pool of workers that training uses.

    python benchmarks/verifiers/throughput.py                    # a minute
    python benchmarks/verifiers/throughput.py --verdicts 20      # seconds: checks the machinery, not the speed

One worker, answers of about 1,500 characters. `per core` counts the CPU seconds of worker and pool together, pipes
included; `per second` is the wall clock. The first batch, with the slow imports, is not timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from tulu_hpc.verifiers.sandbox import VerifierPool

GOAL_PER_CORE = 1000.0
PROSE = "First we note that 12 eggs and 30 apples make 42 things, which is what the task asks us to count. " * 15


def answers(end: str) -> list[str]:
    """Answers that differ, so that nothing can be looked up."""
    return [f"{PROSE}\nStep {i}: {i} + 1 = {i + 1}.\n{end}" for i in range(97)]


def instruction(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"instruction_id": [name, "punctuation:no_comma"], "kwargs": [kwargs, {}]}


PROGRAM = "```python\ndef f(n):\n    return sum(range(n + 1))\n```"
# label: (rule set, dataset, ground truth, end of the answer, does the goal apply)
CASES: dict[str, tuple[str, str, Any, str, bool]] = {
    "gsm8k": ("fixed", "gsm8k", "42", "The answer is 42.", True),
    "gsm8k, compat": ("tulu3-compat", "gsm8k", "42", "The answer is 42.", True),
    "exact": ("fixed", "exact", ["42", "forty-two"], "The answer is 42.", True),
    "substring": ("fixed", "substring", ["42", "forty-two"], "The answer is 42.", True),
    "f1": ("fixed", "f1", "42 things to count", "The answer is 42.", True),
    "flan": ("fixed", "flan", "42", "The answer is 42.", True),
    "length": ("fixed", "length", {"max": 500}, "The answer is 42.", True),
    "format": ("fixed", "format", ".*answer is \\d+\\.", "The answer is 42.", True),
    "json_schema": (
        "fixed",
        "json_schema",
        {"type": "object", "required": ["a"], "properties": {"a": {"type": "array", "items": {"type": "integer"}}}},
        '```json\n{"a": [1, 2, 3]}\n```',
        True,
    ),
    "ifeval, words": ("fixed", "ifeval", instruction("length_constraints:number_words", num_words=300), "", True),
    "ifeval, sentences": (
        "fixed",
        "ifeval",
        instruction("length_constraints:number_sentences", num_sentences=20),
        "",
        True,
    ),
    "ifeval, compat": ("tulu3-compat", "ifeval", {"func_name": "verify_keywords", "keyword_list": ["eggs"]}, "", True),
    "math, number": ("fixed", "math", "\\frac{3}{4}", "So $x = \\boxed{0.75}$.", True),
    "math, root": ("fixed", "math", "2\\sqrt{2}", "So $x = \\boxed{\\sqrt{8}}$.", False),
    "math, polynomial": ("fixed", "math", "(x+1)^2", "So $\\boxed{x^2+2x+1}$.", False),
    "math, compat, string": ("tulu3-compat", "math", "\\frac{3}{4}", "So $\\boxed{\\frac{3}{4}}$.", False),
    "math, compat, sympy": ("tulu3-compat", "math", "2\\sqrt{2}", "So $\\boxed{\\sqrt{8}}$.", False),
    "code, 3 tests": ("fixed", "code", ["assert f(1) == 1", "assert f(2) == 3", "assert f(3) == 6"], PROGRAM, False),
}


def cpu_seconds(pids: list[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def measure(label: str, verdicts: int, repeats: int) -> dict[str, Any]:
    rules, dataset, truth, end, _ = CASES[label]
    count = verdicts if dataset != "code" else max(4, verdicts // 20)
    texts = answers(end)
    tasks = [({"dataset": [dataset], "ground_truth": [truth]}, texts[i % len(texts)]) for i in range(count)]
    per_second, per_core = [], []
    with VerifierPool(1, 60.0, rules=rules, grants=["processes"]) as pool:
        pool.verify_batch(tasks[:4])
        pids = [os.getpid(), *(child.pid for child in psutil.Process().children())]
        for _ in range(repeats):
            began, cpu = time.perf_counter(), cpu_seconds(pids)
            found = pool.verify_batch(tasks)
            per_second.append(count / (time.perf_counter() - began))
            per_core.append(count / max(cpu_seconds(pids) - cpu, 0.01))
        if pool.stats.lost:
            raise SystemExit(f"{label}: {pool.stats.lost} verdicts lost: {found[0].reason}")
    return {
        "verdicts": count,
        "mean_score": sum(verdict.score for verdict in found) / count,
        "per_second": median(per_second),
        "per_core": median(per_core),
        "per_core_range": [min(per_core), max(per_core)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verdicts", type=int, default=4000, help="per timed batch; a 20th of it for programs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    has_antlr = importlib.util.find_spec("antlr4") is not None
    results: dict[str, Any] = {}
    print(f"{'verifier':22} {'per core':>10} {'per second':>11}")
    for label, (rules, dataset, _, _, goal) in CASES.items():
        if dataset == "math" and rules == "tulu3-compat" and not has_antlr:
            print(f"{label:22} not measured: antlr4-python3-runtime is not installed")
            continue
        results[label] = measure(label, options.verdicts, options.repeats)
        figures = results[label]
        verdict = ("" if figures["per_core"] >= GOAL_PER_CORE else "  below the goal") if goal else ""
        print(f"{label:22} {figures['per_core']:10.0f} {figures['per_second']:11.0f}{verdict}", flush=True)
    slowest = min(results[label]["per_core"] for label in results if CASES[label][4])
    summary = {
        "verifiers": results,
        "goal_per_core": GOAL_PER_CORE,
        "slowest_string_verifier_per_core": slowest,
        "python": sys.version.split()[0],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    text = json.dumps(summary)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

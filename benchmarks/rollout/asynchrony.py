"""Rollouts one step ahead of training against synchronous ones: samples per second and final reward, on two cores.

    python benchmarks/rollout/asynchrony.py [--steps 40] [--json PATH]

One vLLM server pinned to one core, one trainer (with its verifier) pinned to another, in both modes; each run is
`tulu-hpc rlvr` in a process of its own, and both start from the same model: the quickstart's, after a short SFT made
here (or --model, a Hugging Face directory, with --root, where the quickstart's data are). Samples per second are those
of the steps after --warmup; the final reward is the mean over the last third of the steps. Needs .venv-vllm (make
rollout-engine), two cores, and to be run from the root of the checkout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from tulu_hpc.rollout.http import Address, request
from tulu_hpc.rollout.server import Server, ServerOptions

GOAL = 1.3
_POSITIONS = 256 + 44  # data.max_length + rollout.max_new_tokens of the quickstart
MODES = {"synchronous": 0, "one step ahead": 1}  # async.max_staleness
PREPARATION = (
    "data synthesize configs/quickstart/synthesize.yaml",
    "data decontaminate configs/quickstart/decontaminate.yaml",
    "data mix configs/quickstart/mix.yaml",
    "convert initialise configs/quickstart/initialise.yaml",
)


def tulu(arguments: Sequence[str], log: Path, core: int | None = None) -> None:
    """`tulu-hpc` in a process of its own, on one core if wanted."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tulu_hpc", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
        if process.wait():
            raise SystemExit(f"tulu-hpc {' '.join(arguments)}:\n{log.read_text()[-3000:]}")


def prepare(root: Path, sft_steps: int) -> Path:
    """The quickstart's data and a model that has seen some of them, below `root`; the model's directory."""
    for line in PREPARATION:
        tulu([*line.split(), f"run.root={root}"], root / "preparation.log")
    sft = ["sft", "configs/quickstart/sft.yaml", f"run.root={root}", f"run.dir={root}/sft", f"train.steps={sft_steps}"]
    tulu([*sft, "train.save_every=null", "train.log_every=100"], root / "preparation.log")
    return root / "sft" / "hf"


def arguments_of(
    root: Path, model: Path, run: Path, mode: str, seed: int, address: Address, options: argparse.Namespace
) -> list[str]:
    """The command line of one run."""
    values = {
        "run.root": root,
        "run.dir": run,
        "run.seed": seed,
        "run.threads": 1,
        "model.path": model,
        "train.steps": options.steps,
        "train.save_every": "null",
        "train.export_hf": "false",
        "telemetry.tensorboard": "false",
        "rlvr.prompts_per_step": options.prompts,
        "rlvr.samples_per_prompt": options.samples,
        "rlvr.epochs": options.epochs,
        "async.max_staleness": MODES[mode],
        "rollout.engine": "vllm",
        "rollout.max_sequences": options.prompts * options.samples,
        "rollout.vllm.servers": f'["{address}"]',
    }
    return ["rlvr", "configs/quickstart/rlvr.yaml", *(f"{key}={value}" for key, value in values.items())]


def summary(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Of one run."""
    counted = rows[options.warmup :]
    seconds = [row["timing/step"] for row in counted]
    last = [row["rollout/reward"] for row in rows[-max(1, len(rows) // 3) :]]
    return {
        "samples_per_second": options.prompts * options.samples * len(counted) / sum(seconds),
        "first_reward": mean(row["rollout/reward"] for row in rows[:3]),
        "final_reward": mean(last),
        "final_reward_error": stdev(last) / math.sqrt(len(last)) if len(last) > 1 else 0.0,
        "seconds": {
            name: mean(row.get(f"timing/{name}", 0.0) for row in counted)
            for name in ("step", "weights", "rollout", "verify", "reference", "train")
        },
        "staleness": mean(row["rollout/staleness"] for row in counted),
        "logprob_error_max": max(row.get("rollout/logprob_error_max", 0.0) for row in rows),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("needs two cores, one for the trainer and one for the server")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or prepare(folder, options.sft_steps)
        root = options.root or folder
        sequences = options.prompts * options.samples
        server_options = ServerOptions(
            python=str(Path(options.python).absolute()),
            model=str(model),
            dtype="float32",
            max_model_len=_POSITIONS,
            max_sequences=sequences,
            kv_cache_mib=128,
        )
        os.sched_setaffinity(0, {cores[1]})  # what the server's processes inherit
        server = Server(server_options, folder / "server.log")
        os.sched_setaffinity(0, set(cores))
        try:
            asyncio.run(server.wait_ready(300))
            found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
            for seed in range(options.seeds):
                for mode in MODES:
                    run = folder / f"{mode.replace(' ', '-')}-{seed}"
                    tulu(
                        arguments_of(root, model, run, mode, seed, server.address, options),
                        run.with_suffix(".log"),
                        cores[0],
                    )
                    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                    found[mode].append(summary(rows, options))
                    print(f"seed {seed}, {mode}: {json.dumps(found[mode][-1])}", file=sys.stderr, flush=True)
            version = asyncio.run(request(server.address, "GET", "/version", seconds=10))
        finally:
            server.stop()
    rates = {mode: mean(each["samples_per_second"] for each in runs) for mode, runs in found.items()}
    rewards = {mode: mean(each["final_reward"] for each in runs) for mode, runs in found.items()}
    error = math.hypot(
        *(math.hypot(*(each["final_reward_error"] for each in runs)) / len(runs) for runs in found.values())
    )
    ratio = rates["one step ahead"] / rates["synchronous"]
    difference = rewards["one step ahead"] - rewards["synchronous"]
    equal = abs(difference) <= max(2 * error, 0.3)  # of a reward of 10
    return {
        "runs": found,
        "samples_per_second": rates,
        "ratio": ratio,
        "final_reward": rewards,
        "final_reward_difference": difference,
        "final_reward_error": error,
        "equal_reward": equal,
        "goal": GOAL,
        "met": ratio >= GOAL and equal,
        "options": {
            key: value for key, value in vars(options).items() if key not in ("json", "python", "model", "root")
        },
        "cores": {"trainer": cores[0], "server": cores[1]},
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "vllm": version.get("version") if isinstance(version, dict) else None,
        },
    }


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="interpreter of vLLM's environment")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--sft-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.model is None) != (options.root is None):
        parser.error("--model and --root go together")
    found = measure(options)
    print(f"{'mode':16s} {'samples/s':>10s} {'reward':>8s}   seconds of a step")
    for mode, runs in found["runs"].items():
        parts = {name: mean(each["seconds"][name] for each in runs) for name in runs[0]["seconds"]}
        text = "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
        print(f"{mode:16s} {found['samples_per_second'][mode]:10.1f} {found['final_reward'][mode]:8.2f}   {text}")
    print(
        f"ratio {found['ratio']:.2f} (goal {GOAL}), reward {found['final_reward_difference']:+.2f}: met {found['met']}"
    )
    line = json.dumps(found)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()

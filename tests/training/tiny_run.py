"""A model directory with tokenizer, data files and configurations, for running the stages as users do."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.data.tokenizer import train_tokenizer
from tulu_hpc.models.initialise import random_hf_model

ROOT = Path(__file__).parents[2]
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "seven",
    "add",
    "then",
    "take",
    "from",
    "the",
    "answer",
    "sum",
    "is",
    "cat",
]


def text(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))


def write_inputs(folder: Path, *, tied: bool = False) -> Path:
    """`folder/{model,sft.jsonl,preferences.jsonl}`; returns the folder."""
    generator = random.Random(3)
    tokenizer = train_tokenizer([text(generator, 5, 20) for _ in range(50)], vocab_size=300)
    architecture = Architecture(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    random_hf_model(architecture, folder / "model", seed=1, embedding_std=0.2, linear_std=0.1)
    tokenizer.save_pretrained(folder / "model")

    def turn(role: str, low: int, high: int) -> dict[str, str]:
        return {"role": role, "content": text(generator, low, high)}

    with (folder / "sft.jsonl").open("w") as file:
        for _ in range(40):
            messages = [turn("user", 2, 8), turn("assistant", 1, 10)]
            if generator.random() < 0.3:
                messages += [turn("user", 1, 4), turn("assistant", 1, 5)]
            file.write(json.dumps({"messages": messages}) + "\n")
    with (folder / "preferences.jsonl").open("w") as file:
        for _ in range(24):
            prompt = turn("user", 2, 12)
            row = {key: [prompt, turn("assistant", 1, 8)] for key in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")
    return folder


def config(inputs: Path, run: Path, verb: str, **changes: Any) -> dict[str, Any]:
    """Plain values of a short run; `changes` are dotted keys with `__` for the dot."""
    values: dict[str, Any] = {
        "run": {"dir": str(run), "seed": 7, "threads": 1},
        "model": {"path": str(inputs / "model")},
        "data": {"path": str(inputs / ("sft.jsonl" if verb == "sft" else "preferences.jsonl")), "max_length": 96},
        "optimizer": {"lr": 0.003, "warmup_ratio": 0.1, "weight_decay": 0.01},
        "train": {"steps": 12, "global_batch_size": 6, "pack_rows": 128, "save_every": 2, "keep_last": 2},
        "telemetry": {"tensorboard": False},
    }
    if verb == "dpo":
        values["dpo"] = {"kind": "dpo_norm", "beta": 5.0}
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return values


def write_config(values: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def start(verb: str, config_path: Path, *, processes: int = 1) -> subprocess.Popen[str]:
    """`python -m tulu_hpc VERB CONFIG`, under torchrun when there are several processes; in a session of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tulu_hpc", verb, str(config_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_to_end(verb: str, config_path: Path, *, processes: int = 1, timeout: float = 120) -> tuple[int, str]:
    process = start(verb, config_path, processes=processes)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step once, in order"
    return [line["train/loss"] for line in lines]

"""DPO: our trainer beside TRL's DPOTrainer on CPU, the same model, pairs and batches. See benchmarks/README.md."""

from __future__ import annotations

from pathlib import Path

from common import QUICK_MODEL, Lengths, ModelSize, Spec
from driver import Case, Setting, run_benchmark
from turns import Turn


def pairs(prompt: float, response: float, high: int, sigma: float = 0.6) -> dict[str, Lengths]:
    """Prompts and two responses of independent log-normal lengths."""
    lengths = Lengths(response, sigma, 4, high)
    return {"prompt": Lengths(prompt, sigma, 4, high), "chosen": lengths, "rejected": lengths}


SETTINGS = [
    Setting("trl-batch8", {"batch": 8}, "TRL's default batch of 8 pairs, reference log-probs computed once"),
    Setting("trl-batch1", {"batch": 1}, "one pair at a time, reference log-probs computed once"),
    Setting("trl-as-it-comes", {"batch": 8, "checkpointing": True, "precompute": False}, "TRL's defaults"),
    Setting("trl-compile", {"batch": 1, "compile": True}, "one pair at a time with torch.compile"),
]
DEFAULT_SETTINGS = ["trl-batch8", "trl-batch1", "trl-as-it-comes"]


def ours(spec: Spec, turn: Turn) -> None:
    import our_side

    our_side.dpo_worker(spec, turn)


def theirs(spec: Spec, turn: Turn) -> None:
    import trl_side

    trl_side.dpo_worker(spec, turn)


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        "dpo",
        Path(__file__),
        workers={"ours": ours, "theirs": theirs},
        settings=SETTINGS,
        default_settings=DEFAULT_SETTINGS,
        cases={
            False: [
                Case("prompt = response", pairs(192, 192, 1024), ModelSize()),
                Case("prompt = 2 responses", pairs(384, 192, 1024), ModelSize()),
            ],
            True: [
                Case("prompt = response", pairs(8, 8, 24), QUICK_MODEL),
                Case("prompt = 2 responses", pairs(16, 8, 24), QUICK_MODEL),
            ],
        },
        global_batch=8,
    )

"""DPO: our trainer beside TRL's DPOTrainer on CPU, the same model, pairs and batches. See benchmarks/README.md."""

from __future__ import annotations

from pathlib import Path

from common import QUICK_MODEL, Lengths, ModelSize, Spec
from driver import Case, Contest, run_benchmark
from report import Setting
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
PARTS = [
    Setting("prompt sharing", {"share": False}, "every response with a prompt of its own"),
    Setting("packing", {"pad": 8}, "responses padded to the longest sequence of 8 pairs, as in TRL's default batch"),
    Setting("fused head", {"head": "full"}, "logits of all rows, log_softmax, then the targets"),
    Setting("cached reference", {"reference": "resident"}, "reference log-probs computed in every step"),
    Setting("first three", {"share": False, "pad": 8, "head": "full"}, "sharing, packing and fused head together"),
]


def ours(spec: Spec, turn: Turn) -> None:
    import our_side

    our_side.dpo_worker(spec, turn)


def theirs(spec: Spec, turn: Turn) -> None:
    import trl_side

    trl_side.dpo_worker(spec, turn)


CONTEST = Contest(
    name="dpo",
    rate="pairs/s",
    unit="pairs",
    goal_ratio=3.0,
    workers={"ours": ours, "theirs": theirs},
    settings=SETTINGS,
    default_settings=["trl-batch8", "trl-batch1"],
    parts=PARTS,
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
    steps=2,
)

if __name__ == "__main__":
    run_benchmark(CONTEST, __doc__ or "", Path(__file__))

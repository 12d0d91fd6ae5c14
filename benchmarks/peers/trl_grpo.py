"""GRPO, training phase: ours beside TRL's GRPOTrainer on CPU, the same samples. See benchmarks/README.md."""

from __future__ import annotations

from pathlib import Path

from common import GROUP, QUICK_MODEL, Lengths, ModelSize, Spec
from driver import Case, Contest, run_benchmark
from report import Setting
from turns import Turn


def groups(prompt: float, response: float, high: int, sigma: float = 0.6) -> dict[str, Lengths]:
    """A prompt and `GROUP` answers of independent log-normal lengths."""
    answers = {f"answer{number}": Lengths(response, sigma, 4, high) for number in range(GROUP)}
    return {"prompt": Lengths(prompt, sigma, 4, high), **answers}


SETTINGS = [
    Setting("trl-batch8", {"batch": 8}, "TRL's default batch of 8 answers"),
    Setting("trl-batch1", {"batch": 1}, "one answer at a time: nothing is padded"),
    Setting("trl-as-it-comes", {"batch": 8, "checkpointing": True}, "TRL's defaults"),
    Setting("trl-compile", {"batch": 1, "compile": True}, "one answer at a time with torch.compile"),
]
PARTS = [
    Setting("prompt sharing", {"share": False}, "every answer with a prompt of its own"),
    Setting("packing", {"pad": 1}, "answers padded to the longest of their group"),
    Setting("fused head", {"head": "full"}, "logits of all rows, log_softmax, then the targets"),
    Setting("all three", {"share": False, "pad": 1, "head": "full"}, "sharing, packing and fused head together"),
]


def ours(spec: Spec, turn: Turn) -> None:
    import our_grpo

    our_grpo.grpo_worker(spec, turn)


def theirs(spec: Spec, turn: Turn) -> None:
    import trl_grpo_side

    trl_grpo_side.grpo_worker(spec, turn)


CONTEST = Contest(
    name="grpo",
    rate="tokens/s",
    unit="groups",
    goal_ratio=3.0,
    workers={"ours": ours, "theirs": theirs},
    settings=SETTINGS,
    default_settings=["trl-batch8", "trl-batch1"],
    parts=PARTS,
    cases={
        False: [Case("prompt = response", groups(192, 192, 1024), ModelSize())],
        True: [Case("prompt = response", groups(8, 8, 24), QUICK_MODEL)],
    },
    global_batch=2,
    steps=4,  # two batches of samples, each with its log-probs and two updates
)

if __name__ == "__main__":
    run_benchmark(CONTEST, __doc__ or "", Path(__file__))

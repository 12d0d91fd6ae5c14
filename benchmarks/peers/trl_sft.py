"""SFT: our trainer beside TRL's SFTTrainer on CPU, the same model, data and batches. See benchmarks/README.md."""

from __future__ import annotations

from pathlib import Path

from common import QUICK_MODEL, Lengths, ModelSize, Spec
from driver import Case, Contest, run_benchmark
from report import Setting
from turns import Turn

VARIED = {"prompt": Lengths(120, 0.8, 8, 1024), "response": Lengths(200, 0.8, 8, 1024)}
EVEN = {"prompt": Lengths(160, 0.0, 8, 1024), "response": Lengths(256, 0.0, 8, 1024)}
QUICK_VARIED = {"prompt": Lengths(6, 0.5, 2, 16), "response": Lengths(10, 0.5, 2, 32)}
QUICK_EVEN = {"prompt": Lengths(6, 0.0, 2, 16), "response": Lengths(10, 0.0, 2, 32)}

SETTINGS = [
    Setting("trl-batch8", {"batch": 8}, "TRL's default batch of 8, padded to the longest row"),
    Setting("trl-batch1", {"batch": 1}, "one row at a time, no padding"),
    Setting("trl-packing", {"batch": 1, "packing": True, "accumulate": 4}, "best-fit packs", same_batches=False),
    Setting("trl-padding-free", {"batch": 4, "padding_free": True}, "4 rows flattened into one"),
    Setting("trl-as-it-comes", {"batch": 8, "checkpointing": True}, "its default gradient checkpointing too"),
    Setting("trl-compile", {"batch": 1, "compile": True}, "one row at a time with torch.compile"),
]
PARTS = [
    Setting("packing", {"pad": 8}, "rows padded to the longest of 8, as in TRL's default batch"),
    Setting("fused head", {"head": "full"}, "logits of all rows, log_softmax, then the targets"),
    Setting("both", {"pad": 8, "head": "full"}, "neither packing nor the fused head"),
]


def ours(spec: Spec, turn: Turn) -> None:
    import our_side

    our_side.sft_worker(spec, turn)


def theirs(spec: Spec, turn: Turn) -> None:
    import trl_side

    trl_side.sft_worker(spec, turn)


CONTEST = Contest(
    name="sft",
    rate="trained tokens/s",
    unit="rows",
    goal_ratio=1.8,
    workers={"ours": ours, "theirs": theirs},
    settings=SETTINGS,
    default_settings=["trl-batch8", "trl-batch1", "trl-packing"],
    parts=PARTS,
    cases={
        False: [Case("varied", VARIED, ModelSize()), Case("even", EVEN, ModelSize(), default=False)],
        True: [Case("varied", QUICK_VARIED, QUICK_MODEL), Case("even", QUICK_EVEN, QUICK_MODEL, default=False)],
    },
    global_batch=16,
    steps=5,
)

if __name__ == "__main__":
    run_benchmark(CONTEST, __doc__ or "", Path(__file__))

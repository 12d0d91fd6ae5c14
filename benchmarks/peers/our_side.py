"""Our trainer as a contestant: the stages' own set-up, loader, loss and step, fed with token ids instead of text.

Options of the specification take parts of it away (`parts`): `share` False, `pad` N items, `head` "full",
`reference` "resident" (DPO; else "cached").
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Spec, read_rows
from parts import longest_item, pad_to_longest, use_full_logits
from turns import Turn, current_rss

from tulu_hpc.config.schema import DpoConfig, SftConfig
from tulu_hpc.data.loader import StepData
from tulu_hpc.data.packed_batch import Item, TokenSequence
from tulu_hpc.stages import dpo, sft, training_run
from tulu_hpc.stages.training_run import Run
from tulu_hpc.training import reference
from tulu_hpc.training.pair_sums import PackOptions
from tulu_hpc.training.runner import LossFn, Runner
from tulu_hpc.training.step import train_step
from tulu_hpc.training.trainer import Trainer


def configuration(spec: Spec, pack_rows: int) -> dict[str, Any]:
    """The keys that SftConfig and DpoConfig share."""
    return {
        "run": {"dir": spec.output_dir, "threads": spec.threads},
        "model": {"path": spec.model_dir},
        "data": {"path": spec.rows_file, "shuffle": False},
        "optimizer": {"lr": spec.lr, "schedule": "constant", "clip_grad": 1.0},
        "train": {
            "steps": spec.steps,
            "global_batch_size": spec.global_batch,
            "pack_rows": pack_rows,
            "prefix_sharing": _shares(spec),
        },
        "telemetry": {"tensorboard": False},
    }


def _shares(spec: Spec) -> bool:
    return bool(spec.options.get("share", True))


def as_padded(spec: Spec, items: list[Item]) -> list[Item]:
    return pad_to_longest(items, int(spec.options["pad"])) if "pad" in spec.options else items


def required_pack_rows(spec: Spec, items: list[Item]) -> int:
    """The specification's, or what the longest item takes where parts were taken away."""
    return max(spec.pack_rows, longest_item(as_padded(spec, items), _shares(spec)))


def sft_worker(spec: Spec, turn: Turn) -> None:
    """`tulu-hpc sft` with a token-mean loss."""
    items = []
    for index, row in enumerate(read_rows(spec)):
        ids = torch.tensor(row["prompt"] + row["response"])
        mask = torch.arange(len(ids)) >= len(row["prompt"])
        items.append(Item("sequence", [TokenSequence(ids, mask)], id=str(index)))
    config = SftConfig(**configuration(spec, required_pack_rows(spec, items)), sft={"normalisation": "token_mean"})
    run = training_run.open_run(config, "sft")
    trainer = training_run.make_trainer(run, total_steps=spec.steps)
    turn.report(rss=current_rss())
    _train(spec, turn, run, trainer, items, lambda data: sft.batch_loss(run, config, data))


def dpo_worker(spec: Spec, turn: Turn) -> None:
    """`tulu-hpc dpo`, with its cache of reference log-probs filled before the first step.

    All contestants of ours share that cache: the first one to be set up fills it.
    """
    items = [
        Item(
            "pair",
            [TokenSequence(torch.tensor(row[name])) for name in ("chosen", "rejected")],
            prompt=torch.tensor(row["prompt"]),
            id=str(index),
        )
        for index, row in enumerate(read_rows(spec))
    ]
    kind = str(spec.options.get("reference", "cached"))
    config = DpoConfig(
        **configuration(spec, required_pack_rows(spec, items)),
        dpo={"kind": "dpo", "beta": spec.beta, "reference": kind},
    )
    run = training_run.open_run(config, "dpo")
    trainer = training_run.make_trainer(run, total_steps=spec.steps)
    resident = dpo.reference_model(config, run.groups, run.architecture) if kind == "resident" else None
    started = time.perf_counter()
    if resident is None:
        cache = Path(spec.output_dir).parent / "reference"
        add = _from_cache if cache.exists() else dpo.add_reference
        items = add(run, config, trainer.runner, items, 0, cache)
    turn.report(rss=current_rss(), reference_seconds=time.perf_counter() - started)

    def loss(data: StepData) -> LossFn:
        if resident is not None:
            reference.add_sums(data.packs, resident)
        return dpo.batch_loss(run, config, data)

    _train(spec, turn, run, trainer, items, loss)


def _from_cache(
    run: Run, config: DpoConfig, runner: Runner, items: list[Item], pad_id: int, directory: Path
) -> list[Item]:
    """As `dpo.add_reference`, which would compute all of so few pairs again to check them; here one is enough."""
    return reference.attach_reference(
        items,
        runner,
        directory=directory,
        fingerprint=reference.weights_fingerprint(Path(config.model.path), run.groups, dtype=config.model.precision),
        options=PackOptions(config.train.pack_rows, config.train.prefix_sharing, pad_id),
        tolerance=dpo.TOLERANCE[config.model.dtype],
        seed=config.run.seed,
        verify_rows=1,
    )


def _train(
    spec: Spec,
    turn: Turn,
    run: Run,
    trainer: Trainer,
    items: list[Item],
    loss: Callable[[StepData], LossFn],
) -> None:
    """One optimizer step per turn, as the stages take them."""
    if spec.options.get("head") == "full":
        use_full_logits()
    loader = training_run.make_loader(run, as_padded(spec, items), pad_id=0)
    for _ in range(spec.steps):
        turn.wait()
        data = loader.next_step()
        result = train_step(trainer, data.packs, loss(data))
        turn.report(loss=result.loss, rows=result.rows, tokens=result.targets)

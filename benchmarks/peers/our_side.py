"""Our trainer as a contestant: the stages' own set-up, loader, loss and step, fed with token ids instead of text."""

from __future__ import annotations

import time
from typing import Any

import torch
from common import Spec, read_rows
from turns import Turn, current_rss

from tulu_hpc.config.schema import DpoConfig, SftConfig
from tulu_hpc.data.packed_batch import Item, TokenSequence
from tulu_hpc.stages import dpo, sft, training_run
from tulu_hpc.training.step import train_step


def configuration(spec: Spec) -> dict[str, Any]:
    """The keys that SftConfig and DpoConfig share."""
    return {
        "run": {"dir": spec.output_dir, "threads": spec.threads},
        "model": {"path": spec.model_dir},
        "data": {"path": spec.rows_file, "shuffle": False},
        "optimizer": {"lr": spec.lr, "schedule": "constant", "clip_grad": 1.0},
        "train": {"steps": spec.steps, "global_batch_size": spec.global_batch, "pack_rows": spec.pack_rows},
        "telemetry": {"tensorboard": False},
    }


def tokens(ids: list[int]) -> TokenSequence:
    return TokenSequence(torch.tensor(ids))


def sft_worker(spec: Spec, turn: Turn) -> None:
    """`tulu-hpc sft` with a token-mean loss."""
    items = []
    for index, row in enumerate(read_rows(spec)):
        ids = torch.tensor(row["prompt"] + row["response"])
        mask = torch.arange(len(ids)) >= len(row["prompt"])
        items.append(Item("sequence", [TokenSequence(ids, mask)], id=str(index)))
    config = SftConfig(**configuration(spec), sft={"normalisation": "token_mean"})
    run = training_run.open_run(config, "sft")
    loader = training_run.make_loader(run, items, pad_id=0)
    trainer = training_run.make_trainer(run, total_steps=loader.num_steps)
    turn.report(rss=current_rss())
    for _ in range(spec.steps):
        turn.wait()
        data = loader.next_step()
        result = train_step(trainer, data.packs, sft.batch_loss(run, config, data))
        turn.report(loss=result.loss, rows=result.rows, tokens=result.targets)


def dpo_worker(spec: Spec, turn: Turn) -> None:
    """`tulu-hpc dpo`, with its cache of reference log-probs filled before the first step."""
    items = [
        Item(
            "pair", [tokens(row["chosen"]), tokens(row["rejected"])], prompt=torch.tensor(row["prompt"]), id=str(index)
        )
        for index, row in enumerate(read_rows(spec))
    ]
    config = DpoConfig(**configuration(spec), dpo={"kind": "dpo", "beta": spec.beta})
    run = training_run.open_run(config, "dpo")
    trainer = training_run.make_trainer(run, total_steps=spec.steps)
    started = time.perf_counter()
    items = dpo.add_reference(run, config, trainer, items, 0)
    reference_seconds = time.perf_counter() - started
    loader = training_run.make_loader(run, items, pad_id=0)
    turn.report(rss=current_rss(), reference_seconds=reference_seconds)
    for _ in range(spec.steps):
        turn.wait()
        data = loader.next_step()
        result = train_step(trainer, data.packs, dpo.batch_loss(run, config, data))
        turn.report(loss=result.loss, rows=result.rows, tokens=result.targets)

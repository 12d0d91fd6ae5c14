"""NaN and infinity: noticed at the step that makes them, before they reach a parameter, and traced to where they began.

Every step checks the log-probs of each sequence, the loss of each micro-batch and the gradient norm; the verdict
travels with the step's metrics, so that all ranks act alike. A bad step is then repeated with `Probe` on every module
(unless every step is watched), and all ranks tell what they saw.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tulu_hpc.objectives.terms import Terms, own_targets
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.training.probe import Finding, Probe, bad_parameters, layer_of

DIRECTORY = "non_finite"


class NonFiniteError(RuntimeError):
    """Loss or gradient is NaN or infinite. No parameter was changed by the step.

    Attributes:
        report: what `describe` says in words, and each rank's own account; the same on every rank.
    """

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class LossWatch:
    """Notes, without waiting for the device, which sequences of a step have log-probs or a loss that is not finite."""

    _seen: list[tuple[RankBatch, Tensor, Tensor]] = field(default_factory=list)

    def around(self, loss_fn: Callable[[Any, RankBatch], Terms]) -> Callable[[Any, RankBatch], Terms]:
        """`loss_fn`, watched."""

        def watched(output: Any, batch: RankBatch) -> Terms:
            terms = loss_fn(output, batch)
            self._seen.append((batch, _bad_sequences(output, batch), ~torch.isfinite(terms.loss.detach())))
            return terms

        return watched

    def count(self) -> int:
        """Sequences and micro-batches that are not finite; reads the device once."""
        if not self._seen:
            return 0
        flags = torch.cat([flag for _, bad_Q, bad_loss in self._seen for flag in (bad_Q, bad_loss.view(1))])
        return int(flags.sum())

    def sequences(self) -> list[dict[str, Any]]:
        """Sample and source of each sequence that is not finite; all of a micro-batch where only its loss is not."""
        found = []
        for index, (batch, bad_Q, bad_loss) in enumerate(self._seen):
            pack = batch.batch
            items = pack.per_sequence["item"][bad_Q.nonzero()[:, 0]].unique().tolist()
            what = "log-probs"
            if not items and bool(bad_loss):
                items, what = list(range(len(pack.item_ids))), "loss of the micro-batch"
            for item in items:
                sample = {"sample_id": pack.item_ids[item], "source": pack.sources[item]}
                found.append({"micro_batch": index, "what": what, **sample})
        return found


def _bad_sequences(output: Any, batch: RankBatch) -> Tensor:
    """[Q] bool: which sequences have a log-prob on this rank that is not finite."""
    pack = batch.batch
    bad_Q = torch.zeros(pack.num_sequences, device=batch.keep_K.device)
    logprobs_K = getattr(output, "logprobs_K", None)
    if logprobs_K is not None:  # models with a scalar head have none: their loss is watched
        bad_K = ~torch.isfinite(logprobs_K.detach())
        bad_Q.index_add_(0, own_targets(pack.sequence_id_K, batch), bad_K.to(bad_Q.dtype))
    return bad_Q > 0


@dataclass
class NonFiniteWatch:
    """How bad steps are traced.

    Attributes:
        mode: `always` watches every step with hooks, `on_failure` repeats a bad one under watch.
        directory: where the report is written (`non_finite/step_N.json` in it); None: nowhere.
    """

    mode: Literal["on_failure", "always"] = "on_failure"
    directory: Path | None = None

    def probe(self, models: Sequence[Any], batches: Sequence[RankBatch]) -> AbstractContextManager[Probe | None]:
        """What to run a step under."""
        return Probe(models, batches) if self.mode == "always" else nullcontext()


def raise_non_finite(
    *,
    step: int,
    grad_norm: float,
    groups: Groups,
    models: Sequence[Any],
    batches: Sequence[RankBatch],
    losses: LossWatch,
    probe: Probe | None,
    repeat: Callable[[], None],
    directory: Path | None,
) -> None:
    """Find out where it began and raise. Collective: every rank calls it at the same step.

    Args:
        grad_norm: of the step, NaN also where it was not computed because the loss was bad already.
        probe: of the step itself, if it was watched.
        repeat: does the forward and backward pass of the step again (megatron's schedule, collectives included).

    Raises:
        NonFiniteError: always.
    """
    sequences = losses.sequences()
    if probe is None:
        with Probe(models, batches) as probe:
            repeat()
    finding = probe.finding()
    mine = {
        "rank": groups.rank,
        **{name: getattr(groups, f"{name}_rank") for name in ("tp", "pp", "dp", "cp")},
        "host": socket.gethostname(),
        "parameters": bad_parameters(models),
        "finding": None if finding is None else _account(finding, batches),
        "sequences": sequences,
    }
    ranks = groups.all_gather_object(mine)
    first = _first(ranks, groups.pp_size)
    samples = list(dict.fromkeys(each["sample_id"] for rank in ranks for each in rank["sequences"]))
    report = {"step": step, "grad_norm": str(grad_norm), "first": first, "sample_ids": samples, "ranks": ranks}
    where = ""
    if directory is not None:
        path = directory / DIRECTORY / f"step_{step}.json"
        where = f"; all that is known: {path}"
        if groups.is_main:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(report, indent=1) + "\n")
            except OSError as error:  # the other ranks raise what follows, and so must this one
                where = f"; {path} cannot be written: {error.strerror}"
        where = groups.broadcast_object(where)
    raise NonFiniteError(f"step {step}: {describe(report)}{where}", report)


def describe(report: dict[str, Any]) -> str:
    """The report as a sentence."""
    norm = float(report["grad_norm"])
    what = "a loss is not finite" if report["sample_ids"] else f"the gradient norm is {norm}"
    first = report["first"]
    if first is None:
        begin = "every module's outputs and gradients are finite by themselves: it arose in their sum over ranks"
    else:
        place = f"rank {first['rank']} (tp {first['tp']}, pp {first['pp']}, dp {first['dp']}, cp {first['cp']})"
        layer = "" if first["layer"] is None else f" (layer {first['layer']})"
        begin = f"first the {first['kind']} of {first['module']}{layer} on {place}, host {first['host']}"
        if first["sample_ids"]:
            begin += f", micro-batch {first['micro_batch']} with samples {_some(first['sample_ids'])}"
    tail = f"; sequences affected: {_some(report['sample_ids'])}" if report["sample_ids"] else ""
    spoilt = first is not None and first["kind"] == "value"
    end = "the parameter was so before this step" if spoilt else "no parameter was changed by this step"
    return f"{what}; {begin}{tail}; {end}"


def _some(names: Sequence[str], most: int = 8) -> str:
    left = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + left


def _account(finding: Finding, batches: Sequence[RankBatch]) -> dict[str, Any]:
    pack = batches[finding.micro_batch].batch
    return {**asdict(finding), "layer": layer_of(finding.module), "sample_ids": list(pack.item_ids)}


def _first(ranks: Sequence[dict[str, Any]], stages: int) -> dict[str, Any] | None:
    """Where it began: a spoilt parameter, else the earliest output along the pipeline, else the latest stage's
    gradient."""
    places = [{key: rank[key] for key in ("rank", "tp", "pp", "dp", "cp", "host")} for rank in ranks]
    for place, rank in zip(places, ranks, strict=True):
        if rank["parameters"]:
            name = rank["parameters"][0]
            nothing: dict[str, Any] = {"micro_batch": None, "sample_ids": []}
            return {"kind": "value", "module": name, "layer": layer_of(name), **nothing, **place}
    found = [(rank["finding"], place) for rank, place in zip(ranks, places, strict=True) if rank["finding"]]
    if not found:
        return None

    def forward_first(pair: tuple[dict[str, Any], dict[str, Any]]) -> tuple[int, ...]:
        finding, place = pair
        stage = finding["chunk"] * stages + place["pp"]
        forward = finding["kind"] == "output"
        return (not forward, finding["micro_batch"], stage if forward else -stage, finding["order"], place["rank"])

    finding, place = min(found, key=forward_first)
    keys = ("kind", "module", "layer", "micro_batch", "sample_ids")
    return {**{key: finding[key] for key in keys}, **place}

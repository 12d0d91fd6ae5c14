"""From `data.path` to items, for the stages that train on a fixed data set and for its preview."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tulu_hpc.config.schema import DpoConfig, RewardModelConfig, SftConfig
from tulu_hpc.config.sections import DataSection
from tulu_hpc.data.chat_template import ChatTemplate
from tulu_hpc.data.datasets import Counted, labelled_items, preference_items, sft_items
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.data.preview import preview_page
from tulu_hpc.data.readout import with_readout
from tulu_hpc.data.records import read_records
from tulu_hpc.data.tokenizer import load_tokenizer
from tulu_hpc.telemetry.files import write_atomically

Kind = Literal["sft", "preference", "labelled"]


def kind_of(config: SftConfig | DpoConfig | RewardModelConfig) -> Kind:
    """The records that a training file reads."""
    if isinstance(config, SftConfig):
        return "sft"
    return "labelled" if isinstance(config, DpoConfig) and config.dpo.records == "labels" else "preference"


def weight_field_of(config: SftConfig | DpoConfig | RewardModelConfig) -> str | None:
    """The field of a record with the weight of its loss."""
    return config.dpo.weight_field if isinstance(config, DpoConfig) else None


def read_items(
    data: DataSection,
    tokenizer: Any,
    kind: Kind,
    say: Callable[[str], None] = lambda line: None,
    *,
    weight_field: str | None = None,
) -> tuple[list[Item], list[str]]:
    """Every item of `data.path`, tokenised, and a line per path about what was cut and left out (also given to `say`).

    Raises:
        RecordError: a malformed row with its file, line and field (unless data.on_error is skip: counted and reported).
        MaskProofError: a conversation whose label mask cannot be proven, with the span.
    """
    template = ChatTemplate.load(data.chat_template, tokenizer)
    items: list[Item] = []
    lines: list[str] = []
    for path in data.path:
        found: Counted[Item]
        if kind == "sft":
            sft = read_records(path, "sft", on_error=data.on_error)
            skipped, found = sft.skipped, sft_items(sft, tokenizer, template, data.max_length, on_error=data.on_error)
        elif kind == "labelled":
            single = read_records(path, "labelled", on_error=data.on_error, weight_field=weight_field)
            skipped = single.skipped
            found = labelled_items(single, tokenizer, template, data.max_length, on_error=data.on_error)
        else:
            pairs = read_records(path, "preference", on_error=data.on_error, weight_field=weight_field)
            skipped = pairs.skipped
            found = preference_items(pairs, tokenizer, template, data.max_length, on_error=data.on_error)
        items += found
        malformed = f", {len(skipped)} malformed rows left out, the first: {skipped[0]}" if skipped else ""
        lines.append(f"{path}: {found.summary()}{malformed}")
        say(lines[-1])
    return items, lines


def preview(config: SftConfig | DpoConfig | RewardModelConfig, *, rows: int, output: Path | None = None) -> Path:
    """Write the page that shows what this file would train (verb `data preview`), and return where it lies.

    Raises:
        RecordError, MaskProofError: as `read_items`.
        ValueError: no sample is left to train on.
    """
    tokenizer = load_tokenizer(config.model.path)
    items, lines = read_items(config.data, tokenizer, kind_of(config), weight_field=weight_field_of(config))
    if not items:
        raise ValueError(f"{', '.join(config.data.path)}: no sample is left to train on ({'; '.join(lines)})")
    target = output or Path(config.run.dir or config.run.root) / "masks.html"
    title, readout = f"{config.run.name}: what is trained", isinstance(config, RewardModelConfig)
    write_preview(target, items, tokenizer, title=title, rows=rows, lines=lines, readout=readout)
    return target


def write_preview(
    target: Path,
    items: list[Item],
    tokenizer: Any,
    *,
    title: str,
    rows: int,
    lines: list[str],
    readout: bool = False,
) -> None:
    """Write the page of `data.preview`; it appears whole or not at all.

    Args:
        readout: a scalar head is trained: the tokens at which it is read are marked.
    """
    shown = [with_readout(item) for item in items] if readout else items
    text = preview_page(shown, tokenizer, title=title, rows=rows, seed=0, summaries=lines, readout=readout)
    write_atomically(target, text)

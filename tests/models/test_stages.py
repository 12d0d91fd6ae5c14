"""Layers per pipeline stage and chunk: what we count is what megatron builds, and what it refuses we refuse before."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from tests.models.reference import architecture
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.models.build import layers_per_chunk, transformer_config
from tulu_hpc.parallel.layout import Layout, LayoutError, layout_of

ENDS = [(first, last, False, False) for first, last in product((None, 1, 2, 3, 4, 6), repeat=2)]
COUNTED = [(None, None, *counted) for counted in product((False, True), repeat=2)]


def megatrons(layout: Layout, layers: int) -> list[list[tuple[int, int]]]:
    """(number of the first layer, number of layers) of every [stage][chunk]."""
    config = transformer_config(architecture(num_hidden_layers=layers), layout, dtype=torch.float32)
    chunks = range(layout.virtual_pipeline) if layout.virtual_pipeline else [None]
    return [
        [
            (
                get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=stage),
                get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage),
            )
            for chunk in chunks
        ]
        for stage in range(layout.pipeline)
    ]


@pytest.mark.parametrize("pipeline", [2, 3, 4])
@pytest.mark.parametrize("virtual_pipeline", [None, 2, 3])
def test_megatron_builds_what_is_counted(pipeline: int, virtual_pipeline: int | None) -> None:
    built = 0
    for layers, (first, last, embedding, loss) in product((4, 6, 8, 12), ENDS + COUNTED):
        layout = Layout(
            pipeline=pipeline, virtual_pipeline=virtual_pipeline, first_stage_layers=first, last_stage_layers=last,
            account_for_embedding=embedding, account_for_loss=loss,
        )  # fmt: skip
        try:
            counts = layers_per_chunk(architecture(num_hidden_layers=layers), layout)
        except LayoutError:
            continue
        found = megatrons(layout, layers)
        assert [[count for _, count in stage] for stage in found] == counts, layout
        # Chunk by chunk, stage by stage, every layer has one place.
        in_order = [stage[chunk] for chunk in range(virtual_pipeline or 1) for stage in found]
        covered = [layer for start, count in in_order for layer in range(start, start + count)]
        assert covered == list(range(layers)), layout
        built += 1
    assert built >= 5


def test_megatron_cannot_place_two_uneven_ends_without_a_middle() -> None:
    """Why `transformer_config` gives megatron only one end of two stages."""
    layout = Layout(pipeline=2, virtual_pipeline=2, first_stage_layers=2, last_stage_layers=4)
    assert megatrons(layout, 6) == [[(0, 1), (3, 1)], [(1, 2), (4, 2)]]
    config: TransformerConfig = transformer_config(architecture(num_hidden_layers=6), layout, dtype=torch.float32)
    config.num_layers_in_last_pipeline_stage = 4
    with pytest.raises(ZeroDivisionError):
        get_transformer_layer_offset(config, vp_stage=1, pp_rank=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline": 3, "first_stage_layers": 4, "last_stage_layers": 2}, "leave no layer of 6 to the other 1 of 3"),
        ({"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 3}, "cannot be dealt evenly.*first 2, last 3"),
        ({"pipeline": 2, "first_stage_layers": 7}, "cannot be dealt evenly"),
        ({"pipeline": 4, "first_stage_layers": 2}, "cannot be dealt evenly"),
        ({"pipeline": 2, "first_stage_layers": 1, "virtual_pipeline": 2}, r"stages of \[1, 5\] layers do not divide"),
    ],
)
def test_ends_that_do_not_fit_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        layers_per_chunk(architecture(num_hidden_layers=6), layout_of(ParallelSection(**options)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first_stage_layers": 2}, "need pipeline >= 2"),
        ({"pipeline": 2, "last_stage_layers": 2, "account_for_loss_in_pipeline_split": True}, "not both"),
        ({"pipeline": 2, "first_stage_layers": 0}, "greater than or equal to 1"),
        ({"gradient_bucket_size": 5}, "needs overlap_grad_reduce"),
    ],
)
def test_settings_that_exclude_each_other(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelSection(**options)

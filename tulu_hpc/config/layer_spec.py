"""What the choice of layers in `model` asks of the rest of a configuration."""

from __future__ import annotations

from tulu_hpc.config.sections import ModelSection, ParallelSection

# Rows per rank that fp8 GEMMs and the quantised gather between ranks divide into.
_ROWS = {"tensorwise": 16, "mxfp8": 32, "blockwise": 128}


def check_layer_spec(model: ModelSection, parallel: ParallelSection, *, decodes: bool) -> None:
    """Refuse what the chosen layers cannot do together.

    Args:
        decodes: the verb generates text with this model, with any number of rows per step.

    Raises:
        ValueError: naming both keys.
    """
    if parallel.tp_comm_overlap and model.layer_spec != "transformer_engine":
        raise ValueError("parallel.tp_comm_overlap needs model.layer_spec: transformer_engine")
    if parallel.tp_comm_overlap and model.fp8 != "none" and model.fp8_recipe == "blockwise":
        raise ValueError("parallel.tp_comm_overlap does not work with model.fp8_recipe: blockwise")
    if decodes and model.fp8 != "none":
        raise ValueError(f"model.fp8: {model.fp8} does not work where this model generates: it needs fixed row counts")
    if decodes and parallel.tp_comm_overlap:
        raise ValueError("parallel.tp_comm_overlap does not work where this model generates: it needs fixed row counts")


def row_step(model: ModelSection, parallel: ParallelSection, pack_rows: int) -> int:
    """The rows of a pack per rank that splits them must be a multiple of this; with tp_comm_overlap, exactly this.

    Raises:
        ValueError: with tp_comm_overlap, `pack_rows` is less than the ranks need.
    """
    step = 1 if model.fp8 == "none" else _ROWS[model.fp8_recipe]
    if not parallel.tp_comm_overlap:
        return step
    if model.fp8 != "none" and model.fp8_recipe == "mxfp8":
        step = 128  # what Transformer Engine's communication buffers divide into
    ranks = parallel.context * parallel.tensor
    if pack_rows < ranks * step:
        raise ValueError(
            f"train.pack_rows = {pack_rows}: parallel.tp_comm_overlap needs packs of at least {ranks * step} rows, "
            f"{step} on each of the {ranks} ranks that split them"
        )
    return pack_rows // (ranks * step) * step

"""A checkpoint of any layout continues at any other: weights, optimizer, schedule, loader and generators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.forked import run_forked
from tests.training import tiny
from tests.training.test_checkpoint import adam_state, load_and_continue, save_and_continue, step
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.data.loader import ItemLoader
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.training import checkpoint, saver
from tulu_hpc.training.runner import row_multiple

PLAIN = ParallelSection()
OFF = {"distributed_optimizer": False}
TP, PP, CP = {"tensor": 2}, {"pipeline": 2}, {"context": 2}
VPP = {"pipeline": 2, "virtual_pipeline": 2}
UNEVEN = {"pipeline": 2, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
SAVED, LOADED = tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("tied") / "hf", tiny.TIED)


def assert_continues(model: Path, folder: Path, saved: SAVED, loaded: LOADED) -> None:
    kept = run_forked(saved[0], save_and_continue, model, folder, ParallelSection(**saved[1]))[0]
    other = run_forked(loaded[0], load_and_continue, model, folder, ParallelSection(**loaded[1]))[0]
    assert other["third"] == pytest.approx(kept["third"], rel=1e-5)
    # A third step without its moments would be elsewhere by the learning rate, 1e-3.
    assert tiny.largest_difference(other["weights"], kept["weights"], relative=False) <= 1e-4


PAIRS = {
    "tp2 to pp2": ((2, TP), (2, PP)),
    "pp2 to tp2": ((2, PP), (2, TP)),
    "vpp2 to tp2": ((2, VPP), (2, TP)),
    "dp2 to vpp2": ((2, {}), (2, VPP)),
    "cp2 to pp2": ((2, CP), (2, PP)),
    "tp2 pp2 to dp2 cp2": ((4, {**TP, **PP}), (4, CP)),
    "uneven stages": ((2, PP), (2, UNEVEN)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_between_layouts(model: Path, tmp_path: Path, name: str) -> None:
    assert_continues(model, tmp_path, *PAIRS[name])


FORMS = {
    "on to off": ((1, {}), (1, OFF)),
    "off to on": ((1, OFF), (1, {})),
    "off at dp2 to on at tp2": ((2, OFF), (2, TP)),
    "on at pp2 to off at tp2": ((2, PP), (2, {**TP, **OFF})),
}


@pytest.mark.parametrize("name", FORMS)
def test_between_forms_of_the_optimizer(model: Path, tmp_path: Path, name: str) -> None:
    assert_continues(model, tmp_path, *FORMS[name])


def test_tied_embeddings(tied_model: Path, tmp_path: Path) -> None:
    assert_continues(tied_model, tmp_path, *PAIRS["dp2 to vpp2"])


def convert(model: Path, source: Path | None, target: Path, parallel: ParallelSection, dtype: str) -> dict[str, Any]:
    """Load at a layout (or train two steps) and save again."""
    groups = initialize(layout_of(parallel), seed=3)
    trainer = tiny.make_trainer(model, groups, parallel, dtype=dtype)
    if source is None:
        for number in range(2):
            step(trainer, groups, parallel, number)
    else:
        assert checkpoint.load_latest(trainer, source) == (2, {"x": 1})
    saver.save(trainer, target, {"x": 1})
    return {"lr": trainer.schedule.lr_at(trainer.step), "adam": adam_state(trainer)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_carried_bit_for_bit(model: Path, tmp_path: Path, dtype: str) -> None:
    """Weights, masters, moments and step after four changes of layout and form are those of one change."""
    source, rates = None, set()
    for number, (world, options) in enumerate([(2, TP), (2, PP), (2, OFF), (2, VPP), (1, {})]):
        target = tmp_path / str(number)
        found = run_forked(world, convert, model, source, target, ParallelSection(**options), dtype)
        rates |= {each["lr"] for each in found}
        source = target
    direct = run_forked(1, convert, model, tmp_path / "0", tmp_path / "direct", PLAIN, dtype)[0]
    assert rates == {direct["lr"]}
    assert len(direct["adam"]) > 40 and float(direct["adam"][1]) == 2
    assert all(torch.equal(x, y) for x, y in zip(found[0]["adam"], direct["adam"], strict=True))


def draw(model: Path, folder: Path, parallel: ParallelSection, seed: int) -> list[float]:
    groups = initialize(layout_of(parallel), seed=seed)
    trainer = tiny.make_trainer(model, groups, parallel)
    if folder.exists():
        checkpoint.load_latest(trainer, folder)
    else:
        torch.rand(7)
        step(trainer, groups, parallel, 0)
        saver.save(trainer, folder, {})
    return torch.rand(3).tolist()


def test_generators_at_another_layout(model: Path, tmp_path: Path) -> None:
    """They cannot be split as weights can: they are seeded from the saved ones, the same on every rank and attempt."""
    folder = tmp_path / "c"
    whole = run_forked(2, draw, model, folder, ParallelSection(), 1)
    assert run_forked(2, draw, model, folder, ParallelSection(), 8) == whole, "the same layout goes on where it was"
    first = run_forked(2, draw, model, folder, ParallelSection(**TP), 5)
    again = run_forked(2, draw, model, folder, ParallelSection(**TP), 6)
    assert first == again and first[0] == first[1] and first[0] not in whole
    assert first[0] != draw_fresh(6), "not the start of the run again"


def draw_fresh(seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, generator=generator).tolist()


def test_loader_at_another_data_parallel_size() -> None:
    """The position is that of the job, not of a rank: no item is seen twice or left out."""
    items = tiny.make_items("ssssssssssss")

    def loader(rank: int, size: int) -> ItemLoader:
        return ItemLoader(
            items,
            global_batch_size=3,
            seed=4,
            steps=8,
            dp_rank=rank,
            dp_size=size,
            pack_rows=64,
            multiple=row_multiple(layout_of(ParallelSection()), "greedy"),
            share=True,
        )

    def ids(loaders: list[ItemLoader]) -> set[str]:
        return {name for each in loaders for pack in each.next_step().packs for name in pack.item_ids}

    whole = [loader(0, 1)]
    wanted = [ids(whole) for _ in range(8)]
    two = [loader(rank, 2) for rank in range(2)]
    assert [ids(two) for _ in range(3)] == wanted[:3]
    three = [loader(rank, 3) for rank in range(3)]
    for each in three:
        each.load_state_dict(two[0].state_dict())
    assert [ids(three) for _ in range(5)] == wanted[3:]

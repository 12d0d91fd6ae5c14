"""The log of samples: what it proves, and the faults it must find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.builders import random_items
from tulu_hpc.data.loader import ItemLoader
from tulu_hpc.data.sample_log import SampleAuditError, SampleLog, audit, begin

ITEMS = random_items("sps" * 7, seed=4)
IDS = [item.id for item in ITEMS]


def run(folder: Path, *, ranks: int, start: int, stop: int, state: dict | None = None) -> dict:
    """Steps start+1..stop on some ranks; returns the loader's state."""
    begin(folder, IDS, resume_step=start)
    for rank in range(ranks):
        loader = ItemLoader(
            ITEMS, global_batch_size=4, seed=3, epochs=2, dp_rank=rank, dp_size=ranks, pack_rows=64, multiple=4
        )
        if state is not None:
            loader.load_state_dict(state)
        with SampleLog(folder, dp_rank=rank, resume_step=start) as log:
            while loader.step < min(stop, loader.num_steps):
                data = loader.next_step()
                log.write(loader.step, [i for pack in data.packs for i in pack.item_ids], batch=data.num_items_global)
    return loader.state_dict()


def test_two_epochs_over_a_kill_and_another_number_of_ranks(tmp_path: Path) -> None:
    state = run(tmp_path, ranks=2, start=0, stop=4)
    run(tmp_path, ranks=2, start=4, stop=6, state=state)  # these two steps are lost: no checkpoint holds them
    (half,) = tmp_path.glob("from_00000004_dp_00001.jsonl")
    with half.open("a") as stream:
        stream.write('{"step": 7, "ba')  # and the process was killed in the middle of a line
    with pytest.raises(SampleAuditError, match="cut off"):
        audit(tmp_path)
    run(tmp_path, ranks=3, start=4, stop=99, state=state)
    found = audit(tmp_path)
    assert (found.samples, found.items, found.least, found.most) == (42, 21, 2, 2) and found.steps == 11
    assert "each of 21 was seen 2 times" in str(found)


def test_an_epoch_that_is_not_complete(tmp_path: Path) -> None:
    run(tmp_path, ranks=1, start=0, stop=7)
    found = audit(tmp_path)
    assert (found.samples, found.least, found.most) == (28, 1, 2)


def tamper(folder: Path, line: int, **fields: object) -> None:
    (log,) = folder.glob("from_*_dp_00000.jsonl")
    rows = [json.loads(each) for each in log.read_text().splitlines()]
    rows[line].update(fields)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": [IDS[0]] * 4}, f"{IDS[0]} was seen . times"),
        ({"ids": ["stranger", *IDS[:3]]}, "stranger, which is not in the data"),
        ({"ids": IDS[:3]}, "step 3 trained on 3 samples"),
        ({"step": 40}, "step 3 is missing"),
    ],
    ids=["repeated", "unknown", "dropped", "missing step"],
)
def test_faults_are_named(tmp_path: Path, fields: dict, message: str) -> None:
    run(tmp_path, ranks=1, start=0, stop=99)
    tamper(tmp_path, 2, **fields)
    with pytest.raises(SampleAuditError, match=message):
        audit(tmp_path)


def test_other_data_and_no_log(tmp_path: Path) -> None:
    run(tmp_path, ranks=1, start=0, stop=2)
    with pytest.raises(SampleAuditError, match="other data"):
        begin(tmp_path, IDS[:-1], resume_step=2)
    with pytest.raises(FileNotFoundError, match=r"train\.sample_log"):
        audit(tmp_path / "elsewhere")


def test_a_run_that_began_without_a_log(tmp_path: Path) -> None:
    """Its log could prove nothing, and would fail the run at its end."""
    assert not begin(tmp_path / "samples", IDS, resume_step=3)
    assert not (tmp_path / "samples").exists()
    assert begin(tmp_path / "samples", IDS, resume_step=0)


def test_steps_left_out_are_told(tmp_path: Path) -> None:
    begin(tmp_path, ["a", "b"], resume_step=0)
    with SampleLog(tmp_path, dp_rank=0, resume_step=0) as log:
        log.write(1, ["a"], batch=1, left_out=True)
        log.write(2, ["b"], batch=1)
    assert str(audit(tmp_path)).endswith("each of 2 was seen 1 times; 1 of them in steps left out as spikes")


def test_equal_rows_are_counted_together(tmp_path: Path) -> None:
    begin(tmp_path, ["a", "a", "b"], resume_step=0)
    with SampleLog(tmp_path, dp_rank=0, resume_step=0) as log:
        log.write(1, ["a", "b", "a"], batch=3)
    assert audit(tmp_path).most == 1

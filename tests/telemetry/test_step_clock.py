"""Phases of a step and the comparison of ranks, on clocks that the test turns."""

from __future__ import annotations

import json

import pytest

from tulu_hpc.telemetry.step_clock import PHASES, StepClock
from tulu_hpc.telemetry.stragglers import RankTimes, compare


class Hands:
    """A clock that stands still unless told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_belongs_to_one_phase() -> None:
    hands = Hands()
    clock = StepClock(hands)
    clock.start()
    hands.now += 1
    with clock.phase("data"):
        hands.now += 2
        with clock.phase("communication"):
            hands.now += 4
        hands.now += 8
    hands.now += 16
    with pytest.raises(KeyError), clock.phase("optimizer"):
        hands.now += 32
        raise KeyError
    hands.now += 64
    found = clock.seconds(clock.stop())
    wanted = {"data": 10.0, "communication": 4.0, "optimizer": 32.0, "other": 81.0}
    assert found == {**dict.fromkeys(PHASES, 0.0), **wanted}
    assert sum(found.values()) == hands.now


def test_outside_a_step_nothing_is_counted_and_a_lost_step_is_forgotten() -> None:
    hands = Hands()
    clock = StepClock(hands)
    with clock.phase("forward"):
        hands.now += 5
    with pytest.raises(RuntimeError, match="without start"):
        clock.stop()
    clock.start()
    clock.enter("forward")  # and an error ended the step before it was left
    hands.now += 7
    clock.start()
    hands.now += 1
    found = clock.seconds(clock.stop())
    assert found["other"] == 1.0 and found["forward"] == 0.0


def test_the_rank_that_works_longest_is_named_with_its_host() -> None:
    report = compare(
        [
            RankTimes(0, "a", (1.0, 1.0, 9.0)),  # one slow step is no straggler
            RankTimes(1, "a", (1.1, 1.1, 1.1)),
            RankTimes(2, "b", (2.0, 2.2, 2.1)),
        ]
    )
    assert (report.slowest.rank, report.slowest.host) == (2, "b")
    assert report.ratio == pytest.approx(2.1 / 1.1)
    assert report.metrics()["straggler/own_min"] == 1.0 and report.metrics()["straggler/rank"] == 2.0
    warning = report.warning(1.5)
    assert warning is not None and "rank 2 on b works 2.1 s per step, 1.91 times" in warning
    assert report.warning(2.0) is None
    record = json.loads(json.dumps(report.record(40)))
    assert record["step"] == 40 and record["slowest"] == {"rank": 2, "host": "b"}
    assert record["ranks"][0] == {"rank": 0, "host": "a", "min": 1.0, "median": 1.0, "max": 9.0}

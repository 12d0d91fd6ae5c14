"""The split of a gain into what is selected and what is taught."""

from __future__ import annotations

import pytest

from tulu_hpc.telemetry.results import Interval, TaskScores, Working
from tulu_hpc.telemetry.working import split_gain, working_section

HABIT = (Working(0.5, 0.4, 0.6), Working(1.0, 0.8, 0.8))  # 80 % right when shown, 40 % when not, in both
SKILL = (Working(0.5, 0.2, 0.4), Working(0.5, 0.4, 0.8))


def _stages(*figures: Working) -> dict[str, list[TaskScores]]:
    return {
        stage: [
            TaskScores(
                name="math_dev",
                task="gsm8k",
                suite="dev",
                items=10,
                draws=2,
                temperature=1.0,
                confidence=0.95,
                sampled=Interval(each.accuracy, 0.0, 1.0),
                greedy=None,
                working=each,
                kinds={},
                answers=[],
                lost_verdicts=0,
            )
        ]
        for stage, each in zip(("SFT", "RLVR"), figures, strict=True)
    }


def test_accuracy_of_each_kind() -> None:
    assert HABIT[0].accuracy_shown == pytest.approx(0.8) and HABIT[0].accuracy_direct == pytest.approx(0.4)
    assert HABIT[1].accuracy_direct is None and Working(0.0, 0.0, 0.5).accuracy_shown is None


def test_pure_change_of_habit_is_all_selected() -> None:
    split = split_gain(*HABIT)
    assert split is not None
    assert (split.gain, split.selected, split.taught) == pytest.approx((0.2, 0.2, 0.0))


def test_pure_skill_is_all_taught() -> None:
    split = split_gain(*SKILL)
    assert split is not None
    assert (split.gain, split.selected, split.taught) == pytest.approx((0.4, 0.0, 0.4))


def test_parts_add_up_to_the_gain() -> None:
    split = split_gain(Working(0.44, 0.38, 0.62), Working(0.97, 0.86, 0.87))
    assert split is not None and split.selected + split.taught == pytest.approx(split.gain) == pytest.approx(0.25)


def test_one_kind_of_answer_only_cannot_be_split() -> None:
    assert split_gain(Working(0.0, 0.0, 0.5), Working(1.0, 0.9, 0.9)) is None


def test_paragraph_follows_the_numbers() -> None:
    assert "that training selects" in working_section(_stages(*HABIT))
    assert "+20.0 points" in working_section(_stages(*HABIT))
    assert "better work, not a change of habit" in working_section(_stages(*SKILL))
    assert "no gain to explain" in working_section(_stages(*reversed(SKILL)))

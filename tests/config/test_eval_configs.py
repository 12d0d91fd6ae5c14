"""configs/eval resolves, and names tasks that exist. The files it points to are the user's."""

from pathlib import Path

import pytest

from tulu_hpc.config.loader import load_config
from tulu_hpc.config.schema import EvalConfig
from tulu_hpc.evaluation.suites import dev_task, unseen_task

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "eval").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_tasks_exist(path: Path) -> None:
    section = load_config(path, [], EvalConfig).eval
    assert section.dev or section.unseen
    for task in section.dev:
        assert dev_task(task.task).name == task.task
    for task in section.unseen:
        assert unseen_task(task.task).name == task.task


def test_there_are_some() -> None:
    assert CONFIGS

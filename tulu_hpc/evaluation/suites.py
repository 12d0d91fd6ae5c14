"""The two suites. Their registries are separate, so that a development run cannot name an unseen task.

What is unseen is the data of a file, so the tasks of the unseen suite are registered by schema as well; they are looked
up by `unseen_task` only, which only the unseen run calls.
"""

from __future__ import annotations

from tulu_hpc.evaluation.tasks import GSM8K, GSM8K_TULU, IFEVAL, IFEVAL_STRICT, EvalError, EvalTask

_DEV: dict[str, EvalTask] = {task.name: task for task in (GSM8K, GSM8K_TULU, IFEVAL, IFEVAL_STRICT)}
_UNSEEN: dict[str, EvalTask] = {task.name: task for task in (GSM8K, IFEVAL, IFEVAL_STRICT)}


def dev_task(name: str) -> EvalTask:
    """A task of the development suite.

    Raises:
        EvalError: there is none of that name.
    """
    return _find(_DEV, "development", name)


def unseen_task(name: str) -> EvalTask:
    """A task of the unseen suite.

    Raises:
        EvalError: there is none of that name.
    """
    return _find(_UNSEEN, "unseen", name)


def _find(registry: dict[str, EvalTask], suite: str, name: str) -> EvalTask:
    if name not in registry:
        raise EvalError(f"no task {name!r} in the {suite} suite; known: {', '.join(sorted(registry))}")
    return registry[name]

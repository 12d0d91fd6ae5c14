"""A second layout over the same processes, for a model beside the one that `initialize` was called for.

megatron takes a ProcessGroupCollection, but here and there still asks its module `parallel_state` for groups, ranks and
sizes. So the second layout has a set of these globals of its own, and whatever touches its model (building it, forward
and backward passes, updates, checkpoints) runs inside `active()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state as mpu

from tulu_hpc.parallel.layout import Groups, Layout, build_groups

_NAMES = [name for name in vars(mpu) if name.startswith("_") and name.isupper()]


@dataclass(frozen=True)
class SecondLayout:
    """Groups of a further layout.

    Attributes:
        groups: of this process; the ones of the first layout if the two are equal.
        state: megatron's globals for it, None if the layouts are equal.
    """

    groups: Groups
    state: dict[str, Any] | None

    @contextmanager
    def active(self) -> Iterator[None]:
        """megatron's globals are those of this layout inside, and as before afterwards."""
        if self.state is None:
            yield
            return
        before = _globals()
        _set(self.state)
        try:
            yield
        finally:
            self.state.update(_globals())  # buffers that megatron has made in the meantime
            _set(before)


def second_layout(layout: Layout, first: Groups, *, timeout_minutes: float = 30.0) -> SecondLayout:
    """Process groups of `layout` beside those of `first`, over all processes of the job. Collective.

    They end with the next `layout.initialize` or `layout.destroy`. Generators stay as they are.

    Raises:
        LayoutError: the number of processes does not fit the layout.
    """
    if layout == first.layout:
        return SecondLayout(first, None)
    layout.data(first.world_size)
    before = _globals()
    _set({name: {} if isinstance(value, dict) else None for name, value in before.items()})
    try:
        groups = build_groups(layout, timeout_minutes)
        return SecondLayout(groups, _globals())
    finally:
        _set(before)


def _globals() -> dict[str, Any]:
    return {name: getattr(mpu, name) for name in _NAMES}


def _set(values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(mpu, name, value)

"""The peak of what torch's CPU allocator has handed out, also inside custom ops and their C++."""

import gc
from collections.abc import Callable
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak_bytes(work: Callable[[], Result]) -> tuple[int, Result]:
    """Largest sum of bytes allocated and not released during `work`, and its result."""
    gc.collect()  # what an earlier test left must not be released, and so subtracted, while this one is measured
    gc.freeze()  # Python looks for cycles the less often the more objects it tracks: here as in a new process
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = work()
    finally:
        gc.unfreeze()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler reported no allocations"
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, result

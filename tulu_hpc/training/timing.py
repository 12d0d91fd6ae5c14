"""megatron's timers, told to our clock: its schedules say when a micro-batch is computed forward and backward."""

from __future__ import annotations

from typing import Any

from tulu_hpc.telemetry.step_clock import Phase, StepClock

_PHASES: dict[str, Phase] = {"forward-compute": "forward", "backward-compute": "backward"}


class MegatronTimers:
    """For `config.timers`: forward and backward go to the clock, megatron's other timers nowhere, and none waits at a
    barrier (megatron's own would, at every step)."""

    def __init__(self, clock: StepClock) -> None:
        self._timers = {name: _Timer(clock, phase) for name, phase in _PHASES.items()}
        self._silent = _Timer(clock, None)

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        return self._timers.get(name, self._silent)


class _Timer:
    def __init__(self, clock: StepClock, phase: Phase | None) -> None:
        self._clock, self._phase = clock, phase

    def start(self, barrier: bool = False) -> None:
        if self._phase is not None:
            self._clock.enter(self._phase)

    def stop(self, barrier: bool = False) -> None:
        if self._phase is not None:
            self._clock.leave()


def watch_schedule(config: Any, clock: StepClock) -> None:
    """Make the schedules that run with this megatron model config report to `clock`."""
    config.timers = MegatronTimers(clock)

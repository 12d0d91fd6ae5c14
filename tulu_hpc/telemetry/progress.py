"""One line that says how far a run is: step, tokens per second, the figures that matter, time left."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

_WINDOW = 50  # updates over which speed is measured: the start-up of a run should not weigh on its rate for long


class Progress:
    """Progress of `total` steps. On a terminal the line is rewritten in place, elsewhere a new line is printed.

    Lines are limited to one in `interval` seconds (terminal 0.2, elsewhere 5 by default); the first and the last step
    are always shown.

    Args:
        start: steps done before (a resumed run).
        enabled: False on every rank but the main one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        title: str,
        total: int,
        start: int = 0,
        enabled: bool = True,
        *,
        stream: TextIO | None = None,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total, self._enabled, self._clock = title, total, enabled, clock
        self._stream = sys.stdout if stream is None else stream
        self._tty = self._stream.isatty()
        self._interval = interval if interval is not None else (0.2 if self._tty else 5.0)
        self._marks: deque[tuple[float, int, float]] = deque([(clock(), start, 0.0)], maxlen=_WINDOW)
        self._tokens = 0.0
        self._shown_at = -math.inf
        self._shown: str | None = None
        self._pending: str | None = None

    def update(self, step: int, tokens: float = 0, **values: Any) -> None:
        """Step `step` (from 1) is done; `tokens` of this step on all ranks; `values` are shown by name.

        Numbers are shortened, strings are shown as they are.
        """
        if not self._enabled:
            return
        now = self._clock()
        self._tokens += tokens
        self._marks.append((now, step, self._tokens))
        self._pending = self._line(step, values)
        if step >= self._total or now - self._shown_at >= self._interval:
            self._show(now)

    def close(self) -> None:
        """Show what the rate limit held back and end the line."""
        if not self._enabled:
            return
        if self._pending is not None:
            self._show(self._clock())
        if self._tty and self._shown is not None:
            self._stream.write("\n")
            self._stream.flush()
            self._shown = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, step: int, values: dict[str, Any]) -> str:
        (then, first, tokens_then), (now, last, tokens_now) = self._marks[0], self._marks[-1]
        elapsed, parts = max(now - then, 1e-9), [f"{self._title} {step}/{self._total}"]
        if tokens_now > tokens_then:
            parts.append(f"{_short((tokens_now - tokens_then) / elapsed)} tokens/s")
        parts += [f"{key} {value if isinstance(value, str) else _short(float(value))}" for key, value in values.items()]
        if last > first and step < self._total:
            parts.append(f"{duration((self._total - step) * elapsed / (last - first))} left")
        return "  ".join(parts)

    def _show(self, now: float) -> None:
        line, self._pending, self._shown_at = self._pending or "", None, now
        if self._tty:
            padding = " " * max(0, len(self._shown or "") - len(line))
            self._stream.write(f"\r{line}{padding}")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._shown = line


def _short(value: float) -> str:
    """Three or four figures, plain where that is readable: 0.0123, 1.234, 12.3, 1234, 25.1k."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.2e}" if size < 1e-3 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

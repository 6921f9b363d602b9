"""A progress bar with the time left, on a terminal only."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts finished work out of `total` (any unit) and draws ``[####    ] 12:34 left  what``."""

    WIDTH = 24

    def __init__(self, total: float, stream=None):
        self.total, self.done, self.stream = total, 0.0, stream or sys.stderr
        self.start = time.monotonic()
        self.live = self.stream.isatty()

    def show(self, what: str) -> None:
        """Draw the bar with `what` beside it."""
        if not self.live:
            return
        part = min(1.0, self.done / self.total) if self.total else 1.0
        bar = "#" * int(part * self.WIDTH)
        line = f"[{bar:<{self.WIDTH}}] {part:4.0%}  {self.time_left()} left  {what}"
        self.stream.write(f"\r\x1b[2K{line[:118]}")
        self.stream.flush()

    def advance(self, amount: float) -> None:
        """Count `amount` as finished."""
        self.done += amount

    def forget(self, amount: float) -> None:
        """Count `amount` as work that will not be done."""
        self.total -= amount

    def seconds_until(self, amount: float) -> float:
        """Seconds from the start until `amount` more will be done, by the rate so far; before that a unit is a second."""
        spent = time.monotonic() - self.start
        return spent + amount * (spent / self.done if self.done else 1.0)

    def time_left(self) -> str:
        """m:ss by the rate so far; --:-- before anything is finished."""
        if not self.done:
            return "--:--"
        left = (time.monotonic() - self.start) * max(0.0, self.total / self.done - 1)
        return f"{int(left) // 60}:{int(left) % 60:02d}"

    def clear(self) -> None:
        """Take the bar off the terminal."""
        if self.live:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()

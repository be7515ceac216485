"""One line of progress: step, loss, speed and time left."""

from __future__ import annotations

import sys
import time

__all__ = ["Progress"]


class Progress:
    """Prints the progress of a run, in place on a terminal and as one line a period elsewhere.

    Args:
        name: The name to print.
        step: The step the run starts at.
        steps: The step it ends at.
    """

    def __init__(self, name: str, step: int, steps: int) -> None:
        self.name, self.first, self.steps = name, step, steps
        self.loss = 0.0
        self._seen = 0
        self._terminal = sys.stderr.isatty()
        self._period = 1.0 if self._terminal else 20.0
        self._began = self._printed = time.monotonic()

    def update(self, step: int, loss: float) -> bool:
        """Note one step.

        Args:
            step: Steps done, counted from the very beginning.
            loss: The loss of this step.

        Returns:
            Whether a line was printed.
        """
        self._seen += 1
        # A running mean that is exact at first and then looks back about 200 steps.
        self.loss += (loss - self.loss) / min(self._seen, 200)
        now = time.monotonic()
        if now - self._printed < self._period and step < self.steps:
            return False
        self._printed = now
        speed = (step - self.first) / max(now - self._began, 1e-9)
        left = int((self.steps - step) / max(speed, 1e-9))
        line = (
            f"{self.name} {step}/{self.steps} {step / self.steps:4.0%}  loss {self.loss:.4f}  "
            f"{speed:.2f} steps/s  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )
        end = "\r" if self._terminal else "\n"
        print(line, end=end, file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        """Leave the last line standing."""
        if self._terminal:
            print(file=sys.stderr)

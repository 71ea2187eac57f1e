"""What a summary needs to know of a finished run."""

from __future__ import annotations

from typing import Protocol


class Outcome(Protocol):
    """One finished run; `study.Run` is one, and any frozen dataclass with these fields."""

    @property
    def arm(self) -> str:
        """Return the arm's name."""
        ...

    @property
    def seed(self) -> int:
        """Return the seed; runs of different arms with the same seed are a pair."""
        ...

    @property
    def error(self) -> float:
        """Return the test error in percent."""
        ...

    @property
    def parameters(self) -> int:
        """Return the number of parameters when the run was over."""
        ...

    @property
    def epochs(self) -> int:
        """Return the number of epochs trained, of both phases."""
        ...

    @property
    def seconds(self) -> float:
        """Return the wall time of training and validation."""
        ...

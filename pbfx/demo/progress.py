"""One bar over every epoch of every run, with the time left."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm

from pbfx.demo.study import EpochRow

# A log file gets a line now and then instead of one ten times a second.
_LOG_INTERVAL = 15.0


class Progress:
    """A bar on stderr; call it with each epoch's row. It stands still where `quiet`."""

    def __init__(self, *, runs: int, epochs: int, quiet: bool = False) -> None:
        self._epochs = epochs
        self._runs = runs
        self._seen: list[tuple[str, int]] = []
        interval = 0.1 if sys.stderr.isatty() else _LOG_INTERVAL
        self._bar = tqdm(
            total=runs * epochs,
            disable=quiet,
            # The mean over everything so far: arms differ in speed, so the last few epochs mislead.
            smoothing=0,
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
            bar_format="{desc}|{bar}| {n_fmt}/{total_fmt} epochs, {remaining} left",
        )

    def __call__(self, row: EpochRow) -> None:
        """Move to `row`'s place; a run that ended early counts as whole once the next starts."""
        if (row.arm, row.seed) not in self._seen:
            self._seen.append((row.arm, row.seed))
        before = (len(self._seen) - 1) * self._epochs
        self._bar.set_description_str(
            f"run {len(self._seen)}/{self._runs} {row.arm:<9} {row.phase:<8} phase, "
            f"{row.dendrites} dendrite{'' if row.dendrites == 1 else 's'} ",
            refresh=False,
        )
        self._bar.update(before + min(row.epoch, self._epochs) - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

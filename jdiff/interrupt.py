"""Ending a run on request: a signal is noted, the step under way is finished and saved, then the run ends."""

import contextlib
import logging
import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


class Left(Exception):
    """Work that a later start does again was left, since the run is to end."""


class Stopped(Exception):
    """The run was asked to stop by a signal, and its state is saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} at step {step}; the same command goes on from there"
        )
        self.exit_code = 128 + signum


class Signals:
    """Notes SIGTERM and the first SIGINT in `caught` (a second SIGINT ends at once); a context manager."""

    caught: int | None = None

    def __enter__(self) -> "Signals":
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def until_caught(self, items: Iterable[T]) -> Iterator[T]:
        """The items as they come; `Left` is raised once a signal is caught."""
        for item in items:
            if self.caught is not None:
                raise Left
            yield item

    def __exit__(self, *_: object) -> None:
        for signum, old in self._old.items():
            signal.signal(signum, old)

    def _note(self, signum: int, _: Any) -> None:
        if self.caught == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = signum
        with contextlib.suppress(RuntimeError):  # the signal may have come in the middle of another line's writing
            log.warning("%s: saving a checkpoint after this step, then ending", signal.Signals(signum).name)

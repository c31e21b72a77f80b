"""Ctrl-C that is never lost; SIGTERM, by which containers and clusters stop a process, is taken for one."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Remembers Ctrl-C while it is entered.

    Python drops a KeyboardInterrupt that happens to be raised inside a weak reference's callback or a finaliser, and
    torch runs many of these. Whoever works for long calls `check` now and then.
    """

    def __init__(self) -> None:
        self.asked = self._held = False

    def __enter__(self) -> Interrupt:
        self._main = threading.current_thread() is threading.main_thread()  # only there can handlers be set
        if self._main:
            self._before = [signal.signal(number, self._handle) for number in SIGNALS]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            for number, handler in zip(SIGNALS, self._before, strict=True):
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or not self._held:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a first Ctrl-C wait for `check`, where half of the work must not be left behind."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was asked for, if it got lost."""
        if self.asked:
            raise KeyboardInterrupt


def let_go(error: BaseException | None) -> None:
    """Let go of what was at work where an exception came, before anything is written.

    A query that a signal cut off keeps sqlite's database locked, for this process too, as long as a frame of the
    traceback holds its cursor.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__

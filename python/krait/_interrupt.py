"""Ctrl-C, errors in callbacks and the end of the process, while the library works and calls
back."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interruptible"]


_END_SECONDS = 60.0  # for which the end of the process waits for a callback that does not return


class _Threads:
    """Work in threads beside the main one. A thread that calls back when Python is gone takes the
    process down with SIGABRT, so that work comes to its own end before."""

    _changed: threading.Condition
    _working: set[Interruptible]

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """None are there: so it begins, and in a forked process."""
        self._changed = threading.Condition()
        self._working = set()

    def add(self, work: Interruptible) -> None:
        with self._changed:
            self._working.add(work)

    def remove(self, work: Interruptible) -> None:
        with self._changed:
            self._working.discard(work)
            self._changed.notify_all()

    def end(self) -> None:
        """Lets all of it end, and waits until it has."""
        with self._changed:
            for work in self._working:
                work._keep(SystemExit())
            self._changed.wait_for(lambda: not self._working, _END_SECONDS)


_threads = _Threads()
atexit.register(_threads.end)
os.register_at_fork(after_in_child=_threads.forget)


class Interruptible:
    """Lets a call of the library that takes callbacks come to its own end.

    While it is entered, an exception in a callback and what a handler of SIGINT raises are kept
    instead of raised: :meth:`stop` says so to the library, which ends as it ends on Ctrl-C (a
    training run writes a checkpoint). Leaving the context raises what was kept. Signals are a
    matter of the main thread; in others errors of callbacks are kept, and the end of the process is
    (SystemExit), which waits for them.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._previous: Any = None

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):
                self._previous = previous
                signal.signal(signal.SIGINT, self._on_signal)
        else:
            _threads.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
        _threads.remove(self)
        kept, self._error = self._error, None
        if kept is not None:
            raise kept

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        try:
            self._previous(number, frame)
        except BaseException as error:
            self._keep(error)

    def _keep(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error

    def stop(self) -> bool:
        """Whether something was kept. The library asks this now and then."""
        return self._error is not None

    def guard(self, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """``function`` as a callback of the library, without results; None stays None."""
        if function is None:
            return None

        def call(*arguments: Any) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self._keep(error)

        return call

    def guard_question(self, function: Callable[[], Any] | None) -> Callable[[], bool] | None:
        """The same for a function that says whether to stop."""
        if function is None:
            return None

        def ask() -> bool:
            if self._error is None:
                try:
                    return bool(function())
                except BaseException as error:
                    self._keep(error)
            return True

        return ask

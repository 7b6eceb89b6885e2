"""SIGTERM and SIGINT during a training: the current step is finished, and the run can be resumed from there."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Interruption", "InterruptionError", "sigterm_as_exception"]

# Launchers that run the script in a child process. Some of them end at SIGTERM without passing it on.
_LAUNCHED = bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys())
# torchrun passes on a Ctrl-C that the terminal has already sent to this process.
_REPEATS = "TORCHELASTIC_RUN_ID" in os.environ
_SAME_SIGNAL_SECONDS = 2.0
_PROCESS, _PARENT = os.getpid(), os.getppid()


class InterruptionError(Exception):
    """A training was stopped by a signal.

    Args:
        signum: Number of the signal.
        step: Number of finished optimizer steps.
        checkpoint: Checkpoint from which the run can resume, or None.

    Attributes:
        exit_code (int): Exit code of the process, 128 + signal as in shells: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        self.exit_code = 128 + signum
        stopped = f"Stopped by {signal.Signals(signum).name} after step {step}"
        super().__init__(
            f"{stopped}; use the same arguments and --resume_from_checkpoint to resume from {checkpoint}."
            if checkpoint
            else f"{stopped}; there is no checkpoint to resume from. Use --checkpointing_steps to write them."
        )


class Interruption:
    """Handlers of SIGTERM and SIGINT for the duration of a ``with`` block, which only record the signal.

    The second signal ends the process immediately. The end of the launcher counts as SIGTERM. Outside the main thread,
    where Python allows no handlers, only the launcher is checked.
    """

    def __init__(self) -> None:
        self._received = 0
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()
        if self._received and kind is None:  # the signal came too late for the block to check
            signal.raise_signal(self._received)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process that reads images ends with this one
        now = time.monotonic()
        if not self._received:
            self._received, self._at = signum, now
            if not _REPEATS:  # otherwise the next signal is checked
                self._end_at_next()
        elif now - self._at > _SAME_SIGNAL_SECONDS:
            self._end_at_next()
            signal.raise_signal(signum)

    def _end_at_next(self) -> None:
        # The system's default handler, because Python's would wait for C code to return.
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    @property
    def signum(self) -> int:
        """The received signal, or 0."""
        is_orphan = _LAUNCHED and os.getpid() == _PROCESS and os.getppid() != _PARENT
        return self._received or (signal.SIGTERM if is_orphan else 0)


@contextmanager
def sigterm_as_exception() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, like SIGINT, so that unfinished files are deleted."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""SIGTERM and SIGINT during a training: the step ends first, and the run can be taken up again where it stood."""

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

# Launchers that run the script in a process of its own. Some of them die of SIGTERM and do not pass it on.
_LAUNCHED = bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys())
# torchrun passes on a Ctrl-C that the terminal has sent to this process already.
_REPEATS = "TORCHELASTIC_RUN_ID" in os.environ
_SAME_SIGNAL_SECONDS = 2.0
_PROCESS, _PARENT = os.getpid(), os.getppid()


class InterruptionError(Exception):
    """A training that was told to stop, and did.

    Args:
        signum: The signal that told it.
        step: The optimizer steps that are done.
        checkpoint: Where the run can be taken up; None if there are no checkpoints.

    Attributes:
        exit_code (int): Exit code of the process, 128 + signal, as of shells: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        self.exit_code = 128 + signum
        stopped = f"Stopped by {signal.Signals(signum).name} after step {step}"
        super().__init__(
            f"{stopped}; go on with the same arguments and --resume_from_checkpoint, from {checkpoint}."
            if checkpoint
            else f"{stopped}; no checkpoint is there to go on from. --checkpointing_steps writes them."
        )


class Interruption:
    """Handlers of SIGTERM and SIGINT, from ``with`` to the end of the block, which only take note.

    The second signal ends the process at once. A launcher that died counts as SIGTERM. Outside the main thread, where
    Python allows no handlers, only the launcher is looked at.
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
        if self._received and kind is None:  # it came too late for the block to look at
            signal.raise_signal(self._received)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # one that reads images: it ends with this one
        now = time.monotonic()
        if not self._received:
            self._received, self._at = signum, now
            if not _REPEATS:  # else the next one is looked at
                self._end_at_next()
        elif now - self._at > _SAME_SIGNAL_SECONDS:
            self._end_at_next()
            signal.raise_signal(signum)

    def _end_at_next(self) -> None:
        # The system's own handling: Python's would wait for a call into C to return.
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    @property
    def signum(self) -> int:
        """The signal that came, 0 if none did."""
        is_orphan = _LAUNCHED and os.getpid() == _PROCESS and os.getppid() != _PARENT
        return self._received or (signal.SIGTERM if is_orphan else 0)


@contextmanager
def sigterm_as_exception() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as SIGINT does, so that files which are half written are cleared up."""

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

"""Share signals and losses that are not finite between all processes at the end of each step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Seen", "StepWatch"]


class Seen(NamedTuple):
    """Events in any of the processes."""

    signum: int  # of the signal that one of them received, 0 if none did
    is_finite: bool  # whether their losses were


class StepWatch:
    """Shares events between processes at the end of each step, without waiting.

    A GPU copies the loss while it continues to compute, and the processes exchange two numbers during the next step.
    All processes therefore know an event one step later, or, for a loss on a GPU, when its copy has arrived.

    Args:
        processes: Number of processes; if it is 1, nothing is exchanged. All of them must construct this.
        device: Device of the loss.
        timeout: Seconds to wait for another process before this one raises RuntimeError.
    """

    def __init__(self, processes: int, device: torch.device, timeout: float = 1800) -> None:
        # A separate group on CPUs, because the results of NCCL's collectives are on the GPU.
        wait = timedelta(seconds=timeout)
        self._group: Any = dist.new_group(backend="gloo", timeout=wait) if processes > 1 else None
        self._exchanged: tuple[dist.Work, Tensor] | None = None
        self._host = torch.zeros((), pin_memory=True) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def look(self, signum: int, loss: Tensor) -> Seen:
        """Share events. Every process must call this equally often.

        Args:
            signum: Signal that this process has received, 0 for none.
            loss: 0-dimensional; once it is not finite, it must stay so until the next call.
        """
        is_finite = self._is_finite(loss)
        if self._group is None:
            return Seen(signum, is_finite)
        seen = self.last()
        told = torch.tensor([signum, not is_finite], dtype=torch.int64)
        work = dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "an asynchronous collective returns what to wait for"
        self._exchanged = work, told
        return seen

    def last(self) -> Seen:
        """The events exchanged in the last call of :meth:`look`, which it has not returned yet."""
        if self._exchanged is None:
            return Seen(0, True)
        work, told = self._exchanged
        self._exchanged = None
        work.wait()
        signum, is_bad = told.tolist()
        return Seen(signum, not is_bad)

    def _is_finite(self, loss: Tensor) -> bool:
        if loss.device.type == "cpu":
            return bool(loss.isfinite())
        if self._host is None:  # another accelerator: checked only for a checkpoint or at the end of an epoch
            return True
        if self._copied is not None and not self._copied.query():
            return True
        is_finite = bool(self._host.isfinite())
        self._host.copy_(loss, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return is_finite

"""The passes of a training step as one CUDA graph.

A step of a deep network of thin layers is thousands of small kernels: starting them one by one takes several times
longer than what they compute. A graph starts them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["GraphedPasses"]

# Batches that are computed as ever before one is recorded: libraries set themselves up in the first ones.
WARMUP = 3


class GraphedPasses:
    """Forward and backward pass of batches of one shape, recorded once and replayed.

    What a recording reads and writes stays where it is. Parameters and buffers that change in place are seen; for
    others :meth:`queue` is told what gets gradients. The first batches after a change, and those of another shape, are
    computed as ever. Gradients are those of the batch alone: they do not accumulate.

    Args:
        passes: Leaves the gradients of a batch, from none on, and returns its loss, detached, 0-dimensional. It must
            not wait for the device.

    Raises:
        ValueError: It does wait, or something else cannot be recorded; of the call that records.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, passes: Callable[..., Tensor]) -> None:
        self.passes = passes
        self.stream = torch.cuda.Stream()  # the default one cannot be recorded
        self.followed: list[Tensor] = []
        self.forget()

    def forget(self) -> None:
        """Free the recording."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.loss: Tensor | None = None
        self.gradients: list[tuple[Tensor, Tensor]] = []
        self.shapes: list[torch.Size] = []
        self.warmed = 0

    @contextmanager
    def queue(self, followed: Iterable[Tensor]) -> Iterator[None]:
        """Where all calls, and whatever goes with them, must be: what was queued before it is done first.

        Args:
            followed: All that gets gradients. If these are not the tensors of the last time, a batch is recorded anew.
        """
        followed = list(followed)
        if len(followed) != len(self.followed) or any(a is not b for a, b in zip(followed, self.followed, strict=True)):
            self.forget()
            self.followed = followed
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss of a batch, 0-dimensional; the next call may overwrite it and the gradients."""
        shapes = [each.shape for each in inputs]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes or self.warmed < WARMUP:
            self.warmed += shapes == self.shapes
            return self.passes(*inputs)
        if self.graph is None:
            self.graph = self._record(inputs)
        for place, each in zip(self.inputs, inputs, strict=True):
            place.copy_(each)
        self.graph.replay()
        for tensor, gradient in self.gradients:
            tensor.grad = gradient
        assert self.loss is not None, "there is one with each recording"
        return self.loss

    def _record(self, inputs: Iterable[Tensor]) -> torch.cuda.CUDAGraph:
        self.inputs = [each.clone() for each in inputs]
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins memory, may do what a recording could not hold.
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.loss = self.passes(*self.inputs)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"The passes cannot be recorded as a CUDA graph ({reason}); train without.") from error
        self.gradients = [(tensor, tensor.grad) for tensor in self.followed if tensor.grad is not None]
        return graph

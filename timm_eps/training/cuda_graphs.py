"""The forward and backward pass of a training step as one CUDA graph.

A step of a deep network with thin layers consists of thousands of small kernels. Launching them one by one takes
several times longer than their computation. A graph launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["GraphedPasses"]

# Number of batches that run normally before one is captured, because libraries initialise in the first ones.
WARMUP = 3


class GraphedPasses:
    """Forward and backward pass of batches of one shape, captured once and replayed.

    A graph reads and writes fixed memory. It sees parameters and buffers that change in place. For replaced ones,
    :meth:`queue` gets all tensors with gradients. The first batches after a change, and batches of another shape, run
    normally. The gradients are those of one batch: they do not accumulate.

    Args:
        passes: Function that sets the gradients of a batch, starting from None, and returns its loss, detached,
            0-dimensional. It must not wait for the device.

    Raises:
        ValueError: ``passes`` waits for the device, or contains something that cannot be captured. Raised on the first
            captured call.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, passes: Callable[..., Tensor]) -> None:
        self.passes = passes
        self.stream = torch.cuda.Stream()  # the default stream cannot be captured
        self.followed: list[Tensor] = []
        self.forget()

    def forget(self) -> None:
        """Free the graph."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.loss: Tensor | None = None
        self.gradients: list[tuple[Tensor, Tensor]] = []
        self.shapes: list[torch.Size] = []
        self.warmed = 0

    @contextmanager
    def queue(self, followed: Iterable[Tensor]) -> Iterator[None]:
        """Context for all calls and the related work. Work that was queued before it is finished first.

        Args:
            followed: All tensors with gradients. If they differ from the last time, a batch is captured again.
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
        """The loss of a batch, 0-dimensional. The next call may overwrite it and the gradients."""
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
        assert self.loss is not None, "each capture sets it"
        return self.loss

    def _record(self, inputs: Iterable[Tensor]) -> torch.cuda.CUDAGraph:
        self.inputs = [each.clone() for each in inputs]
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins memory, may make calls that cannot be captured.
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.loss = self.passes(*self.inputs)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"The step cannot be captured as a CUDA graph ({reason}); train without.") from error
        self.gradients = [(tensor, tensor.grad) for tensor in self.followed if tensor.grad is not None]
        return graph

"""The forward and backward pass of a training step as one CUDA graph.

A step of a deep network with thin layers consists of thousands of small kernels. Launching them one by one takes
several times longer than their computation. A graph launches all of them at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..gate import EpsilonGate

__all__ = ["GraphedPasses"]

# Number of batches that run normally before one is captured, because libraries initialise in the first ones.
WARMUP = 3


class GraphedPasses:
    """Forward and backward pass of batches of one shape, captured once and replayed.

    A graph reads and writes fixed memory. It sees parameters and buffers that change in place. :meth:`queue` gets the
    model, whose parameters may have been replaced and whose gates may have changed. The first batches after a change,
    and batches of another shape, run normally. The gradients are those of one batch: they do not accumulate.

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
        self.active: list[bool] = []
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
    def queue(self, model: nn.Module) -> Iterator[None]:
        """Context for all calls and the related work. Work that was queued before it is finished first.

        Args:
            model: Model that is trained. If its parameters or its gates differ from the last time, a batch is captured
                again.
        """
        found = [module for module in model.modules() if isinstance(module, EpsilonGate)]
        followed = [*model.parameters(), *(gate.gain for gate in found if gate.gain is not None)]
        active = [gate.is_active() for gate in found]
        is_same = len(followed) == len(self.followed) and all(map(operator.is_, followed, self.followed))
        if not is_same or active != self.active:
            self.forget()
            self.followed, self.active = followed, active
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

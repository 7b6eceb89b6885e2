"""Which batches are recorded, and which results are returned. The graph is a fake; test_cuda.py has a real one."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from timm_eps.training import cuda_graphs
from timm_eps.training.cuda_graphs import WARMUP, GraphedPasses


class Played:
    """A fake graph: it computes into the tensors of the recording."""

    recorded: list[Played] = []  # noqa: RUF012
    graphs: GraphedPasses

    def __init__(self) -> None:
        self.recorded.append(self)
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for tensor, _ in self.graphs.gradients:
            tensor.grad = None
        self.graphs.loss.copy_(self.graphs.passes(*self.graphs.inputs))
        for tensor, gradient in self.graphs.gradients:
            gradient.copy_(tensor.grad)
            tensor.grad = None


@pytest.fixture
def played(monkeypatch):
    """The recordings so far."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(Played, "recorded", [])
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": nullcontext, "CUDAGraph": Played,
        "graph": lambda *args, **kwargs: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(cuda_graphs.torch.cuda, name, value)
    return Played.recorded


def make(net: nn.Module) -> GraphedPasses:
    def passes(batch: torch.Tensor) -> torch.Tensor:
        loss = net(batch).square().mean()
        loss.backward()
        return loss.detach()

    Played.graphs = GraphedPasses(passes)
    return Played.graphs


def test_steps_are_those_without_a_graph(played):
    """Over two epochs with a smaller last batch. A layer is removed between the epochs."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    plain = copy.deepcopy(net)
    graphs = make(net)
    for _ in range(2):
        optimizers = [torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (net, plain)]
        with graphs.queue(net):
            for size in (*[8] * (WARMUP + 3), 3):
                batch = torch.randn(size, 4)
                loss = graphs(batch)
                expected = plain(batch).square().mean()
                expected.backward()
                torch.testing.assert_close(loss, expected.detach())
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
        for one in (net, plain):
            del one[1:]
    assert [graph.replays for graph in played] == [3, 3]


def test_what_stays_is_not_recorded_again(played):
    net = nn.Linear(4, 4)
    graphs = make(net)
    for _ in range(3):
        with graphs.queue(net):
            for _ in range(WARMUP):
                graphs(torch.randn(2, 4))
                net.zero_grad()
    assert [graph.replays for graph in played] == [2 * WARMUP]


def test_parameters_without_gradients_stay_without(played):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[0].requires_grad_(False)
    graphs = make(net)
    with graphs.queue(net):
        for _ in range(WARMUP + 1):
            graphs(torch.randn(2, 4))
    assert net[0].weight.grad is None
    assert net[1].weight.grad is not None


def test_what_cannot_be_recorded_says_so(played, monkeypatch):
    def wait(batch: torch.Tensor) -> torch.Tensor:
        if played:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return batch.sum()

    graphs = GraphedPasses(wait)
    with graphs.queue(nn.Identity()):
        for _ in range(WARMUP):
            graphs(torch.ones(1))
        with pytest.raises(ValueError, match=r"\(operation not permitted when stream is capturing\); train without"):
            graphs(torch.ones(1))

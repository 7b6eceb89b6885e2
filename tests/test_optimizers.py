"""Parameters of removed blocks leave every kind of optimizer, and training continues as with a new optimizer."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import SLOTS, tiny_net
from timm.optim import create_optimizer_v2
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F

import timm_eps
from timm_eps import EpsilonPruner
from timm_eps.surgery.branches import gates
from timm_eps.surgery.optimizers import innermost

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(4)


def by_timm(name):
    return lambda model: create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.05, momentum=0.9)


def muon_and_adamw(model):
    layers = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return [torch.optim.Muon(layers, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)]


def by_parts(model):
    """A tuple of optimizers. The second is wrapped and holds the first blocks of two stages."""
    first = [p for path in (SLOTS[1], SLOTS[4]) for p in model.get_submodule(path.rpartition(".")[0]).parameters()]
    others = [parameter for parameter in model.parameters() if all(parameter is not one for one in first)]
    return torch.optim.SGD(others, lr=0.1, momentum=0.9), timm.optim.Lookahead(torch.optim.AdamW(first, lr=1e-3), k=2)


def accelerated(model):
    return Accelerator(cpu=True).prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))


def accelerated_lookahead(model):
    return Accelerator(cpu=True).prepare_optimizer(by_timm("lookahead_adamw")(model))


MAKERS = {
    **{name: by_timm(name) for name in ("lookahead_adamw", "lookahead_momentum", "lion", "muon", "adafactor")},
    "muon and adamw": muon_and_adamw,
    "tuple": by_parts,
    "accelerate": accelerated,
    "accelerate and lookahead": accelerated_lookahead,
}


def every(optimizers):
    return list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]


def train(model, optimizers, steps=3):
    model.train()
    for _ in range(steps):
        loss = F.cross_entropy(model(IMAGES), LABELS)
        for optimizer in every(optimizers):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in every(optimizers):
            optimizer.step()


def remove_two(model, optimizers):
    pruner = EpsilonPruner(model, optimizers, epsilon=1.0, patience=1)
    for slot, gate in gates(model).items():
        gate.response.fill_(0.1 if slot in (SLOTS[1], SLOTS[4]) else 10.0)
    assert pruner.step() == [SLOTS[1], SLOTS[4]]


@pytest.mark.parametrize("name", MAKERS)
def test_training_goes_on_as_with_an_optimizer_made_anew(name):
    model = tiny_net()
    optimizers = MAKERS[name](model)
    train(model, optimizers)
    remove_two(model, optimizers)
    held = [p for one in innermost(optimizers) for group in one.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())
    assert all(one.state.keys() <= {*held, "step"} for one in innermost(optimizers))
    other = tiny_net(removed=model.removed)
    other.load_state_dict(model.state_dict())
    anew = MAKERS[name](other) if name != "tuple" else None
    if anew is None:  # the second optimizer of the tuple would be empty
        train(model, optimizers)
        return
    for old, new in zip(every(optimizers), every(anew), strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    for one, several in ((model, optimizers), (other, anew)):
        torch.manual_seed(5)
        train(one, several)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_what_the_user_removed_leaves_the_optimizer_at_the_next_step():
    model = tiny_net()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = EpsilonPruner(model, optimizer, epsilon=1.0)
    gates(model)[SLOTS[3]].closed = True
    timm_eps.remove_closed(model)
    pruner.step()
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())


class Unknown(torch.optim.Optimizer):
    """A wrapper that copies the groups."""

    def __init__(self, inner):
        self.inner = [inner]
        super().__init__(inner.param_groups[0]["params"], {})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS stores parameters, or an optimizer, in its attribute '_params'"),
        (lambda p: Unknown(torch.optim.SGD(p)), "Unknown stores parameters, or an optimizer, in its attribute 'inner'"),
        (lambda p: [torch.optim.SGD(p), Unknown(torch.optim.SGD(p))], "Unknown stores parameters"),
        (lambda p: {"sgd": torch.optim.SGD(p)}, "or a list of them, got dict"),
        (lambda p: [p], "or a list of them, got list|got Parameter"),
    ],
)
def test_optimizers_that_cannot_be_followed_are_refused_at_once(make, reason):
    model = tiny_net()
    with pytest.raises(ValueError, match=reason):
        EpsilonPruner(model, make(list(model.parameters())), epsilon=1.0)
    with pytest.raises(ValueError, match=reason):
        EpsilonPruner(model, epsilon=1.0).optimizer = make(list(model.parameters()))


def test_zero_redundancy_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_net()
        sharded = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer stores parameters"):
            EpsilonPruner(model, sharded, epsilon=1.0)
    finally:
        dist.destroy_process_group()


def small_vit():
    return timm.create_model("eps_test_vit", num_classes=4, img_size=32)


def small_resnet():
    return timm.create_model("eps_test_resnet", num_classes=4)


@pytest.mark.parametrize("make", [small_vit, small_resnet])
@pytest.mark.parametrize("name", ["adamw", "lookahead_sgd"])
def test_timms_groups_do_not_decay_what_ends_a_branch(make, name, caplog):
    model = make()
    EpsilonPruner(model, by_timm(name)(model), keep=0.5)
    (message,) = caplog.messages
    assert "does not decay" in message
    assert "timm_eps.param_groups" in message


@pytest.mark.parametrize("make", [small_vit, tiny_net])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model: [torch.optim.AdamW(model.parameters(), weight_decay=0.0)],
        lambda model: torch.optim.Rprop(model.parameters()),
        lambda model: create_optimizer_v2(model, "lookahead_adamw", lr=0.1, weight_decay=0.0),
    ],
)
def test_an_optimizer_without_decay(make, optimizer, caplog):
    model = make()
    EpsilonPruner(model, optimizer(model), keep=0.5)
    (message,) = caplog.messages
    assert "weight_decay is 0" in message
    assert "timm_eps.param_groups" in message


def test_groups_under_which_branches_empty(caplog):
    caplog.set_level(logging.WARNING)
    for make in (small_vit, small_resnet, tiny_net):
        model = make()
        EpsilonPruner(model, torch.optim.AdamW(timm_eps.param_groups(model, 0.05)), keep=0.5)
    model = tiny_net()  # its branches end in convolutions without a bias
    EpsilonPruner(model, by_timm("adamw")(model), keep=0.5)
    assert caplog.messages == []

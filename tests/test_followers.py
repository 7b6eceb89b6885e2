"""An average of the weights follows the structure of the model, or the pruner warns."""

from __future__ import annotations

import copy
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import SLOTS, tiny_net
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import timm_eps
from timm_eps import EpsilonPruner, EpsResNetForImageClassification
from timm_eps.surgery.branches import gates
from timm_eps.surgery.followers import follow
from timm_eps.surgery.removal import closed_slots, removed_slots

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class TimmEma:
    """Average by timm's class. The follower is its wrapper."""

    def __init__(self, model, make=ModelEmaV3):
        self.average = self.follower = make(model, decay=0.5)

    def update(self, model):
        self.average.update(model)

    @property
    def module(self):
        return self.average.module


class TorchAverage(TimmEma):
    """Average by torch's class. The follower is the copy inside."""

    def __init__(self, model):
        self.average = AveragedModel(model, use_buffers=True)
        self.follower = self.average.module

    def update(self, model):
        self.average.update_parameters(model)


class Lightning(TorchAverage):
    """Lightning's WeightAveraging averages the module that holds the network."""

    def __init__(self, model):
        holder = nn.Module()
        holder.net = model
        self.average = AveragedModel(holder, use_buffers=True)
        self.holder, self.follower = holder, self.average.module.net

    def update(self, model):
        self.average.update_parameters(self.holder)

    @property
    def module(self):
        return self.follower


AVERAGES = {
    "ModelEmaV3": TimmEma,
    "ModelEmaV2": lambda model: TimmEma(model, ModelEmaV2),
    "AveragedModel": TorchAverage,
    "Lightning": Lightning,
}


def wrapped():
    return EpsResNetForImageClassification.from_timm(tiny_net(), side_loss_weight=0.1)


MODELS = {"timm": tiny_net, "transformers": wrapped}


def change(model):
    """Change the weights as a training step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def end_epoch(pruner, low, average=None):
    change(pruner.model)
    if average is not None:
        average.update(pruner.model)
    for slot, gate in gates(pruner.model).items():
        gate.response.fill_(0.1 if slot in low else 10.0)
    return pruner.step()


def outputs(model):
    output = model.eval()(IMAGES)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_same_structure(copied, model):
    assert removed_slots(copied) == removed_slots(model)
    assert closed_slots(copied) == closed_slots(model)
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in model.named_parameters()]
    if hasattr(model, "config"):
        assert copied.config.model_args == model.config.model_args
    copied.load_state_dict(model.state_dict())
    assert torch.equal(outputs(copied), outputs(model))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_follows(name, kind, caplog):
    """The average starts before any branch is closed; blocks are closed, opened again, and removed."""
    model = MODELS[kind]()
    average = AVERAGES[name](model)
    pruner = EpsilonPruner(model, epsilon=1.0, patience=2, followers=[average.follower])
    for low in (SLOTS[1:4], SLOTS[2:5], SLOTS[2:5]):
        end_epoch(pruner, low, average)
        assert removed_slots(average.module) == removed_slots(model)
        assert closed_slots(average.module) == closed_slots(model)
    assert removed_slots(model) == SLOTS[2:5]
    change(model)
    average.update(model)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in average.module.state_dict().items()} == shapes
    assert_same_structure(average.module, model)
    assert caplog.messages == []


@pytest.mark.parametrize("architecture", ["eps_resnet20", "eps_test_vit", "eps_test_resnet"])
def test_the_average_is_that_of_what_is_left(architecture):
    """The average equals the average of an unpruned network in all remaining weights."""
    model = timm.create_model(architecture, num_classes=3)
    whole = copy.deepcopy(model)
    averages = [ModelEmaV3(one, decay=0.5) for one in (model, whole)]
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1, followers=[averages[0]])
    low = list(gates(model))[1:3]
    for slots in ([], low[:1], low):
        for one, average in zip((model, whole), averages, strict=True):
            change(one)
            average.update(one)
        for slot, gate in gates(model).items():
            gate.response.fill_(0.1 if slot in slots else 10.0)
        pruner.step()
    assert removed_slots(averages[0].module) == low
    expected = averages[1].module.state_dict()
    found = averages[0].module.state_dict()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    assert len(found) < len(expected)


@pytest.mark.parametrize("name", AVERAGES)
def test_without_live_removal(name):
    model = tiny_net()
    average = AVERAGES[name](model)
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1, live_removal=False, followers=[average.follower])
    for _ in range(2):
        end_epoch(pruner, SLOTS[1:4], average)
    assert removed_slots(average.module) == []
    assert closed_slots(average.module) == SLOTS[1:4]
    timm_eps.remove_closed(model)
    end_epoch(pruner, [])
    assert_same_structure(average.module, model)


def test_appended_later_and_behind_by_several():
    model = tiny_net()
    average = TimmEma(model)
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    end_epoch(pruner, SLOTS[:2])
    end_epoch(pruner, SLOTS[4:5])
    pruner.followers.append(average.follower)
    end_epoch(pruner, [])
    assert_same_structure(average.module, model)


def test_begun_before_a_stock_model_had_gates():
    model = timm.create_model("test_resnet", num_classes=3)
    average = TimmEma(model)
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1, followers=[average.follower])
    slots = list(gates(model))
    assert list(gates(average.module)) == slots
    end_epoch(pruner, slots[1:2], average)
    assert removed_slots(average.module) == slots[1:2]


@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_pruner_brings_its_followers_up(kind):
    old = EpsilonPruner(MODELS[kind](), epsilon=1.0, patience=2)
    for low in (SLOTS[1:3], SLOTS[1:4]):
        end_epoch(old, low)
    model = MODELS[kind]()
    average = TimmEma(model)
    pruner = EpsilonPruner(model, epsilon=1.0, patience=2, followers=[average.follower])
    pruner.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert (removed_slots(average.module), closed_slots(average.module)) == (SLOTS[1:3], SLOTS[3:4])
    assert_same_structure(average.module, model)


def test_statistics_of_an_average_are_taken_with_its_branches_closed():
    """update_bn runs the average in training mode, in which gates judge each batch."""
    model = tiny_net()
    average = AveragedModel(model)
    pruner = EpsilonPruner(model, epsilon=1.0, live_removal=False, followers=[average])
    average.update_parameters(model)
    for slot, gate in gates(model).items():
        gate.response.fill_(0.1 if slot in SLOTS[1:4] else 10.0)
    pruner.step()
    plain = copy.deepcopy(average.module)
    timm_eps.remove_closed(plain)
    for network in (average, plain):
        update_bn([IMAGES, 1e-4 * IMAGES], network)
    assert torch.equal(outputs(average.module), outputs(plain))


@pytest.mark.parametrize("live_removal", [True, False])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", AVERAGES)
def test_who_forgets_an_average_hears_of_it(name, kind, live_removal, caplog):
    model = MODELS[kind]()
    average = AVERAGES[name](model)
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1, live_removal=live_removal)
    end_epoch(pruner, [], average)
    assert caplog.messages == [], "nothing was closed"
    end_epoch(pruner, SLOTS[1:2], average)
    assert ["followers=[ema]" in message for message in caplog.messages] == [True]
    end_epoch(pruner, SLOTS[1:2])
    assert len(caplog.messages) == 1, "once"


def test_other_copies_are_left_in_peace(caplog):
    """No warning for a snapshot, a pickled copy, a copy with its own training, a deleted copy, or a copy for saving."""
    model = tiny_net()
    snapshot = copy.deepcopy(model)
    student = copy.deepcopy(model).train()
    pickled = pickle.loads(pickle.dumps(model))
    dead = AveragedModel(model)
    dead.update_parameters(model)
    del dead
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(IMAGES).sum().backward()
    optimizer.step()
    change(pickled)
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    end_epoch(pruner, SLOTS[1:2])
    end_epoch(pruner, SLOTS[3:4])
    assert caplog.messages == []
    assert removed_slots(snapshot) == removed_slots(student) == removed_slots(pickled) == []


def test_a_copy_notes_its_own_copies(caplog):
    model = copy.deepcopy(tiny_net())
    average = TimmEma(model)
    end_epoch(EpsilonPruner(model, epsilon=1.0, patience=1), SLOTS[1:2], average)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda model: model, "is the model itself"),
        (
            lambda model: timm.create_model("eps_resnet32"),
            r"not a copy of the model: they differ at 'stages\.0\.blocks\.3",
        ),
        (lambda model: SimpleNamespace(shadow=[]), "or hold one as .module.* got SimpleNamespace"),
        (lambda model: nn.Linear(1, 1), "Linear is not a timm model"),
        (lambda model: tiny_net(removed=SLOTS[:1]), r"Branch 'stages\.0\.blocks\.0"),
    ],
)
def test_what_cannot_follow_is_refused(make, reason):
    model = tiny_net()
    with pytest.raises(ValueError, match=reason):
        EpsilonPruner(model, epsilon=1.0, followers=[make(model)])


def test_a_follower_does_not_measure():
    model = tiny_net()
    for gate in gates(model).values():
        gate.measure_importance()
    copied = copy.deepcopy(model)
    follow(model, copied)
    assert all(gate.gain is None for gate in gates(copied).values())
    assert not math.isinf(max(gate.epsilon for gate in gates(copied).values()))

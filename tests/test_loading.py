"""Weights are loaded before the structure: a model with a pruner follows, a model without a pruner raises."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from accelerate import Accelerator
from conftest import SLOTS, mostly_slow, tiny_net
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

import timm_eps
from timm_eps import EpsilonPruner, EpsResNetForImageClassification
from timm_eps.surgery.branches import gates
from timm_eps.surgery.removal import closed_slots, removed_slots

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(4)


def timm_model():
    torch.manual_seed(1)
    return tiny_net()


def transformers_model():
    torch.manual_seed(1)
    return EpsResNetForImageClassification.from_timm(tiny_net(), side_loss_weight=0.1)


MODELS = {"timm": timm_model, "transformers": transformers_model}


class Run:
    """A user's loop with accelerate. The second of two epochs removes one block and closes another one."""

    def __init__(self, make, optimizers=1, average=False):
        self.model = make()
        parameters = timm_eps.param_groups(self.model, 1e-2)
        self.optimizers = [torch.optim.AdamW([group], lr=1e-3) for group in parameters][:optimizers]
        if optimizers == 1:
            self.optimizers = [torch.optim.AdamW(parameters, lr=1e-3)]
        self.average = ModelEmaV3(self.model, decay=0.5)
        self.accelerator = Accelerator(cpu=True)
        self.pruner = EpsilonPruner(self.model, self.optimizers, epsilon=1.0, patience=2, followers=[self.average])
        self.network, *self.optimizers = self.accelerator.prepare(self.model, *self.optimizers)
        schedule = torch.optim.lr_scheduler.StepLR(self.optimizers[0].optimizer, 1, 0.5)
        self.schedule = self.accelerator.prepare(schedule)
        self.accelerator.register_for_checkpointing(self.pruner, self.average)

    def epoch(self, low):
        self.network.train()
        for _ in range(2):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            output = self.network(IMAGES)
            logits = output if isinstance(output, torch.Tensor) else output.logits
            self.accelerator.backward(F.cross_entropy(logits, LABELS))
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update(self.model)
        self.schedule.step()
        for slot, gate in gates(self.model).items():
            gate.response.fill_(0.1 if slot in low else 10.0)
        self.pruner.step()


@pytest.mark.parametrize("optimizers", mostly_slow([1, 2], 1))
@pytest.mark.parametrize("kind", MODELS)
def test_accelerate_resumes_an_own_loop(tmp_path, kind, optimizers):
    whole = Run(MODELS[kind], optimizers)
    whole.epoch(SLOTS[1:2])
    whole.epoch(SLOTS[1:3])
    assert (removed_slots(whole.model), closed_slots(whole.model)) == (SLOTS[1:2], SLOTS[2:3])
    whole.accelerator.save_state(tmp_path)
    resumed = Run(MODELS[kind], optimizers)
    resumed.accelerator.load_state(tmp_path)
    for run in (whole, resumed):
        torch.manual_seed(7)
        run.epoch([])
    assert resumed.pruner.state_dict() == whole.pruner.state_dict()
    for one, other in ((resumed.model, whole.model), (resumed.average, whole.average)):
        found, expected = one.state_dict(), other.state_dict()
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    held = {p for one in resumed.optimizers for group in one.param_groups for p in group["params"]}
    assert held <= set(resumed.model.parameters())


class LightningModule(nn.Module):
    """The methods that Lightning's ``Trainer`` needs, around the network and its pruner."""

    def __init__(self):
        super().__init__()
        self.network = tiny_net()
        self.pruner = EpsilonPruner(self.network, epsilon=1.0, patience=2)

    def configure_optimizers(self):
        self.pruner.optimizer = torch.optim.AdamW(timm_eps.param_groups(self.network, 1e-2), lr=1e-3)
        return self.pruner.optimizer

    def on_save_checkpoint(self, checkpoint):
        checkpoint["pruner"] = self.pruner.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.pruner.load_state_dict(checkpoint["pruner"])


def lightning_epoch(module, optimizer, low):
    module.train()
    optimizer.zero_grad()
    F.cross_entropy(module.network(IMAGES), LABELS).backward()
    optimizer.step()
    for slot, gate in gates(module.network).items():
        gate.response.fill_(0.1 if slot in low else 10.0)
    module.pruner.step()


@pytest.mark.parametrize("hook", ["before the weights", "after the weights"])
def test_lightnings_order(hook):
    """on_load_checkpoint, weights, then optimizers. A Callback gets its state after the weights."""
    torch.manual_seed(1)
    module = LightningModule()
    optimizer = module.configure_optimizers()
    for low in (SLOTS[1:2], SLOTS[1:3]):
        lightning_epoch(module, optimizer, low)
    checkpoint = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    module.on_save_checkpoint(checkpoint)
    checkpoint = copy.deepcopy(checkpoint)
    torch.manual_seed(1)
    resumed = LightningModule()
    if hook == "before the weights":
        resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"])
    if hook == "after the weights":
        resumed.on_load_checkpoint(checkpoint)
    other = resumed.configure_optimizers()
    other.load_state_dict(checkpoint["optimizer_states"][0])
    lightning_epoch(module, optimizer, [])
    lightning_epoch(resumed, other, [])
    assert resumed.pruner.state_dict() == module.pruner.state_dict()
    expected = module.state_dict()
    assert [key for key, value in resumed.state_dict().items() if not torch.equal(value, expected[key])] == []


@pytest.mark.parametrize(
    ("architecture", "number"), [("eps_test_vit", 1), ("eps_test_vit", 2), ("eps_test_resnet", 1), ("eps_resnet20", 3)]
)
def test_whole_and_half_blocks(architecture, number):
    """Also by a second pruner of the model, whose optimizer follows too."""
    source = timm.create_model(architecture, num_classes=3)
    slots = list(gates(source))[1 : 1 + number]
    for slot in slots:
        gates(source)[slot].closed = True
    timm_eps.remove_closed(source)
    model = timm.create_model(architecture, num_classes=3)
    pruners = [
        EpsilonPruner(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), keep=0.5) for _ in range(2)
    ]
    model.load_state_dict(source.state_dict())
    assert removed_slots(model) == removed_slots(source)
    for pruner in pruners:
        assert set(pruner.optimizer.param_groups[0]["params"]) == set(model.parameters())


def lacking(network):
    """The weights of a network without one of its blocks."""
    duplicate = copy.deepcopy(network)
    gates(duplicate)[SLOTS[1]].closed = True
    timm_eps.remove_closed(duplicate)
    return duplicate.state_dict()


ALIVE = []


def dropped_pruner(model):
    EpsilonPruner(model, epsilon=1.0)
    return model


def copy_of_pruned(model):
    ALIVE.append(EpsilonPruner(model, epsilon=1.0))
    return copy.deepcopy(model)


def unpickled(model):
    ALIVE.append(EpsilonPruner(model, epsilon=1.0))
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("prepare", [lambda model: model, dropped_pruner, copy_of_pruned, unpickled])
def test_without_a_pruner_weights_that_lack_blocks_are_refused(prepare):
    model = prepare(tiny_net())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(lacking(model))
    assert removed_slots(model) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda weights: weights.pop("stem.conv.weight"),
        lambda weights: weights.pop("stages.2.blocks.1.conv1.weight"),
        lambda weights: weights.pop("stages.2.blocks.1.conv2.weight"),  # only the last layer of a branch
        lambda weights: weights.setdefault("strange", torch.zeros(1)),
    ],
)
def test_weights_that_are_not_whole_otherwise_are_refused(damage):
    model = tiny_net()
    weights = lacking(model)
    damage(weights)
    pruner = EpsilonPruner(model, epsilon=1.0)
    with pytest.raises(RuntimeError, match="key"):
        pruner.model.load_state_dict(weights)


def test_weights_of_the_whole_network_leave_a_pruned_one_alone():
    model = tiny_net()
    weights = model.state_dict()
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    for slot, gate in gates(model).items():
        gate.response.fill_(0.1 if slot == SLOTS[1] else 10.0)
    pruner.step()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(weights)
    model.load_state_dict(weights, strict=False)
    assert removed_slots(model) == [SLOTS[1]]

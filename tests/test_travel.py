"""Every way to copy or save a model either keeps its outputs or raises."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from travel import FAMILIES, WAYS, cell, make, table

import timm_eps
from timm_eps import EpsResNetForImageClassification, add_gates, remove_closed
from timm_eps.surgery.branches import gates
from timm_eps.surgery.removal import closed_slots, removed_slots

ROOT = Path(__file__).parent.parent
# The others are slow tests.
QUICK = [("CIFAR network", "closed"), ("CIFAR network", "block removed"), ("CIFAR network", "half removed")]


@pytest.mark.parametrize(("family", "state"), QUICK)
def test_a_copy_is_equal_or_refused(family, state):
    made = make(family, state)
    assert made is not None
    answers = {name: cell(*made, way) for name, way in WAYS.items()}
    ours = [name for name in WAYS if "pretrained" in name or "checkpoint, loaded by" in name or "deepcopy" in name]
    assert all(answers[name] == "equal" for name in ours), answers
    if state != "open":
        assert answers["a stock `TimmWrapper` model"] == "refused"
        assert answers["timm's network without gates"] == "refused"
    if state in ("open", "closed"):
        assert answers["`load_state_dict(state_dict())`"] == "equal"


@pytest.mark.slow
def test_the_table_in_the_documents_is_this_one():
    assert table() in (ROOT / "docs" / "reliability.md").read_text()


def test_the_page_has_a_row_for_each_way():
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert [name for name in WAYS if f"\n| {name} | " not in page] == []


def test_the_table_has_enough_rows():
    assert len(WAYS) >= 12
    assert len(FAMILIES) >= 8


def closed_net(name="eps_resnet20", count=1, **arguments) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    for slot in list(gates(model))[-count:]:
        gates(model)[slot].closed = True
    return model


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_an_open_network_open_the_gates(strict):
    model = closed_net()
    opened = timm.create_model("eps_resnet20", num_classes=5)
    model.load_state_dict(opened.state_dict(), strict=strict)
    assert closed_slots(model) == []


def test_weights_of_a_part_leave_the_gates_alone():
    model = closed_net(count=2)
    closed = closed_slots(model)
    found = model.load_state_dict({"norm.weight": torch.ones(64)}, strict=False)
    assert closed_slots(model) == closed
    assert f"{closed[0]}.closed" in found.missing_keys


def test_open_gates_add_nothing_to_the_weights():
    stock, twin = timm.create_model("test_vit"), timm.create_model("eps_test_vit")
    assert list(stock.state_dict()) == list(twin.state_dict())


@pytest.mark.parametrize("remove", [False, True])
def test_a_stock_wrapper_is_refused_with_the_way_out(remove, tmp_path):
    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=5))
    body = wrapper.timm_model
    slot = add_gates(wrapper)[-1]
    wrapper.save_pretrained(tmp_path / "open")  # an open network is stored as usual
    gates(body)[slot].closed = True
    if remove:
        assert remove_closed(wrapper) == [slot]
        assert "removed" not in (wrapper.config.model_args or {}), "a stock architecture takes no such argument"
    with pytest.raises(ValueError, match=r"EpsResNetForImageClassification\.from_timm"):
        wrapper.save_pretrained(tmp_path / "pruned")


def test_a_stock_wrapper_becomes_the_twin_with_its_class_names(tmp_path):
    names = {0: "cat", 1: "dog", 2: "eel"}
    config = TimmWrapperConfig(architecture="test_resnet", id2label=names, label2id={v: k for k, v in names.items()})
    stock = TimmWrapperForImageClassification(config).eval()
    model = EpsResNetForImageClassification.from_timm(stock).eval()
    assert model.config.id2label == names
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images).logits, stock(images).logits)
    stock.save_pretrained(tmp_path)
    loaded = EpsResNetForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.architecture == "eps_test_resnet"
    assert loaded.config.id2label == names
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, stock(images).logits)
    assert gates(loaded)


def test_class_names_travel_by_every_loader(tmp_path):
    names = ["cat", "dog", "eel"]
    timm_eps.save_pretrained(timm.create_model("eps_resnet20", num_classes=3), tmp_path / "0", label_names=names)
    by_timm = timm.create_model(f"local-dir:{tmp_path / '0'}", pretrained=True)
    timm_eps.save_pretrained(by_timm, tmp_path / "1")
    wrapper = EpsResNetForImageClassification.from_timm(by_timm)
    wrapper.save_pretrained(tmp_path / "2")
    for number in (1, 2):
        model = EpsResNetForImageClassification.from_pretrained(tmp_path / str(number))
        assert list(model.config.id2label.values()) == names
    other = timm.create_model(f"local-dir:{tmp_path / '0'}", pretrained=True, num_classes=4)
    assert EpsResNetForImageClassification.from_timm(other).config.id2label[0] == "LABEL_0"


def test_class_names_travel_into_stock_networks(tmp_path):
    model = timm.create_model("eps_test_resnet", num_classes=3)
    timm_eps.save_pretrained(model, tmp_path / "a", label_names=["cat", "dog", "eel"])
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    timm_eps.export_timm(by_timm, tmp_path / "b")
    stock = TimmWrapperForImageClassification.from_pretrained(tmp_path / "b")
    assert list(stock.config.id2label.values()) == ["cat", "dog", "eel"]


def test_the_base_model_travels(tmp_path):
    model = EpsResNetForImageClassification.from_timm(
        timm.create_model("eps_resnet20", num_classes=3), base_model="somebody/resnet"
    )
    model.save_pretrained(tmp_path / "0")
    by_timm = timm.create_model(f"local-dir:{tmp_path / '0'}", pretrained=True)
    timm_eps.save_pretrained(by_timm, tmp_path / "1")
    assert EpsResNetForImageClassification.from_pretrained(tmp_path / "1").config.base_model == "somebody/resnet"
    assert "base_model: somebody/resnet" in (tmp_path / "1" / "README.md").read_text()


class Around(nn.Module):
    """A user's module around a timm model."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("eps_test_resnet", num_classes=5)

    def forward_features(self, x):
        return self.backbone.forward_features(x)

    def forward(self, x):
        return self.backbone(x)


def test_a_module_around_a_timm_model_is_refused_and_the_one_inside_named(tmp_path):
    for call in (gates, add_gates, remove_closed, partial(timm_eps.EpsilonPruner, keep=0.5)):
        with pytest.raises(ValueError, match=r"model\.backbone"):
            call(Around())
    with pytest.raises(ValueError, match=r"model\.backbone"):
        timm_eps.save_pretrained(Around(), tmp_path)


def test_a_shallow_copy_of_a_wrapper_follows_its_network(tmp_path):
    model = EpsResNetForImageClassification.from_timm(closed_net())
    duplicate = copy.copy(model)
    assert remove_closed(model) == removed_slots(model)
    duplicate.save_pretrained(tmp_path)
    assert removed_slots(EpsResNetForImageClassification.from_pretrained(tmp_path)) == removed_slots(model)

"""The backbone: alone, in transformers' segmentation and detection models, and after loading."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import timm
import torch
from conftest import SLOTS, close, mostly_slow
from torch import nn
from transformers import (
    AutoBackbone,
    AutoModelForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.utils import logging as hf_logging

import timm_eps
from timm_eps import EpsResNetConfig, EpsResNetForImageClassification, EpsResNetModel
from timm_eps.hf.modeling_eps_resnet import EpsResNetBackbone
from timm_eps.surgery.branches import gates
from timm_eps.surgery.removal import removed_slots

STAGES = ["stem", "stage1", "stage2", "stage3"]
NETWORKS = {
    "eps_resnet20": ("eps_resnet20", [], 16),
    "eps_resnet20, pruned": ("eps_resnet20", SLOTS[::2], 16),
    "eps_test_resnet": ("eps_test_resnet", [], 64),
    "eps_test_resnet, pruned": ("eps_test_resnet", ["layer1.0.drop_path", "layer3.0.drop_path"], 64),
    "eps_test_vit": ("eps_test_vit", [], 160),
}


def config_of(architecture: str = "eps_resnet20", **fields) -> EpsResNetConfig:
    return EpsResNetConfig(architecture=architecture, **{"num_labels": 5, **fields})


def trained(model: nn.Module, size: int = 16) -> nn.Module:
    """A network in evaluation mode with BatchNorm statistics that are not the initial ones."""
    body = model.timm_model.train()
    for _ in range(2):
        body(torch.randn(4, 3, size, size))
    return model.eval()


@pytest.fixture
def quiet(caplog):
    """Fail a test if transformers logs a warning."""
    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield
    hf_logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", mostly_slow(NETWORKS, 0, 1))
def test_feature_maps_are_timms(name, tmp_path, quiet):
    """One file gives timm's features_only, the backbone of all stages, and the hidden states of the last stages."""
    architecture, removed, size = NETWORKS[name]
    classifier = EpsResNetForImageClassification(config_of(architecture, model_args={"removed": removed}))
    trained(classifier, size).save_pretrained(tmp_path)
    images = torch.randn(2, 3, size, size)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    every = list(range(len(EpsResNetConfig.from_pretrained(tmp_path).stage_names)))
    if architecture == "eps_test_vit":  # timm returns the last blocks by default
        features = timm.create_model(
            f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=every
        ).eval()
    backbone = EpsResNetBackbone.from_pretrained(tmp_path, out_indices=every).eval()
    last = EpsResNetBackbone.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = features(images)
        maps = backbone(images).feature_maps
        one = last(images, output_hidden_states=True)
        tuples = last(images, output_hidden_states=True, return_dict=False)
    for found in (maps, one.hidden_states, tuples[1]):
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))
    assert all(feature.ndim == 4 for feature in maps)
    assert len(one.feature_maps) == 1
    assert torch.equal(one.feature_maps[0], expected[-1])
    assert backbone.channels == [feature.shape[1] for feature in expected] == features.feature_info.channels()
    assert last.channels == backbone.channels[-1:]
    assert removed_slots(backbone) == removed


def test_which_features():
    for asked, names, numbers in (
        ({}, ["stage3"], [3]),
        ({"out_features": ["stem", "stage2"]}, ["stem", "stage2"], [0, 2]),
        ({"out_indices": [1, 3]}, ["stage1", "stage3"], [1, 3]),
        ({"out_indices": [-2, -1]}, ["stage2", "stage3"], [-2, -1]),
        ({"out_features": ["stage1"], "out_indices": [1]}, ["stage1"], [1]),
    ):
        config = config_of(**asked)
        assert (config.stage_names, config.out_features, config.out_indices) == (STAGES, names, numbers)
        backbone = AutoBackbone.from_config(config)
        assert isinstance(backbone, EpsResNetBackbone)
        assert (backbone.out_features, list(backbone.out_indices)) == (names, numbers)
        maps = backbone.eval()(torch.randn(1, 3, 8, 8)).feature_maps
        assert [one.shape[1] for one in maps] == backbone.channels == [(16, 16, 32, 64)[n] for n in numbers]
    assert config_of("eps_test_vit").stage_names == [f"stage{number}" for number in range(1, 7)]
    assert config_of("eps_test_resnet").stage_names == [*STAGES, "stage4"]


@pytest.mark.parametrize(
    "asked",
    [
        {"out_features": ["stage9"]},
        {"out_indices": [4]},
        {"out_features": ["stage2", "stage1"]},
        {"out_features": ["stage1", "stage1"]},
        {"out_features": ["stage1"], "out_indices": [2]},
        {"out_features": "stage1"},
    ],
)
def test_features_that_are_not_to_be_had(asked):
    with pytest.raises(ValueError, match=r"out_(features|indices)"):
        config_of(**asked)


def test_architecture_that_cannot_be_a_backbone(monkeypatch):
    monkeypatch.delattr(timm_eps.models.eps_resnet.EpsResNet, "forward_intermediates")
    with pytest.raises(ValueError, match="cannot be a backbone"):
        EpsResNetBackbone(config_of())


def test_asking_a_configuration_changes_nothing(tmp_path):
    """The config.json of a classifier is also read by timm, and holds no fields that mean nothing to timm."""
    model = EpsResNetForImageClassification(config_of())
    assert model.config.out_indices == [3]
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert not {"out_features", "out_indices", "stage_names", "_out_features", "_out_indices"} & set(stored)


def test_saved_and_loaded(tmp_path, quiet):
    backbone = trained(EpsResNetBackbone(config_of(out_features=["stage1", "stage3"])))
    close(backbone)
    images = torch.randn(2, 3, 16, 16)
    backbone.save_pretrained(tmp_path)
    loaded = EpsResNetBackbone.from_pretrained(tmp_path).eval()
    assert loaded.out_features == ["stage1", "stage3"]
    assert removed_slots(loaded) == SLOTS[::2]
    with torch.no_grad():
        assert all(map(torch.equal, loaded(images).feature_maps, backbone(images).feature_maps))
    again = EpsResNetBackbone.from_pretrained(tmp_path, out_indices=[0])
    assert (again.out_features, again.channels) == (["stem"], [16])
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 0


def upernet(architecture: str = "eps_resnet20", size: int = 16, **fields):
    config = config_of(architecture, **fields)
    config.out_features = config.stage_names[-4:]
    model = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config, hidden_size=8, pool_scales=[1, 2], auxiliary_channels=8, num_labels=3,
            auxiliary_in_channels=config_channels(config)[-2],
        )
    )  # fmt: skip
    return model, torch.randn(2, 3, size, size)


def config_channels(config: EpsResNetConfig) -> list[int]:
    return AutoBackbone.from_config(copy.deepcopy(config)).channels


@pytest.mark.parametrize("name", mostly_slow(NETWORKS, 0, 1))
def test_in_a_segmentation_model(name, tmp_path, quiet):
    architecture, removed, size = NETWORKS[name]
    model, images = upernet(architecture, size, model_args={"removed": removed})
    loss = model.train()(images, labels=torch.randint(3, (2, size, size))).loss
    loss.backward()
    used = {n for n, p in model.backbone.timm_model.named_parameters() if p.grad is not None}
    assert {n for n, _ in model.backbone.timm_model.named_parameters()} - used <= {"norm.weight", "norm.bias"}
    model.eval().save_pretrained(tmp_path / "a")
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "a").eval()
    loaded.save_pretrained(tmp_path / "b")
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "b").eval()
    for other in (loaded, again):
        assert_same(other, model)
        with torch.no_grad():
            torch.testing.assert_close(other(images).logits, model(images).logits)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Bit for bit. Outputs may differ in the last bits, because transformers leaves weights at unaligned addresses."""
    some, others = one.state_dict(), other.state_dict()
    assert some.keys() == others.keys()
    assert all(torch.equal(tensor, others[key]) for key, tensor in some.items())


def test_pruned_in_a_segmentation_model(tmp_path, quiet):
    model, images = upernet()
    close(model.eval().backbone)
    with torch.no_grad():
        before = model(images).logits
        timm_eps.remove_closed(model.backbone)
        assert torch.equal(model(images).logits, before)
        model.save_pretrained(tmp_path)
        loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(images).logits, before)
    assert removed_slots(loaded.backbone) == SLOTS[::2]
    assert_same(loaded, model)


def test_in_a_detection_model(tmp_path, quiet):
    config = DetrConfig(
        backbone_config=config_of(), use_timm_backbone=False, backbone=None, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        num_queries=4, num_labels=3,
    )  # fmt: skip
    model = DetrForObjectDetection(config).eval()
    images = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    loaded = DetrForObjectDetection.from_pretrained(tmp_path).eval()
    assert_same(loaded, model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, model(images).logits)


@pytest.mark.parametrize("load", ["bfloat16", "cpu", "auto"])
def test_where_and_in_what_precision(load, tmp_path, quiet):
    model = trained(EpsResNetForImageClassification(config_of(side_loss_weight=0.0)))
    model.save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16} if load == "bfloat16" else {"device_map": load}
    images = torch.randn(2, 3, 16, 16)
    for auto in (AutoModelForImageClassification, EpsResNetBackbone, EpsResNetModel):
        loaded = auto.from_pretrained(tmp_path, **options).eval()
        # A gate keeps its threshold in float32, because a small ε is 0 in half precision.
        buffers = [b for name, b in loaded.named_buffers() if b.is_floating_point() and not name.endswith("threshold")]
        floats = {tensor.dtype for tensor in (*loaded.parameters(), *buffers)}
        assert floats == ({torch.bfloat16} if load == "bfloat16" else {torch.float32})
        with torch.no_grad():
            assert torch.isfinite(loaded(images)[0][0]).all()
    if load == "cpu":
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, **options).eval()
        assert torch.equal(loaded(images).logits, model(images).logits)


def test_buffers_after_loading_in_half_precision(tmp_path):
    EpsResNetBackbone(config_of()).save_pretrained(tmp_path)
    for gate in gates(EpsResNetBackbone.from_pretrained(tmp_path, dtype=torch.bfloat16)).values():
        assert (gate.threshold.item(), gate.response.item(), gate.epsilon) == (0.0, -1.0, 0.0)


@pytest.mark.parametrize("architecture", ["eps_resnet20", "eps_test_resnet", "eps_test_vit"])
def test_gradient_checkpointing(architecture):
    size = NETWORKS[architecture][2]
    images, labels = torch.randn(3, 3, size, size), torch.tensor([0, 1, 2])
    plain = EpsResNetForImageClassification(config_of(architecture)).train()
    frugal = copy.deepcopy(plain)
    frugal.activation_checkpointing_enable()
    for model in (plain, frugal):
        model.loss = model(images, labels=labels).loss
        model.loss.backward()
    assert torch.equal(plain.loss, frugal.loss)
    for (name, one), other in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.slow
def test_classifier_of_another_size_in_a_twin(tmp_path):
    for architecture in ("eps_test_resnet", "eps_test_vit"):
        model = EpsResNetForImageClassification(config_of(architecture))
        model.save_pretrained(tmp_path / architecture)
        with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
            EpsResNetForImageClassification.from_pretrained(tmp_path / architecture, num_labels=7)
        tuned = EpsResNetForImageClassification.from_pretrained(
            tmp_path / architecture, num_labels=7, ignore_mismatched_sizes=True
        )
        old, new = model.state_dict(), tuned.state_dict()
        changed = {key for key in old if old[key].shape != new[key].shape}
        last = tuned.timm_model.pretrained_cfg["classifier"]
        assert changed == {f"timm_model.{last}.weight", f"timm_model.{last}.bias"}
        assert all(torch.equal(old[key], new[key]) for key in old.keys() - changed)
        assert torch.isfinite(new[f"timm_model.{last}.weight"]).all()


def test_weights_that_transformers_makes_are_as_timms():
    """An empty state dictionary makes transformers initialise every module."""
    made = EpsResNetForImageClassification.from_pretrained(None, config=config_of(), state_dict={})
    timms = timm.create_model("eps_resnet20", num_classes=5)
    for (name, one), other in zip(made.timm_model.named_parameters(), timms.parameters(), strict=True):
        if one.ndim > 1:
            assert one.std().item() == pytest.approx(other.std().item(), rel=0.25), name
        else:
            assert torch.equal(one, other), name
    for (name, one), other in zip(made.timm_model.named_buffers(), timms.buffers(), strict=True):
        assert torch.equal(one, other), name


def test_saved_for_timm_whatever_it_was_loaded_from(tmp_path):
    """Weights passed under the wrapper's keys do not change the keys that are written."""
    model = EpsResNetForImageClassification(config_of())
    given = EpsResNetForImageClassification.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    given.save_pretrained(tmp_path)
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)

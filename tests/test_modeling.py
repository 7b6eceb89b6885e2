"""The transformers classes: side supervision, initialisation, and one format on disk for all loaders."""

from __future__ import annotations

import copy
import json
import logging
import math

import pytest
import timm
import torch
from conftest import SLOTS, close, tiny_net
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

import timm_eps
from timm_eps import EpsResNetConfig, EpsResNetForImageClassification, EpsResNetModel
from timm_eps.hf.side_supervision import half_depth
from timm_eps.surgery.branches import gates


def tiny_config(**fields) -> EpsResNetConfig:
    return EpsResNetConfig(architecture="eps_resnet20", **{"num_labels": 5, **fields})


@pytest.fixture
def model() -> EpsResNetForImageClassification:
    model = EpsResNetForImageClassification(tiny_config())
    model.train()
    for _ in range(2):
        model(torch.randn(8, 3, 8, 8))
    return model


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3])


def test_training_loss_has_the_side_term(model, images, labels):
    tapped = []
    model.timm_model.stages[1].blocks[1].register_forward_hook(lambda m, args, output: tapped.append(output))
    main = F.cross_entropy(model.timm_model(images), labels)
    beside = F.cross_entropy(model.side_head(tapped[0]), labels)
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, main + 0.1 * beside)
    assert output.logits.shape == (4, 5)
    model.config.side_loss_weight = 0.5
    torch.testing.assert_close(model(images, labels=labels).loss, main + 0.5 * beside)


def test_side_head_is_the_papers(model):
    """BN-ReLU, global average pool and a linear layer, after block n // 2 of the middle stage."""
    norm, head = model.side_head
    assert norm.num_features == head.fc.in_features == 32
    assert half_depth(timm.create_model("eps_resnet110")) == "stages.1.blocks.9"
    assert half_depth(timm.create_model("eps_resnetv2_101")) == "stages.2.blocks.8", "block 16 of 33"


def test_side_supervision_of_a_twin(images, labels):
    config = EpsResNetConfig(architecture="eps_resnetv2_50", num_labels=5, side_loss_weight=0.1)
    model = EpsResNetForImageClassification(config).train()
    images = torch.randn(4, 3, 64, 64)
    output = model(images, labels=labels)
    output.loss.backward()
    assert output.loss > F.cross_entropy(output.logits, labels)
    assert model.side_head[1].fc.weight.grad.any()
    with pytest.raises(ValueError, match="no feature maps at half depth"):
        EpsResNetForImageClassification(EpsResNetConfig(architecture="eps_test_vit", side_loss_weight=0.1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_side_supervision_outlives_its_block(model, images, labels, checkpointing):
    """After removal of the block that feeds the side head, the head reads the remaining block, also in copies."""
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(images, labels=labels).loss.backward()
    close(model, "stages.1.blocks.1.drop_path")
    timm_eps.remove_closed(model)
    copy.deepcopy(model)
    losses = [net.train()(images, labels=labels).loss for net in (model, copy.deepcopy(model))]
    torch.testing.assert_close(*losses)
    losses[1].backward()
    assert losses[0] > F.cross_entropy(model(images).logits, labels)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_tap_of_the_side_head_holds_nothing_after_a_step(model, images, labels, checkpointing):
    """The noted tensor holds a whole graph. None is kept after a failed step or by gradient checkpointing."""
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(images, labels=labels).loss.backward()
    assert model._tap.take() is None
    with pytest.raises(IndexError, match="out of bounds"):
        model(images, labels=labels + 5)
    model.timm_model(images)
    assert model._tap.take() is None


def test_side_supervision_trains_all(model, images, labels):
    model(images, labels=labels).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_evaluation_loss_is_plain(model, images, labels):
    model.eval()
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


def test_outputs(model, images, labels):
    plain = model(images, labels=labels, output_hidden_states=True)
    assert [h.shape[1] for h in plain.hidden_states] == [16, 16, 32, 64]
    some = [model(images, labels=labels if training else None, output_hidden_states=[-1, 0]) for training in (1, 0)]
    assert [[h.shape[1] for h in one.hidden_states] for one in some] == [[16, 64]] * 2
    loss, logits = model(images, labels=labels, return_dict=False)
    torch.testing.assert_close(loss, plain.loss)
    torch.testing.assert_close(logits, plain.logits)
    model.eval()
    assert len(model(images, output_hidden_states=True).hidden_states) == 4


def test_without_side_supervision(images, labels):
    model = EpsResNetForImageClassification(tiny_config(side_loss_weight=0.0)).train()
    assert model.side_head is None
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


@pytest.mark.parametrize("weight", [-0.1, math.nan])
def test_bad_side_loss_weight(weight):
    with pytest.raises(ValueError, match="side_loss_weight must be a finite number of at least 0"):
        tiny_config(side_loss_weight=weight)


def test_initialisation_is_timms():
    """transformers would give every convolution a standard deviation of 0.02."""
    ours, timms = EpsResNetForImageClassification(tiny_config()), timm.create_model("eps_resnet20", num_classes=5)
    for (name, module), (_, other) in zip(ours.timm_model.named_modules(), timms.named_modules(), strict=True):
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.std().item() == pytest.approx(other.weight.std().item(), rel=0.25), name
    assert {gate.threshold.item() for gate in gates(ours).values()} == {0.0}


def save_pruned(model, directory):
    model.eval()
    close(model)
    model.save_pretrained(directory)
    return model


def test_every_loader_gives_the_same_logits(model, tmp_path, images):
    save_pruned(model, tmp_path)
    with torch.no_grad():
        live = model(images).logits
        by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        by_auto = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        features = AutoModel.from_pretrained(tmp_path).eval()
        assert torch.equal(by_timm(images), live)
        assert torch.equal(by_auto(images).logits, live)
        for image in images.split(1):  # single images run through other kernels
            assert torch.equal(by_timm(image), model(image).logits)
            assert torch.equal(by_auto(image).logits, model(image).logits)
        pooled = features(images).pooler_output
        assert torch.equal(by_timm.get_classifier()(pooled), live)
    assert isinstance(by_auto, EpsResNetForImageClassification)
    assert isinstance(features, EpsResNetModel)
    assert by_timm.removed == by_auto.timm_model.removed == features.timm_model.removed == SLOTS[::2]


def test_pipeline_gives_the_same_logits(tmp_path):
    from PIL import Image

    config = tiny_config(id2label=dict(enumerate("abcde")), label2id={c: i for i, c in enumerate("abcde")})
    model = save_pruned(EpsResNetForImageClassification(config), tmp_path)
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    answers = {a["label"]: a["score"] for a in classify(picture, top_k=5, function_to_apply="none")}
    with torch.no_grad():
        logits = model(**processor(picture)).logits[0]
    assert [answers[name] for name in "abcde"] == logits.tolist()


def test_what_is_saved(model, tmp_path):
    from safetensors import safe_open

    save_pruned(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    config = json.loads((tmp_path / "config.json").read_text())
    assert keys == set(timm.create_model("eps_resnet20", removed=SLOTS[::2]).state_dict()), "timm's keys, nothing else"
    assert config["model_args"] == {"removed": SLOTS[::2]}
    assert config["side_loss_weight"] == 0.0
    assert config["architecture"] == "eps_resnet20"
    assert config["num_classes"] == 5
    assert not list(tmp_path.glob("*.bin"))


def test_an_unpruned_model_loads_everywhere(model, tmp_path, images):
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        live = model(images).logits
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), live)
        assert torch.equal(AutoModelForImageClassification.from_pretrained(tmp_path).eval()(images).logits, live)


def test_saving_leaves_the_model_alone(model, tmp_path, images, labels):
    close(model)
    model.save_pretrained(tmp_path)
    assert len(gates(model)) == 9
    assert model.training
    assert model.config.side_loss_weight == 0.1
    assert model.config.model_args == {}
    assert model.side_head is not None


def test_loading_is_silent(model, tmp_path, caplog):
    """Warnings about missing or unexpected keys would be false alarms."""
    save_pruned(model, tmp_path)
    from transformers.utils import logging as hf_logging

    hf_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            AutoModelForImageClassification.from_pretrained(tmp_path)
            AutoModel.from_pretrained(tmp_path)
    finally:
        hf_logging.disable_propagation()
    assert "LOAD REPORT" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_saved_again_is_the_same(model, tmp_path):
    save_pruned(model, tmp_path / "a")
    AutoModelForImageClassification.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_pruned_on_its_own(tmp_path, images):
    """Removal in the inner network equals removal in the wrapper: the saved model loads."""
    body = tiny_net()
    wrapper = EpsResNetForImageClassification.from_timm(body).eval()
    close(body)
    timm_eps.remove_closed(body)
    wrapper.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForImageClassification.from_pretrained(tmp_path).eval()(images).logits, body(images))


def test_headless(tmp_path, images):
    """A network without a classifier, and the features of a classifier, are saved as such."""
    for name, body in (("a", tiny_net(num_classes=0)), ("b", tiny_net())):
        wrapper = EpsResNetModel.from_timm(body).eval()
        wrapper.save_pretrained(tmp_path / name)
        expected = body.forward_head(body.forward_features(images), pre_logits=True)
        by_timm = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        assert by_timm.num_classes == 0
        if name == "a":
            assert torch.equal(by_timm(images), expected)
            assert torch.equal(AutoModel.from_pretrained(tmp_path / name).eval()(images).pooler_output, expected)


def test_labels_are_saved_in_order(model, tmp_path):
    model.config.id2label = {4: "e", 0: "a", 2: "c", 1: "b", 3: "d"}
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).id2label == dict(enumerate("abcde"))


def test_state_dict_that_lacks_weights(model, tmp_path):
    with pytest.raises(ValueError, match=r"state_dict lacks 'timm_model\."):
        model.save_pretrained(tmp_path, state_dict=model.timm_model.state_dict())
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_from_timm_takes_config_fields(images, labels):
    model = EpsResNetForImageClassification.from_timm(tiny_net(), side_loss_weight=0.2).train()
    output = model(images, labels=labels)
    output.loss.backward()
    assert output.loss > F.cross_entropy(output.logits, labels)
    for refused in (timm.create_model("vgg11"), timm_eps.models.eps_resnet.EpsResNet([1, 1, 1])):
        with pytest.raises(ValueError, match="cannot be rebuilt from a name"):
            EpsResNetForImageClassification.from_timm(refused)
    with pytest.raises(ValueError, match="made with norm_layer=<class"):
        EpsResNetForImageClassification.from_timm(
            timm.create_model("eps_resnet20", norm_layer=timm.layers.BatchNormAct2d)
        )


def test_buffers_are_sound_after_loading(model, tmp_path, images):
    """from_pretrained builds on the meta device. Gates must not have uninitialised memory afterwards."""
    save_pruned(model, tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    for gate in gates(loaded).values():
        assert (gate.threshold.item(), gate.response.item(), gate.epsilon) == (0.0, -1.0, 0.0)
    assert torch.isfinite(loaded.train()(images).logits).all()


def test_fine_tuning_on_other_labels(model, tmp_path, images):
    save_pruned(model, tmp_path)
    tuned = AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, side_loss_weight=0.1
    )
    assert tuned.train()(images, labels=torch.tensor([0, 1, 2, 0])).logits.shape == (4, 3)
    assert tuned.side_head is not None
    assert tuned.timm_model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.5)
    assert tuned.timm_model.removed == SLOTS[::2]
    tuned.save_pretrained(tmp_path / "tuned")
    assert len(json.loads((tmp_path / "tuned" / "config.json").read_text())["label_names"]) == 3


def test_fine_tuning_on_named_labels(model, tmp_path):
    save_pruned(model, tmp_path)
    labels = {"id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}}
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **labels)
    assert tuned.config.id2label == labels["id2label"]
    assert tuned.timm_model.num_classes == 2
    tuned.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).id2label == labels["id2label"]


def test_a_stored_config_without_side_supervision_means_none(tmp_path, model):
    """timm writes the same config.json without transformers' fields."""
    save_pruned(model, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["side_loss_weight"]
    path.write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).side_loss_weight == 0.0


def test_from_timm_shares_the_weights(tmp_path, images):
    body = tiny_net(num_classes=5)
    wrapper = EpsResNetForImageClassification.from_timm(body).eval()
    assert wrapper.timm_model is body
    assert torch.equal(wrapper(images).logits, body(images))
    assert wrapper.config.pretrained_cfg["input_size"] == (3, 8, 8)
    assert wrapper.config.num_labels == 5


def test_state_dicts_of_both_worlds(model, images, labels):
    """A training checkpoint holds the side head. timm's weights have no side head and no prefix."""
    other = EpsResNetForImageClassification(tiny_config())
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    assert torch.equal(other(images).logits, model(images).logits)
    assert torch.equal(other.side_head[1].fc.weight, model.side_head[1].fc.weight)
    for weight in (0.0, 0.1):
        plain = EpsResNetForImageClassification(tiny_config(side_loss_weight=weight)).eval()
        plain.load_state_dict(model.timm_model.state_dict())
        assert torch.equal(plain(images).logits, model(images).logits)


def test_config_round_trip(tmp_path):
    config = tiny_config(model_args={"removed": SLOTS[:2]})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, EpsResNetConfig)
    assert again.model_args == config.model_args
    assert again.side_loss_weight == 0.1
    assert again.num_labels == 5
    assert again.pretrained_cfg["input_size"] == [3, 32, 32]


def tamper(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tampered_structure(model, tmp_path):
    save_pruned(model, tmp_path)
    tamper(tmp_path, model_args={"removed": ["stages.7.blocks.0.drop_path"]})
    for load in (
        lambda: timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
        lambda: AutoModelForImageClassification.from_pretrained(tmp_path),
    ):
        with pytest.raises(
            ValueError, match=r"'stages\.7\.blocks\.0\.drop_path' is not a gated slot of this EpsResNet"
        ):
            load()
    tamper(tmp_path, model_args={"removed": SLOTS[:1]})
    loaders = (
        lambda: timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
        lambda: AutoModelForImageClassification.from_pretrained(tmp_path),
        lambda: AutoModel.from_pretrained(tmp_path),
    )
    for load in loaders:
        with pytest.raises(ValueError, match=r"lacks 'stages\.0\.blocks\.2\.conv1"):
            load()
    tamper(tmp_path, model_args={"removed": SLOTS})
    for load in loaders:
        with pytest.raises(ValueError, match="also holds"):
            load()


def test_config_without_architecture(model, tmp_path):
    save_pruned(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architecture"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no field 'architecture'"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_config_that_is_no_json(model, tmp_path):
    save_pruned(model, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(json.JSONDecodeError):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_loading_info_on_request(model, tmp_path):
    save_pruned(model, tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, EpsResNetForImageClassification)
    assert not info["missing_keys"]


def test_truncated_weights(model, tmp_path):
    save_pruned(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Exception, match="Error while deserializing header"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(Exception, match="Error while deserializing header"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_compiled_in_training(images, labels):
    torch._dynamo.reset()
    model = EpsResNetForImageClassification(tiny_config(model_args={"layers": [1, 2, 1]})).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, labels=labels).loss, model(images, labels=labels).loss)
    compiled(images, labels=labels).loss.backward()


def test_closed_gates_of_another_network():
    with pytest.raises(ValueError, match=r"closed lists 'stages\.9\.blocks\.0\.drop_path', where this EpsResNet"):
        EpsResNetForImageClassification(tiny_config(model_args={"closed": ["stages.9.blocks.0.drop_path"]}))
    with pytest.raises(ValueError, match=r"model_args\['closed'\]"):
        tiny_config(closed=["stages.0.blocks.0.drop_path"])


def test_a_file_does_not_ask_for_a_side_head_that_it_lacks(tmp_path):
    EpsResNetForImageClassification(tiny_config(side_loss_weight=0.0)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "side_loss_weight": 0.3}))
    for cls in (EpsResNetForImageClassification, AutoModelForImageClassification):
        with pytest.raises(ValueError, match="has a side_loss_weight, but the weights lack 'side_head"):
            cls.from_pretrained(tmp_path)
        assert cls.from_pretrained(tmp_path, side_loss_weight=0.2).side_head is not None, "the caller asked"
        assert cls.from_pretrained(tmp_path, side_loss_weight=0.0).side_head is None
    AutoModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "side_loss_weight": None}))
    assert AutoModelForImageClassification.from_pretrained(tmp_path).side_head is None, "null asks for none"

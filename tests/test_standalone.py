"""The modelling code that is copied beside saved models gives timm_eps's results without timm_eps.

Run as a script with a directory of saved models, this file makes these checks.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)
from transformers import logging as hf_logging

pytestmark = pytest.mark.usefixtures("nothing_drawn")

NAMES = ["pruned", "stage_first", "one_channel", "unpruned", "uneven", "headless", "pixel_mean"]
LABELS = list("abcde")
REMOTE = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Saved models with timm_eps's outputs, after the checks in a process without timm_eps."""
    from conftest import SLOTS, close, tiny_net

    import timm_eps

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("standalone")
    nets = {
        "pruned": (tiny_net(num_classes=5), SLOTS[::2]),
        "stage_first": (tiny_net(num_classes=5), ["stages.1.blocks.0.drop_path", *SLOTS[6:]]),
        "one_channel": (tiny_net_of_one_channel(), SLOTS[1:4]),
        "unpruned": (tiny_net(num_classes=5, drop_rate=0.5, act_layer="relu"), []),
        "uneven": (tiny_net(num_classes=5, layers=(1, 2, 3), channels=(4, 12, 17)), ["stages.2.blocks.1.drop_path"]),
        "headless": (tiny_net(num_classes=0), SLOTS[:1]),
        "pixel_mean": (tiny_net_with_pixel_mean(), SLOTS[:1]),
    }
    assert list(nets) == NAMES
    for name, (net, slots) in nets.items():
        if slots:
            close(net, *slots)
        names = LABELS if net.num_classes else None
        timm_eps.save_pretrained(net, place / name, label_names=names, remote_code=True)
        images = torch.randn(4, net.in_chans, 9, 9)  # odd sizes
        with torch.no_grad():
            features, hidden_states = net.forward_intermediates(images)
            pooled = net.forward_head(features, pre_logits=True)
            expected = {"images": images, "features": features, "pooled": pooled, "logits": net(images)}
            expected["singles"] = torch.cat([net(image[None]) for image in images])
        torch.save({**expected, "hidden_states": hidden_states}, place / name / "expected.pt")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env.update(HF_HOME=str(place / "hf_home"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    env.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, __file__, str(place)]
    run = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "all checks passed"
    return place


def tiny_net_with_pixel_mean() -> torch.nn.Module:
    import timm

    net = timm.create_model("eps_resnet20", num_classes=5, pixel_mean=(9, 9)).eval()
    net.stem.pixel_mean.mean.normal_()
    return net


def tiny_net_of_one_channel() -> torch.nn.Module:
    import timm

    model = timm.create_model(
        "eps_resnet20", num_classes=5, in_chans=1, pretrained_cfg_overlay={"input_size": (1, 8, 8)}
    )
    model.train()(torch.randn(8, 1, 8, 8))
    return model.eval()


def check_place(place: Path) -> None:
    """All checks of a process without timm_eps."""
    hf_logging.disable_progress_bar()
    warned: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = warned.append
    hf_logging.add_handler(handler)
    for name in NAMES:
        check_outputs(place / name)
    check_saving(place / "pruned")
    assert [record.getMessage() for record in warned] == [], "loading is silent"
    check_processor(place / "pruned")
    check_training(place / "pruned")
    check_refusals(place / "pruned")
    assert "timm_eps" not in sys.modules


@torch.no_grad()
def check_outputs(directory: Path) -> None:
    expected = torch.load(directory / "expected.pt")
    images, hidden_states = expected["images"], expected["hidden_states"]

    model, info = AutoModel.from_pretrained(directory, output_loading_info=True, **REMOTE)
    assert type(model).__module__.startswith("transformers_modules.")
    assert not any(info.values()), info
    output = model(images, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected["features"])
    assert torch.equal(output.pooler_output, expected["pooled"])
    assert all(map(torch.equal, output.hidden_states, hidden_states))
    assert model(images).hidden_states is None
    assert [len(model(images, return_dict=False)), len(output.to_tuple())] == [2, 3]

    config = AutoConfig.from_pretrained(directory, **REMOTE)
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    # AutoBackbone.from_pretrained looks for local directories on the Hub; from_config finds the class.
    backbone_class = type(AutoBackbone.from_config(config, **REMOTE))
    backbone, info = backbone_class.from_pretrained(
        directory, out_features=["stem", "stage2"], output_loading_info=True
    )
    assert not any(info.values()), info
    assert backbone.channels == [hidden_states[i].shape[1] for i in (0, 2)]
    maps = backbone(images).feature_maps
    assert len(maps) == 2
    assert all(map(torch.equal, maps, (hidden_states[0], hidden_states[2])))
    assert torch.equal(backbone_class.from_pretrained(directory)(images).feature_maps[0], hidden_states[3])
    assert len(backbone_class.from_pretrained(directory, out_indices=[1, 3])(images).feature_maps) == 2

    if config.num_labels == 0:
        with pytest.raises(ValueError, match="has no classifier; pass num_labels"):
            AutoModelForImageClassification.from_pretrained(directory, **REMOTE)
        return
    model, info = AutoModelForImageClassification.from_pretrained(directory, output_loading_info=True, **REMOTE)
    assert not any(info.values()), info
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: number for number, label in enumerate(LABELS)}
    output = model(images, output_hidden_states=True)
    assert torch.equal(output.logits, expected["logits"])
    assert all(map(torch.equal, output.hidden_states, hidden_states))
    # transformers maps weights at unaligned addresses, where kernels may sum in another order.
    singles = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(singles, expected["singles"], rtol=0, atol=1e-6)
    loss, logits = model(images, labels=torch.tensor([0, 1, 2, 3]), return_dict=False)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])))


def check_processor(directory: Path) -> None:
    from PIL import Image

    picture = Image.effect_noise((12, 10), 90).convert("RGB")
    processor = AutoImageProcessor.from_pretrained(directory, **REMOTE)
    assert type(processor).__name__ == "TimmWrapperImageProcessor"
    model = AutoModelForImageClassification.from_pretrained(directory, **REMOTE)
    pixel_values = processor(picture).pixel_values
    assert pixel_values.shape == (1, 3, 8, 8)
    with torch.no_grad():
        logits = model(pixel_values).logits[0]
    classify = pipeline("image-classification", model=str(directory), device="cpu", **REMOTE)
    answers = {answer["label"]: answer["score"] for answer in classify(picture, top_k=5, function_to_apply="none")}
    assert [answers[label] for label in LABELS] == logits.tolist()


def check_saving(directory: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(directory, **REMOTE)
    model.save_pretrained(directory.parent / "again")
    again = AutoModelForImageClassification.from_pretrained(directory.parent / "again", **REMOTE)
    expected = torch.load(directory / "expected.pt")
    with torch.no_grad():
        assert torch.equal(again(expected["images"]).logits, expected["logits"])
    before, after = (
        json.loads((place / "config.json").read_text()) for place in (directory, directory.parent / "again")
    )
    assert {key: after[key] for key in before if key != "weights_sha256"} == {
        key: value
        for key, value in before.items()
        if key != "weights_sha256"  # the digest of the loaded file
    }
    assert after.keys() - before.keys() == {"out_features", "out_indices"}


def check_training(directory: Path) -> None:
    for labels in ({"num_labels": 3}, {"id2label": {0: "x", 1: "y", 2: "z"}}):
        model = AutoModelForImageClassification.from_pretrained(
            directory, ignore_mismatched_sizes=True, **labels, **REMOTE
        )
        assert 0.005 < model.head.fc.weight.std().item() < 0.02
        assert not model.head.fc.bias.any()
    kept = AutoModel.from_pretrained(directory, **REMOTE).state_dict()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in kept.items())
    images = torch.randn(4, 3, 8, 8)
    output = model.train()(images, labels=torch.tensor([0, 1, 2, 0]))
    assert output.logits.shape == (4, 3)
    output.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.save_pretrained(directory.parent / "tuned")
    config = json.loads((directory.parent / "tuned" / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (3, ["x", "y", "z"])

    fresh = AutoModelForImageClassification.from_config(model.config, **REMOTE)
    weight = fresh.stages[2].blocks[1].conv1.weight
    assert abs(weight.std().item() / (2 / (9 * 64)) ** 0.5 - 1) < 0.1, "He, over the fan-out"
    assert 0.005 < fresh.head.fc.weight.std().item() < 0.02


def check_refusals(directory: Path) -> None:
    for match, fields in {
        "architecture must be one of eps_resnet20, .* got 'eps_resnet50'": {"architecture": "eps_resnet50"},
        "model_args has global_pool='max'": {"model_args": {"global_pool": "max"}},
        r"model_args\['width'\] is not an argument of a CIFAR network": {"model_args": {"width": 2}},
        "removes 'stages.7.blocks.0.drop_path', which eps_resnet20": {
            "model_args": {"removed": ["stages.7.blocks.0.drop_path"]}
        },
    }.items():
        stored = json.loads((directory / "config.json").read_text())
        changed = directory.parent / "changed"
        shutil.copytree(directory, changed, dirs_exist_ok=True)
        (changed / "config.json").write_text(json.dumps({**stored, **fields}))
        with pytest.raises(ValueError, match=match):
            AutoModelForImageClassification.from_pretrained(changed, **REMOTE)


def test_without_timm_eps(place):
    """The fixture has run the checks of :func:`check_place` in another process."""


def test_timm_eps_reads_what_was_saved_again(place):
    import timm

    expected = torch.load(place / "pruned" / "expected.pt")
    images = expected["images"]
    by_timm = timm.create_model(f"local-dir:{place / 'again'}", pretrained=True).eval()
    by_auto = AutoModelForImageClassification.from_pretrained(place / "again")
    with torch.no_grad():
        assert torch.equal(by_timm(images), expected["logits"])
        assert torch.equal(by_auto(images).logits, expected["logits"])
    assert type(by_auto).__module__ == "timm_eps.hf.modeling_eps_resnet"
    assert by_auto.config.id2label == dict(enumerate(LABELS))
    tuned = timm.create_model(f"local-dir:{place / 'tuned'}", pretrained=True)
    assert (tuned.num_classes, tuned.removed) == (3, by_timm.removed)


def test_timm_eps_goes_before_the_code_beside_a_model(place):
    model = AutoModelForImageClassification.from_pretrained(place / "pruned", **REMOTE)
    assert type(model).__module__ == "timm_eps.hf.modeling_eps_resnet"


if __name__ == "__main__":
    check_place(Path(sys.argv[1]))
    print("all checks passed")

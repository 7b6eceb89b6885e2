"""save_pretrained: the directory that a user gets, and the state after a failure."""

from __future__ import annotations

import json
import os

import pytest
import timm
import torch
from conftest import SLOTS, close, tiny_net
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification

import timm_eps
from timm_eps.hub import saving as hub
from timm_eps.surgery.branches import gates

pytestmark = pytest.mark.usefixtures("nothing_drawn")

RESULTS = {
    "architecture": "eps_resnet20",
    "arguments": {"keep": 0.5, "num_train_epochs": 3},
    "base_model": None,
    "blocks_total": 9,
    "blocks_kept": 4,
    "dataset": "noise",
    "dataset_id": "me/noise",
    "dense_macs": 1000,
    "dense_params": 100,
    "dense_latency_batch1_seconds": 0.002,
    "dense_latency_batch128_seconds": 0.2,
    "eval_accuracy": 0.5,
    "eval_images": 10,
    "eval_split": "test",
    "hardware": "a test",
    "latency_batch1_seconds": 0.001,
    "latency_batch128_seconds": 0.1,
    "macs": 500,
    "params": 40,
    "removed": SLOTS[::2],
    "seed": 0,
    "train_images": 20,
}


@pytest.fixture
def model():
    model = tiny_net()
    close(model)
    return model


def test_a_timm_model(model, tmp_path, images):
    names = [f"digit {i}" for i in range(10)]
    timm_eps.save_pretrained(model, tmp_path / "out", label_names=names)
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "blocks.png", "config.json", "model.safetensors"]
    with torch.no_grad():
        live = model(images)
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(images), live)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(loaded(images).logits, live)
    assert [loaded.config.id2label[i] for i in range(10)] == names
    assert len(gates(model)) == 9, "the model itself is unchanged"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 8, 8]


def test_a_wrapped_model_with_results(model, tmp_path):
    wrapper = timm_eps.EpsResNetForImageClassification.from_timm(model)
    timm_eps.save_pretrained(wrapper, tmp_path, results=RESULTS, repo_id="me/tiny")
    assert json.loads((tmp_path / "all_results.json").read_text()) == RESULTS
    names = dict(wrapper.config.id2label)
    timm_eps.save_pretrained(wrapper, tmp_path, label_names=list("abcdefghij"))
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.label2id["c"] == 2
    assert wrapper.config.id2label == names


def test_picture_shows_the_history(model, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_eps.hub.saving.draw_blocks", timm_eps.report.draw_blocks)
    pruner = timm_eps.EpsilonPruner(tiny_net(), epsilon=1.0, patience=2)
    for _ in range(4):
        for index, gate in enumerate(gates(pruner.model).values()):
            gate.response.fill_(0.3 * index)
        pruner.step()
    timm_eps.save_pretrained(pruner.model, tmp_path / "with", history=pruner.history)
    timm_eps.save_pretrained(pruner.model, tmp_path / "without")
    from PIL import Image

    with_history, without = (Image.open(tmp_path / d / "blocks.png") for d in ("with", "without"))
    assert with_history.height > 2 * without.height
    assert len(set(with_history.convert("RGB").getcolors(1 << 24))) > 20


def test_card(model, tmp_path):
    timm_eps.save_pretrained(model, tmp_path, results=RESULTS, repo_id="me/tiny")
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "timm", "a task-less pipeline(model=...) needs timm or transformers here"
    assert data["pipeline_tag"] == "image-classification"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["me/noise"]
    assert {"timm", "transformers", "eps-resnet", "pruned"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.5
    for text in (
        "keeps 4 of 9 residual branches and 40.0 % of the parameters",
        "An image classifier with 10 classes: LABEL_0, LABEL_1,",
        "50.00 % of the 10 images of noise (test)",
        "This repository has no form for machines without timm-eps.",
        'timm.create_model("hf-hub:me/tiny", pretrained=True)',
        'pipeline("image-classification", model="me/tiny")',
        "| parameters | 100 | 40 | −60.0 % |",
        "| accuracy | not trained | 50.00 % |  |",
        "- `num_train_epochs`: 3",
        "![Which residual branches stayed",
        "yu2018epsilon",
    ):
        assert text in card.content
    assert "{{" not in card.content
    assert "{%" not in card.content
    assert "\n\n\n" not in card.content, "no empty lines where an option was off"


def test_the_card_begins_with_a_form_that_needs_no_package(tmp_path):
    for number, (options, first) in enumerate(
        [
            ({"remote_code": True, "exported_program": True}, "**In transformers, without timm-eps.**"),
            ({"exported_program": True, "onnx": True}, "**In plain torch, without timm-eps.**"),
            ({"onnx": True}, "**In ONNX Runtime, without timm-eps.**"),
        ]
    ):
        timm_eps.save_pretrained(tiny_net(), tmp_path / str(number), **options)
        text = ModelCard.load(tmp_path / str(number) / "README.md").content
        ways = text.partition("## How to load it")[2].partition("\n## ")[0]
        assert ways.strip().startswith(first)
        assert ways.index("without timm-eps") < ways.index("pip install timm-eps")
        assert "has no form for machines" not in text


def test_card_without_results_claims_nothing(model, tmp_path):
    timm_eps.save_pretrained(model, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "keeps 4 of 9 residual branches." in card.content
    assert "accuracy" not in card.content
    assert "model-index" not in card.data.to_dict()


def test_card_of_a_fine_tuned_model(model, tmp_path):
    timm_eps.save_pretrained(model, tmp_path, results={**RESULTS, "base_model": "me/first"})
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["base_model"] == "me/first"
    assert data["base_model_relation"] == "finetune"


@pytest.mark.parametrize("breaks", ["save_pretrained", "draw_blocks", "render_card"])
def test_an_interrupted_save_leaves_the_previous_one(model, tmp_path, images, monkeypatch, breaks):
    first = tiny_net()
    timm_eps.save_pretrained(first, tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    owner = timm_eps.EpsResNetForImageClassification if breaks == "save_pretrained" else hub
    monkeypatch.setattr(owner, breaks, interrupt)
    with pytest.raises(KeyboardInterrupt):
        timm_eps.save_pretrained(model, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == files
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), first(images))


def test_results_of_another_model_do_not_stay(model, tmp_path):
    timm_eps.save_pretrained(model, tmp_path, results=RESULTS)
    timm_eps.save_pretrained(model, tmp_path)
    assert not (tmp_path / "all_results.json").exists()


def test_headless_and_one_channel(tmp_path, images):
    for name, model, x in (
        ("headless", tiny_net(num_classes=0), images),
        ("grey", timm.create_model("eps_resnet20", in_chans=1).eval(), images[:, :1]),
    ):
        timm_eps.save_pretrained(model, tmp_path / name)
        again = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        assert torch.equal(again(x), model(x))
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["pretrained_cfg"]["input_size"][0] == x.shape[1]
        task = "image-feature-extraction" if name == "headless" else "image-classification"
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.pipeline_tag == task
        assert f'pipeline("{task}", model=' in card.content


def test_saving_over_another_structure(model, tmp_path, images):
    timm_eps.save_pretrained(tiny_net(), tmp_path)
    timm_eps.save_pretrained(model, tmp_path)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model(images))


def test_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match="label_names must have one name for each of the 10 classes, got 3"):
        timm_eps.save_pretrained(model, tmp_path, label_names=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"ResNet has no gates; call timm_eps\.add_gates\(model\) first"):
        timm_eps.save_pretrained(timm.create_model("resnet18"), tmp_path)
    with pytest.raises(ValueError, match="EpsResNet cannot be rebuilt from a name"):
        timm_eps.save_pretrained(timm_eps.models.eps_resnet.EpsResNet([1, 1, 1]), tmp_path)
    with pytest.raises(ValueError, match="results lacks architecture, arguments"):
        timm_eps.save_pretrained(model, tmp_path, results={"eval_accuracy": 0.9})
    with pytest.raises(ValueError, match="Got a compiled model"):
        timm_eps.save_pretrained(torch.compile(model), tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileExistsError):
        timm_eps.save_pretrained(model, tmp_path / "file")

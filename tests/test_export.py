"""Plain export: stock timm and stock transformers load the result without this package, with equal logits."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import timm
import torch
from conftest import close, mostly_slow, tiny_net
from torch import nn

import timm_eps
from timm_eps import EpsResNetForImageClassification
from timm_eps.surgery.branches import gates, probe_batch, slots_by_block

STOCK = """
import sys, torch, timm
from transformers import AutoModelForImageClassification
directory = sys.argv[1]
case = torch.load(directory + "/case.pt")
by_timm = timm.create_model("local-dir:" + directory, pretrained=True).eval()
by_transformers = AutoModelForImageClassification.from_pretrained(directory).eval()
with torch.no_grad():
    assert torch.equal(by_timm(case["images"]), case["logits"])
    torch.testing.assert_close(by_transformers(case["images"]).logits, case["logits"], rtol=0, atol=1e-6)
assert sum(p.numel() for p in by_timm.parameters()) == case["parameters"]
assert "timm_eps" not in sys.modules
"""
# The smallest network of each family. Published sizes are slow.
SMALL = {
    "test_resnet": {"layers": (2, 3, 1, 2)},
    "resnetv2_18": {"channels": (16, 32, 64, 128)},
    "test_convnext": {},
    "test_vit": {},
    "test_mambaout": {},
}
PUBLISHED = ["resnet50", "resnetv2_50", "seresnext26d_32x4d", "convnext_atto", "vit_tiny_patch16_224"]
PUBLISHED += ["mambaout_femto", "tresnet_m"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]


def trained(name: str, **kwargs) -> nn.Module:
    """A twin whose norms have statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = timm.create_model(f"eps_{name}", num_classes=5, **kwargs)
    with torch.no_grad():
        model.train()(probe_batch(model))
    return model.eval()


def blocks_of(model: nn.Module) -> dict[str, list[str]]:
    return slots_by_block(model, gates(model))


def close_blocks(model: nn.Module, *paths: str) -> None:
    close(model, *(slot for path in paths for slot in blocks_of(model)[path]))


@pytest.mark.parametrize("name", [*mostly_slow(SMALL, 0), *SLOW])
def test_stock_libraries_load_it(name, tmp_path):
    model = trained(name, **SMALL.get(name, {}))
    later = [path for path in blocks_of(model) if not path.endswith(".0")]
    close_blocks(model, *random.Random(0).sample(later, (len(later) + 1) // 2))
    images = probe_batch(model)
    with torch.no_grad():
        logits = model(images)
    told = timm_eps.export_timm(model, tmp_path)
    assert told["architecture"] == name
    assert told["zeroed"] == []
    timm_eps.remove_closed(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    torch.save({"images": images, "logits": logits, "parameters": parameters}, tmp_path / "case.pt")
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path)], check=True)
    stock = timm.create_model(told["architecture"], num_classes=5, **told["model_args"])
    assert sum(parameter.numel() for parameter in stock.parameters()) == parameters


def test_what_stands_in_the_way_is_said_and_can_be_zeros(tmp_path):
    """A first block with a kept shortcut, and a block with one of two branches, are written in full on request."""
    model = trained("test_vit")
    close_blocks(model, "blocks.2")
    close(model, "blocks.4.drop_path1")
    with pytest.raises(
        ValueError, match=r"blocks\.4 is not an identity without blocks\.4\.drop_path1\. zero_branches=True"
    ):
        timm_eps.export_timm(model, tmp_path)
    assert not (tmp_path / "config.json").exists()
    told = timm_eps.export_timm(model, tmp_path, zero_branches=True)
    assert told["zeroed"] == ["blocks.4.drop_path1"]
    assert told["model_args"]["depth"] == len(model.blocks) - 1
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = probe_batch(model)
    assert torch.equal(stock(images), model(images))
    assert not stock.blocks[3].attn.proj.weight.any()


def test_a_stage_keeps_a_block(tmp_path):
    model = trained("test_convnext")
    stage = [path for path in blocks_of(model) if path.startswith("stages.3.")]
    close_blocks(model, *stage)
    with pytest.raises(ValueError, match=r"stages\.3\.blocks would have no block"):
        timm_eps.export_timm(model, tmp_path)
    told = timm_eps.export_timm(model, tmp_path, zero_branches=True)
    assert told["zeroed"] == [f"{stage[0]}.drop_path"]


def test_blocks_that_know_their_position(tmp_path):
    """Every second block of a Swin shifts its windows, so the removal of one block would change all later ones."""
    model = trained("swin_tiny_patch4_window7_224", embed_dim=24, num_heads=(1, 2, 4, 8))
    close_blocks(model, "layers.2.blocks.1")
    with pytest.raises(ValueError, match="its blocks depend on their position"):
        timm_eps.export_timm(model, tmp_path)
    told = timm_eps.export_timm(model, tmp_path, zero_branches=True)
    assert told["zeroed"] == ["layers.2.blocks.1.drop_path1", "layers.2.blocks.1.drop_path2"]
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = probe_batch(model)
    assert torch.equal(stock(images), model(images))


def test_labels_and_transformers_models(tmp_path):
    model = trained("test_resnet", layers=(1, 3, 1, 1))
    close_blocks(model, "layer2.1")
    wrapper = EpsResNetForImageClassification.from_timm(model, id2label=dict(enumerate("abcde")))
    timm_eps.export_timm(wrapper, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == list("abcde")
    assert config["model_args"]["layers"] == [1, 2, 1, 1]
    assert "removed" not in config["model_args"]
    assert len(gates(model)) == 6  # the model itself is unchanged


def test_without_a_classifier(tmp_path):
    model = timm.create_model("eps_test_vit", num_classes=0).eval()
    close_blocks(model, "blocks.1")
    timm_eps.export_timm(model, tmp_path)
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = probe_batch(model)
    assert torch.equal(stock(images), model(images))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="eps_resnet20 is not an architecture of timm"):
        timm_eps.export_timm(tiny_net(), tmp_path)
    with pytest.raises(ValueError, match="has no gates"):
        timm_eps.export_timm(timm.create_model("resnet18"), tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileExistsError):
        timm_eps.export_timm(trained("test_vit"), tmp_path / "file")


@pytest.mark.parametrize("name", mostly_slow(["m.onnx", "./m.onnx", "new/deeper/m.onnx"], 2))
def test_onnx_by_any_path(tmp_path, monkeypatch, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("eps_resnet20", num_classes=3).eval()
    timm_eps.export_onnx(model, name)
    images = torch.randn(3, 3, 32, 32)
    (logits,) = onnxruntime.InferenceSession(name).run(None, {"pixel_values": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)

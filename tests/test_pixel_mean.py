"""The pixel mean as a part of the network: every loader subtracts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conftest import SLOTS
from transformers import AutoModelForImageClassification

import timm_eps
import train_hf
from timm_eps.models.cifar_blocks import PixelMean
from timm_eps.surgery.branches import gates
from timm_eps.training import data

ROOT = Path(__file__).parent.parent


@pytest.fixture
def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network that subtracts a mean, and the same network without the mean."""
    with_mean = timm.create_model("eps_resnet20", pixel_mean=(8, 8)).eval()
    with_mean.stem.pixel_mean.mean.normal_()
    plain = timm.create_model("eps_resnet20").eval()
    plain.load_state_dict({k: v for k, v in with_mean.state_dict().items() if "pixel_mean" not in k})
    return with_mean, plain


def test_the_mean_is_taken_off(pair, images):
    with_mean, plain = pair
    shifted = images - with_mean.stem.pixel_mean.mean
    assert torch.equal(with_mean(images), plain(shifted))
    assert torch.equal(with_mean.forward_intermediates(images)[1][2], plain.forward_intermediates(shifted)[1][2])
    assert with_mean.state_dict().keys() - plain.state_dict().keys() == {"stem.pixel_mean.mean"}


def test_it_is_no_parameter_and_does_not_decay(pair):
    assert [p.shape for p in pair[0].parameters()] == [p.shape for p in pair[1].parameters()]


def test_compiles_and_scripts(pair, images):
    with_mean, _ = pair
    expected = with_mean(images)
    assert torch.equal(torch.jit.script(with_mean)(images), expected)
    assert torch.equal(torch.fx.symbolic_trace(with_mean)(images), expected)
    assert torch.equal(torch.export.export(with_mean, (images,)).module()(images), expected)


def test_branches_are_removed_though_other_sizes_do_not_run(pair, images):
    """The default size of the architecture would not run through this network."""
    with_mean, _ = pair
    for slot in SLOTS[1::2]:
        gates(with_mean)[slot].closed = True
    expected = with_mean(images)
    assert timm_eps.remove_closed(with_mean) == SLOTS[1::2]
    assert torch.equal(with_mean(images), expected)
    again = timm.create_model("eps_resnet20", pixel_mean=(8, 8), removed=SLOTS[1::2]).eval()
    again.load_state_dict(with_mean.state_dict())
    assert torch.equal(again(images), expected)


def test_trained_saved_and_loaded_by_everyone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timm_eps.training.launching.available_cores", lambda: 1)
    train_hf.main(
        ["--architecture", "eps_resnet20", "--num_train_epochs", "3", "--max_train_samples", "200", "--keep", "4",
         "--epsilon_warmup_epochs", "1", "--ramp_epochs", "1", "--patience", "1", "--per_pixel_mean",
         "--with_remote_code", "--output_dir", str(tmp_path)]
    )  # fmt: skip
    assert "timm equal, AutoModelForImageClassification equal, pipeline equal" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    cfg = model.config.pretrained_cfg
    assert isinstance(model.timm_model.stem.pixel_mean, PixelMean)
    mean, std = (torch.tensor(cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    drawn = data.sample(data.load_digits(0)["train"], 200, 0)
    expected = data.ImageTensors.decode(drawn, cfg).images.double().mean(0) / 255
    torch.testing.assert_close((model.timm_model.stem.pixel_mean.mean * std + mean).double(), expected)
    assert expected.std() > 0.1, "of pixels, not of channels"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streaming", "--dataset_name", "x"], "--per_pixel_mean and --streaming exclude each other"),
        (["--pretrained"], "--per_pixel_mean and --pretrained exclude each other"),
        (["--augmentation", "resized_crop"], "--per_pixel_mean needs --augmentation crop or distort"),
        (["--model_name_or_path", "x"], "--model_name_or_path and --per_pixel_mean exclude each other"),
    ],
)
def test_where_it_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train_hf.parse_arguments(["--per_pixel_mean", *arguments])
    assert message in capsys.readouterr().err


def test_other_networks_have_none(tmp_path):
    with pytest.raises(
        ValueError, match="--per_pixel_mean works only for the paper's CIFAR networks, not for eps_resnet18"
    ):
        train_hf.main(["--architecture", "eps_resnet18", "--per_pixel_mean", "--output_dir", str(tmp_path)])

"""Every way to copy or save a model, for every state of its branches, in several families of networks.

    python tests/travel.py            # prints the table of docs/reliability.md

A cell is ``equal`` if the copy gives the model's outputs bit for bit, or ``refused`` if the attempt raises. Any other
outcome raises AssertionError.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers import logging as hf_logging

import timm_eps
from timm_eps import EpsResNetForImageClassification
from timm_eps.names import base_name, is_cifar_network
from timm_eps.surgery.branches import gates
from timm_eps.surgery.removal import remove

__all__ = ["FAMILIES", "STATES", "WAYS", "cell", "make", "table"]

# Name, arguments, image side, and a slot whose removal leaves a part of its block: another branch, or a shortcut.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "CIFAR network": ("eps_resnet20", {}, 8, "stages.1.blocks.0.drop_path"),
    "ResNet": ("eps_test_resnet", {}, 32, "layer2.0.drop_path"),
    "ConvNeXt": ("eps_test_convnext", {}, 32, ""),
    "ViT": ("eps_test_vit", {"img_size": 32}, 32, "blocks.2.drop_path1"),
    "Swin": (
        "eps_swin_tiny_patch4_window7_224",
        {"img_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        32,
        "layers.1.blocks.0.drop_path1",
    ),
    "EfficientNet": ("eps_tf_efficientnet_lite0", {}, 32, ""),
    "MobileNetV3": ("eps_mobilenetv3_small_050", {}, 32, ""),
    "RegNet": ("eps_regnetx_002", {}, 32, "s3.b1.drop_path"),
}
STATES = ("open", "closed", "block removed", "half removed")


def make(family: str, state: str) -> tuple[nn.Module, Tensor] | None:
    """A network in a state of its branches, and images for it. None if no block of the family has two parts."""
    name, arguments, side, half = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        model.train()(images)
    model.eval()
    slots = list(gates(model))
    block = [slot for slot in slots if slot.rpartition(".")[0] == slots[-1].rpartition(".")[0]]
    if state == "half removed" and not half:
        return None
    chosen = {"open": [], "closed": slots[-1:], "block removed": block, "half removed": [half]}[state]
    for slot in chosen:
        gates(model)[slot].closed = True
    if state.endswith("removed"):
        assert remove(model, chosen) == chosen
    return model, images


def fresh(model: nn.Module) -> nn.Module:
    """A new network of the same name, as a user with only the weights builds it."""
    return timm.create_model(**_name_and_arguments(model), num_classes=5)


def _name_and_arguments(model: Any) -> dict[str, Any]:
    name = model.pretrained_cfg["architecture"]
    return {"model_name": name, **next(arguments for n, arguments, *_ in FAMILIES.values() if n == name)}


def state_dict(model: nn.Module, place: Path) -> nn.Module:
    other = fresh(model)
    other.load_state_dict(model.state_dict())
    return other


def plain_dict(model: nn.Module, place: Path) -> nn.Module:
    other = fresh(model)
    other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return other


def torch_save_weights(model: nn.Module, place: Path) -> nn.Module:
    torch.save(model.state_dict(), place / "w.pt")
    other = fresh(model)
    other.load_state_dict(torch.load(place / "w.pt", weights_only=True))
    return other


def torch_save_model(model: nn.Module, place: Path) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def deepcopy(model: nn.Module, place: Path) -> nn.Module:
    return copy.deepcopy(model)


def safetensors_file(model: nn.Module, place: Path) -> nn.Module:
    safetensors.torch.save_file(model.state_dict(), place / "w.safetensors")
    other = fresh(model)
    other.load_state_dict(safetensors.torch.load_file(place / "w.safetensors"))
    return other


def safetensors_model(model: nn.Module, place: Path) -> nn.Module:
    safetensors.torch.save_model(model, str(place / "w.safetensors"))
    other = fresh(model)
    safetensors.torch.load_model(other, place / "w.safetensors")
    return other


def timm_checkpoint_path(model: nn.Module, place: Path) -> nn.Module:
    torch.save({"state_dict": model.state_dict()}, place / "w.pth")
    return timm.create_model(**_name_and_arguments(model), num_classes=5, checkpoint_path=str(place / "w.pth"))


def timm_save_for_hf(model: nn.Module, place: Path) -> nn.Module:
    timm.models.save_for_hf(model, str(place), safe_serialization=True)
    return timm.create_model(f"local-dir:{place}", pretrained=True)


def stock_timm(model: nn.Module, place: Path) -> nn.Module:
    name = _name_and_arguments(model)
    if is_cifar_network(architecture := name.pop("model_name")):
        raise ValueError("timm has no such network.")
    other = timm.create_model(base_name(architecture), num_classes=5, **name)
    other.load_state_dict(model.state_dict())
    return other


def ema_v3(model: nn.Module, place: Path) -> nn.Module:
    ema = ModelEmaV3(model, decay=0.5)
    ema.update(model)
    return ema.module


def averaged_model(model: nn.Module, place: Path) -> nn.Module:
    average = AveragedModel(model)
    average.update_parameters(model)
    return average.module


def accelerate_save_model(model: nn.Module, place: Path) -> nn.Module:
    Accelerator(cpu=True).save_model(model, str(place))
    other = fresh(model)
    other.load_state_dict(safetensors.torch.load_file(place / "model.safetensors"))
    return other


def save_pretrained_timm(model: nn.Module, place: Path) -> nn.Module:
    timm_eps.save_pretrained(model, place)
    return timm.create_model(f"local-dir:{place}", pretrained=True)


def save_pretrained_auto(model: nn.Module, place: Path) -> nn.Module:
    EpsResNetForImageClassification.from_timm(model).save_pretrained(place)
    return AutoModelForImageClassification.from_pretrained(place).timm_model


def _training_checkpoint(model: nn.Module, place: Path) -> None:
    wrapper = EpsResNetForImageClassification.from_timm(model)
    wrapper.keeps_training_parts = True
    wrapper.save_pretrained(place)


def checkpoint_timm(model: nn.Module, place: Path) -> nn.Module:
    _training_checkpoint(model, place)
    return timm.create_model(f"local-dir:{place}", pretrained=True)


def checkpoint_auto(model: nn.Module, place: Path) -> nn.Module:
    _training_checkpoint(model, place)
    return AutoModelForImageClassification.from_pretrained(place).timm_model


def stock_wrapper(model: nn.Module, place: Path) -> nn.Module:
    described = _name_and_arguments(model)
    name = described.pop("model_name")
    config = TimmWrapperConfig(architecture=name, model_args=described, num_labels=5)
    wrapper = TimmWrapperForImageClassification(config)
    wrapper.timm_model = model
    wrapper.save_pretrained(place)
    other = TimmWrapperForImageClassification.from_pretrained(place).timm_model
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data = tensor.data.clone()  # copied from the mapped file to aligned addresses, where kernels round alike
    return other


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "`load_state_dict(state_dict())`": state_dict,
    "the same as a plain dict of copies": plain_dict,
    "`torch.save` of the state dict": torch_save_weights,
    "`torch.save` of the model": torch_save_model,
    "`copy.deepcopy`": deepcopy,
    "`safetensors` `save_file`, `load_file`": safetensors_file,
    "`safetensors` `save_model`, `load_model`": safetensors_model,
    "timm's `checkpoint_path=`": timm_checkpoint_path,
    "timm's `save_for_hf`, `local-dir:`": timm_save_for_hf,
    "timm's network without gates": stock_timm,
    "timm's `ModelEmaV3`": ema_v3,
    "torch's `AveragedModel`": averaged_model,
    "Accelerate's `save_model`": accelerate_save_model,
    "`timm_eps.save_pretrained`, loaded by timm": save_pretrained_timm,
    "`save_pretrained` of the class, loaded by `AutoModel…`": save_pretrained_auto,
    "a training checkpoint, loaded by timm": checkpoint_timm,
    "a training checkpoint, loaded by `AutoModel…`": checkpoint_auto,
    "a stock `TimmWrapper` model": stock_wrapper,
}


def cell(model: nn.Module, images: Tensor, way: Callable[[nn.Module, Path], nn.Module]) -> str:
    """Result for a model and one way to copy it: ``'equal'`` or ``'refused'``.

    Raises:
        AssertionError: The copy gives other outputs without an error.
    """
    with torch.no_grad(), tempfile.TemporaryDirectory() as place:
        expected = model(images)
        try:
            other = way(model, Path(place))
        except (ValueError, RuntimeError):
            return "refused"
        assert torch.equal(other.eval()(images), expected), f"{way.__name__}: a copy computes something else"
        assert torch.equal(model(images), expected), f"{way.__name__}: the model itself has changed"
    return "equal"


def table() -> str:
    """The table of docs/reliability.md: one row per way, one column per state, over all families."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for family in FAMILIES:
        for state in STATES:
            if (made := make(family, state)) is not None:
                for name, way in WAYS.items():
                    answers = found.setdefault((name, state), {})
                    answers.setdefault(cell(*made, way), []).append(family)
    lines = ["| way | " + " | ".join(STATES) + " |", "|---|" + "---|" * len(STATES)]
    for name in WAYS:
        cells = []
        for state in STATES:
            parts = found[name, state]
            whole = next(iter(parts)) if len(parts) == 1 else None
            cells.append(whole or "; ".join(f"{answer}: {', '.join(where)}" for answer, where in sorted(parts.items())))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    hf_logging.disable_progress_bar()
    print(table())

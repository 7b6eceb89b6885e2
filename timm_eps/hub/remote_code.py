"""Code in a saved directory, with which transformers loads the model on machines without this package.

The code of the CIFAR networks builds them from scratch. For a twin, stock timm builds the dense network, and the edits
that ``config.json`` then holds remove the branches.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from ..files import (
    config_checks,
    edits,
    standalone,
    standalone_twin,
    standins,
    strict_loading,
    value_checks,
    weight_checks,
)
from ..files.edits import edits_as_json, edits_digest, without_overtaken
from ..files.weight_checks import WEIGHTS
from ..hf.configuration_eps_resnet import EpsResNetConfig
from ..models.eps_resnet import EpsResNet
from ..names import base_name, is_cifar_network
from ..surgery.branches import evaluating, probe_batch
from ..surgery.collapse import plan_collapse
from ..surgery.removal import same_outputs

__all__ = ["CODE_FILES", "add_remote_code", "check_remote_code", "check_remote_name"]

# Name of standalone.py or standalone_twin.py in a saved directory.
_CODE = "modeling_eps_resnet.py"
_CHECKS = (config_checks, strict_loading, value_checks, weight_checks)
_EDITS = (edits, standins)
CODE_FILES = (_CODE, *(Path(str(module.__file__)).name for module in (*_CHECKS, *_EDITS)))
_CLASSES = {
    "AutoBackbone": "EpsResNetBackbone",
    "AutoConfig": "EpsResNetConfig",
    "AutoModel": "EpsResNetModel",
    "AutoModelForImageClassification": "EpsResNetForImageClassification",
}


def check_remote_code(body: nn.Module) -> None:
    """Check that the code can build a network, before anything is written.

    Args:
        body: A timm model of this package.

    Raises:
        ValueError: The code does not support this form of a CIFAR network, or timm does not have the network.
    """
    known = EpsResNetConfig.from_timm(body)
    check_remote_name(known.architecture)
    if not isinstance(body, EpsResNet):
        return
    model_args = {name: value for name, value in (known.model_args or {}).items() if name != "closed"}  # not written
    # Raises if it cannot build the network.
    _ = standalone.EpsResNetConfig(architecture=known.architecture, model_args=model_args).network


def check_remote_name(architecture: str) -> None:
    """Check that the code can build networks of this name.

    Raises:
        ValueError: Neither timm nor the code of the CIFAR networks does.
    """
    if not is_cifar_network(architecture):
        _stock_name(architecture)


def add_remote_code(directory: Path, body: nn.Module) -> None:
    """Add the code to a directory, and refer to it in ``config.json``.

    Args:
        directory: Directory of the saved model.
        body: The timm model that was saved.

    Raises:
        ValueError: What the code builds computes something else.
    """
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    is_cifar = isinstance(body, EpsResNet)
    shutil.copyfile(str((standalone if is_cifar else standalone_twin).__file__), directory / _CODE)
    for module in _CHECKS if is_cifar else (*_CHECKS, *_EDITS):
        shutil.copy(str(module.__file__), directory)
    classes = {name: entry for name, entry in _CLASSES.items() if is_cifar or entry in standalone_twin.__all__}
    config["auto_map"] = {name: f"{_CODE.removesuffix('.py')}.{entry}" for name, entry in classes.items()}
    # With this package the class is found by the model type, without it by this name.
    config["image_processor_type"] = "TimmWrapperImageProcessor"
    if not is_cifar:
        config["timm_architecture"] = _stock_name(config["architecture"])
        config["edits"] = edits_as_json(_edits_of(config))
        removed = (config.get("model_args") or {}).get("removed", ())
        config["edits_sha256"] = edits_digest(config["timm_architecture"], removed, config["edits"])
        _prove(config, directory, body)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stock_name(architecture: str) -> str:
    name = base_name(architecture)
    if name == architecture or not timm.is_model(name):
        raise ValueError(
            f"remote_code: {architecture} is no architecture of timm, so stock timm cannot build it. "
            "timm_eps.export_onnx and timm_eps.export_program write files that need neither."
        )
    return name


def _edits_of(config: dict[str, Any]) -> list[edits.Edit]:
    """The edits that make the pruned network of the one that timm builds."""
    model_args = dict(config.get("model_args") or {})
    removed = set(model_args.pop("removed", ()))
    if not removed:
        return []
    with torch.device("meta"):
        dense = timm.create_model(
            config["architecture"], pretrained=False, num_classes=config["num_classes"], **model_args
        )
    return without_overtaken(edit for plan in plan_collapse(dense, removed) for edit in plan.edits)


def _prove(config: dict[str, Any], directory: Path, body: nn.Module) -> None:
    """Build the network as the code in the directory does, and compare outputs bit for bit."""
    described: Any = standalone_twin.EpsResNetConfig.from_dict(json.loads(json.dumps(config)))
    rebuilt = standalone_twin.stock_network(described, config["num_classes"])
    rebuilt.load_state_dict(load_file(directory / WEIGHTS))
    rebuilt.to(next(body.parameters()))
    with evaluating(body), evaluating(rebuilt):
        batch = probe_batch(body)
        if not same_outputs(body(batch), rebuilt(batch)):
            raise ValueError(
                f"remote_code: stock timm and the edits of this {type(body).__name__} compute something else. Save "
                "without it, and use timm_eps.export_onnx or timm_eps.export_program."
            )

"""Networks of a given structure: with a share of the channels removed, or as described by a record."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from benchmarks import channels
from benchmarks.pretrained.cases import CASES, Case
from timm_eps import report
from timm_eps.names import is_cifar_network
from timm_eps.surgery.branches import gates


def without_gates(model: nn.Module) -> nn.Module:
    """The model with the modules that filled the slots before the gates. Unused gates would cost a pass each."""
    for slot, gate in gates(model).items():
        path, _, name = slot.rpartition(".")
        setattr(model.get_submodule(path), name, gate.drop_path)
    return model


def sample(case: Case, batch_size: int = 2) -> torch.Tensor:
    """Black images (B, 3, side, side)."""
    return torch.zeros(batch_size, 3, case.side, case.side)


def narrowed(case: Case, model: nn.Module, ratio: float) -> nn.Module:
    """A network of a case, on the CPU, with a share of each layer's channels removed."""
    body = channels.plain(model.cpu()) if is_cifar_network(case.architecture) else model.cpu()
    return channels.without(body, ratio, sample(case))


def rebuilt(record: dict[str, Any]) -> nn.Module:
    """An untrained network without gates, with the structure described by a record.

    Raises:
        ValueError: The number of parameters differs from the record.
    """
    case = CASES[record["case"]]
    built = case.smaller if record["method"] == "smaller" and case.smaller else case
    classes = len(case.classes)
    if "ratio" in record:
        model = narrowed(built, timm.create_model(built.architecture, num_classes=classes), record["ratio"])
    else:
        model = timm.create_model(built.architecture, num_classes=classes, removed=record["removed"])
    if (found := report.count_parameters(model)) != record["params"]:
        raise ValueError(f"The rebuilt network has {found} parameters, the record of the run {record['params']}.")
    return without_gates(model).eval()

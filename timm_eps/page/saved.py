"""Checked contents of a directory: the network, its structure by stage, the results of its run, and an analysis."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from ..analysis.measure import Size, size_of
from ..analysis.report import Analysis
from ..files.config_checks import check_slots
from ..files.value_checks import check_rate, check_text, is_whole, refuse, shortened
from ..files.weight_checks import weight_files
from ..hf.modeling_eps_resnet import EpsResNetForImageClassification, EpsResNetModel
from ..hf.pretrained_eps_resnet import EpsResNetPreTrainedModel
from ..hub.saving import RESULTS
from ..models.stored import network_args, read_config
from ..report import count_parameters
from ..surgery.branches import gates, input_size, slots_by_block, stage_of
from ..surgery.removal import closed_slots, natural_order, removed_slots
from .timings import Timing, read_timings

__all__ = ["RunResults", "SavedNetwork", "Stage", "load_analysis", "load_network", "load_results"]

ANALYSIS = "branches.json"


class Stage(NamedTuple):
    """A stage of the dense network.

    Attributes:
        name: Path of the stage.
        blocks: For each block, its slots and whether each branch stayed.
        dense: Parameters in the dense network.
        now: Parameters in the saved network.
    """

    name: str
    blocks: list[dict[str, bool]]
    dense: int
    now: int

    @property
    def total(self) -> int:
        """Number of branches of the dense network."""
        return sum(map(len, self.blocks))

    @property
    def kept(self) -> int:
        """Number of branches that stayed."""
        return sum(sum(block.values()) for block in self.blocks)


@dataclass(frozen=True)
class SavedNetwork:
    """A saved network and the dense network of its architecture.

    Attributes:
        directory: Directory of the saved network.
        model: The transformers model, in evaluation mode.
        build_dense: Builds the dense network with random weights.
        stages: The stages, in order.
        dense: Parameters and multiply-adds of the dense network.
        now: Parameters and multiply-adds of the saved network.
        bytes: Size of the files with the weights.
    """

    directory: Path
    model: EpsResNetPreTrainedModel
    build_dense: Callable[[], nn.Module]
    stages: list[Stage]
    dense: Size
    now: Size
    bytes: int

    @property
    def body(self) -> Any:
        """The timm model."""
        return self.model.timm_model

    @property
    def architecture(self) -> str:
        """timm's name of the dense network."""
        return self.model.config.architecture

    @property
    def class_names(self) -> list[str]:
        """The classes by number; empty without a classifier."""
        names: Any = self.model.config.id2label
        return [names[number] for number in range(self.body.num_classes)]

    @property
    def slots(self) -> dict[str, bool]:
        """Whether the branch of each slot stayed."""
        return {slot: kept for stage in self.stages for block in stage.blocks for slot, kept in block.items()}

    @property
    def removed(self) -> list[str]:
        """The slots of the removed branches."""
        return [slot for slot, kept in self.slots.items() if not kept]

    @property
    def kept(self) -> int:
        """Number of branches that stayed."""
        return len(self.slots) - len(self.removed)


def load_network(directory: str | os.PathLike[str]) -> SavedNetwork:
    """Load and check a saved network, and count the parameters and multiply-adds of both networks.

    Raises:
        ValueError: The directory holds no network of this package, or its files contradict each other.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} holds no config.json; timm_eps.save_pretrained writes such a directory.")
    classes = read_config(directory / "config.json").get("num_classes")
    kind: Any = EpsResNetForImageClassification if classes else EpsResNetModel
    model = kind.from_pretrained(directory).eval()
    body = model.timm_model
    arguments = network_args(model.config.model_args)

    def build_dense() -> nn.Module:
        dense = timm.create_model(model.config.architecture, num_classes=body.num_classes, **arguments)
        dense.pretrained_cfg = body.pretrained_cfg  # an exported file takes images of one size
        return dense.eval()

    with torch.device("meta"):
        dense = build_dense()
    shape = input_size(body)
    return SavedNetwork(
        directory, model, build_dense, _stages(dense, body), size_of(dense, shape), size_of(body, shape),
        sum(path.stat().st_size for path in weight_files(directory)),
    )  # fmt: skip


def _stages(dense: nn.Module, body: nn.Module) -> list[Stage]:
    gone = {*removed_slots(body), *closed_slots(body)}
    stages: dict[str, list[dict[str, bool]]] = {}
    for slots in slots_by_block(dense, sorted(gates(dense), key=natural_order)).values():
        stages.setdefault(stage_of(slots[0]), []).append({slot: slot not in gone for slot in slots})
    return [Stage(name, blocks, _within(dense, name), _within(body, name)) for name, blocks in stages.items()]


def _within(body: nn.Module, path: str) -> int:
    return sum(weight.numel() for name, weight in body.named_parameters() if name.startswith(f"{path}."))


@dataclass(frozen=True)
class RunResults:
    """Contents of ``all_results.json``. A fraction that the run did not measure is None.

    Attributes:
        accuracy: Accuracy of the saved network.
        dense_accuracy: Accuracy of the dense network.
        by_class: Accuracy of the saved network by class.
        dense_by_class: Accuracy of the dense network by class.
        test_accuracy: Accuracy of the saved network on the test split.
        dense_test_accuracy: Accuracy of the dense network on the test split.
        timings: Latencies.
        values: All values of the file.
    """

    accuracy: float | None
    dense_accuracy: float | None
    by_class: dict[str, float]
    dense_by_class: dict[str, float]
    test_accuracy: float | None
    dense_test_accuracy: float | None
    timings: list[Timing]
    values: dict[str, Any]


def load_results(network: SavedNetwork) -> RunResults | None:
    """Read ``all_results.json`` beside a network. None if there is no such file.

    Raises:
        ValueError: The file is no JSON, a field shown by the page has another type, or it describes another network.
    """
    path = network.directory / RESULTS
    if not path.is_file():
        return None
    values = _read_json(path)
    _check_network(values, network)
    for name in ("dataset", "dataset_id", "eval_split", "hardware", "base_model", "license"):
        if values.get(name) is not None:
            check_text(f"{name} of {RESULTS}", values[name], most=1000)
    for name in ("eval_images", "train_images", "test_images", "seed", "num_processes"):
        if values.get(name) is not None and not is_whole(values[name], 0, 2**63):
            raise refuse(f"{name} of {RESULTS}", "a whole number of at least 0", values[name])
    for name in ("arguments", "versions"):
        if not isinstance(values.get(name) or {}, dict):
            raise refuse(f"{name} of {RESULTS}", "an object", values[name])
    return RunResults(
        _rate(values, "eval_accuracy"),
        _rate(values, "dense_eval_accuracy"),
        _rates(values, "eval_accuracy_by_class"),
        _rates(values, "dense_eval_accuracy_by_class"),
        _rate(values, "test_accuracy"),
        _rate(values, "dense_test_accuracy"),
        read_timings(values, RESULTS),
        values,
    )


def _read_json(path: Path) -> dict[str, Any]:
    def refuse_constant(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {str(error).splitlines()[0][:100]}.") from None
    if not isinstance(values, dict):
        raise refuse(path.name, "an object", values)
    return values


def _check_network(values: Mapping[str, Any], network: SavedNetwork) -> None:
    known = {"params": count_parameters(network.body), "architecture": network.architecture}
    for name, own in known.items():
        if values.get(name) is not None and values[name] != own:
            raise ValueError(
                f"{RESULTS} describes another network: its {name} is {shortened(values[name])}, the saved network has "
                f"{own!r}. Delete the file, or save the network with its own results."
            )
    removed = values.get("removed")
    if removed is not None and set(check_slots(f"removed of {RESULTS}", removed)) != set(network.removed):
        raise ValueError(
            f"{RESULTS} describes another network: it removed {len(removed)} branches, the saved network lacks "
            f"{len(network.removed)} or other ones. Delete the file, or save the network with its own results."
        )


def _rate(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is not None:
        check_rate(f"{name} of {RESULTS}", value)
    return value


def _rates(values: Mapping[str, Any], name: str) -> dict[str, float]:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise refuse(f"{name} of {RESULTS}", "an object of accuracies by class", found)
    for label, value in found.items():
        check_rate(f"{name}[{shortened(label)}] of {RESULTS}", value)
    return found


def load_analysis(network: SavedNetwork, given: Analysis | None = None) -> Analysis | None:
    """The analysis of the dense network: the given one, or ``branches.json`` beside the network. None without either.

    Raises:
        ValueError: The file is no analysis, or describes another network.
    """
    path = network.directory / ANALYSIS
    if given is None and not path.is_file():
        return None
    found = given or Analysis.load(path)
    slots: Iterable[str] = [branch.slot for branch in found.branches]
    if strangers := [slot for slot in slots if slot not in network.slots]:
        raise ValueError(
            f"{'The analysis' if given else ANALYSIS} describes another network: it has a branch "
            f"{shortened(strangers[0])}, {network.architecture} has none there."
        )
    return found if found.branches else None

"""The compared methods: each trains a network with the same recipe, and returns its cost.

A method is a function of a :class:`Bench`, which holds the data of one run, and returns the network that is left. Those
that begin with the dense network take it, trained, from the run of the same seed and fold.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import set_seed
from timm.utils import reparameterize_model
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

import timm_eps
from benchmarks import channels
from benchmarks.structures import evenly
from timm_eps import report
from timm_eps.surgery.branches import gates
from timm_eps.training.arguments import Arguments, parse_arguments
from timm_eps.training.inputs import ImageData
from timm_eps.training.launching import start_accelerator
from train_hf import train


@dataclass
class Bench:
    """The data of one run, the networks of the runs that it builds on, and what it cost so far.

    Args:
        flags: Arguments of train_hf.py that all methods share.
        directory: Where this run may write.
        earlier: Directories of the runs that this one needs, by method.
    """

    flags: list[str]
    directory: Path
    earlier: dict[str, Path]
    epochs: int = 0
    train_seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.args = self.arguments()
        self.accelerator = start_accelerator(self.args)
        self.data = ImageData.load(self.args, self.accelerator)

    def arguments(self, *flags: str) -> Arguments:
        return parse_arguments([*self.flags, *flags, "--output_dir", str(self.directory)])

    def fit(self, *flags: str, model: nn.Module | None = None) -> nn.Module:
        """Train with the recipe, starting from a network if one is given. Returns the pruned network."""
        args = self.arguments(*flags)
        run, results = train(args, self.accelerator, self.data, model=model)
        self.epochs += args.training.num_train_epochs
        self.train_seconds += results["train_seconds"]
        self.accuracy = results["eval_accuracy"]
        timm_eps.remove_closed(run.model)
        return run.model

    def images(self, count: int) -> Tensor:
        """The first test images in the network's input format."""
        return self.data.sample(count, self.accelerator.device)

    def load(self, method: str) -> nn.Module:
        """The network of an earlier run, whose cost is added to this one's."""
        self.epochs += self.result(method)["epochs"]
        self.train_seconds += self.result(method)["train_seconds"]
        weight = self.args.paper.side_loss_weight
        set_seed(self.args.training.seed)  # the side head is not saved, so it is initialised again
        return AutoModelForImageClassification.from_pretrained(self.earlier[method], side_loss_weight=weight)

    def result(self, method: str) -> dict[str, Any]:
        return json.loads((self.earlier[method] / "result.json").read_text())

    def macs_ratio(self, method: str = "budget") -> float:
        """Ratio of the multiply-adds of the dense network to those of a method's network."""
        return self.result("dense")["macs"] / self.result(method)["macs"]

    def longer(self) -> tuple[str, str]:
        """Epochs that cost the dense training's multiply-adds, if the recipe removes its blocks when the ramp ends."""
        whole = self.args.pruning.epsilon_warmup_epochs + self.args.pruning.ramp_epochs
        return "--num_train_epochs", str(
            whole + round((self.args.training.num_train_epochs - whole) * self.macs_ratio())
        )

    def slots(self) -> list[str]:
        """All branches of the unpruned network."""
        return list(gates(timm.create_model(self.args.model.name)))


def dense(bench: Bench) -> nn.Module:
    return bench.fit("--no_gates")


def dense_without_side(bench: Bench) -> nn.Module:
    return bench.fit("--no_gates", "--side_loss_weight", "0")


def dense_with_as_many_epochs(bench: Bench) -> nn.Module:
    """Dense training for as many epochs as ε-ResNet gets for the compute of the shorter dense training."""
    return bench.fit("--no_gates", *bench.longer())


def pruned(bench: Bench) -> nn.Module:
    return bench.fit()


def pruned_with_dense_compute(bench: Bench) -> nn.Module:
    return bench.fit(*bench.longer())


def from_scratch(bench: Bench, removed: Sequence[str], *flags: str) -> nn.Module:
    return bench.fit("--no_gates", "--model_args", json.dumps({"removed": list(removed)}), *flags)


def scratch(bench: Bench) -> nn.Module:
    return from_scratch(bench, bench.result("budget")["removed"])


def with_dense_compute(bench: Bench, method: str) -> nn.Module:
    """A method's structure from scratch, for as many epochs as cost the dense training's multiply-adds."""
    epochs = round(bench.args.training.num_train_epochs * bench.macs_ratio(method))
    return from_scratch(bench, bench.result(method)["removed"], "--num_train_epochs", str(epochs))


def scratch_with_dense_compute(bench: Bench) -> nn.Module:
    return with_dense_compute(bench, "budget")


def shallow(bench: Bench) -> nn.Module:
    return from_scratch(bench, evenly(bench.slots(), bench.result("budget")["blocks"]))


def shallow_with_dense_compute(bench: Bench) -> nn.Module:
    return with_dense_compute(bench, "shallow")


def random_blocks(bench: Bench) -> nn.Module:
    model = bench.load("dense")
    count = len(bench.result("budget")["removed"])
    timm_eps.prune(model, random.Random(bench.args.training.seed).sample(bench.slots(), count))
    return bench.fit("--no_gates", model=model)


def stochastic_depth(bench: Bench) -> nn.Module:
    """Stochastic depth: branches are dropped at random, the last with probability 0.5 (Huang et al., ECCV 2016)."""
    model = bench.fit("--no_gates", "--model_args", json.dumps({"drop_path_rate": 0.5}))
    for gate in gates(model).values():
        gate.drop_path = nn.Identity()
    del model.config.model_args["drop_path_rate"]
    timm_eps.prune(model, evenly(bench.slots(), bench.result("budget")["blocks"]))
    return bench.fit("--no_gates", model=model)


def finetuned(bench: Bench) -> nn.Module:
    """The fine-tuning that Torch-Pruning gets too: a trained network, the same number of epochs, almost no warm-up."""
    few = bench.args.training.num_train_epochs // 15
    return bench.fit("--epsilon_warmup_epochs", str(few), model=bench.load("dense"))


def torch_pruning_to_size(bench: Bench) -> nn.Module:
    model, target = bench.load("dense"), bench.result("budget")["params"]
    bench.notes |= channels.prune(model, bench.images(2), lambda net: report.count_parameters(net) <= target)
    return bench.fit("--no_gates", "--side_loss_weight", "0", model=model)


def torch_pruning_to_latency(bench: Bench) -> nn.Module:
    model, batch = bench.load("dense"), bench.images(128)
    found = {"num_classes": model.config.num_labels, "removed": bench.result("budget")["removed"]}
    fast = timm.create_model(bench.args.model.name, **found).to(model.device)

    def is_as_fast(net: nn.Module) -> bool:
        latency = report.paired_latency({"fast": fast, "net": net}, batch)
        return latency["net"] <= latency["fast"]

    bench.notes |= channels.prune(model, batch[:2], is_as_fast)
    return bench.fit("--no_gates", "--side_loss_weight", "0", model=model)


@dataclass(frozen=True)
class Method:
    """A compared method.

    Args:
        name: Name in tables.
        make: Function that trains the network.
        needs: Methods whose runs this method builds on.
        alone: Whether the method measures speed, so that no other process may run.
    """

    name: str
    make: Callable[[Bench], nn.Module]
    needs: tuple[str, ...] = ()
    alone: bool = False


_WITH_DENSE_COMPUTE = Method(
    "ε-ResNet, ε by budget, with the dense network's compute", pruned_with_dense_compute, ("budget", "dense")
)
METHODS = {
    "dense": Method("dense", dense),
    "dense_without_side": Method("dense, without side supervision", dense_without_side),
    "budget": Method("ε-ResNet, ε by budget", pruned),
    "other_criterion": Method("ε-ResNet, ε by budget", pruned),
    "fixed": Method("ε-ResNet, ε fixed", pruned),
    "budget_with_dense_compute": _WITH_DENSE_COMPUTE,
    "other_pace": Method("ε-ResNet, ε by budget", pruned),
    "other_pace_with_dense_compute": _WITH_DENSE_COMPUTE,
    "smaller_budget": _WITH_DENSE_COMPUTE,
    "dense_with_as_many_epochs": Method(
        "dense, with the epochs of ε-ResNet at the dense network's compute",
        dense_with_as_many_epochs,
        ("budget", "dense"),
    ),
    "finetuned": Method("ε-ResNet from the trained dense network, ε by budget", finetuned, ("dense",)),
    "scratch": Method("the structure that ε-ResNet found, from scratch, same epochs", scratch, ("budget",)),
    "scratch_with_dense_compute": Method(
        "the structure that ε-ResNet found, from scratch, with the dense network's compute",
        scratch_with_dense_compute,
        ("budget", "dense"),
    ),
    "shallow": Method("the same number of blocks, evenly spread, from scratch", shallow, ("budget",)),
    "shallow_with_dense_compute": Method(
        "the same number of blocks, evenly spread, from scratch, with the dense network's compute",
        shallow_with_dense_compute,
        ("shallow", "dense"),
    ),
    "random_blocks": Method("random blocks of the dense network, fine-tuned", random_blocks, ("dense", "budget")),
    "stochastic_depth": Method("stochastic depth, then evenly removed, fine-tuned", stochastic_depth, ("budget",)),
    "torch_pruning_to_size": Method(
        "Torch-Pruning to as many parameters, fine-tuned", torch_pruning_to_size, ("dense", "budget")
    ),
    "torch_pruning_to_latency": Method(
        "Torch-Pruning to the same latency, fine-tuned", torch_pruning_to_latency, ("dense", "budget"), alone=True
    ),
}


def saved(model: nn.Module, directory: Path, images: Tensor) -> dict[str, Any]:
    """Save a network. Returns the file size, and whether timm and transformers load the file with the same logits.

    A network that timm and transformers cannot load is pickled, as Torch-Pruning's documentation recommends.
    """
    model.eval()
    with torch.no_grad():
        expected = model(images).logits
    found: dict[str, Any] = {}
    try:
        timm_eps.save_pretrained(model, directory)
    except ValueError as error:
        found["refused"] = str(error)
    for name, load in {
        "timm": lambda: timm.create_model(f"local-dir:{directory}", pretrained=True),
        "transformers": lambda: AutoModelForImageClassification.from_pretrained(directory),
    }.items():
        try:
            answer = load().to(images.device).eval()(images)
            found[name] = torch.equal(getattr(answer, "logits", answer), expected)
        except Exception as error:  # any error means that the file cannot be loaded
            found[name] = False
            found[f"{name} says"] = f"{type(error).__name__}: {error}"[:300]
    if found["timm"] and found["transformers"]:
        found["bytes"] = (directory / "model.safetensors").stat().st_size
    else:
        torch.save(reparameterize_model(model.timm_model), directory / "model.pt")
        found["bytes"] = (directory / "model.pt").stat().st_size
    return found


def measured(bench: Bench, model: nn.Module) -> dict[str, Any]:
    """Accuracy, structure and size of a trained network."""
    images = bench.images(32)
    body = model.timm_model
    removed = list(model.config.model_args.get("removed", []))
    return {
        "accuracy": bench.accuracy,
        "blocks": len(bench.slots()) - len(removed),
        "epochs": bench.epochs,
        "macs": report.count_macs(body, images[:1]),
        "params": report.count_parameters(body),
        "removed": removed,
        "saved": saved(model, bench.directory, images),
        "train_seconds": bench.train_seconds,
        **bench.notes,
    }

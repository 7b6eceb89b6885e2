"""The compared networks: how each one starts. All are trained with one recipe afterwards.

Structures are chosen on training images only. A dense network fine-tuned on these images is the teacher of its seed,
and provides the leave-one-out order of the branches.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import timm_eps
from benchmarks import channels
from benchmarks.pretrained import images, structures, training
from benchmarks.pretrained.cases import CASES, Case
from benchmarks.structures import evenly
from timm_eps import report
from timm_eps.criteria import stage_ends_first
from timm_eps.importance import importance_ranks
from timm_eps.surgery.branches import gates, stage_of

BATCH = 512  # images at once for comparing losses
SHARES = {"warmup_epochs": 3, "ramp_epochs": 12}  # of 50 periods
TIMED_REPEATS = 9
TIMING_CORES = frozenset({0, 1})


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        case: Name in ``CASES``.
        method: Name in ``METHODS``.
        images: Number of training images.
        keep: Number of branches that stay; 0 for methods that remove none.
        seed: Seed of the subset of the images, the classifier, the order and the augmentation.
        distilled: Whether the dense network of the same seed is the teacher.
    """

    case: str
    method: str
    images: int
    keep: int
    seed: int
    distilled: bool = False

    @property
    def place(self) -> str:
        """Fields shared by the jobs on one subset."""
        return f"{self.case}-{self.images}-{self.seed}"

    def needs(self) -> list[Job]:
        """Jobs that must be done before."""
        found = []
        if self.method != "pretraining" and CASES[self.case].pretraining:
            found.append(Job(self.case, "pretraining", 0, 0, 0))
        if self.distilled or METHODS[self.method].after_dense:
            found.append(Job(self.case, "dense", self.images, 0, self.seed))
        if self.method.startswith("channels_to_latency"):
            found.append(Job(self.case, "speed", self.images, self.keep, self.seed))
        return found


@dataclass
class Start:
    """A network before its training.

    Args:
        model: The network, gated unless channels were removed.
        pruning: Arguments of ``EpsilonPruner`` for the training.
        notes: Further fields of the record.
    """

    model: nn.Module
    pruning: dict[str, Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Bench:
    """The data of one job, and the files of earlier jobs.

    Args:
        job: The job.
        data: Directory of the prepared images and weights.
        work: Directory for files that jobs share.
        held_out: Whether to test on unused training images, for choosing settings.
    """

    def __init__(self, job: Job, data: Path, work: Path, held_out: bool = False) -> None:
        self.job, self.case, self.data, self.work = job, CASES[job.case], data, work
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        classes = self.case.classes
        self.recipe = self.case.recipes.get(job.images)
        if job.method == "pretraining":
            self.recipe, classes = self.case.pretraining
            self.case = replace(self.case, classes=classes)
        whole = images.load(data, "train", classes, self.device)
        self.training, rest = images.divide(whole, job.images or len(whole), job.seed)
        self.held_out, self.rest = held_out, rest
        cfg = timm.get_pretrained_cfg(self.case.architecture).to_dict()
        self.read = images.Reader(self.case.side, cfg).to(self.device)

    def testing(self) -> images.Labelled:
        """The test images. With ``held_out``: the first 10,000 training images that are not used for training."""
        if self.held_out:
            return self.rest.take(torch.arange(min(10_000, len(self.rest)), device=self.device))
        return images.load(self.data, "test", self.case.classes, self.device)

    def analysed(self) -> images.Labelled:
        return self.training.take(torch.arange(min(self.case.analysed, len(self.training)), device=self.device))

    def network(self, case: Case | None = None, weights: bool = True) -> nn.Module:
        """A gated network with the pretrained weights and a new classifier."""
        case = case or self.case
        torch.manual_seed(self.job.seed)  # all methods of a seed start with the same classifier
        model = timm.create_model(case.architecture, num_classes=len(self.case.classes))
        if weights:
            own = (self.work if case.pretraining else self.data) / f"{case.weights}.safetensors"
            classifier = f"{model.pretrained_cfg['classifier']}."
            state = {name: tensor for name, tensor in load_file(own).items() if not name.startswith(classifier)}
            new = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(classifier)}
            model.load_state_dict({**state, **new}, strict=True)
        return model.to(self.device, memory_format=torch.channels_last)

    def slots(self) -> list[str]:
        return slots_of(self.case.architecture)

    def place(self, name: str) -> Path:
        return self.work / f"{self.job.place}-{name}"

    def dense(self) -> nn.Module:
        """The fine-tuned dense network of this seed, gated."""
        model = self.network(weights=False)
        model.load_state_dict(load_file(self.place("dense.safetensors")), strict=True)
        return model

    def keep_dense(self, model: nn.Module) -> dict[str, Any]:
        """Save a fine-tuned dense network, and the order in which branches may be removed, for later jobs."""
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, self.place("dense.part"))
        self.place("dense.part").rename(self.place("dense.safetensors"))
        analysed = self.analysed()
        batches = [(self.read(batch.images), batch.labels) for batch in analysed.batches(BATCH)]
        report = timm_eps.analyze(self.dense(), batches, batch_sizes=(), progress=False)
        found: dict[str, Any] = {
            "loss": training.loss(self.dense(), analysed, self.read),
            "rises": {branch.slot: branch.rise for branch in report.branches},
            "parameters": {branch.slot: branch.parameters for branch in report.branches},
            "curve": [[step.slots, step.loss, step.accuracy] for step in report.curve],
            "removed": {keep: report.choose(keep=keep) for keep in self.case.keeps},
        }
        if self.case.smaller:
            excess = excess_by_stage(self.slots(), slots_of(self.case.smaller.architecture))
            found["sibling"] = least(found["rises"], excess)
        self.place("analysis.json").write_text(json.dumps(found))
        return {"analysis": found}

    def analysis(self) -> dict[str, Any]:
        return json.loads(self.place("analysis.json").read_text())

    def to_remove(self) -> int:
        return len(self.slots()) - self.job.keep

    def chosen(self) -> list[str]:
        """The slots that leave-one-out removes."""
        return self.analysis()["removed"][str(self.job.keep)]

    def predicted(self, removed: list[str]) -> dict[str, float]:
        """Rise of the loss on training images when branches are closed in the fine-tuned dense network."""
        model = self.dense().eval()
        for slot in removed:
            gates(model)[slot].closed = True
        return {"predicted_rise": training.loss(model, self.analysed(), self.read) - self.analysis()["loss"]}

    def without(self, removed: list[str], model: nn.Module | None = None) -> Start:
        """A network that starts without some branches."""
        model = model or self.network()
        timm_eps.prune(model, removed)
        notes = self.predicted(removed) if METHODS[self.job.method].after_dense else {}
        return Start(model, notes=notes)

    def as_small_as(self, parameters: int) -> float:
        """Smallest share of channels to remove for at most this many parameters. It does not depend on the weights."""
        whole = timm.create_model(self.case.architecture, num_classes=len(self.case.classes))
        return bisected(
            lambda ratio: (
                report.count_parameters(structures.narrowed(self.case, copy.deepcopy(whole), ratio)) <= parameters
            )
        )

    def as_fast_as(self, removed: list[str]) -> dict[str, Any]:
        """Smallest share of channels to remove to be as fast, on the CPU, as a network without some branches."""
        whole = timm.create_model(self.case.architecture, num_classes=len(self.case.classes))
        pruned = copy.deepcopy(whole)
        timm_eps.prune(pruned, removed)
        networks = {"dense": copy.deepcopy(whole), "pruned": pruned}
        for network in networks.values():
            structures.without_gates(network)
        batch = torch.rand_like(structures.sample(self.case, self.case.timed_batch))
        seconds: dict[str, list[float]] = defaultdict(list)

        def is_as_fast(ratio: float) -> bool:
            networks["narrow"] = structures.narrowed(self.case, copy.deepcopy(whole), ratio)
            structures.without_gates(networks["narrow"])
            found = report.paired_latency(networks, batch, TIMED_REPEATS)
            for name in ("dense", "pruned"):
                seconds[name].append(found[name])
            return found["narrow"] <= found["pruned"]

        with timing_cores():
            ratio = bisected(is_as_fast)
        medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
        return {"ratio": ratio, "speedup": medians["dense"] / medians["pruned"], "cpu_seconds": medians}


@functools.lru_cache
def _slots_of(architecture: str) -> tuple[str, ...]:
    return tuple(gates(timm.create_model(architecture)))


def slots_of(architecture: str) -> list[str]:
    """All branches of an architecture."""
    return list(_slots_of(architecture))


def bisected(is_enough: Callable[[float], bool], steps: int = 6) -> float:
    """Smallest share that meets a condition, from 0 to the largest sensible share."""
    low, high = 0.0, channels.LARGEST
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


@contextmanager
def timing_cores() -> Iterator[None]:
    """Reserve two cores while latency is measured, one thread each, if there are enough. ``run.py`` avoids them."""
    threads = torch.get_num_threads()
    before = os.sched_getaffinity(0) if enough_cores() else None
    torch.set_num_threads(len(TIMING_CORES))
    if before:
        os.sched_setaffinity(0, TIMING_CORES)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if before:
            os.sched_setaffinity(0, before)


def enough_cores() -> bool:
    """Whether cores can be reserved for latency while others train. Only Linux lets a process choose its cores."""
    return hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) >= 8


def excess_by_stage(larger: list[str], smaller: list[str]) -> dict[str, int]:
    """Number of branches per stage that a larger network has in excess of a smaller one."""
    excess: dict[str, int] = defaultdict(int)
    for slots, sign in ((larger, 1), (smaller, -1)):
        for slot in slots:
            excess[stage_of(slot)] += sign
    return dict(excess)


def least(rises: dict[str, float], counts: dict[str, int]) -> list[str]:
    """Of each stage, the given number of branches with the smallest rise of the loss."""
    chosen = []
    for stage, count in counts.items():
        chosen += sorted((slot for slot in rises if stage_of(slot) == stage), key=rises.__getitem__)[:count]
    return chosen


def dense(bench: Bench) -> Start:
    return Start(bench.network())


def scratch(bench: Bench) -> Start:
    return Start(bench.network(weights=False))


def last(bench: Bench) -> Start:
    return bench.without(bench.slots()[bench.job.keep :])


def even(bench: Bench) -> Start:
    return bench.without(evenly(bench.slots(), bench.job.keep))


def stage_ends(bench: Bench) -> Start:
    ranks = stage_ends_first(bench.slots())
    return bench.without(sorted(ranks, key=ranks.__getitem__)[: bench.to_remove()])


def at_random(bench: Bench, draw: int = 0) -> Start:
    # The seed is a string. Integers made of seed and draw would give neighbouring seeds the same structures.
    return bench.without(random.Random(f"{bench.job.seed}-{draw}").sample(bench.slots(), bench.to_remove()))


def leave_one_out(bench: Bench) -> Start:
    return bench.without(bench.chosen())


def leave_one_out_per_size(bench: Bench) -> Start:
    """Remove the branches with the smallest rise of the loss per parameter, each measured alone."""
    found = bench.analysis()
    shares = {slot: rise / found["parameters"][slot] for slot, rise in found["rises"].items()}
    return bench.without(sorted(shares, key=shares.__getitem__)[: bench.to_remove()])


def leave_one_out_by_stage(bench: Bench) -> Start:
    """Remove the branches that close first on the curve of the analysis. Each stage keeps its share."""
    closed = [slot for slots, *_ in bench.analysis()["curve"] for slot in slots]
    ranks = {slot: closed.index(slot) if slot in closed else len(closed) for slot in bench.slots()}
    by_stage = importance_ranks(ranks, [], bench.job.keep)
    return bench.without(sorted(by_stage, key=by_stage.__getitem__)[: bench.to_remove()])


def leave_one_out_tuned(bench: Bench) -> Start:
    return bench.without(bench.chosen(), bench.dense())


def ramp(bench: Bench, criterion: str) -> Start:
    share = bench.recipe.periods / 50
    epochs = {name: round(share * value) for name, value in SHARES.items()}
    return Start(bench.network(), pruning={"keep": bench.job.keep, "criterion": criterion, "patience": 3, **epochs})


def channels_to_size(bench: Bench, tuned: bool = False) -> Start:
    pruned = timm.create_model(bench.case.architecture, num_classes=len(bench.case.classes), removed=bench.chosen())
    ratio = bench.as_small_as(report.count_parameters(pruned))
    return narrow(bench, ratio, tuned)


def channels_to_latency(bench: Bench, tuned: bool = False) -> Start:
    speed = json.loads(bench.place(f"speed{bench.job.keep}.json").read_text())
    return narrow(bench, speed["ratio"], tuned)


def narrow(bench: Bench, ratio: float, tuned: bool) -> Start:
    model = structures.narrowed(bench.case, bench.dense() if tuned else bench.network(), ratio)
    return Start(model.to(bench.device, memory_format=torch.channels_last), notes={"ratio": ratio})


def sibling(bench: Bench) -> Start:
    return bench.without(bench.analysis()["sibling"])


def smaller(bench: Bench) -> Start:
    return Start(bench.network(bench.case.smaller))


@dataclass(frozen=True)
class Method:
    """A compared method.

    Args:
        name: Name in tables.
        make: Function that builds the network.
        after_dense: Whether the method needs the fine-tuned dense network of its seed, also without distillation.
        length: Training time in multiples of one training.
    """

    name: str
    make: Callable[[Bench], Start]
    after_dense: bool = False
    length: int = 1


METHODS = {
    "pretraining": Method("pretraining", scratch),
    "speed": Method("search for equal latency", dense, after_dense=True),
    "dense": Method("dense", dense),
    "dense_longer": Method("dense, twice the steps", dense, length=2),
    "scratch": Method("dense, from scratch", scratch),
    "last": Method("last branches removed", last, after_dense=True),
    "even": Method("evenly spread", even, after_dense=True),
    "stage_ends": Method("last branches of each stage removed", stage_ends, after_dense=True),
    "random": Method("random", at_random, after_dense=True),
    **{
        f"random{draw}": Method("random", functools.partial(at_random, draw=draw), after_dense=True)
        for draw in range(1, 5)
    },
    "leave_one_out": Method("leave-one-out", leave_one_out, after_dense=True),
    "leave_one_out_by_stage": Method("leave-one-out, stage by stage", leave_one_out_by_stage, after_dense=True),
    "leave_one_out_per_size": Method("leave-one-out, by parameter", leave_one_out_per_size, after_dense=True),
    "leave_one_out_tuned": Method("leave-one-out, from the fine-tuned weights", leave_one_out_tuned, after_dense=True),
    "ramp_response": Method("ε on the ramp, by response", functools.partial(ramp, criterion="response")),
    "ramp_importance": Method("ε on the ramp, by importance", functools.partial(ramp, criterion="importance")),
    "channels_to_size": Method("Torch-Pruning, as many parameters", channels_to_size, after_dense=True),
    "channels_to_latency": Method("Torch-Pruning, as fast", channels_to_latency, after_dense=True),
    "channels_to_size_tuned": Method(
        "Torch-Pruning, as many parameters, from the fine-tuned weights",
        functools.partial(channels_to_size, tuned=True),
        after_dense=True,
    ),
    "channels_to_latency_tuned": Method(
        "Torch-Pruning, as fast, from the fine-tuned weights",
        functools.partial(channels_to_latency, tuned=True),
        after_dense=True,
    ),
    "sibling": Method("cut to the smaller sibling's architecture by leave-one-out", sibling, after_dense=True),
    "smaller": Method("the smaller sibling with its own weights", smaller),
}


def carry_out(job: Job, data: Path, work: Path, held_out: bool = False) -> dict[str, Any]:
    """Train one network and test it once. Returns the record without the fields of the job and the conditions."""
    bench = Bench(job, data, work, held_out)
    method = METHODS[job.method]
    if job.method == "speed":
        speed = bench.as_fast_as(bench.chosen())
        bench.place(f"speed{job.keep}.json").write_text(json.dumps(speed))
        return speed
    start = method.make(bench)
    recipe = replace(bench.recipe, steps=bench.recipe.steps * method.length)
    teacher = timm_eps.Distillation(bench.dense().requires_grad_(False)) if job.distilled else None
    if teacher:
        structures.without_gates(teacher.teacher)
    seconds = training.fit(start.model, bench.training, bench.read, recipe, job.seed, teacher, start.pruning)
    if start.pruning:
        timm_eps.remove_closed(start.model)
    record = {
        "accuracy": training.accuracy(start.model, bench.testing(), bench.read),
        "seconds": round(seconds, 1),
        "steps": recipe.steps,
        "params": report.count_parameters(start.model),
        "macs": report.count_macs(start.model, structures.sample(bench.case, 1).to(bench.device)),
        "removed": list(getattr(start.model, "removed", [])),
        **start.notes,
    }
    if job.method == "pretraining":
        work_file = work / f"{bench.case.weights}.safetensors"
        save_file({name: value.contiguous() for name, value in start.model.state_dict().items()}, work_file)
    if job.method == "dense" and not job.distilled:
        record |= bench.keep_dense(start.model)
    return record

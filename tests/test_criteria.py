"""Budgets in the user's units, and criterion objects, on a ramp."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SLOTS, close, mostly_slow, tiny_net
from test_trainer import fresh_model, make_trainer
from torch import nn

import timm_eps
from timm_eps import EpsilonPruner
from timm_eps.budget import Keep, TargetLatency
from timm_eps.criteria import Importance, LeaveOneOut, Response, Seen, StageEnds, ranked_by, stage_ends_first
from timm_eps.report import count_macs, count_parameters
from timm_eps.surgery.branches import gates, stage_of
from timm_eps.surgery.removal import removed_slots

IMAGE = torch.zeros(1, 3, 8, 8)


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def pruned(epochs: int = 6, **budget) -> tuple[nn.Module, EpsilonPruner]:
    """Train a network for some epochs. Small or scheduled branches close."""
    model = tiny_net(num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = EpsilonPruner(model, optimizer, patience=1, **budget)
    for _ in range(epochs):
        epoch(model, optimizer)
        pruner.step()
    return model, pruner


class SmallestFirst:
    """A user's criterion: the branches with the fewest weights close first."""

    def __call__(self, seen):
        blocks = {slot: seen.model.get_submodule(slot.rpartition(".")[0]) for slot in seen.responses}
        return {slot: count_parameters(block) for slot, block in blocks.items()}


def test_a_criterion_of_ones_own():
    model, _ = pruned(keep=5, criterion=SmallestFirst())
    assert removed_slots(model) == SLOTS[:4]


@pytest.mark.parametrize(("name", "criterion"), [("response", Response()), ("importance", Importance())])
def test_names_stand_for_objects(name, criterion):
    results = []
    for given in (name, criterion):
        torch.manual_seed(0)
        results.append(pruned(keep=4, ramp_epochs=3, criterion=given))
    (some, by_name), (other, by_object) = results
    assert by_name.history == by_object.history
    assert removed_slots(some)
    assert all(torch.equal(a, b) for a, b in zip(some.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("criterion", mostly_slow(["response", "importance", SmallestFirst()], 0))
@pytest.mark.parametrize("unit", mostly_slow(["macs", "params"], 0))
def test_a_target_on_the_ramp(unit, criterion):
    """The target is met at the end, one more branch would exceed it, and the cost falls on the way."""
    dense = tiny_net(num_classes=5)

    def count(model: nn.Module) -> int:
        return count_macs(model, IMAGE) if unit == "macs" else count_parameters(model)

    model, pruner = pruned(**{f"target_{unit}": 0.6}, criterion=criterion, warmup_epochs=1, ramp_epochs=3)
    assert count(model) <= 0.6 * count(dense)
    last = next(record for record in reversed(pruner.history) if record["removed"])["removed"]
    before = set(removed_slots(model)).difference(last)
    assert count(tiny_net(num_classes=5, removed=before)) > 0.6 * count(dense)
    assert pruner.history[0]["removed"] == []


@pytest.mark.slow
def test_absolute_targets_and_fractions_agree():
    half = count_parameters(tiny_net(num_classes=5)) // 2
    torch.manual_seed(0)
    some, _ = pruned(target_params=0.5)
    torch.manual_seed(0)
    other, _ = pruned(target_params=half)
    assert removed_slots(some) == removed_slots(other)


def test_a_latency_is_corrected_by_what_is_left(monkeypatch):
    """Every branch was predicted to save a tenth, but saves a twentieth."""

    def times(body, batch, repeats=0):
        assert len(batch) == 3
        return timm_eps.analysis.measure.BranchTimes(10.0, 1.0, dict.fromkeys(SLOTS, 1.0))

    def milliseconds(nets, batch, repeats=0):
        return {"none": 1.0, "pruned": 10 - 0.5 * (9 - len(gates(nets["pruned"])))}

    monkeypatch.setattr("timm_eps.cost_schedule.branch_times", times)
    monkeypatch.setattr("timm_eps.cost_schedule.milliseconds", milliseconds)
    model, _ = pruned(target_latency=TargetLatency(0.8, batch_size=3), criterion=SmallestFirst())
    assert len(gates(model)) == 5


def test_leave_one_out_ranks_by_the_rise_of_the_loss():
    model = tiny_net(num_classes=5)
    close(model, SLOTS[3])
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))) for _ in range(2)]
    responses = dict.fromkeys(SLOTS, 1.0)
    ranks = LeaveOneOut(iter(batches))(Seen(model, responses, {}, [], set(), 3))
    report = timm_eps.analyze(model, batches, batch_sizes=(), rerank=1, progress=False)
    rises = {branch.slot: branch.rise for branch in report.branches}
    assert {slot: rank for slot, rank in ranks.items() if slot != SLOTS[3]} == rises
    assert ranks[SLOTS[3]] < min(rises.values())


@pytest.mark.slow
def test_leave_one_out_on_a_ramp_removes_what_hurts_least():
    model = tiny_net(num_classes=5)
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,)))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = EpsilonPruner(model, optimizer, keep=8, warmup_epochs=1, patience=1, criterion=LeaveOneOut(batches))
    epoch(model, optimizer)
    pruner.step()
    [best] = [
        step.slots for step in timm_eps.analyze(model, batches, batch_sizes=(), rerank=1, progress=False).curve[1:2]
    ]
    epoch(model, optimizer)
    assert pruner.step() == best


def test_importances_of_a_target_close_stage_by_stage():
    """With a target in multiply-adds no stage has a fixed share, but all stages shrink side by side."""
    importances = {slot: float(index) for index, slot in enumerate(SLOTS)}
    seen = Seen(nn.Identity(), dict.fromkeys(SLOTS, 1.0), importances, [], {SLOTS[8]}, None)
    ranks = ranked_by(Importance(), seen)
    firsts = {slot for slot, rank in ranks.items() if rank == min(ranks.values())}
    assert firsts == {SLOTS[0], SLOTS[3], SLOTS[6]}
    assert math.isinf(ranks[SLOTS[8]])


@pytest.mark.parametrize(
    "name", ["resnet56", "tf_efficientnet_lite2", "convnext_atto", "resnet50", "regnetx_002", "test_vit"]
)
def test_stages_shrink_in_parallel_from_their_ends(name):
    with torch.device("meta"):
        slots = list(gates(timm.create_model(f"eps_{name}")))
    ranks = stage_ends_first(slots)
    order = sorted(slots, key=ranks.__getitem__)
    stages = {stage: [slot for slot in slots if stage_of(slot) == stage] for stage in map(stage_of, slots)}
    for count in range(len(slots) + 1):
        gone = {stage: [slot for slot in own if slot in order[:count]] for stage, own in stages.items()}
        for stage, own in stages.items():
            assert gone[stage] == own[len(own) - len(gone[stage]) :], "the first branches of a stage stay longest"
            for other, others in stages.items():
                assert len(gone[stage]) / len(own) <= (len(gone[other]) + 1) / len(others), (stage, other, count)
        left = stage_ends_first(order[count:], order[:count])
        assert sorted(left, key=left.__getitem__) == order[count:], "a removal does not change the order"


def test_on_a_ramp_the_ends_of_the_stages_go():
    model, _ = pruned(keep=4, ramp_epochs=3, criterion=StageEnds())
    assert set(removed_slots(model)) == {SLOTS[place] for place in (2, 5, 8, 7, 4)}


def test_what_did_not_run_or_diverged_is_not_ranked():
    responses = dict(zip(SLOTS, [math.inf, math.nan, *[1.0] * 7], strict=True))
    seen = Seen(nn.Identity(), responses, {}, [], {SLOTS[2]}, 1)
    ranks = ranked_by(lambda seen: dict.fromkeys(list(seen.responses)[:5], 0), seen)
    assert [slot for slot, rank in ranks.items() if math.isfinite(rank)] == SLOTS[3:5]


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({"keep": 3, "target_macs": 0.5}, "exactly one of epsilon, keep, target_params"),
        ({"target_macs": 0.0}, "target_macs must be a fraction"),
        ({"target_macs": 1e-4}, "cannot be reached by removing branches: without any of its 9 branches"),
        ({"target_params": 10}, "target_params=10 cannot be reached"),
        ({"epsilon": 1.0, "criterion": Importance()}, "needs a budget such as keep"),
        ({"keep": 3, "criterion": Importance}, r"make one: Importance\(\)"),
        ({"keep": 3, "criterion": 7}, "criterion must be one of response, importance, stage_ends, last, got '7'"),
    ],
)
def test_budgets_and_criteria_that_cannot_be(budget, told):
    with pytest.raises(ValueError, match=told):
        EpsilonPruner(tiny_net(), **budget)


@pytest.mark.parametrize(
    ("ranks", "told"), [({"head": 1.0}, "ranks 'head', which is not a branch"), ([1.0], "as a dict, got list")]
)
def test_a_criterion_that_returns_something_else(ranks, told):
    with pytest.raises(ValueError, match=told):
        pruned(epochs=1, keep=3, criterion=lambda seen: ranks)


def test_a_run_with_a_target_resumes():
    """The fraction refers to the dense network, even if the model has already lost branches."""
    torch.manual_seed(0)
    settings = dict(target_params=0.3, ramp_epochs=4, criterion=SmallestFirst())
    model, pruner = pruned(epochs=3, **settings)
    state, weights = pruner.state_dict(), copy.deepcopy(model.state_dict())
    assert removed_slots(model)
    again = tiny_net(num_classes=5, removed=removed_slots(model))
    again.load_state_dict(weights)
    resumed = EpsilonPruner(again, torch.optim.SGD(again.parameters(), lr=1e-3), patience=1, **settings)
    resumed.load_state_dict(state)
    for net, owner in ((model, pruner), (again, resumed)):
        torch.manual_seed(1)
        for _ in range(4):
            net.train()(torch.randn(8, 3, 8, 8))
            owner.step()
    assert removed_slots(again) == removed_slots(model)
    with pytest.raises(ValueError, match="for another budget"):
        EpsilonPruner(tiny_net(num_classes=5), target_macs=0.5).load_state_dict(state | {"budget": {}})


def test_trainer_takes_a_target_and_a_criterion(tmp_path):
    """A checkpoint stores the criterion's name, and the network meets the target."""
    model = fresh_model()
    dense = count_parameters(model.timm_model)
    budget = dict(target_params=0.6, patience=1, criterion=SmallestFirst())
    trainer = make_trainer(tmp_path, model, budget=budget, save_strategy="epoch", save_total_limit=1)
    trainer.train()
    assert count_parameters(model.timm_model) <= 0.6 * dense
    assert model.config.model_args["removed"] == removed_slots(model)
    [path] = tmp_path.glob("checkpoint-*/trainer_state.json")
    saved = json.loads(path.read_text())["stateful_callbacks"]["EpsilonCallback"]
    assert "SmallestFirst" in saved["args"]["criterion"]
    assert saved["attributes"]["saved"]["budget"] == {"dense": dense}


# Extensions that a user writes without changing the package.


class Bytes(timm_eps.Budget):
    """A user's budget: the size of the state dict."""

    argument, unit = "bytes", "bytes"

    def count(self, network, image_shape):
        return sum(value.numel() * value.element_size() for value in network.state_dict().values())


@pytest.mark.parametrize("criterion", ["response", SmallestFirst()])
def test_a_budget_of_ones_own(criterion):
    schedule = timm_eps.CostEpsilon(Bytes(0.5), ramp_epochs=3)
    model, pruner = pruned(schedule=schedule, criterion=criterion)
    size, dense = (Bytes(1.0).count(net, (3, 8, 8)) for net in (model, tiny_net(num_classes=5)))
    assert size <= 0.5 * dense
    again = EpsilonPruner(model, schedule=timm_eps.CostEpsilon(Bytes(0.5), ramp_epochs=3), criterion=criterion)
    again.load_state_dict(json.loads(json.dumps(pruner.state_dict())))
    assert again.schedule.costs.dense == dense, "what the dense network had comes along"


def test_a_budget_of_ones_own_chooses():
    layers = (1, 2, 1)
    model = tiny_net(num_classes=5, layers=layers)
    report = timm_eps.analyze(model, [(torch.randn(8, 3, 8, 8), torch.arange(8) % 5)], batch_sizes=(), progress=False)
    timm_eps.prune(model, report.choose(budget=Bytes(0.5)))
    dense = tiny_net(num_classes=5, layers=layers)
    assert Bytes(1.0).count(model, (3, 8, 8)) <= 0.5 * Bytes(1.0).count(dense, (3, 8, 8))
    with pytest.raises(ValueError, match="Give exactly one budget"):
        report.choose(budget=Bytes(0.5), keep=3)


class EverySecondEpoch:
    """A user's schedule: one more branch every second epoch."""

    def __call__(self, epoch, responses, total):
        weakest = sorted(responses, key=responses.__getitem__)[: (epoch + 1) // 2 - (total - len(responses))]
        return {slot: 2 * responses[slot] if slot in weakest and math.isfinite(responses[slot]) else 0.0
                for slot in responses}  # fmt: skip


def test_a_schedule_of_ones_own():
    model, pruner = pruned(epochs=7, schedule=EverySecondEpoch())
    assert [len(record["removed"]) for record in pruner.history] == [0, 1, 0, 1, 0, 1, 0]
    assert pruner.wanted == 9
    assert len(removed_slots(model)) == 3
    for given, message in (
        ({"epsilon": 1.0}, "Give exactly one of epsilon, keep"),
        ({"warmup_epochs": 1}, "warmup_epochs and ramp_epochs need"),
        ({"criterion": "importance"}, "needs a budget such as keep"),
    ):
        with pytest.raises(ValueError, match=message):
            EpsilonPruner(tiny_net(), schedule=EverySecondEpoch(), **given)


def test_a_budget_that_cannot_be_counted_says_so():
    with pytest.raises(ValueError, match=r"Keep\(0\.5\) counts branches: use keep="):
        EpsilonPruner(tiny_net(), schedule=timm_eps.CostEpsilon(Keep(0.5)))
    with pytest.raises(ValueError, match="has no method count"):
        EpsilonPruner(
            tiny_net(), schedule=timm_eps.CostEpsilon(type("Mine", (timm_eps.Budget,), {"argument": "mine"})(0.5))
        )


def test_a_state_of_another_budget_is_refused():
    _, pruner = pruned(schedule=timm_eps.CostEpsilon(Bytes(0.5), ramp_epochs=3))
    other = EpsilonPruner(tiny_net(num_classes=5), target_params=0.5, ramp_epochs=3)
    with pytest.raises(ValueError, match="is for another budget than TargetParams"):
        other.load_state_dict(pruner.state_dict())


def test_a_schedule_that_leaves_a_branch_out_is_named():
    with pytest.raises(ValueError, match=r"returned no epsilon for 'stages\.0\.blocks\.0\.drop_path'"):
        EpsilonPruner(tiny_net(), schedule=lambda epoch, responses, total: {})


def test_nothing_is_touched_before_the_arguments_are_checked():
    model, optimizer = timm.create_model("test_resnet"), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="criterion"):
        EpsilonPruner(model, optimizer, keep=0.5, criterion="nonsense")
    assert not gates(model)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.slow
def test_the_batch_size_of_a_latency_is_its_own(monkeypatch):
    model = tiny_net(num_classes=5)
    data = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 5)]
    report = timm_eps.analyze(model, data, batch_sizes=(1, 4), progress=False)
    report = dataclasses.replace(report, live=None)  # the choice by the numbers alone
    for size in (1, 4):
        assert report.choose(budget=TargetLatency(0.6, size)) == report.choose(target_latency=0.6, batch_size=size)
    with pytest.raises(ValueError, match="batch_size=2 was not measured"):
        report.choose(budget=TargetLatency(0.6, 2))


def test_a_schedule_of_ones_own_in_trainer(tmp_path):
    trainer = make_trainer(tmp_path, budget={"schedule": EverySecondEpoch(), "patience": 1}, num_train_epochs=5)
    trainer.train()
    assert len(removed_slots(trainer.model)) == 2

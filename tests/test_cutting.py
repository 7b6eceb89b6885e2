"""Removal at once: in an order, within a budget, or by name."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from conftest import SLOTS, close, tiny_net

import timm_eps
from timm_eps import prune
from timm_eps.analysis.measure import size_of
from timm_eps.budget import Keep, TargetLatency, TargetMacs, TargetParams
from timm_eps.cutting.in_order import first_within
from timm_eps.report import count_parameters
from timm_eps.surgery.branches import gates
from timm_eps.surgery.removal import removed_slots

BUDGETS = [Keep(4), TargetParams(0.4), TargetMacs(0.5), TargetLatency(0.6, 2)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_branches_go_in_order_until_the_budget_holds(budget):
    model = timm.create_model("eps_resnet20", num_classes=4).eval()
    ranks = {slot: -index for index, slot in enumerate(SLOTS)}
    slots = first_within(model, ranks, budget)
    assert slots == SLOTS[::-1][: len(slots)]
    assert all(not gate.closed for gate in gates(model).values()), "the model stays as it is"
    if isinstance(budget, Keep):
        assert len(slots) == 5
    if isinstance(budget, TargetParams | TargetMacs):
        which = int(isinstance(budget, TargetMacs))
        whole = size_of(model, (3, 32, 32))[which]
        left = []
        for chosen in (slots, slots[:-1]):
            smaller = timm.create_model("eps_resnet20", num_classes=4)
            timm_eps.prune(smaller, chosen)
            left.append(size_of(smaller, (3, 32, 32))[which])
        assert left[0] <= budget.goal(whole) < left[1], "one branch less would not do"


def test_branches_in_order_leave_one_and_refuse_the_impossible():
    model = timm.create_model("eps_resnet20", num_classes=4).eval()
    ranks = dict.fromkeys(SLOTS, 0.0)
    assert len(first_within(model, ranks, TargetMacs(0.02))) == 8, "one branch stays"
    with pytest.raises(ValueError, match=r"target_macs=0\.001 cannot be reached"):
        first_within(model, ranks, TargetMacs(0.001))
    with pytest.raises(ValueError, match="'head', which is not an open branch"):
        first_within(model, {"head": 0.0}, Keep(1))


@pytest.mark.parametrize("criterion", ["stage_ends", "last"])
@pytest.mark.parametrize("name", ["resnet18", "eps_test_vit", "mobilenetv3_small_050"])
def test_a_budget_needs_no_images(name, criterion):
    model = timm.create_model(name).eval()
    dense = count_parameters(model)
    removed = prune(model, target_params=0.95, criterion=criterion)
    assert set(removed) == set(removed_slots(model)) != set()
    assert count_parameters(model) <= 0.95 * dense
    assert prune(model, keep=len(gates(model))) == [], "no more branches stay than may"


def test_the_ends_of_the_stages_go_by_default():
    whole = tiny_net()
    assert prune(whole, keep=3) == [slot for place, slot in enumerate(SLOTS) if place % 3]
    in_turn = tiny_net()
    for keep in (6, 3):
        prune(in_turn, keep=keep)
    assert removed_slots(in_turn) == removed_slots(whole), "the removed branches had their places, too"
    late = tiny_net()
    assert prune(late, keep=0.25, criterion="last") == SLOTS[2:]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "Give exactly one of keep, target_params, target_macs, target_latency, got none"),
        ({"keep": 3, "target_macs": 0.5}, "Give exactly one of keep"),
        ({"slots": SLOTS[:1], "keep": 3}, "Give slots or a budget, not both"),
        ({"keep": 3, "criterion": "importance"}, "criterion must be one of stage_ends, last, got 'importance'"),
        ({"target_macs": 0.001}, r"target_macs=0\.001 cannot be reached"),
    ],
)
def test_prune_names_what_does_not_fit(arguments, said):
    model = timm.create_model("resnet18")
    with pytest.raises(ValueError, match=said):
        prune(model, **arguments)
    assert not gates(model), "the model stays as it is"


def test_prune_says_what_it_does_not_know():
    model = tiny_net()
    with pytest.raises(ValueError, match=r"did you mean 'stages.0.blocks.1.drop_path'"):
        prune(model, [SLOTS[0], "stages.0.blocks.1.drop_pat"])
    with pytest.raises(ValueError, match="slots must be a list of slot paths"):
        prune(model, SLOTS[0])
    assert not any(gate.closed for gate in gates(model).values())


def test_prune_leaves_closed_what_it_cannot_remove(monkeypatch, caplog, images):
    """A branch whose removal cannot be proven stays closed, and the returned report says so."""
    model = tiny_net()
    close(expected := copy.deepcopy(model), SLOTS[1])
    before = expected(images)
    monkeypatch.setattr("timm_eps.surgery.removal.same_outputs", lambda *_: False)
    assert prune(model, [SLOTS[1]]) == []
    assert gates(model)[SLOTS[1]].closed
    assert "stays closed" in caplog.text
    assert torch.equal(model(images), before)

"""ε over the epochs, and the restarted learning rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from timm_eps import RestartingLR
from timm_eps.schedule import BudgetEpsilon, ConstantEpsilon


def test_constant_after_warmup():
    schedule = ConstantEpsilon(2.5, warmup_epochs=3)
    responses = {"a": 1.0, "b": 9.0}
    assert [schedule(epoch, responses, 54) for epoch in range(5)] == [
        *[{"a": 0, "b": 0}] * 3, *[{"a": 2.5, "b": 2.5}] * 2
    ]  # fmt: skip


def test_budget_ramp_is_cubic_and_ends_at_the_budget():
    schedule = BudgetEpsilon(0.25, warmup_epochs=10, ramp_epochs=20)
    closing = [schedule.to_close(epoch, 100) for epoch in range(40)]
    assert closing[:10] == [0] * 10
    assert closing[10:30] == [round(75 * (1 - (1 - i / 20) ** 3)) for i in range(1, 21)]
    assert closing[30:] == [75] * 10


@pytest.mark.parametrize(
    ("keep", "total", "kept"), [(0.25, 54, 14), (0.001, 54, 1), (14, 54, 14), (1, 9, 1), (0.999, 9, 9)]
)
def test_budget_counts(keep, total, kept):
    assert BudgetEpsilon(keep).to_close(0, total) == total - kept


def test_budget_epsilon_separates_exactly_as_many():
    responses = {f"b{i}": float(i) for i in range(1, 11)}
    for kept in range(1, 10):
        epsilon = BudgetEpsilon(kept)(0, responses, total=10)
        assert epsilon.keys() == responses.keys()
        assert [r < epsilon[slot] for slot, r in responses.items()] == [True] * (10 - kept) + [False] * kept
        assert set(epsilon.values()) <= {10 - kept + 0.5, 0.0}, "one ε, and none for the branches that stay"


def test_budget_counts_the_removed_ones_in():
    responses = {f"b{i}": float(i) for i in range(1, 5)}  # 6 of 10 are removed already
    assert BudgetEpsilon(3)(0, responses, total=10) == {"b1": 1.5, "b2": 0.0, "b3": 0.0, "b4": 0.0}
    assert not any(BudgetEpsilon(5)(0, responses, total=10).values())


def test_budget_ignores_nan():
    """A diverged branch cannot close and must not count as one of the branches to close."""
    epsilon = BudgetEpsilon(1)(0, {"a": math.nan, "b": 1.0, "c": 2.0}, total=3)
    assert epsilon["a"] == 0.0
    assert 2.0 < epsilon["b"] == epsilon["c"] < math.inf
    assert not any(BudgetEpsilon(1)(0, {"a": math.nan, "b": math.nan, "c": math.inf}, total=3).values())


@pytest.mark.parametrize("keep", [0, 0.0, 1.0, 1.5, -0.5, -3, True, math.nan, "half", None])
def test_bad_keep(keep):
    with pytest.raises(ValueError, match="keep must be a fraction"):
        BudgetEpsilon(keep)


@pytest.mark.parametrize("epochs", [-1, 1.5, True])
@pytest.mark.parametrize("name", ["warmup_epochs", "ramp_epochs"])
def test_bad_epochs(name, epochs):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        BudgetEpsilon(0.5, **{name: epochs})


def rates(scheduler, optimizer, discarded):
    found = []
    for count in discarded:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(count)
    return found


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def test_paper_learning_rate_without_restart(optimizer):
    found = rates(RestartingLR(optimizer), optimizer, [0] * 310)
    assert found[:82] == [0.1] * 82
    assert found[82:123] == pytest.approx([0.01] * 41)
    assert found[123:300] == pytest.approx([0.001] * 177)
    assert found[300:] == pytest.approx([0.0002] * 10)


def test_paper_learning_rate_restarts_when_blocks_go(optimizer):
    discarded = [0] * 130 + [2] * 170  # epoch 130 ends with two blocks closed or removed
    found = rates(RestartingLR(optimizer), optimizer, discarded)
    assert found[130] == pytest.approx(0.001)
    assert found[131:172] == pytest.approx([0.1] * 41)
    assert found[172:192] == pytest.approx([0.01] * 20)
    assert found[192:281] == pytest.approx([0.001] * 89)
    assert found[281:] == pytest.approx([0.0002] * 19)


def test_no_restart_when_a_block_opens_again(optimizer):
    found = rates(RestartingLR(optimizer, [2], [1], [1.0, 0.1]), optimizer, [0, 3, 3, 2, 2, 3, 3])
    assert found == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.1])


def test_restarting_state_dict(optimizer):
    scheduler = RestartingLR(optimizer, [2], [1], [1.0, 0.1])
    rates(scheduler, optimizer, [0, 3, 3])
    other_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    other = RestartingLR(other_optimizer, [2], [1], [1.0, 0.1])
    other.load_state_dict(scheduler.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert rates(other, other_optimizer, [3, 4, 4]) == rates(scheduler, optimizer, [3, 4, 4])


@pytest.mark.parametrize("milestones", [[1], [3, 2, 5], [1, 1, 2]])
def test_bad_milestones(optimizer, milestones):
    with pytest.raises(ValueError, match="must be 3 increasing epochs"):
        RestartingLR(optimizer, milestones=milestones)


@pytest.mark.parametrize("keep", [np.int64(3), np.int32(3), np.float64(0.5), np.float32(0.5)])
def test_numbers_of_numpy(keep):
    schedule = BudgetEpsilon(keep)
    assert schedule.kept(6) == 3
    assert type(schedule.keep) in (int, float)

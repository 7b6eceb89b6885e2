"""The pruner: with responses that are set by hand, and in short real trainings."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import timm
import timm.optim
import torch
from conftest import SLOTS, mostly_slow, tiny_net
from torch import nn
from torch.nn import functional as F

import timm_eps
from timm_eps import EpsilonPruner
from timm_eps.importance import importance_ranks, shares
from timm_eps.surgery.branches import gates, stage_of


def respond(model: nn.Module, responses: dict[str, float], default: float = 10.0) -> None:
    """Set these responses, as if an epoch had been trained."""
    for slot, gate in gates(model).items():
        gate.response.fill_(responses.get(slot, default))


@pytest.fixture
def model():
    return tiny_net()


@pytest.fixture
def optimizer(model):
    return torch.optim.SGD(timm_eps.param_groups(model, 5e-3), lr=0.1, momentum=0.9)


def train_step(model, optimizer, batch_size=8):
    model.train()
    loss = F.cross_entropy(model(torch.randn(batch_size, 3, 8, 8)), torch.randint(10, (batch_size,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_closed_for_patience_epochs_then_removed(model):
    pruner = EpsilonPruner(model, epsilon=1.0, patience=3)
    low = {SLOTS[1]: 0.5}
    for epoch in range(3):
        respond(model, low)
        removed = pruner.step()
        assert removed == ([SLOTS[1]] if epoch == 2 else [])
        assert pruner.discarded == 1
    assert SLOTS[1] not in gates(model)
    assert model.removed == [SLOTS[1]]


def test_an_epoch_open_starts_the_count_anew(model):
    pruner = EpsilonPruner(model, epsilon=1.0, patience=2)
    for response in (0.5, 2.0, 0.5):
        respond(model, {SLOTS[1]: response})
        assert pruner.step() == []
        assert gates(model)[SLOTS[1]].closed == (response < 1)
    respond(model, {SLOTS[1]: 0.5})
    assert pruner.step() == [SLOTS[1]]


def test_decisions_at_the_threshold_are_the_gates(model):
    """0.1 is not a single-precision number. A response equal to the gate's ε must count as open here too."""
    pruner = EpsilonPruner(model, epsilon=0.1, patience=1)
    gate = gates(model)[SLOTS[0]].train()
    gate(gate.threshold.clone().view(1))
    for slot in SLOTS[1:]:
        gates(model)[slot].response.fill_(1.0)
    assert pruner.step() == []
    assert not gate.closed


def test_nan_keeps_a_branch_open(model):
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    respond(model, {SLOTS[0]: math.nan, SLOTS[1]: math.inf})
    assert pruner.step() == []
    assert pruner.discarded == 0


def test_warmup_holds_epsilon_at_zero(model):
    pruner = EpsilonPruner(model, epsilon=2.5, warmup_epochs=2)
    seen = []
    for _ in range(4):
        seen.append({gate.epsilon for gate in gates(model).values()})
        respond(model, {SLOTS[0]: 9.0, SLOTS[1]: 9.0}, default=0.1)
        pruner.step()
    assert seen == [{0.0}, {0.0}, {2.5}, {2.5}]


def test_step_starts_a_new_measurement(model):
    pruner = EpsilonPruner(model, epsilon=1.0)
    respond(model, {})
    pruner.step()
    assert {gate.response.item() for gate in gates(model).values()} == {-1.0}


def test_budget_closes_the_weakest(model):
    pruner = EpsilonPruner(model, keep=3, patience=1)
    responses = {slot: float(index + 1) for index, slot in enumerate(SLOTS)}
    for _ in range(3):
        respond(model, responses)
        pruner.step()
    assert model.removed == SLOTS[:6]
    assert set(gates(model)) == set(SLOTS[6:])
    assert pruner.epsilon == 0.0, "the budget is reached: nothing more may close"


def test_budget_is_never_overshot(model):
    """All responses collapse in one epoch: more gates close than the budget allows, but no more stay closed."""
    pruner = EpsilonPruner(model, keep=6, patience=1, ramp_epochs=3)
    for _ in range(8):
        respond(model, {slot: 1e-3 * (index + 1) for index, slot in enumerate(SLOTS)})
        pruner.step()
        allowed = pruner.schedule.to_close(pruner.epoch - 1, pruner.total)
        assert len(model.removed) <= pruner.discarded <= allowed
    assert len(model.removed) == 3


def test_a_budget_leaves_branches_that_stay_open_on_every_batch(model):
    """The response of one batch is often smaller than the response of an epoch, which ranks the branches."""
    pruner = EpsilonPruner(model, keep=7, patience=2)
    respond(model, {slot: float(index + 1) for index, slot in enumerate(SLOTS)})
    pruner.step()
    assert pruner.epsilon == 2.5
    weak = torch.full((2, 3), 0.1)
    for index, (slot, gate) in enumerate(gates(model).items()):
        assert gate.epsilon == (2.5 if index < 2 else 0.0), slot
        assert torch.equal(gate.train()(weak), weak if index >= 2 else torch.zeros_like(weak)), slot


def matter(model: nn.Module, importances: dict[str, float], default: float = 1.0) -> None:
    """Set these importances, as if an epoch had measured them."""
    for slot, gate in gates(model).items():
        gate.importance.fill_(importances.get(slot, default))


def test_a_budget_by_importance(model):
    """The least important branches close at their own ε, whatever their responses. The others have no ε."""
    pruner = EpsilonPruner(model, keep=7, patience=2, criterion="importance")
    responses = {SLOTS[0]: 0.5, SLOTS[3]: 20.0, SLOTS[8]: 0.0}
    respond(model, responses, default=1.0)
    matter(model, {SLOTS[0]: 5.0, SLOTS[3]: 1e-3, SLOTS[8]: 0.0})
    assert pruner.step() == []
    thresholds = {slot: gate.epsilon for slot, gate in gates(model).items()}
    assert thresholds.pop(SLOTS[3]) == pruner.epsilon == 40.0
    assert 0 < thresholds.pop(SLOTS[8]) < 1e-30, "an empty branch closes too"
    assert set(thresholds.values()) == {0.0}
    assert pruner.history[-1]["importances"][SLOTS[0]] == 5.0
    for expected in ([], [SLOTS[3], SLOTS[8]]):
        respond(model, responses)
        matter(model, {SLOTS[3]: 0.0, SLOTS[8]: 0.0})  # closed gates have importance 0
        assert sorted(pruner.step()) == expected


@pytest.mark.parametrize(("keep", "per_stage"), [(7, [3, 2, 2]), (4, [2, 1, 1]), (3, [1, 1, 1]), (2, [2, 0, 0])])
def test_by_importance_each_stage_keeps_its_share(model, keep, per_stage):
    """The first stage seems by far the most important. With fewer branches than stages, the budget decides."""
    pruner = EpsilonPruner(model, keep=keep, patience=1, criterion="importance")
    for _ in range(2):
        respond(model, {})
        matter(model, {slot: 100.0 + index for index, slot in enumerate(SLOTS[:3])})
        pruner.step()
    assert [sum(slot.startswith(f"stages.{stage}.") for slot in gates(model)) for stage in range(3)] == per_stage


def test_ranks_by_importance():
    importances = {"layer1.0.drop_path": 3.0, "layer1.1.drop_path": 1.0, "layer1.2.drop_path": 2.0}
    importances |= {f"layer2.{index}.drop_path": 100.0 * index for index in range(1, 6)}
    removed = ["layer2.0.drop_path"]
    ranks = importance_ranks(importances, removed, kept=3)  # one of three, two of six
    least_first = sorted((slot for slot in ranks if math.isfinite(ranks[slot])), key=ranks.__getitem__)
    assert least_first == [
        f"{block}.drop_path" for block in ("layer1.1", "layer2.1", "layer1.2", "layer2.2", "layer2.3")
    ]
    importances["layer1.1.drop_path"] = math.nan
    assert importance_ranks(importances, removed, kept=3)["layer1.1.drop_path"] == math.inf


@pytest.mark.parametrize(
    ("counts", "kept", "expected"),
    [
        ([9, 9, 9], 6, [2, 2, 2]),
        ([18, 18, 18], 14, [5, 5, 4]),
        ([3, 4, 6, 3], 5, [1, 1, 2, 1]),
        ([1, 1, 30], 4, [1, 1, 2]),
        ([2, 7], 9, [2, 7]),
    ],
)
def test_shares_of_the_stages(counts, kept, expected):
    assert list(shares(dict(enumerate(counts)), kept).values()) == expected


@pytest.mark.parametrize(
    ("slot", "stage"),
    [
        ("stages.1.blocks.4.drop_path", "stages.1"),
        ("stages.2.blocks.1.0.drop_path2", "stages.2"),  # DaViT
        ("stages.0.blocks.1.conv.3.drop_path", "stages.0"),  # MaxViT
        ("transformers.1.blocks.5.drop_path1", "transformers.1"),
        ("layer2.0.drop_path", "layer2"),
        ("body.layer3.10.drop_path", "body.layer3"),
        ("s3.b12.drop_path", "s3"),  # RegNet
        ("blocks.2.1.drop_path", "blocks.2"),  # EfficientNet
        ("blocks.11.drop_path1", "blocks"),  # ViT
        ("blocks.7.attns.1.drop_path", "blocks"),
        ("stages.3.1.transformer.2.drop_path1", "stages.3"),
        ("stage3.0.branches.1.0.drop_path", "stage3.0.branches.1"),  # HRNet: one resolution
        ("patch_embed.backbone.stages.0.blocks.1.drop_path", "patch_embed.backbone.stages.0"),
    ],
)
def test_the_stage_of_a_branch(slot, stage):
    assert stage_of(slot) == stage


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_what_was_not_measured_is_not_closed(model, value, caplog):
    """There was no backward pass, or the loss diverged."""
    pruner = EpsilonPruner(model, keep=3, patience=1, criterion="importance")
    for epoch in range(3):
        respond(model, {})
        matter(model, {}, default=value)
        assert pruner.step() == []
        assert f"none has an importance after epoch {epoch}." in caplog.messages[epoch]
    assert pruner.epsilon == 0.0
    respond(model, {})
    matter(model, {SLOTS[0]: 0.1}, default=value)
    pruner.step()
    assert len(caplog.messages) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_by_importance_a_branch_that_diverged_stays_open(model, value):
    """The branch diverged on a batch without a backward pass, so its importance looks normal."""
    pruner = EpsilonPruner(model, keep=3, patience=1, criterion="importance")
    respond(model, {SLOTS[0]: value})
    matter(model, {SLOTS[0]: 0.1})
    pruner.step()
    assert gates(model)[SLOTS[0]].epsilon == 0
    assert sum(gate.epsilon > 0 for gate in gates(model).values()) == 2 + 2 + 2


@pytest.mark.parametrize("criterion", ["response", "importance"])
def test_what_the_user_removes_counts(model, criterion):
    pruner = EpsilonPruner(model, keep=6, patience=3, criterion=criterion)
    for epoch in range(8):
        ranks = {slot: float(rank) for rank, slot in enumerate(gates(model), 1)}
        respond(model, ranks)
        matter(model, ranks)
        pruner.step()
        if epoch == 1:
            assert pruner.discarded == 3
            timm_eps.remove_closed(model)
            resumed = EpsilonPruner(tiny_net(), keep=6, patience=3, criterion=criterion)
            resumed.load_state_dict(json.loads(json.dumps(pruner.state_dict())))
            assert len(gates(resumed.model)) == 6
    assert pruner.discarded == 3
    assert len(gates(model)) == 6
    assert pruner.state_dict()["streaks"].keys() == gates(model).keys()


def test_real_training_by_importance(model, optimizer):
    """Measurement starts one epoch before the first closing and ends when the budget is met, resumed or not."""
    settings = {"keep": 4, "warmup_epochs": 2, "ramp_epochs": 3, "patience": 2, "criterion": "importance"}
    pruner = EpsilonPruner(model, optimizer, **settings)
    for epoch in range(9):
        for _ in range(4):
            train_step(model, optimizer)
        is_measured = epoch >= 1 and len(gates(model)) > 4
        for gate in gates(model).values():
            assert (gate.importance > 0) == (is_measured and gate.epsilon == 0)
        resumed = EpsilonPruner(tiny_net(), **settings)
        resumed.load_state_dict(json.loads(json.dumps(pruner.state_dict())))
        assert resumed.state_dict() == pruner.state_dict()
        assert all((gate.gain is not None) == is_measured for gate in gates(resumed.model).values())
        pruner.step()
        assert ("importances" in pruner.history[-1]) == is_measured
    assert len(gates(model)) == 4


def test_keep_as_a_fraction(model):
    pruner = EpsilonPruner(model, keep=1 / 3, patience=1)
    for _ in range(3):
        respond(model, {slot: float(index + 1) for index, slot in enumerate(SLOTS)})
        pruner.step()
    assert len(model.removed) == 6


def test_without_live_removal(model, images):
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1, live_removal=False)
    for _ in range(3):
        respond(model, {SLOTS[4]: 0.1})
        assert pruner.step() == []
    before = model.eval()(images)
    assert gates(model)[SLOTS[4]].closed
    assert timm_eps.remove_closed(model) == [SLOTS[4]]
    assert torch.equal(model(images), before)


def test_optimizer_survives_removal(model, optimizer):
    """The state of removed parameters is deleted, the momentum of the others stays equal, and training continues."""
    pruner = EpsilonPruner(model, optimizer, epsilon=1.0, patience=1)
    train_step(model, optimizer)
    doomed = set(model.stages[1].blocks[1].parameters())
    kept = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters() if p not in doomed}
    respond(model, {SLOTS[4]: 0.1})
    assert pruner.step() == [SLOTS[4]]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters()) == set(kept)
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], kept[p]) for p in kept)
    assert not doomed & optimizer.state.keys()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-3, 0.0]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train_step(model, optimizer)
    scheduler.step()
    copy_of = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copy_of)


def test_real_training_empties_and_removes(model, optimizer):
    """No response is set by hand: gates close on real batches, decay shrinks the branches, blocks are removed."""
    pruner = EpsilonPruner(model, optimizer, keep=4, warmup_epochs=1, ramp_epochs=3, patience=2)
    for group in optimizer.param_groups[:1]:
        group["weight_decay"] = 0.1
    closed_weights = None
    for _ in range(9):
        for _ in range(4):
            train_step(model, optimizer)
        before = sum(p.numel() for p in model.parameters())
        removed = pruner.step()
        assert bool(removed) == (sum(p.numel() for p in model.parameters()) < before)
        if closed_weights is None and pruner.discarded:
            slot = next(slot for slot, gate in gates(model).items() if gate.closed)
            block = model.get_submodule(slot.removesuffix(".drop_path"))
            closed_weights = block.conv2.weight.norm().item(), block.conv2.weight
    assert len(gates(model)) == 4
    assert closed_weights[1].norm().item() < closed_weights[0]


@pytest.mark.parametrize("given", [{"epsilon": 0.01}, {"keep": 6}])
def test_frozen_branches_are_not_empty_ones(model, optimizer, given):
    """A stage in evaluation mode has no response in training. This is no reason to remove the stage."""
    pruner = EpsilonPruner(model, optimizer, patience=1, **given)
    for _ in range(4):
        model.train()
        model.stages[0].eval()
        F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
        pruner.step()
    assert not [slot for slot in model.removed if slot.startswith("stages.0")]
    assert set(pruner.history[-1]["responses"]).isdisjoint(SLOTS[:3])


def test_step_without_training_removes_nothing(model):
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    assert pruner.step() == []
    assert pruner.discarded == 0


def test_diverged_run_with_a_budget(model):
    pruner = EpsilonPruner(model, keep=3, patience=1)
    for _ in range(3):
        respond(model, {}, default=math.nan)
        assert pruner.step() == []
    assert pruner.epsilon == 0.0


def test_named_parameters_stay_aligned(model):
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    pruner = EpsilonPruner(model, optimizer, epsilon=1.0, patience=1)
    train_step(model, optimizer)
    respond(model, {SLOTS[4]: 0.1})
    pruner.step()
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(model.named_parameters())
    train_step(model, optimizer)


def test_half_precision_threshold(model):
    """ε = 0.1 is another number in half precision; step() must use the gate's value."""
    model.half()
    pruner = EpsilonPruner(model, epsilon=0.1, patience=1)
    for gate in gates(model).values():
        gate.response.copy_(gate.threshold)
    assert pruner.step() == []


def test_history(model):
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    respond(model, {SLOTS[2]: 0.25})
    pruner.step()
    (record,) = pruner.history
    assert record["epoch"] == 0
    assert record["epsilon"] == 1.0
    assert record["responses"] == {slot: 0.25 if slot == SLOTS[2] else 10.0 for slot in SLOTS}
    assert record["closed"] == record["removed"] == [SLOTS[2]]


def test_state_dict_round_trip(model):
    """Resumed in a new model and process, the pruner ends in the same state as the uninterrupted one."""
    script = [{slot: float((7 * index + 3 * epoch) % 11) for index, slot in enumerate(SLOTS)} for epoch in range(10)]

    def run(pruner, epochs):
        for responses in epochs:
            respond(pruner.model, responses)
            pruner.step()
        return pruner

    def new():
        return EpsilonPruner(tiny_net(), epsilon=4.0, patience=2, warmup_epochs=1)

    whole = run(new(), script)
    half = run(new(), script[:5])
    state = json.loads(json.dumps(half.state_dict()))
    resumed = new()
    optimizer = resumed.optimizer = torch.optim.SGD(resumed.model.parameters(), lr=0.1)
    resumed.load_state_dict(state)
    assert resumed.model.removed == half.model.removed != []
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(resumed.model.parameters())
    run(resumed, script[5:])
    assert resumed.model.removed == whole.model.removed
    assert resumed.history == whole.history
    assert resumed.state_dict() == whole.state_dict()


def test_resume_through_the_transformers_class(tmp_path):
    """Also into a model without some of the blocks. Configuration and network agree afterwards."""
    body = tiny_net()
    pruner = EpsilonPruner(timm_eps.EpsResNetForImageClassification.from_timm(body), epsilon=1.0, patience=1)
    respond(body, dict.fromkeys(SLOTS[2:5], 0.5))
    pruner.step()
    for start in ([], SLOTS[2:3]):
        wrapper = timm_eps.EpsResNetForImageClassification.from_timm(tiny_net(removed=start))
        EpsilonPruner(wrapper, epsilon=1.0).load_state_dict(pruner.state_dict())
        assert wrapper.timm_model.removed == wrapper.config.model_args["removed"] == SLOTS[2:5]
        wrapper.load_state_dict(body.state_dict())


def test_state_of_another_model(model, optimizer):
    other = EpsilonPruner(timm.create_model("eps_resnet32"), epsilon=1.0, patience=1)
    respond(other.model, {SLOTS[0]: 0.1})
    other.step()
    before = list(model.parameters())
    with pytest.raises(ValueError, match=r"state belongs to another model: they differ at 'stages\.0\.blocks\.3"):
        EpsilonPruner(model, optimizer, epsilon=1.0).load_state_dict(other.state_dict())
    assert list(map(id, model.parameters())) == list(map(id, before)), "refused, and nothing lost"
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    with pytest.raises(ValueError, match="Not the state of an EpsilonPruner: it lacks"):
        EpsilonPruner(model, epsilon=1.0).load_state_dict({"epoch": 3})


def test_state_that_is_less_pruned_than_the_model(model):
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    state = pruner.state_dict()
    respond(model, {SLOTS[0]: 0.0})
    pruner.step()
    with pytest.raises(ValueError, match=r"Branch 'stages\.0\.blocks\.0\.drop_path' is removed"):
        pruner.load_state_dict(state)


@pytest.mark.parametrize("live_removal", [True, False])
@pytest.mark.parametrize("epsilon", [1e9, 11.0])
def test_one_branch_always_stays(model, caplog, epsilon, live_removal):
    """The branch with the largest response stays. It is open in training as well, so it learns."""
    pruner = EpsilonPruner(model, epsilon=epsilon, patience=2, live_removal=live_removal)
    for _ in range(4):
        respond(model, {SLOTS[4]: 10.5})
        pruner.step()
        assert pruner.discarded == 8
        assert [slot for slot, gate in gates(model).items() if not gate.closed] == [SLOTS[4]]
        assert {slot for slot, gate in gates(model).items() if gate.epsilon == 0} == {SLOTS[4]}
    assert len(model.removed) == (8 if live_removal else 0)
    [warning] = caplog.messages
    assert warning.startswith(
        f"epsilon={epsilon:g} would close all 9 remaining branches: {SLOTS[4]}, which has the largest response"
    )
    timm_eps.remove_closed(model)
    assert list(gates(model)) == [SLOTS[4]]


def test_the_last_branch_may_change(model):
    """When another branch opens again, the branch that stayed may close."""
    pruner = EpsilonPruner(model, epsilon=5.0, patience=9)
    respond(model, {SLOTS[4]: 2.0}, default=1.0)
    pruner.step()
    respond(model, {SLOTS[4]: 2.0, SLOTS[7]: 6.0}, default=1.0)
    pruner.step()
    assert {slot for slot, gate in gates(model).items() if not gate.closed} == {SLOTS[4], SLOTS[7]}
    assert {gate.epsilon for gate in gates(model).values()} == {5.0}
    respond(model, {SLOTS[4]: 2.0, SLOTS[7]: 6.0}, default=1.0)
    pruner.step()
    assert [slot for slot, gate in gates(model).items() if not gate.closed] == [SLOTS[7]]


def test_a_frozen_branch_is_one_that_stays(model, caplog):
    """The frozen branch has no response, and no gate closes it."""
    pruner = EpsilonPruner(model, epsilon=100.0, patience=1)
    respond(model, {SLOTS[4]: -1.0})
    pruner.step()
    assert list(gates(model)) == [SLOTS[4]]
    assert not caplog.messages


def test_the_last_branch_is_taken_up_as_it_was(model):
    pruner = EpsilonPruner(model, epsilon=1e9, patience=1)
    respond(model, {SLOTS[4]: 10.5})
    pruner.step()
    again = EpsilonPruner(tiny_net(), epsilon=1e9, patience=1)
    again.load_state_dict(json.loads(json.dumps(pruner.state_dict(), allow_nan=False)))
    assert {slot: gate.epsilon for slot, gate in gates(again.model).items()} == {SLOTS[4]: 0.0}


@pytest.mark.parametrize("given", [{}, {"epsilon": 1.0, "keep": 0.5}])
def test_exactly_one_of_epsilon_and_keep(model, given):
    with pytest.raises(ValueError, match="Give exactly one of epsilon, keep"):
        EpsilonPruner(model, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be"),
        ({"epsilon": math.nan}, "epsilon must be"),
        ({"epsilon": math.inf}, r"epsilon must be .* at most 3\.4e\+38, got inf"),
        ({"epsilon": 1e39}, r"epsilon must be .* got 1e\+39"),
        ({"keep": 1.5}, "keep must be"),
        ({"keep": 10}, "keep=10 branches, but EpsResNet has only 9"),
        ({"epsilon": 1.0, "patience": 0}, "patience must be"),
        ({"epsilon": 1.0, "warmup_epochs": -1}, "warmup_epochs must be"),
        ({"epsilon": 1.0, "ramp_epochs": 3}, "ramp_epochs=3 needs a budget such as keep"),
        ({"epsilon": 1.0, "criterion": "importance"}, "criterion='importance' needs a budget such as keep"),
        (
            {"keep": 0.5, "criterion": "size"},
            "criterion must be one of response, importance, stage_ends, last, got 'size'",
        ),
    ],
)
def test_bad_arguments(model, given, message):
    with pytest.raises(ValueError, match=message):
        EpsilonPruner(model, **given)


def test_gates_are_added_where_there_are_none():
    model = timm.create_model("resnetv2_50", num_classes=2)
    assert EpsilonPruner(model, keep=0.5).total == 16
    with pytest.raises(ValueError, match="VGG has no residual branch"):
        EpsilonPruner(timm.create_model("vgg11", num_classes=2), keep=0.5)


def test_containers_are_refused():
    remedies = {
        nn.Sequential(tiny_net()): r"the timm model inside it, model\.0",
        nn.Sequential(nn.Linear(2, 2)): r"one that timm\.create_model makes",
    }
    for other, remedy in remedies.items():
        with pytest.raises(ValueError, match=f"is not a timm model; pass {remedy}"):
            EpsilonPruner(other, epsilon=1.0)


def test_wrapped_models_are_refused(model):
    with pytest.raises(ValueError, match="Got a compiled model"):
        EpsilonPruner(torch.compile(model), epsilon=1.0)


def test_a_pruned_model_can_be_pruned_further(model):
    for gate in list(gates(model).values())[:3]:
        gate.closed = True
    timm_eps.remove_closed(model)
    pruner = EpsilonPruner(model, keep=4, patience=1)
    assert (pruner.total, pruner.discarded) == (9, 3)
    for _ in range(2):
        respond(model, {slot: float(index + 1) for index, slot in enumerate(SLOTS)})
        pruner.step()
    assert model.removed == SLOTS[:5]


@pytest.mark.parametrize("make", [tiny_net, lambda: timm.create_model("eps_test_vit", num_classes=10)])
def test_batches_in_evaluation_mode_alone_are_spoken_of(make, caplog):
    model = make().eval()
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    size = model.pretrained_cfg["input_size"]
    for _ in range(2):
        model(torch.randn(2, *size)).sum().backward()
        assert pruner.step() == []
    assert [message.startswith("No branch saw a batch in training mode") for message in caplog.messages] == [True]


def test_batches_in_training_mode_are_fine(model, optimizer, caplog):
    pruner = EpsilonPruner(model, optimizer, epsilon=1e-9)
    train_step(model, optimizer)
    pruner.step()
    assert caplog.messages == []


def freeze(*paths):
    def change(model):
        for path in paths:
            model.get_submodule(path).requires_grad_(False)

    return change


def by_timm(model):
    timm.utils.freeze(model, ["stages.0"])


FROZEN = {
    "a stage": (tiny_net, freeze("stages.0"), SLOTS[:3]),
    "timm's freeze": (tiny_net, by_timm, SLOTS[:3]),
    "a post-activation stage": (
        lambda: timm.create_model("eps_test_resnet", num_classes=10),
        freeze("layer1", "layer2"),
        ["layer1.0.drop_path", "layer2.0.drop_path"],
    ),
    "blocks": (
        lambda: timm.create_model("eps_test_vit", num_classes=10),
        freeze("blocks.0", "blocks.1"),
        ["blocks.0.drop_path1", "blocks.0.drop_path2", "blocks.1.drop_path1", "blocks.1.drop_path2"],
    ),
    "half a block": (
        lambda: timm.create_model("eps_test_vit", num_classes=10),
        freeze("blocks.0.norm1", "blocks.0.attn"),
        ["blocks.0.drop_path1"],
    ),
}


def end_epochs(pruner, number=3):
    """The frozen branches come first in the networks. They get the smallest responses and importances."""
    for _ in range(number):
        ranks = {slot: float(rank) for rank, slot in enumerate(gates(pruner.model), 1)}
        respond(pruner.model, ranks)
        matter(pruner.model, ranks)
        pruner.step()


@pytest.mark.parametrize(
    "given", mostly_slow([{"epsilon": 1e9}, {"keep": 0.5}, {"keep": 0.5, "criterion": "importance"}], 2)
)
@pytest.mark.parametrize("name", FROZEN)
def test_branches_that_cannot_learn_stay(name, given, caplog):
    make, change, frozen = FROZEN[name]
    model = make()
    change(model)
    pruner = EpsilonPruner(model, patience=1, **given)
    reached = pruner.total - pruner.schedule.kept(pruner.total) if "keep" in given else pruner.total - len(frozen)
    assert any("are frozen and stay" in text for text in caplog.messages) == (pruner.total - len(frozen) < reached)
    end_epochs(pruner)
    assert not set(frozen) & set(model.removed)
    if "keep" in given:
        reached = min(reached, pruner.total - len(frozen))
        assert len(model.removed) == reached, "they count as those that stay"


@pytest.mark.parametrize("given", [{"epsilon": 1e9}, {"keep": 0.5}, {"keep": 0.5, "criterion": "importance"}])
def test_frozen_branches_go_when_asked(model, given):
    freeze("stages.0")(model)
    end_epochs(EpsilonPruner(model, patience=1, prune_frozen=True, **given))
    assert set(model.removed) & set(SLOTS[:3])


@pytest.mark.parametrize("given", [{"keep": 3}, {"keep": 1, "criterion": "importance"}, {"keep": 0.3}])
def test_a_budget_that_frozen_branches_exceed(model, given, caplog):
    freeze("stages.0", "stages.1.blocks.0")(model)
    pruner = EpsilonPruner(model, patience=1, **given)
    (message,) = caplog.messages
    wanted = 9 - pruner.schedule.kept(9)
    assert message.startswith("4 of the 9 branches are frozen and stay")
    assert f"at most 5 branches can be removed, but {wanted} must be" in message
    assert "prune_frozen=True" in message
    end_epochs(pruner, 4)
    assert model.removed == SLOTS[4:]


def test_all_branches_are_frozen(model, caplog):
    model.stages.requires_grad_(False)
    EpsilonPruner(model, epsilon=1.0)
    assert "9 of the 9 branches are frozen and stay" in caplog.text


def test_frozen_and_set_free_again(model):
    """A closed branch opens when it is frozen. An unfrozen branch may close."""
    pruner = EpsilonPruner(model, epsilon=1.0, patience=2)
    low = dict.fromkeys(SLOTS[:2], 0.1)
    respond(model, low)
    pruner.step()
    assert pruner.discarded == 2
    freeze("stages.0.blocks.0")(model)
    respond(model, low)
    assert pruner.step() == SLOTS[1:2]
    assert pruner.discarded == 1
    model.requires_grad_(True)
    respond(model, low)
    pruner.step()  # the branch was open in this epoch, with ε = 0
    for expected in ([], SLOTS[:1]):
        respond(model, low)
        assert pruner.step() == expected


def test_places_of_frozen_branches():
    assert shares({"a": 3, "b": 3, "c": 3}, 6, {"a": 3, "b": 1, "c": 1}) == {"a": 3, "b": 2, "c": 1}
    assert shares({"a": 6, "b": 2}, 8, {"a": 1, "b": 2}) == {"a": 6, "b": 2}


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("test_resnet", 3),  # norms
        ("nfnet_f0", 12),  # gains; the first of each stage
        ("resnet18", 8),
    ],
)
def test_branches_that_begin_at_zero_are_named(name, slots, caplog):
    if name == "nfnet_f0":
        model = timm.create_model("nf_resnet26", num_classes=3)
    else:
        model = timm.create_model(name, num_classes=3, zero_init_last=True)
    EpsilonPruner(model, keep=0.5)
    found = [text for text in caplog.messages if "output zero" in text]
    assert len(found) == 1
    assert next(iter(gates(model))) in found[0]
    assert "eps_* twin" in found[0]


@pytest.mark.parametrize("name", ["eps_test_resnet", "eps_resnet18", "eps_test_vit", "eps_resnet20"])
def test_twins_do_not_begin_at_zero(name, caplog):
    EpsilonPruner(timm.create_model(name, num_classes=3), keep=0.5)
    EpsilonPruner(timm.create_model("test_resnet", num_classes=3, zero_init_last=False), keep=0.5)
    assert caplog.messages == []


def grey_stem(path, make):
    def build():
        model = make()
        old = model.get_submodule(path)
        owner, _, name = path.rpartition(".")
        layer = nn.Conv2d(1, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
        setattr(model.get_submodule(owner), name, layer)
        return model

    return build


GREY = {
    "eps_resnet20": grey_stem("stem.conv", tiny_net),
    "eps_test_resnet": grey_stem("conv1.0", lambda: timm.create_model("eps_test_resnet")),
    "eps_test_vit": grey_stem("patch_embed.proj", lambda: timm.create_model("eps_test_vit")),
    "test_vit": grey_stem("patch_embed.proj", lambda: timm.create_model("test_vit")),
}


@pytest.mark.parametrize("name", GREY)
def test_a_stem_made_by_hand_is_found_at_once(name):
    if not name.startswith("eps_"):
        with pytest.raises(ValueError, match="in_chans="):
            timm_eps.add_gates(GREY[name]())
    with pytest.raises(ValueError, match=r"does not accept images of \(3, \d+, \d+\).*in_chans="):
        EpsilonPruner(GREY[name](), epsilon=1.0)


def test_a_stem_made_by_timm():
    model = timm.create_model("eps_test_resnet", num_classes=3, in_chans=1)
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    respond(model, {"layer2.0.drop_path": 0.1})
    assert pruner.step() == ["layer2.0.drop_path"]


def vit():
    """A network without batch statistics, so that parts of a batch have the same gradients as the whole."""
    torch.manual_seed(0)
    return timm.create_model("eps_test_vit", num_classes=4, img_size=32)


BATCHES = [
    (torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), torch.arange(8) % 4) for seed in range(3)
]


class Amp:
    """Steps by a GradScaler whose scale changes. Steps that overflow are skipped."""

    def __init__(self, *scales):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scales[0])
        self.scales = list(scales)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, optimizer):
        self.scaler.step(optimizer)
        self.scales.append(self.scales.pop(0))
        self.scaler.update(self.scales[0])


class Plain:
    def backward(self, loss):
        loss.backward()

    def step(self, optimizer):
        optimizer.step()


def measured(way, parts=1, factor=1.0, make_optimizer=None, is_set_later=False):
    model = vit()
    parameters = timm_eps.param_groups(model, 0.05)
    optimizer = (make_optimizer or (lambda p: torch.optim.SGD(p, lr=1e-3)))(parameters)
    pruner = EpsilonPruner(model, None if is_set_later else optimizer, keep=0.5, criterion="importance")
    pruner.optimizer = optimizer
    for images, labels in BATCHES:
        model.train()
        optimizer.zero_grad()
        for some, theirs in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            way.backward(factor * F.cross_entropy(model(some), theirs))
        way.step(optimizer)
    pruner.step()
    return pruner.history[0]["importances"]


WAYS = {
    "scaled": lambda: measured(Amp(2.0**16)),
    "with a scale that changes": lambda: measured(Amp(2.0**16, 2.0**4, 2.0**10)),
    "micro-batches, of mean losses": lambda: measured(Plain(), parts=4, factor=0.25),
    "micro-batches and a scale": lambda: measured(Amp(2.0**16, 2.0**4), parts=2, factor=0.5),
    "an optimizer set later": lambda: measured(Plain(), parts=2, factor=0.5, is_set_later=True),
    "lookahead": lambda: measured(
        Plain(), make_optimizer=lambda p: timm.optim.Lookahead(torch.optim.SGD(p, lr=1e-3), k=100)
    ),
    "fused": lambda: measured(
        Amp(2.0**16, 2.0**4), parts=2, factor=0.5, make_optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, fused=True)
    ),
}


@pytest.mark.parametrize("name", mostly_slow(WAYS, 1, 3))
def test_importance_is_that_of_whole_batches_without_a_scale(name):
    expected = measured(Plain())
    found = WAYS[name]()
    assert found == pytest.approx(expected, rel=1e-3)
    assert sorted(found, key=found.__getitem__) == sorted(expected, key=expected.__getitem__)
    assert sum(found.values()) == pytest.approx(len(BATCHES))


def test_a_step_that_overflows_has_no_importance():
    """GradScaler skips the step. Its gradients leave nothing in the gates."""
    model = vit()
    optimizer = torch.optim.SGD(timm_eps.param_groups(model, 0.05), lr=1e-3)
    pruner = EpsilonPruner(model, optimizer, keep=0.5, criterion="importance")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-110)
    steps = 0
    for images, labels in BATCHES:
        optimizer.zero_grad()
        model.train()
        scaler.scale(1e3 * F.cross_entropy(model(images), labels)).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        steps += scaler.get_scale() == before
    pruner.step()
    importances = pruner.history[0]["importances"].values()
    assert steps == 2
    assert all(math.isfinite(value) for value in importances)
    assert 1 <= sum(importances) <= 2 + 1e-4


def trained(epochs: int = 9, **arguments) -> tuple[EpsilonPruner, list[set[bool]]]:
    """A pruner after a short training, and which states of gates each epoch had: active or not."""
    torch.manual_seed(0)
    model = tiny_net()
    optimizer = torch.optim.SGD(timm_eps.param_groups(model, 5e-2), lr=0.05, momentum=0.9)
    pruner = EpsilonPruner(model, optimizer, **arguments)
    active = []
    for _ in range(epochs):
        active.append({gate.is_active() for gate in gates(model).values()})
        for _ in range(3):
            train_step(model, optimizer)
        pruner.step()
    return pruner, active


def test_gates_work_only_while_branches_must_close():
    _, active = trained(keep=3, warmup_epochs=3, ramp_epochs=3, patience=1)
    assert active == [{False}] * 2 + [{True}] * 3 + [{False}] * 4
    _, active = trained(epsilon=1e-6, warmup_epochs=3, epochs=5)
    assert active == [{False}] * 3 + [{True}] * 2


class Rising:
    """A schedule of a user, which may read the responses of every epoch."""

    def __call__(self, epoch, responses, total):
        return dict.fromkeys(responses, 0.01 * epoch)


class AlwaysRising(timm_eps.BudgetEpsilon):
    """A budget of a user, with an ε of its own in every epoch."""

    def __call__(self, epoch, responses, total):
        return dict.fromkeys(responses, 0.01 * epoch)


@pytest.mark.parametrize(
    "arguments",
    [
        {"schedule": Rising()},
        {"schedule": AlwaysRising(3, warmup_epochs=3)},
        {"keep": 3, "warmup_epochs": 3, "measure_always": True},
    ],
    ids=["own", "own budget", "always"],
)
def test_all_responses_are_measured_for_who_reads_them(arguments):
    pruner, active = trained(**arguments, epochs=4)
    assert active == [{True}] * 4
    assert [len(record["responses"]) for record in pruner.history[:3]] == [9] * 3


BUDGETS = {"keep": {"keep": 3}, "parameters": {"target_params": 0.4}}


@pytest.mark.parametrize(
    ("budget", "criterion", "live_removal"),
    mostly_slow(itertools.product(BUDGETS, ["response", "importance", "last"], [True, False]), 0, 3),
)
def test_decisions_do_not_depend_on_unread_responses(budget, criterion, live_removal):
    """Measuring in every epoch changes no weight and no decision."""
    arguments = {**BUDGETS[budget], "criterion": criterion, "live_removal": live_removal}
    arguments |= {"warmup_epochs": 2, "ramp_epochs": 2, "patience": 1}
    (lean, _), (full, _) = (trained(**arguments, measure_always=always) for always in (False, True))
    for name in ("epsilon", "closed", "removed"):
        assert [record[name] for record in lean.history] == [record[name] for record in full.history], name
    assert lean.discarded == full.discarded >= 3
    for ours, theirs in zip(lean.model.parameters(), full.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("budget", mostly_slow(BUDGETS, 0))
def test_without_live_removal_closed_branches_stay_closed_and_the_others_cost_nothing(budget):
    arguments = {"warmup_epochs": 1, "ramp_epochs": 2, "patience": 1, "live_removal": False}
    pruner, active = trained(**BUDGETS[budget], **arguments)
    closed = {slot for slot, gate in gates(pruner.model).items() if gate.closed}
    assert len(closed) >= 3
    assert {slot for slot, gate in gates(pruner.model).items() if gate.is_active()} == closed
    assert active[-1] == {True, False}
    removed, _ = trained(**BUDGETS[budget], **{**arguments, "live_removal": True})
    assert set(removed.model.removed) == closed

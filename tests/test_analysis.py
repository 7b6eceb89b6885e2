"""Effects and costs of branches, compared with a network without the branch; and choices that keep to budgets."""

from __future__ import annotations

import copy
import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import close, tiny_net
from torch.utils.data import DataLoader, TensorDataset

import timm_eps
from timm_eps import Analysis, analyze, prune
from timm_eps.report import count_macs, count_parameters, paired_latency
from timm_eps.surgery.branches import evaluating, gates, probe_batch

FAMILIES = {
    "eps_resnet20": {},
    "eps_resnet18": {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}},
    "eps_vit_tiny_patch16_224": {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 32},
    "eps_convnext_atto": {"depths": (1, 2, 2, 1), "pretrained_cfg_overlay": {"input_size": (3, 64, 64)}},
    "eps_mobilenetv3_small_050": {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}},
    "eps_tf_efficientnet_lite0": {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}},
    "eps_resnetv2_50": {"layers": (1, 2, 1, 1), "pretrained_cfg_overlay": {"input_size": (3, 32, 32)}},
    "eps_mixer_s32_224": {"img_size": 64},
}

QUICK = ("eps_vit_tiny_patch16_224",)  # two slots per block


def small_net(**arguments) -> torch.nn.Module:
    """Four branches, and a classifier of five classes."""
    return tiny_net(layers=(1, 2, 1), **{"num_classes": 5, **arguments})


FEW = [f"stages.{stage}.blocks.{block}.drop_path" for stage, block in ((0, 0), (1, 0), (1, 1), (2, 0))]


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **FAMILIES[name]).eval()


def batches_for(model: torch.nn.Module, count: int = 2, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = probe_batch(model, count * size).split(size)
    return [(batch, torch.randint(0, model.num_classes, (len(batch),))) for batch in images]


def mean_loss(model: torch.nn.Module, batches) -> float:
    with evaluating(model):
        sums = [float(F.cross_entropy(model(images), labels)) * len(labels) for images, labels in batches]
    return sum(sums) / sum(len(labels) for _, labels in batches)


def quick(model, batches, **options) -> Analysis:
    return analyze(model, batches, **{"batch_sizes": (), "progress": False, **options})


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_rise_is_what_the_pruned_network_loses(name):
    """One branch alone, and the branches closed along the curve: loss, parameters and multiply-adds agree exactly."""
    model = network(name)
    batches = batches_for(model)
    report = quick(model, batches, rerank=2)
    assert [branch.slot for branch in report.branches] == list(gates(model))
    image = batches[0][0][:1]
    dense = mean_loss(model, batches)
    branches = report.branches if name not in QUICK else report.branches[len(report.branches) // 2 :][:1]
    for branch in branches:
        pruned = copy.deepcopy(model)
        assert prune(pruned, [branch.slot]) == [branch.slot]
        assert branch.rise == mean_loss(pruned, batches) - dense
        assert branch.parameters == count_parameters(model) - count_parameters(pruned)
        assert branch.macs == count_macs(model, image) - count_macs(pruned, image)
    for steps in (report.curve[:3], report.curve):
        pruned = copy.deepcopy(model)
        prune(pruned, [slot for step in steps for slot in step.slots])
        assert steps[-1].loss == mean_loss(pruned, batches)
        assert (steps[-1].parameters, steps[-1].macs) == (count_parameters(pruned), count_macs(pruned, image))
        assert steps[-1].branches == len(gates(pruned))


def test_the_curve_closes_what_costs_least_each_time():
    model = small_net()
    batches = batches_for(model)
    report = quick(model, batches, rerank=4)
    closed: list[str] = []
    for step in report.curve[1:]:
        losses = {}
        for slot in set(FEW).difference(closed):
            close(tried := copy.deepcopy(model), *closed, slot)
            losses[slot] = mean_loss(tried, batches)
        assert step.loss == min(losses.values()) == losses[step.slots[0]]
        closed += step.slots
    assert sorted(closed) == FEW


def test_without_ranking_again_the_order_is_that_of_the_rises():
    model = small_net()
    report = quick(model, batches_for(model), rerank=1)
    by_rise = sorted(report.branches, key=lambda branch: branch.rise)
    assert [step.slots for step in report.curve[1:]] == [[branch.slot] for branch in by_rise]
    assert [step.branches for step in report.curve] == [4, 3, 2, 1, 0]


def state_of(model: torch.nn.Module) -> dict:
    return {
        "weights": {key: value.clone() for key, value in model.state_dict().items()},
        "modules": [(path, id(module), module.training) for path, module in model.named_modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "gates": [(gate.closed, gate.epsilon, float(gate.response)) for gate in gates(model).values()],
        "instance": [sorted(vars(module)) for module in model.modules()],
        "parameters": [(id(parameter), parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        "random": torch.random.get_rng_state(),
    }


def test_the_model_stays_as_it_is():
    model = small_net().train()
    model.stages[1].eval()
    timm_eps.add_gates(model, 0.25)
    close(model, FEW[2])
    data = TensorDataset(torch.randn(12, 3, 8, 8), torch.randint(0, 5, (12,)))
    before = state_of(model)
    report = analyze(model, DataLoader(data, 4, shuffle=True), batch_sizes=(2,), progress=False)
    report.choose(target_macs=0.6)
    report.choose(target_latency=0.9)
    after = state_of(model)
    weights = before.pop("weights"), after.pop("weights")
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    random = before.pop("random"), after.pop("random")
    assert torch.equal(*random)
    assert before == after


def test_what_is_closed_already_counts_as_removed():
    model = small_net()
    batches = batches_for(model)
    close(model, *FEW[:2])
    pruned = copy.deepcopy(model)
    timm_eps.remove_closed(pruned)
    some, other = quick(model, batches), quick(pruned, batches)
    assert (some.branches, some.curve) == (other.branches, other.curve)
    assert some.choose(keep=1) == other.choose(keep=1)


def test_a_model_without_gates_gets_them_when_it_is_pruned():
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=5, **FAMILIES["eps_vit_tiny_patch16_224"]).eval()
    report = quick(plain, batches_for(plain), rerank=1)
    assert not gates(plain)
    slots = report.choose(keep=5)
    assert prune(plain, slots) == slots
    assert len(gates(plain)) == 5


def test_responses_are_those_of_the_images():
    model = small_net()
    batches = batches_for(model, 3)
    responses = [branch.response for branch in quick(model, batches).branches]
    for gate in gates(model).values():
        gate.train()
        gate.measures_response = True
    with torch.no_grad():
        for images, _ in batches:
            model(images)
    assert responses == [float(gate.response) for gate in gates(model).values()]


def test_transformers_models_and_dicts():
    model = small_net()
    wrapped = timm_eps.EpsResNetForImageClassification.from_timm(copy.deepcopy(model)).eval()
    pairs = batches_for(model)
    report = quick(wrapped, [{"pixel_values": images, "labels": labels} for images, labels in pairs])
    assert report == quick(model, pairs)
    slots = report.choose(target_params=0.5)
    assert prune(wrapped, slots) == slots
    assert wrapped.config.model_args["removed"] == slots


def test_a_generator_is_read_once():
    model = small_net()
    batches = batches_for(model)
    assert quick(model, (batch for batch in batches)) == quick(model, batches)


def test_probabilities_as_labels_and_another_loss():
    model = small_net()
    [(images, labels)] = batches_for(model, 1)
    hard, soft = quick(model, [(images, labels)]), quick(model, [(images, F.one_hot(labels, 5).double())])
    assert soft.dense.accuracy == hard.dense.accuracy
    assert soft.dense.loss == pytest.approx(hard.dense.loss, rel=1e-6)
    doubled = quick(model, [(images, labels)], loss=lambda logits, labels: 2 * F.cross_entropy(logits, labels))
    assert doubled.dense.loss == pytest.approx(2 * hard.dense.loss, rel=1e-6)


@pytest.fixture(scope="module")
def analyzed() -> tuple[torch.nn.Module, Analysis]:
    torch.manual_seed(0)
    model = small_net()
    return model, analyze(model, batches_for(model), batch_sizes=(1, 4), progress=False)


@pytest.mark.parametrize("target", [1.0, 0.8, 0.45])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_targets_are_kept(analyzed, unit, target):
    """The result is never above the target, and no removed branch could be put back."""
    model, report = analyzed

    def left(slots):
        pruned = copy.deepcopy(model)
        prune(pruned, slots)
        return count_macs(pruned, torch.zeros(1, 3, 8, 8)) if unit == "macs" else count_parameters(pruned)

    slots = report.choose(**{f"target_{unit}": target})
    goal = target * left([])
    assert left(slots) <= goal
    assert all(left([other for other in slots if other != slot]) > goal for slot in slots)
    assert report.choose(**{f"target_{unit}": int(goal)}) == slots
    assert slots == [slot for slot in FEW if slot in slots]


@pytest.mark.parametrize(("keep", "left"), [(1.0, 4), (0.5, 2), (3, 3), (1, 1), (0.01, 1), (20, 4)])
def test_a_number_of_branches(analyzed, keep, left):
    _model, report = analyzed
    assert len(FEW) - len(report.choose(keep=keep)) == left


def test_latency_is_corrected_by_what_is_measured(analyzed, monkeypatch):
    """On a machine where every removed branch saves a tenth, whatever the prediction was."""
    _model, report = analyzed
    asked = []

    def stopwatch(self, batch_size, dense=None):
        asked.append(batch_size)
        whole = report.dense.milliseconds[batch_size]
        return lambda slots: whole * (1 - 0.1 * len(slots))

    monkeypatch.setattr(type(report.live), "stopwatch", stopwatch)
    assert len(report.choose(target_latency=0.8)) == 2
    assert len(report.choose(target_latency=0.8, batch_size=1)) == 2
    assert asked == [4, 1]


def test_a_choice_loses_no_more_than_the_curve(analyzed):
    _model, report = analyzed
    for keep in range(1, 4):
        slots = report.choose(keep=keep)
        assert report.live.loss_without(slots) <= report.curve[4 - keep].loss


def test_what_depth_cannot_reach_is_said(analyzed):
    _, report = analyzed
    for name in ("target_macs", "target_params", "target_latency"):
        with pytest.raises(ValueError, match=rf"{name}=1e-05 cannot be reached by removing branches: .* 4 branches"):
            report.choose(**{name: 1e-5})


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({}, "exactly one of target_latency, target_macs, target_params, keep, got none"),
        ({"keep": 3, "target_macs": 0.5}, "got target_macs=0.5, keep=3"),
        ({"keep": 0}, "keep must be a fraction"),
        ({"target_macs": -0.5}, "target_macs must be a fraction"),
        ({"target_params": math.nan}, "target_params must be a fraction"),
        ({"target_latency": "0.5"}, "target_latency must be a fraction"),
        ({"target_latency": 0.5, "batch_size": 7}, r"batch_size=7 was not measured, only \[1, 4\]"),
        ({"target_macs": 0.5, "batch_size": 4}, "batch_size=4 needs target_latency"),
    ],
)
def test_budgets_that_cannot_be(analyzed, budget, told):
    with pytest.raises(ValueError, match=told):
        analyzed[1].choose(**budget)


def test_a_model_that_was_pruned_since_is_noticed():
    model = small_net()
    report = quick(model, batches_for(model))
    prune(model, report.choose(keep=3))
    with pytest.raises(ValueError, match="has changed since the analysis"):
        report.choose(keep=1)


GOOD = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([], "contains no images"),
        (GOOD[0], "got Tensor; put a single batch into a list"),
        ({"pixel_values": GOOD[0], "labels": GOOD[1]}, "got dict; put a single batch into a list"),
        ([GOOD, GOOD[0]], "Batch 1 must be a pair"),
        ([{"pixel_values": GOOD[0]}], "Batch 0 has no 'labels'"),
        ([(GOOD[0].byte(), GOOD[1])], r"images of batch 0 must be a float tensor .* got torch.uint8"),
        ([(GOOD[0][0], GOOD[1])], r"got torch.float32 of shape \(3, 8, 8\)"),
        ([(GOOD[0], GOOD[1][:1])], r"labels of batch 0 must be a tensor \(2,\) .* shape \(1,\)"),
        ([(GOOD[0], GOOD[1].float())], "labels of batch 0 must be whole class numbers"),
        ([(GOOD[0], torch.tensor([0, 5]))], "label 5, but the network has the classes 0 to 4"),
        ([(GOOD[0], torch.tensor([-1, 0]))], "label -1, but the network has the classes 0 to 4"),
    ],
)
def test_batches_of_another_kind(batches, told):
    with pytest.raises(ValueError, match=told):
        quick(small_net(), batches)


def test_models_that_cannot_be_analyzed():
    with pytest.raises(ValueError, match="has no classifier"):
        quick(small_net(num_classes=0), [GOOD])
    with pytest.raises(ValueError, match="has no open branch"):
        quick(small_net(removed=FEW), [GOOD])
    with pytest.raises(ValueError, match="rerank must be a whole number"):
        quick(small_net(), [GOOD], rerank=0)
    with pytest.raises(ValueError, match="batch_sizes must be a whole number"):
        quick(small_net(), [GOOD], batch_sizes=(0,))


def test_a_report_from_its_file(analyzed, tmp_path):
    model, report = analyzed
    report.save(tmp_path / "a.json")
    again = Analysis.load(tmp_path / "a.json")
    assert again == report
    assert str(again) == str(report)
    slots = again.choose(target_macs=0.5)
    prune(pruned := copy.deepcopy(model), slots)
    assert count_macs(pruned, torch.zeros(1, 3, 8, 8)) <= 0.5 * report.dense.macs


def test_a_diverged_network_makes_a_file_and_a_picture(tmp_path):
    model = small_net()
    torch.nn.init.constant_(model.stages[1].blocks[1].conv1.weight, math.nan)
    report = quick(model, batches_for(model))
    assert math.isnan(report.dense.loss)
    report.save(tmp_path / "a.json")
    report.plot(tmp_path / "a.png")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert math.isnan(Analysis.load(tmp_path / "a.json").dense.loss)
    assert "nan" in str(report)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content.update(format="x"), "its format is not"),
        (lambda content: content.pop("images"), "'images' must be of type int"),
        (lambda content: content.update(image_shape=[3, "8", 8]), "'image_shape' must be 3 whole numbers"),
        (lambda content: content.update(curve=[]), "'curve' must be of type list, at least 1"),
        (lambda content: content["curve"][0].update(slots=[1]), r"'curve\[0\].slots' must contain slot paths"),
        (lambda content: content["branches"][1].update(rise="big"), r"'branches\[1\].rise' must be a number or null"),
        (lambda content: content["branches"][1].update(milliseconds={"x": 1}), r"branches\[1\].milliseconds has the"),
    ],
)
def test_files_of_another_kind(analyzed, tmp_path, change, told):
    analyzed[1].save(path := tmp_path / "a.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told):
        Analysis.load(path)
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match="is not a report"):
        Analysis.load(path)


def test_picture_and_table(analyzed, tmp_path):
    _, report = analyzed
    report.plot(tmp_path / "a.png")
    report.plot(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    lines = str(report).splitlines()
    assert lines[0] == "eps_resnet20: 8 images of 3x8x8"
    assert [line.split()[0] for line in lines if line.startswith("stages.")][:4] == FEW
    assert len({len(line) for line in lines[3:]} - {0}) == 1


# One twin of each kind, with small images or fewer blocks, so that the whole test takes minutes.
TWINS = {
    "eps_resnet20": {},
    "eps_resnet50": {"pretrained_cfg_overlay": {"input_size": (3, 96, 96)}},
    "eps_resnetv2_50": {"pretrained_cfg_overlay": {"input_size": (3, 96, 96)}},
    "eps_tf_efficientnet_lite0": {"pretrained_cfg_overlay": {"input_size": (3, 96, 96)}},
    "eps_mobilenetv3_large_100": {"pretrained_cfg_overlay": {"input_size": (3, 96, 96)}},
    "eps_regnety_004": {"pretrained_cfg_overlay": {"input_size": (3, 96, 96)}},
    "eps_convnext_atto": {"pretrained_cfg_overlay": {"input_size": (3, 96, 96)}},
    "eps_vit_tiny_patch16_224": {"img_size": 96},
    "eps_mixer_s32_224": {"img_size": 96},
    "eps_poolformer_s12": {"pretrained_cfg_overlay": {"input_size": (3, 96, 96)}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_targets_are_reached_on_every_kind_of_network(name):
    """Targets halfway to the smallest depth: counts stay below by less than one branch, latency within 5 %."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **TWINS[name]).eval()
    batches = batches_for(model)
    image = batches[0][0][:1]
    report = analyze(model, batches, batch_sizes=(8,), rerank=1, progress=False)
    dense, least = report.curve[0], report.curve[-1]
    for unit, field, count in (
        ("macs", "macs", lambda net: count_macs(net, image)),
        ("params", "parameters", count_parameters),
    ):
        goal = (getattr(dense, field) + getattr(least, field)) // 2
        slots = report.choose(**{f"target_{unit}": goal})
        prune(pruned := copy.deepcopy(model), slots)
        assert goal - max(getattr(branch, field) for branch in report.branches) < count(pruned) <= goal
    share = (dense.milliseconds[8] + least.milliseconds[8]) / dense.milliseconds[8] / 2
    slots = report.choose(target_latency=share)
    prune(pruned := copy.deepcopy(model), slots)
    found = paired_latency({"dense": model, "pruned": pruned}, batches[0][0].repeat(2, 1, 1, 1), 31)
    step = max(branch.milliseconds[8] for branch in report.branches) / dense.milliseconds[8]
    reached = found["pruned"] / found["dense"]
    print(
        f"{name}: asked {share:.3f}, reached {reached:.3f} ({100 * (reached / share - 1):+.1f} %), a branch {step:.3f}"
    )
    assert reached <= 1.05 * share
    assert reached >= 0.95 * share or reached > share - step

"""Gates are added, closed branches are removed with a proof, and bad input gets a clear error."""

from __future__ import annotations

import random
import re

import pytest
import timm
import torch
from conftest import SLOTS, close, tiny_net
from torch import nn

import timm_eps
from timm_eps.surgery.branches import find_slots, gates
from timm_eps.surgery.removal import collapsed_copy, remove, removed_slots


@pytest.mark.parametrize("seed", range(5))
def test_removal_changes_no_output(seed, images):
    """Random halves are closed: the gated and the pruned model agree bit for bit, and the parameters are removed."""
    model = tiny_net()
    chosen = random.Random(seed).sample(SLOTS, 5)
    close(model, *chosen)
    before = model(images)
    assert sorted(timm_eps.remove_closed(model)) == sorted(chosen)
    assert torch.equal(model(images), before)
    assert not any(
        key.startswith(tuple(slot.removesuffix("drop_path") for slot in chosen)) for key in model.state_dict()
    )
    assert model.removed == sorted(chosen)
    assert set(gates(model)) == set(SLOTS) - set(chosen)


def test_all_blocks_may_go(images):
    model = tiny_net()
    close(model, *SLOTS)
    before = model(images)
    assert timm_eps.remove_closed(model) == SLOTS
    assert torch.equal(model(images), before)
    assert not gates(model)
    assert timm_eps.remove_closed(model) == []


def test_removed_rebuilds_the_structure(images):
    model = tiny_net()
    close(model)
    timm_eps.remove_closed(model)
    again = timm.create_model("eps_resnet20", removed=model.removed)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), model(images))
    assert again.removed == model.removed


def test_timm_itself_saves_the_structure(tmp_path, images):
    """Saving with timm alone keeps the structure."""
    model = tiny_net()
    close(model)
    timm_eps.remove_closed(model)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))


def test_removal_keeps_modes_random_numbers_and_statistics():
    model = tiny_net().train()
    model.stages[2].eval()
    close(model)
    state = torch.random.get_rng_state()
    statistics = model.norm.running_mean.clone()
    timm_eps.remove_closed(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(model.norm.running_mean, statistics)
    assert model.stages[0].training
    assert not model.stages[2].training


def test_copy_leaves_the_model_alone(images):
    model = tiny_net().train()
    close(model)
    twin = collapsed_copy(model)
    assert not twin.training
    assert model.training
    assert len(gates(model)) == 9
    assert torch.equal(twin(images), model.eval()(images))


def test_not_finite_models_lose_blocks_too(images):
    """A run whose loss exploded must not fail in surgery, which would hide the cause."""
    model = tiny_net()
    model.head.fc.bias.data.fill_(torch.nan)
    close(model)
    assert len(timm_eps.remove_closed(model)) == 5


def test_an_open_gate_is_refused():
    model = tiny_net()
    with pytest.raises(ValueError, match=r"Cannot remove stages\.0\.blocks\.1\.drop_path: its gate is open"):
        remove(model, ["stages.0.blocks.1.drop_path"])


def test_what_is_no_identity_loses_its_branch_only(images):
    """The proof decides, not the name: a block that does more than its branch stays, without the branch."""
    model = tiny_net()

    class AlsoDoubles(type(model.stages[0].blocks[1])):
        def forward(self, x):
            return 2 * super().forward(x)

    block = model.stages[0].blocks[1]
    block.__class__ = AlsoDoubles
    close(model, "stages.0.blocks.1.drop_path", "stages.1.blocks.1.drop_path")
    before = model(images)
    assert timm_eps.remove_closed(model) == ["stages.0.blocks.1.drop_path", "stages.1.blocks.1.drop_path"]
    assert model.stages[0].blocks[1] is block
    assert not list(block.parameters())
    assert isinstance(model.stages[1].blocks[1], nn.Identity)
    assert torch.equal(model(images), before)


def test_what_changes_the_output_stays(images, caplog):
    """A parent reads more than the output of its blocks. That block is put back, the others are removed."""
    model = tiny_net()
    kept = model.stages[1].blocks[1].conv1.weight
    inner = type(model).forward

    def reads_a_block(self, x):
        block = self.stages[1].blocks[1]
        return inner(self, x) + (block.conv1.weight.mean() if hasattr(block, "conv1") else 0)

    model.__class__ = type("Nosy", (type(model),), {"forward": reads_a_block})
    close(model, "stages.1.blocks.1.drop_path", "stages.2.blocks.1.drop_path")
    before = model(images)
    assert timm_eps.remove_closed(model) == ["stages.2.blocks.1.drop_path"]
    assert "stages.1.blocks.1.drop_path stays closed: the output would change without it" in caplog.text
    assert model.stages[1].blocks[1].conv1.weight is kept
    assert torch.equal(model(images), before)
    assert removed_slots(model) == ["stages.2.blocks.1.drop_path"]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (
            ["stages.1.blocks.4.drop_path"],
            "'stages.1.blocks.4.drop_path' is not a gated slot of this EpsResNet with 9 gates; did you mean 'stages",
        ),
        (["layer1.0"], "'layer1.0' is not a gated slot"),
        ("stages.1.blocks.1.drop_path", "removed must be a list of slot paths, got 'stages.1"),
        ([3], "removed must be a list of slot paths such as 'stages.1.blocks.4.drop_path', got 3"),
        (7, "removed must be a list of slot paths, got 7"),
    ],
)
def test_bad_removed(removed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model("eps_resnet20", removed=removed)


@pytest.mark.parametrize("call", [timm_eps.add_gates, timm_eps.remove_closed, lambda m: timm_eps.param_groups(m, 0.1)])
def test_wrapped_models_are_refused(call):
    model = tiny_net()
    with pytest.raises(ValueError, match=r"Got a compiled model; pass the model itself"):
        call(torch.compile(model))
    with pytest.raises(ValueError, match=r"Got a model wrapped in DataParallel; pass the model itself"):
        call(nn.DataParallel(model))


def test_models_without_branches_are_refused():
    with pytest.raises(ValueError, match="VGG has no residual branch"):
        timm_eps.add_gates(timm.create_model("vgg11", num_classes=2))
    with pytest.raises(ValueError, match=r"has no gates; call timm_eps\.add_gates\(model\) first"):
        timm_eps.remove_closed(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="Linear is not a timm model"):
        timm_eps.remove_closed(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"has no gates"):
        timm_eps.param_groups(timm.create_model("resnet18"), 0.1)


def test_add_gates_sets_epsilon_where_gates_are(caplog):
    model = tiny_net()
    assert timm_eps.add_gates(model, 1.5) == SLOTS
    assert not caplog.records
    assert {gate.epsilon for gate in gates(model).values()} == {1.5}
    with pytest.raises(ValueError, match="epsilon must be"):
        timm_eps.add_gates(model, -1)


def test_add_gates_inside_transformers_own_wrapper():
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnetv2_50", num_labels=2)).eval()
    slots = timm_eps.add_gates(wrapper)
    close(wrapper, slots[1])
    x = torch.randn(1, 3, 64, 64)
    before = wrapper(x).logits
    assert timm_eps.remove_closed(wrapper) == slots[1:2]
    assert torch.equal(wrapper(x).logits, before)


def test_slots_that_are_no_branches_get_no_gate(caplog):
    """The reasons are logged, except for the usual ones in blocks without a shortcut."""
    with pytest.raises(ValueError, match=r"ResNet has no residual branch .*it gets the block's input"):
        timm_eps.add_gates(timm.create_model("resnest14d", num_classes=2))
    with pytest.raises(ValueError, match=r"RDNet has no residual branch .*the block has no shortcut"):
        timm_eps.add_gates(timm.create_model("rdnet_tiny", num_classes=2))
    caplog.clear()
    model = timm.create_model("mobilevit_xxs", num_classes=2)
    gated = timm_eps.add_gates(model)
    refused = [record.getMessage() for record in caplog.records]
    assert len(refused) == 4
    assert refused[0].startswith("No gate at stages.1.0.drop_path of ByobNet: the block has no shortcut")
    assert "stages.1.0.drop_path" not in gated
    caplog.clear()
    assert len(timm_eps.add_gates(timm.create_model("mobilenetv2_035", num_classes=2))) == 10
    assert not caplog.records


def test_one_gate_for_a_slot_that_runs_twice():
    """mixer's blocks have one slot for two branches, so both close and are removed together."""
    model = timm.create_model("mixer_s32_224", num_classes=2).eval()
    slots = timm_eps.add_gates(model)
    assert len(slots) == 8
    close(model, slots[3])
    x = torch.randn(1, 3, 224, 224)
    before = model(x)
    assert timm_eps.remove_closed(model) == [slots[3]]
    assert torch.equal(model(x), before)
    assert isinstance(model.blocks[3], nn.Identity)


def test_probing_leaves_the_model_as_it_was():
    model = timm.create_model("resnet18", num_classes=2)
    slots, _ = find_slots(model)
    assert len(slots) == 8
    assert model.layer1[0].drop_path is None
    assert model.training


def test_param_groups_of_the_cifar_net():
    model = tiny_net()
    decayed, spared = timm_eps.param_groups(model, 5e-3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-3, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_param_groups_decay_what_bounds_a_branch():
    """Decayed vectors: in a post-activation network the last norm of a branch; in a ConvNeXt the layer scales."""
    model = timm.create_model("resnet18", num_classes=2)
    timm_eps.add_gates(model)
    decayed = {id(p) for p in timm_eps.param_groups(model, 0.1)[0]["params"]}
    flat = {name for name, p in model.named_parameters() if id(p) in decayed and p.ndim == 1}
    assert flat == {f"layer{i}.{k}.bn2.{kind}" for i in range(1, 5) for k in range(2) for kind in ("weight", "bias")}

    convnext = timm.create_model("convnext_atto", num_classes=2, ls_init_value=1e-6)
    timm_eps.add_gates(convnext)
    decayed = {id(p) for p in timm_eps.param_groups(convnext, 0.1)[0]["params"]}
    flat = {name.rpartition(".")[2] for name, p in convnext.named_parameters() if id(p) in decayed and p.ndim == 1}
    assert flat == {"gamma"}


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_bad_weight_decay(value):
    with pytest.raises(ValueError, match="weight_decay must be at least 0"):
        timm_eps.param_groups(tiny_net(), value)

"""Users' hooks on modules stay active when a block is removed, or a warning names them."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import SLOTS, mostly_slow, tiny_net
from torch import nn

import timm_eps
from timm_eps.surgery.branches import block_path, gates
from timm_eps.surgery.removal import replay_removed

REGISTER = {
    "forward": lambda module, hook: module.register_forward_hook(lambda module, args, output: hook()),
    "forward with kwargs": lambda module, hook: module.register_forward_hook(
        lambda module, args, kwargs, output: hook(), with_kwargs=True, always_call=True
    ),
    "before": lambda module, hook: module.register_forward_pre_hook(lambda module, args: hook()),
    "before with kwargs": lambda module, hook: module.register_forward_pre_hook(
        lambda module, args, kwargs: hook(), with_kwargs=True
    ),
    "backward": lambda module, hook: module.register_full_backward_hook(lambda module, inner, outer: hook()),
    "before backward": lambda module, hook: module.register_full_backward_pre_hook(lambda module, outer: hook()),
}
NETWORKS = {
    "eps_resnet20": SLOTS[4:5],
    "eps_test_resnet": ["layer2.0.drop_path"],  # a learned shortcut stays
    "eps_test_vit": ["blocks.1.drop_path1", "blocks.1.drop_path2"],
}


def make(architecture):
    return tiny_net() if architecture == "eps_resnet20" else timm.create_model(architecture, num_classes=3).eval()


def run(model):
    size = model.pretrained_cfg["input_size"]
    model(torch.randn(1, *size, requires_grad=True)).sum().backward()


def remove(model, slots):
    for slot in slots:
        gates(model)[slot].closed = True
    assert timm_eps.remove_closed(model) == slots


@pytest.mark.parametrize("way", [remove, replay_removed])
@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("architecture", mostly_slow(NETWORKS, 0))
def test_hooks_on_a_removed_block_stay(architecture, kind, way, caplog):
    model = make(architecture)
    slots = NETWORKS[architecture]
    path = block_path(model, slots[0])
    before = model.get_submodule(path)
    calls = []
    handle = REGISTER[kind](before, lambda: calls.append(path))
    way(model, slots)
    assert model.get_submodule(path) is not before
    calls.clear()
    run(model)
    assert calls == [path]
    handle.remove()
    run(model)
    assert calls == [path], "the handle that the user holds removes it"
    assert caplog.messages == []


def test_what_a_hook_on_a_removed_block_sees_is_what_it_saw():
    model = make("eps_resnet20")
    seen = []
    model.get_submodule("stages.1.blocks.1").register_forward_hook(lambda module, args, output: seen.append(output))
    images = torch.randn(2, 3, 8, 8)
    gates(model)[SLOTS[4]].closed = True
    with torch.no_grad():
        model(images)
        timm_eps.remove_closed(model)
        model(images)
    assert torch.equal(seen[0], seen[-1])


def observe(*args):
    pass


@pytest.mark.parametrize(
    ("architecture", "slots", "inner"),
    [
        ("eps_resnet20", SLOTS[4:5], "stages.1.blocks.1.conv2"),
        ("eps_test_resnet", ["layer2.0.drop_path"], "layer2.0.bn1"),
        ("eps_test_vit", ["blocks.1.drop_path1"], "blocks.1.attn"),
        ("eps_test_vit", ["blocks.1.drop_path1", "blocks.1.drop_path2"], "blocks.1.mlp.fc1"),
    ],
)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_in_a_removed_branch_are_named(architecture, slots, inner, register, caplog):
    model = make(architecture)
    getattr(model.get_submodule(inner), register)(observe)
    remove(model, slots)
    (message,) = caplog.messages
    assert message.startswith(f"{inner} was removed together with its hooks")
    assert "observe" in message


def test_hooks_elsewhere_stay(caplog):
    """Hooks on the other branch, on the shortcut and on other blocks stay. torch's own hooks cause no warning."""
    calls = []
    model = make("eps_test_vit")
    for path in ("blocks.1.mlp", "blocks.1", "blocks.2"):
        model.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: calls.append(path))
    remove(model, ["blocks.1.drop_path1"])
    calls.clear()
    run(model)
    assert calls == ["blocks.1.mlp", "blocks.1", "blocks.2"]
    model = make("eps_test_resnet")
    nn.utils.spectral_norm(model.layer2[0].conv1)
    remove(model, ["layer2.0.drop_path"])
    assert caplog.messages == []

"""Removal in timm's families is exact, independent of the order, and repeatable from the list of slots."""

from __future__ import annotations

import copy
import inspect
import pickle
import random

import pytest
import timm
import torch
import torchvision.models.feature_extraction
from conftest import close, mostly_slow
from timm.models import create_feature_extractor
from torch import Tensor, nn

import timm_eps
from timm_eps.files.standins import Chain, Passthrough, ZeroBranch
from timm_eps.surgery import collapse
from timm_eps.surgery.branches import gates, probe_batch
from timm_eps.surgery.removal import replay_removed, same_outputs
from timm_eps.surgery.tracing import meta_copy, trace

# One network for each difficulty: post- and pre-activation, a learned shortcut, several branches per block, layer
# scales, windows folded into the batch, one slot for two branches, slots in a sequence or inside a branch, channels
# added by a branch, blocks that take or return several tensors, code between modules that reads shapes.
FAMILIES = {
    "test_resnet": {},
    "test_byobnet": {},
    "test_nfnet": {},
    "test_convnext": {},
    "test_mambaout": {},
    "test_vit": {},
    "test_vit_relpos": {},
    "test_maxvit": {},
    "test_coatnet": {},
    "resnetv2_18": {"channels": (16, 32, 64, 128)},
    "res2next50": {"layers": (1, 2, 1, 1)},
    "rexnetr_100": {},
    "levit_128s": {},
    "coat_tiny": {},
    "edgenext_xx_small": {},
    "mixer_s32_224": {},
    "swiftformer_xs": {},
    "tnt_s_patch16_224": {"depth": 3},
    "vit_small_patch16_18x2_224": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "vit_pwee_patch16_reg1_gap_256": {"depth": 3},
    "xcit_nano_12_p16_224": {"depth": 3},
    "efficientvim_m1": {},
}
# Its blocks return a second tensor with a unique shape, so the module that makes this tensor stays.
PARTLY_FREED = ["efficientvim_m1"]
# The others are slow tests.
COVER = ["test_resnet", "test_byobnet", "test_convnext", "test_vit", "test_coatnet"]
# Of which the order of removal is tried by default: convolutions, and both of them and attention.
ORDERED = ["test_resnet", "test_coatnet"]
CASES = [pytest.param(name, marks=[] if name in COVER else [pytest.mark.slow]) for name in FAMILIES]


def gated(name: str, **kwargs) -> nn.Module:
    """A small network in which no branch is zero at initialisation."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    timm_eps.add_gates(model)
    return model


def half_of(model: nn.Module, seed: int) -> list[str]:
    slots = list(gates(model))
    return random.Random(seed).sample(slots, (len(slots) + 1) // 2)


def kinds(model: nn.Module) -> dict[str, str]:
    return {path: repr(module) for path, module in model.named_modules() if not list(module.children())}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_removed_equals_shut(name):
    """Open gates change no bit and no key. Removed branches change no bit either, and all their weights are removed."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=3, **FAMILIES[name]).eval()
    batch = probe_batch(plain)
    before, keys = plain(batch), list(plain.state_dict())
    timm_eps.add_gates(plain)
    assert same_outputs(plain(batch), before)
    assert list(plain.state_dict()) == keys

    model = gated(name, **FAMILIES[name])
    for seed in range(2):
        pruned = copy.deepcopy(model)
        chosen = half_of(pruned, seed)
        close(pruned, *chosen)
        net = meta_copy(pruned)
        with torch.enable_grad():
            live = trace(net, probe_batch(net)).live
        needed = {key for key, parameter in net.named_parameters() if id(parameter) in live}
        shut, single, three = pruned(batch), pruned(batch[:1]), pruned(batch[[0, 1, 0]])
        assert set(timm_eps.remove_closed(pruned)) >= set(chosen)
        assert same_outputs(pruned(batch), shut)
        torch.testing.assert_close(pruned(batch[:1]), single, rtol=0, atol=1e-5)
        torch.testing.assert_close(pruned(batch[[0, 1, 0]]), three, rtol=0, atol=1e-5)
        kept = {key for key, _ in pruned.named_parameters()}
        assert kept == needed or (name in PARTLY_FREED and needed < kept < set(keys))
        assert pruned.state_dict().keys() <= set(keys)


@torch.no_grad()
@pytest.mark.parametrize("name", mostly_slow(FAMILIES, *(list(FAMILIES).index(name) for name in ORDERED)))
def test_order_does_not_matter(name):
    """One by one, all at once, from the list alone, on the meta device: the network is the same."""
    model = gated(name, **FAMILIES[name])
    chosen = half_of(model, 2)
    at_once, one_by_one = copy.deepcopy(model), copy.deepcopy(model)
    close(at_once, *chosen)
    timm_eps.remove_closed(at_once)
    for slot in chosen:
        if slot in gates(one_by_one):
            close(one_by_one, slot)
            timm_eps.remove_closed(one_by_one)
    assert one_by_one.removed == at_once.removed
    assert kinds(one_by_one) == kinds(at_once)
    rebuilt = timm.create_model(f"eps_{name}", num_classes=3, removed=at_once.removed[::-1], **FAMILIES[name]).eval()
    rebuilt.load_state_dict(at_once.state_dict())
    assert kinds(rebuilt) == kinds(at_once)
    batch = probe_batch(model)
    assert same_outputs(rebuilt(batch), at_once(batch))
    with torch.device("meta"):
        empty = timm.create_model(f"eps_{name}", num_classes=3, removed=at_once.removed, **FAMILIES[name])
    assert empty.state_dict().keys() == at_once.state_dict().keys()


def test_a_branch_goes_and_its_neighbour_stays():
    model = gated("test_vit")
    close(model, "blocks.1.drop_path1", "blocks.2.drop_path2")
    before = model(probe_batch(model))
    assert timm_eps.remove_closed(model) == ["blocks.1.drop_path1", "blocks.2.drop_path2"]
    left = {key.split(".")[2] for key in model.state_dict() if key.startswith("blocks.1.")}
    assert left == {"norm2", "mlp"}
    assert {key.split(".")[2] for key in model.state_dict() if key.startswith("blocks.2.")} == {"norm1", "attn"}
    assert torch.equal(model(probe_batch(model)), before)
    close(model, "blocks.1.drop_path2")
    assert timm_eps.remove_closed(model) == ["blocks.1.drop_path2"]
    assert not isinstance(model.blocks[1], timm.models.vision_transformer.Block)


def test_post_activation_blocks():
    """A ReLU after a ReLU has no effect. A learned shortcut keeps its name and the activation after it."""
    model = gated("test_resnet")
    model.act1 = nn.ReLU()
    close(model, "layer1.0.drop_path", "layer2.0.drop_path")
    timm_eps.remove_closed(model)
    assert isinstance(model.layer1[0], nn.Identity | nn.Sequential)
    assert [name for name, _ in model.layer2[0].named_children()] == ["downsample", "act2"]


def test_gates_inside_a_removed_branch_go_with_it():
    """A gate inside a removed branch counts as removed. A list without this gate cannot be applied."""
    model = timm.create_model("test_vit", num_classes=3).eval()
    model.blocks[1].mlp = timm.models.vision_transformer.Block(model.embed_dim, num_heads=2)
    timm_eps.add_gates(model)
    dense = copy.deepcopy(model)
    close(model, "blocks.1.drop_path2")
    before = model(probe_batch(model))
    inside = ["blocks.1.mlp.drop_path1", "blocks.1.mlp.drop_path2"]
    assert sorted(timm_eps.remove_closed(model)) == ["blocks.1.drop_path2", *inside]
    assert torch.equal(model(probe_batch(model)), before)
    with pytest.raises(ValueError, match=r"removed lacks 'blocks\.1\.mlp\.drop_path1', which is inside a branch"):
        replay_removed(copy.deepcopy(dense), ["blocks.1.drop_path2"])
    replay_removed(dense, model.removed)
    assert dense.state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize(
    "name", mostly_slow(["test_resnet", "test_byobnet", "resnetv2_18", "rexnetr_100", "test_convnext"], 0, 4)
)
def test_other_resolutions(name):
    """A removal planned at one image size holds at other sizes."""
    model = gated(name, **FAMILIES[name])
    close(model, *half_of(model, 0))
    images = [torch.randn(1, 3, size, size + 32) for size in (64, 192)]
    before = [model(x) for x in images]
    timm_eps.remove_closed(model)
    assert all(torch.equal(model(x), y) for x, y in zip(images, before, strict=True))


def pruned_twin(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    slots = list(gates(timm.create_model(f"eps_{name}", num_classes=3, **FAMILIES[name])))
    half = slots[1::2]
    return timm.create_model(f"eps_{name}", num_classes=3, removed=half, **FAMILIES[name], **kwargs).eval()


INTERFACES = ["test_resnet", "test_convnext", "test_vit", "test_nfnet", "test_byobnet", "test_vit_relpos"]


@pytest.mark.parametrize("name", mostly_slow(INTERFACES, 0, 2))
def test_interfaces_after_removal(name):
    model = pruned_twin(name)
    batch = probe_batch(model)
    with torch.no_grad():
        logits = model(batch)
        assert torch.equal(model.forward_head(model.forward_features(batch)), logits)
        final, intermediates = model.forward_intermediates(batch)
        assert len(intermediates) > 1
        assert torch.equal(final, model.forward_features(batch))
        features = pruned_twin(name, features_only=True)
        assert [f.shape[1] for f in features(batch)] == features.feature_info.channels()
    model.set_grad_checkpointing()
    checkpointed = model.train()(batch)
    checkpointed.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.reset_classifier(7)
    assert model.eval()(batch).shape == (2, 7)


@pytest.mark.parametrize("name", mostly_slow(["test_resnet", "test_convnext", "test_vit", "test_nfnet"], 0, 2))
def test_fx_export_and_compile_after_removal(name):
    model = pruned_twin(name)
    batch = probe_batch(model)
    with torch.no_grad():
        expected = model(batch)
        exported = torch.export.export(model, (batch,)).module()
        torch.testing.assert_close(exported(batch), expected)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(batch), expected)
        if name != "test_vit":
            nodes = timm.models.get_graph_node_names(model)[1]
            traced = create_feature_extractor(model, [nodes[-1]])
            torch.testing.assert_close(traced(batch)[nodes[-1]], expected)


def test_training_goes_on_after_removal():
    model = gated("test_vit")
    optimizer = torch.optim.AdamW(timm_eps.param_groups(model, 0.1))
    pruner = timm_eps.EpsilonPruner(model, optimizer, keep=6, patience=1)
    for _ in range(4):
        model.train()
        optimizer.zero_grad()
        model(probe_batch(model)).square().mean().backward()
        optimizer.step()
        pruner.step()
    assert len(gates(model)) == 6
    listed = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert listed == set(model.parameters())


def test_zero_branch_takes_the_sizes_it_was_given():
    x = torch.ones(2, 3, 4)
    assert ZeroBranch()(x).shape == ()
    assert ZeroBranch((None, 5, None))(x).shape == (2, 5, 4)
    assert ZeroBranch((None, None, None))(x.double()).dtype == torch.float64


class Picky(timm.models.vision_transformer.Block):
    """A block that adds only a tensor with the shape of its input, and raises its own error otherwise."""

    error: type[Exception]

    def forward(self, x, **kwargs):
        branch = self.drop_path1(self.attn(self.norm1(x)))
        if branch.shape != x.shape:
            raise self.error("not the shape of the input")
        return x + branch


@pytest.mark.parametrize(
    "error", mostly_slow([AssertionError, AttributeError, KeyError, NotImplementedError, ValueError], 0, 4)
)
def test_a_block_refuses_a_single_zero_by_any_error(error):
    """Before torch 2.10, torch.stack raises an AssertionError on the meta device."""
    model = timm.create_model("test_vit", num_classes=3).eval()
    model.blocks[1] = Picky(model.embed_dim, num_heads=2).eval()
    model.blocks[1].error = error
    timm_eps.add_gates(model)
    close(model, "blocks.1.drop_path1")
    before = model(probe_batch(model))
    assert timm_eps.remove_closed(model) == ["blocks.1.drop_path1"]
    assert torch.equal(model(probe_batch(model)), before)


@pytest.mark.parametrize(("name", "slot"), [("resnet18", "layer1.0.drop_path"), ("test_resnet", "layer1.0.drop_path")])
def test_what_is_left_works_on_nobody_elses_tensor(name, slot):
    """An in-place activation on the sum would otherwise overwrite the output of the stem or of the last block."""
    torch.manual_seed(0)
    model = timm.create_model(f"eps_{name}", num_classes=3, act_layer="leaky_relu").eval()
    close(model, slot)
    images = torch.randn(2, 3, 64, 64)
    before = model.forward_intermediates(images)[1]
    timm_eps.remove_closed(model)
    assert all(map(torch.equal, model.forward_intermediates(images)[1], before))
    model.train()(images).sum().backward()


def test_blocks_that_are_called_in_other_ways_stay():
    """Aligned Xception reads an activation inside its blocks, so these blocks lose only their branches."""
    model = gated("xception41p")
    slot = list(gates(model))[3]
    close(model, slot)
    images = torch.randn(1, 3, 96, 96)
    before = model.forward_intermediates(images)[1]
    assert timm_eps.remove_closed(model) == [slot]
    assert all(map(torch.equal, model.forward_intermediates(images)[1], before))


def test_surgery_in_inference_mode_leaves_a_model_that_trains():
    model = timm.create_model("test_vit", num_classes=3)
    with torch.inference_mode():
        slots = timm_eps.add_gates(model)
        close(model, slots[0])
        timm_eps.remove_closed(model)
    model.train()(probe_batch(model)).sum().backward()


def test_hooks_of_the_user_do_not_run():
    model = timm.create_model("test_resnet", num_classes=3).eval()
    seen = []
    model.layer1.register_forward_hook(lambda module, args, output: seen.append(output.mean().item()))
    timm_eps.add_gates(model)
    assert not seen
    model(probe_batch(model))
    assert len(seen) == 1


class Asking(nn.Module):
    """A block that is called with further arguments, in every way that Python offers."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        size: tuple[int, int] = (1, 2),
        scale: float = 1.5,
    ) -> Tensor:
        return x * 2


class Several(nn.Module):
    def forward(self, x: Tensor, others: list[Tensor], *rest: Tensor, last: int = 3) -> Tensor:
        return x


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x - y


def copies(module: nn.Module) -> list[nn.Module]:
    return [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]


def chain_of(like: type[nn.Module]) -> Chain:
    chain = Chain(like)
    chain.add_module("downsample", nn.Linear(2, 2))
    chain.add_module("act", nn.ReLU())
    return chain


def parameters_of(forward) -> list[tuple]:
    """Names, kinds and defaults of a method's parameters."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(forward).parameters.values() if p.name != "self"]


@pytest.mark.parametrize("like", [Asking, Several, nn.Bilinear, timm.models.vision_transformer.Block])
def test_stand_ins_are_called_like_what_they_replace(like):
    for original in (Passthrough(like), Passthrough(like, (1, 0)), chain_of(like)):
        for module in copies(original):
            assert parameters_of(module.forward) == parameters_of(like.forward)
            assert type(module) is type(original)
            assert repr(module) == repr(original)
            assert isinstance(module, Passthrough | Chain)


def test_stand_ins_put_out_their_arguments():
    x, mask = torch.randn(1, 2), torch.randn(1, 2)
    for module in copies(Passthrough(Asking)):
        assert module(x) is module(x, mask, causal=True) is module(mask=mask, x=x) is x
    for module in copies(Passthrough(Asking, (1, 0))):
        assert module(x, mask=mask) == (mask, x)
    assert Passthrough(Several, 3)(x, [x], mask, x) is x, "the second of the rest"
    for module in copies(chain_of(Asking)):
        assert len(list(module.parameters())) == 2
        assert torch.equal(module(x, mask), nn.functional.relu(module.downsample(x)))
    with pytest.raises(IndexError, match="no argument has position 9"):
        Passthrough(Asking, 9)


@pytest.mark.parametrize("how", [torch.jit.script, torch.fx.symbolic_trace, torch.compile])
@pytest.mark.parametrize(
    "make", [lambda: Passthrough(Asking), lambda: Passthrough(Pair, (1, 0)), lambda: chain_of(Asking)]
)
def test_stand_ins_compile(how, make):
    x, y = torch.randn(1, 2), torch.randn(1, 2)
    module = make()
    found = how(module, **({"fullgraph": True, "backend": "eager"} if how is torch.compile else {}))
    expected, answer = module(x, y), found(x, y)
    assert all(map(torch.equal, expected, answer)) if isinstance(expected, tuple) else torch.equal(expected, answer)


@pytest.mark.parametrize("shape", [(), (None, None), (None, 5), (3, None)])
def test_zeros_script_and_trace(shape):
    x = torch.randn(3, 4)
    zeros = ZeroBranch(shape)
    for how in (torch.jit.script, torch.fx.symbolic_trace):
        assert torch.equal(how(zeros)(x), zeros(x))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_nfnet"])
def test_torchvisions_feature_extraction(name):
    """The tracer runs in training and in evaluation mode. In both, the gates behave as in the model."""
    model = pruned_twin(name)
    batch = probe_batch(model)
    last = torchvision.models.feature_extraction.get_graph_node_names(model)[1][-1]
    extractor = torchvision.models.feature_extraction.create_feature_extractor(model, [last])
    with torch.no_grad():
        assert torch.equal(extractor.eval()(batch)[last], model.eval()(batch))
    for gate in gates(model).values():
        gate.epsilon = 1e9
    copies_of = {slot: extractor.get_submodule(slot) for slot in gates(model)}
    assert copies_of
    extractor.train()(batch)
    assert all(gate.response >= 0 for gate in copies_of.values())


@pytest.mark.parametrize("name", ["eps_resnet20", "eps_test_vit"])
def test_nothing_is_removed_on_the_meta_device(name):
    """A proof needs numbers, which the meta device lacks. A list of slots needs no proof."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    close(model)
    for call in (timm_eps.remove_closed, lambda model: timm_eps.surgery.removal.remove(model, list(gates(model))[:1])):
        with pytest.raises(ValueError, match=r"on the meta device.*removed="):
            call(model)
    closed = [slot for slot, gate in gates(model).items() if gate.closed]
    replay_removed(model, closed)
    assert model.removed == closed


@pytest.mark.parametrize("name", mostly_slow(["eps_resnet20", "eps_test_vit"], 0))
def test_a_plan_is_remembered_for_one_structure_alone(name):
    """Loading builds a network more than once. Other arguments make another network."""
    slots = list(gates(timm.create_model(name)))[1:-1]
    collapse._PLANS.clear()
    first, again = (timm.create_model(name, num_classes=3, removed=slots) for _ in range(2))
    assert len(collapse._PLANS) == 1
    assert repr(first) == repr(again)
    again.load_state_dict(first.state_dict(), strict=True)
    batch = probe_batch(first)
    with torch.no_grad():
        assert torch.equal(first.eval()(batch), again.eval()(batch))
    assert not {id(module) for module in first.modules()} & {id(module) for module in again.modules()}
    timm.create_model(name, num_classes=3, removed=slots[1:])
    timm.create_model(name, num_classes=4, removed=slots)
    assert len(collapse._PLANS) == 3
    for count in range(5, 12):
        timm.create_model(name, num_classes=count, removed=slots[:1])
    assert len(collapse._PLANS) == collapse._MOST_PLANS

"""The CIFAR network: the paper's graph, and the checks of timm's own model tests."""

from __future__ import annotations

import functools
import math

import pytest
import timm
import torch
from conftest import SLOTS, mostly_slow, tiny_net
from timm.models import create_feature_extractor, get_graph_node_names
from timm.utils import reparameterize_model
from torch import nn

import timm_eps
from timm_eps import EpsilonGate
from timm_eps.models.cifar_blocks import PoolPadShortcut, make_shortcuts_convolutions
from timm_eps.surgery.branches import gates

DEPTHS = [20, 32, 44, 56, 110, 200, 302, 500, 752]
NAMES = [f"eps_resnet{depth}" for depth in DEPTHS]
SMALL = NAMES[:2]


def paper_parameters(depth: int, classes: int = 10) -> int:
    """The count follows the paper's description, not the code."""
    n = (depth - 2) // 6
    count = 3 * 16 * 9 + 2 * 16  # stem and its norm
    for stage, width in enumerate((16, 32, 64)):
        for k in range(n):
            inputs = width if k or not stage else width // 2
            preactivation = 0 if (stage, k) == (0, 0) else 2 * inputs
            count += preactivation + inputs * width * 9 + 2 * width + width * width * 9
    return count + 2 * 64 + 64 * classes + classes


def test_registered():
    assert sorted(timm.list_models(module="eps_resnet")) == sorted(NAMES)
    assert all(timm.models.is_model_in_modules(name, ["eps_resnet"]) for name in NAMES)


@functools.cache
def on_meta(name: str) -> nn.Module:
    """Not to be changed."""
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_and_parameters(depth):
    model = on_meta(f"eps_resnet{depth}")
    assert sum(p.numel() for p in model.parameters()) == paper_parameters(depth)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    assert len(gates(model)) == (depth - 2) // 2


def reference_forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The paper's network as functions of its weights."""
    f, weights = nn.functional, dict(model.state_dict())

    def norm_relu(x, name):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return f.relu(f.batch_norm(x, mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5))

    x = norm_relu(f.conv2d(x, weights["stem.conv.weight"], padding=1), "stem.norm")
    for stage in range(3):
        for k in range(3):
            name = f"stages.{stage}.blocks.{k}"
            stride = 2 if stage and not k else 1
            branch = x if (stage, k) == (0, 0) else norm_relu(x, f"{name}.norm1")
            branch = f.conv2d(branch, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            branch = f.conv2d(norm_relu(branch, f"{name}.norm2"), weights[f"{name}.conv2.weight"], padding=1)
            if stride == 2:
                channels = x.shape[1]
                zeros = torch.zeros(x.shape[0], channels // 2, x.shape[2] // 2, x.shape[3] // 2)
                x = torch.cat([zeros, f.avg_pool2d(x, 2), zeros], 1)
            x = x + branch
    pooled = norm_relu(x, "norm").mean((2, 3))
    return f.linear(pooled, weights["head.fc.weight"], weights["head.fc.bias"])


def test_graph_is_the_papers():
    model = tiny_net()
    nn.init.normal_(model.head.fc.weight)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), reference_forward(model, x), rtol=1e-5, atol=1e-5)


def test_initialisation():
    model = timm.create_model("eps_resnet56")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * 9
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.2), name


def test_pool_pad_shortcut():
    x = torch.randn(2, 16, 7, 7)
    y = PoolPadShortcut(16, 32)(x)
    assert y.shape == (2, 32, 4, 4), "as a 3x3 convolution with stride 2 and padding 1"
    assert not y[:, :8].any()
    assert not y[:, 24:].any()
    torch.testing.assert_close(y[:, 8:24, 0, 0], x[:, :, :2, :2].mean((2, 3)))


@pytest.mark.parametrize("removed", [[], SLOTS[3:7:3]], ids=["whole", "first blocks of stages removed"])
def test_shortcuts_as_convolutions(removed):
    model = timm.create_model("eps_resnet20", removed=removed, channels=(4, 9, 16)).double().eval()
    x = torch.randn(2, 3, 15, 13, dtype=torch.float64)
    expected = model(x)
    make_shortcuts_convolutions(model)
    assert not any(isinstance(module, PoolPadShortcut) for module in model.modules())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("removed", [[], SLOTS[3:7:3] + SLOTS[:1]])
def test_forward_backward(name, removed):
    model = timm.create_model(name, num_classes=42, removed=removed).train()
    y = model(torch.randn(2, 3, 32, 32))
    y.mean().backward()
    assert y.shape == (2, 42)
    assert not y.isnan().any()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name):
    model = on_meta(name)
    cfg = model.default_cfg
    assert cfg["architecture"] == name
    assert cfg["input_size"] == (3, 32, 32)
    assert model.num_classes == cfg["num_classes"] == 10
    assert cfg["classifier"] + ".weight" in model.state_dict()
    assert cfg["first_conv"] + ".weight" in model.state_dict()


def test_classifier_contract():
    model = timm.create_model("eps_resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    assert model.forward_features(x).shape == (2, model.num_features, *model.default_cfg["pool_size"])
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.num_classes == 7
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 8, 8)
    unpooled = timm.create_model("eps_resnet20", num_classes=0, global_pool="").eval()
    assert unpooled(x).shape == (2, 64, 8, 8)
    assert timm.create_model("eps_resnet20", num_classes=0).eval()(x).shape == (2, 64)


def test_classifier_without_pooling_is_refused():
    """timm's networks accept it and fail at the first image."""
    with pytest.raises(ValueError, match=r"global_pool=''.*num_classes=3"):
        timm.create_model("eps_resnet20", num_classes=3, global_pool="")
    model = timm.create_model("eps_resnet20", num_classes=0, global_pool="")
    with pytest.raises(ValueError, match="global_pool=''"):
        model.reset_classifier(5)
    model.reset_classifier(5, "avg")
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_global_pool(pool):
    model = timm.create_model("eps_resnet20", global_pool=pool, in_chans=1, num_classes=3).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("removed", [[], SLOTS[::2]])
def test_torchscript(removed):
    model = timm.create_model("eps_resnet20", removed=removed).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("removed", [[], SLOTS[::2]])
def test_fx(training, removed):
    model = timm.create_model("eps_resnet20", removed=removed).train(training)
    nodes = get_graph_node_names(model)[not training]
    traced = create_feature_extractor(model, return_nodes=[nodes[-1]])
    x = torch.randn(2, 3, 32, 32)
    y = next(iter(traced(x).values()))
    y.sum().backward()
    torch.testing.assert_close(y, model(x))
    assert [n for n, p in traced.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("removed", [[], SLOTS])
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 3), (2,)])
def test_features_only(removed, indices):
    model = timm.create_model("eps_resnet20", features_only=True, out_indices=indices, removed=removed).eval()
    features = model(torch.randn(2, 3, 32, 32))
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [32 // f.shape[2] for f in features] == model.feature_info.reduction()
    assert model.feature_info.channels() == [(16, 16, 32, 64)[i] for i in indices]


@pytest.mark.parametrize("removed", [[], SLOTS[::2]])
def test_intermediates(removed):
    model = timm.create_model("eps_resnet20", removed=removed).eval()
    x = torch.randn(2, 3, 32, 32)
    features, taken = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    wrapped = timm.create_model("eps_resnet20", features_only=True, removed=removed).eval()
    wrapped.load_state_dict(
        {  # the wrapper flattens the sequences: stem.conv becomes stem_conv, stages.0 stages_0
            key.replace("stem.", "stem_").replace("stages.", "stages_"): value
            for key, value in model.state_dict().items()
            if not key.startswith(("norm", "head"))
        }
    )
    assert all(torch.equal(a, b) for a, b in zip(taken, wrapped(x), strict=True))
    assert torch.equal(model.forward_intermediates(x, indices=1, norm=True)[1][0], features)
    only = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
    assert torch.equal(only[0], taken[0])
    assert torch.equal(only[1], taken[3])
    stopped, _ = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(stopped, taken[1])


@pytest.mark.parametrize("indices", [5, 0, -1, [4], [-5], []])
def test_bad_indices(indices):
    with pytest.raises(ValueError, match="indices must select from the 4 intermediates"):
        timm.create_model("eps_resnet20").forward_intermediates(torch.randn(1, 3, 8, 8), indices=indices)


def test_prune_intermediate_layers():
    model = timm.create_model("eps_resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([1, 2]) == [1, 2]
    found = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert model(x).shape == (2, 32, 16, 16)
    assert model.num_features == 32


@pytest.mark.parametrize("removed", [[], SLOTS[::2]])
def test_grad_checkpointing(removed):
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model("eps_resnet20", removed=removed).train()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        y = model(x)
        y.sum().backward()
        results.append(
            (y, [p.grad.clone() for p in model.parameters()], [g.response.clone() for g in gates(model).values()])
        )
    (y, grads, responses), (also_y, also_grads, also_responses) = results
    torch.testing.assert_close(y, also_y)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, also_grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(responses, also_responses, strict=True))


def test_group_matcher_covers_everything():
    model = timm.create_model("eps_resnet20")
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sum(len(names) for names in groups.values()) == len(list(model.named_parameters()))


def test_device_and_dtype_arguments():
    model = timm.create_model("eps_resnet20", device="meta", dtype=torch.float64)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_drop_path_stays_behind_the_gate():
    model = timm.create_model("eps_resnet20", drop_path_rate=0.3)
    rates = [getattr(gate.drop_path, "drop_prob", 0.0) for gate in gates(model).values()]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)


def test_gates_add_no_keys():
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert {key.rpartition(".")[2] for key in timm.create_model("eps_resnet20").state_dict()} == names


@pytest.mark.parametrize("removed", mostly_slow([[], SLOTS[::2]], 1))
def test_export_and_onnx(removed, tmp_path):
    model = timm.create_model("eps_resnet20", removed=removed).eval()
    x = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.testing.assert_close(exported.module()(torch.cat([x, x])), model(torch.cat([x, x])), rtol=0, atol=1e-6)

    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, input_names=["x"], verbose=False)
    (result,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), model(x), rtol=0, atol=1e-5)


def test_compile_training_and_evaluation():
    """fullgraph fails at any graph break: no step branches in Python on a tensor."""
    torch._dynamo.reset()
    model = tiny_net(layers=(1, 2, 1))
    for gate in gates(model).values():
        gate.epsilon = 0.5
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 8, 8)
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(compiled(x), model(x))
    model.train()
    compiled(x).sum().backward()
    responses = [gate.response.item() for gate in gates(model).values()]
    assert all(response > 0 for response in responses)


@pytest.mark.slow
def test_compiled_model_follows_removal():
    """The number of removals exceeds torch's recompile limit of one function."""
    model = tiny_net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 8, 8)
    for gate in list(gates(model).values()):
        torch.compiler.reset()
        gate.closed = True
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
        timm_eps.remove_closed(model)
        torch.testing.assert_close(compiled(x), expected)


def test_every_branch_ends_in_a_gate():
    model = timm.create_model("eps_resnet20")
    assert list(gates(model)) == SLOTS
    assert all(isinstance(gate, EpsilonGate) and gate.epsilon == 0 for gate in gates(model).values())


def test_reparameterized_for_inference_nothing_of_gates_and_placeholders_is_left():
    removed = ["stages.0.blocks.0.drop_path", "stages.1.blocks.0.drop_path", "stages.2.blocks.1.drop_path"]
    model = timm.create_model("eps_resnet20", removed=removed, drop_path_rate=0.2).eval()
    gates(model)["stages.0.blocks.1.drop_path"].closed = True
    images = torch.randn(2, 3, 32, 32)
    fused = reparameterize_model(model)
    assert torch.equal(fused(images), model(images))
    assert list(gates(fused)) == ["stages.0.blocks.1.drop_path"], "a closed branch stays, with its gate"
    assert len(gates(model)) == 6, "and the model itself is left alone"
    # The shortcut of the second stage's first block changes its input, so it stays in the block's place.
    assert [list(stage.blocks._modules) for stage in fused.stages] == [["1", "2"], ["0", "1", "2"], ["0", "2"]]
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(torch.jit.script(fused)(images), model(images))


def test_reparameterized_twins_lose_their_gates():
    model = timm.create_model("eps_test_resnet").eval()
    images = torch.randn(2, 3, 64, 64)
    fused = reparameterize_model(model)
    assert not gates(fused)
    assert torch.equal(fused(images), model(images))


def test_an_unknown_argument_is_named():
    with pytest.raises(ValueError, match="'blocks' is not an argument of eps_resnet20; these are layers, channels"):
        timm.create_model("eps_resnet20", blocks=3)

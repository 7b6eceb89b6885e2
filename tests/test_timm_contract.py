"""The checks of timm's own model tests, applied to the gated twins, and comparisons of twins with their originals.

Twins of one timm module and one class share all their code. By default one twin of each kind is tested, with keywords
that make it small. The slow tier adds the kinds that cannot be made small or fast, and every registered name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from conftest import mostly_slow
from timm.layers import Format, get_channel_dim, get_spatial_dim, set_scriptable
from timm.models import FeatureInfo, create_feature_extractor, get_graph_node_names, model_entrypoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.tools import STATES, TOOLS, try_tools
from timm_eps.names import base_name
from timm_eps.surgery.branches import gates

NAMES = [name for name in timm.list_models("eps_*") if not timm.models.is_model_in_modules(name, ["eps_resnet"])]
MAX_PARAMETERS = 8_000_000
MAX_PARAMETERS_SLOW = 40_000_000
CLASSES = 42

# Name: image size and keywords. Keywords shrink a twin that is too large or too deep; every type of block of its kind
# remains.
COVER: dict[str, tuple[int, dict[str, Any]]] = {
    "eps_beit_base_patch16_224": (32, dict(depth=3, embed_dim=96, num_heads=3, img_size=32)),
    "eps_cait_xxs24_224": (32, dict(depth=3, img_size=32)),
    "eps_coat_tiny": (32, dict(serial_depths=(1, 1, 1, 1), parallel_depth=1, img_size=32)),
    "eps_convit_tiny": (32, dict(depth=3, local_up_to_layer=2, img_size=32)),
    "eps_cpubone_nano": (32, {}),
    "eps_crossvit_tiny_240": (240, dict(depth=[[1, 1, 0], [1, 1, 0], [1, 1, 0]])),
    "eps_cs3darknet_focus_s": (32, {}),
    "eps_csatv2": (64, dict(depths=(1, 1, 2, 2))),
    "eps_cspnext_tiny": (32, {}),
    "eps_davit_tiny": (32, dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4))),
    "eps_deepseek_vit_412m": (28, dict(depth=3, embed_dim=96, num_heads=3, img_size=28)),
    "eps_deepseek_vit_412m_enc": (84, dict(depth=3, embed_dim=96, num_heads=3, out_features=96, img_size=84)),
    "eps_deit_tiny_distilled_patch16_224": (32, dict(depth=3, img_size=32)),
    "eps_deit_tiny_patch16_224": (32, dict(depth=3, img_size=32)),
    "eps_edgenext_xx_small": (32, {}),
    "eps_efficientformerv2_s0": (32, dict(depths=(1, 1, 2, 2), img_size=32)),
    "eps_efficientvim_m1": (32, {}),
    "eps_ese_vovnet39b": (32, dict(stage_conv_chs=[16] * 4, stage_out_chs=[32, 32, 64, 64])),
    "eps_fasternet_t0": (32, dict(depths=(1, 1, 2, 1))),
    "eps_fastvit_t8": (32, dict(layers=(1, 1, 1, 1))),
    "eps_gemma4_vit_167m": (48, dict(depth=3, embed_dim=96, num_heads=3, img_size=48)),
    "eps_gemma4_vit_167m_enc": (96, dict(depth=3, embed_dim=96, num_heads=3, img_size=96)),
    "eps_gmlp_ti16_224": (32, dict(img_size=32)),
    "eps_hgnetv2_b0": (32, {}),
    "eps_hiera_tiny_224": (32, dict(stages=(1, 1, 1, 1), embed_dim=32, img_size=32)),
    "eps_inception_next_atto": (32, {}),
    "eps_levit_128s": (64, dict(depth=(1, 2, 2), img_size=64)),
    "eps_levit_256d": (64, dict(embed_dim=(64, 96, 128), num_heads=(2, 3, 4), depth=(1, 2, 2), img_size=64)),
    "eps_mobilenetv2_035": (32, {}),
    "eps_mobilenetv3_small_050": (32, {}),
    "eps_mobilevit_xxs": (64, {}),
    "eps_naflexvit_base_patch16_parfac_gap": (32, dict(depth=3, embed_dim=96, num_heads=3, img_size=32)),
    "eps_pit_ti_224": (64, dict(img_size=64)),
    "eps_pvt_v2_b0": (32, dict(depths=(1, 1, 1, 1))),
    "eps_qwen3_vit_88m": (32, dict(depth=3, embed_dim=96, num_heads=3, img_size=32)),
    "eps_qwen3_vit_88m_enc": (32, dict(depth=3, embed_dim=96, num_heads=3, img_size=32)),
    "eps_regnetx_002": (32, {}),
    "eps_res2next50": (32, dict(layers=(1, 1, 1, 1))),
    "eps_resnetv2_18": (32, dict(layers=(1, 1, 2, 1))),
    "eps_rexnet_100": (32, dict(width_mult=0.5, depth_mult=0.5)),
    "eps_sam2_hiera_tiny": (32, dict(stages=(1, 1, 1, 1), embed_dim=32)),
    "eps_samvit_base_patch16_224": (
        64,
        dict(depth=3, embed_dim=96, num_heads=3, global_attn_indexes=(2,), img_size=64),
    ),
    "eps_skresnet18": (32, dict(layers=(1, 1, 1, 1))),
    "eps_starnet_s050": (32, {}),
    "eps_swiftformer_xs": (32, dict(img_size=32)),
    "eps_swin_tiny_patch4_window7_224": (56, dict(depths=(2, 2, 2, 2), embed_dim=24, img_size=56)),
    "eps_swinv2_cr_tiny_224": (64, dict(depths=(2, 2, 2, 2), embed_dim=24, window_size=4, img_size=64)),
    "eps_swinv2_tiny_window16_256": (64, dict(depths=(2, 2, 2, 2), embed_dim=24, window_size=4, img_size=64)),
    "eps_test_byobnet": (32, {}),
    "eps_test_coatnet": (32, dict(img_size=32)),
    "eps_test_convnext": (32, {}),
    "eps_test_mambaout": (32, {}),
    "eps_test_nfnet": (32, {}),
    "eps_test_resnet": (32, {}),
    "eps_test_vit": (32, dict(img_size=32)),
    "eps_test_vit_relpos": (32, dict(img_size=32)),
    "eps_tiny_vit_5m_224": (64, dict(depths=(1, 1, 2, 1), embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4))),
    "eps_tnt_s_legacy_patch16_224": (32, dict(depth=3, img_size=32)),
    "eps_tresnet_m": (32, dict(layers=(1, 1, 1, 1), width_factor=0.5)),
    "eps_twins_svt_small": (
        64,
        dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), img_size=64),
    ),
    "eps_visformer_tiny": (32, dict(depth=(2, 2, 2), img_size=32)),
    "eps_vit_tiny_patch16_dinov3_qkvb": (32, dict(depth=3, img_size=32)),
    "eps_vit_tiny_r_s16_p8_224": (64, dict(depth=3, img_size=64)),
    "eps_vitamin_small_224": (64, dict(depth=3, img_size=64)),
    "eps_xcit_nano_12_p8_224": (32, dict(depth=3, cls_attn_layers=1, img_size=32)),
}
# Kinds that no keyword makes small, or that are slow to build.
LARGE_COVER: dict[str, tuple[int, dict[str, Any]]] = {
    "eps_efficientformer_l1": (224, dict(depths=(1, 1, 1, 2))),
    "eps_efficientvim_m1_dist": (32, {}),
    "eps_focalnet_tiny_srf": (32, {}),
    "eps_gcvit_xxtiny": (32, dict(img_size=32)),
    "eps_halonet_h1": (256, {}),
    "eps_hardcorenas_b": (32, {}),
    "eps_hrnet_w18_small": (32, {}),
    "eps_iformer_t": (32, {}),
    "eps_lowformer_b0": (32, dict(width_list=(8, 16, 32, 48, 64))),
    "eps_mobilenetv5_300m_enc": (32, dict(channel_multiplier=0.25)),
    "eps_mobilenetv5_base": (32, dict(channel_multiplier=0.25)),
    "eps_mvitv2_tiny": (32, dict(img_size=32)),
    "eps_nest_tiny": (32, dict(img_size=32)),
    "eps_nextvit_small": (32, {}),
    "eps_poolformerv2_s12": (32, {}),
    "eps_sequencer2d_s": (64, dict(layers=(1, 1, 1, 1), embed_dims=(48, 96, 96, 96), img_size=64)),
    "eps_volo_d1_224": (32, dict(img_size=32)),
    "eps_xception41p": (32, {}),
}
# Scripting, tracing and rebuilding take seconds. By default they run for the most different twins.
TRACED = (
    "eps_cait_xxs24_224", "eps_mobilenetv2_035", "eps_swin_tiny_patch4_window7_224", "eps_test_byobnet",
    "eps_test_convnext", "eps_test_nfnet", "eps_test_resnet", "eps_test_vit", "eps_visformer_tiny",
)  # fmt: skip


QUICK_COVER = (
    *TRACED,
    "eps_deit_tiny_distilled_patch16_224", "eps_edgenext_xx_small", "eps_mobilenetv3_small_050", "eps_regnetx_002",
    "eps_test_mambaout",
)  # fmt: skip


class Case(NamedTuple):
    """A twin and its architecture, with equal weights, in evaluation mode. Tests change only copies."""

    name: str
    keywords: dict[str, Any]
    twin: nn.Module
    plain: nn.Module
    images: Tensor

    def build(self, *, plain: bool = False, **kwargs: Any) -> nn.Module:
        name = base_name(self.name) if plain else self.name
        return timm.create_model(name, **{"num_classes": CLASSES, **self.keywords, **kwargs}).eval()


def make_case(name: str, size: int, keywords: dict[str, Any]) -> Case:
    torch.manual_seed(0)
    twin = timm.create_model(name, num_classes=CLASSES, **keywords).eval()
    plain = timm.create_model(base_name(name), num_classes=CLASSES, **keywords).eval()
    plain.load_state_dict(twin.state_dict(), strict=True)
    return Case(name, keywords, twin, plain, torch.randn(2, 3, size, size))


# By default the most different twins. The others combine the same parts in other ways.
SLOW_COVER = [name for name in COVER if name not in QUICK_COVER]


@pytest.fixture(
    scope="module",
    params=[*QUICK_COVER, *(pytest.param(name, marks=pytest.mark.slow) for name in (*SLOW_COVER, *LARGE_COVER))],
)
def case(request) -> Case:
    return make_case(request.param, *(COVER | LARGE_COVER)[request.param])


@pytest.fixture(
    scope="module",
    params=[name if name in TRACED else pytest.param(name, marks=pytest.mark.slow) for name in [*COVER, *LARGE_COVER]],
)
def traced_case(request) -> Case:
    return make_case(request.param, *(COVER | LARGE_COVER)[request.param])


def same(some: Any, others: Any) -> bool:
    """The tensors are equal bit for bit."""
    some, others = tree_leaves(some), tree_leaves(others)
    return len(some) == len(others) and all(map(torch.equal, some, others))


def joined(outputs: Any) -> Tensor:
    """One tensor, also of a distilled network, which returns two in training."""
    return torch.cat(outputs) if isinstance(outputs, tuple) else outputs


def where_plain_does(try_it: Callable[[nn.Module], Any], case: Case) -> tuple[Any, Any]:
    """The results of the twin and of the plain architecture. Skips the test if the plain architecture raises."""
    with torch.no_grad():
        try:
            expected = try_it(copy.deepcopy(case.plain))
        except Exception as error:
            pytest.skip(f"{base_name(case.name)} cannot: {type(error).__name__}")
        return try_it(copy.deepcopy(case.twin)), expected


def training_step(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Outputs and gradients of a copy in training mode."""
    model = copy.deepcopy(model).train()
    torch.manual_seed(1)
    outputs = joined(model(images))
    outputs.mean().backward()
    return outputs.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def kind(name: str) -> tuple[str, type]:
    """The timm module of an architecture and the class of the network."""
    entrypoint = model_entrypoint(base_name(name))
    with torch.device("meta"):
        return entrypoint.__module__, type(entrypoint())


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_named_layers(model: nn.Module) -> None:
    """The state dict holds the layers that the configuration names, because transfer learning replaces these layers."""
    cfg, keys = model.default_cfg, model.state_dict().keys()
    named = [cfg["first_conv"], cfg["classifier"]] if cfg.get("num_classes") else [cfg["first_conv"]]
    assert [layer for layer in tree_leaves([list(n) if isinstance(n, tuple) else n for n in named]) if layer]
    for layer in tree_leaves([list(n) if isinstance(n, tuple) else n for n in named]):
        assert layer is None or f"{layer}.weight" in keys, layer


def test_lists_are_not_empty():
    assert len(NAMES) > 1000
    assert len(COVER) >= 60
    assert set(COVER) | set(LARGE_COVER) <= set(NAMES)
    assert not set(COVER) & set(LARGE_COVER)
    assert set(TRACED) <= set(COVER)


def test_gates_and_keys(case):
    """The twin has open gates and the state dict of the original. Each loads the other's state dict strictly."""
    assert gates(case.twin)
    assert all(gate.epsilon == 0 and not gate.closed for gate in gates(case.twin).values())
    assert list(case.twin.state_dict()) == list(case.plain.state_dict())
    twin, plain = copy.deepcopy(case.twin), case.build(plain=True)
    twin.load_state_dict(plain.state_dict(), strict=True)
    assert same(twin.state_dict(), plain.state_dict())
    with torch.no_grad():
        assert same(twin(case.images), plain(case.images))


def test_evaluation_is_bit_identical(case):
    with torch.no_grad():
        outputs = case.twin(case.images)
        assert same(outputs, case.plain(case.images))
    assert not joined(outputs).isnan().any()
    assert len(joined(outputs)) == len(case.images)
    assert case.twin.num_classes == case.plain.num_classes
    if case.twin.num_classes:
        assert outputs.shape == (2, CLASSES)


def test_training_is_bit_identical(case):
    """Outputs and gradients of a step with the same random numbers."""
    outputs, gradients = training_step(case.twin, case.images)
    expected, expected_gradients = training_step(case.plain, case.images)
    assert torch.equal(outputs, expected)
    assert not outputs.isnan().any()
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    different = [name for name, gradient in gradients.items() if not torch.equal(gradient, expected_gradients[name])]
    assert different == []


def test_default_cfg(case):
    check_named_layers(case.twin)
    cfg, plain_cfg = case.twin.default_cfg, case.plain.default_cfg
    assert cfg["architecture"] == case.name
    names = {"architecture", "hf_hub_id", "tag"}  # the Hub id is completed with the name of the architecture
    assert {k: v for k, v in cfg.items() if k not in names} == {k: v for k, v in plain_cfg.items() if k not in names}


def test_features_and_classifier(case):
    """Feature dimensions are as declared, and the classifier can be removed."""
    model = copy.deepcopy(case.twin)
    with torch.no_grad():
        features = model.forward_features(case.images)
        assert same(features, case.plain.forward_features(case.images))
        try:
            expected = case.plain.forward_head(features, pre_logits=True)
        except (NotImplementedError, TypeError):  # the network has no classifier, or one for features
            pytest.skip(f"{base_name(case.name)} has no head")
        pre_logits = model.forward_head(features, pre_logits=True)
        assert same(pre_logits, expected)
        if isinstance(features, Tensor):
            fmt = Format(getattr(model, "output_fmt", "NCHW"))
            axis = getattr(model, "feature_dim", get_channel_dim(fmt) if features.ndim == 4 else -1)
            assert features.shape[axis] == model.num_features
            assert pre_logits.shape[1 if pre_logits.ndim != 3 else -1] == model.head_hidden_size
        model.reset_classifier(0)
        assert model.num_classes == 0
        pooled = model(case.images)
    assert [leaf.shape for leaf in tree_leaves(pooled)] == [leaf.shape for leaf in tree_leaves(pre_logits)]
    model.reset_classifier(7)
    assert model.num_classes in (7, 0), "an encoder has none"
    assert not model.num_classes or model(case.images).shape == (2, 7)


def test_classifier_reset_unpooled(case):
    def unpooled(model):
        model.reset_classifier(0, "")
        return model(case.images)

    found, expected = where_plain_does(unpooled, case)
    assert same(found, expected)


def test_unpooled_from_the_start(traced_case):
    """``num_classes=0, global_pool=''`` gives the feature map, and without the classifier the pooled features."""
    images = traced_case.images.to("meta")
    with torch.device("meta"):
        try:
            expected = traced_case.build(plain=True, num_classes=0, global_pool="")(images)
        except Exception as error:
            pytest.skip(f"{base_name(traced_case.name)} cannot: {type(error).__name__}")
        found = traced_case.build(num_classes=0, global_pool="")(images)
    assert [leaf.shape for leaf in tree_leaves(found)] == [leaf.shape for leaf in tree_leaves(expected)]


def test_features_only(case):
    """Number, channels, reductions and formats of the features are those of the original."""
    try:
        plain = case.build(plain=True, features_only=True)
        with torch.no_grad():
            expected = plain(case.images)
    except Exception as error:
        pytest.skip(f"{base_name(case.name)} cannot: {type(error).__name__}")
    twin = case.build(features_only=True)
    for of in ("channels", "reduction"):
        assert getattr(twin.feature_info, of)() == getattr(plain.feature_info, of)()
    assert twin.feature_info.out_indices == plain.feature_info.out_indices
    same_class = type(twin) is type(plain)
    if same_class:
        assert list(twin.state_dict()) == list(plain.state_dict())
        twin.load_state_dict(plain.state_dict(), strict=True)
    with torch.no_grad():
        features = twin(case.images)
    assert [f.shape for f in features] == [f.shape for f in expected]
    assert len(features) == len(twin.feature_info.channels())
    assert not any(f.isnan().any() for f in features)
    channel, size = get_channel_dim(fmt := Format(getattr(twin, "output_fmt", "NCHW"))), case.images.shape[-1]
    assert [f.shape[channel] for f in features] == twin.feature_info.channels()
    for feature, reduction in zip(features, twin.feature_info.reduction(), strict=True):
        assert all(feature.shape[axis] <= -(-size // reduction) + 1 for axis in get_spatial_dim(fmt))
    if same_class:
        assert same(features, expected)


def test_forward_intermediates(case):
    found, expected = where_plain_does(lambda model: model.forward_intermediates(case.images), case)
    assert same(found, expected)
    assert len(found[1]) == len(FeatureInfo(case.twin.feature_info, len(case.twin.feature_info)).channels())


def test_grad_checkpointing(case):
    """Outputs, gradients and responses equal those of a step without checkpointing."""
    try:
        copy.deepcopy(case.plain).set_grad_checkpointing()
    except (AssertionError, AttributeError) as error:
        pytest.skip(f"{base_name(case.name)} cannot: {type(error).__name__}")
    model = copy.deepcopy(case.twin)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        results.append(training_step(model, case.images))
    (outputs, gradients), (also_outputs, also_gradients) = results
    torch.testing.assert_close(also_outputs, outputs, rtol=1e-4, atol=1e-5)
    assert [name for name, gradient in also_gradients.items() if gradient is None] == []
    for name, gradient in gradients.items():
        torch.testing.assert_close(also_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_torchscript(traced_case):
    """A scripted twin gives equal outputs, if timm's own architecture can be scripted."""
    with set_scriptable(True):
        twin = traced_case.build()
        try:
            scripted = torch.jit.script(twin)
        except Exception as error:
            try:
                torch.jit.script(traced_case.build(plain=True))
            except Exception:
                pytest.skip(f"{base_name(traced_case.name)} cannot: {type(error).__name__}")
            raise
    with torch.no_grad():
        torch.testing.assert_close(scripted(traced_case.images), twin(traced_case.images), rtol=1e-5, atol=1e-5)


def test_fx(traced_case):
    """A symbolically traced twin gives equal outputs, if timm's own architecture can be traced."""

    def traced(model):
        last = get_graph_node_names(model)[1][-1]
        return next(iter(create_feature_extractor(model, return_nodes=[last]).eval()(traced_case.images).values()))

    with torch.no_grad():
        expected = traced_case.twin(traced_case.images)
        try:
            found = traced(copy.deepcopy(traced_case.twin))
        except Exception as error:
            try:
                traced(copy.deepcopy(traced_case.plain))
            except Exception:
                pytest.skip(f"{base_name(traced_case.name)} cannot: {type(error).__name__}")
            raise
    assert same(found, expected)


# A post-activation ResNet, ConvNeXt, ViT, Swin, EfficientNet, MobileNetV3, RegNet, and the CIFAR network.
PRUNED = {
    "eps_test_resnet": set(TOOLS),
    "eps_test_convnext": set(TOOLS),
    "eps_test_vit": {"torch.jit.script", "feature extraction"},
    "eps_swin_tiny_patch4_window7_224": set(TOOLS),
    "eps_mobilenetv2_035": set(TOOLS),
    "eps_mobilenetv3_small_050": set(TOOLS),
    "eps_regnetx_002": set(TOOLS),
}


@pytest.mark.parametrize("name", mostly_slow(PRUNED, 0))
def test_pruned_twins_script_and_trace(name):
    """Tools that accept timm's own network accept it with open or closed gates, and without whole or half blocks."""
    found = try_tools(base_name(name), COVER[name][1])
    assert found == {tool: dict.fromkeys(STATES) for tool in TOOLS if tool in PRUNED[name]}


def test_pruned_cifar_network_scripts_and_traces():
    found = try_tools("eps_resnet20", {})
    assert found == {tool: dict.fromkeys(STATES) for tool in TOOLS}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in [*COVER, *LARGE_COVER] if name not in PRUNED])
def test_all_pruned_twins_script_and_trace(name):
    found = try_tools(base_name(name), (COVER | LARGE_COVER)[name][1])
    assert found == {tool: dict.fromkeys(STATES) for tool in found}


@pytest.mark.slow
def test_cover_is_complete():
    """There is one twin of every timm module and class of network, and it is small by default."""
    covered = {kind(name) for name in [*COVER, *LARGE_COVER]}
    assert len(covered) == len(COVER) + len(LARGE_COVER), "two of one kind"
    missing = {key: name for name in NAMES if (key := kind(name)) not in covered}
    assert missing == {}
    for name, (_, keywords) in COVER.items():
        with torch.device("meta"):
            assert parameters(timm.create_model(name, num_classes=CLASSES, **keywords)) <= MAX_PARAMETERS, name


def image_size(model: nn.Module) -> int:
    """A small image size that the default configuration of a network accepts."""
    cfg = model.default_cfg
    size = cfg["input_size"][-1]
    return size if cfg.get("fixed_input_size") else min(size, (cfg.get("min_input_size") or (3, 128, 128))[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_name(name):
    """Every twin can be built. Up to a size, it is bit for bit its original in evaluation and in training."""
    with torch.device("meta"):
        plain, twin = timm.create_model(base_name(name)), timm.create_model(name)
    assert gates(twin)
    assert list(twin.state_dict()) == list(plain.state_dict())
    check_named_layers(twin)
    size = image_size(plain)
    if parameters(plain) > MAX_PARAMETERS_SLOW or size > 256:
        return
    case = make_case(name, size, {})
    test_evaluation_is_bit_identical(case)
    test_training_is_bit_identical(case)

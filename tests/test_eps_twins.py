"""The twins: registered for all of timm's residual networks, with timm's weights, built by name, saved and loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from conftest import close, mostly_slow
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, pipeline

import timm_eps
from timm_eps import EpsilonMixin, EpsResNetForImageClassification
from timm_eps.names import base_name, twin_name
from timm_eps.surgery.branches import gates, probe_batch

pytestmark = pytest.mark.usefixtures("nothing_drawn")

TWINS = timm.list_models(module="eps_twins")


def test_every_resnet_has_a_twin():
    originals = [*timm.list_models(module="resnet"), *timm.list_models(module="resnetv2")]
    assert len(originals) > 90
    assert {twin_name(name) for name in originals} <= set(TWINS)
    assert len(TWINS) > 1200


def test_names_lead_both_ways():
    originals = timm.list_models(exclude_filters="eps_*")
    assert all(base_name(twin_name(name)) == name for name in originals)
    assert len({twin_name(name) for name in originals}) == len(originals)
    assert twin_name("resnet200") == "eps_resnet200_imagenet"
    assert twin_name("eps_resnet50") == "eps_resnet50"


@pytest.mark.parametrize("twin", ["eps_resnet50", "eps_resnetv2_101", "eps_convnext_tiny", "eps_resnet200_imagenet"])
def test_pretrained_tags_are_timms(twin):
    base = base_name(twin)
    tags = [name.partition(".")[2] for name in timm.list_models(f"{base}.*", pretrained=True)]
    assert [name.partition(".")[2] for name in timm.list_models(f"{twin}.*", pretrained=True)] == tags
    for name, cfg in (
        [(base, timm.get_pretrained_cfg(base))]
        if not tags
        else [(f"{base}.{tag}", timm.get_pretrained_cfg(f"{base}.{tag}")) for tag in tags]
    ):
        ours = timm.get_pretrained_cfg(name.replace(base, twin, 1))
        assert ours.architecture == twin
        assert {**ours.to_dict(), "architecture": base} == cfg.to_dict()
    assert timm.get_pretrained_cfg(twin).tag == timm.get_pretrained_cfg(base).tag


def stored_weights(tmp_path, name: str) -> tuple[nn.Module, dict]:
    """A plain timm network, and a patch that makes timm load its weights as published ones."""
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    return plain, {"file": str(tmp_path / "weights.safetensors")}


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_vit.r160_in1k", "test_convnext.r160_in1k"])
def test_published_weights_load_strictly(name, tmp_path):
    plain, source = stored_weights(tmp_path, name)
    twin = timm.create_model(f"eps_{name}", pretrained=True, pretrained_cfg_overlay=source).eval()
    assert type(twin) is type(plain)
    batch = probe_batch(plain)
    with torch.no_grad():
        assert torch.equal(twin(batch), plain(batch))
        slots = list(gates(twin))
        pruned = timm.create_model(
            f"eps_{name}", pretrained=True, pretrained_cfg_overlay=source, removed=slots[1:3]
        ).eval()
        close(twin, *slots[1:3])
        assert torch.equal(pruned(batch), twin(batch))
        fewer = timm.create_model(f"eps_{name}", pretrained=True, pretrained_cfg_overlay=source, num_classes=5).eval()
        assert torch.equal(fewer.forward_features(batch), plain.forward_features(batch))
    unfit = dict(plain.state_dict(), stranger=torch.zeros(1))
    save_file(unfit, source["file"])
    with pytest.raises(RuntimeError, match="stranger"):
        timm.create_model(f"eps_{name}", pretrained=True, pretrained_cfg_overlay=source)


@pytest.mark.parametrize("name", ["resnet18", "test_nfnet", "regnetx_002", "test_byobnet"])
def test_networks_from_scratch_do_not_start_dead(name):
    """timm initialises the last scale of these branches with zero, which would close the gate for good."""

    def smallest_response(model: nn.Module) -> float:
        for gate in gates(model).values():
            gate.measures_response = True
        model.train()(torch.randn(2, 3, 64, 64))
        return min(gate.response.item() for gate in gates(model).values())

    plain = timm.create_model(name)
    timm_eps.add_gates(plain)
    assert smallest_response(plain) == 0
    assert smallest_response(timm.create_model(f"eps_{name}")) > 0.01


@pytest.mark.parametrize("name", mostly_slow(["test_resnet", "test_vit", "test_convnext", "test_mambaout"], 0))
def test_saved_by_name_and_loaded_everywhere(name, tmp_path):
    """A pruned network of any family is one directory for timm, AutoModel and pipeline, with equal logits."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()  # timm's own name; gates are added afterwards
    slots = timm_eps.add_gates(model)
    close(model, *slots[1::2])
    batch = probe_batch(model)
    with torch.no_grad():
        logits = model(batch)
    timm_eps.save_pretrained(model, tmp_path, label_names=["a", "b", "c"])
    assert f"keeps {len(slots) - len(slots[1::2])} of {len(slots)} residual branches" in (
        tmp_path / "README.md"
    ).read_text(encoding="utf-8")
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    by_auto = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    body = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(by_timm(batch), logits)
        assert torch.equal(by_auto(batch).logits, logits)
        assert torch.equal(body(batch).last_hidden_state, by_timm.forward_features(batch))
    assert by_timm.removed == slots[1::2]
    assert by_auto.config.architecture == f"eps_{name}"
    assert pipeline("image-classification", model=str(tmp_path)).model.config.id2label == {0: "a", 1: "b", 2: "c"}
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    assert len(features(batch)) == len(features.feature_info.channels())


def test_timm_itself_saves_a_pruned_network(tmp_path):
    model = timm.create_model("test_vit", num_classes=3).eval()
    slots = timm_eps.add_gates(model)
    close(model, slots[0], slots[3])
    timm_eps.remove_closed(model)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    batch = probe_batch(model)
    assert torch.equal(again(batch), model(batch))


def test_initialised_as_timm_does():
    """transformers would initialise every weight again."""
    torch.manual_seed(0)
    wrapper = EpsResNetForImageClassification(timm_eps.EpsResNetConfig(architecture="eps_test_vit", num_labels=4))
    torch.manual_seed(0)
    model = timm.create_model("eps_test_vit", num_classes=4)
    for key, tensor in model.state_dict().items():
        assert torch.equal(wrapper.timm_model.state_dict()[key], tensor), key
    assert wrapper.side_head is None


def test_mixin():
    class GatedResNet(EpsilonMixin, timm.models.ResNet):
        pass

    arguments = {"block": timm.models.resnet.BasicBlock, "layers": (2, 1, 1, 1), "num_classes": 3}
    model = GatedResNet(**arguments).eval()
    assert len(gates(model)) == 5
    pruned = GatedResNet(**arguments, removed=["layer1.1.drop_path"]).eval()
    pruned.load_state_dict({key: model.state_dict()[key] for key in pruned.state_dict()})
    close(model, "layer1.1.drop_path")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(pruned(images), model(images))
    with pytest.raises(ValueError, match=r"'layer1\.7\.drop_path' is not a gated slot"):
        GatedResNet(**arguments, removed=["layer1.7.drop_path"])


class GatedResNet(EpsilonMixin, timm.models.ResNet):
    pass


GatedResNet.register(
    "eps_a_resnet_of_ones_own", {"first_conv": "conv1", "classifier": "fc", "input_size": (3, 64, 64)},
    block=timm.models.resnet.BasicBlock, layers=(1, 2, 2, 1),
)  # fmt: skip


def test_a_class_of_ones_own_is_saved_loaded_and_pushed_like_a_twin(hub, tmp_path):
    model = timm.create_model("eps_a_resnet_of_ones_own", num_classes=3).eval()
    timm_eps.prune(model, ["layer2.1.drop_path"])
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    timm_eps.save_pretrained(model, tmp_path / "out", label_names=["a", "b", "c"])
    timm_eps.push_to_hub(model, "me/own")
    for place in (f"local-dir:{tmp_path / 'out'}", "hf-hub:me/own"):
        again = timm.create_model(place, pretrained=True).eval()
        assert type(again) is GatedResNet
        assert torch.equal(again(images), expected)
    auto = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(auto(images).logits, expected)
    assert auto.config.id2label == {0: "a", 1: "b", 2: "c"}
    other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5)
    assert torch.equal(other.conv1.weight, model.conv1.weight)
    assert other(images).shape == (2, 5)
    with pytest.raises(ValueError, match="is not an architecture of timm"):
        timm_eps.export_timm(model, tmp_path / "plain")


def test_all_gated_networks_are_instances_of_the_mixin():
    twin, plain = timm.create_model("eps_test_resnet"), timm.create_model("test_resnet")
    assert isinstance(twin, EpsilonMixin)
    assert not isinstance(plain, EpsilonMixin)
    assert not isinstance(twin, GatedResNet), "which is more than gates"
    assert isinstance(torch.nn.DataParallel(twin), EpsilonMixin)
    assert not isinstance(torch.nn.Linear(1, 1), EpsilonMixin)
    assert isinstance(timm.create_model("eps_a_resnet_of_ones_own"), GatedResNet)
    timm_eps.add_gates(plain)
    assert isinstance(plain, EpsilonMixin)


@pytest.mark.parametrize(("name", "said"), [("my_resnet", "begins with eps_"), ("eps_resnet18", "is taken")])
def test_names_that_cannot_be_registered(name, said):
    with pytest.raises(ValueError, match=said):
        GatedResNet.register(name)


def test_weight_decay_empties_a_branch_only_where_it_reaches_the_last_norm():
    """A norm cancels weight decay of earlier weights: the response of a closed branch falls with param_groups only."""

    def response_after(decay_last_norm: bool) -> float:
        torch.manual_seed(0)
        model = timm.create_model("eps_test_resnet", num_classes=3).train()
        gate = gates(model)["layer1.0.drop_path"]
        gate.epsilon = 1e6  # all gates close, so that only decay acts
        groups = (
            timm_eps.param_groups(model, 0.5)
            if decay_last_norm
            else [
                {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.5},
                {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
            ]
        )
        optimizer = torch.optim.SGD(groups, lr=0.1)
        images = torch.randn(4, 3, 32, 32)
        responses = []
        for _ in range(60):
            gate.reset_response()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
            responses.append(gate.response.item())
        return responses[-1] / responses[0]

    assert response_after(decay_last_norm=True) < 0.1
    assert response_after(decay_last_norm=False) > 0.7


@pytest.mark.slow
def test_architectures_of_other_packages_are_not_gated():
    code = (
        "import timm.models, torch, sys\n"
        "@timm.models.register_model\n"
        "def foreign_net(pretrained=False, **kwargs): return torch.nn.Identity()\n"
        "import timm_eps, timm\n"
        "assert not timm.is_model('eps_foreign_net')\n"
        "assert timm.is_model('eps_resnet50')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_dead_branches_are_revived():
    """GRN starts at zero, where it is an identity. Values set by timm change only where necessary."""
    torch.manual_seed(0)
    plain = timm.create_model("convnextv2_atto", num_classes=3)
    torch.manual_seed(0)
    twin = timm.create_model("eps_convnextv2_atto", num_classes=3)
    assert all(torch.equal(tensor, twin.state_dict()[key]) for key, tensor in plain.state_dict().items())


def test_encoders_are_saved(tmp_path):
    model = timm.create_model("eps_gemma4_vit_167m_enc", depth=1, embed_dim=96, num_heads=3, img_size=96).eval()
    slot = next(iter(gates(model)))
    close(model, slot)
    timm_eps.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.removed == [slot]

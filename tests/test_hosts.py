"""Gates and removal inside detectors and segmenters: those of transformers, and a user's model on features_only."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
import transformers as hf
from conftest import mostly_slow
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import timm_eps
from timm_eps import EpsResNetBackbone, EpsResNetConfig
from timm_eps.surgery.branches import input_size, timm_body
from timm_eps.surgery.removal import closed_slots

FIRST, LAST = "layer1.0.drop_path", "layer4.0.drop_path"
DETR = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 4, "num_labels": 3,
}  # fmt: skip
MASKS = {"mask_feature_size": 32, "num_labels": 3}


def backbone_config(stages: int = 1) -> EpsResNetConfig:
    config = EpsResNetConfig(architecture="eps_test_resnet")
    config.out_features = config.stage_names[-stages:]
    return config


def rt_detr(config_class: type, **fields):
    return config_class(
        backbone_config=backbone_config(3), encoder_in_channels=[48, 192, 96], feat_strides=[8, 16, 32],
        decoder_in_channels=[16] * 3, encoder_hidden_dim=16, encoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_attention_heads=2, decoder_ffn_dim=16, decoder_layers=2, d_model=16, num_queries=4, num_denoising=0,
        num_labels=3, **fields,
    )  # fmt: skip


HOSTS = {
    "UperNet": lambda: hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(
            backbone_config=backbone_config(4), hidden_size=8, pool_scales=[1, 2], auxiliary_in_channels=192,
            auxiliary_channels=8, num_labels=3,
        )
    ),
    "DETR": lambda: hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=backbone_config(), **DETR)),
    "RT-DETR": lambda: hf.RTDetrForObjectDetection(rt_detr(hf.RTDetrConfig)),
    "Mask2Former": lambda: hf.Mask2FormerForUniversalSegmentation(
        hf.Mask2FormerConfig(
            backbone_config=backbone_config(4), feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
            encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=4, **MASKS,
        )
    ),
    "MaskFormer": lambda: hf.MaskFormerForInstanceSegmentation(
        hf.MaskFormerConfig(
            backbone_config=backbone_config(4), decoder_config=hf.DetrConfig(**DETR), fpn_feature_size=32, **MASKS
        )
    ),
    "Conditional DETR": lambda: hf.ConditionalDetrForObjectDetection(
        hf.ConditionalDetrConfig(backbone_config=backbone_config(), **DETR)
    ),
    "Deformable DETR": lambda: hf.DeformableDetrForObjectDetection(
        hf.DeformableDetrConfig(backbone_config=backbone_config(3), num_feature_levels=3, **DETR | {"d_model": 32, "decoder_layers": 2})  # noqa: E501
    ),
    "DAB-DETR": lambda: hf.DabDetrForObjectDetection(
        hf.DabDetrConfig(
            backbone_config=backbone_config(),
            **{"hidden_size" if name == "d_model" else name: value for name, value in DETR.items()},
        )
    ),
    "Table Transformer": lambda: hf.TableTransformerForObjectDetection(
        hf.TableTransformerConfig(backbone_config=backbone_config(), **DETR)
    ),
    "RT-DETRv2": lambda: hf.RTDetrV2ForObjectDetection(rt_detr(hf.RTDetrV2Config, decoder_n_levels=3)),
}  # fmt: skip


def host_of(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A host with statistics that are not the initial ones, its backbone, and images."""
    torch.manual_seed(0)
    host = HOSTS[name]().eval()
    [backbone] = [module for module in host.modules() if isinstance(module, EpsResNetBackbone)]
    for module in backbone.modules():
        if hasattr(module, "running_mean"):
            nn.init.normal_(module.running_mean, std=0.2)
    return host, backbone, torch.randn(2, 3, 64, 64)


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = model(images)
    return list(tree_leaves(found.to_tuple() if hasattr(found, "to_tuple") else found))


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    assert some
    return len(some) == len(others) and all(map(torch.equal, some, others))


def loaded(host: nn.Module, directory) -> nn.Module:
    """The host loaded from its directory, without missing weights. Clones are aligned, so sums round equally."""
    model, info = type(host).from_pretrained(directory, output_loading_info=True)
    # The weights also store which gates are closed. Some hosts report these keys as unexpected.
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not key.endswith(".closed")}
    assert not any(info.values()), info
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model.eval()


def stored(directory) -> dict:
    return json.loads((directory / "config.json").read_text())["backbone_config"].get("model_args")


@pytest.mark.parametrize("name", mostly_slow(HOSTS, 0))
def test_pruned_in_a_host_saved_and_loaded_whole(name, tmp_path):
    """One branch is removed and one closed. The loaded host has the same structure and outputs."""
    host, backbone, images = host_of(name)
    dense = outputs(host, images)
    found = timm_eps.gates(backbone)
    for slot in (FIRST, LAST):
        found[slot].closed = True
    closed = outputs(host, images)
    assert not same(dense, closed)
    host.save_pretrained(tmp_path / "closed")
    assert timm_eps.prune(backbone, [LAST]) == [LAST]
    assert same(outputs(host, images), closed)
    host.save_pretrained(tmp_path / "both")
    assert timm_eps.remove_closed(backbone) == [FIRST]
    host.save_pretrained(tmp_path / "removed")
    structures = {
        "closed": {"closed": [FIRST, LAST]},
        "both": {"closed": [FIRST], "removed": [LAST]},
        "removed": {"removed": [FIRST, LAST]},
    }
    for form, structure in structures.items():
        assert stored(tmp_path / form) == structure
        assert same(outputs(loaded(host, tmp_path / form), images), closed)


@pytest.mark.parametrize("name", mostly_slow(HOSTS, 0))
def test_the_refusal_names_the_backbone(name):
    host, backbone, _ = host_of(name)
    with pytest.raises(ValueError, match="not a timm model; pass the timm model inside it, model") as caught:
        timm_eps.EpsilonPruner(host, keep=0.5)
    path = str(caught.value).partition("inside it, model.")[2].removesuffix(".")
    assert host.get_submodule(path) is backbone


def test_training_with_the_optimizer_of_the_whole_host():
    host, backbone, images = host_of("UperNet")
    optimizer = torch.optim.SGD(host.train().parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    pruner = timm_eps.EpsilonPruner(backbone, optimizer, keep=2, patience=1)
    for _ in range(4):
        host(images, labels=torch.randint(3, (2, 64, 64))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert len(timm_eps.removed_slots(backbone)) == 2
    assert set(optimizer.param_groups[0]["params"]) == set(host.parameters())
    assert set(optimizer.state) <= set(host.parameters())
    assert host.config.backbone_config.model_args["removed"] == timm_eps.removed_slots(backbone)


@pytest.mark.slow
def test_frozen_statistics_and_frozen_stages_of_a_detector():
    """DETR freezes parameters of a backbone whose type sounds like a ResNet. An unfrozen backbone is pruned."""
    host, backbone, _ = host_of("DETR")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    backbone.requires_grad_()
    optimizer = torch.optim.SGD(host.train().parameters(), lr=0.01, weight_decay=1e-3)
    pruner = timm_eps.EpsilonPruner(backbone, optimizer, keep=2, patience=1)
    for _ in range(4):
        labels = [{"class_labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.5)}] * 2
        host(torch.randn(2, 3, 64, 64), labels=labels).loss.backward()
        optimizer.step()
        pruner.step()
    assert len(timm_eps.removed_slots(backbone)) == 2


def test_whoever_prunes_the_network_inside_the_file_says_so(tmp_path):
    host, backbone, images = host_of("UperNet")
    timm_eps.prune(backbone.timm_model, [LAST])
    host.save_pretrained(tmp_path)
    assert stored(tmp_path) == {"removed": [LAST]}
    assert same(outputs(loaded(host, tmp_path), images), outputs(host, images))


def test_copies_of_a_host_have_structures_of_their_own(tmp_path):
    host, backbone, images = host_of("UperNet")
    timm_eps.gates(backbone)[FIRST].closed = True
    duplicate = copy.deepcopy(host)
    timm_eps.prune(duplicate.backbone, [LAST])
    for model, structure in ((host, {"closed": [FIRST]}), (duplicate, {"closed": [FIRST], "removed": [LAST]})):
        model.save_pretrained(tmp_path)
        assert stored(tmp_path) == structure
        assert same(outputs(loaded(model, tmp_path), images), outputs(model, images))
    by_torch, _, _ = host_of("UperNet")
    by_torch.load_state_dict(host.state_dict())
    assert closed_slots(by_torch.backbone) == [FIRST]


def test_two_hosts_of_one_configuration_do_not_save_each_others_structure(tmp_path):
    host, backbone, _ = host_of("UperNet")
    other = type(host)(host.config)
    timm_eps.prune(backbone, [LAST])
    for model in (host, other):
        with pytest.raises(ValueError, match=r"share one EpsResNetConfig.*copy\.deepcopy"):
            model.save_pretrained(tmp_path)
    del other, model
    host.save_pretrained(tmp_path)
    assert stored(tmp_path) == {"removed": [LAST]}


def test_a_pruned_classifier_becomes_the_backbone_of_a_host(tmp_path):
    classifier = timm.create_model("eps_test_resnet", num_classes=5)
    timm_eps.prune(classifier, [LAST])
    timm_eps.save_pretrained(classifier, tmp_path / "classifier")
    pruned = EpsResNetBackbone.from_pretrained(tmp_path / "classifier", out_indices=[1, 2, 3, 4]).eval()
    fields = {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_in_channels": 192, "auxiliary_channels": 8}
    host = hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=pruned.config, **fields))
    host.backbone.load_state_dict(pruned.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert same(outputs(host.eval().backbone, images), outputs(pruned, images))
    host.save_pretrained(tmp_path / "host")
    assert stored(tmp_path / "host")["removed"] == [LAST]
    assert same(outputs(loaded(host, tmp_path / "host"), images), outputs(host, images))


class Scenes(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": torch.full((64, 64), index % 3)}


def trainer_of(host: nn.Module, directory) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        str(directory), num_train_epochs=4, per_device_train_batch_size=2, save_strategy="epoch", report_to=[],
        weight_decay=1e-3, use_cpu=True, disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    callback = timm_eps.EpsilonCallback(keep=2, warmup_epochs=1, ramp_epochs=1, patience=2)
    return hf.Trainer(host, arguments, train_dataset=Scenes(), callbacks=[callback])


@pytest.mark.slow
def test_trainer_prunes_the_backbone_of_a_host_and_resumes(tmp_path):
    host, backbone, images = host_of("UperNet")
    trainer_of(host, tmp_path / "a").train()
    assert len(timm_eps.removed_slots(backbone)) == 2
    resumed, inside, _ = host_of("UperNet")
    trainer_of(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert timm_eps.removed_slots(inside) == timm_eps.removed_slots(backbone)
    assert same(outputs(resumed.eval(), images), outputs(host.eval(), images))
    host.save_pretrained(tmp_path / "host")
    assert same(outputs(loaded(host, tmp_path / "host"), images), outputs(host, images))


def test_weights_in_a_file_of_a_host_load_by_torch(tmp_path):
    host, _, images = host_of("UperNet")
    host.save_pretrained(tmp_path)
    other = copy.deepcopy(host)
    nn.init.zeros_(next(other.backbone.parameters()))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same(outputs(other, images), outputs(host, images))


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_a_stock_backbone_in_a_host_does_not_save_a_structure_that_it_cannot_name(architecture, tmp_path):
    config = hf.TimmBackboneConfig(backbone=architecture, out_indices=[-1])
    host = hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=config, **DETR))
    slots = timm_eps.add_gates(host.model.backbone.model)
    host.save_pretrained(tmp_path / "dense")
    timm_eps.prune(host.model.backbone.model, slots[-1:])
    with pytest.raises(ValueError, match=r"around this feature network does not save.*backbone_config"):
        host.save_pretrained(tmp_path / "pruned")


FEATURES = {  # modules listed, names joined, and networks that are wrapped whole
    "eps_test_resnet": {},
    "eps_resnet20": {},
    "eps_test_vit": {},
    "eps_test_resnet, hooks": {"feature_cls": "hook"},
    "eps_test_resnet, dict": {"feature_cls": "dict"},
    "eps_test_convnext": {},
    "eps_test_nfnet": {},
    "eps_test_byobnet": {},
    "eps_mobilenetv3_small_050": {},
    "eps_regnetx_002": {"out_indices": (1, 2)},
}


def feature_net(name: str, **fields) -> nn.Module:
    options = FEATURES[name] | fields
    return timm.create_model(name.partition(",")[0], features_only=True, **options).eval()


class Segmenter(nn.Module):
    """A user's model on timm's features."""

    def __init__(self, name: str, **fields) -> None:
        super().__init__()
        self.backbone = feature_net(name, **fields)
        self.head = nn.Conv2d(self.backbone.feature_info.channels()[-1], 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.head((list(features.values()) if isinstance(features, dict) else features)[-1])


@pytest.mark.parametrize("name", mostly_slow(FEATURES, 0, 1))
def test_pruned_inside_a_features_only_network(name):
    """With closed gates every feature map stays equal. The list of slots builds the same network again."""
    torch.manual_seed(0)
    model = Segmenter(name).eval()
    net = model.backbone
    images = torch.randn(2, *input_size(timm_body(net)))
    slots = list(timm_eps.gates(net))
    dense = outputs(net, images)
    for slot in slots[1::2]:
        timm_eps.gates(net)[slot].closed = True
    before, masks = outputs(net, images), outputs(model, images)
    assert not same(dense, before)
    removed = timm_eps.remove_closed(net)
    assert removed == slots[1::2]
    assert same(outputs(net, images), before)
    again = Segmenter(name, removed=timm_eps.removed_slots(net)).eval()
    again.load_state_dict(model.state_dict())
    assert same(outputs(again, images), masks)
    assert timm_eps.removed_slots(again.backbone) == timm_eps.removed_slots(net)
    assert list(timm_eps.gates(again.backbone)) == list(timm_eps.gates(net))
    assert timm_eps.prune(again.backbone, slots[:1]) == slots[:1]
    third = Segmenter(name, removed=timm_eps.removed_slots(again.backbone)).eval()
    third.load_state_dict(again.state_dict())


@pytest.mark.parametrize("name", mostly_slow(FEATURES, 1))
def test_features_of_a_pruned_classifier(name, tmp_path):
    classifier = timm.create_model(name.partition(",")[0], num_classes=5).eval()
    slots = list(timm_eps.gates(classifier))
    images = torch.randn(2, *input_size(classifier))
    timm_eps.prune(classifier, slots[1::2])
    timm_eps.save_pretrained(classifier, tmp_path)
    options = {"features_only": True, **FEATURES[name]}
    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **options).eval()
    assert 0 < len(timm_eps.removed_slots(net)) <= len(slots[1::2])
    if hasattr(classifier, "forward_intermediates"):
        every = classifier.forward_intermediates(images, intermediates_only=True)
        assert same(outputs(net, images), [every[index] for index in net.feature_info.out_indices])


def test_gates_of_stock_features():
    net = timm.create_model("test_resnet", features_only=True)
    assert timm_eps.add_gates(net) == [f"layer{number}.0.drop_path" for number in range(1, 5)]
    timm_eps.prune(net, [LAST])
    twin = timm.create_model("eps_test_resnet", features_only=True, removed=timm_eps.removed_slots(net))
    twin.load_state_dict(net.state_dict())


def test_features_that_cannot_be_pruned_inside_say_what_can():
    own_class = timm.create_model("tf_efficientnet_lite0", features_only=True)
    with pytest.raises(ValueError, match=r"EfficientNetFeatures is not a timm model; make the gated twin"):
        timm_eps.add_gates(own_class)
    model = Segmenter("eps_test_resnet")
    with pytest.raises(ValueError, match=r"pass the timm model inside it, model\.backbone\."):
        timm_eps.prune(model, [LAST])

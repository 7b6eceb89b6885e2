"""Foreign directories: a configuration is only data, the weights fit it, and both files belong together.

Every loader is tested: timm, transformers' Auto classes, the backbone, and the stand-alone code.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import stat
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from conftest import mostly_slow
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

import timm_eps
from timm_eps import EpsResNetBackbone, EpsResNetConfig, EpsResNetForImageClassification
from timm_eps.files import standalone
from timm_eps.files.config_checks import check_label_names, check_model_args, shortened
from timm_eps.files.weight_checks import check_numbers
from timm_eps.hf.model_files import staged
from timm_eps.surgery.branches import gates

pytestmark = pytest.mark.usefixtures("nothing_drawn")

REMOVED = {
    "eps_resnet20": ["stages.1.blocks.1.drop_path"],
    "eps_test_vit": ["blocks.2.drop_path1"],
    "eps_test_resnet": ["layer2.0.drop_path"],
}
LOADERS = {
    "timm": lambda d: timm.create_model(f"local-dir:{d}", pretrained=True),
    "classifier": AutoModelForImageClassification.from_pretrained,
    "model": AutoModel.from_pretrained,
    "backbone": EpsResNetBackbone.from_pretrained,
    "standalone": standalone.EpsResNetForImageClassification.from_pretrained,
}
TWIN_LOADERS = [name for name in LOADERS if name != "standalone"]
every_loader = pytest.mark.parametrize("loader", LOADERS)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """A saved pruned network of each kind."""
    torch.manual_seed(0)
    found = {}
    for name, removed in REMOVED.items():
        found[name] = tmp_path_factory.mktemp("stored") / name
        timm_eps.save_pretrained(timm.create_model(name, num_classes=5, removed=removed), found[name])
    return found


@pytest.fixture
def stored(originals, tmp_path):
    """A function that copies a saved network, so that a test may damage the copy."""

    def make(name: str = "eps_resnet20", change_config=None, change_weights=None) -> Path:
        directory = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(originals[name], directory)
        config = json.loads((directory / "config.json").read_text())
        if change_weights is not None:
            weights = load_file(directory / "model.safetensors")
            change_weights(weights)
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
            del config["weights_sha256"]  # a deliberate attacker would delete it too
        if change_config is not None:
            config = change_config(config) or config
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


def refuses(loader: str, directory: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        LOADERS[loader](directory)
    message = str(caught.value)
    assert len(message) < 300, message
    assert "\n" not in message


# --- a configuration is data -----------------------------------------------------------------------------

HOSTILE = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth"},
    "pretrained_cfg_overlay": {"source": "", "url": "http://127.0.0.1:9/sitecustomize.py"},
    "pretrained_strict": False,
    "checkpoint_path": "/etc/hostname",
    "cache_dir": "/tmp/anywhere",
    "kwargs_filter": ["removed"],
    "features_only": True,
    "feature_cls": "fx",
    "out_indices": [0],
    "num_classes": 3,
    "device": "meta",
    "dtype": "float64",
    "scriptable": True,
    "exportable": True,
    "no_jit": True,
    "model_cfg": {},
    "hf_hub_id": "somebody/else",
    "state_dict": {},
    "model_name": "resnet18",
}


_WATCHED: list[str] = []  # directories that files may be written to during a test
_HAPPENED: list[tuple] = []


def _watch(event: str, args: tuple) -> None:
    if not _WATCHED:
        return
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
        _HAPPENED.append((event, args))
    writes = event == "open" and isinstance(args[1], str) and set("wax+") & set(args[1])
    if (writes or event in ("os.rename", "os.remove", "os.mkdir")) and not str(args[0]).startswith(tuple(_WATCHED)):
        _HAPPENED.append((event, args[0]))


sys.addaudithook(_watch)  # an audit hook cannot be removed


@pytest.fixture
def nothing_outside(tmp_path):
    """Fail a test that opens a connection, starts a process, or writes outside its directory."""
    _HAPPENED.clear()
    _WATCHED[:] = [str(tmp_path), os.devnull]
    yield
    _WATCHED.clear()
    assert _HAPPENED == []


@pytest.mark.parametrize("keyword", HOSTILE)
@pytest.mark.parametrize("name", REMOVED)
def test_model_args_choose_no_source_file_device_class_or_form(stored, nothing_outside, name, keyword):
    def change(config):
        config["model_args"][keyword] = HOSTILE[keyword]

    directory = stored(name, change)
    for loader in LOADERS if name == "eps_resnet20" else TWIN_LOADERS:
        if loader == "timm" and keyword in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            with pytest.raises((TypeError, ValueError)):  # timm passes these arguments itself
                LOADERS[loader](directory)
        elif loader == "timm" and keyword in ("checkpoint_path", "scriptable", "exportable", "no_jit"):
            with pytest.raises((ValueError, TypeError)):
                LOADERS[loader](directory)
        else:
            refuses(loader, directory, rf"model_args\['{keyword}'\]")


def test_the_stages_of_a_hostile_configuration_are_not_looked_for(stored, nothing_outside):
    def change(config):
        config["model_args"] |= {
            "pretrained": True,
            "cache_dir": "/tmp/anywhere",
            "pretrained_cfg_overlay": {"source": "", "url": "http://127.0.0.1:9/sitecustomize.py"},
        }

    for name in REMOVED:
        with pytest.raises(ValueError, match="model_args"):
            _ = AutoConfig.from_pretrained(stored(name, change)).stage_names


def test_a_configuration_made_by_hand_is_checked_like_one_from_a_file():
    with pytest.raises(ValueError, match="cache_dir"):
        EpsResNetConfig(architecture="eps_test_vit", model_args={"cache_dir": "/tmp/anywhere"})
    with pytest.raises(ValueError, match="pretrained"):
        standalone.EpsResNetConfig(model_args={"pretrained": True})


@pytest.mark.parametrize("field", ["url", "file", "hf_hub_id", "hf_hub_filename", "state_dict", "custom_load"])
def test_pretrained_cfg_does_not_choose_where_weights_come_from(stored, nothing_outside, field):
    def change(config):
        config["pretrained_cfg"][field] = {"a": 1} if field == "state_dict" else "http://127.0.0.1:9/x"

    for name in REMOVED:
        refuses("classifier", stored(name, change), rf"pretrained_cfg\['{field}'\]")
        refuses("timm", stored(name, change), rf"pretrained_cfg\['{field}'\]")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("attn_implementation", "somebody/kernels"),
        ("_attn_implementation_internal", "somebody/kernels"),
        ("closed", ["stages.0.blocks.1.drop_path"]),
        ("removed", ["stages.0.blocks.1.drop_path"]),
        ("stage_names", ["a"]),
        ("per_layer_config", {}),
        ("base_model_tp_plan", {"a": "b"}),
    ],
)
def test_the_root_names_structure_alone(stored, field, value):
    refused_by_every_reader(stored("eps_resnet20", lambda config: {**config, field: value}), field)


def refused_by_every_reader(directory: Path, match: str) -> None:
    """The three readers of configurations. The other loaders call them."""
    refuses("timm", directory, match)
    config = json.loads((directory / "config.json").read_text())
    for cls in (EpsResNetConfig, standalone.EpsResNetConfig):
        with pytest.raises(ValueError, match=match):
            cls.from_dict(dict(config))


VALUES = [
    ({"removed": ["stages.1.blocks.1.drop_path"] * 2}, "once"),
    ({"removed": ["x" * 100_000]}, "removed"),
    ({"removed": ["stages.²"]}, "removed"),
    ({"removed": "stages.1.blocks.1.drop_path"}, "removed"),
    ({"removed": [3]}, "removed"),
    ({"removed": {"stages.1.blocks.1.drop_path": 1}}, "removed"),
    ({"removed": ["stages.1.blocks." + "9" * 200]}, "removed|slot"),
    ({"closed": 3}, "closed"),
    ({"closed": ["nowhere"]}, "closed"),
    ({"layers": [3, 3]}, "channels"),
    ({"layers": [10**6, 1, 1]}, "layers"),
    ({"layers": [0, 1, 1]}, "layers"),
    ({"layers": 3}, "layers"),
    ({"layers": [3.0, 3, 3]}, "layers"),
    ({"layers": [True, 3, 3]}, "layers"),
    ({"channels": [16, 32, 10**9]}, "channels"),
    ({"channels": [16, 32, -1]}, "channels"),
    ({"channels": None, "layers": "3"}, "layers"),
    ({"pixel_mean": [10**5, 10**5]}, "pixel_mean"),
    ({"pixel_mean": 3}, "pixel_mean"),
    ({"in_chans": 10**9}, "in_chans"),
    ({"drop_rate": 2}, "drop_rate"),
    ({"drop_rate": math.nan}, "drop_rate"),
    ({"act_layer": 7}, "act_layer"),
    ({"global_pool": "all"}, "global_pool"),
    ({"depth_of_field": 1}, "depth_of_field"),
]


@pytest.mark.parametrize(("change", "field"), VALUES)
def test_values_out_of_bounds_are_named(stored, change, field):
    directory = stored("eps_resnet20", lambda config: config["model_args"].update(change))
    if change in (
        {"closed": ["nowhere"]},
        {"removed": ["stages.1.blocks." + "9" * 200]},
    ):  # valid as a path until the network is built
        refuses("timm", directory, field)
        refuses("classifier", directory, field)
    else:
        refused_by_every_reader(directory, field)


@pytest.mark.parametrize(("change", "field"), [VALUES[0], VALUES[9], VALUES[18], ({"device": "meta"}, "device")])
@every_loader
def test_every_loader_reads_the_configuration_so(stored, loader, change, field):
    refuses(loader, stored("eps_resnet20", lambda config: config["model_args"].update(change)), field)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_classes": 10**12}, "num_classes"),
        ({"num_classes": "5"}, "num_classes"),
        ({"num_classes": -1}, "num_classes"),
        ({"architecture": 7}, "architecture"),
        ({"architecture": ["eps_resnet20"]}, "architecture"),
        ({"label_names": ["a"]}, "label_names"),
        ({"label_names": [1, 2, 3, 4, 5]}, "label_names"),
        ({"model_args": [1]}, "model_args"),
        ({"pretrained_cfg": "x"}, "pretrained_cfg"),
        ({"weights_sha256": "x"}, "weights_sha256"),
        ({"pretrained_cfg": {"fixed_input_size": 1}}, "fixed_input_size"),
    ],
)
@pytest.mark.parametrize("loader", ["classifier", "standalone"])
def test_fields_at_the_root_are_checked(stored, loader, change, field):
    refuses(loader, stored("eps_resnet20", lambda config: {**config, **change}), field)


@pytest.mark.parametrize("value", ["x", -1, math.nan, math.inf])
def test_the_weight_of_the_side_loss_is_a_finite_number(stored, value):
    refuses("classifier", stored("eps_resnet20", lambda c: {**c, "side_loss_weight": value}), "side_loss_weight")


def test_a_large_architecture_over_a_small_file_takes_no_memory(stored):
    def change(config):
        config["architecture"] = "eps_vit_giant_patch14_224"
        config["model_args"] = {"removed": [f"blocks.{i}.drop_path{k}" for i in range(40) for k in (1, 2)]}

    before = _peak()
    for loader in ("classifier",):
        refuses(loader, stored("eps_test_vit", change), "shape|lacks|also holds|has the shape")
    assert _peak() - before < 500 * 2**20


def _peak() -> int:
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_arguments_of_timms_networks_are_no_sources():
    """Names that look like a source or a file, but are arguments of networks."""
    args = {
        "drop_path_rate": 0.1,
        "pretrained_window_sizes": [0, 0],
        "class_token": False,
        "transformer_drop_path": True,
    }
    assert check_model_args(args, is_cifar=False) == args


def test_shortened_shows_any_value_in_one_short_line():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, list(range(10**5)), deep, 10**6000, b"\n" * 1000):
        assert len(shortened(value)) < 80
        assert "\n" not in shortened(value)


# --- weights fit the structure ---------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["head.fc", ["head.fc", "stages"], "", None, ["stages", "stem", "norm", "head"]])
def test_the_file_does_not_name_the_classifier(stored, named):
    """A name would switch off the strict check of the named part."""

    def change(config):
        config["pretrained_cfg"]["classifier"] = named
        config["model_args"]["removed"] = []

    for loader in ("timm", "classifier", "model", "backbone"):
        refuses(loader, stored("eps_resnet20", change), "lacks")


@pytest.mark.parametrize(
    "removed",
    [[], ["stages.1.blocks.1.drop_path", "stages.2.blocks.2.drop_path"], ["stages.2.blocks.2.drop_path"]],
    ids=["fewer", "more", "others"],
)
@every_loader
def test_other_removed_branches_than_the_files_are_refused(stored, loader, removed):
    directory = stored("eps_resnet20", lambda config: config["model_args"].update(removed=removed))
    refuses(loader, directory, "model.safetensors|weights do not fit")


@pytest.mark.parametrize("name", mostly_slow(["eps_test_vit", "eps_test_resnet"], 1))
@pytest.mark.parametrize("loader", TWIN_LOADERS)
def test_twins_are_as_strict(stored, loader, name):
    refuses(loader, stored(name, lambda config: config.update(model_args={})), "lacks")
    others = [slot for slot in gates(timm.create_model(name)) if slot not in REMOVED[name]]
    for removed in ([*REMOVED[name], others[0]], [others[0]]):
        directory = stored(name, lambda config, removed=removed: config["model_args"].update(removed=removed))
        refuses(loader, directory, "lack|hold")


@pytest.mark.parametrize("change", [{"channels": [16, 32, 65]}, {"channels": [8, 32, 64]}, {"layers": [3, 3, 4]}])
def test_only_the_classifier_may_have_other_sizes(stored, change):
    directory = stored("eps_resnet20", lambda config: config["model_args"].update(change))
    for cls in (EpsResNetForImageClassification, standalone.EpsResNetForImageClassification):
        with pytest.raises(ValueError, match=r"shape|lacks"):
            cls.from_pretrained(directory, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("cls", [EpsResNetForImageClassification, standalone.EpsResNetForImageClassification])
def test_a_new_classifier_is_made_when_it_is_asked_for(stored, cls):
    directory = stored()
    model = cls.from_pretrained(directory, num_labels=7, ignore_mismatched_sizes=True)
    assert model(torch.randn(2, 3, 8, 8)).logits.shape == (2, 7)
    weights = load_file(directory / "model.safetensors")
    own = {name.removeprefix("timm_model."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.items() if not name.startswith("head."))


@pytest.mark.parametrize("name", REMOVED)
def test_timm_makes_a_new_classifier_for_other_classes(stored, name):
    directory = stored(name)
    model = timm.create_model(f"local-dir:{directory}", pretrained=True, num_classes=7)
    assert model.num_classes == 7
    weights, own = load_file(directory / "model.safetensors"), model.state_dict()
    same = [key for key, tensor in weights.items() if own[key].shape == tensor.shape and torch.equal(own[key], tensor)]
    assert len(same) >= len(weights) - 2


def without_classifier(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if name.startswith(("head.fc.", "head.weight", "head.bias", "fc."))]:
        del weights[name]


@pytest.mark.parametrize("name", REMOVED)
@pytest.mark.parametrize("loader", ["timm", "classifier"])
def test_weights_without_a_classifier_make_no_random_one(stored, loader, name):
    refuses(loader, stored(name, change_weights=without_classifier), "lacks")


def test_weights_without_a_classifier_do_for_what_has_none(stored):
    directory = stored(change_weights=without_classifier)
    assert AutoModel.from_pretrained(directory)(torch.randn(1, 3, 8, 8)).pooler_output.shape == (1, 64)
    model = EpsResNetForImageClassification.from_pretrained(directory, ignore_mismatched_sizes=True)
    assert model(torch.randn(1, 3, 8, 8)).logits.shape == (1, 5)


DAMAGES = {
    "nan": lambda w: w["stem.norm.bias"].fill_(math.nan),
    "infinity": lambda w: w["stages.0.blocks.0.conv1.weight"][0, 0, 0].fill_(math.inf),
    "negative variance": lambda w: w["norm.running_var"].fill_(-1.0),
    "whole numbers": lambda w: w.update({"stem.conv.weight": w["stem.conv.weight"].to(torch.int64)}),
    "bool": lambda w: w.update({"norm.weight": w["norm.weight"] > 0}),
    "another shape": lambda w: w.update({"norm.weight": w["norm.weight"][:-1].clone()}),
    "one too few": lambda w: w.pop("norm.running_mean"),
    "one too many": lambda w: w.update({"another.weight": torch.zeros(2)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@every_loader
def test_damaged_weights_are_named(stored, loader, damage):
    if (loader, damage) == ("timm", "nothing"):
        return
    named = {"one too many": "another.weight", "infinity": "conv1", "nan": "stem.norm.bias"}.get(damage, "norm|conv")
    refuses(loader, stored(change_weights=DAMAGES[damage]), named)


@pytest.mark.parametrize("damage", ["nan", "infinity", "negative variance"])
def test_damaged_weights_are_not_saved(tmp_path, damage):
    model = timm.create_model("eps_resnet20", num_classes=5)
    DAMAGES[damage](model.state_dict())
    with pytest.raises(ValueError, match=r"norm|conv1"):
        timm_eps.save_pretrained(model, tmp_path / "m")
    assert not list((tmp_path / "m").iterdir())


@every_loader
def test_pickles_are_not_read(stored, loader):
    directory = stored()
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    refuses(loader, directory, "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{}", b"\xff" * 7 + b"\x7f{}"])
@every_loader
def test_files_that_are_no_safetensors_are_named(stored, loader, content):
    directory = stored()
    (directory / "model.safetensors").write_bytes(content)
    refuses(loader, directory, "model.safetensors")


# --- the two files are a pair ----------------------------------------------------------------------------


@every_loader
def test_new_labels_are_not_read_over_old_weights(stored, tmp_path, loader):
    """A save that is killed between its last two renames leaves the new configuration beside the old weights."""
    directory = stored()
    torch.manual_seed(1)
    model = timm.create_model("eps_resnet20", num_classes=5, removed=REMOVED["eps_resnet20"])
    timm_eps.save_pretrained(model, tmp_path / "new", label_names=list("edcba"))
    shutil.copy(tmp_path / "new" / "config.json", directory)
    refuses(loader, directory, "weights_sha256")


def test_a_file_saved_by_others_has_no_digest_and_is_read(stored):
    directory = stored(change_config=lambda config: config.pop("weights_sha256") and None)
    for load in LOADERS.values():
        load(directory)


def test_files_have_the_permissions_of_new_files(tmp_path):
    probe = tmp_path / "probe"
    probe.touch()
    model = timm.create_model("eps_resnet20", num_classes=5)
    timm_eps.save_pretrained(model, tmp_path / "m", remote_code=True)
    EpsResNetForImageClassification.from_timm(model).save_pretrained(tmp_path / "n")
    files = [path for path in (*(tmp_path / "m").rglob("*"), *(tmp_path / "n").rglob("*")) if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {stat.S_IMODE(probe.stat().st_mode)}


def test_what_a_killed_save_left_is_deleted_and_what_one_at_work_writes_is_not(tmp_path):
    for name in (".saving-999999999-x", ".saving-old", f".saving-{os.getpid()}-y"):
        (tmp_path / name).mkdir()
    with staged(tmp_path) as staging:
        (staging / "a").write_text("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".saving-{os.getpid()}-y", "a"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_loader_keeps_the_precision_of_the_file(tmp_path, dtype):
    timm_eps.save_pretrained(timm.create_model("eps_resnet20", num_classes=5).to(dtype), tmp_path / "m")
    for name, load in LOADERS.items():
        assert {p.dtype for p in load(tmp_path / "m").parameters()} == {dtype}, name


def test_weights_of_several_precisions_are_not_saved(tmp_path):
    model = timm.create_model("eps_resnet20", num_classes=5)
    model.head.half()
    with pytest.raises(ValueError, match=r"float16.*model\.to"):
        timm_eps.save_pretrained(model, tmp_path / "m")


# --- what a configuration cannot say ---------------------------------------------------------------------


def other_head(model):
    model.head.fc = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.stem.conv)


def other_norm(model):
    model.norm = nn.GroupNorm(8, 64)


def other_activation(model):
    model.stages[0].blocks[0].norm2.act = nn.GELU()


def fewer_stages(model):
    model.stages = model.stages[:2]
    model.norm = nn.Identity()
    model.head.fc = nn.Linear(32, 5)


def other_stride(model):
    model.stem.conv.stride = (2, 2)


def adapter(model):
    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.lora_A = base, nn.Linear(64, 2)

        def forward(self, x):
            return self.base_layer(x)

    model.head.fc = Lora(model.head.fc)


@pytest.mark.parametrize(
    "change", [other_head, parametrized, other_norm, other_activation, fewer_stages, other_stride, adapter]
)
def test_a_network_that_its_configuration_does_not_describe_is_not_saved(tmp_path, change):
    model = timm.create_model("eps_resnet20", num_classes=5)
    change(model)
    for save in (
        timm_eps.save_pretrained,
        lambda m, d: EpsResNetForImageClassification.from_timm(m).save_pretrained(d),
    ):
        with pytest.raises(ValueError, match="modules were changed"):
            save(model, tmp_path / "m")
        assert not [path for path in (tmp_path / "m").rglob("*") if path.is_file()]


@pytest.mark.parametrize("names", [["a"] * 5, ["a"] * 4, [1, 2, 3, 4, 5], "abcde", {1: "a"}, {0: "a", 1: 2}])
def test_class_names_are_as_many_different_strings(tmp_path, names):
    with pytest.raises(ValueError, match="label_names"):
        timm_eps.save_pretrained(timm.create_model("eps_resnet20", num_classes=5), tmp_path, label_names=names)


def test_a_mapping_of_class_names_uses_its_values():
    assert check_label_names("label_names", {"1": "b", "0": "a"}) == ["a", "b"]


def test_no_server_is_asked_for_a_local_directory(stored, monkeypatch):
    def no(*args, **kwargs):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", no)
    for load in LOADERS.values():
        load(stored())


def test_quantized_weights_are_named(tmp_path):
    class Quantized(torch.Tensor):
        """Stands for the tensors with which torchao replaces weights."""

        def __deepcopy__(self, memo):
            return self

    model = timm.create_model("eps_resnet20", num_classes=5)
    weight = model.head.fc.weight.detach().as_subclass(Quantized)
    del model.head.fc.weight
    model.head.fc.register_buffer("weight", weight)
    with pytest.raises(ValueError, match=r"head\.fc\.weight is a Quantized"):
        timm_eps.save_pretrained(model, tmp_path / "m")


@pytest.mark.parametrize("depth", mostly_slow([110, 200], 1))
def test_a_cifar_network_is_not_taken_for_timms_of_that_depth(tmp_path, depth):
    """timm has its own ResNet-200."""
    model = timm.create_model(f"eps_resnet{depth}", num_classes=5)
    timm_eps.save_pretrained(model, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).stage_names == ["stem", "stage1", "stage2", "stage3"]
    loaded = LOADERS["timm"](tmp_path)
    assert type(loaded) is type(model)
    with pytest.raises(ValueError, match="not an architecture of timm"):
        timm_eps.export_timm(model, tmp_path / "plain")


@pytest.mark.parametrize(("name", "value", "fits"), [
    ("proj.input_min", -math.inf, True), ("proj.input_max", math.inf, True),
    ("proj.input_max", math.nan, False), ("proj.weight", math.inf, False),
])  # fmt: skip
def test_limits_of_a_clamp_may_be_infinite(name, value, fits):
    with nullcontext() if fits else pytest.raises(ValueError, match="NaN or infinity"):
        check_numbers({name: torch.tensor([1.0, value])})

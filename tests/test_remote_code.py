"""Pruned timm networks without timm_eps: by the code beside the weights, and as programs of plain torch.

Run as a script with a directory of saved models, this file makes these checks.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

pytestmark = pytest.mark.usefixtures("nothing_drawn")

BEIT = {"num_classes": 5, "depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3}
NETWORKS = {
    "whole_blocks": ("eps_test_resnet", {"num_classes": 5}, ["layer1.0.drop_path", "layer3.0.drop_path"]),
    "half_blocks": ("eps_test_vit", {"num_classes": 5}, ["blocks.0.drop_path1", "blocks.3.drop_path2"]),
    "parameters": ("eps_beit_base_patch16_224", BEIT, ["blocks.0.drop_path1"]),
    "headless": ("eps_test_convnext", {"num_classes": 0}, ["stages.1.blocks.0.drop_path"]),
}
PROGRAMS = ("whole_blocks", "half_blocks")
REMOTE = {"trust_remote_code": True}
LABELS = list("abcde")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Saved models with their outputs, after the checks in a process that cannot import timm_eps."""
    import timm

    import timm_eps

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("remote_code")
    for name, (architecture, arguments, slots) in NETWORKS.items():
        net = timm.create_model(architecture, **arguments).eval()
        timm_eps.prune(net, slots)
        labels = LABELS if net.num_classes else None
        program = name in PROGRAMS
        timm_eps.save_pretrained(net, place / name, label_names=labels, remote_code=True, exported_program=program)
        images = torch.randn(3, *timm.models.get_model_input_config(net)["input_size"])
        with torch.no_grad():
            torch.save({"images": images, "output": net(images)}, place / name / "expected.pt")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env.update(HF_HOME=str(place / "hf_home"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    env.pop("HF_MODULES_CACHE", None)
    run = subprocess.run(
        [sys.executable, __file__, str(place)], cwd=place, env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "all checks passed"
    return place


@torch.no_grad()
def check_outputs(directory: Path) -> None:
    expected = torch.load(directory / "expected.pt")
    images, output = expected["images"], expected["output"]
    if directory.name in PROGRAMS:
        program = torch.export.load(directory / "model.pt2").module()
        assert torch.equal(program(images), output)
        assert program(images[:1]).shape == output[:1].shape

    config = AutoConfig.from_pretrained(directory, **REMOTE)
    encoder = AutoModel.from_pretrained(directory, **REMOTE)
    assert type(encoder).__module__.startswith("transformers_modules.")
    if not config.num_labels:
        assert torch.equal(encoder(images).pooler_output, output)
        with pytest.raises(ValueError, match="has no classifier; pass num_labels"):
            AutoModelForImageClassification.from_pretrained(directory, **REMOTE)
        return
    assert encoder(images).pooler_output.shape[0] == len(images)
    model, info = AutoModelForImageClassification.from_pretrained(directory, output_loading_info=True, **REMOTE)
    assert not any(info.values()), info
    assert torch.equal(model(images).logits, output)
    assert model.config.id2label == dict(enumerate(LABELS))
    size = AutoImageProcessor.from_pretrained(directory, **REMOTE).data_config["input_size"]
    assert tuple(size) == tuple(images.shape[1:])

    other = AutoModelForImageClassification.from_pretrained(
        directory, num_labels=3, ignore_mismatched_sizes=True, **REMOTE
    )
    other.save_pretrained(directory / "tuned")
    again = AutoModelForImageClassification.from_pretrained(directory / "tuned", **REMOTE)
    assert torch.equal(again(images).logits, other(images).logits)
    assert again(images).logits.shape == (3, 3)


def test_without_timm_eps(place):
    """The checks of :func:`check_outputs` ran in another process when the fixture was made."""


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_eps_reads_the_same_directory(place, name):
    import timm

    import timm_eps

    expected = torch.load(place / name / "expected.pt")
    model = timm.create_model(f"local-dir:{place / name}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(expected["images"]), expected["output"])
    assert timm_eps.removed_slots(model) == NETWORKS[name][2]
    if model.num_classes:
        loaded = AutoModelForImageClassification.from_pretrained(place / name, **REMOTE)
        assert type(loaded).__module__ == "timm_eps.hf.modeling_eps_resnet"
        tuned = timm.create_model(f"local-dir:{place / name / 'tuned'}", pretrained=True)
        assert (tuned.num_classes, timm_eps.removed_slots(tuned)) == (3, NETWORKS[name][2])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_weights_are_no_larger_than_the_parameters(place, name):
    tensors = load_file(place / name / "model.safetensors")
    held = sum(tensor.nbytes for tensor in tensors.values())
    assert (place / name / "model.safetensors").stat().st_size < held + 100_000
    if name in PROGRAMS:
        assert (place / name / "model.pt2").stat().st_size < held + 1_000_000


def test_a_parameter_that_became_ones_stays_ones(place):
    loaded = AutoModelForImageClassification.from_pretrained(place / "parameters").timm_model
    assert torch.equal(loaded.blocks[0].gamma_1, torch.ones(48))
    assert not loaded.blocks[1].gamma_1.eq(1).all()


def test_no_path_of_this_machine_is_in_the_program(place):
    import zipfile

    with zipfile.ZipFile(place / "half_blocks" / "model.pt2") as archive:
        content = b"".join(archive.read(entry) for entry in archive.infolist())
    assert b"site-packages" not in content
    assert b".py" not in content


def changed(config: dict, **fields) -> dict:
    """The configuration with other edits, and with a matching digest."""
    from timm_eps.files.edits import edits_digest

    config = {**copy.deepcopy(config), **fields}
    try:
        removed = config["model_args"].get("removed", ())
        config["edits_sha256"] = edits_digest(config["timm_architecture"], removed, config["edits"])
    except (TypeError, AttributeError):
        pass
    return config


HOSTILE = {
    "unknown module": ([{"path": "layer9.0", "pass": 0}], "has nothing at 'layer9.0'"),
    "no module": ([{"path": "layer1.__class__", "pass": 0}], "has nothing at 'layer1.__class__'"),
    "a method": ([{"path": "forward", "pass": 0}], "has nothing at 'forward'"),
    "another kind": ([{"path": "layer1.0", "exec": "import os"}], "must be a list of objects with 'path' and one of"),
    "two kinds": ([{"path": "layer1.0", "pass": 0, "zero": []}], "must be a list of objects with 'path' and one of"),
    "out of the model": ([{"path": "../../etc/passwd", "pass": 0}], "must be the path of a module"),
    "the model itself": ([{"path": "", "pass": 0}], "must be the path of a module"),
    "a long path": ([{"path": "a." * 1000 + "a", "pass": 0}], "must be the path of a module"),
    "a number": ([{"path": 7, "pass": 0}], "must be the path of a module"),
    "no list": ("layer1.0", "edits must be a list of edits"),
    "nested": ([[[[]]]], "must be a list of objects"),
    "a far argument": ([{"path": "layer1.0", "pass": 60}], "has nothing at 'layer1.0' for the edit pass=60"),
    "a negative argument": ([{"path": "layer1.0", "pass": -1}], "must be the position of an argument"),
    "no child": ([{"path": "layer1.0", "chain": ["conv9"]}], "has nothing at 'layer1.0'"),
    "a path for a child": ([{"path": "layer1.0", "chain": ["conv1.weight"]}], "must be a list of names of children"),
    "zero elsewhere": ([{"path": "layer1.0.conv1", "zero": []}], "must be a list of at most 8 sizes or nulls"),
    "another branch": ([{"path": "layer2.0.drop_path", "zero": []}], "is closed, but removed does not list it"),
    "large zeros": ([{"path": "layer1.0.drop_path", "zero": [2**40]}], "must be a list of at most 8 sizes"),
    "no parameter": ([{"path": "layer1.0.conv1", "constant": True}], "has nothing at 'layer1.0.conv1'"),
    "none": ([], "none removes the branch of 'layer1.0.drop_path'"),
    "too few": ([{"path": "layer3.0", "pass": 0}], "none removes the branch of 'layer1.0.drop_path'"),
    "another block's too": (
        [{"path": "layer1.0", "pass": 0}, {"path": "layer3.0", "pass": 0}, {"path": "layer2.0", "pass": 0}],
        "does not fit the network",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_edits_are_refused(place, tmp_path, case):
    from timm_eps.files import standalone_twin

    edits, message = HOSTILE[case]
    config = json.loads((place / "whole_blocks" / "config.json").read_text())
    whole = [{"path": "layer1.0", "pass": 0}, {"path": "layer3.0", "chain": ["downsample", "act3"]}]
    is_form = case in ("none", "too few", "another block's too") or not isinstance(edits, list)
    config = changed(config, edits=edits if is_form else [*edits, *whole])
    save_file(load_file(place / "whole_blocks" / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "weights_sha256": None}))
    with pytest.raises(ValueError, match=message) as refused:
        standalone_twin.EpsResNetForImageClassification.from_pretrained(tmp_path)
    assert len(str(refused.value)) < 500


def test_edits_of_another_save_are_refused(place):
    from timm_eps.files.standalone_twin import EpsResNetConfig

    config = json.loads((place / "half_blocks" / "config.json").read_text())
    for fields in ({"edits": config["edits"][:-1]}, {"timm_architecture": "test_vit2"}, {"edits_sha256": None}):
        with pytest.raises(ValueError, match="edits"):
            EpsResNetConfig.from_dict({**config, **fields})


@pytest.mark.parametrize(
    "name", ["hf-hub:me/other", "local-dir:/etc", "resnet18.a1_in1k", "no_such_network", "", "a" * 1000, "../resnet18"]
)
def test_only_timms_own_networks_are_built(place, name):
    from timm_eps.files.standalone_twin import EpsResNetConfig

    config = json.loads((place / "whole_blocks" / "config.json").read_text())
    with pytest.raises(ValueError, match="timm_architecture must be a network of timm"):
        EpsResNetConfig.from_dict(changed(config, timm_architecture=name))


def test_saved_by_this_package_again_a_model_keeps_no_edits(place, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(place / "half_blocks")
    model.save_pretrained(tmp_path)
    assert (
        not {"edits", "edits_sha256", "timm_architecture"} & json.loads((tmp_path / "config.json").read_text()).keys()
    )


def test_a_class_that_timm_does_not_have_gets_no_code(tmp_path):
    import timm

    import timm_eps

    class GatedResNet(timm_eps.EpsilonMixin, timm.models.ResNet):
        pass

    GatedResNet.register("eps_test_remote_code", block=timm.models.resnet.BasicBlock, layers=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="eps_test_remote_code is no architecture of timm, so"):
        timm_eps.save_pretrained(timm.create_model("eps_test_remote_code"), tmp_path / "out", remote_code=True)
    assert not (tmp_path / "out").exists()


def test_a_program_has_its_suffix(tmp_path):
    import timm

    import timm_eps

    with pytest.raises(ValueError, match=r"path must end in \.pt2, .* got 'model\.pt'"):
        timm_eps.export_program(timm.create_model("eps_test_resnet"), tmp_path / "model.pt")


if __name__ == "__main__":
    sys.modules["timm_eps"] = None  # type: ignore[assignment]  blocks the import
    for network in NETWORKS:
        check_outputs(Path(sys.argv[1]) / network)
    print("all checks passed")

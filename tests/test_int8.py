"""Eight-bit ONNX files load anywhere and agree with the float network. Wrong input is refused in one line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import timm
import torch
from conftest import mostly_slow
from torch.nn import functional as F

import timm_eps
import train_hf
from timm_eps.analysis.evaluation import read_images
from timm_eps.hub import onnx_int8
from timm_eps.hub.onnx_export import OnnxFile
from timm_eps.hub.onnx_forms import forms_table, measure_forms

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.usefixtures("nothing_drawn")

# Four classes of images: the bright quarter tells the class.
WITHOUT_PACKAGE = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for size in (1, 3, 7):
    (logits,) = session.run(["logits"], {"pixel_values": numpy.zeros((size, 3, 16, 16), numpy.float32)})
    assert logits.shape == (size, 4) and logits.dtype == numpy.float32
assert "timm_eps" not in sys.modules and "torch" not in sys.modules
print("runs")
"""


def quarters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 8 * (label // 2) :, 8 * (label % 2) :][:, :8, :8] += 1.0
    return images, labels


def tiny(architecture: str = "eps_test_resnet") -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=4)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 16, 16), "pool_size": None}
    return model


@pytest.fixture(scope="module")
def trained():
    """A small trained and pruned network."""
    model = tiny()
    timm_eps.prune(model, list(timm_eps.gates(model))[-1:])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = quarters(128, 0)
    for _ in range(6):
        for batch, classes in zip(images.split(32), labels.split(32), strict=True):
            F.cross_entropy(model(batch), classes).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """The float file and the static file of the network, and the state before and after the export."""
    directory = tmp_path_factory.mktemp("int8")
    images, labels = quarters(64, 1)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    timm_eps.export_onnx(trained, directory / "float.onnx")
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    timm_eps.export_onnx(trained, directory / "int8.onnx", quantize="static", calibration=batches)
    return directory, before


def test_the_static_form_agrees_with_the_float_network(trained, files):
    images, labels = quarters(200, 2)
    with torch.no_grad():
        expected = trained(images)
    logits = OnnxFile(files[0] / "int8.onnx")(images)
    assert (expected.argmax(1) == labels).float().mean() > 0.9, "there is something to keep"
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() >= 0.99
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(logits, expected), "it is in eight bits"


def test_the_model_is_unchanged(trained, files):
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in trained.state_dict().items())
    assert not trained.training


def test_it_runs_without_this_package_for_any_batch(files):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(files[0] / "int8.onnx")], capture_output=True, text=True
    )
    assert done.stdout == "runs\n", done.stderr


def test_the_file_is_small_and_holds_no_path(files, trained):
    content = (files[0] / "int8.onnx").read_bytes()
    parameters = sum(parameter.numel() for parameter in trained.parameters())
    assert len(content) < len((files[0] / "float.onnx").read_bytes()) / 2
    assert len(content) > parameters, "a byte for each weight"
    for place in (b"site-packages", str(files[0]).encode(), b"/tmp", __file__.rpartition("/tests")[0].encode()):
        assert place not in content


def test_dynamic_warns_that_static_is_for_convolutions(trained, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "timm_eps"):
        timm_eps.export_onnx(trained, tmp_path / "new" / "dynamic.onnx", quantize="dynamic")
    assert "use quantize='static' there" in caplog.text
    assert OnnxFile(tmp_path / "new" / "dynamic.onnx")(quarters(3, 0)[0]).shape == (3, 4)


@pytest.mark.parametrize(
    "calibration",
    [
        [torch.ones(2, 3, 16, 16), torch.ones(3, 3, 16, 16)],
        [(torch.ones(2, 3, 16, 16), torch.zeros(2)), (torch.ones(3, 3, 16, 16), None)],
        [{"pixel_values": torch.ones(5, 3, 16, 16, dtype=torch.float64)}],
        (torch.ones(1, 3, 16, 16) for _ in range(5)),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(5, 3, 16, 16)), batch_size=2),
    ],
    ids=["tensors", "pairs", "dicts", "generator", "DataLoader"],
)
def test_calibration_takes_all_kinds_of_batches(calibration):
    found = onnx_int8.read_calibration(calibration, (3, 16, 16))
    assert torch.equal(found, torch.ones(5, 3, 16, 16))
    assert found.dtype == torch.float32


def test_no_more_images_are_read_than_are_needed():
    def endless():
        while True:
            yield torch.ones(3, 1, 2, 2)

    assert [len(batch) for batch in read_images("calibration", endless(), 7)] == [3, 3, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize must be 'static', 'dynamic' or None, got 'int4'"),
        ({"quantize": "static"}, "needs calibration, an iterable of batches of your training images"),
        ({"quantize": "dynamic", "calibration": [torch.ones(1, 3, 16, 16)]}, "calibration is for quantize='static'"),
        ({"calibration": [torch.ones(1, 3, 16, 16)]}, "calibration is for quantize='static', got quantize=None"),
        ({"quantize": "static", "calibration": []}, "calibration holds no images"),
        ({"quantize": "static", "calibration": torch.ones(1, 3, 16, 16)}, "put a single batch into a list"),
        ({"quantize": "static", "calibration": 7}, "calibration must be an iterable .* got int"),
        ({"quantize": "static", "calibration": ["a.png"]}, "batch 0 of calibration must be a float tensor .* got str"),
        ({"quantize": "static", "calibration": [{"labels": 1}]}, "must be a float tensor .* got NoneType"),
        ({"quantize": "static", "calibration": [torch.ones(3, 16, 16)]}, "float tensor .* shape .3, 16, 16"),
        ({"quantize": "static", "calibration": [torch.ones(1, 3, 16, 16).byte()]}, "normalised .* got torch.uint8"),
        ({"quantize": "static", "calibration": [torch.ones(1, 3, 8, 8)]}, "must be 3x16x16, .* got 3x8x8"),
        ({"quantize": "static", "calibration": [torch.full((1, 3, 16, 16), torch.nan)]}, "NaN or infinite"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        timm_eps.export_onnx(tiny(), tmp_path / "m.onnx", **options)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_onnxruntime_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_int8, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="Files in eight bits need onnxruntime: pip install onnxruntime"):
        timm_eps.export_onnx(tiny(), tmp_path / "m.onnx", quantize="dynamic")
    few = ["--max_train_samples", "20", "--max_eval_samples", "10", "--output_dir", str(tmp_path)]
    with pytest.raises(ImportError, match="onnxruntime"):  # before the training
        train_hf.main(["--architecture", "eps_resnet20", "--with_onnx_int8", "--num_threads", "1", *few])


def test_forms_are_measured_and_tabulated(files):
    paths = {"float32": files[0] / "float.onnx", "int8": files[0] / "int8.onnx"}
    images, labels = quarters(40, 3)
    found = measure_forms(paths, zip(images.split(16), labels.split(16), strict=True))
    for name, path in paths.items():
        right = (OnnxFile(path)(images).argmax(1) == labels).float().mean()
        assert found[name]["accuracy"] == pytest.approx(float(right))
        assert (found[name]["images"], found[name]["bytes"]) == (40, path.stat().st_size)
    assert [line.split(" | ")[0] for line in forms_table(found).splitlines()[2:]] == ["| float32", "| int8"]
    assert forms_table({}) == ""


def test_training_writes_and_measures_it(tmp_path):
    few = ["--max_train_samples", "40", "--max_eval_samples", "20", "--num_train_epochs", "1", "--no_gates"]
    model = ["--architecture", "eps_test_resnet", "--image_size", "16", "--num_threads", "1"]
    train_hf.main([*model, *few, "--with_onnx_int8", "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "all_results.json").read_text())
    path, card = tmp_path / "onnx" / "model_int8.onnx", (tmp_path / "README.md").read_text()
    assert set(results["onnx_forms"]) == {"int8"}
    assert results["onnx_forms"]["int8"]["images"] == 20
    assert results["onnx_forms"]["int8"]["bytes"] == path.stat().st_size
    assert "`onnx/model_int8.onnx` is the network in eight bits" in card
    assert "| ONNX Runtime | file | accuracy |" in card
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    timm_eps.save_pretrained(model, tmp_path)
    assert not path.exists(), "it is of another save"
    assert "ONNX Runtime" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("architecture", mostly_slow(["eps_test_vit", "eps_test_convnext", "eps_resnet20"]))
def test_timm_families_in_eight_bits(architecture, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=4).eval()
    images = torch.randn(16, *model.pretrained_cfg["input_size"])
    timm_eps.export_onnx(model, tmp_path / "m.onnx", quantize="static", calibration=[images])
    with torch.no_grad():
        expected = model(images)
    assert (OnnxFile(tmp_path / "m.onnx")(images) - expected).norm() < 0.2 * expected.norm()


def test_torchao_quantizes_a_pruned_network_in_memory(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = timm.create_model("eps_test_vit", num_classes=4).eval()
    timm_eps.prune(model, ["blocks.2.drop_path1"])
    images = torch.randn(4, *model.pretrained_cfg["input_size"])
    expected = model(images)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert (model(images) - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(ValueError, match="save the model before it is quantized"):
        timm_eps.save_pretrained(model, tmp_path / "out")

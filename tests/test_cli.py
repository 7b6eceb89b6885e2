"""``timm-eps``: each verb in this process, its help, its errors, and the command that a wheel installs."""

from __future__ import annotations

import json
import os
import re
import shlex
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import timm
import torch
from conftest import SLOTS, tiny_net
from test_hub import RESULTS

import timm_eps
from timm_eps import cli
from timm_eps.analysis.measure import size_of
from timm_eps.cli import VERBS, export, main

pytestmark = pytest.mark.usefixtures("nothing_drawn")

ROOT = Path(__file__).parent.parent
REMOVED = SLOTS[4:6]
FEW = ["--images", "16", "--latency_batch_size", "2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A pruned eps_resnet20 in a directory, with results."""
    torch.manual_seed(0)
    net, directory = tiny_net(num_classes=10), tmp_path_factory.mktemp("cli") / "saved"
    timm_eps.prune(net, REMOVED)
    timm_eps.save_pretrained(net, directory, results=RESULTS, label_names=[str(digit) for digit in range(10)])
    return str(directory)


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> str:
    """A saved twin from which export_timm can make a stock architecture."""
    net = timm.create_model("eps_test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    directory = tmp_path_factory.mktemp("cli") / "twin"
    timm_eps.save_pretrained(net, directory)
    return str(directory)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Threads of tiny layers wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("timm_eps.training.launching.available_cores", lambda: 1)
    yield
    torch.set_num_threads(before)


def answered(capsys, *words: str) -> dict:
    """The JSON object on stdout of a verb with ``--json``. stdout holds nothing else."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def printed(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *words: str, code: int = 1) -> str:
    """The last line on stderr of a verb that ends with this exit code. Only usage errors print more lines."""
    capsys.readouterr()
    assert main(list(words)) == code
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == ""
    assert "Traceback" not in err
    assert len(lines) == 1 or code == 2
    return lines[-1]


# Help.


@pytest.mark.parametrize("words", [[], *([verb] for verb in VERBS if verb != "train")], ids=str)
def test_help_fits_a_screen(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = printed(capsys, *words, "--help").splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100


def test_every_verb_has_a_file_and_three_names():
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    for verb in VERBS:
        assert verb in files
        module = __import__(f"timm_eps.cli.{verb}", fromlist=[verb])
        assert module.HELP.count("\n") == 0
        assert callable(module.run)


def test_train_has_the_flags_of_the_script(capsys):
    flags = set(re.findall(r"--\w+", printed(capsys, "train", "--help")))
    from timm_eps.training.arguments.parsing import build_parser

    assert flags >= {f"--{action.dest}" for action in build_parser()._actions if action.dest != "help"}


# Info.


def test_info_counts_what_is_there(saved, capsys):
    found = answered(capsys, "info", saved)
    net = timm.create_model(f"local-dir:{saved}", pretrained=True)
    dense = timm.create_model("eps_resnet20", num_classes=10)
    assert found["removed"] == REMOVED
    assert found["branches"] == {"all": 9, "kept": 7, "removed": 2, "closed": 0}
    assert found["stages"]["stages.1"] == {"all": 3, "kept": 1, "removed": REMOVED}
    for name, count in (("now", net), ("dense", dense)):
        size = size_of(count, (3, 8, 8))
        assert (found["parameters"][name], found["multiply_adds"][name]) == tuple(size)
    assert found["results"]["eval_accuracy"] == RESULTS["eval_accuracy"]
    assert found["files"]["model.safetensors"] == (Path(saved) / "model.safetensors").stat().st_size
    assert "not an architecture of timm" in found["loaders"]["export_timm"]["reason"]
    text = printed(capsys, "info", saved)
    assert f"{found['parameters']['now']:,}" in text
    assert "accuracy: 50.00 %" in text
    assert all(slot in text for slot in REMOVED)


def test_info_says_whether_stock_timm_can_load_it(twin, tmp_path, capsys):
    loaders = answered(capsys, "info", twin)["loaders"]
    assert loaders["export_timm"] == {"possible": True, "reason": None}
    assert not loaders["stock"]
    answered(capsys, "export", twin, "--format", "timm", "--output", str(tmp_path / "plain"))
    assert answered(capsys, "info", str(tmp_path / "plain"))["loaders"]["stock"]


def test_info_lists_code_and_onnx_files(saved, tmp_path, capsys):
    timm_eps.save_pretrained(timm.create_model(f"local-dir:{saved}", pretrained=True), tmp_path, remote_code=True)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"")
    loaders = answered(capsys, "info", str(tmp_path))["loaders"]
    assert loaders["remote_code"]
    assert loaders["onnx"] == ["onnx/model.onnx"]


# Analyze and prune.


def test_analyze_chooses_and_writes(saved, tmp_path, capsys, times_measured_once):
    out = str(tmp_path / "branches.json")
    plot = str(tmp_path / "branches.png")
    found = answered(capsys, "analyze", saved, *FEW, "--keep", "4", "--output", out, "--plot", plot)
    report = timm_eps.Analysis.load(out)
    assert [branch["slot"] for branch in found["report"]["branches"]] == [each.slot for each in report.branches]
    assert found["report"]["images"] == 16
    assert found["is_trained"]
    assert len(found["choice"]["slots"]) == 3
    assert set(found["choice"]["slots"]) <= set(SLOTS) - set(REMOVED)
    assert Path(plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_analyze_of_an_architecture_warns_of_its_new_classifier(capsys, times_measured_once):
    text = printed(capsys, "analyze", "test_resnet", "--image_size", "32", "--target_macs", "0.9", *FEW)
    assert "The classifier is new" in text
    assert "eps_test_resnet: 16 images of 3x32x32" in text
    command = shlex.split(text.strip().splitlines()[-1])
    assert command[:3] == ["timm-eps", "prune", "test_resnet"]


@pytest.mark.slow
def test_analyze_takes_a_stock_model_of_timm(twin, tmp_path, capsys, times_measured_once):
    plain = str(tmp_path / "plain")
    answered(capsys, "export", twin, "--format", "timm", "--output", plain)
    found = answered(capsys, "analyze", plain, *FEW)
    assert found["is_trained"]
    slots = list(timm_eps.gates(timm.create_model("eps_test_resnet")))
    assert [branch["slot"] for branch in found["report"]["branches"]] == slots


def test_pruned_by_slots_equals_pruned_in_python(saved, tmp_path, capsys, images, times_measured_once):
    out = str(tmp_path / "out")
    found = answered(capsys, "prune", saved, "--slots", SLOTS[7], SLOTS[2], "--output_dir", out)
    net = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    assert found["removed"] == timm_eps.prune(net, [SLOTS[2], SLOTS[7]])
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert torch.equal(loaded(images), net(images))
    assert found["parameters"]["after"] == size_of(net, (3, 8, 8)).parameters
    assert found["branches"] == {"before": 7, "after": 5}


@pytest.mark.slow
def test_prune_then_train_with_the_printed_command(saved, tmp_path, capsys, monkeypatch, times_measured_once):
    monkeypatch.chdir(tmp_path)
    text = printed(capsys, "prune", saved, "--target_macs", "0.5", *FEW, "--output_dir", "out")
    assert "not fine-tuned" in text
    assert timm_eps.Analysis.load("out/branches.json").images == 16
    command = shlex.split(text.strip().splitlines()[-1])
    assert command[:2] == ["timm-eps", "train"]
    short = ["--num_train_epochs", "1", "--max_train_samples", "64", "--max_eval_samples", "64", "--num_threads", "1"]
    printed(capsys, *command[1:], *short)
    tuned, out = (answered(capsys, "info", name) for name in ("out-tuned", "out"))
    assert tuned["removed"] == out["removed"] != []
    assert 0 <= tuned["results"]["eval_accuracy"] <= 1
    assert out["multiply_adds"]["now"] <= 0.5 * size_of(timm.create_model("eps_resnet20"), (3, 8, 8)).macs


@pytest.mark.parametrize(("criterion", "gone"), [("last", SLOTS[-2:]), ("stage_ends", [SLOTS[2], SLOTS[-1]])])
def test_orders_of_the_structure_read_no_images(
    saved, tmp_path, capsys, monkeypatch, times_measured_once, criterion, gone
):
    monkeypatch.setattr("timm_eps.training.inputs.ImageData.load", pytest.fail)
    out = str(tmp_path / "out")
    found = answered(capsys, "prune", saved, "--keep", "5", "--criterion", criterion, "--output_dir", out)
    assert found["removed"] == gone


# Export and push.


@pytest.mark.slow
def test_exported_onnx_computes_the_same(saved, tmp_path, capsys, images):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = str(tmp_path / "model.onnx")
    found = answered(capsys, "export", saved, "--format", "onnx", "--output", path)
    assert found["bytes"] == Path(path).stat().st_size
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"pixel_values": images.numpy()})
    live = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()(images)
    torch.testing.assert_close(torch.from_numpy(logits), live.detach(), rtol=0, atol=1e-4)


def test_exported_to_stock_timm(twin, tmp_path, capsys):
    out = tmp_path / "plain"
    found = answered(capsys, "export", twin, "--format", "timm", "--output", str(out))
    assert found["architecture"] == json.loads((out / "config.json").read_text())["architecture"] == "test_resnet"


def test_push_carries_results_and_loads(saved, hub, capsys, images):
    found = answered(capsys, "push", saved, "me/by-cli", "--private", "--commit_message", "From a shell")
    assert found["repo_url"].endswith("me/by-cli")
    assert hub.commits("me/by-cli")[-1] == "From a shell"
    assert hub.is_private("me/by-cli")
    pushed = hub.files("me/by-cli")
    assert json.loads(pushed["all_results.json"]) == RESULTS
    assert "50.00 %" in pushed["README.md"].decode()
    assert json.loads(pushed["config.json"])["label_names"] == [str(digit) for digit in range(10)]
    assert pushed["model.safetensors"] == (Path(saved) / "model.safetensors").read_bytes()
    local, online = answered(capsys, "info", saved), answered(capsys, "info", "me/by-cli")
    for key in ("architecture", "removed", "parameters", "multiply_adds", "results"):
        assert online[key] == local[key]
    assert online["files"]["model.safetensors"] == local["files"]["model.safetensors"]


# Errors.

HOSTILE = {
    "is refused": {"architecture": "eps_test_resnet", "model_args": {"pretrained_cfg": {"url": "http://x"}}},
    "is not an argument of a CIFAR network": {"architecture": "eps_resnet20", "model_args": {"device": "cuda"}},
    "a whole number|whole numbers": {"architecture": "eps_resnet20", "model_args": {"layers": [10**9, 1, 1]}},
    "is not a gated slot": {
        "architecture": "eps_resnet20", "num_classes": 10, "model_args": {"removed": ["stages.9.drop_path"]},
    },
    "is unknown": {"architecture": "eps_nothing"},
    "must be an object": ["no object"],
}  # fmt: skip


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_configurations_are_refused_in_one_line(message, saved, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(HOSTILE[message]))
    (tmp_path / "model.safetensors").write_bytes((Path(saved) / "model.safetensors").read_bytes())
    line = refused(capsys, "info", str(tmp_path))
    assert line.startswith("timm-eps info: error: ")
    assert re.search(message, line)


def test_broken_directories_are_told_in_one_line(saved, tmp_path, capsys):
    assert "is not a directory and not an id on the Hub" in refused(capsys, "info", "nowhere")
    assert "no config.json" in refused(capsys, "info", str(tmp_path))
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json is not JSON" in refused(capsys, "info", str(tmp_path))
    (tmp_path / "config.json").write_bytes((Path(saved) / "config.json").read_bytes())
    assert "has no model.safetensors" in refused(capsys, "info", str(tmp_path))
    weights = (Path(saved) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cannot be read" in refused(capsys, "info", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "all_results.json").write_text("[]")
    assert "must hold an object" in refused(capsys, "push", str(tmp_path), "me/other")


def test_wrong_words_and_missing_models(saved, tmp_path, capsys, hub):
    assert "invalid choice: 'nonsense'" in refused(capsys, "nonsense", code=2)
    assert "required" in refused(capsys, "prune", saved, "--output_dir", "x", code=2)
    assert "not allowed with" in refused(capsys, "analyze", saved, "--keep", "1", "--target_macs", "1", code=2)
    two = ["--slots", SLOTS[0], "--criterion", "last", "--output_dir", str(tmp_path)]
    assert "--criterion needs" in refused(capsys, "prune", saved, *two, code=2)
    onnx = ["--format", "onnx", "--output", "x", "--zero_branches"]
    assert "timm-eps export: error: --zero_branches" in refused(capsys, "export", saved, *onnx, code=2)
    assert "or an architecture of timm" in refused(capsys, "analyze", "resnet999")
    assert "needs an architecture" in refused(capsys, "analyze", saved, "--pretrained")
    out = ["--output_dir", str(tmp_path / "out")]
    assert f"did you mean '{SLOTS[0]}'" in refused(capsys, "prune", saved, "--slots", SLOTS[0] + "x", *out)
    assert "take another one" in refused(capsys, "prune", saved, "--slots", SLOTS[0], "--output_dir", saved)
    assert "timm-eps info: error: " in refused(capsys, "info", "me/not-there")
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(saved, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    line = refused(capsys, "analyze", saved)
    assert line == "timm-eps analyze: error: sklearn is not installed: pip install 'timm-eps[train]'."


def test_mistakes_in_the_code_show_their_traceback_on_request(saved, capsys, monkeypatch):
    def fail(*_):
        raise KeyError("a mistake")

    monkeypatch.setitem(export.FORMATS, "onnx", export.Format("", fail))
    words = ["export", saved, "--format", "onnx", "--output", "x"]
    assert "error: KeyError: 'a mistake'. --traceback shows where." in refused(capsys, *words)
    for asked in (["--traceback", *words], [*words, "--traceback"]):
        with pytest.raises(KeyError, match="a mistake"):
            main(asked)
    monkeypatch.setenv("TIMM_EPS_TRACEBACK", "1")
    with pytest.raises(KeyError, match="a mistake"):
        main(words)


def test_control_c_ends_with_130(saved, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(export.FORMATS, "onnx", export.Format("", interrupt))
    assert "SIGINT" in refused(capsys, "export", saved, "--format", "onnx", "--output", "x", code=130)


def test_what_libraries_print_stays_off_the_answer(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(export.FORMATS, "onnx", export.Format("", lambda *_: print("chatter") or {}))
    output = tmp_path / "x"
    output.write_text("")
    assert answered(capsys, "export", saved, "--format", "onnx", "--output", str(output))["bytes"] == 0


# The command itself.


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_installed_command_runs(how, saved, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_ENDPOINT")}

    def run(*words: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, **options)

    install = [str(python), "-m", "pip", "install", "--no-deps", "--quiet"]
    done = run(*install, *(["-e"] if how == "editable" else []), str(ROOT))
    if done.returncode and re.search("Could not find a version|Connection|No matching distribution", done.stderr):
        pytest.skip("hatchling, which builds the wheel, cannot be fetched")
    assert done.returncode == 0, done.stderr
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))  # torch, timm and the like
    command = str(tmp_path / "venv" / "bin" / "timm-eps")
    assert run(command, "--version", check=True).stdout == f"timm-eps {timm_eps.__version__}\n"
    assert json.loads(run(command, "info", saved, "--json", check=True).stdout)["removed"] == REMOVED
    where = "import train_hf, timm_eps; print(train_hf.__file__, timm_eps.__file__)"
    for path in run(str(python), "-c", where, check=True).stdout.split():
        assert Path(path).is_relative_to(ROOT if how == "editable" else packages)
    assert "--steps_per_epoch" in run(command, "train", "--help", check=True).stdout
    assert run(str(python), "-m", "timm_eps.cli", "info", "nowhere").returncode == 1

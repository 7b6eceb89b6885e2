"""A model's life on the Hub: pushed, loaded by every loader, fine-tuned, replaced; and faults on the way.

The Hub is the one in loopback_hub.py. The clients huggingface_hub, timm, transformers and datasets run unchanged.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from conftest import close, mostly_slow, tiny_net
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import _http
from PIL import Image
from test_hub import RESULTS
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)

import timm_eps
import train_hf
from timm_eps.files import standalone
from timm_eps.hub import onnx_export
from timm_eps.hub import saving as hub_module
from timm_eps.surgery.branches import probe_batch

pytestmark = pytest.mark.usefixtures("nothing_drawn")

ROOT = Path(__file__).parent.parent

ALWAYS = {".gitattributes", "README.md", "blocks.png", "config.json", "model.safetensors"}
REMOTE_CODE = {
    "modeling_eps_resnet.py", "config_checks.py", "strict_loading.py", "value_checks.py", "weight_checks.py",
}  # fmt: skip
SHORT = ["--max_train_samples", "200", "--epsilon_warmup_epochs", "1", "--ramp_epochs", "2", "--patience", "1"]
SHORT += ["--num_train_epochs", "4", "--num_threads", "1"]
SHAPES = ["bar", "column", "diagonal"]


def pruned(**kwargs) -> torch.nn.Module:
    """A tiny network with 4 of 9 blocks in evaluation."""
    net = tiny_net(**kwargs)
    close(net)
    return net


def twin(name: str) -> torch.nn.Module:
    """A twin of a timm architecture with some branches removed and others closed."""
    net = timm.create_model(name, num_classes=5)
    with torch.no_grad():
        net.train()(probe_batch(net))
    close(net)
    return net.eval()


def requests_of(hub, begin: str) -> list[str]:
    return [request for request in hub.requests if request.startswith(begin)]


def stored_config(hub, repo_id: str, revision: str = "main") -> dict:
    return json.loads(hub.files(repo_id, revision)["config.json"])


def state_of(hub) -> dict:
    """The visible state of the Hub."""
    return {key: {**repo.refs["branch"]} for key, repo in hub.repos.items()}


@torch.no_grad()
def check(repo_id: str, net: torch.nn.Module, images: torch.Tensor, revision: str | None = None) -> None:
    """timm and transformers load a model with the live model's logits, bit for bit."""
    by_timm = timm.create_model(f"hf-hub:{repo_id}" + (f"@{revision}" if revision else ""), pretrained=True).eval()
    assert torch.equal(by_timm(images), net(images))
    by_auto = AutoModelForImageClassification.from_pretrained(repo_id, revision=revision or "main")
    assert torch.equal(by_auto(images).logits, net(images))


@torch.no_grad()
def check_every_loader(repo_id: str, net: torch.nn.Module, images: torch.Tensor) -> None:
    """All other loaders in the card and the documentation agree, as far as each applies."""
    check(repo_id, net, images)
    features, stages = net.forward_intermediates(images)
    pooled = net.forward_head(features, pre_logits=True)
    assert torch.equal(AutoModel.from_pretrained(repo_id)(images).pooler_output, pooled)
    assert torch.equal(AutoBackbone.from_pretrained(repo_id)(images).feature_maps[-1], stages[-1])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    classify = pipeline(model=repo_id, device="cpu")
    labels = classify.model.config.id2label.values()
    answers = {one["label"]: one["score"] for one in classify(picture, top_k=len(labels), function_to_apply="none")}
    single = net(AutoImageProcessor.from_pretrained(repo_id)(picture).pixel_values)[0]
    assert [answers[label] for label in labels] == single.tolist()


# 1. The whole life.

WITH_TIMM_EPS = """
import sys, numpy, timm, timm_eps, torch
from PIL import Image
from transformers import (
    AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForImageClassification, logging, pipeline
)
case = torch.load(sys.argv[1])
images = case["images"]
with torch.no_grad():
    assert torch.equal(timm.create_model("hf-hub:me/first", pretrained=True).eval()(images), case["logits"])
    model = AutoModelForImageClassification.from_pretrained("me/first")
    assert type(model).__module__ == "timm_eps.hf.modeling_eps_resnet"
    assert torch.equal(model(images).logits, case["logits"])
    assert torch.equal(AutoModel.from_pretrained("me/first")(images).pooler_output, case["pooled"])
    assert torch.equal(AutoBackbone.from_pretrained("me/first")(images).feature_maps[0], case["stage"])
    picture = Image.fromarray(case["picture"].numpy())
    classify = pipeline(model="me/first", device="cpu")
    assert classify.task == "image-classification"
    pixel_values = AutoImageProcessor.from_pretrained("me/first")(picture).pixel_values
    answers = {one["label"]: one["score"] for one in classify(picture, top_k=10, function_to_apply="none")}
    assert [answers[str(digit)] for digit in range(10)] == model(pixel_values).logits[0].tolist()
print("the same everywhere")
"""
WITHOUT_TIMM_EPS = """
import sys, onnxruntime, torch
from huggingface_hub import hf_hub_download
from transformers import AutoBackbone, AutoModelForImageClassification
case = torch.load(sys.argv[1])
images = case["images"]
with torch.no_grad():
    model = AutoModelForImageClassification.from_pretrained("me/first", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert torch.equal(model(images).logits, case["logits"])
    backbone = AutoBackbone.from_pretrained("me/first", trust_remote_code=True)
    assert torch.equal(backbone(images).feature_maps[0], case["stage"])
session = onnxruntime.InferenceSession(hf_hub_download("me/first", "onnx/model.onnx"))
logits, = session.run(["logits"], {"pixel_values": images.numpy()})
torch.testing.assert_close(torch.from_numpy(logits), case["logits"], rtol=0, atol=1e-5)
assert "timm_eps" not in sys.modules
print("the same everywhere")
"""


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Run Python in a new process. Returns its output."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def draw_shapes(count: int) -> datasets.Dataset:
    """Noisy 8x8 pictures of SHAPES."""
    rng = np.random.default_rng(count)
    pictures, labels = [], [index % len(SHAPES) for index in range(count)]
    for label in labels:
        pixels = rng.integers(0, 60, (8, 8, 3), dtype=np.uint8)
        lit, shift = np.arange(8), rng.integers(2, 6)
        pixels[[(shift, lit), (lit, shift), (lit, lit)][label]] = 255
        pictures.append(Image.fromarray(pixels))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=SHAPES)})
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features)


@torch.no_grad()
def store_case(directory: Path, path: Path) -> None:
    """Store the outputs of a trained network, for processes that load it from elsewhere."""
    net, images = timm.create_model(f"local-dir:{directory}", pretrained=True).eval(), torch.randn(4, 3, 8, 8)
    features, stages = net.forward_intermediates(images)
    picture = torch.randint(256, (9, 9, 3), dtype=torch.uint8)
    case = {"images": images, "logits": net(images), "stage": stages[-1], "picture": picture}
    torch.save({**case, "pooled": net.forward_head(features, pre_logits=True)}, path)


@pytest.mark.slow
def test_trained_pushed_loaded_and_tuned_on_other_labels(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = ["--architecture", "eps_resnet20", "--keep", "5", *SHORT]
    first += ["--output_dir", "first", "--push_to_hub", "--hub_model_id", "me/first"]
    train_hf.main([*first, "--with_remote_code", "--with_onnx"])
    said = capsys.readouterr().out
    assert "| latency at batch 1, ONNX Runtime on CPUs |" in said
    assert f"Pushed to {hub.endpoint}/me/first" in said
    assert hub.commits("me/first") == ["initial commit", "Trained on scikit-learn digits, 5 blocks remain"]
    local = {p.relative_to(tmp_path / "first").as_posix() for p in (tmp_path / "first").rglob("*") if p.is_file()}
    pushed = hub.files("me/first")
    assert pushed.keys() == local | {".gitattributes"}
    assert local == ALWAYS - {".gitattributes"} | {"all_results.json", "onnx/model.onnx", *REMOTE_CODE}
    for name in local - {"onnx/model.onnx"}:  # the ONNX file is exported twice
        assert pushed[name] == (tmp_path / "first" / name).read_bytes()

    store_case(tmp_path / "first", tmp_path / "case.pt")
    assert python("-c", WITH_TIMM_EPS, str(tmp_path / "case.pt"), cwd=tmp_path) == "the same everywhere\n"
    alone = {"PYTHONPATH": "", "HF_HOME": str(tmp_path / "home")}
    assert python("-c", WITHOUT_TIMM_EPS, str(tmp_path / "case.pt"), cwd=tmp_path, **alone) == "the same everywhere\n"

    for split, count in {"train": 60, "test": 30}.items():
        draw_shapes(count).to_parquet(tmp_path / "shapes" / f"{split}.parquet")
    HfApi().create_repo("me/shapes", repo_type="dataset")
    HfApi().upload_folder(folder_path=tmp_path / "shapes", repo_id="me/shapes", repo_type="dataset")
    second = ["--model_name_or_path", "me/first", "--dataset_name", "me/shapes", "--keep", "3", *SHORT]
    second += ["--ignore_mismatched_sizes", "--learning_rate", "0.02", "--license", "mit", "--output_dir", "second"]
    train_hf.main([*second, "--push_to_hub", "--hub_model_id", "me/second", "--hub_token", hub.token])
    assert hub.commits("me/second") == ["initial commit", "Trained on me/shapes, 3 blocks remain"]
    assert hub.files("me/second").keys() == ALWAYS | {"all_results.json"}
    check_tuned(hub)
    for key, repo in hub.repos.items():
        for commit in (commit for named in repo.refs.values() for tip in named.values() for commit in tip.history()):
            assert not [path for path, blob in commit.files.items() if hub.token.encode() in blob.content], key


def check_tuned(hub) -> None:
    """The card of me/second names itself, me/first and me/shapes."""
    results = json.loads(hub.files("me/second")["all_results.json"])
    before = json.loads(hub.files("me/first")["all_results.json"])
    assert set(before["removed"]) < set(results["removed"])
    assert (before["blocks_kept"], results["blocks_kept"]) == (5, 3)
    assert results["params"] < before["params"]
    data = ModelCard(hub.files("me/second")["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation, data.datasets) == ("me/first", "finetune", ["me/shapes"])
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "timm", "image-classification")
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", results["eval_accuracy"])
    assert (result.dataset_type, result.dataset_split, data.model_name) == ("me/shapes", "test", "second")
    config = stored_config(hub, "me/second")
    assert (config["num_classes"], config["label_names"]) == (3, SHAPES)
    assert config["model_args"]["removed"] == results["removed"]
    assert "auto_map" not in config
    model = AutoModelForImageClassification.from_pretrained("me/second")
    assert model.config.id2label == dict(enumerate(SHAPES))
    picture = draw_shapes(3)[2]["image"]
    assert {one["label"] for one in pipeline(model="me/second", device="cpu")(picture)} == set(SHAPES)


# 2. Pushed from Python.


def test_a_second_push_replaces_the_first(hub, images, monkeypatch):
    monkeypatch.setattr(hub_module, "export_onnx", lambda body, path: (path.parent.mkdir(), path.write_bytes(b"onnx")))
    first, second = pruned(num_classes=5), tiny_net(num_classes=4)
    done = timm_eps.push_to_hub(first, "me/twice", results=RESULTS, remote_code=True, onnx=True, commit_message="one")
    extra = {"all_results.json", "onnx/model.onnx", *REMOTE_CODE}
    assert hub.files("me/twice").keys() == ALWAYS | extra
    assert done.oid == hub.repos["models", "me/twice"].refs["branch"]["main"].oid
    check("me/twice", first, images)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="me/twice", commit_message="notes")
    timm_eps.push_to_hub(second, "me/twice", label_names=list("abcd"))
    assert hub.commits("me/twice") == ["initial commit", "one", "notes", "Upload model"]
    assert hub.files("me/twice").keys() == ALWAYS | {"notes.txt"}, "what others put there stays"
    assert "auto_map" not in stored_config(hub, "me/twice")
    assert "onnx" not in hub.files("me/twice")["README.md"].decode()
    check_every_loader("me/twice", second, images)
    timm_eps.push_to_hub(second, "me/twice", label_names=list("abcd"))
    assert len(hub.commits("me/twice")) == 4, "nothing has changed"


def test_private(hub, images):
    net = pruned()
    timm_eps.push_to_hub(net, "me/secret", private=True)
    timm_eps.push_to_hub(net, "me/secret", commit_message="again", results=RESULTS)
    assert hub.is_private("me/secret")
    for load in (AutoModel, AutoModelForImageClassification, AutoBackbone, AutoImageProcessor):
        with pytest.raises(OSError, match="me/secret is not a local folder and is not a valid model identifier"):
            load.from_pretrained("me/secret", token=False)
    check("me/secret", net, images)
    timm_eps.push_to_hub(net, "me/open")
    assert not hub.is_private("me/open")


def test_a_branch_leaves_main_alone(hub, images):
    first, second = tiny_net(), pruned()
    timm_eps.push_to_hub(first, "me/branches")
    timm_eps.push_to_hub(second, "me/branches", revision="fewer", commit_message="fewer blocks")
    timm_eps.push_to_hub(second, "me/branches", revision="fewer", results=RESULTS)
    assert hub.commits("me/branches") == ["initial commit", "Upload model"]
    branches = hub.repos["models", "me/branches"].refs["branch"]
    titles = [commit.title for commit in branches["fewer"].history()]
    assert titles == ["Upload model", "fewer blocks", "Upload model", "initial commit"]
    check("me/branches", second, images, revision="fewer")
    check("me/branches", first, images)


def test_a_branch_of_a_new_repository(hub, images):
    net = pruned()
    timm_eps.push_to_hub(net, "me/only-branch", revision="draft")
    assert hub.files("me/only-branch").keys() == {".gitattributes"}
    check("me/only-branch", net, images, revision="draft")


def test_a_tag_keeps_the_model_that_it_was_set_on(hub, images):
    first, second = pruned(), tiny_net()
    oid = timm_eps.push_to_hub(first, "me/tagged").oid
    HfApi().create_tag("me/tagged", tag="v1")
    timm_eps.push_to_hub(second, "me/tagged")
    check("me/tagged", first, images, revision="v1")
    check("me/tagged", first, images, revision=oid)
    check("me/tagged", second, images)


def test_a_name_without_an_owner_is_ones_own(hub, images):
    net = pruned()
    assert timm_eps.push_to_hub(net, "ownerless").repo_url.repo_id == "me/ownerless"
    assert (
        'timm.create_model("hf-hub:me/ownerless", pretrained=True)' in hub.files("me/ownerless")["README.md"].decode()
    )
    check("me/ownerless", net, images)


@pytest.mark.parametrize("name", mostly_slow(["eps_test_resnet", "eps_test_vit"], 0))
def test_twins_load_by_every_loader(hub, name):
    net = twin(name)
    timm_eps.push_to_hub(net, f"me/{name}", label_names=list("abcde"))
    config = stored_config(hub, f"me/{name}")
    assert config["architecture"] == name
    assert config["model_args"]["removed"]
    check_every_loader(f"me/{name}", net, probe_batch(net))


def test_a_server_that_fails_in_mid_upload(hub, images):
    first, second = tiny_net(num_classes=6), pruned(num_classes=7)  # sizes that no other test has stored
    timm_eps.push_to_hub(first, "me/unlucky")
    before = state_of(hub)
    for fail_on, error, message in (
        ("PUT /lfs/", RuntimeError, "Error while uploading '.*' to the Hub"),  # huggingface_hub's, for a large file
        ("/commit/main", HfHubHTTPError, "507 Insufficient Storage"),
    ):
        hub.fail_on = fail_on
        with pytest.raises(error, match=message):
            timm_eps.push_to_hub(second, "me/unlucky")
        hub.fail_on = None
        assert state_of(hub) == before
    check("me/unlucky", first, images)
    hub.requests.clear()
    timm_eps.push_to_hub(second, "me/unlucky", commit_message="at last")
    assert requests_of(hub, "PUT /lfs/") == [], "the weights had arrived before the commit failed"
    assert hub.commits("me/unlucky") == ["initial commit", "Upload model", "at last"]
    check("me/unlucky", second, images)


def test_the_given_token_is_the_one_that_is_sent(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")  # this Hub answers every request with 401
    for repo_id in ("me/by-token", "by-token-too"):
        timm_eps.push_to_hub(pruned(), repo_id, token=hub.token, revision="draft", private=True)
    assert hub.files("me/by-token", "draft").keys() == hub.files("me/by-token-too", "draft").keys() == ALWAYS


@pytest.mark.parametrize("repo_id", ["me/refused", "refused"])
def test_a_wrong_token_creates_nothing(hub, repo_id):
    before = state_of(hub)
    with pytest.raises(HfHubHTTPError, match=r"Invalid (credentials in Authorization header|user token)") as refused:
        timm_eps.push_to_hub(pruned(), repo_id, token="hf_wrong")
    assert refused.value.response.status_code == 401
    assert state_of(hub) == before


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: timm.create_model("test_resnet"), {}, r"has no gates; call timm_eps\.add_gates\(model\) first"),
        (lambda: timm_eps.models.eps_resnet.EpsResNet([1, 1, 1]), {}, "cannot be rebuilt from a name"),
        (lambda: torch.compile(tiny_net()), {}, "Got a compiled model"),
        (tiny_net, {"label_names": ["a"]}, "label_names must have one name for each of the 10 classes, got 1"),
        (tiny_net, {"results": {"eval_accuracy": 0.9}}, "results lacks architecture, arguments"),
        (lambda: tiny_net(global_pool="max"), {"remote_code": True}, "which this file cannot build; timm_eps can"),
    ],
)
def test_a_bad_model_creates_nothing(hub, model, arguments, message):
    before = state_of(hub)
    hub.requests.clear()
    with pytest.raises(ValueError, match=message):
        timm_eps.push_to_hub(model(), "me/bad", **arguments)
    assert state_of(hub) == before
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["me/a/b", "me/a b", "", "me/"])
def test_names_that_no_repository_can_have(hub, repo_id):
    before = state_of(hub)
    with pytest.raises(HFValidationError, match="Repo id must"):
        timm_eps.push_to_hub(tiny_net(), repo_id)
    assert state_of(hub) == before


# 3. Pushed by transformers.


def test_transformers_own_push(hub, images):
    net = pruned(num_classes=3)
    model = timm_eps.EpsResNetForImageClassification.from_timm(net, id2label=dict(enumerate("xyz"))).eval()
    model.push_to_hub("me/by-transformers")
    assert hub.commits("me/by-transformers") == ["initial commit", "Upload EpsResNetForImageClassification"]
    with torch.no_grad():
        again = AutoModelForImageClassification.from_pretrained("me/by-transformers")
        assert torch.equal(again(images).logits, net(images))
        by_timm = timm.create_model("hf-hub:me/by-transformers", pretrained=True).eval()
        assert torch.equal(by_timm(images), net(images))
    assert again.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert len(by_timm.removed) == 5
    again.push_to_hub("me/by-transformers", commit_message="unchanged")
    assert len(hub.commits("me/by-transformers")) == 2, "what was loaded is saved as the same bytes"


# 4. Errors.

LOADERS = {
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoImageProcessor": AutoImageProcessor.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForImageClassification": AutoModelForImageClassification.from_pretrained,
    "pipeline": lambda model, **kwargs: pipeline(model=model, **kwargs),
}


@pytest.fixture
def net_on_hub(hub):
    if ("models", "me/net") not in hub.repos:
        timm_eps.push_to_hub(pruned(num_classes=5), "me/net", private=True)
    return hub


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_transformers_says_what_is_not_there(net_on_hub, load):
    with pytest.raises(OSError, match="me/none is not a local folder and is not a valid model identifier"):
        load("me/none")
    with pytest.raises(OSError, match="nope is not a valid git identifier"):
        load("me/net", revision="nope")
    with pytest.raises(OSError, match="401 Unauthorized"):
        load("me/net", token="hf_wrong")


def test_timm_says_what_is_not_there(net_on_hub, monkeypatch):
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        timm.create_model("hf-hub:me/none", pretrained=True)
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        timm.create_model("hf-hub:me/net@nope", pretrained=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="401 Unauthorized"):
        timm.create_model("hf-hub:me/net", pretrained=True)


OFFLINE = """
import timm, timm_eps
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoModelForImageClassification
net = timm.create_model("eps_resnet20")
for name, action, error, text in (
    ("transformers", lambda: AutoModelForImageClassification.from_pretrained("me/net"), OSError, "offline"),
    ("timm", lambda: timm.create_model("hf-hub:me/net", pretrained=True), LocalEntryNotFoundError, "connection"),
    ("push", lambda: timm_eps.push_to_hub(net, "me/net"), OfflineModeIsEnabled, "offline mode is enabled"),
):
    try:
        action()
    except error as raised:
        print(name, text in str(raised), str(raised))
"""


def test_offline_with_an_empty_cache(net_on_hub, tmp_path):
    net_on_hub.requests.clear()
    said = python("-c", OFFLINE, cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    for name in ("transformers", "timm", "push"):
        assert f"{name} True" in said, said
    assert net_on_hub.requests == []


def push_changed(hub, repo_id: str, **fields) -> None:
    """Push me/net with another configuration."""
    files = {**hub.files("me/net"), "config.json": json.dumps({**stored_config(hub, "me/net"), **fields}).encode()}
    operations = [CommitOperationAdd(name, files[name]) for name in ("config.json", "model.safetensors")]
    HfApi().create_repo(repo_id)
    HfApi().create_commit(repo_id, operations, commit_message="changed")


@pytest.mark.parametrize("load", [AutoModel, AutoModelForImageClassification, AutoBackbone])
def test_a_pruned_architecture_without_gates(net_on_hub, load):
    repo_id = f"me/resnet18-{load.__name__}"
    push_changed(net_on_hub, repo_id, architecture="resnet18")
    with pytest.raises(ValueError, match="resnet18"):
        load.from_pretrained(repo_id)


def test_an_unpruned_architecture_without_gates(hub):
    timm_eps.push_to_hub(timm.create_model("eps_test_resnet", num_classes=5), "me/stock")
    config = json.dumps({**stored_config(hub, "me/stock"), "architecture": "test_resnet"}).encode()
    HfApi().upload_file(path_or_fileobj=config, path_in_repo="config.json", repo_id="me/stock")
    with pytest.raises(ValueError, match="test_resnet"):
        AutoModelForImageClassification.from_pretrained("me/stock")


def test_an_architecture_without_gates_in_timm(net_on_hub):
    """timm builds its own class, which does not accept this package's arguments."""
    push_changed(net_on_hub, "me/resnet18", architecture="resnet18")
    with pytest.raises(TypeError, match="unexpected keyword argument 'removed'"):
        timm.create_model("hf-hub:me/resnet18", pretrained=True)


def test_an_unknown_architecture(net_on_hub):
    push_changed(net_on_hub, "me/unknown", architecture="eps_nonsense")
    for load in (AutoModel, AutoModelForImageClassification, AutoBackbone):
        with pytest.raises(ValueError, match="architecture 'eps_nonsense' is unknown"):
            load.from_pretrained("me/unknown")
    with pytest.raises(RuntimeError, match=r"Unknown model \(eps_nonsense\)"):
        timm.create_model("hf-hub:me/unknown", pretrained=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "'stages.9.blocks.0.drop_path' is not a gated slot of this EpsResNet"),
        ("more", "also holds 'stages.2.blocks.1"),
        ("fewer", "lacks 'stages.0.blocks.0"),
    ],
)
def test_removed_that_does_not_fit(net_on_hub, name, message):
    stored = stored_config(net_on_hub, "me/net")["model_args"]
    removed = stored["removed"]
    changed = {
        "unknown": [*removed, "stages.9.blocks.0.drop_path"],
        "more": [*removed, "stages.2.blocks.1.drop_path"],
        "fewer": removed[1:],
    }[name]
    push_changed(net_on_hub, f"me/removed-{name}", model_args={**stored, "removed": changed})
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(f"me/removed-{name}")
    with pytest.raises(ValueError, match=message):
        timm.create_model(f"hf-hub:me/removed-{name}", pretrained=True)


def test_onnx_without_onnxscript(hub, monkeypatch, tmp_path):
    before = state_of(hub)
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match="ONNX files need onnxscript: pip install onnx onnxscript"):
        timm_eps.push_to_hub(tiny_net(), "me/no-onnxscript", onnx=True)
    assert state_of(hub) == before


@pytest.mark.parametrize(
    "given", [["--hub_model_id", "me/a"], ["--hub_token", "t"], ["--hub_private_repo"], ["--hub_revision", "b"]]
)
def test_flags_of_the_hub_without_a_push(given, capsys):
    with pytest.raises(SystemExit):
        train_hf.parse_arguments(given)
    assert f"error: {given[0]} needs --push_to_hub" in capsys.readouterr().err


def run_script(monkeypatch, *arguments: str) -> str:
    """Run train_hf.py as a program in this process. Returns its error."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        sys, "argv", ["train_hf.py", "--architecture", "eps_resnet20", "--num_threads", "1", *arguments]
    )
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "train_hf.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    return str(ended.value.code)


def push_with_a_wrong_token(monkeypatch, tmp_path) -> str:
    wrong = ["--push_to_hub", "--hub_model_id", "me/wrong-token", "--hub_token", "hf_wrong"]
    return run_script(monkeypatch, *wrong, "--output_dir", str(tmp_path))


def test_a_wrong_token_ends_the_script_before_it_trains(hub, monkeypatch, tmp_path, capsys):
    before = state_of(hub)
    error = push_with_a_wrong_token(monkeypatch, tmp_path)
    assert error.startswith("train_hf.py: error: ")
    assert "Invalid credentials in Authorization header" in error
    assert "hf_wrong" not in error
    assert "Training" not in capsys.readouterr().out
    assert state_of(hub) == before


@pytest.mark.parametrize("fault", ["drop", "hang after", "500", "short after"])
def test_a_lost_connection_ends_the_script_in_one_line(hub, monkeypatch, tmp_path, fault):
    client = type(get_session())
    set_client_factory(lambda: client(timeout=0.2, follow_redirects=True))
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    hub.fault = lambda asked: fault
    try:
        error = run_script(monkeypatch, "--push_to_hub", "--hub_model_id", "me/none", "--output_dir", str(tmp_path))
    finally:
        set_client_factory(_http.default_client_factory)
    assert error.startswith("train_hf.py: error: ")
    assert "\n" not in error
    assert hub.token not in error


def test_a_wrong_token_is_told_in_one_line(hub, monkeypatch, tmp_path):
    assert "\n" not in push_with_a_wrong_token(monkeypatch, tmp_path)


def test_a_push_that_fails_after_the_training_is_told_in_one_line(hub, monkeypatch, tmp_path):
    hub.fail_on = "PUT /lfs/"
    short = ["--num_train_epochs", "1", "--max_train_samples", "40", "--max_eval_samples", "20", "--no_gates"]
    push = ["--push_to_hub", "--hub_model_id", "me/fails-late", "--output_dir", str(tmp_path)]
    error = run_script(monkeypatch, *short, *push)
    assert error.startswith(f"train_hf.py: error: The push of {tmp_path} to me/fails-late failed: ")
    assert "Nothing of the model was published. To try again: hf upload me/fails-late" in error
    assert "\n" not in error
    assert hub.files("me/fails-late").keys() == {".gitattributes"}
    assert (tmp_path / "model.safetensors").exists()


def not_to_be_trained(*args, **kwargs):
    pytest.fail("the training began")


def test_a_missing_onnxscript_is_said_before_the_training(monkeypatch, tmp_path):
    monkeypatch.setattr(train_hf, "train", not_to_be_trained)
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    few = ["--max_train_samples", "40", "--max_eval_samples", "20", "--output_dir", str(tmp_path)]
    with pytest.raises(ImportError, match="ONNX files need onnx and onnxscript"):
        train_hf.main(["--architecture", "eps_resnet20", "--with_onnx", "--num_threads", "1", *few])


# 5. Code beside the weights.


@pytest.mark.parametrize("make", [pruned, tiny_net])
def test_code_beside_the_weights_is_not_used_where_the_package_is(hub, make, images):
    net, repo_id = make(num_classes=5), f"me/code-{make.__name__}"
    timm_eps.push_to_hub(net, repo_id, remote_code=True)
    assert hub.files(repo_id)["modeling_eps_resnet.py"] == Path(standalone.__file__).read_bytes()
    config = stored_config(hub, repo_id)
    assert {entry.split(".")[0] for entry in config["auto_map"].values()} == {"modeling_eps_resnet"}
    assert {entry.split(".")[1] for entry in config["auto_map"].values()} == set(standalone.__all__)
    assert "trust_remote_code=True" in hub.files(repo_id)["README.md"].decode()
    for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        model = AutoModelForImageClassification.from_pretrained(repo_id, **trust)
        assert type(model) is timm_eps.EpsResNetForImageClassification
    check(repo_id, net, images)


def own_save(model, directory):
    model.save_pretrained(directory)


@pytest.mark.parametrize("save", [own_save, timm_eps.save_pretrained])
@pytest.mark.parametrize("place", mostly_slow(["directory", "Hub"], 0))
def test_saved_again_a_model_names_no_code_that_is_not_there(hub, tmp_path, place, save):
    repo_id = f"me/code-{save.__name__}"
    if place == "Hub":
        timm_eps.push_to_hub(pruned(), repo_id, remote_code=True)
    else:
        timm_eps.save_pretrained(pruned(), tmp_path / "first", remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(repo_id if place == "Hub" else tmp_path / "first")
    save(model, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not {"auto_map", "image_processor_type"} & config.keys()


def test_saved_again_with_its_code(tmp_path, images):
    timm_eps.save_pretrained(pruned(), tmp_path / "first", remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "first")
    timm_eps.save_pretrained(model, tmp_path / "again", remote_code=True)
    first, again = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix != ".md"}
        for name in ("first", "again")
    )
    assert first == again


# 6. ONNX.


@pytest.mark.parametrize("make", mostly_slow([pruned, lambda: twin("eps_test_vit")], 0))
def test_onnx_takes_any_batch(hub, make):
    import onnx
    import onnxruntime

    net = make()
    repo_id = f"me/onnx-{net.pretrained_cfg['architecture']}"
    timm_eps.push_to_hub(net, repo_id, onnx=True)
    assert 'InferenceSession("onnx/model.onnx")' in hub.files(repo_id)["README.md"].decode()
    session = onnxruntime.InferenceSession(hub.files(repo_id)["onnx/model.onnx"])
    (entry,), (out,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, out.name) == ("pixel_values", "logits")
    assert isinstance(entry.shape[0], str), "a name, not a number"
    assert entry.shape[1:] == list(probe_batch(net).shape[1:])
    graph = onnx.load_from_string(hub.files(repo_id)["onnx/model.onnx"]).graph
    assert "Pad" not in {node.op_type for node in graph.node}, "ONNX Runtime is slow from there on"
    assert b"site-packages" not in hub.files(repo_id)["onnx/model.onnx"], "paths of this machine are no one's business"
    assert __file__.rpartition("/tests")[0].encode() not in hub.files(repo_id)["onnx/model.onnx"]
    for count in (1, 3):
        images = probe_batch(net, count)
        (logits,) = session.run(None, {"pixel_values": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), net(images), rtol=0, atol=1e-5)

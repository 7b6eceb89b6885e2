"""The loopback Hub seen by the real client. Each test runs in a process that reads HF_ENDPOINT anew."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from loopback_hub import LoopbackHub

PREAMBLE = """
import os
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError,
)

api = HfApi()

def push(files, repo="me/net", **kwargs):
    folder = kwargs.pop("folder", "pushed")
    for name, content in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    return api.upload_folder(folder_path=folder, repo_id=repo, **kwargs)

def read(name, **kwargs):
    with open(hf_hub_download("me/net", name, **kwargs), "rb") as file:
        return file.read()
"""
WEIGHTS = b"\x02\0\0\0\0\0\0\0{}" + bytes(range(64))


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Run code as a user of this Hub, in an empty directory."""

    def run(code: str, **environment: str) -> None:
        process = subprocess.run(
            [sys.executable, "-c", f"{PREAMBLE}\nWEIGHTS = {WEIGHTS!r}\n{textwrap.dedent(code)}"],
            cwd=tmp_path,
            env=hub.environment(tmp_path / "home") | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode == 0, process.stderr

    return run


def test_push_and_pull(hub, client):
    client(
        """
        assert api.whoami()["name"] == "me"
        assert api.create_repo("me/net").repo_id == "me/net"
        assert api.create_repo("net", exist_ok=True).repo_id == "me/net"
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_repo("me/net")
        card = "---\\nlibrary_name: timm\\npipeline_tag: image-classification\\ntags:\\n- a\\n---\\n# ε-Net\\n"
        first = push({"model.safetensors": WEIGHTS, "README.md": card.encode(), "logs/a.txt": b"a"},
                     commit_message="one")
        assert first.commit_message == "one" and first.repo_url.repo_id == "me/net"
        assert push({}).oid == first.oid  # nothing changed: no empty commit
        api.create_tag("me/net", tag="v1")
        api.create_branch("me/net", branch="try/this", revision="v1")
        push({"logs/a.txt": b"b"}, commit_message="two", delete_patterns="*.json")
        push({"extra.json": b"{}"}, folder="more", commit_message="three", revision="try/this")

        revisions = ["v1", "main", "try/this", first.oid]
        assert [read("logs/a.txt", revision=name) for name in revisions] == [b"a", b"b", b"a", b"a"]
        assert read("extra.json", revision="try/this") == b"{}"
        assert read("model.safetensors") == WEIGHTS
        assert sorted(os.listdir(snapshot_download("me/net", revision="try/this"))) == [
            ".gitattributes", "README.md", "extra.json", "logs", "model.safetensors",
        ]
        refs = api.list_repo_refs("me/net")
        assert [ref.name for ref in refs.branches + refs.tags] == ["main", "try/this", "v1"]
        assert [commit.title for commit in api.list_repo_commits("me/net")] == ["two", "one", "initial commit"]

        info = api.model_info("me/net", revision="v1")
        assert info.sha == first.oid and (info.library_name, info.pipeline_tag) == ("timm", "image-classification")
        weights, = api.get_paths_info("me/net", ["model.safetensors", "none"])
        assert weights.lfs.size == weights.size == len(WEIGHTS)
        assert "logs/a.txt" in api.list_repo_files("me/net")
        api.delete_file("extra.json", "me/net", revision="try/this")
        assert not api.file_exists("me/net", "extra.json", revision="try/this")
        """
    )
    assert hub.commits("me/net") == ["initial commit", "one", "two"]
    assert not hub.is_private("me/net")
    assert hub.files("me/net", "v1")["logs/a.txt"] == b"a"
    assert hub.files("me/net")["model.safetensors"] == WEIGHTS
    assert "logs/a.txt" in hub.files("me/net", "try/this")
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1


def test_errors(hub, client):
    client(
        """
        api.create_repo("me/net", private=True)
        push({"a.txt": b"a"})
        missing = [
            (RepositoryNotFoundError, dict(repo_id="me/none", filename="a.txt")),
            (RepositoryNotFoundError, dict(repo_id="gpt2", filename="a.txt")),
            (RepositoryNotFoundError, dict(repo_id="me/net", filename="a.txt", token=False)),
            (RevisionNotFoundError, dict(repo_id="me/net", filename="a.txt", revision="none")),
            (EntryNotFoundError, dict(repo_id="me/net", filename="none.txt")),
        ]
        for error, arguments in missing:
            with pytest.raises(error):
                hf_hub_download(**arguments)
        with pytest.raises(RevisionNotFoundError):
            snapshot_download("me/net", revision="none")
        with pytest.raises(RepositoryNotFoundError):
            api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="me/none")
        with pytest.raises(HfHubHTTPError, match="412"):
            push({"a.txt": b"b"}, parent_commit="0" * 40)
        never_sent = CommitOperationAdd("w.safetensors", WEIGHTS)
        never_sent._upload_mode, never_sent._is_uploaded = "lfs", True
        with pytest.raises(HfHubHTTPError, match="does not exist"):
            api.create_commit("me/net", [never_sent], commit_message="a pointer to nothing")

        api.create_repo("me/open")
        for token, message in {False: "Invalid username or password", "hf_wrong": "Invalid credentials"}.items():
            with pytest.raises(HfHubHTTPError, match=message) as refused:
                push({"a.txt": b"a"}, repo="me/open", token=token)
            assert refused.value.response.status_code == 401
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami(token="hf_wrong")
        assert api.list_repo_files("me/open", token=False) == [".gitattributes"]
        api.delete_repo("me/open")
        assert not api.repo_exists("me/open")

        ModelCard("---\\nlicense: mit\\n---\\n# Net").validate()
        with pytest.raises(ValueError, match="cannot read"):
            api.upload_file(path_or_fileobj=b"---\\nlicense mit\\n---\\n", path_in_repo="README.md", repo_id="me/net")
        """
    )
    assert hub.is_private("me/net")
    assert list(hub.files("me/net")) == [".gitattributes", "a.txt"]


def test_interrupted_upload(hub, client):
    """An interrupted push is invisible, and the next push sends only the missing files."""
    files = "{'a.safetensors': WEIGHTS, 'b.safetensors': WEIGHTS[::-1], 'c.txt': b'c'}"
    client("api.create_repo('me/net')")
    hub.fail_on = "/commit/main"
    client(f"with pytest.raises(HfHubHTTPError, match='507'): push({files})")
    hub.fail_on = "PUT /lfs/"
    client(f"with pytest.raises(RuntimeError, match='d.safetensors'): push({files} | {{'d.safetensors': WEIGHTS * 2}})")
    assert hub.commits("me/net") == ["initial commit"]
    assert list(hub.files("me/net")) == [".gitattributes"]
    hub.fail_on = None
    hub.requests.clear()
    client(f"push({files})")
    assert sorted(hub.files("me/net")) == [".gitattributes", "a.safetensors", "b.safetensors", "c.txt", "d.safetensors"]
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1


def test_dataset(hub, client):
    client(
        """
        import datasets
        table = datasets.Dataset.from_dict({"x": list(range(5)), "label": [0, 1, 0, 1, 0]})
        os.makedirs("pushed/data")
        table.to_parquet("pushed/data/train-00000-of-00001.parquet")
        api.create_repo("me/data", repo_type="dataset", private=True)
        push({"README.md": b"---\\nlicense: mit\\n---\\n"}, repo="me/data", repo_type="dataset")
        assert datasets.load_dataset("me/data", split="train").to_dict() == table.to_dict()
        assert [row["x"] for row in datasets.load_dataset("me/data", split="train", streaming=True)] == list(range(5))
        """
    )
    assert hub.is_private("me/data", "dataset")
    assert hub.commits("me/data", "dataset") == ["initial commit", "Upload folder using huggingface_hub"]

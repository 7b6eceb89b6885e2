"""A push through faults of the Hub and of the connection: no partial publication, and true messages.

A fault hits one request of a push and all its repeats. Some faults also hit all later requests, so that the client
cannot ask the Hub for the outcome.
"""

from __future__ import annotations

import logging
import random
import shutil
import time
import traceback
import types
from pathlib import Path

import pytest
from conftest import tiny_net
from huggingface_hub import HfApi, get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http
from loopback_hub import FAULTS

import timm_eps
from timm_eps.hub import saving as hub_module

pytestmark = pytest.mark.usefixtures("nothing_drawn")

# The requests of a push to a branch of an existing repository, in order.
REQUESTS = (
    "GET /api/whoami-v2", "POST /api/repos/create", "POST /api/models/me/faults/branch/", "GET /api/models/me/faults/",
    "POST /api/validate-yaml", "POST /api/models/me/faults/preupload/", "POST /me/faults.git/info/lfs/objects/batch",
    "PUT /lfs/", "POST /lfs/", "POST /api/models/me/faults/commit/",
)  # fmt: skip
ALL = [(request, fault, scope) for request in REQUESTS for fault in FAULTS for scope in ("it", "and all after")]
HUNDRED = random.Random(0).sample(ALL, 80)
# The commit matters most, so all faults hit it.
HUNDRED += [one for one in ALL if one[0] == REQUESTS[-1] and one not in HUNDRED]
FEW = [
    (REQUESTS[-1], fault, scope)
    for fault in ("500", "500 after", "drop after", "short after", "409")
    for scope in ("it", "and all after")
] + [(REQUESTS[0], "drop", "it"), (REQUESTS[3], "short after", "it"), (REQUESTS[7], "503", "it")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[Path]:
    """Two unpublished models."""
    found = []
    for classes in (8, 9):
        found.append(tmp_path_factory.mktemp("saved") / "model")
        timm_eps.save_pretrained(tiny_net(num_classes=classes), found[-1], repo_id="me/faults")
    return found


@pytest.fixture
def ready(hub, saved, monkeypatch):
    """A Hub with a first model. Yields a function that pushes the second one; clients retry without waiting."""
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    monkeypatch.setattr(hub_module, "save_pretrained", lambda model, path, **_: copy(model, path))
    monkeypatch.setattr(hub_module, "gathered", lambda path, **_: path)
    client = type(get_session())  # the client class of httpx or of its successor
    set_client_factory(lambda: client(timeout=0.2, follow_redirects=True))
    timm_eps.push_to_hub(saved[0], "faults", revision="draft")
    hub.objects = {oid: content for oid, content in hub.objects.items() if content in hub.files("me/faults", "draft")}
    yield lambda: timm_eps.push_to_hub(saved[1], "faults", revision="draft")
    hub.fault = None
    del hub.repos["models", "me/faults"]
    hub.objects.clear()
    set_client_factory(_http.default_client_factory)


def copy(model: Path, path: str) -> None:
    shutil.copytree(model, path, dirs_exist_ok=True)


def fails(request: str, fault: str, scope: str):
    hit = False

    def fault_of(asked: str) -> str | None:
        nonlocal hit
        is_it = asked.startswith(request)
        hit = hit or is_it
        if is_it:
            return fault
        return fault.partition(" ")[0] if hit and scope != "it" else None

    return fault_of


def check(hub, ready, saved, caplog, request: str, fault: str, scope: str) -> str:
    """Push, and compare the Hub with the message."""
    tip = hub.repos["models", "me/faults"].refs["branch"]["draft"]
    hub.fault = fails(request, fault, scope)
    error: Exception | None = None
    with caplog.at_level(logging.INFO):
        try:
            done = ready()
        except Exception as raised:
            error = raised
    hub.fault = None
    files = {name: content for name, content in hub.files("me/faults", "draft").items() if name != ".gitattributes"}
    wanted = {path.name: path.read_bytes() for path in saved[1].iterdir()}
    is_published = hub.repos["models", "me/faults"].refs["branch"]["draft"] is not tip
    assert files == wanted if is_published else tip.files.keys() - {".gitattributes"} == files.keys()
    assert hub.token not in caplog.text
    if error is None:
        assert is_published
        assert done.oid == hub.repos["models", "me/faults"].refs["branch"]["draft"].oid
        assert done.repo_url.repo_id == "me/faults"
        return "published"
    said = str(error)
    assert isinstance(error, HfHubHTTPError | ConnectionError | RuntimeError), repr(error)
    assert "\n" not in said
    assert len(said) < 900
    assert hub.token not in "".join(traceback.format_exception(error))
    if said.endswith(f"check {hub.endpoint}/me/faults/commits/draft."):
        assert "It is unknown whether the model was published" in said
        assert scope != "it"
        return "unknown"
    assert said.endswith("Nothing of the model was published.")
    assert not is_published
    return "not published"


@pytest.mark.parametrize(("request_", "fault", "scope"), FEW)
def test_a_fault(hub, ready, saved, caplog, request_, fault, scope):
    check(hub, ready, saved, caplog, request_, fault, scope)


@pytest.mark.slow
@pytest.mark.parametrize(("request_", "fault", "scope"), HUNDRED)
def test_a_hundred_faults(hub, ready, saved, caplog, request_, fault, scope):
    print("outcome:", check(hub, ready, saved, caplog, request_, fault, scope))


def test_there_are_a_hundred_and_they_are_of_a_push(hub, ready):
    assert len(HUNDRED) >= 100
    hub.requests.clear()
    ready()
    assert all(any(asked.startswith(one) for asked in hub.requests) for one in REQUESTS), hub.requests


@pytest.mark.parametrize(("fault", "outcome"), [("500 after", "published"), ("500", "not published")])
def test_the_hub_is_asked_whether_the_commit_is_there(hub, ready, saved, caplog, fault, outcome):
    assert check(hub, ready, saved, caplog, REQUESTS[-1], fault, "it") == outcome


@pytest.mark.parametrize("fault", ["500 after", "drop after", "drop"])
def test_if_it_cannot_be_asked_nothing_is_claimed(hub, ready, saved, caplog, fault):
    assert check(hub, ready, saved, caplog, REQUESTS[-1], fault, "and all after") == "unknown"


def test_what_others_committed_meanwhile_is_not_taken_for_ours(hub, ready, saved, caplog):
    """The other commit moves the branch, but does not hold these files."""

    def fault_of(asked: str) -> str | None:
        if not asked.startswith(REQUESTS[-1]):
            return None
        hub.fault = None
        others = hub.repos["models", "me/faults"]
        first = others.refs["branch"]["draft"]
        others.refs["branch"]["draft"] = type(first)(
            "theirs", {**first.files, "theirs": first.files["README.md"]}, first
        )
        return "drop"

    hub.fault = fault_of
    with pytest.raises(ConnectionError, match=r"The commit is not on the Hub\. Nothing of the model was published"):
        ready()


def test_another_try_publishes_it(hub, ready, saved):
    hub.fault = fails(REQUESTS[-1], "drop", "it")
    with pytest.raises(ConnectionError):
        ready()
    hub.fault = None
    ready()
    assert hub.files("me/faults", "draft")["model.safetensors"] == (saved[1] / "model.safetensors").read_bytes()
    assert HfApi().file_exists("me/faults", "model.safetensors", revision="draft")

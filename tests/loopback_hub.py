"""A Hugging Face Hub on the loopback interface, for the tests that push and pull.

The clients huggingface_hub, timm, transformers and datasets run unchanged in a process of their own, because they read
``HF_ENDPOINT`` when they are imported. The server keeps everything in memory. Paths, headers, codes and messages equal
the Hub's as far as the client reads them. Pull requests, spaces, gated repos and Xet are left out.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "me"
Json = dict[str, Any]


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool = False

    @cached_property
    def oid(self) -> str:
        """The hash that the client compares with its own file: SHA-256 for an LFS object, git's hash otherwise."""
        hashed = sha256(self.content) if self.lfs else sha1(b"blob %d\0" % self.size + self.content)
        return hashed.hexdigest()

    @property
    def size(self) -> int:
        return len(self.content)


@dataclass(frozen=True)
class Commit:
    title: str
    files: dict[str, Blob]
    parent: Commit | None = None
    description: str = ""
    date: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}")

    @cached_property
    def oid(self) -> str:
        tree = [(path, blob.oid) for path, blob in sorted(self.files.items())]
        return sha1(repr((self.title, self.date, self.parent and self.parent.oid, tree)).encode()).hexdigest()

    def history(self) -> list[Commit]:
        """The commit and its ancestors, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]

    def entries(self) -> dict[str, Json]:
        """Every folder and file by its path, in the form that the client reads."""
        found: dict[str, Json] = {}
        for path, blob in sorted(self.files.items()):
            for folder in map(str, list(PurePosixPath(path).parents)[:-1]):
                found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": self.oid}
            pointer = {"oid": blob.oid, "size": blob.size, "pointerSize": 125 + len(str(blob.size))}
            lfs = {"lfs": pointer} if blob.lfs else {}
            found[path] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **lfs}
        return found


@dataclass
class Repo:
    private: bool
    refs: dict[str, dict[str, Commit]]  # {"branch": {"main": ...}, "tag": {}}

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a commit hash names."""
        named = self.refs["tag"] | self.refs["branch"]
        return {at.oid: at for tip in named.values() for at in tip.history()}.get(revision) or named.get(revision)


class LoopbackHub:
    """The server runs inside the ``with`` block. Its contents can still be read afterwards.

    As on the Hub, a repo begins with an "initial commit" that adds .gitattributes. Every namespace is writable.
    """

    token = "hf_loopback"

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}  # keys are pairs such as ("models", "me/net")
        self.objects: dict[str, bytes] = {}  # the LFS store, shared by all repos
        self.requests: list[str] = []  # "METHOD /path" of each request; tests check that files are not sent again
        # A request whose "METHOD /path" contains this string is refused with 507. An LFS upload is "PUT /lfs/HASH". The
        # status is not 500, because the client retries after 500, and after a closed connection, six times in 23
        # seconds.
        self.fail_on: str | None = None
        # The faults, and the requests that they hit. Each "METHOD /path" is checked; see FAULTS.
        self.fault: Callable[[str], str | None] | None = None
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Connection, self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment for a process that is logged in to this Hub and knows no other. Its caches lie under `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        switches = {f"HF_HUB_DISABLE_{name}": "1" for name in ("PROGRESS_BARS", "TELEMETRY", "XET")}
        login = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": self.token}
        return kept | switches | login | {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        commit = self.repos[f"{repo_type}s", repo_id].find(revision)
        return {path: blob.content for path, blob in commit.files.items()} if commit else {}

    def commits(self, repo_id: str, repo_type: str = "model") -> list[str]:
        """Titles of the commits on main, oldest first."""
        main = self.repos[f"{repo_type}s", repo_id].refs["branch"]["main"]
        return [commit.title for commit in main.history()][::-1]

    def is_private(self, repo_id: str, repo_type: str = "model") -> bool:
        return self.repos[f"{repo_type}s", repo_id].private


# The ways in which a request can fail: an error status before or after the work is done; a closed connection; a reply
# cut short, with or without a content length; no reply until the client gives up.
FAULTS = (
    "401", "403", "404", "409", "429", "500", "503", "500 after", "504 after", "drop", "drop after", "cut after",
    "short after", "hang", "hang after",
)  # fmt: skip


class RefusedError(Exception):
    """A reply with an error status. The client chooses its exception by the status and the code."""

    def __init__(self, status: int, message: str, code: str = "", **details: Any) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, "X-Error-Code": code}
        self.body = {"error": message, **details}


Handler = Callable[["Connection"], Any]
ROUTES: list[tuple[str, re.Pattern[str], bool, Handler]] = []  # the first match answers
# The patterns of a path. A repo may lack its namespace ("gpt2"); such a repo is not found.
PARTS = {"kind": "models|datasets", "repo": "[^/]+(?:/[^/]+)?", "ref": "branch|tag", "revision": "[^/]+", "path": ".+"}


def on(method: str, path: str, write: bool = False) -> Callable[[Handler], Handler]:
    """Make a method answer these requests. Requests that write need the token."""
    pattern = re.compile(re.sub(r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{PARTS[part[1]]})", path))

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, pattern, write, handler))
        return handler

    return register


def front_matter(card: str) -> str:
    found = re.match(r"\s*---\n(.*?)\n---\s*(\n|$)", card, re.S)
    return found[1] if found else ""


def apply(files: dict[str, Blob], objects: dict[str, bytes], key: str, value: Json) -> None:
    """Apply one operation of a commit to the files of its parent."""
    path = value["path"]
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in objects:
            raise RefusedError(400, "An LFS pointer pointed to a file that does not exist")
        files[path] = Blob(objects[value["oid"]], lfs=True)
    else:
        gone = [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]
        if not gone:
            raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]


class Connection(BaseHTTPRequestHandler):
    """A client's connection. Its attributes describe the request that is being answered."""

    protocol_version = "HTTP/1.1"  # the client keeps its connections open
    wbufsize = -1  # one write for header and content: a second one costs 40 ms per reply

    def __init__(self, hub: LoopbackHub, *connection: Any) -> None:
        self.hub = hub
        super().__init__(*connection)  # serves until the client leaves

    def serve(self) -> None:
        """Answer requests one at a time for the whole Hub, so that a commit is atomic."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.status = 200
        self.reply: dict[str, str] = {}
        kind, _, after = ((self.hub.fault and self.hub.fault(f"{self.command} {self.path}")) or "").partition(" ")
        try:
            content: Any = b""
            if not kind or after:
                with self.hub.lock:
                    content = self.answer()
            if kind.isdecimal():
                # A server may echo the request in its reply, and it decides how often the client retries.
                raise RefusedError(int(kind), f"Told to fail on {self.headers.get('Authorization')}\n\nby the test")
        except RefusedError as refusal:
            self.status, content = refusal.status, refusal.body
            # A header has no line breaks.
            self.reply |= {name: " ".join(value.split()) for name, value in refusal.headers.items()}
        if kind in ("drop", "hang"):
            if kind == "hang":
                self.connection.settimeout(10)
                self.connection.recv(1)  # until the client closes the connection
            self.close_connection = True
            return
        encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
        length = len(encoded)
        if kind in ("cut", "short"):
            encoded = encoded[: length // 2]
            length = length if kind == "cut" else len(encoded)
            self.close_connection = True
        self.send_response(self.status)
        for name, value in {**self.reply, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(encoded)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815

    def log_message(self, *args: Any) -> None:
        """Keep the tests' output clean. LoopbackHub.requests lists all requests."""

    def answer(self) -> Any:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {url.path}")
        if self.hub.fail_on and self.hub.fail_on in self.hub.requests[-1]:
            raise RefusedError(507, "The loopback Hub was told to fail here")
        if self.headers.get("Authorization") not in (None, f"Bearer {self.hub.token}"):
            raise RefusedError(401, "Invalid credentials in Authorization header")
        for method, path, write, handler in ROUTES:
            match = path.fullmatch(url.path)
            if match and method == self.command.replace("HEAD", "GET"):
                self.parts = {name: unquote(part) for name, part in match.groupdict().items() if part}
                if write and not self.member:
                    raise RefusedError(401, "Invalid username or password.", "RepoNotFound" * ("repo" in self.parts))
                return handler(self)
        raise RefusedError(404, f"The loopback Hub does not know {url.path}")

    @property
    def member(self) -> bool:
        """Whether the request carries the token. Requests with a wrong token were refused before."""
        return "Authorization" in self.headers

    @property
    def json(self) -> Json:
        return json.loads(self.body)

    @property
    def key(self) -> tuple[str, str]:
        """The repo named by the path, or by the body of a request that creates or deletes a repo."""
        if "repo" in self.parts:
            return self.parts.get("kind", "models"), self.parts["repo"]
        return f"{self.json.get('type') or 'model'}s", f"{self.json['organization'] or USER}/{self.json['name']}"

    @property
    def url(self) -> str:
        kind, repo_id = self.key
        return f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{repo_id}"

    @property
    def repo(self) -> Repo:
        """The repo. Without the token, a private repo looks like a missing one, as on the Hub."""
        repo = self.hub.repos.get(self.key)
        if repo is None or (repo.private and not self.member):
            refusal = (404, "Repository not found") if self.member else (401, "Invalid username or password.")
            raise RefusedError(*refusal, "RepoNotFound")
        return repo

    @property
    def commit(self) -> Commit:
        """The requested commit. The reply names the commit, because the client also caches missing files per commit."""
        commit = self.repo.find(self.parts.get("revision", "main"))
        if commit is None:
            raise RefusedError(404, "Invalid rev id", "RevisionNotFound")
        self.reply["X-Repo-Commit"] = commit.oid
        return commit

    @on("GET", "/api/whoami-v2", write=True)
    def whoami(self) -> Json:
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    @on("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Json:
        """Refuse text that is no YAML mapping, and warn of missing metadata. The Hub's own rules are not public."""
        front = front_matter(self.json["content"])
        wrong = [line for line in front.splitlines() if not re.match(r"[\w-]+:(\s|$)|[-#\s]|$", line)]
        if wrong:
            raise RefusedError(400, "Invalid YAML", errors=[{"message": f"cannot read {line!r}"} for line in wrong])
        return {"errors": [], "warnings": [] if front else [{"message": "empty or missing yaml metadata in repo card"}]}

    @on("POST", "/api/repos/create", write=True)
    def create_repo(self) -> Json:
        if self.key in self.hub.repos:
            raise RefusedError(409, "You already created this repo", url=self.url)  # exist_ok reads the url
        first = Commit("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs\n")})
        private = self.json.get("visibility") == "private"
        self.hub.repos[self.key] = Repo(private, {"branch": {"main": first}, "tag": {}})
        return {"url": self.url}

    @on("DELETE", "/api/repos/delete", write=True)
    def delete_repo(self) -> Json:
        _ = self.repo  # raises if the repo is not found
        del self.hub.repos[self.key]
        return {}

    @on("POST", "/api/{kind}/{repo}/preupload/{revision}", write=True)
    def preupload(self) -> Json:
        """Send binary and large files to LFS. A known hash saves the client from sending the file again."""
        there = {path: {"oid": blob.oid} for path, blob in self.commit.files.items()}

        def mode(file: Json) -> str:
            return "lfs" if file["size"] > 10_000_000 or b"\0" in base64.b64decode(file["sample"]) else "regular"

        asked = {file["path"]: {"uploadMode": mode(file), "shouldIgnore": False} for file in self.json["files"]}
        return {"files": [{"path": path, **answer, **there.get(path, {})} for path, answer in asked.items()]}

    @on("POST", r"/(?:{kind}/)?{repo}\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self) -> Json:
        """Upload address of each object. A stored object gets no address, so a second push continues the first."""
        _ = self.repo  # raises if the repo is not found

        def actions(oid: str) -> Json:
            target = {"href": f"{self.hub.endpoint}/lfs/{oid}"}
            return {} if oid in self.hub.objects else {"actions": {"upload": target, "verify": target}}

        return {"transfer": "basic", "objects": [{**item, **actions(item["oid"])} for item in self.json["objects"]]}

    @on("PUT", "/lfs/{path}")
    def lfs_upload(self) -> bytes:
        """Store an object without a token. The client sends none, because the Hub signs the address."""
        if sha256(self.body).hexdigest() != self.parts["path"]:
            raise RefusedError(400, "The content does not have the hash it was announced with")
        self.hub.objects[self.parts["path"]] = self.body
        return b""

    @on("POST", "/lfs/{path}", write=True)
    def lfs_verify(self) -> Json:
        if len(self.hub.objects.get(self.parts["path"], b"")) != self.json["size"]:
            raise RefusedError(404, "Object not found")
        return {}

    @on("POST", "/api/{kind}/{repo}/commit/{revision}", write=True)
    def create_commit(self) -> Json:
        """Apply all operations or none: the branch moves at the very end."""
        branches, branch, parent = self.repo.refs["branch"], self.parts["revision"], self.commit
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if "create_pr" in self.query or branch not in branches:
            raise RefusedError(400, "The loopback Hub commits to branches only")
        if header["value"].get("parentCommit", parent.oid) != parent.oid:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            apply(files, self.hub.objects, **operation)
        new = branches[branch] = Commit(header["value"]["summary"], files, parent, header["value"]["description"])
        return {"commitOid": new.oid, "commitUrl": f"{self.url}/commit/{new.oid}"}

    @on("GET", "/api/{kind}/{repo}/tree/{revision}(?:/{path})?")
    def tree(self) -> list[Json]:
        folder = f"{self.parts['path']}/" if "path" in self.parts else ""
        inside = {path: entry for path, entry in self.commit.entries().items() if path.startswith(folder)}
        if folder and not inside:
            raise RefusedError(404, "This folder does not exist", "EntryNotFound")
        deep = self.query.get("recursive") == ["true"]
        return [entry for path, entry in inside.items() if deep or "/" not in path.removeprefix(folder)]

    @on("POST", "/api/{kind}/{repo}/paths-info/{revision}")
    def paths_info(self) -> list[Json]:
        """The request is a form, not JSON. Missing paths are left out of the reply."""
        entries = self.commit.entries()
        return [entries[path] for path in parse_qs(self.body.decode())["paths"] if path in entries]

    @on("GET", "/api/{kind}/{repo}/commits/{revision}")
    def list_commits(self) -> list[Json]:
        return [
            {"id": c.oid, "title": c.title, "message": c.description, "date": c.date, "authors": [{"user": USER}]}
            for c in self.commit.history()
        ]

    @on("GET", "/api/{kind}/{repo}/refs")
    def list_refs(self) -> Json:
        def listed(ref: str, folder: str) -> list[Json]:
            named = self.repo.refs[ref].items()
            return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": at.oid} for name, at in named]

        return {
            "branches": listed("branch", "heads"),
            "tags": listed("tag", "tags"),
            "converts": [],
            "pullRequests": [],
        }

    @on("POST", "/api/{kind}/{repo}/{ref}/{revision}", write=True)
    def create_ref(self) -> Json:
        """A branch has its name in the path and its start in the body; a tag has them the other way round."""
        name, named = self.json.get("tag") or self.parts["revision"], self.repo.refs[self.parts["ref"]]
        if name in named:
            raise RefusedError(409, "Reference already exists")
        if self.parts["ref"] == "branch":
            self.parts["revision"] = self.json.get("startingPoint", "main")
        named[name] = self.commit
        return {}

    @on("GET", "/api/{kind}/{repo}(?:/revision/{revision})?")
    def info(self) -> Json:
        """The repo at a revision, with the fields that transformers.pipeline() reads from the card's front matter."""
        commit, repo_id = self.commit, self.key[1]
        card = front_matter(commit.files.get("README.md", Blob(b"")).content.decode())
        return {
            "id": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "private": self.repo.private,
            "siblings": [{"rfilename": path, "size": blob.size} for path, blob in commit.files.items()],
            **dict(re.findall(r"^(library_name|pipeline_tag): *['\"]?([\w-]+)", card, re.M)),
        }

    @on("GET", "/(?:{kind}/)?{repo}/resolve/{revision}/{path}")
    def resolve(self) -> bytes:
        """A file, or the byte range that a stream asks for."""
        blob = self.commit.files.get(self.parts["path"])
        if blob is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        self.reply["ETag"] = f'"{blob.oid}"'
        if blob.lfs:
            self.reply |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(blob.size)}
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part is None:
            return blob.content
        self.status = 206
        self.reply["Content-Range"] = f"bytes {part[1]}-{part[2]}/{blob.size}"
        return blob.content[int(part[1]) : int(part[2]) + 1]

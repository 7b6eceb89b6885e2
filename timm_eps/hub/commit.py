"""One commit to the Hub, and a check whether it was made. If the check is impossible, the error says so."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha1

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from .failures import HTTP_ERRORS, one_line

__all__ = ["NOTHING", "asking", "commit_files"]

NOTHING = "Nothing of the model was published"
# Errors of the client if the answer is incomplete or not from the Hub, such as a page of a proxy.
_UNREADABLE: tuple[type[Exception], ...] = (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError)
_ON_THE_WAY: tuple[type[Exception], ...] = (*HTTP_ERRORS, *_UNREADABLE, RuntimeError)
_OF_A_COMMIT: tuple[type[Exception], ...] = (*_ON_THE_WAY, OSError)


@contextmanager
def asking(api: HfApi, fact: str) -> Iterator[None]:
    """Report errors of the Hub in one line, without the token, together with their consequence.

    Args:
        api: The client.
        fact: Consequence of a failure, for the message.

    Raises:
        HfHubHTTPError: The Hub refused the request. The class of the error is kept.
        ConnectionError: The Hub did not answer, or its answer cannot be read.
        RuntimeError: An upload failed.
    """
    try:
        yield
    except _ON_THE_WAY as error:
        raise _told(api, error, fact) from None  # the original text may contain the token


def commit_files(
    api: HfApi,
    repo_id: str,
    operations: Sequence[CommitOperationAdd | CommitOperationDelete],
    *,
    message: str,
    revision: str | None,
) -> CommitInfo:
    """Make a commit. If the Hub's answer is an error or is missing, check whether the files have arrived.

    Args:
        api: The client.
        repo_id: ``owner/name`` of a model.
        operations: Files to add and to delete.
        message: Title of the commit.
        revision: Git branch; None for the main one.

    Raises:
        HfHubHTTPError, ConnectionError, RuntimeError: See :func:`asking`. The message says that nothing was published,
            or that this is unknown.
    """
    additions = [each for each in operations if isinstance(each, CommitOperationAdd)]
    with asking(api, NOTHING):  # separate from the commit, because a failure here publishes nothing
        api.preupload_lfs_files(repo_id, additions, revision=revision, free_memory=False)
    try:
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except _OF_A_COMMIT as error:
        branch = revision or "main"
        tip, is_there = _look(api, repo_id, operations, branch)
        if tip is None:
            where = f"{api.endpoint}/{repo_id}/commits/{branch}"
            fact = f"It is unknown whether the model was published, because the Hub does not answer; check {where}"
            raise _told(api, error, fact) from None
        if not is_there:
            raise _told(api, error, f"The commit is not on the Hub. {NOTHING}") from None
        return CommitInfo(
            commit_url=f"{api.endpoint}/{repo_id}/commit/{tip}", commit_message=message, commit_description="", oid=tip
        )


def _look(
    api: HfApi, repo_id: str, operations: Sequence[CommitOperationAdd | CommitOperationDelete], branch: str
) -> tuple[str | None, bool]:
    """The last commit of a git branch (None if unknown), and whether the operations have been applied."""
    for _ in range(2):  # the client's connection may be closed, so that the first request fails
        with suppress(*_OF_A_COMMIT):
            tip = api.repo_info(repo_id, revision=branch).sha
            assert tip is not None, "the Hub returns the commit of a branch"
            return tip, _is_at(api, repo_id, operations, tip)
    return None, False


def _is_at(
    api: HfApi, repo_id: str, operations: Sequence[CommitOperationAdd | CommitOperationDelete], commit: str
) -> bool:
    """Whether the operations have been applied at a commit."""
    found = {
        one.path: one
        for one in api.get_paths_info(repo_id, [each.path_in_repo for each in operations], revision=commit)
    }
    for each in operations:
        stored = found.get(each.path_in_repo)
        if isinstance(each, CommitOperationDelete):
            if stored is not None:
                return False
        elif stored is None or _hash_of(stored) not in _hashes(each):
            return False
    return True


def _hash_of(stored: object) -> str | None:
    lfs = getattr(stored, "lfs", None)
    return lfs.sha256 if lfs else getattr(stored, "blob_id", None)


def _hashes(addition: CommitOperationAdd) -> set[str]:
    """Possible ids of a file: the Hub uses the SHA-256 for large files, and git's hash for others."""
    with addition.as_file() as file:
        content = file.read()
    return {addition.upload_info.sha256.hex(), sha1(b"blob %d\0" % len(content) + content).hexdigest()}


def _told(api: HfApi, error: Exception, fact: str) -> Exception:
    text = one_line(error, limit=600)
    for secret in (api.token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "...")
    if isinstance(error, _UNREADABLE):
        text = f"The Hub's answer cannot be read ({text})"
    text = f"{text}. {fact}."
    if isinstance(error, HfHubHTTPError):
        return type(error)(text, response=error.response)
    return RuntimeError(text) if isinstance(error, RuntimeError) else ConnectionError(text)

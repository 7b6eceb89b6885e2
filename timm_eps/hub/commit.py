"""One commit to the Hub, of which it is known afterwards whether it was made, or said that it is not."""

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
# What the client raises if the answer is cut off or is not the Hub's, such as the page of a proxy.
_UNREADABLE: tuple[type[Exception], ...] = (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError)
_ON_THE_WAY: tuple[type[Exception], ...] = (*HTTP_ERRORS, *_UNREADABLE, RuntimeError)
_OF_A_COMMIT: tuple[type[Exception], ...] = (*_ON_THE_WAY, OSError)


@contextmanager
def asking(api: HfApi, fact: str) -> Iterator[None]:
    """Tell in one line, without the token, what failed on the way to the Hub, and what that means.

    Args:
        api: The client.
        fact: What is true if it fails.

    Raises:
        HfHubHTTPError: The Hub refused; of the class that it was.
        ConnectionError: It did not answer, or not in a way that can be read.
        RuntimeError: An upload failed.
    """
    try:
        yield
    except _ON_THE_WAY as error:
        raise _told(api, error, fact) from None  # its own text may hold what is left out here


def commit_files(
    api: HfApi,
    repo_id: str,
    operations: Sequence[CommitOperationAdd | CommitOperationDelete],
    *,
    message: str,
    revision: str | None,
) -> CommitInfo:
    """Make a commit. If the Hub's answer is an error, or does not arrive, look whether the files are there.

    Args:
        api: The client.
        repo_id: ``owner/name`` of a model.
        operations: Files to add and to delete.
        message: Title of the commit.
        revision: The branch; None for the main one.

    Raises:
        HfHubHTTPError, ConnectionError, RuntimeError: As of :func:`asking`. The text says that nothing was published,
            or that it is not known.
    """
    additions = [each for each in operations if isinstance(each, CommitOperationAdd)]
    with asking(api, NOTHING):  # apart from the commit, as it is certain that a failure here publishes nothing
        api.preupload_lfs_files(repo_id, additions, revision=revision, free_memory=False)
    try:
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except _OF_A_COMMIT as error:
        branch = revision or "main"
        tip, is_there = _look(api, repo_id, operations, branch)
        if tip is None:
            where = f"{api.endpoint}/{repo_id}/commits/{branch}"
            fact = f"Whether the model was published is not known, as the Hub cannot be asked; look at {where}"
            raise _told(api, error, fact) from None
        if not is_there:
            raise _told(api, error, f"The commit is not on the Hub. {NOTHING}") from None
        return CommitInfo(
            commit_url=f"{api.endpoint}/{repo_id}/commit/{tip}", commit_message=message, commit_description="", oid=tip
        )


def _look(
    api: HfApi, repo_id: str, operations: Sequence[CommitOperationAdd | CommitOperationDelete], branch: str
) -> tuple[str | None, bool]:
    """The last commit of a branch, None if the Hub does not say, and whether the operations have been applied."""
    for _ in range(2):  # the client's connection may be closed, which shows when it is used again
        with suppress(*_OF_A_COMMIT):
            tip = api.repo_info(repo_id, revision=branch).sha
            assert tip is not None, "the Hub names the commit of a branch"
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
    """The Hub names a large file by its SHA-256, others as git does."""
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

"""Update the main branch of a Hub repository to a publication in one commit."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from ubn_zoo import __version__
from ubn_zoo.errors import HubError, HubNotFoundError, PublishConflictError
from ubn_zoo.hub.retry import RETRY_SECONDS_VARIABLE, Advice, Backoff, endpoint, retry
from ubn_zoo.release.card import shown_pictures
from ubn_zoo.release.source import CSV, JSON, RECIPE, WEIGHTS

__all__ = ["CARD", "CONFIG", "File", "Repository"]

CARD = "README.md"
CONFIG = "config.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# The files of a publication, besides the pictures on its card.
_NAMES = (WEIGHTS, CONFIG, RECIPE, CSV, JSON, CARD)
_ADVICE = Advice(
    login="log in with `hf auth login` or set HF_TOKEN to a token that may write there",
    offline="Unset HF_HUB_OFFLINE to publish",
    exhausted="Nothing was recorded; publish again later to finish it, or wait longer with "
    f"{RETRY_SECONDS_VARIABLE}=SECONDS",
    writing=True,
)


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A file as it is uploaded.

    Attributes:
        name: Its path in the repository.
        content: Its bytes.
        sha256: Their SHA-256, 64 hexadecimal digits.
    """

    name: str
    content: bytes = dataclasses.field(repr=False)
    sha256: str

    @property
    def git_oid(self) -> str:
        """The hash that Git gives the content, and the Hub reports for small files."""
        header = b"blob %d\0" % len(self.content)
        return hashlib.sha1(header + self.content, usedforsecurity=False).hexdigest()


class Repository:
    """A model repository on the Hub, whose main branch holds one publication.

    Args:
        repo_id: ``owner/name``.
    """

    def __init__(self, repo_id: str) -> None:
        self._repo_id = repo_id
        self._api = HfApi(endpoint=constants.ENDPOINT, library_name="ubn-zoo", library_version=__version__)
        self._subject = f"{repo_id} at {endpoint()}"

    def publish(
        self,
        files: Sequence[File],
        title: str,
        *,
        private: bool,
        recorded: Collection[str],
        others: Mapping[str, str],
        replace: bool,
    ) -> tuple[str, bool]:
        """Update main so that these are its only published files. All other files stay.

        Args:
            files: The publication.
            title: First line of the commit message.
            private: Whether the repository must be private.
            recorded: Revisions of earlier publications; their files may be overwritten and removed.
            others: Other weights that were published here: SHA-256 by id.
            replace: Whether to replace other weights and other people's files, and to remove pickles.

        Returns:
            The commit, and whether it is new.

        Raises:
            PublishConflictError: Main has other content, or changes in the meantime.
            HubError: The Hub denies the request, or is unreachable.
        """
        head, is_private = retry(lambda: self._open(private), self._subject, _ADVICE)
        if private and not is_private:
            raise PublishConflictError(
                f"{self._subject}: the repository is public, but a private one was requested; nothing was sent"
            )
        main = self.tree(head)
        beside = set(main) - {file.name for file in files}
        pickles = {name for name in beside if name.lower().endswith(_PICKLES)}
        differing = self._differing(main, files)
        left = {name for name in beside if name in _NAMES or name.endswith(".png")}
        owned = []
        if differing or left:
            revisions = [*sorted(recorded), *([head] if replace else [])]
            owned = [self._owned(revision, pictures=bool(left)) for revision in revisions]
        stale = {name for mine in owned for name in mine if name in left}
        if not replace:
            self._check_conflicts(main, {*differing, *stale}, owned, pickles, others)
        removed = sorted(stale | pickles)
        if not differing and not removed:
            return head, False
        return self._commit(files, removed, head, f"Publish {title}"), True

    def holds(self, revision: str, name: str, sha256: str) -> bool:
        """Return whether a revision exists and has a large file with this content.

        Args:
            revision: A commit.
            name: Path of the file.
            sha256: SHA-256 of the content.
        """
        try:
            return self.tree(revision).get(name) == sha256
        except HubNotFoundError:
            return False

    def tree(self, revision: str) -> dict[str, str]:
        """Return the hashes of a revision's files by name: SHA-256 for large ones, Git's SHA-1 for small ones.

        Args:
            revision: A commit.

        Raises:
            HubNotFoundError: There is no such revision.
        """

        def attempt() -> dict[str, str]:
            entries = self._api.list_repo_tree(self._repo_id, recursive=True, revision=revision)
            try:
                files = (entry for entry in entries if isinstance(entry, RepoFile))
                return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
            except (AttributeError, LookupError, TypeError) as error:
                # The client reads the listing in a generator, where `retry` cannot see the response.
                raise HubError(
                    f"{self._subject}: the Hub returned HTTP 200 with a file listing that cannot be interpreted "
                    f"({type(error).__name__}: {error}); check HF_ENDPOINT"
                ) from error

        return retry(attempt, self._subject, _ADVICE)

    def _open(self, private: bool) -> tuple[str, bool]:
        """Return the head of main and whether the repository is private; create it if it does not exist."""
        try:
            info = self._api.repo_info(self._repo_id)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            self._api.create_repo(self._repo_id, private=private or None, exist_ok=True)
            info = self._api.repo_info(self._repo_id)
        if info.sha is None:
            raise HubError(f"{self._repo_id}: the repository has no commit on main; make one on its web page")
        return info.sha, bool(info.private)

    def _owned(self, revision: str, *, pictures: bool) -> dict[str, str]:
        """Return the hashes of a publication's files at its revision; none if the revision no longer exists.

        With `pictures`, its card is downloaded to find out which pictures it shows.
        """
        try:
            tree = self.tree(revision)
        except HubNotFoundError:
            # The repository was recreated, or its history squashed.
            return {}
        shown: set[str] = set()
        if pictures and CARD in tree:
            shown = shown_pictures(retry(lambda: self._read(CARD, revision), self._subject, _ADVICE))
        return {name: tree[name] for name in (*_NAMES, *shown) if name in tree}

    def _read(self, name: str, revision: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = hf_hub_download(self._repo_id, name, revision=revision, cache_dir=folder, library_name="ubn-zoo")
            return Path(path).read_text(encoding="utf-8", errors="replace")

    def _check_conflicts(
        self,
        main: Mapping[str, str],
        changed: Collection[str],
        owned: Sequence[Mapping[str, str]],
        pickles: Collection[str],
        others: Mapping[str, str],
    ) -> None:
        other = next((name for name, sha256 in others.items() if main.get(WEIGHTS) == sha256), None)
        if other is not None and changed:
            raise PublishConflictError(
                f"{self._subject}: main has other weights, {other}; choose another repository, or pass "
                "`replace=True` to replace them on main (their recorded revision stays)"
            )
        foreign = [name for name in changed if name in main and all(mine.get(name) != main[name] for mine in owned)]
        if foreign:
            raise PublishConflictError(
                f"{self._subject}: main has {', '.join(sorted(foreign))} with content that is not from a recorded "
                "publication; check it, then choose another repository, or pass `replace=True`"
            )
        if pickles:
            raise PublishConflictError(
                f"{self._subject}: main has {', '.join(sorted(pickles))}, which can run code when loaded and may be "
                "loaded instead of the published weights; remove it, or pass `replace=True` to have it removed"
            )

    def _differing(self, tree: Mapping[str, str], files: Sequence[File]) -> list[str]:
        return [file.name for file in files if tree.get(file.name) not in (file.sha256, file.git_oid)]

    def _commit(self, files: Sequence[File], removed: Sequence[str], head: str, title: str) -> str:
        """Make exactly one commit on top of `head`, with retries, and return its revision.

        The response may be lost after the commit was made. Main is therefore checked after every failure, and every
        attempt names its parent commit, so that the Hub cannot make the same commit twice.
        """
        backoff = Backoff(self._subject, _ADVICE)
        while True:
            failure: Exception | None = None
            try:
                # New operations every time: huggingface_hub cannot reuse committed ones.
                operations: list[CommitOperationAdd | CommitOperationDelete] = [
                    *(CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in files),
                    *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removed),
                ]
                revision = self._api.create_commit(
                    self._repo_id, operations, commit_message=title, parent_commit=head
                ).oid
            except Exception as error:
                failure = error
                revision = retry(lambda: str(self._api.repo_info(self._repo_id).sha), self._subject, _ADVICE)
            tree = self.tree(revision)
            if not self._differing(tree, files) and not any(name in tree for name in removed):
                return revision
            if failure is None:
                raise HubError(
                    f"{self._subject}: the commit {revision} does not contain the files that were sent; not recorded"
                )
            if revision != head:
                raise PublishConflictError(
                    f"{self._subject}: main moved from {head} to {revision} in the meantime, so nothing was committed; "
                    "check it, then publish again"
                ) from failure
            backoff.wait(failure)

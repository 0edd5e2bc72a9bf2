"""What the hub holds: users, repos, commits and content-addressed blobs. It knows no HTTP."""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.gguf", "*.zip", "*tfevents*", "*.model")
MAIN = "main"


class HubError(Exception):
    """A refusal as the Hub words it: the code decides the client's exception, the message is all that HEAD shows."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers: dict[str, str] = extra.pop("headers", {})
        self.body: dict[str, Any] = extra


def no_repo(viewer: User | None) -> HubError:
    """An anonymous visitor is told 401, so that nobody learns which private repos exist."""
    if viewer is None:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


def no_revision(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass(frozen=True)
class User:
    name: str
    token: str
    orgs: frozenset[str] = frozenset()
    role: Literal["write", "read"] = "write"

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass(frozen=True)
class Entry:
    """A file of a commit: its content is the blob of this sha256."""

    sha256: str
    size: int
    git_oid: str  # of the blob, or of the LFS pointer
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Entry]


@dataclass
class Repo:
    id: str
    private: bool = False
    kind: str = "model"  # or "space"
    gated: Literal[False, "auto", "manual"] = False
    created: str = ""
    granted: set[str] = field(default_factory=set)  # users let into a gated repo
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an oid (also a beginning of one)."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = self.branches.get(name) or self.tags.get(name)
        if oid is None and re.fullmatch("[0-9a-f]{5,40}", revision):
            oid = next((known for known in self.commits if known.startswith(revision)), None)
        if oid is None:
            raise no_revision(revision)
        return self.commits[oid]

    def history(self, revision: str = MAIN) -> list[Commit]:
        """The newest first."""
        commits, commit = [], self.resolve(revision)
        while True:
            commits.append(commit)
            if commit.parent is None:
                return commits
            commit = self.commits[commit.parent]

    def visible_to(self, viewer: User | None) -> bool:
        return not self.private or (viewer is not None and viewer.owns(self.namespace))

    def open_to(self, viewer: User | None) -> bool:
        """Whether the files of a gated repo may be read."""
        return not self.gated or (viewer is not None and (viewer.owns(self.namespace) or viewer.name in self.granted))


def _git_blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Store:
    """Everything that one test's hub knows. Safe to use from the server's thread and the test's."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}  # token -> user
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}  # sha256 -> content
        self.lfs_patterns: tuple[str, ...] = LFS_PATTERNS
        self.lfs_threshold = 10 * 1024 * 1024  # bytes; larger files are LFS whatever their name
        self._ticks = 0

    # ---- users and repos

    def user_of(self, token: str | None) -> User | None:
        if token is None:
            return None
        if token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def _now(self) -> str:
        """Distinct and increasing, so that commits of one second have an order."""
        self._ticks += 1
        start = datetime.datetime(2030, 1, 1, tzinfo=datetime.timezone.utc)
        return (start + datetime.timedelta(seconds=self._ticks)).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def create(self, repo_id: str, *, private: bool = False, author: str = "hub", kind: str = "model") -> Repo:
        with self.lock:
            if repo_id in self.repos:
                raise HubError(409, f"You already created this {kind} repo")
            repo = Repo(repo_id, private=private, kind=kind, created=self._now())
            self.repos[repo_id] = repo
            lines = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in self.lfs_patterns)
            attributes = self.put(lines.encode(), lfs=False)
            self._add(repo, MAIN, None, {".gitattributes": attributes}, "initial commit", "", author)
            return repo

    def delete(self, repo_id: str) -> None:
        with self.lock:
            del self.repos[repo_id]

    def move(self, old: str, new: str) -> None:
        with self.lock:
            if new in self.repos:
                raise HubError(409, f"A repo named {new} exists already")
            repo = self.repos.pop(old)
            repo.id, self.moved[old] = new, new
            self.repos[new] = repo

    def find(self, repo_id: str, viewer: User | None, kind: str = "model") -> Repo:
        repo = self.repos.get(self.moved.get(repo_id, repo_id))
        if repo is None or repo.kind != kind or not repo.visible_to(viewer):
            raise no_repo(viewer)
        return repo

    # ---- blobs

    def is_lfs(self, path: str, size: int) -> bool:
        name = path.rpartition("/")[2]
        return size > self.lfs_threshold or any(fnmatch.fnmatch(name, pattern) for pattern in self.lfs_patterns)

    def put(self, content: bytes, *, lfs: bool) -> Entry:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return self.entry(digest, lfs=lfs)

    def entry(self, digest: str, *, lfs: bool) -> Entry:
        content = self.blobs[digest]
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
        return Entry(digest, len(content), _git_blob_oid(pointer if lfs else content), lfs)

    # ---- commits

    def _add(
        self, repo: Repo, branch: str, parent: str | None, files: Mapping[str, Entry], title: str, body: str, who: str
    ) -> Commit:
        commit = Commit("", parent, title, body, who, self._now(), dict(files))
        text = json.dumps(dataclasses.asdict(commit), sort_keys=True)
        oid = hashlib.sha1((repo.id + text).encode(), usedforsecurity=False).hexdigest()
        repo.commits[oid] = dataclasses.replace(commit, oid=oid)
        repo.branches[branch] = oid
        return repo.commits[oid]

    def commit(
        self,
        repo: Repo,
        branch: str,
        *,
        put: Mapping[str, Entry] | None = None,
        delete: Iterable[str] = (),
        delete_folders: Iterable[str] = (),
        title: str,
        body: str = "",
        author: str = "hub",
        parent: str | None = None,
    ) -> Commit:
        """One commit on a branch: all of it or nothing.

        Args:
            parent: what the client took for the branch's head; another head is a conflict.
        """
        with self.lock:
            if branch not in repo.branches:
                raise no_revision(branch)
            head = repo.commits[repo.branches[branch]]
            if parent is not None and not head.oid.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for path in delete:
                if path not in files:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                del files[path]
            for folder in delete_folders:
                inside = [path for path in files if path.startswith(folder.rstrip("/") + "/")]
                if not inside:
                    raise HubError(404, f"A folder with this name doesn't exist: {folder}", "EntryNotFound")
                for path in inside:
                    del files[path]
            files.update(put or {})
            return self._add(repo, branch, head.oid, files, title, body, author)

    def read(self, repo: Repo, revision: str = MAIN) -> dict[str, bytes]:
        return {path: self.blobs[entry.sha256] for path, entry in repo.resolve(revision).files.items()}

"""The tests' own hub: what the unmodified client, transformers and peft do against it, and each fault it can inject."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors
from loras import logits, randomise

for module in ("_cache_assets", "_cache_manager", "_git_credential"):  # they copy constants when they are imported
    importlib.import_module(f"huggingface_hub.utils.{module}")

HF_HOME = constants.HF_HOME  # as it is while no test has a hub
BIG = bytes(range(256)) * 40  # 10,240 bytes


@pytest.fixture
def api(hub: Any) -> HfApi:
    return HfApi()


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def text(path: Any) -> str:
    return Path(path).read_text()


# ---- repos and users -------------------------------------------------------------------------------------------------


def test_whoami_and_tokens(hub: Any, api: HfApi) -> None:
    me = api.whoami()
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("me", ["lab"])
    assert api.whoami(token=hub.other_token)["name"] == "you"
    with pytest.raises(errors.HfHubHTTPError) as caught:
        api.whoami(token="hf_wrong")
    assert caught.value.response.status_code == 401
    assert caught.value.response.headers["X-Error-Message"] == "Invalid credentials in Authorization header"


def test_a_repo_is_created_once(hub: Any, api: HfApi) -> None:
    assert api.create_repo("one").repo_id == "me/one"
    assert api.create_repo("lab/one", private=True).repo_id == "lab/one"
    assert hub.repo("lab/one").private
    assert not hub.repo("me/one").private
    with pytest.raises(errors.HfHubHTTPError, match="already created") as caught:
        api.create_repo("me/one")
    assert caught.value.response.status_code == 409
    assert api.create_repo("me/one", exist_ok=True).repo_id == "me/one"
    with pytest.raises(errors.HfHubHTTPError, match="namespace") as caught:
        api.create_repo("you/one")
    assert caught.value.response.status_code == 403
    assert [c.title for c in api.list_repo_commits("me/one")] == ["initial commit"]


def test_a_repo_is_moved_changed_and_deleted(hub: Any, api: HfApi) -> None:
    hub.commit("me/old", {"a.txt": "a"})
    api.move_repo("me/old", "lab/new")
    assert api.model_info("lab/new").id == "lab/new"
    assert text(api.hf_hub_download("me/old", "a.txt")) == "a"  # the old name leads to the new one
    api.update_repo_settings("lab/new", private=True)
    assert api.model_info("lab/new").private
    api.delete_repo("lab/new")
    assert not api.repo_exists("lab/new")
    api.delete_repo("lab/new", missing_ok=True)
    with pytest.raises(errors.RepositoryNotFoundError):
        api.delete_repo("lab/new")


def test_private_repos_do_not_exist_for_others(hub: Any, api: HfApi) -> None:
    hub.create("lab/secret", private=True)
    hub.commit("lab/secret", {"config.json": "{}"})
    assert text(api.hf_hub_download("lab/secret", "config.json")) == "{}"
    for token, status in ((hub.other_token, 404), (False, 401)):
        with pytest.raises(errors.RepositoryNotFoundError) as caught:
            api.model_info("lab/secret", token=token)
        assert caught.value.response.status_code == status
        with pytest.raises(errors.RepositoryNotFoundError):
            api.hf_hub_download("lab/secret", "config.json", token=token, cache_dir=hub.home / "empty")
        assert not list(api.list_models(author="lab", token=token))
    with pytest.raises(errors.HfHubHTTPError, match="Invalid credentials") as caught:
        api.model_info("lab/secret", token="hf_wrong")
    assert not isinstance(caught.value, errors.RepositoryNotFoundError)
    assert [m.id for m in api.list_models(author="lab")] == ["lab/secret"]


def test_missing_things_have_their_own_errors(hub: Any, api: HfApi) -> None:
    hub.commit("me/one", {"a.txt": "a"})
    with pytest.raises(errors.RepositoryNotFoundError):
        api.hf_hub_download("me/none", "a.txt")
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info("gpt2")
    with pytest.raises(errors.RevisionNotFoundError):
        api.hf_hub_download("me/one", "a.txt", revision="nope")
    with pytest.raises(errors.RemoteEntryNotFoundError):
        api.hf_hub_download("me/one", "b.txt")
    assert not api.file_exists("me/one", "b.txt")
    assert not api.revision_exists("me/one", "nope")
    assert not huggingface_hub.try_to_load_from_cache("me/one", "a.txt")


def test_gated_repos_are_seen_but_not_read(hub: Any, api: HfApi) -> None:
    hub.commit("lab/gated", {"a.txt": "a"})
    api.update_repo_settings("lab/gated", gated="manual")
    assert api.model_info("lab/gated", token=hub.other_token).gated == "manual"
    for token, status in ((hub.other_token, 403), (False, 401)):
        with pytest.raises(errors.GatedRepoError, match="Access to model lab/gated is restricted") as caught:
            api.hf_hub_download("lab/gated", "a.txt", token=token)
        assert caught.value.response.status_code == status
    hub.repo("lab/gated").granted.add("you")
    assert text(api.hf_hub_download("lab/gated", "a.txt", token=hub.other_token)) == "a"


def test_only_owners_with_a_write_token_push(hub: Any, api: HfApi) -> None:
    hub.create("me/one")
    reader = hub.add_user("reader", orgs=("lab",), role="read")
    hub.create("lab/one")
    for repo_id, token in (("me/one", hub.other_token), ("lab/one", reader)):
        with pytest.raises(errors.HfHubHTTPError) as caught:
            api.upload_file(repo_id=repo_id, path_or_fileobj=b"x", path_in_repo="a.txt", token=token)
        assert caught.value.response.status_code == 403
        assert hub.files(repo_id) == {}


# ---- pushing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [None, 4096], ids=["one piece", "parts"])
def test_a_folder_becomes_one_commit(hub: Any, api: HfApi, tmp_path: Path, part: int | None) -> None:
    hub.app.part_size = part
    files = {"a.txt": b"a", "sub/b.json": b"{}", "w.safetensors": BIG, "empty.txt": b""}
    api.create_repo("me/one")
    info = api.upload_folder(repo_id="me/one", folder_path=folder(tmp_path, files), commit_message="all of it")
    assert hub.files("me/one") == files
    assert [c.title for c in hub.history("me/one")] == ["all of it"]
    assert info.oid == hub.history("me/one")[0].oid
    assert info.repo_url.repo_id == "me/one"
    entries = hub.repo("me/one").resolve("main").files
    assert {path for path, entry in entries.items() if entry.lfs} == {"w.safetensors"}
    assert len(hub.asked("PUT", "/lfs/.*")) == (1 if part is None else 3)
    assert not any(request.authorized for request in hub.asked("PUT"))  # as to a storage elsewhere


def test_lfs_goes_by_name_or_size(hub: Any, api: HfApi) -> None:
    hub.store.lfs_threshold, hub.store.lfs_patterns = 100, ("*.weights",)
    hub.create("me/one")
    for name, content in (("small.bin", b"1"), ("x.weights", b"2"), ("large.txt", BIG)):
        api.upload_file(repo_id="me/one", path_or_fileobj=content, path_in_repo=name)
    entries = hub.repo("me/one").resolve("main").files
    assert {path for path, entry in entries.items() if entry.lfs} == {"x.weights", "large.txt"}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(BIG).hexdigest()}\nsize 10240\n"
    blob = f"blob {len(pointer)}\0{pointer}".encode()
    assert entries["large.txt"].git_oid == hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def test_what_is_stored_already_is_not_sent_again(hub: Any, api: HfApi, tmp_path: Path) -> None:
    hub.create("me/one")
    hub.create("me/two")
    files = folder(tmp_path, {"a.txt": b"a", "w.safetensors": BIG})
    first = api.upload_folder(repo_id="me/one", folder_path=files)
    again = api.upload_folder(repo_id="me/one", folder_path=files)
    assert first.oid == again.oid
    assert len(hub.history("me/one")) == 1
    api.upload_folder(repo_id="me/two", folder_path=files)
    assert len(hub.asked("PUT", "/lfs/.*")) == 1
    assert hub.files("me/two") == hub.files("me/one")


def test_deleting_and_history(hub: Any, api: HfApi) -> None:
    hub.commit("me/one", {"a.txt": "1", "sub/b.txt": "1", "sub/c.txt": "1"}, message="first")
    api.upload_file(repo_id="me/one", path_or_fileobj=b"2", path_in_repo="a.txt", commit_message="second")
    api.delete_folder("sub", "me/one", commit_message="third")
    assert [c.title for c in api.list_repo_commits("me/one")] == ["third", "second", "first", "initial commit"]
    assert hub.files("me/one") == {"a.txt": b"2"}
    old = api.list_repo_commits("me/one")[2].commit_id
    assert text(api.hf_hub_download("me/one", "a.txt", revision=old)) == "1"
    with pytest.raises(errors.RemoteEntryNotFoundError):
        api.create_commit("me/one", [CommitOperationDelete("no.txt", is_folder=False)], commit_message="x")
    assert len(hub.history("me/one")) == 3


def test_a_commit_is_all_or_nothing_and_sees_conflicts(hub: Any, api: HfApi) -> None:
    first = hub.commit("me/one", {"a.txt": "1"})
    hub.commit("me/one", {"a.txt": "2"})
    add = [CommitOperationAdd("b.txt", b"b")]
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since") as caught:
        api.create_commit("me/one", add, commit_message="late", parent_commit=first.oid)
    assert caught.value.response.status_code == 412
    with pytest.raises(errors.HfHubHTTPError, match="Discussions are disabled") as caught:
        api.create_commit("me/one", [CommitOperationAdd("b.txt", b"b")], commit_message="pr", create_pr=True)
    assert caught.value.response.status_code == 403
    with pytest.raises(errors.RevisionNotFoundError):
        api.create_commit("me/one", [CommitOperationAdd("b.txt", b"b")], commit_message="x", revision="nope")
    assert hub.files("me/one") == {"a.txt": b"2"}


def test_a_commit_in_between_is_a_conflict(hub: Any, api: HfApi) -> None:
    head = hub.commit("me/one", {"a.txt": "1"})
    hub.faults.call(lambda: hub.commit("me/one", {"theirs.txt": "t"}), "/api/models/me/one/commit/*", "POST")
    with pytest.raises(errors.HfHubHTTPError) as caught:
        api.create_commit("me/one", [CommitOperationAdd("b.txt", b"b")], commit_message="x", parent_commit=head.oid)
    assert caught.value.response.status_code == 412
    assert set(hub.files("me/one")) == {"a.txt", "theirs.txt"}


def test_branches_and_tags(hub: Any, api: HfApi) -> None:
    hub.commit("me/one", {"a.txt": "1"})
    api.create_branch("me/one", branch="feature/x")
    api.create_tag("me/one", tag="v1", tag_message="the first")
    api.upload_file(repo_id="me/one", path_or_fileobj=b"2", path_in_repo="a.txt", revision="feature/x")
    api.upload_file(repo_id="me/one", path_or_fileobj=b"3", path_in_repo="a.txt")
    refs = api.list_repo_refs("me/one")
    assert {ref.name for ref in refs.branches} == {"main", "feature/x"}
    assert [(ref.name, ref.ref) for ref in refs.tags] == [("v1", "refs/tags/v1")]
    for revision, content in (("main", "3"), ("feature/x", "2"), ("v1", "1"), (refs.tags[0].target_commit, "1")):
        assert text(api.hf_hub_download("me/one", "a.txt", revision=revision)) == content
        assert api.model_info("me/one", revision=revision).sha == hub.repo("me/one").resolve(revision).oid
    for create in (api.create_branch, api.create_tag):
        key, name = ("branch", "feature/x") if create == api.create_branch else ("tag", "v1")
        with pytest.raises(errors.HfHubHTTPError) as caught:
            create("me/one", **{key: name})
        assert caught.value.response.status_code == 409
        create("me/one", **{key: name}, exist_ok=True)
    api.delete_branch("me/one", branch="feature/x")
    api.delete_tag("me/one", tag="v1")
    assert set(hub.repo("me/one").branches) == {"main"}
    assert not hub.repo("me/one").tags
    with pytest.raises(errors.HfHubHTTPError):
        api.delete_branch("me/one", branch="main")


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_snapshot_and_what_was_fetched(hub: Any, api: HfApi) -> None:
    files = {"a.txt": b"a", "sub/deep/b.json": b"{}", "w.safetensors": BIG}
    hub.commit("me/one", files)
    hub.requests.clear()
    path = Path(api.snapshot_download("me/one", allow_patterns=["*.json", "*.safetensors"]))
    assert sorted(hub.fetched("me/one")) == ["sub/deep/b.json", "w.safetensors"]
    assert {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()} == {
        name: content for name, content in files.items() if name != "a.txt"
    }
    assert path.is_relative_to(hub.cache)
    hub.requests.clear()
    api.hf_hub_download("me/one", "w.safetensors")
    assert hub.fetched("me/one") == []  # from the cache
    hub.offline()
    hub.requests.clear()
    assert Path(api.hf_hub_download("me/one", "w.safetensors")).read_bytes() == BIG
    with pytest.raises(errors.LocalEntryNotFoundError):
        api.hf_hub_download("me/one", "a.txt")
    assert not hub.requests


def test_trees_and_paths(hub: Any, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.app.page_size = 2
    hub.commit("me/one", {"a.txt": "a", "sub/b.txt": "b", "sub/deep/c.bin": "c"}, message="first")
    hub.commit("me/one", {"a.txt": "aa"}, message="second")
    assert api.list_repo_files("me/one") == [".gitattributes", "a.txt", "sub/b.txt", "sub/deep/c.bin"]
    assert [item.path for item in api.list_repo_tree("me/one", "sub")] == ["sub/b.txt", "sub/deep"]
    last = {i.path: i.last_commit.title for i in api.list_repo_tree("me/one", recursive=True, expand=True)}
    assert (last["a.txt"], last["sub"], last["sub/b.txt"]) == ("second", "first", "first")
    with pytest.raises(errors.RemoteEntryNotFoundError):
        list(api.list_repo_tree("me/one", "none"))
    (info,) = api.get_paths_info("me/one", ["sub/deep/c.bin", "none"])
    assert (info.size, info.lfs.sha256) == (1, hashlib.sha256(b"c").hexdigest())
    info = api.model_info("me/one", files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings}["a.txt"] == 2
    assert api.model_info("me/one", expand=["sha"]).siblings is None


CARD = """---
library_name: peft
base_model: org/base
base_model_relation: adapter
license: apache-2.0
pipeline_tag: text-generation
datasets: [org/data]
language: en
tags: [lora, hf_lora]
---
# A card
"""


def test_search_by_what_the_card_says(hub: Any, api: HfApi) -> None:
    hub.commit("me/adapter", {"README.md": CARD, "adapter_model.safetensors": b"x"})
    hub.commit("lab/other", {"README.md": CARD.replace("org/base", "org/another")})
    hub.commit("me/tuned", {"README.md": "---\nbase_model: [org/base, org/another]\n---\n", "config.json": "{}"})
    hub.commit("you/adapter", {"README.md": CARD})
    hub.repo("you/adapter").private = True
    tags = api.model_info("me/adapter").tags
    assert {"peft", "safetensors", "lora", "hf_lora", "license:apache-2.0", "dataset:org/data", "en"} < set(tags)
    assert {"base_model:org/base", "base_model:adapter:org/base", "text-generation"} < set(tags)
    assert "base_model:finetune:org/another" in api.model_info("me/tuned").tags
    assert api.model_info("me/tuned").library_name == "transformers"

    def found(**query: Any) -> set[str]:
        return {model.id for model in api.list_models(**query)}

    assert found(filter="base_model:org/base") == {"me/adapter", "me/tuned"}
    assert found(filter=["base_model:adapter:org/base", "hf_lora"]) == {"me/adapter"}
    assert found(filter=["base_model:adapter:org/base", "no such tag"]) == set()
    assert found(filter="peft", author="lab") == {"lab/other"}
    assert found(search="ADAPT") == {"me/adapter"}
    assert found(search="adapt", token=hub.other_token) == {"me/adapter", "you/adapter"}
    assert found(pipeline_tag="text-generation") == {"me/adapter", "lab/other"}
    (card,) = [m.card_data for m in api.list_models(search="me/adapter", cardData=True)]
    assert card.base_model == "org/base"
    hub.app.page_size = 1
    assert len(found()) == 3
    assert len(list(api.list_models(limit=2))) == 2


def test_a_card_is_checked_before_anything_is_sent(hub: Any, api: HfApi) -> None:
    hub.create("me/one")

    def push(content: str) -> None:
        api.upload_file(repo_id="me/one", path_or_fileobj=content.encode(), path_in_repo="README.md")

    push(CARD)
    huggingface_hub.ModelCard(CARD).validate()
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push("# no metadata")
    for broken, why in (
        ("---\na: [\n---\n", "YAML"),
        ("---\nbase_model_relation: cousin\n---\n", "base_model_relation"),
        ("---\ntags: [1]\n---\n", "tags"),
        ("---\nmodel-index:\n- name: x\n  results:\n  - task: {name: y}\n    metrics: []\n---\n", "task.type"),
    ):
        with pytest.raises(ValueError, match=why):
            push(broken)
    assert len(hub.history("me/one")) == 2


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_status_so_many_times(hub: Any, api: HfApi) -> None:
    hub.commit("me/one", {"a.txt": "a"})
    fault = hub.faults.status(500, "/api/models/me/one*", times=2, message="down for tea")
    for _ in range(2):
        with pytest.raises(errors.HfHubHTTPError, match="500"):
            api.model_info("me/one")
    assert api.model_info("me/one").id == "me/one"
    assert fault.hits == 2
    assert [request.status for request in hub.requests] == [500, 500, 200]


def test_retry_after_is_what_the_client_waits(hub: Any, api: HfApi) -> None:
    hub.create("me/one")
    hub.faults.status(429, "*/preupload/*", "POST", headers={"Retry-After": "7"})
    hub.faults.status(503, "*/preupload/*", "POST")
    api.upload_file(repo_id="me/one", path_or_fileobj=b"x", path_in_repo="a.txt")
    assert hub.waits[0] == 8  # the client adds one second; nobody waited in this test
    assert hub.files("me/one") == {"a.txt": b"x"}


def test_a_delay_and_a_hang_end_in_a_timeout(hub: Any, api: HfApi) -> None:
    hub.commit("me/one", {"a.txt": "a"})
    hub.faults.delay(0.01, "*/resolve/*")
    assert text(api.hf_hub_download("me/one", "a.txt")) == "a"
    hub.patience(0.2)
    hub.faults.hang("*/resolve/*", "HEAD", times=None)
    with pytest.raises(errors.LocalEntryNotFoundError):
        api.hf_hub_download("me/one", "a.txt", cache_dir=hub.home / "empty")
    assert hub.requests[-1].status is None


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client keeps whole chunks only: 10 MiB, which no test sends."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_broken_download_resumes(hub: Any, api: HfApi, small_chunks: None, fault: str) -> None:
    hub.commit("me/one", {"w.safetensors": BIG})
    hub.patience(0.3)
    getattr(hub.faults, fault)("*/resolve/*", after=5000)
    assert Path(api.hf_hub_download("me/one", "w.safetensors")).read_bytes() == BIG
    ranges = [request.range for request in hub.asked("GET", ".*resolve.*")]
    assert ranges == [None, "bytes=4096-"]


def test_a_download_that_is_always_cut_leaves_nothing(hub: Any, api: HfApi) -> None:
    hub.commit("me/one", {"w.safetensors": BIG})
    hub.faults.cut("*/resolve/*", times=None, after=100)
    with pytest.raises(Exception, match=r"(?i)peer closed|incomplete|disconnected"):
        api.hf_hub_download("me/one", "w.safetensors")
    assert not huggingface_hub.try_to_load_from_cache("me/one", "w.safetensors")


def test_a_commit_whose_answer_is_lost(hub: Any, api: HfApi) -> None:
    hub.create("me/one")
    hub.faults.drop("*/commit/*", "POST")
    with pytest.raises(Exception, match=r"(?i)disconnected"):
        api.upload_file(repo_id="me/one", path_or_fileobj=b"x", path_in_repo="a.txt")
    assert hub.files("me/one") == {"a.txt": b"x"}  # it was made all the same


def test_what_the_client_does_not_notice(hub: Any, api: HfApi) -> None:
    """Content is not checked against its ETag by the client over plain HTTP: whoever loads it has to."""
    hub.commit("me/one", {"w.safetensors": BIG, "v.safetensors": BIG})
    hub.faults.corrupt("*/w.safetensors", at=-1)
    got = Path(api.hf_hub_download("me/one", "w.safetensors")).read_bytes()
    assert len(got) == len(BIG)
    assert got[:-1] == BIG[:-1]
    assert got[-1] == BIG[-1] ^ 0xFF
    hub.faults.wrong_etag("*/v.safetensors", etag="a" * 40)
    path = Path(api.hf_hub_download("me/one", "v.safetensors"))
    assert path.resolve().name == "a" * 40
    hub.faults.without_header("X-Repo-Commit", "*/resolve/*", "HEAD")
    with pytest.raises(errors.LocalEntryNotFoundError) as caught:
        api.hf_hub_download("me/one", ".gitattributes", revision="main")
    assert "X-Repo-Commit" in str(caught.value.__cause__)


def test_faults_end_with_the_test_and_what_hangs_is_let_go(hub: Any, api: HfApi) -> None:
    hub.commit("me/one", {"a.txt": "a"})
    hub.faults.hang("*/resolve/*", times=None)
    seen: list[BaseException] = []

    def ask() -> None:
        try:
            api.hf_hub_download("me/one", "a.txt", etag_timeout=30)
        except errors.LocalEntryNotFoundError as error:
            seen.append(error)
        except errors.HfHubHTTPError as error:  # pragma: no cover
            seen.append(error)
        except Exception as error:  # noqa: BLE001  # whatever the transport calls a closed connection
            seen.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not hub.asked("HEAD"):
        thread.join(0.01)
    hub.faults.clear()
    thread.join(20)
    assert not thread.is_alive()
    assert seen
    assert text(api.hf_hub_download("me/one", "a.txt")) == "a"


def test_nobody_listens(hub: Any, api: HfApi) -> None:
    hub.commit("me/one", {"a.txt": "a", "b.txt": "b"})
    huggingface_hub.hf_hub_download("me/one", "a.txt")
    hub.unreachable()
    assert text(huggingface_hub.hf_hub_download("me/one", "a.txt")) == "a"
    with pytest.raises(errors.LocalEntryNotFoundError):
        huggingface_hub.hf_hub_download("me/one", "b.txt")


# ---- how this process and its children find the hub ------------------------------------------------------------------


def test_one_hub_a_test(hub: Any) -> None:
    assert not hub.store.repos
    assert not hub.requests


def test_no_module_keeps_what_the_client_was_pointed_at_before(hub: Any) -> None:
    """A name that was copied from `constants` still has the old value: it belongs into hub/client.py."""
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401

    assert hub.url == constants.ENDPOINT
    default, home = constants._HF_DEFAULT_ENDPOINT, os.path.join(HF_HOME, "")
    stale = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("huggingface_hub", "transformers", "peft", "accelerate"):
            continue
        for key, value in list(vars(module).items() if module is not None else ()):
            old = isinstance(value, str) and (value == default or value.startswith((default + "/{", home)))
            if (old and not key.startswith("_HF_DEFAULT")) or (isinstance(value, HfApi) and value.endpoint != hub.url):
                stale.append(f"{name}.{key}")
    # The commands `hf` and `accelerate` run in child processes; no test unpacks a repo's own code.
    harmless = (
        "accelerate.commands",
        "huggingface_hub.cli",
        "transformers.utils",
        "transformers.file_utils",  # the same names, for old code
        "transformers.dynamic_module_utils",
    )
    assert [name for name in stale if not name.startswith(harmless)] == []


def test_a_child_process_uses_the_environment(hub: Any) -> None:
    code = """
import huggingface_hub as h
repo = h.create_repo("kid").repo_id
print(h.whoami()["name"], h.upload_file(repo_id=repo, path_or_fileobj=b"x", path_in_repo="w.bin").oid)
print(h.hf_hub_download("me/kid", "w.bin"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **hub.env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    head, path = done.stdout.split("\n")[:2]
    assert head == f"me {hub.history('me/kid')[0].oid}"
    assert Path(path).is_relative_to(hub.cache)
    assert len(hub.asked("PUT", "/lfs/.*")) == 1  # git-lfs: xet is off


# ---- whole libraries -------------------------------------------------------------------------------------------------


def test_a_transformers_model_goes_and_comes_back(hub: Any, tiny: Any, batch: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.push_to_hub("me/base", private=True)
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files("me/base"))
    assert hub.repo("me/base").private
    back = AutoModelForCausalLM.from_pretrained("me/base")
    inputs = batch(model)
    assert torch.equal(logits(model, inputs), logits(back, inputs))
    hub.login(None)
    with pytest.raises(OSError, match="me/base is not a local folder and is not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained("me/base", cache_dir=hub.home / "empty")


def test_a_peft_adapter_goes_and_comes_back(hub: Any, tiny: Any, batch: Any, peft: Any) -> None:
    from transformers import AutoModelForCausalLM

    tiny("llama").push_to_hub("me/base")
    base = AutoModelForCausalLM.from_pretrained("me/base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.push_to_hub("me/adapter")
    assert set(hub.files("me/adapter")) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    inputs = batch(base)
    hub.requests.clear()
    back = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/base"), "me/adapter")
    assert torch.equal(logits(model, inputs), logits(back, inputs))
    assert set(hub.fetched("me/adapter")) == {"adapter_config.json", "adapter_model.safetensors"}
    whole = AutoModelForCausalLM.from_pretrained("me/adapter")
    assert torch.equal(logits(model, inputs), logits(whole, inputs))


def test_our_adapter_is_read_from_it_by_us_and_by_peft(
    hub: Any, tiny: Any, batch: Any, peft: Any, tmp_path: Path
) -> None:
    import hf_lora

    model = tiny("llama")
    model.add_lora(hf_lora.LoRAConfig(r=2, target_modules=["q", "v"]))
    randomise(model)
    model.save_lora(tmp_path)
    HfApi().create_repo("me/ours")
    HfApi().upload_folder(repo_id="me/ours", folder_path=tmp_path)
    ours = tiny("llama")
    assert ours.load_lora("me/ours") == "me/ours"
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), "me/ours")
    inputs = batch(model)
    assert torch.equal(logits(model, inputs), logits(ours, inputs))
    torch.testing.assert_close(logits(theirs, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)

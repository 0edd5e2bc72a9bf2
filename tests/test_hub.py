"""Adapters to and from a hub over HTTP, by the unmodified client: what is pushed, what is pulled, what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelInfo
from loras import bits, logits, randomise
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import hf_lora
from hf_lora import (
    LoRAAdapter,
    LoRAConfig,
    LoRAFileError,
    LoRAHubError,
    LoRAMismatchError,
    LoRANameError,
    LoRAUnsupportedError,
    hub_errors,
)
from hf_lora.facts import RunFacts

BASE = "lab/base"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG, WEIGHTS, "README.md"}
RUN = RunFacts(
    30,
    epochs=1.0,
    settings={"learning_rate": 2e-4},
    losses=((10, 2.5), (20, 1.5), (30, 1.25)),
    evaluations=((30, {"eval_loss": 1.375}),),
    datasets=("lab/corpus",),
)


@pytest.fixture
def trained(tiny):
    """A tiny base, known as lab/base, with a trained adapter."""

    def build(seed: int = 0, **config: Any) -> Any:
        model = tiny("llama")
        model.config._name_or_path = BASE
        model.add_lora(LoRAConfig(**{"r": 4, "target_modules": ["q", "v"], "task_type": "CAUSAL_LM", **config}))
        randomise(model, seed)
        return model

    return build


@pytest.fixture
def based(hub, tiny, tmp_path):
    """The tiny base itself lies on the hub."""
    tiny("llama").save_pretrained(tmp_path / "base")
    hub.commit(BASE, {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})


def metadata(readme: bytes) -> dict[str, Any]:
    return yaml.safe_load(readme.decode().split("---")[1])


def refused(kind: str) -> Any:
    """Expects a `LoRAHubError` of this kind."""
    return _Refused(kind)


class _Refused:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> Any:
        self.raised = pytest.raises(LoRAHubError)
        self.caught = self.raised.__enter__()
        return self.caught

    def __exit__(self, *found: Any) -> bool:
        done = self.raised.__exit__(*found)
        assert self.caught.value.kind == self.kind, self.caught.value
        assert self.caught.value.remedy
        return bool(done)


# ---- push ------------------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_of_three_files(hub, trained):
    model = trained()
    hf_lora.model.require(model).entry("default").record.run = RUN
    info = model.push_adapter_to_hub("me/task", commit_message="first")
    assert [(commit.oid, commit.title) for commit in hub.history("me/task")] == [(info.oid, "first")]
    assert hub.files("me/task").keys() == FILES
    posted = hub.asked("POST", "/api/models/me/task/commit/.*")
    assert len(posted) == 1
    assert json.loads(hub.files("me/task")[CONFIG])["base_model_name_or_path"] == BASE
    readme = hub.files("me/task")["README.md"]
    said = metadata(readme)
    assert (said["base_model"], said["base_model_relation"], said["library_name"]) == (BASE, "adapter", "peft")
    assert said["datasets"] == ["lab/corpus"]
    assert said["model-index"][0]["results"][0]["metrics"] == [{"type": "loss", "value": 1.375, "name": "loss"}]
    assert "| 30 | 1.25 | 1.375 |" in readme.decode()
    assert 'model.load_lora("me/task")' in readme.decode()


def test_what_is_pushed_is_the_adapter_bit_for_bit(hub, trained, tmp_path):
    model = trained()
    model.push_adapter_to_hub("task")  # the namespace is the token's user
    want = model.lora_state_dict()
    folder = hub.download("me/task", tmp_path)
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(want)
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in want.items())


def test_pulled_elsewhere_by_us_by_peft_and_by_an_auto_class(hub, trained, tiny, based, batch, peft):
    model = trained()
    model.push_adapter_to_hub("me/task")
    inputs = batch(model)
    want = logits(model, inputs)
    fresh = tiny("llama")
    assert fresh.load_lora("me/task") == "me/task"
    assert torch.equal(logits(fresh, inputs), want)
    by_peft = peft.PeftModel.from_pretrained(tiny("llama"), "me/task").eval()
    assert torch.allclose(logits(by_peft, inputs), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    auto = AutoModelForCausalLM.from_pretrained("me/task")
    assert auto.active_lora is not None
    assert torch.equal(logits(auto, inputs), want)
    assert not torch.equal(logits(tiny("llama"), inputs), want)


@pytest.mark.slow
def test_pulled_in_another_process(hub, trained, tiny, based, batch, tmp_path):
    model = trained()
    model.push_adapter_to_hub("me/task")
    inputs = batch(model)
    torch.save(inputs, tmp_path / "inputs.pt")
    script = (
        "import sys, torch, hf_lora\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({BASE!r})\n"
        "model.load_lora('me/task')\n"
        "with torch.no_grad():\n"
        f"    torch.save(model.eval()(**torch.load({str(tmp_path / 'inputs.pt')!r})).logits, sys.argv[1])\n"
    )
    env = {**os.environ, **hub.env, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out.pt")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(model, inputs))


def test_a_value_is_pushed_and_pulled(hub, trained, tmp_path, monkeypatch):
    adapter = trained().lora_adapter()
    adapter.push("me/task", run=RUN, private=True)
    assert hub.repo("me/task").private
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "task").mkdir(parents=True)  # a folder of that name: pull asks the hub all the same
    pulled = LoRAAdapter.pull("me/task")
    assert pulled.factors.keys() == adapter.factors.keys()
    assert all(pulled.factors[path].equal(factors) for path, factors in adapter.factors.items())
    with pytest.raises(LoRAFileError, match=r"no such file|does not exist"):
        LoRAAdapter.load("me/task")


def test_only_the_two_files_are_fetched(hub, trained, tiny):
    model = trained()
    model.push_adapter_to_hub("me/task")
    hub.commit("me/task", {"optimizer.pt": b"x" * 100, "notes.txt": "y"})
    hub.requests.clear()
    tiny("llama").load_lora("me/task")
    assert hub.fetched("me/task") == [CONFIG, WEIGHTS]
    assert {request.path.rpartition("/")[2] for request in hub.requests} == {CONFIG, WEIGHTS}


def test_both_files_are_of_one_commit(hub, trained, tiny):
    model, later = trained(0), trained(1, r=2)
    model.push_adapter_to_hub("me/task")
    later.push_adapter_to_hub("me/later")
    first, files = hub.history("me/task")[0].oid, hub.files("me/later")
    hub.faults.call(lambda: hub.commit("me/task", files), f"*/resolve/*/{WEIGHTS}", "HEAD")
    pulled = LoRAAdapter.pull("me/task")
    assert hub.history("me/task")[0].oid != first
    assert pulled.config.r == 4
    want = model.lora_adapter().factors
    assert all(torch.equal(pulled.factors[path].A, want[path].A) for path in want)
    assert LoRAAdapter.pull("me/task").config.r == 2


def test_adapters_in_folders_of_one_repo(hub, trained, tiny, batch):
    one, two = trained(0), trained(1, r=2)
    one.push_adapter_to_hub("me/many", subfolder="one")
    first = hub.files("me/many")["README.md"].decode()
    two.push_adapter_to_hub("me/many", subfolder="more/two")
    names = {"one", "more/two"}
    assert hub.files("me/many").keys() == {f"{n}/{f}" for n in names for f in (CONFIG, WEIGHTS)} | {"README.md"}
    assert [set(c.files) for c in hub.history("me/many")][1] == {f"one/{f}" for f in (CONFIG, WEIGHTS)} | {
        "README.md",
        ".gitattributes",
    }
    readme = hub.files("me/many")["README.md"].decode()
    section = first[first.index('"subfolder": "one"') : first.rindex("<!-- hf_lora:end -->")]
    assert section in readme  # the other's push left it as it was
    assert readme.count("hf_lora:begin") == 3  # the list and two adapters
    assert 'subfolder="more/two"' in readme
    assert metadata(readme.encode())["base_model"] == BASE
    fresh = tiny("llama")
    inputs = batch(fresh)
    hub.requests.clear()
    assert fresh.load_lora("me/many", subfolder="more/two") == "me/many/more/two"
    assert hub.fetched("me/many") == [f"more/two/{CONFIG}", f"more/two/{WEIGHTS}"]
    assert torch.equal(logits(fresh, inputs), logits(two, inputs))
    fresh.load_lora("me/many", subfolder="one", name="one")
    fresh.set_lora("one")
    assert torch.equal(logits(fresh, inputs), logits(one, inputs))


@pytest.mark.parametrize("subfolder", ["../up", "a/../b", "a\\b", "a//b", ".git", "a\nb"])
def test_a_folder_stays_inside_the_repo(hub, trained, subfolder):
    with pytest.raises(LoRAFileError, match="no folder inside"):
        trained().push_adapter_to_hub("me/task", subfolder=subfolder)
    with pytest.raises(LoRAFileError, match="no folder inside"):
        LoRAAdapter.pull("me/task", subfolder=subfolder)
    assert not hub.requests


def test_a_folders_name_is_the_same_with_slashes_around_it(hub, trained, tiny):
    trained().push_adapter_to_hub("me/many", subfolder="/one/")
    assert tiny("llama").load_lora("me/many", subfolder="/one/") == "me/many/one"


def test_a_revision_of_a_folder_is_refused(hub, trained, tiny, tmp_path, monkeypatch):
    """It would be the folder's adapter and not that of the repo's branch."""
    monkeypatch.chdir(tmp_path)
    trained(0).push_adapter_to_hub("me/task", revision="v2")
    trained(1).save_lora("me/task")
    fresh = tiny("llama")
    for load in (LoRAAdapter.load, fresh.load_lora):
        with pytest.raises(LoRAFileError, match="is a folder here, and a folder has no revision 'v2'"):
            load("me/task", revision="v2")
    fresh.load_lora(LoRAAdapter.pull("me/task", revision="v2"))


def test_the_owners_words_survive_a_second_push(hub, trained):
    trained(0).push_adapter_to_hub("me/task")
    readme = hub.files("me/task")["README.md"].decode()
    edited = (
        readme.replace("---\n\n", "language:   [en] # English\nlicense: mit\n---\n\nMy own words.\n\n", 1)
        + "\nAnd more.\n"
    )
    hub.commit("me/task", {"README.md": edited})
    trained(1, r=2).push_adapter_to_hub("me/task")
    now = hub.files("me/task")["README.md"].decode()
    assert "language:   [en] # English\nlicense: mit\n" in now
    assert "\nMy own words.\n" in now
    assert now.endswith("\nAnd more.\n")
    assert "| rank | 2 |" in now
    assert "| rank | 4 |" not in now
    assert now.count("hf_lora:begin") == 1


def test_words_of_ones_own(hub, trained, tmp_path, monkeypatch):
    model = trained()
    model.push_adapter_to_hub("me/text", card="# Mine\n\nText.\n")
    assert "# Mine\n\nText." in hub.files("me/text")["README.md"].decode()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# From a file\n", encoding="utf-8")
    model.push_adapter_to_hub("me/file", card=tmp_path / "README.md")
    readme = hub.files("me/file")["README.md"]
    assert metadata(readme)["license"] == "mit"
    assert "# From a file" in readme.decode()
    model.push_adapter_to_hub("me/card", card=ModelCard("---\nlicense: mit\n---\n# A card\n"))
    readme = hub.files("me/card")["README.md"]
    assert metadata(readme)["license"] == "mit"
    assert metadata(readme)["base_model"] == BASE
    for missing in (tmp_path / "missing.md", "missing.md"):
        with pytest.raises(LoRAFileError, match="cannot be read"):
            model.push_adapter_to_hub("me/none", card=missing)
    assert "me/none" not in hub.store.repos
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my words").write_text("# From a file\n", encoding="utf-8")
    for name in ("README.md", "my words"):  # a string that names a file is no text
        model.push_adapter_to_hub("me/named", card=name)
        assert "# From a file" in hub.files("me/named")["README.md"].decode()
        assert f"\n{name}\n" not in hub.files("me/named")["README.md"].decode()


def test_metadata_that_does_not_parse_stops_the_push(hub, trained):
    hub.commit("me/task", {"README.md": "---\na: 1\na: 2\n---\nwords\n"})
    with pytest.raises(LoRAFileError, match=r"metadata of README\.md has the key 'a' twice"):
        trained().push_adapter_to_hub("me/task")
    with pytest.raises(LoRAFileError, match=r"metadata of the card cannot be read, line 3"):
        trained().push_adapter_to_hub("me/new", card="---\na: 1\nb: [1\n---\nwords\n")
    assert hub.files("me/task").keys() == {"README.md"}
    assert "me/new" not in hub.store.repos  # what is wrong on this side is seen before a repo is made
    hub.commit("me/task", {"README.md": "---\nbase_model: other/one\n---\nwords\n"})
    with pytest.raises(LoRAMismatchError, match="says base_model: other/one"):
        trained().push_adapter_to_hub("me/task")
    assert hub.files("me/task").keys() == {"README.md"}
    hub.commit("me/task", {"README.md": "---\nlanguage: 5\n---\nwords\n"})
    with refused("card") as caught:  # the hub's own check
        trained().push_adapter_to_hub("me/task")
    assert "language" in str(caught.value)
    assert hub.files("me/task").keys() == {"README.md"}


def test_somebody_elses_push_in_between_is_not_overwritten(hub, trained):
    model = trained()
    model.push_adapter_to_hub("me/task")
    hub.faults.call(lambda: hub.commit("me/task", {"README.md": "theirs"}), "*/commit/main", "POST")
    with refused("changed") as caught:
        trained(1).push_adapter_to_hub("me/task")
    assert caught.value.status == 412
    assert hub.files("me/task")["README.md"] == b"theirs"
    assert len(hub.history("me/task")) == 2
    trained(1).push_adapter_to_hub("me/task")
    assert hub.files("me/task")["README.md"].startswith(b"---\n")
    assert b"theirs" in hub.files("me/task")["README.md"]


def test_a_branch_is_made(hub, trained, tiny):
    model = trained()
    model.push_adapter_to_hub("me/task", revision="v2/next")
    assert hub.files("me/task") == {}
    assert hub.files("me/task", "v2/next").keys() == FILES
    model.push_adapter_to_hub("me/task", revision="v2/next", commit_message="again")
    fresh = tiny("llama")
    fresh.load_lora("me/task", revision="v2/next")
    with refused("missing file"):
        fresh.load_lora("me/task", name="main")
    assert fresh.lora_names == ("me/task",)


def test_one_of_several_adapters(hub, trained):
    model = trained()
    model.add_lora(LoRAConfig(r=2, target_modules=["k"]), "other")
    model.set_lora(None)
    with pytest.raises(LoRANameError, match="2 adapters"):
        model.push_adapter_to_hub("me/task")
    assert not hub.requests
    model.push_adapter_to_hub("me/task", adapter="default")
    assert json.loads(hub.files("me/task")[CONFIG])["r"] == 4


# ---- what is not for the public --------------------------------------------------------------------------------------


def test_nothing_of_this_machine_is_published(hub, trained, tmp_path):
    model = trained()
    model.config._name_or_path = str(tmp_path / "models--lab--base" / "snapshots" / ("a" * 40))
    secret = "/home/somebody/cache"
    config = LoRAConfig(
        r=4,
        target_modules=["q_proj"],
        base_model=model.config._name_or_path,
        peft_fields={"corda_config": {"cache_file": secret}, "megatron_core": "megatron.core"},
    )
    model.remove_lora()
    model.add_lora(config)
    randomise(model)
    run = dataclasses.replace(RUN, settings={"output_dir": secret, "seed": 1}, datasets=("/data/mine", "lab/x"))
    hf_lora.model.require(model).entry("default").record.run = run
    model.push_adapter_to_hub("me/task", private=True)
    pushed = hub.files("me/task")
    everything = b"\n".join(pushed.values())
    assert pushed.keys() == FILES
    for path in (secret, str(tmp_path), "/data/mine", "snapshots"):
        assert path.encode() not in everything
    assert json.loads(pushed[CONFIG])["base_model_name_or_path"] == BASE


def test_a_token_is_not_published(hub, trained):
    token = "hf_" + "aB3" * 12
    for options in ({"card": f"my token is {token}"}, {"commit_message": token}):
        with pytest.raises(LoRAFileError, match="looks like a token") as caught:
            trained().push_adapter_to_hub("me/task", **options)
        assert token not in str(caught.value)
    adapter = trained().lora_adapter()
    adapter = LoRAAdapter.of(dataclasses.replace(adapter, config=adapter.config.replace(revision=token)))
    with pytest.raises(LoRAFileError, match="looks like a token"):
        adapter.push("me/task")
    assert not hub.store.repos


@pytest.mark.parametrize("name", ["", "/models/base", "./base", "a/b/c", "folder"])
def test_a_base_without_an_id_is_asked_for(hub, trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    model = trained()
    adapter = model.lora_adapter()
    model.config._name_or_path = name
    adapter = LoRAAdapter.of(dataclasses.replace(adapter, config=adapter.config.replace(base_model=name)))
    with pytest.raises(LoRAMismatchError, match='base_model="org/name"'):
        adapter.push("me/task")
    assert not hub.requests
    adapter.push("me/task", base_model=BASE)
    assert json.loads(hub.files("me/task")[CONFIG])["base_model_name_or_path"] == BASE


def test_a_folder_with_the_name_of_the_base_is_no_reason_to_refuse_its_id(hub, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / BASE).mkdir(parents=True)
    model = trained()
    with pytest.raises(LoRAMismatchError, match="is a folder"):  # which of the two was loaded?
        model.push_adapter_to_hub("me/task")
    model.push_adapter_to_hub("me/task", base_model=BASE)
    assert json.loads(hub.files("me/task")[CONFIG])["base_model_name_or_path"] == BASE
    assert [found.repo_id for found in hf_lora.list_adapters(BASE)] == ["me/task"]


def test_push_to_hub_of_transformers_pushes_the_adapter_with_its_card(hub, trained, tiny, tmp_path):
    model = trained()
    info = model.push_to_hub("me/task", commit_message="as ever", private=True)
    assert [(commit.oid, commit.title) for commit in hub.history("me/task")] == [(info.oid, "as ever")]
    assert hub.files("me/task").keys() == FILES
    assert metadata(hub.files("me/task")["README.md"])["base_model"] == BASE
    with pytest.raises(LoRAUnsupportedError, match="max_shard_size, tags"):
        model.push_to_hub("me/task", tags=["x"], max_shard_size="1GB")
    model = trained()
    model.config._name_or_path = str(tmp_path)
    config = model.lora_adapter().config.replace(base_model=str(tmp_path))
    model.add_lora(config, "default", replace=True)
    randomise(model)
    with pytest.raises(LoRAMismatchError, match="is a folder"):
        model.push_to_hub("me/path")
    assert "me/path" not in hub.store.repos
    model.merge_lora()
    model.push_to_hub("me/whole")
    tiny("llama").push_to_hub("me/base")
    assert "model.safetensors" in hub.files("me/whole")
    assert "model.safetensors" in hub.files("me/base")


def test_an_adapter_that_is_not_fit_is_not_pushed(hub, trained, tiny):
    model = tiny("llama")
    model.config._name_or_path = BASE
    model.add_lora(LoRAConfig(r=4, target_modules=["q"]))
    with pytest.raises(LoRAMismatchError, match="never trained"):
        model.push_adapter_to_hub("me/task")
    assert not hub.requests
    model.push_adapter_to_hub("me/task", force=True)
    assert hub.files("me/task").keys() == FILES
    broken = trained()
    next(p for p in broken.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(LoRAMismatchError, match="NaN"):
        broken.push_adapter_to_hub("me/task")


# ---- onto another base -----------------------------------------------------------------------------------------------


def test_another_base_is_refused(hub, trained, tiny):
    trained().push_adapter_to_hub("me/task")
    other = tiny("llama")
    other.config._name_or_path = "lab/other"
    before = bits(other)
    with pytest.raises(LoRAMismatchError, match="'lab/base', the model is 'lab/other'") as caught:
        other.load_lora("me/task")
    assert "force=True" in caught.value.remedy
    assert bits(other) == before
    assert other.lora_names == ()
    other.load_lora("me/task", force=True)
    mistral = tiny("mistral")  # the same shapes under the same names
    with pytest.raises(LoRAMismatchError, match="'LlamaForCausalLM', the model is a 'MistralForCausalLM'"):
        mistral.load_lora("me/task")
    mistral.load_lora("me/task", force=True)
    gpt2 = tiny("gpt2")
    with pytest.raises(LoRAMismatchError, match="does not fit"):
        gpt2.load_lora("me/task", force=True)
    assert gpt2.lora_names == ()


@pytest.mark.parametrize(
    "name",
    ["", "/some/folder", "mirror/base", "lab/Base", "lab/base-bnb-4bit", "unsloth/base-unsloth-bnb-4bit", "folder/x"],
)
def test_the_same_base_under_another_name(hub, trained, tiny, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "x").mkdir(parents=True)
    trained().push_adapter_to_hub("me/task")
    model = tiny("llama")
    model.config._name_or_path = name
    model.load_lora("me/task")


def test_a_class_with_another_head_is_no_other_base(hub, trained, tiny):
    trained(target_modules=["q", "v"]).push_adapter_to_hub("me/task")
    tiny("llama-cls").load_lora("me/task")


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_adapters_of_a_base_are_found(hub, trained):
    trained(0).push_adapter_to_hub("me/one")
    trained(1).push_adapter_to_hub("lab/two", private=True)
    trained(2).push_adapter_to_hub("me/other", base_model="lab/another")
    hub.commit("me/tuned", {"README.md": f"---\nbase_model: {BASE}\nbase_model_relation: finetune\n---\n"})
    found = hf_lora.list_adapters(BASE)
    assert {adapter.repo_id for adapter in found} == {"me/one", "lab/two"}
    one = next(adapter for adapter in found if adapter.repo_id == "me/one")
    assert "lora" in one.tags
    assert not one.private
    assert one.last_modified is not None
    assert [a.repo_id for a in hf_lora.list_adapters(BASE, author="lab")] == ["lab/two"]
    assert [a.repo_id for a in hf_lora.list_adapters(BASE, search="one")] == ["me/one"]
    assert [a.repo_id for a in hf_lora.list_adapters(BASE, token=False)] == ["me/one"]
    assert len(hf_lora.list_adapters(BASE, limit=1)) == 1
    with pytest.raises(LoRAMismatchError, match="no id"):
        hf_lora.list_adapters("./folder")
    hub.faults.status(503, "/api/models", times=None)
    with refused("server"):
        hf_lora.list_adapters(BASE)


# ---- what goes wrong with a pull -------------------------------------------------------------------------------------


def pull_fails(hub: Any, kind: str, repo_id: str = "me/task", **options: Any) -> LoRAHubError:
    with refused(kind) as caught:
        LoRAAdapter.pull(repo_id, **options)
    assert repo_id in str(caught.value) or repo_id in (caught.value.remedy or "")
    assert hub.token not in str(caught.value).split()
    return caught.value


def test_what_is_missing(hub, trained):
    trained().push_adapter_to_hub("me/task")
    hub.commit("me/empty", {"notes.txt": "x"})
    hub.commit("me/half", {CONFIG: hub.files("me/task")[CONFIG]})
    hub.create("you/secret", private=True)
    pull_fails(hub, "missing repo", "me/none")
    pull_fails(hub, "missing repo", "you/secret")
    assert "token" in pull_fails(hub, "missing repo", "me/none", token=False).remedy
    assert "'nope'" in str(pull_fails(hub, "missing revision", revision="nope"))
    assert CONFIG in str(pull_fails(hub, "missing file", "me/empty"))
    assert WEIGHTS in str(pull_fails(hub, "missing file", "me/half"))
    assert WEIGHTS in str(pull_fails(hub, "missing file", "me/half"))  # from what the cache remembers
    assert "in sub" in str(pull_fails(hub, "missing file", subfolder="sub"))
    for name in ("a b", "a/b/c", "me/task.git", "me/--x", "."):
        pull_fails(hub, "invalid id", name)


def test_access(hub, trained):
    trained().push_adapter_to_hub("me/task")
    hub.repo("me/task").gated = "manual"
    assert pull_fails(hub, "gated", token=hub.other_token).status == 403
    assert pull_fails(hub, "gated", token=False).status == 401
    hub.repo("me/task").gated = False
    hub.repo("me/task").private = True
    wrong = "hf_wrongwrongwrong"
    assert wrong not in str(pull_fails(hub, "wrong token", token=wrong))
    assert pull_fails(hub, "missing repo", token=hub.other_token).status == 404
    hub.login(None)
    pull_fails(hub, "no token", token=True)
    hub.login(hub.token)
    LoRAAdapter.pull("me/task")


def test_offline(hub, trained, tiny):
    model = trained()
    model.push_adapter_to_hub("me/task")
    pull_fails(hub, "offline", local_files_only=True)
    pulled = LoRAAdapter.pull("me/task")
    hub.requests.clear()
    assert LoRAAdapter.pull("me/task", local_files_only=True).equal(pulled)
    hub.offline()
    assert LoRAAdapter.pull("me/task").equal(pulled)
    tiny("llama").load_lora("me/task")
    pull_fails(hub, "offline", "me/other")
    pull_fails(hub, "offline", force_download=True)
    assert not hub.requests


def test_a_half_filled_cache_offline(hub, trained):
    trained().push_adapter_to_hub("me/task")
    hub.faults.status(403, f"*/{WEIGHTS}", "GET")
    pull_fails(hub, "forbidden")
    pull_fails(hub, "offline", local_files_only=True)
    LoRAAdapter.pull("me/task")


def test_unreachable_with_and_without_the_cache(hub, trained):
    trained().push_adapter_to_hub("me/task")
    pulled = LoRAAdapter.pull("me/task")
    hub.unreachable()
    assert LoRAAdapter.pull("me/task").equal(pulled)
    pull_fails(hub, "unreachable", "me/other")


FAULTS = {
    # name -> (kind, how to inject it, {attribute: value} of the error)
    "500": ("server", lambda hub, path: hub.faults.status(500, path, times=None), {"status": 500}),
    "503": ("server", lambda hub, path: hub.faults.status(503, path, times=None), {"status": 503}),
    "429": (
        "rate limited",
        lambda hub, path: hub.faults.status(429, path, times=None, headers={"Retry-After": "7"}),
        {"status": 429, "retry_after": 7.0},
    ),
    "403": ("forbidden", lambda hub, path: hub.faults.status(403, path, times=None), {"status": 403}),
    "409": ("conflict", lambda hub, path: hub.faults.status(409, path, times=None), {"status": 409}),
    "418": ("refused", lambda hub, path: hub.faults.status(418, path, times=None), {"status": 418}),
    "cut": ("cut", lambda hub, path: hub.faults.cut(path, times=None, after=10), {}),
    "stalled": ("stalled", lambda hub, path: hub.faults.stall(path, times=None, after=10), {}),
    "hanging": ("stalled", lambda hub, path: hub.faults.hang(path, times=None), {}),
    "corrupted": ("corrupted", lambda hub, path: hub.faults.corrupt(path, times=None, at=-1), {}),
    "wrong etag": ("corrupted", lambda hub, path: hub.faults.wrong_etag(path, times=None), {}),
    "no commit header": ("no hub", lambda hub, path: hub.faults.without_header("X-Repo-Commit", path, times=None), {}),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_failed_pull_loads_nothing_and_leaves_a_clean_cache(hub, trained, tiny, name, file):
    model = trained()
    model.push_adapter_to_hub("me/task")
    fresh = tiny("llama")
    before = bits(fresh)
    hub.patience(0.2)
    kind, inject, attributes = FAULTS[name]
    inject(hub, f"/me/task/resolve/*/{file}")
    with refused(kind) as caught:
        fresh.load_lora("me/task")
    for key, value in attributes.items():
        assert getattr(caught.value, key) == value
    assert isinstance(caught.value, OSError)
    assert bits(fresh) == before
    assert fresh.lora_names == ()
    hub.faults.clear()
    hub.patience(10)
    fresh.load_lora("me/task")
    got, want = fresh.lora_adapter(), model.lora_adapter()
    assert all(got.factors[path].equal(factors) for path, factors in want.factors.items())


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_damaged_file_is_fetched_once_more(hub, trained, file):
    trained().push_adapter_to_hub("me/task")
    fault = hub.faults.corrupt(f"*/{file}", at=-3)
    LoRAAdapter.pull("me/task")
    assert fault.hits == 1
    assert hub.fetched("me/task").count(file) == 2


def test_an_auto_class_is_not_left_with_a_damaged_config(hub, trained, based, batch):
    model = trained()
    model.push_adapter_to_hub("me/task")
    fault = hub.faults.corrupt(f"/me/task/*/{CONFIG}", at=-3)
    auto = AutoModelForCausalLM.from_pretrained("me/task")
    assert fault.hits == 1
    assert torch.equal(logits(auto, batch(model)), logits(model, batch(model)))


def test_what_others_left_damaged_in_the_cache_is_seen(hub, trained):
    trained().push_adapter_to_hub("me/task")
    pulled = LoRAAdapter.pull("me/task")
    (blob,) = [p for p in (hub.cache / "models--me--task" / "blobs").iterdir() if len(p.name) == 64]
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    pull_fails(hub, "corrupted", local_files_only=True)
    assert LoRAAdapter.pull("me/task").equal(pulled)


def test_a_token_in_what_the_hub_says_is_not_repeated(hub, trained):
    import traceback

    trained().push_adapter_to_hub("me/task")
    secret = hub.add_user("somebody" + "x" * 30)
    for status in (403, 418):
        hub.faults.status(status, "*/resolve/*", times=1, message=f"bad token {secret}, Bearer {secret}")
        with pytest.raises(LoRAHubError) as caught:
            LoRAAdapter.pull("me/task", token=secret)
        shown = "".join(traceback.format_exception(caught.value))
        assert secret not in shown
        assert "hf_…" in str(caught.value)


LIKE_A_TOKEN = "hf_" + "aB3" * 8


@pytest.mark.parametrize(
    ("text", "tokens", "shown"),
    [
        ("token my-secret-token.", ("my-secret-token",), "token hf_…."),  # a hub of one's own: of any form
        ("my-secret-tokens, xmy-secret-token", ("my-secret-token",), "my-secret-tokens, xmy-secret-token"),
        ("ab abc", ("ab", "abc"), "hf_… hf_…"),
        (f"of somebody else: {LIKE_A_TOKEN}", (), "of somebody else: hf_…"),
        ("an old one: api_org_aB3aB3aB3", (), "an old one: hf_…"),
        ("Authorization: Bearer abc.def", (), "Authorization: Bearer hf_…"),
        ("hf_lora, hf_hub_download", (), "hf_lora, hf_hub_download"),
    ],
)
def test_a_text_without_its_tokens(text, tokens, shown):
    assert hub_errors.redacted(text, tokens) == shown


@pytest.mark.parametrize(
    ("text", "tokens", "found"),
    [
        (f"x={LIKE_A_TOKEN};", (), True),
        ("api_org_" + "aB3" * 8, (), True),
        ("x my-secret-token", ("my-secret-token",), True),
        ("the word me", ("me",), False),  # too short to be one: it may be a word
        ("hf_lora, hf_xxxxxxxx", (), False),
    ],
)
def test_a_text_with_a_token(text, tokens, found):
    assert hub_errors.token_in(text, tokens) is found


# ---- what goes wrong with a push -------------------------------------------------------------------------------------


PUSH_FAULTS = {
    "400": ("refused", 400, {}),
    "403": ("forbidden", 403, {}),
    "409": ("conflict", 409, {}),
    "412": ("changed", 412, {}),
    "429": ("rate limited", 429, {"Retry-After": "30"}),
    "500": ("server", 500, {}),
    "504": ("server", 504, {}),
}


@pytest.mark.parametrize("name", PUSH_FAULTS)
def test_a_failed_commit_changes_nothing(hub, trained, name):
    kind, status, headers = PUSH_FAULTS[name]
    hub.faults.status(status, "*/commit/main", "POST", times=None, headers=headers, message="because")
    with refused(kind) as caught:
        trained().push_adapter_to_hub("me/task")
    assert caught.value.status == status
    if headers:
        assert caught.value.retry_after == 30
        assert "30 s" in str(caught.value)
    assert hub.files("me/task") == {}
    hub.faults.clear()
    trained().push_adapter_to_hub("me/task")
    assert hub.files("me/task").keys() == FILES


def test_who_may_push(hub, trained):
    hub.create("you/theirs")
    model = trained()
    with refused("forbidden") as caught:
        model.push_adapter_to_hub("you/theirs")
    assert caught.value.status == 403
    with refused("forbidden"):
        model.push_adapter_to_hub("you/none")
    with refused("wrong token") as caught:
        model.push_adapter_to_hub("me/task", token="hf_nonsense")
    assert "hf_nonsense" not in str(caught.value)
    with refused("no token"):
        model.push_adapter_to_hub("me/task", token=False)
    hub.login(None)
    with refused("no token"):
        model.push_adapter_to_hub("me/task")
    hub.login(hub.add_user("reader", role="read"))
    with refused("forbidden"):
        model.push_adapter_to_hub("reader/task")
    assert set(hub.store.repos) == {"you/theirs"}
    assert hub.files("you/theirs") == {}


def test_a_pull_request_that_is_refused(hub, trained):
    model = trained()
    model.push_adapter_to_hub("me/task")
    with refused("no pull request") as caught:
        model.push_adapter_to_hub("me/task", create_pr=True)
    assert "disabled" in str(caught.value)
    with refused("missing revision"):
        model.push_adapter_to_hub("me/task", create_pr=True, revision="none")
    assert len(hub.history("me/task")) == 1


def test_a_private_push_does_not_become_public(hub, trained):
    hub.create("me/open")
    with refused("visibility"):
        trained().push_adapter_to_hub("me/open", private=True)
    assert hub.files("me/open") == {}
    trained().push_adapter_to_hub("me/open")
    hub.create("me/closed", private=True)
    trained().push_adapter_to_hub("me/closed")
    assert hub.repo("me/closed").private


@pytest.mark.parametrize("repo_id", ["a b", "a/b/c", "", "/tmp/x", "me/x.git"])
def test_an_id_that_is_none(hub, trained, repo_id):
    with refused("invalid id"):
        trained().push_adapter_to_hub(repo_id)
    assert not hub.store.repos


def test_a_push_offline_and_unreachable(hub, trained):
    model = trained()
    for kind, change in (("unreachable", hub.unreachable), ("offline", hub.offline)):
        change()
        for ask in (lambda: model.push_adapter_to_hub("me/task"), lambda: hf_lora.list_adapters("me/task")):
            with refused(kind) as caught:
                ask()
            assert "cache" not in str(caught.value)  # which has no part in it
            assert "folder" not in str(caught.value)


def test_a_connection_that_breaks_during_a_push(hub, trained):
    model = trained()
    hub.faults.drop("*/commit/main", "POST")
    with refused("cut") as caught:
        model.push_adapter_to_hub("me/task")
    assert "Push again" in caught.value.remedy
    model.push_adapter_to_hub("me/task")  # the first was made after all
    assert len(hub.history("me/task")) == 1
    hub.faults.status(500, "/lfs/*", "PUT", times=None)
    with refused("server"):
        trained(1).push_adapter_to_hub("me/task")
    assert len(hub.history("me/task")) == 1


def test_a_full_disk_is_said(hub, trained, monkeypatch):
    trained().push_adapter_to_hub("me/task")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", full)
    pull_fails(hub, "disk")


def test_an_answer_that_the_client_cannot_read():
    """More of them are in test_fuzz_cases.py."""
    with pytest.raises(LoRAHubError, match="not the Hub") as refused, hub_errors.translated("me/task"):
        ModelInfo(sha="x")
    assert refused.value.kind == "strange answer"
    with pytest.raises(KeyError), hub_errors.translated("me/task"):  # not the client's
        {}["id"]


def test_every_kind_is_shown_by_a_test_here():
    kinds = {case.kind for case in hub_errors._CASES}
    text = Path(__file__).read_text(encoding="utf-8")
    assert {kind for kind in kinds if f'"{kind}"' not in text} <= {"disabled", "not cached", "failed"}

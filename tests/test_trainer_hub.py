"""What stock Trainer pushes for a model with our LoRA, over HTTP: after every push the repo holds a whole adapter."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.runs import SAVE, SEVERAL, STEPS, model_with, trainer
from loras import bits, logits

import hf_lora

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: install hf_lora[test]")

STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
ADAPTERS: dict[str, tuple[str, ...]] = {"one adapter": ("org/task",), "several": SEVERAL}
FILES = ("adapter_config.json", "adapter_model.safetensors")
# Where a checkpoint keeps each adapter.
FOLDERS: dict[str, tuple[str, ...]] = {"one adapter": ("",), "several": ("lora-org%2Ftask/", "lora-second/")}
SAVES = range(SAVE, STEPS + 1, SAVE)


@pytest.fixture
def base(hub: Any, tiny: Any) -> Any:
    """The tiny llama, which lies on the hub as me/base."""
    model = tiny("llama")
    model.push_to_hub("me/base")
    return model


@pytest.fixture(scope="module")
def loaded() -> set[Any]:
    return set()


def expected_titles(strategy: str) -> list[str]:
    titles = []
    for step in SAVES if strategy != "end" else ():
        titles.append(f"Training in progress, step {step}")
        if strategy in ("checkpoint", "all_checkpoints"):
            titles.append(f"Training in progress, step {step}, checkpoint")
    return [*titles, "End of training"]


def adapter_files(files: dict[str, bytes], prefix: str = "") -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path in {prefix + name for name in FILES}}


def load_by_us(base: Any, folder: Path) -> Any:
    model = copy.deepcopy(base)
    model.load_lora(folder, name="pulled")
    return model


def check_every_commit(
    hub: Any, base: Any, batch: Any, case: str, strategy: str, run: Path, peft: Any, loaded: set[Any]
) -> None:
    """Each commit of a run against the checkpoint that it stands for; each content is loaded once, by us and PEFT."""
    tmp = run.with_name(f"{run.name}-commits")
    repo = f"me/{run.name}"
    commits = list(reversed(hub.history(repo)))
    assert [commit.title for commit in commits] == expected_titles(strategy)
    inputs = batch(base)
    plain = logits(base, inputs)
    for commit in commits:
        files = hub.files(repo, commit.oid)
        names = {path.rpartition("/")[2] for path in files}
        assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}  # the adapter alone
        assert not [path for path in files if path.endswith(".tmp")]
        step = int(commit.title.split("step ")[1].split(",")[0]) if "step" in commit.title else STEPS
        places = [""]
        if commit.title.endswith("checkpoint"):
            places.append("last-checkpoint/" if strategy == "checkpoint" else f"checkpoint-{step}/")
            assert f"{places[1]}optimizer.pt" in files
        for place in places:
            for folder in FOLDERS[case]:
                found = adapter_files(files, place + folder)
                saved = {place + folder + name: (run / f"checkpoint-{step}" / folder / name) for name in FILES}
                assert found == {path: file.read_bytes() for path, file in saved.items()}
        for folder in FOLDERS[case]:
            content = tuple(sorted(adapter_files(files, folder).values()))
            if content in loaded:  # runs differ in when they push, not in what they learn
                continue
            loaded.add(content)
            tree = hub.download(repo, tmp / commit.oid, commit.oid)
            ours = logits(load_by_us(base, tree / folder), inputs)
            assert not torch.equal(ours, plain)
            if peft is not None:
                theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tree / folder)
                torch.testing.assert_close(logits(theirs, inputs), ours, rtol=1e-5, atol=1e-5)
        assert ("README.md" in files) == (commit.title == "End of training")
    check_card(hub.files(repo)["README.md"].decode(), case, repo)


def check_card(text: str, case: str, repo: str) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "peft"
    assert data["base_model"] == "me/base"
    assert data["base_model_relation"] == "adapter"
    assert {"lora", "hf_lora", "generated_from_trainer"} <= set(data["tags"])
    assert "generated automatically according to the information the Trainer had access to" in text
    assert "### Training hyperparameters" in text  # what Trainer writes stays
    assert f'load_lora("{repo}"' in text
    for folder in FOLDERS[case]:
        assert folder.rstrip("/") in text


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_push_holds_a_whole_adapter(
    hub: Any, base: Any, batch: Any, tmp_path: Path, strategy: str, case: str, loaded: set[Any]
) -> None:
    run = trainer(model_with(ADAPTERS[case]), tmp_path / "run", hub_strategy=strategy)
    run.train()
    run.push_to_hub()
    peft = sys.modules.get("peft") if os.environ.get("HF_LORA_BLOCK_PEFT") == "1" else pytest.importorskip("peft")
    check_every_commit(hub, base, batch, case, strategy, tmp_path / "run", peft, loaded)


@pytest.mark.slow
def test_the_same_without_peft(hub: Any, base: Any, batch: Any, tmp_path: Path, peft: Any) -> None:
    """Trained and pushed by a process in which peft cannot be found; loaded by PEFT here."""
    runs = []
    for case, names in ADAPTERS.items():
        for strategy in STRATEGIES:
            folder = tmp_path / f"{strategy}-{len(names)}"
            runs.append((folder, case, strategy))
    arguments = json.dumps([(str(f), ADAPTERS[case], {"hub_strategy": strategy}) for f, case, strategy in runs])
    program = Path(__file__).with_name("hub") / "runs.py"
    paths = os.pathsep.join([str(Path(hf_lora.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    own = {"HF_LORA_BLOCK_PEFT": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    env = {**os.environ, **hub.env, **own}
    done = subprocess.run(
        [sys.executable, str(program), arguments], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded: set[Any] = set()
    for folder, case, strategy in runs:
        check_every_commit(hub, base, batch, case, strategy, folder, peft, loaded)


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_was_pushed_is_pulled_over_http(
    hub: Any, base: Any, batch: Any, tmp_path: Path, case: str, peft: Any
) -> None:
    model = model_with(ADAPTERS[case])
    run = trainer(model, tmp_path / "run", hub_strategy="every_save")
    run.train()
    run.push_to_hub()
    inputs = batch(base)
    for name, folder in zip(ADAPTERS[case], FOLDERS[case], strict=True):
        model.set_lora(name)
        expected = logits(model.eval(), inputs)
        options = {"subfolder": folder.rstrip("/")} if folder else {}
        ours = copy.deepcopy(base)
        ours.load_lora("me/run", **options)
        torch.testing.assert_close(logits(ours, inputs), expected, rtol=1e-5, atol=1e-5)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), "me/run", **options)
        torch.testing.assert_close(logits(theirs, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ADAPTERS)
def test_resuming_from_the_last_checkpoint_on_the_hub(hub: Any, base: Any, tmp_path: Path, case: str) -> None:
    from huggingface_hub import snapshot_download

    whole = model_with(ADAPTERS[case])
    trainer(whole, tmp_path / "whole", push_to_hub=False, max_steps=6).train()
    first = trainer(model_with(ADAPTERS[case]), tmp_path / "run", hub_strategy="checkpoint")
    first.train()
    first._finish_current_push()
    pulled = snapshot_download("me/run", allow_patterns="last-checkpoint/*", local_dir=tmp_path / "elsewhere")
    again = model_with(ADAPTERS[case])
    second = trainer(again, tmp_path / "elsewhere", push_to_hub=False, max_steps=6)
    second.train(resume_from_checkpoint=str(Path(pulled) / "last-checkpoint"))
    assert second.state.global_step == 6
    assert bits(again) == bits(whole)


def test_a_push_that_is_still_going_on_is_not_disturbed(hub: Any, base: Any, tmp_path: Path) -> None:
    """Without hub_always_push a save during a push is not pushed, and the files of that push are not replaced."""
    from transformers import TrainerCallback

    trained = threading.Event()
    held = hub.faults.call(lambda: trained.wait(60), "*/preupload/*", "POST")
    run = trainer(model_with(("org/task",)), tmp_path / "run", hub_strategy="every_save", hub_always_push=False)

    class Release(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained.set()

    run.add_callback(Release())
    run.train()
    assert held.hits == 1
    (commit,) = hub.history("me/run")
    assert commit.title == f"Training in progress, step {SAVE}"
    saved = {name: (tmp_path / "run" / f"checkpoint-{SAVE}" / name).read_bytes() for name in FILES}
    assert adapter_files(hub.files("me/run")) == saved


def test_every_save_is_pushed_as_it_was_saved(hub: Any, base: Any, tmp_path: Path) -> None:
    """With hub_always_push the next save waits for the push before it, whose files it replaces."""
    waited = threading.Event()
    hub.faults.call(lambda: waited.wait(60), "*/preupload/*", "POST")
    run = trainer(model_with(("org/task",)), tmp_path / "run", hub_strategy="every_save")
    finish = run._finish_current_push

    def noting() -> None:
        waited.set()
        finish()

    run._finish_current_push = noting
    run.train()
    for step, commit in zip(SAVES, reversed(hub.history("me/run")), strict=True):
        saved = {name: (tmp_path / "run" / f"checkpoint-{step}" / name).read_bytes() for name in FILES}
        assert adapter_files(hub.files("me/run", commit.oid)) == saved


def test_the_last_push_waits_before_it_writes(hub: Any, base: Any, tmp_path: Path) -> None:
    run = trainer(model_with(("org/task",)), tmp_path / "run", hub_strategy="every_save", max_steps=SAVE)
    run.train()
    answer = threading.Event()
    hub.faults.call(lambda: answer.wait(60), "*/preupload/*", "POST")
    run._push_from_checkpoint(str(tmp_path / "run" / f"checkpoint-{SAVE}"))
    save, done = run.save_model, []

    def noting(*args: Any, **kwargs: Any) -> None:
        done.append(run.push_in_progress.is_done())
        save(*args, **kwargs)

    run.save_model = noting
    timer = threading.Timer(0.2, answer.set)
    timer.start()
    run.push_to_hub()
    timer.join()
    assert done == [True]


def test_a_push_that_fails_does_not_end_the_training(hub: Any, base: Any, tmp_path: Path) -> None:
    hub.create("me/run")
    hub.faults.status(500, "*/commit/*", "POST")
    run = trainer(model_with(("org/task",)), tmp_path / "run", hub_strategy="every_save")
    run.train()
    run._finish_current_push()
    assert [commit.title for commit in hub.history("me/run")] == [f"Training in progress, step {STEPS}"]
    saved = {name: (tmp_path / "run" / f"checkpoint-{STEPS}" / name).read_bytes() for name in FILES}
    assert adapter_files(hub.files("me/run")) == saved


# ---- the card --------------------------------------------------------------------------------------------------------


def test_no_token_is_pushed(hub: Any, base: Any, tmp_path: Path) -> None:
    run = trainer(model_with(("a",)), tmp_path / "run", hub_strategy="all_checkpoints", hub_token=hub.token)
    run.train()
    run.push_to_hub()
    assert run.args.hub_token == hub.token
    for commit in hub.history("me/run"):
        files = hub.files("me/run", commit.oid)
        assert "training_args.bin" in files  # as stock
        assert not [name for name, data in files.items() if hub.token.encode() in data]


def test_a_second_push_writes_the_same_kind_of_card(hub: Any, base: Any, tmp_path: Path) -> None:
    """Stock Trainer calls a method of PEFT's models as soon as the README says peft."""
    run = trainer(model_with(("org/task",)), tmp_path / "run", hub_strategy="end")
    run.train()
    run.push_to_hub(tags=["mine"])
    first = hub.files("me/run")["README.md"].decode()
    run.push_to_hub(commit_message="again", tags=["other"])
    second = hub.files("me/run")["README.md"].decode()
    check_card(second, "one adapter", "me/run")
    assert {"mine", "other"} <= set(hub_tags(hub))
    assert second.count("hf_lora:begin") == first.count("hf_lora:begin") == 1


def hub_tags(hub: Any) -> list[str]:
    from huggingface_hub import HfApi

    return HfApi().model_info("me/run").tags or []


def test_somebodys_own_readme_stays(hub: Any, base: Any, tmp_path: Path) -> None:
    run = trainer(model_with(("org/task",)), tmp_path / "run", hub_strategy="end")
    run.train()
    (tmp_path / "run" / "README.md").write_text("---\nlicense: mit\ntags: [poetry]\n---\n# Mine\n\nRead this first.\n")
    run.push_to_hub()
    for _ in range(2):
        text = hub.files("me/run")["README.md"].decode()
        assert "# Mine\n\nRead this first.\n" in text
        assert text.count("hf_lora:begin") == 1
        assert {"license:mit", "poetry", "lora", "base_model:adapter:me/base", "peft"} <= set(hub_tags(hub))
        run.push_to_hub(commit_message="again")


def test_the_run_stands_in_the_card(hub: Any, base: Any, tmp_path: Path) -> None:
    run = trainer(model_with(("org/task",)), tmp_path / "run", hub_strategy="end", eval_strategy="steps", eval_steps=2)
    run.train()
    run.push_to_hub()
    section = (tmp_path / "run" / "README.md").read_text().split("hf_lora:begin")[1]
    last = [entry for entry in run.state.log_history if "eval_loss" in entry][-1]["eval_loss"]
    assert f"{last:.4g}" in section or f"{last:.4f}" in section


def test_a_base_without_an_id_is_asked_for(
    hub: Any, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    model.add_lora(hf_lora.LoRAConfig(r=2, target_modules=["q"]))
    run = trainer(model, tmp_path / "run", hub_strategy="end", max_steps=1)
    run.train()
    run.push_to_hub()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "library_name: peft" in text
    assert "hf_lora:begin" not in text
    assert 'finetuned_from="org/base"' in caplog.text
    run.push_to_hub(finetuned_from="org/base")
    assert {"base_model:adapter:org/base", "peft"} <= set(hub_tags(hub))
    assert "hf_lora:begin" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    "broken",
    [b"---\ntags: [\n---\nmine\n", b"---\na: 1\n---\n<!-- hf_lora:begin {} -->\nmine\n"],
    ids=["yaml", "section"],
)
def test_a_damaged_readme_stays_as_it_is(hub: Any, base: Any, tmp_path: Path, broken: bytes) -> None:
    run = trainer(model_with(("org/task",)), tmp_path / "run", hub_strategy="end", max_steps=1)
    run.train()
    (tmp_path / "run" / "README.md").write_bytes(broken)
    with pytest.raises(hf_lora.LoRAFileError, match=r"README\.md"):
        run.push_to_hub()
    assert (tmp_path / "run" / "README.md").read_bytes() == broken
    assert hub.history("me/run") == []
    run.is_in_train = True  # TRL writes the card at every checkpoint: it is no reason to end a training
    run.create_model_card()
    assert (tmp_path / "run" / "README.md").read_bytes() == broken


def test_trls_card_too(hub: Any, base: Any, tmp_path: Path) -> None:
    base_trainer = pytest.importorskip("trl.trainer.base_trainer", reason="trl is not installed")

    stock = trainer(model_with(("org/task",)), tmp_path / "run", max_steps=1)

    class Trained(base_trainer._BaseTrainer):  # type: ignore[name-defined, misc]
        _tag_names = ("trl",)

    run = Trained(stock.model, stock.args, train_dataset=stock.train_dataset)
    run.train()
    run.push_to_hub()
    text = hub.files("me/run")["README.md"].decode()
    assert "It has been trained using [TRL]" in text
    assert text.count("hf_lora:begin") == 1
    assert {"peft", "trl", "lora", "base_model:adapter:me/base"} <= set(hub_tags(hub))
    run.push_to_hub(commit_message="again")
    assert "It has been trained using [TRL]" in hub.files("me/run")["README.md"].decode()


# ---- models without our LoRA, and what is wrapped --------------------------------------------------------------------


def test_a_model_without_a_lora_pushes_as_stock(hub: Any, base: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Waits(TrainerCallback):
        """Stock Trainer writes the next weights over the file that a background push reads; then that push is lost."""

        def __init__(self, run: Any) -> None:
            self.run = run

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            self.run.push_in_progress.wait_until_done()

    def pushed(where: str) -> dict[str, Any]:
        run = trainer(model_with(()), tmp_path / where / "run", hub_strategy="checkpoint", hub_model_id=f"me/{where}")
        run.add_callback(Waits(run))
        run.train()
        run.push_to_hub(model_name="run")
        commits = reversed(hub.history(f"me/{where}"))
        odd = ("training_args.bin", "trainer_state.json", "optimizer.pt")  # paths and times are in them
        return {
            commit.title: {p: d for p, d in hub.files(f"me/{where}", commit.oid).items() if not p.endswith(odd)}
            for commit in commits
        }

    ours = pushed("ours")
    hf_lora.unregister()
    try:
        stock = pushed("stock")
    finally:
        hf_lora.register()
    assert list(ours) == list(stock)
    assert "library_name: transformers" in ours["End of training"]["README.md"].decode()
    assert ours == stock


def test_a_merged_model_pushes_whole(hub: Any, base: Any, tmp_path: Path) -> None:
    model = model_with(("org/task",))
    run = trainer(model, tmp_path / "run", hub_strategy="end", max_steps=1)
    run.train()
    model.eval()
    model.merge_lora()
    run.args.output_dir = str(tmp_path / "merged")
    run.push_to_hub()
    files = hub.files("me/run")
    assert "model.safetensors" in files
    assert not adapter_files(files)
    assert "library_name: transformers" in files["README.md"].decode()


def test_trainer_has_the_methods_that_are_wrapped() -> None:
    """If this fails, transformers changed `Trainer`: pushes of a LoRA while training need another hook."""
    import transformers
    from transformers import Trainer
    from transformers.modelcard import AUTOGENERATED_TRAINER_COMMENT
    from transformers.trainer_utils import HubStrategy

    from hf_lora.integrations import publishing

    changed = f"transformers {transformers.__version__} changed Trainer"
    stock = {name: inspect.unwrap(vars(Trainer)[name]) for name in publishing._WRAPPED["transformers.trainer"][1]}
    for name, method in stock.items():
        assert vars(Trainer)[name] is not method, f"Trainer.{name} is not wrapped"
    parameters = list(inspect.signature(stock["_push_from_checkpoint"]).parameters)
    assert parameters == ["self", "checkpoint_folder"], f"{changed}._push_from_checkpoint's arguments"
    push = inspect.getsource(stock["_push_from_checkpoint"])
    for part, why in {
        "if is_peft_available():": "it may copy the adapter without peft now, and our copy may be needless",
        "self.args.hub_strategy == HubStrategy.END": "when it does not push",
        "not self.args.hub_always_push and self.push_in_progress is not None": "when it skips a push",
        "folder_path=output_dir": "what it pushes",
        'ignore_patterns=["_*"': "what it leaves out: our temporary files begin with _",
    }.items():
        assert part in push, f"{changed}._push_from_checkpoint: {why}"
    assert "torch.save(self.args," in inspect.getsource(stock["_save"]), f"{changed}._save: where a token may stand"
    assert HubStrategy.END == "end"
    assert hasattr(Trainer, "_finish_current_push"), f"{changed}: waiting for a push"
    whole = inspect.getsource(stock["push_to_hub"])
    assert whole.index("save_model(") < whole.index("create_model_card(") < whole.index("upload_folder("), changed
    card = inspect.getsource(stock["create_model_card"])
    assert "finetuned_from" in inspect.signature(stock["create_model_card"]).parameters, changed
    assert "create_or_update_model_card" in card, f"{changed}.create_model_card: README need not be hidden from it now"
    assert 'os.path.join(self.args.output_dir, "README.md")' in card, f"{changed}.create_model_card: where it writes"
    assert publishing._DRAFT in " ".join(AUTOGENERATED_TRAINER_COMMENT.split()), f"{changed}: the comment of a draft"


def test_trl_has_the_method_that_is_wrapped() -> None:
    """If this fails, TRL writes its card elsewhere."""
    base_trainer = pytest.importorskip("trl.trainer.base_trainer", reason="trl is not installed")
    method = vars(base_trainer._BaseTrainer)["create_model_card"]
    assert method is not inspect.unwrap(method)
    assert 'os.path.join(self.args.output_dir, "README.md")' in inspect.getsource(inspect.unwrap(method))

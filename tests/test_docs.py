"""The documentation's Python runs: every block of a page, in order, on a tiny model under the real one's name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_lora

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "pages"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


WITH_CODE = [path for path in [ROOT / "README.md", *sorted(PAGES.rglob("*.md"))] if blocks(path)]


@pytest.fixture
def names(tiny, tmp_path, monkeypatch) -> dict[str, Any]:
    """What the pages take as given. A folder with the base's name in the working directory is the base."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    model.generation_config.update(max_new_tokens=2, do_sample=False)
    model.save_pretrained(BASE)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(BASE)
    ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    return {
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "train_dataset": [{"input_ids": row, "labels": row} for row in ids.repeat(8, 1)],
    }


def test_there_is_code():
    assert {"README.md", "train.md", "save-and-load.md", "switch-and-mix.md", "merge.md"} <= {p.name for p in WITH_CODE}


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_a_pages_code_runs(path, names, request):
    pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")
    if path.stem in ("publish", "README"):  # the base is on a local hub, and no folder
        hub = request.getfixturevalue("hub")
        hub.commit(BASE, {file.name: file.read_bytes() for file in Path(BASE).iterdir()})
        shutil.rmtree(BASE)
    with torch.random.fork_rng(devices=[]):
        for number, block in enumerate(blocks(path), 1):
            exec(compile(block, f"{path.name}, block {number}", "exec"), names)
    assert hf_lora.LoRAConfig is names.get("LoRAConfig", hf_lora.LoRAConfig)


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(PAGES.rglob("*.md"))], ids=str)
def test_links_between_files_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).is_file(), f"{path.name} links to {target}"


def test_coming_from_peft_names_what_exists():
    """Every call in the right column of the table is an attribute of ours, every one in the left column of theirs."""
    page = (PAGES / "coming-from-peft.md").read_text(encoding="utf-8")
    table = page[page.index("| PEFT | hf_lora |") : page.index("## transformers' own")]
    ours = {
        name
        for row in table.splitlines()
        for name in re.findall(r"model\.(\w+)", row.split("|")[2] if "|" in row else "")
    }
    assert len(ours) > 12
    assert {name for name in ours if not hasattr(transformers.PreTrainedModel, name)} == set()


def test_coming_from_peft_names_what_peft_has(peft):
    page = (PAGES / "coming-from-peft.md").read_text(encoding="utf-8")
    table = page[page.index("| PEFT | hf_lora |") : page.index("## transformers' own")]
    theirs = {
        name
        for row in table.splitlines()
        for name in re.findall(r"model\.(\w+)", row.split("|")[1] if "|" in row else "")
    }
    assert len(theirs) > 8
    has = set(dir(peft.PeftModel)) | set(dir(peft.tuners.lora.LoraModel)) | {"peft_config"}
    assert theirs - has == set()


def test_the_error_table_is_of_every_error():
    page = (PAGES / "errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(LoRA\w+)` \| `(\w+)` \|", page, re.M))
    classes = {name: value for name, value in vars(hf_lora.errors).items() if name in hf_lora.errors.__all__}
    assert rows.keys() == classes.keys() - {"LoRAError"}
    for name, builtin in rows.items():
        assert classes[name].__bases__[-1].__name__ == builtin

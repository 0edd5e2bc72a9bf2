"""Which file may import which: the design's table as data, held against the code. And what is public is documented."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
from pathlib import Path

import pytest

import hf_lora
from hf_lora.mixin import LoRAMixin

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PAGES = ROOT / "hf_lora", ROOT / "docs" / "pages"

# Room -> rooms it may import. A room is a file, or a folder whose files may import each other.
TABLE: dict[str, str] = {
    "errors": "",
    "extras": "",
    "forms": "errors",
    # the config
    "patterns": "errors",
    "fields": "errors patterns",
    "initnames": "errors fields",
    "variantfields": "errors fields",
    "config": "errors fields initnames patterns variantfields",
    # mathematics and state
    "functional": "",
    "dropout": "",
    "fused": "dropout errors",
    "sharding": "errors",
    "replication": "errors sharding",
    "state": "errors",
    "routing": "errors state",
    "rowsources": "architectures errors state",
    "rowmaps": "architectures layerinfo routing rowsources state",
    # targeting: names and roles to layers; `architectures` is its data
    "architectures": "",
    "rows": "architectures",
    "batches": "architectures",
    "layerinfo": "architectures",
    "survey": "architectures layerinfo rows",
    "matching": "architectures errors layerinfo patterns survey",
    "targeting": "architectures batches config errors layerinfo matching patterns survey",
    # layers
    "weights": "errors sharding",
    "rounding": "",
    "quantised": "errors rounding weights",
    "exact": "errors",
    "workers": "exact",
    "variants": "dropout errors extras functional fused weights",
    "activation": "errors layerinfo rowmaps state",
    "banks": "extras forms functional state variants",
    "slots": "activation banks dropout functional fused routing rowmaps state variants",
    "layers": "errors functional routing rowmaps slots state variants weights",
    # the adapter as a value, and on disk
    "facts": "errors",
    "values": "config errors extras forms",
    "spectrum": "values",
    "health": "errors spectrum values",
    # its arithmetic; `agreement` is what can be combined, and the result's config
    "sparsify": "",
    "lowrank": "spectrum values",
    "agreement": "bases config errors layout values",
    "arithmetic": "agreement errors fields lowrank sparsify values",
    "safefile": "errors",
    "scratch": "errors",
    "folders": "errors safefile store",
    "layout": "config errors extras forms values",
    "store": "config errors extras forms layout safefile values",
    "bases": "errors",
    "frontmatter": "errors",
    "cardtext": "bases extras facts forms values",
    "card": "bases cardtext errors facts frontmatter values",
    "hub_errors": "errors",
    "hub": "bases card errors facts health hub_errors scratch store values",
    # a value on a model
    "inits": "config errors fields initnames quantised rounding safefile sharding targeting weights",
    "initial": "config errors extras fitting forms inits layerinfo targeting values variants weights",
    "fitting": "batches config errors extras layerinfo layers quantised rounding sharding state targeting values weights",  # noqa: E501
    "model": "activation config errors extras facts fitting initial inits layerinfo layers replication rounding routing rowmaps sharding slots state targeting values variants weights",  # noqa: E501
    "switching": "errors model state",
    "ties": "errors layerinfo",
    "merging": "errors exact extras layerinfo layers model replication sharding state switching targeting ties values variants weights workers",  # noqa: E501
    "optimizer": "errors layers model",
    "kasa": "errors layers model",
    "monteclora": "errors layers model variants",
    "progress": "layerinfo layers model sharding slots spectrum state targeting weights",
    "reference": "model switching",
    "summary": "errors extras layerinfo model slots state switching targeting values",
    "loading": "bases errors hub layerinfo layers model sharding store values",
    "adapter": "arithmetic errors facts hub loading store values",
    # many adapters on one model
    "pool": "errors fitting hub layerinfo loading model replication safefile state store switching values",
    "serve": "errors pool",
    # transformers
    "integrations": "activation bases card config errors facts frontmatter hub layerinfo layers loading model reference routing rowmaps sharding slots state store switching values",  # noqa: E501
    "export": "bases config errors exact extras fields fitting hub_errors integrations layerinfo loading merging model safefile scratch switching values workers",  # noqa: E501
    "importers": "adapter agreement config errors export fields fitting integrations layerinfo layout lowrank safefile survey targeting values weights",  # noqa: E501
    "analysis": "agreement architectures bases cardtext errors export fields inspection layerinfo lowrank model replication scratch spectrum values weights",  # noqa: E501
    "planning": "architectures config errors fields initial model slots store survey targeting",
    "inspection": "architectures errors facts health hub hub_errors safefile spectrum store values",
    "mixin": "adapter config errors export integrations loading merging model state store summary switching values",
    "importance": "lowrank spectrum values",
    "ranks": "agreement errors extras importance layers model sharding state values",
    "rankcallback": "errors model ranks",
    "training": "bases errors facts integrations loading merging model progress sharding state store weights",
    "registration": "integrations mixin",
    "hf_lora": "adapter analysis arithmetic config errors hub importers kasa monteclora optimizer planning pool rankcallback ranks registration training",  # the __init__  # noqa: E501
    # thin, and free to import anything
    "quickstart": "*",
    "recipe": "*",
    "demo": "*",
    "cli": "*",
    "__main__": "*",
}

# What `import hf_lora` must not bring: every room but these is imported by it, at once or when a verb is used.
LATE = {"quickstart", "recipe", "demo", "cli", "training", "rankcallback", "__main__"}
HEAVY = {
    "accelerate",
    "datasets",
    "evaluate",
    "gguf",
    "gradio",
    "matplotlib",
    "peft",
    "ray",
    "rich",
    "rouge_score",
    "trl",
    "typer",
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """ "hf_lora.variants.plain"; of a package's __init__ the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imports(path: Path) -> list[tuple[str, bool]]:
    """What a file imports, as full module names, and whether at the top of the module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    known = {module_of(file) for file in files()}
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) or _type_checking(function)
        for node in ast.walk(function)
    }
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{source}.{a.name}" if f"{source}.{a.name}" in known else source for a in node.names]
        else:
            continue
        found += [(name, id(node) not in inside) for name in names]
    return found


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_the_table_is_of_the_files_that_exist():
    assert {room_of(module_of(path)) for path in files()} == TABLE.keys()
    unknown = {
        room: other for room, row in TABLE.items() for other in row.split() if other != "*" and other not in TABLE
    }
    assert not unknown


@pytest.mark.parametrize("path", files(), ids=lambda path: module_of(path))
def test_a_file_imports_what_the_table_allows(path):
    room = room_of(module_of(path))
    allowed = {room, *TABLE[room].split()}
    ours = {name for name, _ in imports(path) if name.split(".")[0] == "hf_lora"}
    if "*" not in allowed:
        assert {room_of(name) for name in ours} <= allowed


def test_the_table_itself_has_no_cycle():
    graphlib.TopologicalSorter({room: set(row.split()) - {"*"} for room, row in TABLE.items()}).prepare()


def test_no_cycle_among_files():
    graph = {
        module_of(path): {name for name, top in imports(path) if top and name.startswith("hf_lora.")}
        - {module_of(path)}
        for path in files()
        if room_of(module_of(path)) not in LATE
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", [p for p in files() if room_of(module_of(p)) not in LATE], ids=lambda p: module_of(p))
def test_nothing_heavy_at_the_top(path):
    top = {name for name, at_top in imports(path) if at_top}
    assert not {name.split(".")[0] for name in top} & HEAVY
    assert not {name for name in top if name.split(".")[0] == "transformers"}, "import transformers where it is used"


def test_every_room_stands_in_the_architecture_page():
    page = (PAGES / "architecture.md").read_text(encoding="utf-8")
    missing = [room for room in TABLE if room not in ("hf_lora", "__main__") and f"`{room}`" not in page]
    assert not missing


# ---- public names ----------------------------------------------------------------------------------------------------


def public() -> list[str]:
    return [name for name in hf_lora.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", public())
def test_public_names_have_docstrings_and_stand_in_the_reference(name):
    found = getattr(hf_lora, name)
    assert (inspect.getdoc(found) or "").strip()
    assert found.__doc__ is not object.__doc__
    pages = "".join(path.read_text(encoding="utf-8") for path in PAGES.glob("*.md"))
    assert re.search(rf"^::: hf_lora\.(\w+\.)*{name}$", pages, re.M), f"{name} is not in docs/api.md or docs/errors.md"


def test_all_is_what_is_there():
    assert sorted(set(hf_lora.__all__)) == sorted(hf_lora.__all__)
    there = {name: getattr(hf_lora, name) for name in dir(hf_lora)}
    hidden = {"TYPE_CHECKING", "Any", "importlib"}  # what the file itself imports
    assert (
        set(public())
        == {name for name, value in there.items() if not name.startswith("_") and not inspect.ismodule(value)} - hidden
    )


def test_every_verb_has_a_docstring():
    verbs = {name: verb for name, verb in vars(LoRAMixin).items() if not name.startswith("_")}
    assert len(verbs) > 10
    assert [name for name, verb in verbs.items() if not inspect.getdoc(verb)] == []

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
    "expertnames": "",
    # the config
    "patterns": "errors",
    "fields": "errors patterns",
    "initnames": "errors fields",
    "variantfields": "errors fields",
    "tokenfields": "errors fields",
    "config": "errors expertnames fields initnames patterns tokenfields variantfields",
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
    "libraries": "architectures errors",
    "survey": "architectures layerinfo libraries rows",
    "matching": "architectures errors layerinfo patterns survey",
    "targeting": "architectures attentionpairs batches config errors experttargets layerinfo matching patterns survey",
    "experttargets": "config errors expertnames layerinfo",
    # layers
    "weights": "errors sharding",
    "rounding": "",
    "backends": "errors",
    "quantised": "backends errors layerinfo rounding weights",
    "preparing": "errors layerinfo",
    "standins": "backends errors layerinfo layers weights",
    "exact": "errors",
    "workers": "exact",
    "variants": "dropout errors extras functional fused weights",
    "activation": "errors layerinfo rowmaps state",
    "banks": "extras forms functional state variants",
    "slots": "activation banks dropout functional fused routing rowmaps state variants",
    "convolution": "",
    "convslots": "convolution dropout slots variants",
    "attention": "errors layers slots state",
    "layers": "errors functional routing rowmaps slots state tokens variants weights",
    "ties": "errors layerinfo",
    "tokens": "errors functional layerinfo ties tokenfields weights",
    # the adapter as a value, and on disk
    "facts": "errors",
    "values": "config errors extras forms tokenfields",
    "expertproxy": "errors",
    "expertlayers": "banks errors expertproxy layers rowmaps state",
    # the adapter as a value, and on disk
    "experts": "config errors expertnames values",
    "spectrum": "values",
    "health": "errors spectrum values",
    # its arithmetic; `agreement` is what can be combined, and the result's config
    "sparsify": "",
    "lowrank": "spectrum values",
    "agreement": "bases config errors expertnames experts layout values",
    "arithmetic": "agreement errors fields lowrank sparsify values",
    "safefile": "errors",
    "scratch": "errors",
    "folders": "errors safefile store",
    "attentionpairs": "errors values",
    "layout": "attentionpairs config errors expertnames experts extras forms tokenfields values",
    "store": "config errors extras forms layout safefile values",
    "bases": "errors",
    "frontmatter": "errors",
    "cardtext": "bases extras facts forms tokenfields values",
    "card": "bases cardtext errors facts frontmatter values",
    "hub_errors": "errors",
    "hub": "bases card errors facts health hub_errors scratch store values",
    # a value on a model
    "tying": "config errors extras layerinfo targeting tokenfields tokens values",
    "inits": "config errors fields initnames quantised rounding safefile sharding targeting weights",
    "initial": "config errors expertputting extras fitting forms inits layerinfo targeting tokens tying values variants weights",  # noqa: E501
    "fitting": "batches config errors expertnames expertputting extras layerinfo layers quantised rounding sharding state targeting tokenfields tokens tying values weights",  # noqa: E501
    "model": "activation attachment attention batches config convslots errors expertlayers expertnames expertputting experts extras fitting guards initial inits layerinfo layers oldnames preparing quantised reading replication reservation rounding sharding slots state targeting tokenfields tokens tying values variants weights wrappers",  # noqa: E501
    "switching": "errors model state",
    "merging": "backends errors exact expertnames extras layerinfo layers model replication sharding standins state switching targeting ties tokenfields tokens tying values variants weights workers",  # noqa: E501
    "attachment": "activation config errors facts layerinfo preparing quantised replication routing rowmaps state values",  # noqa: E501
    "guards": "errors expertlayers layers sharding slots state wrappers",
    "reservation": "attachment config errors expertlayers layerinfo layers slots targeting",
    "reading": "attachment errors expertlayers expertnames expertputting experts fitting layerinfo layers sharding slots tying values",  # noqa: E501
    "optimizer": "errors expertlayers layers model",
    "expertputting": "batches config errors expertlayers expertnames experts experttargets inits layers rowsources slots state values weights",  # noqa: E501
    "oldnames": "errors expertnames experts experttargets layout values",
    "kasa": "errors layers model",
    "monteclora": "errors layers model variants",
    "progress": "layerinfo layers model sharding slots spectrum state targeting weights",
    "reference": "model switching",
    "summary": "backends errors extras layerinfo model quantised slots state switching targeting tokens values",
    "loading": "bases errors expertnames hub layerinfo layers model quantised sharding store tokenfields values",
    "adapter": "arithmetic errors facts hub loading store values",
    # many adapters on one model
    "pool": "errors fitting hub layerinfo loading model replication safefile state store switching values",
    "serve": "errors pool",
    # transformers
    "integrations": "activation bases card config errors expertlayers facts frontmatter hub layerinfo layers loading model quantised reference routing rowmaps sharding slots state store switching tokenfields tokens values",  # noqa: E501
    "export": "bases config errors exact expertnames extras fields fitting hub_errors integrations layerinfo loading merging model quantised safefile scratch standins switching values weights workers",  # noqa: E501
    "importers": "adapter agreement config errors export fields fitting integrations layerinfo layout lowrank safefile survey targeting values weights",  # noqa: E501
    "analysis": "agreement architectures bases cardtext errors export fields inspection layerinfo lowrank model replication scratch spectrum values weights",  # noqa: E501
    "planning": "architectures backends banks config errors fields initial layerinfo model slots store survey targeting",  # noqa: E501
    "inspection": "architectures errors facts health hub hub_errors safefile spectrum store values",
    "mixin": "integrations verbs",
    "wrappers": "errors",
    "verbs": "adapter config export integrations loading merging model preparing summary switching values wrappers",
    "importance": "lowrank spectrum values",
    "ranks": "agreement errors extras importance layers model sharding state values",
    "rankcallback": "errors model ranks",
    "training": "bases errors facts integrations loading merging model progress sharding state store weights",
    "registration": "integrations mixin",
    "hf_lora": "adapter analysis arithmetic config errors hub importers kasa monteclora optimizer planning pool rankcallback ranks registration training verbs",  # the __init__  # noqa: E501
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

"""`hf-lora analyze`: its table, its JSON, its page; mistakes; names that mean harm."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loras import randomise
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_lora import LoRAAdapter, LoRAConfig, LoRAFileError
from hf_lora.analysis import amplification_factor, intruder_dimensions, overlap, report, subspace_similarity
from hf_lora.cli import app
from hf_lora.values import Factors


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def told(*arguments: Any) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


class Page(HTMLParser):
    """The tags of a page, its text and the pictures in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[bytes]:
        sources = [value or "" for name, value in self.attributes if name == "src"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2]) for source in sources]


@pytest.fixture
def scene(tiny: Any, tmp_path: Path) -> dict[str, Path]:
    """Two adapters on q and v, and their base."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("a", "b")):
        model.add_lora(LoRAConfig(r=2 + seed, target_modules=["q", "v"], base_model="me/base"), name)
        randomise(model, seed)
        model.lora_adapter(name).save(tmp_path / name)
    return {name: tmp_path / name for name in ("a", "b", "base")}


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_the_json_is_what_the_functions_find(scene: dict[str, Path]) -> None:
    a, b = (LoRAAdapter.load(scene[name]) for name in ("a", "b"))
    found = told(scene["a"], scene["b"], "--base", scene["base"], "--energy", "0.8", "--top", "3", "--threshold", "0.9")
    assert (found["format"], found["adapter"], found["other"]) == (1, str(scene["a"]), str(scene["b"]))
    assert (found["base"], found["out"], found["notes"]) == (str(scene["base"]), None, [])
    assert found["overlap"] == pytest.approx(overlap(a, b).cosine)
    intruders = intruder_dimensions(scene["base"], a, k=3, threshold=0.9)
    assert found["intruders"] == {"count": intruders.count, "k": 3, "threshold": 0.9}
    for side in ("A", "B"):
        means = subspace_similarity(a, b, side=side)
        assert found["similarity"][side] == {role: means.mean(role).tolist() for role in ("q", "v")}
    factors = {(x.path, x.role): x.factor for x in amplification_factor(a, scene["base"])}
    assert len(found["layers"]) == 4
    for layer in found["layers"]:
        sigma = np.linalg.svd(a.factors[layer["path"]].delta().double().numpy(), compute_uv=False)[:2]
        assert layer["singular_values"] == pytest.approx(sigma, rel=1e-4)
        assert layer["rank"] == 2
        assert layer["suggested_rank"] == 1 + (sigma[0] ** 2 < 0.8 * (sigma**2).sum())
        assert layer["amplification"]["factor"] == pytest.approx(factors[layer["path"], layer["role"]])
        assert layer["intruders"]["count"] == len(intruders[layer["path"]].intruders)
        assert layer["overlap"]["cosine"] == pytest.approx(overlap(a, b)[layer["path"]].cosine)
    assert found["suggested_rank"] == max(layer["suggested_rank"] for layer in found["layers"])


def test_an_adapter_alone(scene: dict[str, Path]) -> None:
    found = told(scene["a"], "--only", "v")
    assert (found["other"], found["base"], found["overlap"], found["intruders"]) == (None, None, None, None)
    assert found["similarity"] == {}
    assert [layer["role"] for layer in found["layers"]] == ["v", "v"]
    assert {layer[name] for layer in found["layers"] for name in ("overlap", "amplification", "intruders")} == {None}


def test_the_table_for_people(scene: dict[str, Path]) -> None:
    said = run(scene["a"], scene["b"], "--base", scene["base"]).output
    (header,) = (line for line in said.splitlines() if line.startswith("role"))
    for column in ("layers", "‖ΔW‖", "effective rank", "rank for 90%", "cosine", "φ(1, 1) A", "amplification"):
        assert column in header
    assert len(re.findall(r"^[qv] +2 ", said, re.M)) == 2
    assert "of the energy in every layer" in said
    assert "cosine of the two adapters" in said
    assert "intruder dimensions among the top 10" in said
    assert "amplification" not in run(scene["a"]).output


def test_the_page_stands_alone(scene: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: install hf_lora[test]")
    out = tmp_path / "report.html"
    out.write_text("an old one")
    result = run(scene["a"], scene["b"], "--base", scene["base"], "--out", out)
    assert result.exit_code == 0, result.output
    assert f"report: {out}" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "report.html"]
    page = Page(out.read_text(encoding="utf-8"))
    pictures = page.pictures
    assert len(pictures) == 6  # spectrum, overlap, φ of two sides, amplification, intruders
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert any((value or "").startswith("default-src 'none'") for _, value in page.attributes)
    assert not {"script", "link", "iframe", "object", "svg"} & set(page.tags)
    assert not [value for _, value in page.attributes if value and "://" in value]
    paths = list(LoRAAdapter.load(scene["a"]).factors)
    assert all(path in page.text for path in paths)
    assert len(page.pictures) == len([tag for tag in page.tags if tag == "img"])
    run(scene["a"], "--out", out)
    assert len(Page(out.read_text(encoding="utf-8")).pictures) == 1


def test_what_is_left_out_is_noted(scene: dict[str, Path], tmp_path: Path) -> None:
    a, b = (LoRAAdapter.load(scene[name]) for name in ("a", "b"))
    still, gone, *_ = a.factors
    partly = dict(a.factors)
    partly[still] = Factors("linear", a.factors[still].A, torch.zeros_like(a.factors[still].B), 2)
    LoRAAdapter(a.config, partly).save(tmp_path / "partly")
    LoRAAdapter(b.config, {path: f for path, f in b.factors.items() if path != gone}).save(tmp_path / "fewer")
    found = told(tmp_path / "partly", tmp_path / "fewer", "--base", scene["base"])
    assert found["notes"][0] == f"ΔW is zero in 1 of 4 places: {still}"
    assert found["notes"][1].startswith("φ is of 2 of 4 places")
    layers = {layer["path"]: layer for layer in found["layers"]}
    assert (layers[still]["suggested_rank"], layers[still]["amplification"]) == (0, None)
    assert layers[gone]["overlap"]["cosine"] == 0
    assert layers[gone]["amplification"] is not None


def test_another_base_is_noted(scene: dict[str, Path], tiny: Any) -> None:
    a, b = (LoRAAdapter.load(scene[name]) for name in ("a", "b"))
    b = LoRAAdapter(b.config.replace(base_model="you/other"), b.factors)
    model = tiny("llama")
    model.config._name_or_path = "me/base-4bit"  # the same base, quantised
    assert report(a, a, model).notes == ()
    model.config._name_or_path = "you/third"
    assert report(a, b, model).notes == (
        "the adapters name two bases: me/base and you/other",
        "the adapter was made on me/base, the base is you/third",
    )


# ---- real adapters ---------------------------------------------------------------------------------------------------


def test_two_public_adapters(shared: Path) -> None:
    """DistilBERT's q and v, r = 8, of two authors: against the files' own tensors, in plain numpy."""
    a, b = (shared / "peft-corpus" / "adapters" / name for name in ("rkarnwal__udacity", "ybriz__generative-ai"))
    found = told(a)
    assert {layer["role"] for layer in found["layers"]} == {"q", "v"}
    tensors = {name: t.double().numpy() for name, t in load_file(a / "adapter_model.safetensors").items()}
    config = json.loads((a / "adapter_config.json").read_text())
    for layer in found["layers"][:3]:
        start = f"base_model.model.{layer['path']}"
        down, up = (tensors[f"{start}.lora_{side}.weight"] for side in "AB")
        sigma = np.linalg.svd(up @ down * config["lora_alpha"] / config["r"], compute_uv=False)[: config["r"]]
        assert layer["singular_values"] == pytest.approx(sigma, rel=1e-6)
    result = run(a, b)  # GPT-2's
    assert result.exit_code == 2
    assert "no layer in common" in result.output


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere/at/all",), "nowhere/at/all"),
        (("A", "nowhere/at/all"), "nowhere/at/all"),
        (("A", "--only", "k"), "no 'k'"),
        (("A", "--energy", "2"), "energy=2"),
        (("A", "--top", "0"), "--top"),
        (("A", "--threshold", "0"), "threshold=0"),
        (("A", "--base", "A"), "an adapter, not a model"),
        (("A", "--out", "."), "it is a folder"),
        (("A", "--out", "none/report.html"), "none is no folder"),
        (("A", "--revision", "v1"), "revision"),
        (("A", "B", "C"), "C"),
    ],
)
def test_mistakes(scene: dict[str, Path], monkeypatch: pytest.MonkeyPatch, arguments: Any, says: str) -> None:
    monkeypatch.chdir(scene["a"].parent)
    named = {"A": "a", "B": "b"}
    result = run(*(named.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert "Traceback" not in result.output
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["a", "b", "base"]


def test_a_mistake_as_json(scene: dict[str, Path]) -> None:
    result = run(scene["a"], "--only", "k", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "LoRATargetError"
    assert error["remedy"]


def test_a_page_that_cannot_be_written_leaves_nothing(scene: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: install hf_lora[test]")
    found = report(LoRAAdapter.load(scene["a"]))
    (tmp_path / "report.html").write_text("an old one")

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_lora.analysis.reports.os.replace", full)
    with pytest.raises(LoRAFileError, match="No space left"):
        found.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "an old one"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---- names that mean harm --------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></table><h1>&amp;",
    "$\\frac{1$ [red]x[/red]",
    "\x1b[31mred\x1b[0m\u202eesrever",
    "_hidden",
    "x" * 500,
    "half \ud800",
)


def test_no_name_becomes_markup_or_an_escape(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: install hf_lora[test]")
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"layers.{i}.{name.replace('.', '')}": Factors(
            "linear", torch.randn(2, 5, generator=generator), torch.randn(6, 2, generator=generator), 2
        )
        for i, name in enumerate(HOSTILE)
    }
    value = LoRAAdapter(LoRAConfig(r=2, target_modules=["x"]), factors)
    base = {path: torch.randn(6, 5, generator=generator) for path in factors}
    found = report(value, value, base, names=(HOSTILE[0], HOSTILE[1], HOSTILE[2]))
    text = found.save(tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert set(page.tags) == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "ul", "li", "p", "img", "div", "table"),
        *("thead", "tbody", "tr", "th", "td", "details", "summary"),
    }
    assert {name for name, _ in page.attributes} == {
        *("lang", "charset", "http-equiv", "content", "name", "class", "alt", "src"),
    }
    assert "<script>alert(1)</script>" in page.text  # as text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800]", text)


def test_a_name_is_no_markup_of_the_terminal(scene: dict[str, Path]) -> None:
    folder = scene["a"].rename(scene["a"].with_name("[red]a"))
    assert f"{folder}\n" in run(folder).output

"""A report as one HTML file: no script, no request, every name escaped, the figures as pictures in it."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..cardtext import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .reports import Report

__all__ = ["page"]

_DPI = 120
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
"""


_SPECTRA = """ΔW = scaling·B·A of each layer. The effective rank is exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ; the suggested
rank keeps {energy} of Σσ² in each layer."""
_OVERLAP = """The cosine of the two adapters as a whole is {cosine}: 1 is the same up to a factor, 0 unrelated, −1 the
opposite. a is the adapter, b the other one."""
_AMPLIFICATION = """The amplification factor is ‖ΔW‖ / ‖UᵀWV‖ with U, V the singular directions of ΔW. Where it is
large, ΔW raises directions that W hardly uses."""
_INTRUDERS = """An intruder dimension is one of the {k} largest singular directions of W + ΔW whose cosine to every one
of W's is below {threshold}. There are {count}."""


def page(report: Report) -> str:
    """The whole page."""
    of, energy = report, f"{report.suggested.energy:.0%}"
    parts = [
        f"<h1>What {_text(of.adapter)} learned</h1>",
        _facts(of),
        _table([list(row.values()) for row in of.rows()], list(of.rows()[0])),
        *(_said("Note: {note}.", note=note) for note in of.notes),
        "<h2>Singular values</h2>",
        _said(_SPECTRA, energy=energy),
        _picture(of.spectra.plot(), "singular values of ΔW by role"),
    ]
    if of.overlap is not None:
        parts += ["<h2>The other adapter</h2>", _said(_OVERLAP, cosine=f"{of.overlap.cosine:.4f}")]
        parts += [_picture(of.overlap.plot(), "cosine by layer")]
        parts += [_picture(each.plot(), f"subspace similarity, side {each.side}") for each in of.similarity]
    if of.amplification is not None:
        parts += ["<h2>The base</h2>", _said(_AMPLIFICATION)]
        parts += [_picture(of.amplification.plot(), "amplification factor by layer")]
    if of.intruders is not None:
        found = of.intruders
        parts += [_said(_INTRUDERS, k=found.k, threshold=f"{found.threshold:g}", count=found.count)]
        parts += [_picture(found.plot(), "intruder dimensions by layer")]
    parts.append(_layers(report))
    title = f"hf-lora analyze: {_text(report.adapter)}"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style>'
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _text(value: object) -> str:
    return escape(clean(value), quote=True)


def _said(text: str, **facts: object) -> str:
    return f"<p>{_text(text.format(**facts))}</p>"


def _facts(report: Report) -> str:
    named = {"Adapter": report.adapter, "Other": report.other, "Base": report.base}
    lines = [f"<li>{name}: {_text(value)}</li>" for name, value in named.items() if value is not None]
    keeps = f"rank {report.suggested.rank} keeps {report.suggested.energy:.0%} of the energy in every layer"
    return f"<ul>{''.join(lines)}<li>{keeps}</li></ul>"


def _table(rows: Sequence[Sequence[Any]], headings: Sequence[str]) -> str:
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _layers(report: Report) -> str:
    """Every layer's numbers."""
    columns = [("overlap", "cosine"), ("amplification", "factor"), ("intruders", "count")]
    found = report.summary()["layers"]
    shown = [(group, name) for group, name in columns if any(layer[group] is not None for layer in found)]
    headings = ["layer", "role", "r", "‖ΔW‖", "effective rank", "suggested rank", *(group for group, _ in shown)]
    rows = [
        [
            layer["path"],
            layer["role"],
            layer["rank"],
            f"{layer['norm']:.3g}",
            f"{layer['effective_rank']:.2f}",
            layer["suggested_rank"],
            *("" if layer[group] is None else f"{layer[group][name]:.3g}" for group, name in shown),
        ]
        for layer in found
    ]
    return f"<details><summary>Every layer</summary>{_table(rows, headings)}</details>"


def _picture(figure: Figure, what: str) -> str:
    held = io.BytesIO()
    with warnings.catch_warnings():  # a letter that the font lacks is a box
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(held, format="png", dpi=_DPI)
    data = base64.b64encode(held.getvalue()).decode()
    return f'<p><img alt="{_text(what)}" src="data:image/png;base64,{data}"></p>'

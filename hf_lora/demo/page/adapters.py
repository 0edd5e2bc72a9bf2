"""What adapters there are: load one from the Hub, remove it, and look at one's card, spectrum and health."""

from __future__ import annotations

import base64
import html
import io
import re
from typing import Any

import gradio as gr

from ...inspection import AdapterInfo
from ..library import Adapter
from ..problems import said
from ..session import Demo
from .parts import SLOW, megabytes, note, tiles, visitor_of

__all__ = ["adapters_tab", "details"]


def adapters_tab(demo: Demo) -> tuple[dict[str, Any], list[Any]]:
    """Build it. Returns its controls by name, which the page wires, and what shows an adapter."""
    shipped = demo.library.shipped
    first = next(iter(shipped), None)
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=4, min_width=300):
            chosen = gr.Dropdown(
                [(each.title, name) for name, each in shipped.items()],
                value=first,
                label="Adapter",
                elem_id="adapters-chosen",
            )
            repo = gr.Textbox(
                label="Load one of this base from the Hub",
                placeholder="user/name",
                info=f"Public, safetensors, made on {demo.base_name}, at most "
                f"{megabytes(demo.settings.adapter_bytes)}. It is yours alone, until you close this page.",
                elem_id="adapters-repo",
            )
            with gr.Row():
                load = gr.Button("Load", variant="primary", elem_id="adapters-load")
                remove = gr.Button("Remove", elem_id="adapters-remove")
            state = gr.HTML(note(f"{len(shipped)} adapters come with this demo."), elem_id="adapters-state")
        with gr.Column(scale=6, min_width=320):
            facts = gr.HTML("", elem_id="adapters-facts")
            health = gr.HTML("", elem_id="adapters-health")
            spectrum = gr.HTML("", elem_id="adapters-spectrum")
            with gr.Accordion("Card", open=False):
                card = gr.Markdown("", elem_id="adapters-card", sanitize_html=True)
                text = gr.Textbox(
                    "",
                    lines=8,
                    max_lines=24,
                    label="Card, as text",
                    interactive=False,
                    visible=False,
                    elem_id="adapters-text",
                )

    def look(request: gr.Request, name: str | None) -> list[Any]:
        try:
            adapter = demo.library.get(visitor_of(request), name or "")
            return _shown(demo, adapter)
        except Exception as error:  # noqa: BLE001  # the page says it in its own words
            return ["", note(said(error, name or ""), "bad"), "", "", gr.update(value="", visible=False)]

    outputs = [facts, health, spectrum, card, text]
    chosen.change(look, chosen, outputs, show_progress="minimal", api_visibility="private", **SLOW)
    controls = {"chosen": chosen, "repo": repo, "load": load, "remove": remove, "state": state, "look": look}
    return controls, outputs


def details(info: AdapterInfo) -> dict[str, Any]:
    """What the page shows of an adapter, as plain data."""
    return {
        "base": info.base,
        "parameters": info.parameters,
        "nbytes": info.nbytes,
        "ranks": sorted({scale.rank for scale in info.scales}),
        "scalings": sorted({scale.scaling for scale in info.scales}),
        "targets": {target.role: target.layers for target in info.targets},
        "spectrum": {
            target.role: {
                "singular_values": list(target.spectrum.singular_values),
                "effective_rank": target.spectrum.effective_rank,
                "delta_norm": target.spectrum.delta_norm,
            }
            for target in info.targets
            if target.spectrum is not None
        },
        "health": [finding.message for finding in info.health],
    }


def _shown(demo: Demo, adapter: Adapter) -> list[Any]:
    info = demo.library.info(adapter)
    found = details(info)
    roles = ", ".join(f"{role} × {layers}" for role, layers in found["targets"].items())
    share = adapter.parameters / max(1, sum(p.numel() for p in demo.engine.model.parameters()))
    pairs = [
        ("Rank", ", ".join(map(str, found["ranks"])), f"scaling {', '.join(f'{s:g}' for s in found['scalings'])}"),
        ("Parameters", f"{adapter.parameters:,}", f"{share:.2%} of the base's"),
        ("Size", megabytes(adapter.nbytes), f"base {megabytes(demo.base_bytes)}"),
        ("Layers", str(info.layers), roles),
    ]
    if adapter.commit is not None:
        pairs.append(("From the Hub", adapter.commit[:10], adapter.name))
    findings = found["health"]
    verdict = note("Healthy: every tensor is finite, every layer is trained, none has collapsed.", "good")
    if findings:
        verdict = "".join(note(finding, "bad") for finding in findings)
    card = adapter.card()
    ours = adapter.commit is None
    return [
        tiles(pairs),
        verdict,
        _figure(found["spectrum"]),
        (plain(card) or "It has no card.") if ours else "",
        gr.update(value=card if not ours else "", visible=not ours),  # a stranger's card is shown as text
    ]


def plain(card: str) -> str:
    """A card's Markdown without HTML, and without pictures, which would be fetched from elsewhere."""
    parts = re.split(r"^(```.*?^```)", card, flags=re.M | re.S)
    for i in range(0, len(parts), 2):  # between blocks of code
        text = re.sub(r"<!--.*?(-->|\Z)", "", parts[i], flags=re.S)
        text = re.sub(r"!\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])?", r"\1", text)
        parts[i] = text.replace("<", "&lt;")
    return "".join(parts).strip()


def _figure(spectra: dict[str, Any]) -> str:
    """An <img> whose alternative text has the numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for role, spectrum in spectra.items():
        values = spectrum["singular_values"]
        axes.plot(range(1, len(values) + 1), values, marker="o", label=f"{role} (effective rank {_rank(spectrum)})")
    axes.set_xlabel("direction")
    axes.set_ylabel("σ, mean over the layers")
    axes.set_xticks(range(1, 1 + max((len(s["singular_values"]) for s in spectra.values()), default=1)))
    axes.set_title("Singular values of ΔW, by role", loc="left", fontsize="medium")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if spectra:
        axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    numbers = "; ".join(
        f"{role}: {', '.join(f'{value:.3g}' for value in spectrum['singular_values'])}"
        for role, spectrum in spectra.items()
    )
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="Singular values of ΔW, {html.escape(numbers)}" src="data:image/svg+xml;base64,{data}">'


def _rank(spectrum: dict[str, Any]) -> str:
    return f"{spectrum['effective_rank']:.1f}"

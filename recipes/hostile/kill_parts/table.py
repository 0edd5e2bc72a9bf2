"""The numbers as a page."""

from __future__ import annotations

from typing import Any

NUMBERS = ("kills", "old", "new", "refused", "half-written", "lost", "half-read")


def summary(facts: dict[str, Any]) -> dict[str, int]:
    """The sums over the operations, and how many problems there were."""
    rows = facts["operations"].values()
    return {name: sum(row[name] for row in rows) for name in NUMBERS} | {
        "problems": sum(len(row["problems"]) for row in rows)
    }


def table(facts: dict[str, Any]) -> str:
    """Markdown: operation × what was read after its kills."""
    total = summary(facts)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# Kills",
        "",
        f"{total['kills']:,} kills (SIGKILL) of processes that were writing, {facts['minutes']} minutes on one core. "
        "Half of them before a step of the operation (a rename, a removal, an fsync, half of a write, a request), "
        "half after a random time. After each, the files were read as a user reads them.",
        "",
        "| operation | steps, hit | kills | the old one read | the new one read | nothing there before: refused | lost | half-written, read as good |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in {**facts["operations"], "all": total}.items():
        steps = f"{row['steps']}, {row['steps hit']}" if "steps" in row else ""
        cells = [row[key] for key in ("kills", "old", "new", "refused", "lost", "half-read")]
        lines.append(f"| {name} | {steps} | " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"{total['half-written']} of the checkpoint's kills left a half-written folder; each was skipped by "
        "`resume_from_checkpoint=True`, and refused by an error where it was named.",
        "",
        "A merge writes to a folder that is new or empty, so before its end there is nothing to read: what was there "
        "before is the base and the adapter, which every kill left as they were.",
        "",
        f"Made by `{facts['command']}` on {facts['date']} with {versions}.",
        "",
    ]
    return "\n".join(lines)

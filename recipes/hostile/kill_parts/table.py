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


_PAGE = """# Kills

{kills:,} kills (SIGKILL) of processes that were writing, in {minutes} minutes. Half of them came before a step of the \
operation (a rename, a removal, an fsync, half of a write, a request), half after a random time. After each, the files \
were read as a user reads them.

{rows}

{half-written} of the checkpoint's kills left a half-written folder. `resume_from_checkpoint=True` skipped each, and \
resuming from it by name was refused. In every case the resumed run ended with the weights, bit for bit, of a run that \
nobody killed.

A merge writes to a folder that is new or empty, so before its end there is nothing to read. What was there before is \
the base and the adapter; every kill left them as they were.

After the kills, the operation was done again: it gave the new one, and left no temporary file of itself or of the \
killed one.

A kill keeps what the system has taken, so this says nothing of a power cut. That each file is on the disk before it \
gets its name is tested by `tests/test_store.py`.

Made by `{command}` on {date} with {versions}.
"""
_HEAD = ("operation", "steps", "of which hit", *("kills", "old one read", "new one read", "nothing before: refused"))


def table(facts: dict[str, Any]) -> str:
    """Markdown: operation × what was read after its kills."""
    total = summary(facts)
    head = [*_HEAD, "lost", "half-written, read as good"]
    lines = [head, ["---"] * len(head)]
    for name, row in {**facts["operations"], "all": total}.items():
        keys = ("steps", "steps hit", "kills", "old", "new", "refused", "lost", "half-read")
        lines.append([name, *(str(row.get(key, "")) for key in keys)])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return _PAGE.format(**{**facts, **total, "versions": versions, "rows": rows})

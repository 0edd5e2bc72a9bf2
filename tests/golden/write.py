"""Write the golden adapters that a version of the format lacks; what is there is never written again.

    python tests/golden/write.py VERSION

VERSION is the number of a folder here. A new one is begun only where the format changes so that the files of the old
one, which stay and have to be read for ever, no longer show all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from golden import formula, kinds  # noqa: E402


def expected(kind: kinds.Kind, folder: Path) -> dict[str, Any]:
    """What the adapters of a folder hold and compute, by NumPy."""
    model = kinds.base(kind.base)

    def weight(path: str) -> Any:
        if kind.config.get("layer_replication"):
            path = path.replace("layers.1.", "layers.0.")
        path, _, expert = path.removesuffix("]").partition("[")
        if expert:
            return "linear", model.get_parameter(path).detach().double().numpy()[int(expert)], None
        layer = model.get_submodule(path)
        name = {"Embedding": "embedding", "Conv1D": "conv1d"}.get(type(layer).__name__, "linear")
        bias = getattr(layer, "bias", None)
        stored = getattr(layer, "in_proj_weight", getattr(layer, "weight", None))
        if kind.shown == "delta":
            bias = None
        return name, stored.detach().double().numpy(), None if bias is None else bias.detach().double().numpy()

    found = {}
    for adapter in kinds.adapters(folder):
        found[adapter.relative_to(folder).as_posix()] = {
            "tensors": formula.digests(adapter),
            "outputs": formula.outputs(adapter, weight),
        }
    return found


def write(version: str, chosen: dict[str, kinds.Kind] | None = None, root: Path = HERE) -> list[str]:
    """Write what is missing; the names of what was written."""
    import hf_lora

    written = []
    for name, kind in (kinds.KINDS if chosen is None else chosen).items():
        folder = root / version / name.replace(", ", "-").replace(" ", "-")
        if folder.exists():
            continue
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(temporary) / "made"
            kind.write(kind, made)
            facts = {"kind": name, "hf_lora": hf_lora.__version__, "adapters": expected(kind, made)}
            (made / "expected.json").write_text(json.dumps(facts, separators=(",", ":")) + "\n", encoding="utf-8")
            folder.parent.mkdir(parents=True, exist_ok=True)
            import shutil

            shutil.copytree(made, folder)
        written.append(name)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="a number")
    given = parser.parse_args()
    if not given.version.isdigit():
        parser.error(f"{given.version!r} is no number")
    written = write(given.version)
    print("\n".join(f"written: {name}" for name in written) or f"nothing: tests/golden/{given.version} has every kind")
    return 0


if __name__ == "__main__":
    sys.exit(main())

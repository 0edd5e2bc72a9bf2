"""`python -m hf_lora` and the command `hf-lora`, also where the packages that the command needs are not installed."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich", "click"}:
            raise
        print(f'The command hf-lora needs {error.name}. Type: pip install "hf_lora[quickstart]"', file=sys.stderr)
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()

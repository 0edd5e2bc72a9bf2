"""Rows from a file or from a data set on the Hub. A file that is not what its format says is refused with the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .problems import DataError, RecipeError, near, quoted
from .schema import FORMATS, Source

__all__ = ["Rows", "read"]

Row = Mapping[str, Any]

_LONGEST_FIELD = 2**31 - 1  # characters; more does not fit a C long everywhere


@dataclass(frozen=True)
class Rows:
    """The rows of a source.

    Args:
        title: what errors call it.
        columns: their names.
        rows: by index.
        lines: index -> line of the file, where there is one.
        class_names: column -> names of its classes, where the data set says.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    lines: Sequence[int] | None = None
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def place(self, index: int) -> str:
        """A row, for an error."""
        if self.lines is not None:
            return f"{self.title}, line {self.lines[index]}"
        return f"{self.title}, row {index + 1}"

    def require(self, key: str, column: str) -> None:
        """Raise `RecipeError` unless there is such a column; `key` is where the recipe names it."""
        if column not in self.columns:
            raise RecipeError(
                f"data.{key}: {self.title} has no column {column!r}.",
                name=f"data.{key}",
                value=column,
                expected=self.columns,
                remedy=near(column, self.columns, listed="The columns are"),
            )


def read(source: Source, *, split: str) -> Rows:
    """The rows of a source.

    Args:
        split: of a data set whose source does not say one.

    Raises:
        DataError: it is not there, cannot be read, or holds no rows. RecipeError: it has no header where one is needed.
    """
    found = _file(source) if source.file is not None else _hub(source, split)
    if not len(found.rows):
        raise DataError(
            f"{found.title} holds no rows.", name="data", value=found.title, remedy="Give data with examples."
        )
    return found


# ---- files -----------------------------------------------------------------------------------------------------------


def _file(source: Source) -> Rows:
    path = Path(source.file or "").expanduser()
    kind = source.kind or ""
    try:
        if kind == "parquet":
            return _parquet(path)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"The data file {str(path)!r} cannot be read ({error.strerror or error}).",
            name="data",
            value=str(path),
            remedy="Check the path. In a recipe it is relative to the recipe, on the command line to where you are.",
        ) from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} in line {line}.",
            name="data",
            value=str(path),
            remedy="Convert it, for example: iconv -f latin1 -t utf-8 FILE > NEW.",
        ) from error
    return _READERS[kind](path, text, source)


def _table(path: Path, text: str, source: Source) -> Rows:
    """CSV or TSV: with a header row, or with the source's names for the columns."""
    tab = source.kind == "tsv"
    quoting = (not tab) if source.quoting is None else source.quoting
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tab else ",",
        quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        strict=True,
    )
    names, rows, lines = source.columns, [], []
    limit = csv.field_size_limit(_LONGEST_FIELD)  # the module's own is 128 KiB, less than a long document
    try:
        begins = 1
        for fields in reader:
            line, begins = begins, reader.line_num + 1
            if not fields:
                continue  # an empty line
            if names is None:
                names = tuple(fields)
                twice = sorted({name for name in names if names.count(name) > 1})
                if twice:
                    raise DataError(
                        f"{path} has the column {twice[0]!r} twice.",
                        name="data",
                        value=list(names),
                        remedy="Rename one, or give `columns` if the first line is no header.",
                    )
                continue
            if len(fields) != len(names):
                raise DataError(
                    f"{path}, line {line}: {len(fields)} fields, and the columns are {len(names)}: {', '.join(names)}.",
                    name="data",
                    value=fields,
                    remedy="Mend the line; text with a comma, a quote or a line break needs quotes around it.",
                )
            rows.append(dict(zip(names, fields, strict=True)))
            lines.append(line)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}.",
            name="data",
            value=str(path),
            remedy="Mend the line, or write `quoting: false` if quotes are plain characters in this file.",
        ) from error
    finally:
        csv.field_size_limit(limit)
    return Rows(str(path), names or (), rows, lines)


def _json(path: Path, text: str, source: Source) -> Rows:
    content = _parsed(text, str(path)) if text.strip() else []
    if not isinstance(content, list):
        raise DataError(
            f"{path} holds {_kind(content)}, not a list of objects.",
            name="data",
            value=str(path),
            remedy="Write [{…}, {…}], or one object a line in a file ending in .jsonl.",
        )
    return _objects(str(path), content, None)


def _json_lines(path: Path, text: str, source: Source) -> Rows:
    # Split at line feeds only: JSON may hold other characters that `splitlines` takes for a line's end.
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    parsed = [_parsed(line, f"{path}, line {number}") for number, line in numbered]
    return _objects(str(path), parsed, [number for number, _ in numbered])


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: this is no JSON: {error}.", name="data", value=text[:200]) from error


def _objects(title: str, items: list[Any], lines: list[int] | None) -> Rows:
    found = Rows(title, (), items, lines)
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise DataError(f"{found.place(index)}: {_kind(item)}, not an object.", name="data", value=quoted(item))
    # A row that lacks a column which others have is refused when the column is used.
    return Rows(title, tuple(dict.fromkeys(key for item in items for key in item)), items, lines)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _text(path: Path, text: str, source: Source) -> Rows:
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [{"text": line.rstrip("\r")} for _, line in numbered]
    return Rows(str(path), ("text",), rows, [number for number, _ in numbered])


_READERS: dict[str, Callable[[Path, str, Source], Rows]] = {
    "csv": _table,
    "tsv": _table,
    "json": _json,
    "jsonl": _json_lines,
    "txt": _text,
}


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is no Parquet file: {error}.", name="data", value=str(path)) from error
    return Rows(str(path), tuple(table.column_names), table.to_pylist())


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def _hub(source: Source, split: str) -> Rows:
    import datasets

    wanted = source.split or split
    try:
        found = datasets.load_dataset(source.dataset, source.config, split=wanted, revision=source.revision)
    # datasets raises its own errors, huggingface_hub's, and Python's for an unknown config or split.
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"The data set {source.dataset!r} ({wanted}) cannot be had: {said[0]}",
            name="data",
            value=source.dataset,
            remedy="Check the id, config and split; a private or gated one needs `hf auth login` or HF_TOKEN. "
            f"A file has one of the endings {', '.join(FORMATS)}.",
        ) from error
    names = {
        column: tuple(feature.names)
        for column, feature in found.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return Rows(f"{source.title} ({wanted})", tuple(found.column_names), found, None, names)

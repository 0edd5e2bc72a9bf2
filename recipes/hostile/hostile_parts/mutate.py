"""Changes of good inputs: by structure where a text has one, by bytes else. All choices come from one `Random`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

NAMES = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "bias", "use_rslora"),
    *("use_dora", "lora_bias", "peft_type", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("layer_replication", "init_lora_weights", "exclude_modules", "use_qalora", "use_bdlora", "kasa_config"),
    *("velora_config", "monteclora_config", "alora_invocation_tokens", "qalora_group_size", "task_type"),
    *("target_parameters", "trainable_token_indices", "fan_in_fan_out", "revision", "base_model_name_or_path"),
    *("auto_mapping", "__metadata__", "dtype", "shape", "data_offsets", "weight_map", "metadata", "model"),
    *("prompt", "max_tokens", "name"),
)

TEXTS = (
    *("", " ", "\n", "\t", "\0", "\x7f", "\ud800", "é", "\u202e", "💥", "\ufeff", "\u2028", "ﬁ", "İ", "٣", "²"),
    *("true", "null", "1", "1e3", "NaN", "-1", "0x10", "1_000", "~", "no", "=", "<<", "!!python/object:os.system"),
    *("q_proj", "q", "v", "all-linear", "lora_A", "default", "base_model.model.", "a.b", "h.0.q", "LORA", "ADALORA"),
    *("../../etc/passwd", "/etc/passwd", "C:\\x", "a/b", "..", ".", "con", "~", "file:///x", "org/name", "http://x/y"),
    *("(a+)+$", "(", "[", "[[", "a{99999}", "(?P<x>a)(?P=x)", ".*.*.*.*=", "\\", "(?i)Q", "x*" * 30, "$", "^", "|"),
    *(
        "*&a",
        "&a *a",
        "- -",
        "? ",
        "---",
        "...",
        "{",
        "}",
        "[]",
        "%s",
        "{0}",
        "{x.__class__}",
        "\\ud800",
        "<b>",
        "'",
        '"',
    ),
    "hf_" + "A" * 34,
)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 4, 8, 16, 64, 255, 256, 65536, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**400, -(10**400), 1.5, 0.1, 2.0, -0.0, 1e308, 1e-320, 1e22, 0.9999999999999999),
    *(float("nan"), float("inf"), -float("inf")),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, ["q", "q"], [1, 2], [[0, 1]], {"a": {}})
_LONG = (30, 300, 5_000, 120_000)
_DEEP = (3, 30, 300, 3_000, 120_000)


def value(rng: random.Random) -> Any:
    """Something that is seldom meant."""
    roll = rng.random()
    if roll < 0.4:
        return rng.choice(NUMBERS)
    if roll < 0.7:
        return rng.choice(TEXTS)
    if roll < 0.93:
        return json.loads(json.dumps(rng.choice(OTHERS)))
    if roll < 0.96:
        return rng.choice("aq.é*(") * rng.choice(_LONG[:2] if rng.random() < 0.8 else _LONG)
    return [value(rng) for _ in range(rng.randrange(4))]


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _places(found: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container somewhere in `found`, and a key or index of it."""
    where, key = None, None
    while isinstance(found, (dict, list)) and found:
        where, key = found, rng.choice(list(found)) if isinstance(found, dict) else rng.randrange(len(found))
        if rng.random() < 0.35:
            break
        found = found[key]
    return where, key


def json_value(rng: random.Random, found: Any, other: Any) -> Any:
    """A JSON value with one change in its structure; `found` is changed in place where it can be."""
    where, key = _places(found, rng)
    if where is None or rng.random() < 0.02:
        return value(rng)
    roll = rng.randrange(11)
    mapping = isinstance(where, dict)
    if roll == 0:
        del where[key]
    elif roll <= 3:
        where[key] = value(rng)
    elif roll == 4 and mapping:
        where[_misspelt(rng, key)] = where.pop(key)
    elif roll == 5 and mapping:
        where[rng.choice((*NAMES, rng.choice(TEXTS)))] = value(rng)
    elif roll == 6 and mapping and isinstance(other, dict) and other:
        name = rng.choice(list(other))
        where[name] = other[name]
    elif roll == 7:
        where[key] = _retyped(rng, where[key])
    elif roll == 8:
        second, again = _places(found, rng)
        where[key], second[again] = second[again], where[key]  # may hold itself; then there is no text of it
    elif roll == 9:
        where[key] = _near(rng, where[key])
    elif mapping:
        where[rng.choice(TEXTS)] = where[key]
    else:
        where.insert(rng.randrange(len(where) + 1), rng.choice((where[key], value(rng))))
    return found


def _misspelt(rng: random.Random, name: str) -> str:
    at = rng.randrange(len(name) + 1)
    return rng.choice((name + "s", name.upper(), name[:at] + name[at + 1 :], f" {name}", name.title(), name + "\0"))


def _retyped(rng: random.Random, item: Any) -> Any:
    """The same content in another type."""
    made: list[Any] = [[item], str(item), {str(item)[:50]: item}, bool(item), None]
    if isinstance(item, (int, float)) and abs(item) < 2**53:
        made += [float(item), item == 1, str(item), int(item) if item == item else 0]
    if isinstance(item, str):
        made += [list(item[:20]), {"": item}]
    if isinstance(item, list):
        made += [dict.fromkeys(map(str, item)), item[0] if item else None, ",".join(map(str, item))]
    if isinstance(item, dict):
        made += [list(item), list(item.items()), list(item.values())]
    return rng.choice(made)


def _near(rng: random.Random, item: Any) -> Any:
    """Another value that could have been meant."""
    if isinstance(item, bool):
        return not item
    if isinstance(item, int) and abs(item) < 2**63:
        return item + rng.choice((-1, 1, 1, 8, 64, -item * 2, item))
    if isinstance(item, float):
        return item * rng.choice((0.5, 2.0, -1.0, 1.0000001))
    if isinstance(item, str):
        return _misspelt(rng, item)
    if isinstance(item, list):
        return rng.choice((item[::-1], item + item, item[1:], [*item, value(rng)]))
    return (
        {str(key) + rng.choice(("", "x", ".")): inner for key, inner in item.items()} if isinstance(item, dict) else {}
    )


def _json(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    if rng.random() < 0.12:
        return _bytes(rng, data, others)
    try:
        found, other = json.loads(data), json.loads(rng.choice(others))
        text = json.dumps(json_value(rng, found, other))
    except (ValueError, RecursionError):
        return _bytes(rng, data, others)
    roll = rng.random()
    if roll < 0.06:  # a name twice
        where, key = _places(found, rng)
        if isinstance(where, dict):
            again = json.dumps({key: rng.choice((where[key], value(rng)))})[1:-1]
            text = text.replace("{", "{" + again + ", ", 1)
    elif roll < 0.075:
        deep = rng.choice(_DEEP)
        where, key = _places(found, rng)
        if where is not None:
            where[key] = "@"
            text = json.dumps(found).replace(
                '"@"', rng.choice(("[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep))
            )
    elif roll < 0.1:
        text = rng.choice(
            ("\ufeff" + text, text.replace(",", ",\r\n"), text + " " * 50, text + text, f"[{text}]", f"{text},")
        )
    elif roll < 0.11:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    elif roll < 0.13:
        text = json.dumps(found, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


# ---- text ------------------------------------------------------------------------------------------------------------


def _text(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    if rng.random() < 0.1:
        return _bytes(rng, data, others)
    text = data.decode("utf-8", "replace")
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.choice((1, 1, 2, 5, 20, 1000)))
    roll = rng.randrange(9)
    if roll == 0:
        text = text[:at] + text[end:]
    elif roll <= 3:
        text = text[:at] + rng.choice(TEXTS) + text[at:]
    elif roll == 4:
        text = text[:end] + text[at:end] * rng.choice((1, 2, 40)) + text[end:]
    elif roll == 5:
        text = text[:at]
    elif roll == 6:
        text = text[:at] + _said(value(rng))[:150_000] + text[end:]
    elif roll == 7:
        other = rng.choice(others).decode("utf-8", "replace")
        text = text[:at] + other[rng.randrange(len(other) + 1) :]
    else:
        text = rng.choice(
            (text.replace("\n", "\r\n"), "\ufeff" + text, text.upper(), text[::-1], text.replace(" ", "\t"))
        )
    return text.encode("utf-8", "surrogatepass")


def _lines(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A text whose lines, indents and `key: value` pairs mean something."""
    if rng.random() < 0.4:
        return _text(rng, data, others)
    lines = data.decode("utf-8", "replace").split("\n")
    at, roll = rng.randrange(len(lines)), rng.randrange(9)
    line = lines[at]
    key, colon, item = line.partition(":")
    if roll == 0:
        del lines[at]
    elif roll == 1:
        lines.insert(rng.randrange(len(lines) + 1), line)
    elif roll == 2:
        lines[at] = f"{key}{colon or ':'} {_scalar(rng)}"
    elif roll == 3:
        lines[at] = f"{_misspelt(rng, key)}{colon}{item}"
    elif roll == 4:
        lines[at] = rng.choice(("  ", "    ", "\t", "- ", "  - ", "# ", "? ", "&a ", "*a ", "!!str ", "| ")) + line
    elif roll == 5:
        lines[at] = line.lstrip()
    elif roll == 6:
        lines.insert(at, f"{rng.choice((*NAMES, *TEXTS))}: {_scalar(rng)}")
    elif roll == 7:
        other = rng.choice(others).decode("utf-8", "replace").split("\n")
        lines.insert(at, rng.choice(other))
    else:
        deep = rng.choice((2, 3, 5, 18, 22, 40, 300 if rng.random() < 0.2 else 4, 3_000 if rng.random() < 0.05 else 30))
        opened, closed = rng.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")))
        lines[at] = f"{key}: " + opened * deep + closed * deep
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _scalar(rng: random.Random) -> str:
    item = value(rng)
    if rng.random() < 0.5:
        return json.dumps(item)
    return _said(item)[:5_000]


def _said(item: Any) -> str:
    return str(item) if not isinstance(item, int) or abs(item) < 10**4200 else "9" * 5_000


# ---- safetensors -----------------------------------------------------------------------------------------------------


def _tensors(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A safetensors file: its header by structure, its body by bytes, or the file as a whole."""
    length = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + length], data[8 + length :]
    roll = rng.random()
    if roll < 0.12 or length > len(data):
        return _bytes(rng, data, others)
    if roll < 0.3:
        return data[: 8 + length] + _body(rng, body)
    if roll < 0.38:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(data), len(data) - 8, 2**31, 2**63, 2**64 - 1, 10**8 + 1))
        return (wrong % 2**64).to_bytes(8, "little") + data[8:]
    try:
        header = json.loads(text)
        other = json.loads(_header(rng.choice(others)))
    except (ValueError, RecursionError):
        return _bytes(rng, data, others)
    if not isinstance(header, dict):
        return _bytes(rng, data, others)
    if roll < 0.6:
        return _closed(_json(rng, text, [_header(rng.choice(others))]), body, rng)
    names = [name for name, entry in header.items() if name != "__metadata__" and _whole(entry)]
    if not names:
        return _bytes(rng, data, others)
    name = rng.choice(names)
    if roll < 0.68:  # offsets that overlap, leave a gap, or leave the file
        at = rng.randrange(2)
        header[name]["data_offsets"][at] += rng.choice((-1, 1, 4, -4, 2**40, -(2**40)))
        return _closed(json.dumps(header).encode(), body, rng)
    if roll < 0.74:
        metadata = header.setdefault("__metadata__", {})
        if isinstance(metadata, dict):
            key = rng.choice([*metadata, "format", "hf_lora.blocks", "hf_lora.config_sha256"])
            blocks = '{"h.0.q": [["q", [[0, 1]]]]}'
            item = value(rng)
            metadata[key] = rng.choice((item, _said(item)[:2000], "", "pt", str(metadata.get(key))[:-1], blocks))
        return _closed(json.dumps(header).encode("utf-8", "surrogatepass"), body, rng)
    # A container that is right, of tensors that are not: other names, shapes, dtypes, and their bytes.
    parts = {n: (header[n]["dtype"], header[n]["shape"], body[slice(*header[n]["data_offsets"])]) for n in names}
    dtype, shape, content = parts[name]
    change = rng.randrange(9)
    if change == 8:  # another module's path, in both factors
        path = name.removeprefix("base_model.model.").partition(".lora_")[0]
        other_path = rng.choice((*TEXTS, f"a{rng.choice(TEXTS)}b", path.replace(".", "..")))
        parts = {n.replace(path, other_path): part for n, part in parts.items()}
    elif change == 0:
        del parts[name]
    elif change == 1:
        parts[
            rng.choice(
                (
                    name.replace("lora_A", "lora_B"),
                    name + ".x",
                    name.replace(".weight", ".default.weight"),
                    _misspelt(rng, name),
                    f"base_model.model.{rng.choice(TEXTS)}",
                    name[len("base_model.model.") :],
                )
            )
        ] = parts.pop(name)
    elif change == 2:
        shape = [max(0, n + rng.choice((-1, 1, 7))) if rng.random() < 0.6 else n for n in shape]
        parts[name] = (dtype, shape, b"\1" * (_numel(shape) * _SIZES.get(dtype, 4)))
    elif change == 3:
        parts[name] = (dtype, rng.choice((shape[::-1], [*shape, 1], [1, *shape], [_numel(shape)], [])), content)
    elif change == 4:
        dtype = rng.choice([*_SIZES, "F8_E4M3", "C64", "f32"])
        parts[name] = (dtype, shape, b"\0" * (_numel(shape) * _SIZES.get(dtype, 4)))
    elif change == 5:
        parts[name] = (dtype, shape, _body(rng, content))
    elif change == 6 and isinstance(other, dict):
        parts |= {
            n: (e["dtype"], e["shape"], b"\0" * (_numel(e["shape"]) * _SIZES.get(e["dtype"], 4)))
            for n, e in rng.sample(list(other.items()), min(len(other), 2))
            if _whole(e) and n != "__metadata__"
        }
    else:
        parts[
            rng.choice(
                (
                    f"base_model.model.{name}",
                    name.replace("lora_A", "lora_embedding_A"),
                    name.rpartition(".")[0],
                    "base_model.model.head.weight",
                    "base_model.model.h.0.q.base_layer.bias",
                    name.replace("h.", "g."),
                )
            )
        ] = parts[name]
    return container(parts, header.get("__metadata__"))


_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def container(parts: dict[str, tuple[str, list[int], bytes]], metadata: Any = None) -> bytes:
    """A safetensors file of name → (dtype, shape, bytes), in this order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, (dtype, shape, content) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _header(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")] or b"{}"


def _closed(text: bytes, body: bytes, rng: random.Random) -> bytes:
    return len(text).to_bytes(8, "little") + text + (body if rng.random() < 0.9 else _body(rng, body))


def _whole(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and all(
            isinstance(entry.get(k), list) and all(type(n) is int and 0 <= n < 10**6 for n in entry[k])
            for k in ("shape", "data_offsets")
        )
        and len(entry["data_offsets"]) == 2
        and _numel(entry["shape"]) < 10**5
    )


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return min(count, 10**6)


def _body(rng: random.Random, body: bytes) -> bytes:
    roll = rng.randrange(6)
    if not body:
        return b"\0" * rng.randrange(9)
    at = rng.randrange(len(body)) // 4 * 4
    if roll == 0:
        return body[:at]
    if roll == 1:
        return body + b"\0" * rng.choice((1, 4, 4096))
    if roll == 2:  # NaN, infinity, the largest
        bad = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\xff\xff\xff\xff"))
        return body[:at] + bad + body[at + 4 :]
    return _bytes(rng, body, [body])


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at, roll = rng.randrange(len(data) + 1), rng.randrange(7)
    end = min(len(data), at + rng.choice((1, 2, 4, 8, 64)))
    if roll == 0:
        return data[:at]
    if roll == 1:
        return data[:at] + data[end:]
    if roll == 2:
        return data[:at] + rng.randbytes(rng.choice((1, 2, 4, 8, 100))) + data[at:]
    if roll == 3:
        return data[:end] + data[at:end] * rng.choice((1, 8)) + data[end:]
    if roll == 4:
        other = rng.choice(others)
        return data[:at] + other[rng.randrange(len(other) + 1) :]
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if found:
            i = rng.randrange(len(found))
            found[i] = (
                found[i] ^ (1 << rng.randrange(8)) if rng.random() < 0.6 else rng.choice(b'\0\xff\x80"{}[],:09-.\\')
            )
    return bytes(found)


_KINDS: dict[str, Callable[[random.Random, bytes, Sequence[bytes]], bytes]] = {
    "json": _json,
    "yaml": _lines,
    "text": _text,
    "tensors": _tensors,
    "bytes": _bytes,
}


def changed(rng: random.Random, kind: str, data: bytes, others: Sequence[bytes]) -> bytes:
    """One change of a text of this kind; `others` are further good ones to take from."""
    return _KINDS[kind](rng, data, others)

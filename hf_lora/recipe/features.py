"""Rows to token ids, with what was cut counted; and the batches that a model takes.

Prompt and completion are tokenised apart, so that a prompt has the ids that it has when the model is used. What is not
to be learned has the label −100.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .problems import DataError, RecipeError, quoted
from .schema import Data
from .sources import Rows, read
from .template import Template

__all__ = ["IGNORED", "Encoded", "Prepared", "SplitFacts", "collator", "prepare"]

IGNORED = -100
_CHUNK = 512  # rows that are tokenised in one call
_DEFAULT_LENGTH = 512

Example = dict[str, Any]


@dataclass(frozen=True)
class SplitFacts:
    """One split in numbers.

    Args:
        examples: rows that became examples: all of them. cut: of these, how many were longer than max_length.
        median_tokens, longest: before cutting. tokens, learned: all tokens, and those with a loss, after it.
    """

    source: str
    examples: int
    cut: int
    median_tokens: float
    longest: int
    tokens: int
    learned: int


class Encoded(torch.utils.data.Dataset[Example]):
    """Examples as arrays of token ids."""

    def __init__(self, source: str, examples: list[Example], lengths: list[int], cut: int) -> None:
        self.examples = examples
        learned = sum(int((e["labels"] != IGNORED).sum()) if np.ndim(e["labels"]) else 1 for e in examples)
        self.facts = SplitFacts(
            source,
            len(examples),
            cut,
            median(lengths),
            max(lengths),
            sum(len(e["input_ids"]) for e in examples),
            learned,
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def update(self, digest: Any) -> None:
        """Put every example into a digest."""
        for example in self.examples:
            for key, value in sorted(example.items()):
                array = np.asarray(value)
                digest.update(f"{key}{array.shape}{array.dtype}".encode())
                digest.update(array.tobytes())


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for the Trainer. `max_length` is the one used; `labels` the names of the classes."""

    train: Encoded
    eval: Encoded | None
    labels: tuple[str, ...] | None
    max_length: int

    def fingerprint(self) -> str:
        """SHA-256 of every example: other data, another tokenizer or another max_length give another one."""
        digest = hashlib.sha256()
        for split in (self.train, self.eval):
            digest.update(b"split")
            if split is not None:
                split.update(digest)
        return digest.hexdigest()


def prepare(data: Data, tokenizer: Any, config: Any, *, seq2seq: bool) -> Prepared:
    """Read and tokenise what a recipe's section `data` names.

    Args:
        tokenizer, config: of the base.
        seq2seq: whether the base is an encoder-decoder.

    Raises:
        DataError: no rows, or a row without a value; it says which. RecipeError: a column that is not there.
    """
    maximum = _max_length(data, tokenizer, config)
    if (data.chat or data.form == "messages") and not tokenizer.chat_template:
        raise RecipeError(
            f"data.{'chat' if data.chat else 'messages'}: the base's tokenizer has no chat template.",
            name="data",
            remedy="Write the format out in `prompt` and `completion`, or take a base with a chat template.",
        )
    rows = read(data.train, split="train")
    train, held = _held_out(data, rows)
    train = _sampled(data, train, data.max_train, "train")
    places = [(rows, train)]
    if data.eval is not None:
        other = read(data.eval, split="validation")
        places.append((other, _sampled(data, list(range(len(other.rows))), data.max_eval, "eval")))
    elif held:
        places.append((rows, _sampled(data, held, data.max_eval, "eval")))
    for source, _ in places:
        _require_columns(data, source)
    labels = _labels(data, *places[0]) if data.form == "label" else None
    encode = _encoder(data, tokenizer, maximum, labels, seq2seq=seq2seq)
    found = [_encoded(source, indices, encode) for source, indices in places]
    return Prepared(found[0], found[1] if len(found) > 1 else None, labels, maximum)


def _max_length(data: Data, tokenizer: Any, config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    limits = [n for n in (positions, tokenizer.model_max_length) if isinstance(n, int) and 0 < n < 10**9]
    limit = min(limits, default=None)
    if data.max_length is None:
        return _DEFAULT_LENGTH if limit is None else min(_DEFAULT_LENGTH, limit)
    if limit is not None and data.max_length > limit:
        raise RecipeError(
            f"data.max_length: {data.max_length} is more than the {limit} tokens that the base takes.",
            name="data.max_length",
            value=data.max_length,
            expected=limit,
            remedy=f"Set it to {limit} or less.",
        )
    return data.max_length


# ---- which rows ------------------------------------------------------------------------------------------------------


def _held_out(data: Data, rows: Rows) -> tuple[list[int], list[int]]:
    """Indices to train on, and held out: whole groups, until their share is reached."""
    everything = list(range(len(rows.rows)))
    if data.eval_fraction is None:
        return everything, []
    if data.eval_group is not None:
        rows.require("eval_group", data.eval_group)
    group = (lambda i: str(rows.rows[i].get(data.eval_group))) if data.eval_group is not None else str
    members: dict[str, list[int]] = {}
    for index in everything:
        members.setdefault(group(index), []).append(index)
    names = list(members)
    random.Random(f"hf_lora held out {data.seed}").shuffle(names)
    held: list[int] = []
    for name in names:
        if len(held) >= data.eval_fraction * len(everything):
            break
        held += members[name]
    train = sorted(set(everything) - set(held))
    if not train:
        raise DataError(
            f"{rows.title}: holding out {data.eval_fraction:g} of {len(everything)} rows leaves none to train on.",
            name="data.eval_fraction",
            value=data.eval_fraction,
            remedy="Hold out less, or name the examples to evaluate on in data.eval.",
        )
    return train, sorted(held)


def _sampled(data: Data, indices: list[int], most: int | None, split: str) -> list[int]:
    if most is None or most >= len(indices):
        return indices
    return sorted(random.Random(f"hf_lora sample {split} {data.seed}").sample(indices, most))


def _require_columns(data: Data, rows: Rows) -> None:
    for key in ("text", "pair", "prompt", "completion", "system"):
        source = getattr(data, key)
        if source is not None and (key != "system" or "{" in source):
            for column in data.template(key).columns:
                rows.require(key, column)
    for key in ("messages", "label"):
        if getattr(data, key) is not None:
            rows.require(key, getattr(data, key))


def _value(rows: Rows, index: int, column: str) -> Any:
    value = rows.rows[index].get(column)
    if value is None or value == "":
        raise DataError(
            f"{rows.place(index)}: there is no value in the column {column!r}.",
            name=column,
            value=value,
            remedy="Fill it in, or take the row out.",
        )
    return value


def _rendered(template: Template, rows: Rows, index: int) -> str:
    values = {column: _value(rows, index, column) for column in template.columns}
    for column, value in values.items():
        if not isinstance(value, (str, int, float)):
            raise DataError(
                f"{rows.place(index)}: the column {column!r} holds {quoted(value)}, which is no text.",
                name=column,
                value=value,
                remedy="Use a column of texts or numbers; a list of chat messages is for data.messages.",
            )
    return template.render(values)


# ---- classes ---------------------------------------------------------------------------------------------------------


def _labels(data: Data, rows: Rows, indices: Sequence[int]) -> tuple[str, ...]:
    """The names of the classes: the recipe's, the data set's, or those of the training data."""
    column = str(data.label)
    if data.labels is not None:
        return data.labels
    if column in rows.class_names:
        return rows.class_names[column]
    values = {str(_value(rows, index, column)).strip() for index in indices}
    if all(_is_index(value) for value in values):
        highest = max(map(int, values))
        if highest > 10_000:
            raise DataError(
                f"{rows.title}: the column {column!r} holds {highest}, which is no index of a class.",
                name="data.label",
                value=highest,
                remedy="Name the column of the class; its indices begin at 0.",
            )
        values = {str(index) for index in range(highest + 1)}
        found = tuple(sorted(values, key=int))
    else:
        found = tuple(sorted(values))
    if not 2 <= len(found) <= max(2, len(indices) // 2):
        some = ", ".join(map(quoted, found[:5]))
        raise DataError(
            f"{rows.title}: the column {column!r} holds {len(found)} different classes in {len(indices)} examples "
            f"({some}{', …' if len(found) > 5 else ''}).",
            name="data.label",
            value=column,
            remedy="Name the column of the class, or say the classes in data.labels.",
        )
    return found


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _class_of(data: Data, rows: Rows, index: int, labels: tuple[str, ...]) -> int:
    value = _value(rows, index, str(data.label))
    said = str(value).strip()
    if said in labels:
        return labels.index(said)
    if not isinstance(value, bool) and _is_index(said) and int(said) < len(labels):
        return int(said)
    raise DataError(
        f"{rows.place(index)}: the label {quoted(value)} is none of the {len(labels)} classes.",
        name="data.label",
        value=value,
        expected=labels,
        remedy=f"The classes are {', '.join(labels[:20])}, or their indices 0 to {len(labels) - 1}.",
    )


# ---- tokens ----------------------------------------------------------------------------------------------------------

# A chunk of rows to (example, tokens before cutting, was it cut).
Encode = Callable[[Rows, Sequence[int]], Iterator[tuple[Example, int, bool]]]


def _encoded(rows: Rows, indices: Sequence[int], encode: Encode) -> Encoded:
    examples, lengths, cut = [], [], 0
    for start in range(0, len(indices), _CHUNK):
        for example, length, was_cut in encode(rows, indices[start : start + _CHUNK]):
            examples.append(example)
            lengths.append(length)
            cut += was_cut
    return Encoded(rows.title, examples, lengths, cut)


def _encoder(data: Data, tokenizer: Any, maximum: int, labels: tuple[str, ...] | None, *, seq2seq: bool) -> Encode:
    if labels is not None:
        return lambda rows, indices: _classified(data, tokenizer, maximum, labels, rows, indices)
    if seq2seq:
        if data.form != "completion" or data.chat:
            raise RecipeError(
                "data: an encoder-decoder learns a completion from a prompt.",
                name="data",
                remedy="Give prompt and completion, without chat.",
            )
        return lambda rows, indices: _translated(data, tokenizer, maximum, rows, indices)
    segments = _SEGMENTS[data.form]
    return lambda rows, indices: _continued(data, tokenizer, maximum, segments, rows, indices)


def _ids(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, **options: Any) -> Any:
    return tokenizer(list(texts), *([list(pairs)] if pairs is not None else []), verbose=False, **options)


def _array(ids: Sequence[int]) -> Any:
    return np.asarray(ids, dtype=np.int32)


def _classified(
    data: Data, tokenizer: Any, maximum: int, labels: tuple[str, ...], rows: Rows, indices: Sequence[int]
) -> Iterator[tuple[Example, int, bool]]:
    """One text or a pair, and its class. The longer text of a pair is cut first, as tokenizers do."""
    texts = [_rendered(data.template("text"), rows, index) for index in indices]
    pairs = None if data.pair is None else [_rendered(data.template("pair"), rows, index) for index in indices]
    lengths = [len(ids) for ids in _ids(tokenizer, texts, pairs)["input_ids"]]
    batch = _ids(tokenizer, texts, pairs, truncation=True, max_length=maximum)
    for at, index in enumerate(indices):
        example = {key: _array(batch[key][at]) for key in batch if key != "attention_mask"}
        example["labels"] = np.int64(_class_of(data, rows, index, labels))
        yield example, lengths[at], lengths[at] > maximum


def _translated(
    data: Data, tokenizer: Any, maximum: int, rows: Rows, indices: Sequence[int]
) -> Iterator[tuple[Example, int, bool]]:
    """The prompt for the encoder, the completion for the decoder; each is cut at its end."""
    texts = [_rendered(data.template("prompt"), rows, index) for index in indices]
    targets = [_rendered(data.template("completion"), rows, index) for index in indices]
    whole = [
        _ids(tokenizer, texts)["input_ids"],
        tokenizer(text_target=targets, verbose=False)["input_ids"],
    ]
    cut = [
        _ids(tokenizer, texts, truncation=True, max_length=maximum)["input_ids"],
        tokenizer(text_target=targets, truncation=True, max_length=maximum, verbose=False)["input_ids"],
    ]
    for at in range(len(indices)):
        lengths = [len(side[at]) for side in whole]
        yield {"input_ids": _array(cut[0][at]), "labels": _array(cut[1][at])}, max(lengths), max(lengths) > maximum


def _continued(
    data: Data,
    tokenizer: Any,
    maximum: int,
    segments: Callable[[Data, Any, Rows, int], list[tuple[str, bool]]],
    rows: Rows,
    indices: Sequence[int],
) -> Iterator[tuple[Example, int, bool]]:
    """Texts of which some are learned, one after the other, with the tokenizer's own beginning and the end token."""
    written = data.chat or data.form == "messages"  # the chat template writes beginning and end itself
    begin, end = ([], []) if written else _edges(tokenizer)
    chunk = [segments(data, tokenizer, rows, index) for index in indices]
    texts = [text for parts in chunk for text, _ in parts]
    flat = iter(_ids(tokenizer, texts, add_special_tokens=False)["input_ids"] if texts else ())
    for index, parts in zip(indices, chunk, strict=True):
        pieces = [(begin, False), *((next(flat), learned) for _, learned in parts), (end, True)]
        ids = [token for piece, _ in pieces for token in piece]
        labels = [token if learned else IGNORED for piece, learned in pieces for token in piece]
        first = next((at for at, label in enumerate(labels) if label != IGNORED), None)
        if first is None:
            raise DataError(
                f"{rows.place(index)}: nothing of this example is learned.",
                name="data",
                remedy="Take it out; a chat needs a message of the assistant.",
            )
        kept = _kept(len(ids), first, maximum)
        yield {"input_ids": _array(ids[kept]), "labels": _array(labels[kept])}, len(ids), len(ids) > maximum


def _kept(length: int, first: int, maximum: int) -> slice:
    """What is kept of `length` tokens of which the first `first` are not learned.

    The longer of the two is cut first, and each keeps half: the prompt its end, what is learned its beginning.
    """
    learned = min(length - first, maximum - min(first, maximum // 2))
    start = max(0, first + learned - maximum)
    return slice(start, first + learned)


def _edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text, and the token that ends one."""
    own = tokenizer("", verbose=False)["input_ids"]
    begin = own[:1] if own and own[0] == tokenizer.bos_token_id else []
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            "base.model: its tokenizer has no end token, so that a trained model would not know when to stop.",
            name="base.model",
            remedy="Take a base whose tokenizer has an eos_token.",
        )
    return begin, [tokenizer.eos_token_id]


def _text_segments(data: Data, tokenizer: Any, rows: Rows, index: int) -> list[tuple[str, bool]]:
    return [(_rendered(data.template("text"), rows, index), True)]


def _completion_segments(data: Data, tokenizer: Any, rows: Rows, index: int) -> list[tuple[str, bool]]:
    prompt = _rendered(data.template("prompt"), rows, index)
    completion = _rendered(data.template("completion"), rows, index)
    if not data.chat:
        return [(prompt, False), (completion, True)]
    system = data.system
    if system is not None and "{" in system:
        system = _rendered(data.template("system"), rows, index)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _chat_segments(tokenizer, messages, rows.place(index))


def _message_segments(data: Data, tokenizer: Any, rows: Rows, index: int) -> list[tuple[str, bool]]:
    messages, place = _value(rows, index, str(data.messages)), rows.place(index)
    good = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not good:
        raise DataError(
            f"{place}: the column {data.messages!r} holds {quoted(messages)}, which is no chat.",
            name="data.messages",
            value=messages,
            expected='[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]',
            remedy="Write a list of objects with role and content, both texts.",
        )
    return _chat_segments(tokenizer, messages, place)


def _chat_segments(tokenizer: Any, messages: list[dict[str, str]], place: str) -> list[tuple[str, bool]]:
    """The chat as the template writes it, split where an answer of the assistant begins and ends."""

    def written(turns: Sequence[Mapping[str, str]], *, open_end: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_end))
        except Exception as error:  # a template raises what it likes, jinja2's errors among them
            raise DataError(
                f"{place}: the tokenizer's chat template refuses this chat: {error}", name="data.messages"
            ) from error

    segments, done = [], ""
    for at, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before, after = written(messages[:at], open_end=True), written(messages[: at + 1], open_end=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{place}: the chat template rewrites earlier turns, so that what the assistant said cannot be told.",
                name="data.messages",
                remedy="Use prompt and completion, with one answer in an example.",
            )
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return segments


_SEGMENTS = {"text": _text_segments, "completion": _completion_segments, "messages": _message_segments}


# ---- batches ---------------------------------------------------------------------------------------------------------


def collator(pad: int) -> Callable[[list[Example]], dict[str, Tensor]]:
    """Examples to a batch, padded on the right: ids with `pad`, labels with −100, all else with 0."""
    fill = {"input_ids": pad, "labels": IGNORED}

    def collate(examples: list[Example]) -> dict[str, Tensor]:
        batch = {}
        for key in examples[0]:
            arrays = [example[key] for example in examples]
            if np.ndim(arrays[0]) == 0:
                batch[key] = torch.tensor(np.stack(arrays), dtype=torch.long)
                continue
            padded = np.full((len(arrays), max(map(len, arrays))), fill.get(key, 0), dtype=np.int64)
            for row, array in zip(padded, arrays, strict=True):
                row[: len(array)] = array
            batch[key] = torch.from_numpy(padded)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1])[None, :] < lengths[:, None]).long()
        return batch

    return collate

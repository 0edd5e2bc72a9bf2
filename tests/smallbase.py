"""A base in a folder, with a tokenizer of 64 words, for tests that need no real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Rewrites nothing of earlier turns.
CHAT = (
    "{{ '<bos> ' }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
WORDS = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "system": 60, "user": 61, "assistant": 62}


def tokenizer(*, chat: bool = False, **options: Any) -> Any:
    """Ids 0 to 2 pad, begin and end; w3 to w59 are words, and so are the names of the roles; unknown ones are 63."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(3, 60)} | WORDS | {"<unk>": 63}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", **options)
    if chat:
        made.chat_template = CHAT
    return made


def save_base(model: Any, folder: Path, *, chat: bool = False) -> Path:
    """Write a tiny model and the tokenizer."""
    model.save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
    return folder

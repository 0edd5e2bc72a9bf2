"""What is killed: an adapter's save, a merge to disk, a push. Each says what is there afterwards.

An operation is begun again and again in one folder; `before` sets the scene for one kill, `act` is what is killed,
`judge` reads what is there as a user would, `settle` does it again undisturbed and looks for what was left over.
`judge` gives "old", "new" or "refused" (nothing was there before, and the reader got a typed error); whatever else it
finds (lost, or half-written and read as good) is an `AssertionError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from .killing import forked

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


class Operation:
    """One thing that is killed; see above."""

    name = ""
    reads_forked = False  # whether judging makes threads or connections, so that it has to be in a process of its own
    chained = True  # whether the next kill may come upon what this one left
    settles = True  # whether `settle` does something
    share = 1  # of the kills, beside the others

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def before(self, chance: random.Random) -> str:
        """Set the scene; returns a word for it."""
        raise NotImplementedError

    def act(self) -> None:
        raise NotImplementedError

    def judge(self) -> str:
        raise NotImplementedError

    def half_written(self) -> bool:
        """Whether something half-written lies under a name; reading it by that name has to raise."""
        return False

    def settle(self) -> None:
        raise NotImplementedError

    def settled(self) -> None:
        """In the process that kills, after `settle`."""


def digests(folder: Path) -> dict[str, str]:
    """The files of a folder, all of them, by their bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tiny_llama(seed: int = 0) -> Any:
    import transformers

    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**fields, num_key_value_heads=2, vocab_size=96, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def filled(model: Any, name: str, seed: int) -> None:
    """Give an adapter of the model values that are like no other seed's."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_slots." in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def values_of(seeds: range, **config: Any) -> list[Any]:
    """Adapters of one base that differ in every number, and in alpha."""
    from hf_lora import LoRAConfig

    found = []
    for seed in seeds:
        model = tiny_llama()
        given = {"r": 16, "alpha": float(seed + 2), "target_modules": ["q", "v", "down"], "base_model": "me/base"}
        model.add_lora(LoRAConfig(**{**given, **config}))
        filled(model, "default", seed)
        found.append(model.lora_adapter().copy())
    return found


class Save(Operation):
    """`save_lora` and `LoRAAdapter.save` into a folder with a user's own file."""

    name = "save"
    share = 4

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from hf_lora import LoRAAdapter

        self.values = [LoRAAdapter.of(value) for value in values_of(range(4))]
        self.model = tiny_llama()
        for i, value in enumerate(self.values):
            self.model.load_lora(value, name=str(i), trainable=True)  # float32: the same bits
        self.out, self.old, self.new = folder / "out", None, 0

    def before(self, chance: random.Random) -> str:
        from safetensors.torch import save_file

        from hf_lora.store import to_state_dict

        kind = chance.choice(["nothing", "ours", "ours", "peft", "what the last kill left"])
        if kind == "what the last kill left":
            self.old = self._found() if self.out.exists() else None
        else:
            shutil.rmtree(self.out, ignore_errors=True)
            self.out.mkdir()
            self.old = None if kind == "nothing" else chance.randrange(len(self.values))
            (self.out / "notes.txt").write_text("the user's own")
        if kind == "ours":
            self.values[self.old].save(self.out)
        elif kind == "peft":
            config = json.dumps(self.values[self.old].config.to_peft())
            (self.out / "adapter_config.json").write_text(config)
            save_file(to_state_dict(self.values[self.old]), self.out / "adapter_model.safetensors", {"format": "pt"})
        self.new = chance.choice([i for i in range(len(self.values)) if i != self.old])
        self.by_model = chance.random() < 0.5
        return kind

    def act(self) -> None:
        if self.by_model:
            self.model.save_lora(self.out, str(self.new))
        else:
            self.values[self.new].save(self.out)

    def _found(self) -> int | None:
        """Which adapter `load` gives; None: it refuses."""
        from hf_lora import LoRAAdapter, LoRAFileError
        from hf_lora.store import read_config

        try:
            value = LoRAAdapter.load(self.out)
        except LoRAFileError:
            return None
        same = [
            i
            for i, known in enumerate(self.values)
            if value.factors.keys() == known.factors.keys()
            and all(value.factors[path].equal(known.factors[path]) for path in known.factors)
        ]
        assert len(same) == 1, "half-written and read as good"
        assert read_config(self.out).alpha == self.values[same[0]].config.alpha, "the config is another adapter's"
        return same[0]

    def judge(self) -> str:
        found = self._found()
        if found is None:
            assert self.old is None, "what was saved before is lost"
            return "refused"
        assert found in (self.old, self.new), "another adapter"
        return "new" if found == self.new else "old"

    def settle(self) -> None:
        self.act()
        assert self._found() == self.new
        left = {path.name for path in self.out.iterdir()}
        assert left == {*ADAPTER, "notes.txt"}, f"left over: {left}"
        assert (self.out / "notes.txt").read_text() == "the user's own"


class Merge(Operation):
    """`merge_to_folder`, `merge_and_save` and `hf-lora merge`: base + adapter as a model of its own."""

    name = "merge to disk"
    share = 2
    ways = ("merge_to_folder", "hf-lora merge", "merge_and_save")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from hf_lora import LoRAAdapter

        self.base, self.adapter, self.out = folder / "base", folder / "adapter", folder / "out" / "merged"
        tiny_llama().save_pretrained(self.base, max_shard_size="60KB")
        (value,) = values_of(range(1), alpha=1.0)
        LoRAAdapter.of(value).save(self.adapter)
        self.sources = digests(self.base), digests(self.adapter)
        self.model = tiny_llama()
        self.model.load_lora(value, name="a")
        self.expected: dict[str, dict[str, str]] = {}
        for way in self.ways:
            self.way = way
            shutil.rmtree(self.out.parent, ignore_errors=True)
            forked(self.act)
            self.expected[way] = digests(self.out)
            forked(self._compare)

    def _compare(self) -> None:
        """What was written is what merging in memory gives."""
        merged = type(self.model).from_pretrained(self.out).state_dict()
        self.model.merge_lora("a")
        assert all(torch.equal(merged[key], weight) for key, weight in self._weights().items())

    def _weights(self) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.model.state_dict().items() if "lora_" not in key}

    def before(self, chance: random.Random) -> str:
        kind = chance.choice(["nothing", "an empty folder", "what the last kill left"])
        if kind != "what the last kill left" or self.out.exists():
            shutil.rmtree(self.out.parent, ignore_errors=True)
            self.out.parent.mkdir()
        if kind == "an empty folder":
            self.out.mkdir()
        self.way = chance.choice(self.ways)
        return kind

    def act(self) -> None:
        from hf_lora.cli import app
        from hf_lora.export import merge_to_folder

        if self.way == "merge_to_folder":
            merge_to_folder(self.adapter, self.out, self.base, max_shard_size="60KB", force=True)
        elif self.way == "merge_and_save":
            self.model.merge_and_save(self.out, "a", max_shard_size="60KB")
        else:
            arguments = ["merge", str(self.adapter), str(self.out), "--base", str(self.base), "--force", "--json"]
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
            assert not app(arguments, standalone_mode=False)

    def judge(self) -> str:
        assert (digests(self.base), digests(self.adapter)) == self.sources, "what was saved before is lost"
        if not self.out.exists() or not any(self.out.iterdir()):
            return "refused"
        assert digests(self.out) == self.expected[self.way], "half-written under its name"
        return "new"

    def settle(self) -> None:
        if self.judge() == "refused":
            self.act()
        assert self.judge() == "new"
        left = {path.name for path in self.out.parent.iterdir()}
        assert left <= {self.out.name}, f"left over: {left}"

"""`LoRAAdapter`: an adapter as a value, with load and save, push and pull, and its arithmetic."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arithmetic, hub, store
from .facts import RunFacts
from .loading import read_source
from .values import AdapterValue

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, ModelCard

__all__ = ["LoRAAdapter"]


class LoRAAdapter(AdapterValue):
    """A config and its factors, apart from any model."""

    @classmethod
    def of(cls, value: AdapterValue) -> LoRAAdapter:
        """The same adapter with this class's methods."""
        return cls(**{field.name: getattr(value, field.name) for field in dataclasses.fields(AdapterValue)})

    @classmethod
    def load(cls, source: str | os.PathLike[str], *, allow_pickle: bool = False, **options: Any) -> LoRAAdapter:
        """Read an adapter from a folder or a repo on the Hub.

        Args:
            source: a folder (wins), or "user/name".
            allow_pickle: read an adapter_model.bin (weights only) where there are no safetensors.
            options: subfolder, revision, token, cache_dir, local_files_only.

        Raises:
            LoRAFileError: a file is missing, truncated or malformed. LoRAUnsupportedError: another kind of adapter.
            LoRAHubError: the Hub did not give it.
        """
        return cls.of(read_source(source, allow_pickle=allow_pickle, **options))

    @classmethod
    def pull(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        allow_pickle: bool = False,
    ) -> LoRAAdapter:
        """Read an adapter from a repo on the Hub, whatever folders there are here.

        Two files are fetched, both of one commit; from the cache if they are there and the Hub cannot be asked.

        Args:
            repo_id: "user/name".
            revision: a branch, tag or commit; None is main.
            subfolder: where in the repo it is.
            token, cache_dir, local_files_only, force_download: as of huggingface_hub.
            allow_pickle: read an adapter_model.bin (weights only) where there are no safetensors.

        Raises:
            LoRAHubError: the Hub did not give it; `kind` says why. LoRAFileError: the files are malformed.
            LoRAUnsupportedError: another kind of adapter.
        """
        folder = hub.fetch(
            repo_id,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_pickle=allow_pickle,
        )
        return cls.of(store.read_adapter(folder, allow_pickle=allow_pickle))

    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        card: str | Path | ModelCard | None = None,
        subfolder: str | None = None,
        base_model: str | None = None,
        force: bool = False,
        run: RunFacts | None = None,
    ) -> CommitInfo:
        """Push it to the Hub as one commit: its two files and a card.

        Args:
            repo_id: "user/name", or "name" for the token's own user; made if it is missing.
            private: visibility of a new repo; an existing one must have it already.
            token: as of huggingface_hub.
            revision: the branch, made if it is missing; None is main.
            create_pr: open a pull request instead of committing.
            commit_message: None says what is pushed.
            card: words for the README: text, the path of a README.md, or a `huggingface_hub.ModelCard`. None keeps
                what stands there.
            subfolder: a folder for this adapter, in a repo of several.
            base_model: the base's id on the Hub; None takes the config's.
            force: push an adapter that is not finite or was never trained.
            run: how it was trained, for the card.

        Raises:
            LoRAHubError: the Hub refused or failed; `kind` says how. Nothing was pushed.
            LoRAMismatchError: the adapter is not finite, was never trained, or its base has no id on the Hub.
            LoRAFileError: the README's metadata is damaged, or a token or local path would be published.
        """
        return hub.push(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            card=card,
            subfolder=subfolder,
            base_model=base_model,
            force=force,
            run=run,
        )

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write it in PEFT's format, atomically. Raises `LoRAFileError`; what was there then stays."""
        return store.write_adapter(self, directory)

    def truncate(self, rank: int | None = None, energy: float | None = None) -> LoRAAdapter:
        """The adapter with a smaller rank: in each layer the ΔW' of that rank with the least ‖ΔW − ΔW'‖ (Eckart–Young).

        A layer whose rank is small enough already stays bit for bit. In a fused layer each role is truncated by itself,
        and all get one rank. dtype, scaling, heads and biases stay.

        Args:
            rank: the largest rank that stays; in a fused layer each role's, as `r` in `LoRAConfig`.
            energy: instead: in each layer the smallest rank that keeps this share of Σσ² (of every role), in (0, 1].

        Raises:
            LoRAConfigError: neither or both are given, or one is out of range. LoRAMismatchError: it is not finite.
        """
        return arithmetic.truncate(self, rank, energy)

    def negate(self) -> LoRAAdapter:
        """The adapter with −ΔW, exactly. Raises `LoRAMismatchError` if it holds trained heads or biases.

        Source: Ilharco et al. 2022 (arXiv:2212.04089) §3.
        """
        return arithmetic.negate(self)

    def factors_only(self) -> LoRAAdapter:
        """The adapter without the heads and biases that it trained: its factors alone, which can be added."""
        return arithmetic.factors_only(self)

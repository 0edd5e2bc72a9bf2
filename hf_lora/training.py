"""`LoRACallback`: what Trainer reports of a LoRA, keeps of its run, and does with it at the end.

Imported when it is used: it needs transformers' Trainer.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from .bases import hub_id, require_hub_id
from .errors import LoRAConfigError, LoRANameError, LoRAStateError, LoRAUnsupportedError
from .facts import RunFacts
from .integrations.reporting import Reports
from .loading import load_checkpoint, save_checkpoint
from .merging import merge_lora, require_mergeable, unmerge_lora
from .model import read, refill, require, state_of
from .progress import Progress, trained_parameters
from .sharding import is_sharded, whole
from .state import Entry
from .store import CONFIG_NAME

__all__ = ["LoRACallback"]

_LOG = logging.getLogger(__name__)

# What of the arguments (TRL's too) says how a run was; no path and no token among them.
_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "seed",
    "bf16",
    "fp16",
    "tf32",
    "activation_checkpointing",
    "torch_compile",
    "max_length",
    "packing",
    "completion_only_loss",
    "assistant_only_loss",
    "loss_type",
    "beta",
)
_PUSH_OPTIONS = frozenset(
    {
        "adapter",
        "private",
        "token",
        "revision",
        "create_pr",
        "commit_message",
        "card",
        "subfolder",
        "base_model",
        "force",
    }
)
_PACKAGES = ("hf_lora", "torch", "transformers", "accelerate", "datasets", "trl")
_DATASET_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+|[^/@]+)@")


class LoRACallback(TrainerCallback, Reports):
    """Reports, records, merges and publishes what `Trainer` trains on a model with a LoRA.

    To every log of the training loss it adds, for whatever `report_to` names and for log_history:

    - `lora/trainable_share`: trainable parameters ÷ the base's
    - `lora/grad_norm`: of the adapters' gradients, accumulated and before clipping
    - `lora/delta_norm/<role>`: ‖ΔW‖/‖W‖, Frobenius, over all layers of the role
    - `lora/effective_rank/<role>`: the mean over them of exp(entropy of ΔW's normalised singular values)

    With several adapters that train, the last two begin with `lora/<adapter>/`. Biases and modules trained whole have
    no factors and are in neither.

    At each save and at the end every adapter that trained keeps the facts of its run, for its card.

    Args:
        merge_at_end: a folder; at the end the active adapter is merged into the base and the whole model written
            there, with the tokenizer if Trainer has one. The model in memory is unmerged again, bit for bit.
        push_best: "user/name"; at the end the best adapter is pushed there, by Trainer's metric_for_best_model; the
            last, with a warning, if it is not evaluated and saved by one.
        push_options: further arguments of `push_adapter_to_hub`: adapter, private, token, revision, create_pr,
            commit_message, card, subfolder, base_model, force.
        datasets: ids on the Hub of what it trains on, for the card; those that `datasets` loaded are found.

    Raises:
        LoRAConfigError: an argument that could not work at the end. When training begins: LoRAStateError (no adapter
            trains), LoRAUnsupportedError (what is asked for the end is impossible on this model), LoRANameError
            (several adapters train and `push_options` names none).

    Source: effective rank: Roy & Vetterli 2007, "The effective rank".
    """

    def __init__(
        self,
        *,
        merge_at_end: str | os.PathLike[str] | None = None,
        push_best: str | None = None,
        push_options: Mapping[str, Any] | None = None,
        datasets: str | Iterable[str] = (),
    ) -> None:
        self.merge_at_end = None if merge_at_end is None else _usable_folder(merge_at_end)
        self.push_best = push_best
        self.push_options = dict(push_options or {})
        self.datasets = (datasets,) if isinstance(datasets, str) else tuple(datasets)
        if push_best is not None:
            _require_repo("push_best", push_best)
        for name in self.datasets:
            _require_repo("datasets", name)
        _require_push_options(self.push_options, push_best)
        self._model: nn.Module | None = None
        self._entries: list[Entry] = []

    # ---- the run ----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the model, and refuse now what could only fail at the end."""
        model = _own(kwargs["model"])
        self._entries = [entry for entry in _entries(model) if entry.trainable]
        if not self._entries:
            raise LoRAStateError(
                f"LoRACallback: no adapter on this {type(model).__name__} trains.",
                remedy="Call add_lora(), or train_lora('…'), before train().",
            )
        adapters, others, total = trained_parameters(model)
        self._model, self._told = model, False
        self._progress: Progress | None = Progress(model)
        self._adapters, self._all = adapters, adapters + others
        self._trainable, self._total = sum(p.numel() for p in self._all), total
        self._measured: tuple[float, float] | None = None  # gradient norms of the adapters and of all, as clipped
        self._each_step = bool(others) or not (args.max_grad_norm or 0) > 0
        self._resumed = state.global_step > 0
        self._check_end(args, state, model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where more than adapters trains: measure gradients, which are gone by the time of the log."""
        if self._model is not None and self._each_step:
            self._measured = (_norm(self._adapters), _norm(self._all))

    def numbers(self, logs: Mapping[str, float]) -> Mapping[str, float]:
        """What is added to a log of the training loss; nothing to any other."""
        if self._model is None or self._progress is None or "loss" not in logs:
            return {}
        found = {"trainable_share": self._trainable / max(self._total, 1)}
        norm = self._grad_norm(logs.get("grad_norm"))
        if norm is not None:
            found["grad_norm"] = norm
        found |= self._progress.measure()
        if self._progress.left_out and not self._told:
            reasons = "; ".join(f"{role}: {reason}" for role, reason in self._progress.left_out.items())
            _LOG.warning("lora/delta_norm is left out where the base's norm is not known: %s.", reasons)
            self._told = True
        return {f"lora/{name}": value for name, value in found.items()}

    def _grad_norm(self, total: float | None) -> float | None:
        """The adapters' part of Trainer's own norm, which is the one before clipping. Clipping scales all alike."""
        if self._measured is None:
            return None if total is None else float(total)  # nothing but adapters trains
        adapters, everything = self._measured
        return adapters if total is None else adapters / everything * float(total) if everything else 0.0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the facts so far, for whoever pushes between."""
        self._record(args, state, kwargs)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the facts so far, for the card."""
        self._record(args, state, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the facts; then save, merge and push what was asked for."""
        self._record(args, state, kwargs)
        model, self._model = self._model, None
        self._adapters, self._all, self._progress = [], [], None  # a callback may outlive its model
        if model is None or not state.is_world_process_zero or not (self.merge_at_end or self.push_best):
            return
        save_checkpoint(model, args.output_dir)  # whatever fails now, what was trained is on disk
        try:
            if self.merge_at_end is not None:
                self._finish(args, "merging", lambda: self._merge(model, kwargs.get("processing_class")))
        except LoRAStateError:  # and after nothing else: who interrupts it does not mean to publish
            self._push(model, args, state)
            raise
        self._push(model, args, state)

    # ---- facts ------------------------------------------------------------------------------------------------------

    def _record(self, args: Any, state: Any, given: Mapping[str, Any]) -> None:
        if self._model is None:
            return
        known: dict[str, Any] = {"seconds": None} if self._resumed else {}  # Trainer counts from the resumption on
        loader = given.get("train_dataloader")
        run = RunFacts.from_log(
            vars(state),
            settings=_settings(args, given.get("optimizer")),
            trainable=self._trainable,
            total=self._total,
            versions=_versions(),
            datasets=tuple(dict.fromkeys([*self.datasets, *_dataset_ids(getattr(loader, "dataset", None))])),
            **known,
        )
        for entry in self._entries:
            if entry.alive:
                entry.record.run = run

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _check_end(self, args: Any, state: Any, model: nn.Module) -> None:
        if not (self.merge_at_end or self.push_best):
            return
        if state.is_hyper_param_search:
            raise LoRAUnsupportedError(
                "LoRACallback: in a hyperparameter search every trial would be merged and pushed, and the last stay.",
                name="merge_at_end" if self.merge_at_end else "push_best",
                remedy="Search without merge_at_end and push_best, then train with what was found.",
            )
        if is_sharded(model) or _distributed_type() in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise LoRAUnsupportedError(
                "LoRACallback: merge_at_end and push_best need the whole model in one process.",
                name="merge_at_end" if self.merge_at_end else "push_best",
                remedy="Merge or push in a script of its own, from what the run saved.",
            )
        if self.merge_at_end is not None:
            if self.merge_at_end.resolve() == Path(args.output_dir).resolve():
                raise LoRAConfigError(
                    "LoRACallback: merge_at_end is the output_dir, where the adapter and checkpoints lie.",
                    name="merge_at_end",
                    value=str(self.merge_at_end),
                    remedy="Name another folder.",
                )
            active = require(model).default
            if not active.mixture:
                raise LoRAStateError(
                    "LoRACallback: no adapter is active, so merge_at_end would have nothing to merge.",
                    name="merge_at_end",
                    remedy="Call set_lora('…') before train().",
                )
            require_mergeable(model, active)
        if self.push_best is not None:
            self._check_push(args, model)

    def _check_push(self, args: Any, model: nn.Module) -> None:
        if not hasattr(model, "push_adapter_to_hub"):
            raise LoRAUnsupportedError(
                f"LoRACallback: a {type(model).__name__} has no push_adapter_to_hub(), so push_best cannot work.",
                name="push_best",
                value=self.push_best,
                remedy="Train a transformers model, with hf_lora registered.",
            )
        names = [entry.name for entry in self._entries]
        chosen = self.push_options.get("adapter")
        if chosen is None and len(names) > 1:
            raise LoRANameError(
                f"LoRACallback: {len(names)} adapters train: {', '.join(map(repr, names))}.",
                name="push_best",
                expected=tuple(names),
                remedy='Name one: push_options={"adapter": "…"}.',
            )
        entry = require(model).entry(names[0] if chosen is None else chosen)
        if self.push_options.get("base_model") is None and hub_id(entry.record.config.base_model) is None:
            require_hub_id(getattr(getattr(model, "config", None), "_name_or_path", None))
        evaluates, saves = (str(getattr(how, "value", how)) != "no" for how in (args.eval_strategy, args.save_strategy))
        if evaluates and not (saves and args.metric_for_best_model):
            _LOG.warning(
                "push_best will push the last adapter: Trainer keeps a best one only with metric_for_best_model and "
                "a save_strategy."
            )

    def _finish(self, args: Any, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            raise LoRAStateError(
                f"The training is done and its adapter is saved in {args.output_dir!r}, but {what} it failed: {error}",
                name="merge_at_end" if what == "merging" else "push_best",
                value=str(self.merge_at_end if what == "merging" else self.push_best),
                remedy="Mend the cause, load_lora() the folder onto the base, and do that one step again.",
            ) from error

    def _merge(self, model: Any, tokenizer: Any) -> None:
        assert self.merge_at_end is not None
        self.merge_at_end.mkdir(parents=True, exist_ok=True)  # save_pretrained says nothing if a file is in the way
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            merge_lora(model)
            try:
                model.save_pretrained(self.merge_at_end)
            finally:
                unmerge_lora(model)
        finally:
            for module in training:
                module.training = True
        if tokenizer is not None:
            tokenizer.save_pretrained(self.merge_at_end)

    def _push(self, model: Any, args: Any, state: Any) -> None:
        if self.push_best is not None:
            self._finish(args, "pushing", lambda: self._push_adapter(model, args, state))

    def _push_adapter(self, model: Any, args: Any, state: Any) -> None:
        """Push the best: it is in memory if Trainer has loaded it, or else for as long as the push takes."""
        options = {**self.push_options, "adapter": self.push_options.get("adapter") or self._entries[0].name}
        best = state.best_model_checkpoint
        if best is not None and Path(best).name != f"checkpoint-{state.best_global_step}":
            _LOG.warning(
                "push_best pushes %s: the best evaluation was at step %s, of which there is no checkpoint.",
                Path(best).name,
                state.best_global_step,
            )
        if best is None or args.load_best_model_at_end:
            model.push_adapter_to_hub(self.push_best, **options)
            return
        last = {entry.name: read(model, entry.name) for entry in self._entries}
        load_checkpoint(model, best)
        try:
            model.push_adapter_to_hub(self.push_best, **options)
        finally:
            refill(model, last)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _usable_folder(folder: Any) -> Path:
    problem = ""
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        problem = "is no path of a folder"
    elif Path(folder).exists() and not Path(folder).is_dir():
        problem = "is a file"
    elif (Path(folder) / CONFIG_NAME).exists():
        problem = f"holds an {CONFIG_NAME}, and from_pretrained() would take it for an adapter"
    if problem:
        raise LoRAConfigError(
            f"merge_at_end={folder!r} {problem}.",
            name="merge_at_end",
            value=folder,
            expected="a folder that is new or holds no adapter",
        )
    return Path(folder)


def _require_repo(name: str, repo_id: Any) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not re-exported

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise LoRAConfigError(
            f"{name}={repo_id!r} is no id of a repo: {error}", name=name, value=repo_id, expected="'user/name'"
        ) from error


def _require_push_options(options: Mapping[str, Any], push_best: str | None) -> None:
    unknown = sorted(map(str, options.keys() - _PUSH_OPTIONS))
    if unknown:
        raise LoRAConfigError(
            f"push_options has {', '.join(map(repr, unknown))}, which push_adapter_to_hub() does not take.",
            name="push_options",
            value=unknown,
            expected=tuple(sorted(_PUSH_OPTIONS)),
        )
    if options and push_best is None:
        raise LoRAConfigError(
            "push_options without push_best: nothing would be pushed.", name="push_options", remedy="Give push_best."
        )


# ---- what a model and its run are ------------------------------------------------------------------------------------


def _own(model: Any) -> nn.Module:
    """The model inside DDP's or torch.compile's wrapper."""
    from accelerate.utils import extract_model_from_parallel

    found: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return found


def _distributed_type() -> str:
    from accelerate.state import AcceleratorState

    return str(AcceleratorState().distributed_type.value)


def _entries(model: nn.Module) -> list[Entry]:
    state = state_of(model)
    return [] if state is None else list(state.entries.values())


def _norm(parameters: Iterable[nn.Parameter]) -> float:
    grads = [whole(p.grad) for p in parameters if p.grad is not None]
    return float(nn.utils.get_total_norm(grads)) if grads else 0.0


def _settings(args: Any, optimizer: Any) -> dict[str, Any]:
    found = {name: getattr(args, name, None) for name in _SETTINGS}
    groups = getattr(optimizer, "param_groups", None)
    if groups:  # the optimizer's own word: optimizer_groups, or a user's optimizer, may have other rates
        rates = list(dict.fromkeys(float(group.get("initial_lr", group["lr"])) for group in groups if group["params"]))
        decays = [float(group.get("weight_decay", 0)) for group in groups if group["params"]]
        found |= {"learning_rate": ", ".join(f"{rate:.6g}" for rate in rates) if len(rates) > 1 else rates[0]}
        found |= {"weight_decay": max(decays), "optim": type(getattr(optimizer, "optimizer", optimizer)).__name__}
    plain = {name: getattr(value, "value", value) for name, value in found.items()}
    return {
        name: value
        for name, value in plain.items()
        if isinstance(value, (str, int, float)) and (value or name in ("seed", "weight_decay"))
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        if package not in sys.modules:  # installed, and no part of this run
            continue
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _dataset_ids(dataset: Any) -> list[str]:
    """Ids on the Hub that a `datasets.Dataset` says it was downloaded from."""
    urls = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    return [match[1] for url in urls if (match := _DATASET_URL.match(str(url)))]

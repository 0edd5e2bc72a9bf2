"""The journey: base, baselines, training, the same measures again, the adapter's file and what it promises.

Every stage ends by writing the record (results.json) whole; a run that was interrupted goes on from the last one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from . import base as bases
from . import baselines, evaluate, proofs
from .data import Example, Prompter, TaskData
from .files import folder_bytes, write_json
from .problems import SettingsError
from .settings import ADAPTER, CHECKPOINTS, FORMAT, RECORD, Settings, earlier_run, require_extras
from .train import complete_checkpoint, remove_incomplete, train
from .verdict import OURS, compare

__all__ = ["Interrupted", "journey", "quiet"]

NOT_BETTER = 1  # the exit code of a run whose adapter did not win, or whose proofs failed
_PROBED = 4  # held-out examples whose logits the proofs compare


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a message about what was kept."""


def journey(
    settings: Settings,
    *,
    fresh: bool = False,
    base: bases.Base | None = None,
    data: TaskData | None = None,
    console: Any = None,
) -> int:
    """Run the quickstart, or go on with the one in `settings.out`; returns the exit code.

    Args:
        settings: what to do and where.
        fresh: delete an earlier run in that folder first.
        base: instead of SmolLM2-135M-Instruct from wherever it is found.
        data: instead of the task's own examples.
        console: a rich Console to print on.

    Returns:
        0; 1 if the adapter is not better than every baseline by more than the error, or a proof failed.

    Raises:
        SettingsError, DataError, BaseNotFoundError, MissingExtraError: with what to do about it.
        Interrupted: Ctrl-C; the folder holds only whole files, and the same call goes on.
    """
    require_extras()
    from rich.console import Console

    settings = settings.checked()
    console = console or Console()
    record = earlier_run(settings, fresh=fresh)
    if record is not None and record["state"] == "finished":
        shutil.rmtree(settings.out / CHECKPOINTS, ignore_errors=True)  # an interruption may have come before this
        kept = f"{settings.out} holds a finished run. `--fresh` starts over, another `--out` keeps it.\n"
        console.print(kept, markup=False, highlight=False)
        return _report(console, record, settings)
    run = _Run(settings, console, record)
    try:
        with quiet():
            run.go(base, data)
    except KeyboardInterrupt:
        remove_incomplete(settings.out / CHECKPOINTS)
        raise Interrupted(run.kept()) from None
    return _report(console, run.record, settings)


class _Run:
    """One run: its record, and the stages that fill it."""

    def __init__(self, settings: Settings, console: Any, record: dict[str, Any] | None) -> None:
        self.settings, self.console, self.stage = settings, console, "getting ready"
        self.resumed = record is not None
        self.record: dict[str, Any] = record or {
            "format": FORMAT,
            "state": "begun",
            "asked": settings.asked(),
            "contestants": [],
            "seconds": {},
        }

    # ---- the stages, in order ----------------------------------------------------------------------------------------

    def go(self, base: bases.Base | None, data: TaskData | None) -> None:
        settings, console = self.settings, self.console
        if self.resumed:
            earlier = f"{settings.out} holds an interrupted run: {self._done()}. Going on from there."
            console.print(earlier, markup=False, highlight=False)
        with self._stage("finding the base model"):
            base = base or bases.find_base()
        console.print(f"Base: [bold]{base.model_id}[/bold] from {base.origin}.", highlight=False)
        with self._stage("building the data"):
            data = data or settings.load_data()
        console.print(f"Task: [bold]{data.title}[/bold].", highlight=False)
        for fact in data.facts:
            console.print(f"  {fact}", highlight=False, markup=False, style="dim")
        with self._stage(f"{base.arriving} the base model", spinner=True):
            model, tokenizer = bases.load_model(base), bases.load_tokenizer(base)
            config = model.config.__class__.from_dict(model.config.to_dict())
        self._begin(base, data, tokenizer)
        prompter = Prompter(tokenizer, data.question, data.prompt_tokens)
        model.to(_device())
        self._measure_untrained(model, prompter, data)
        self._train(model, prompter, data, base)
        self._measure(OURS, model, prompter, data)
        with self._stage("loading, merging and unmerging the saved adapter", spinner=True):
            trained = proofs.probe_logits(model, prompter, data.heldout[:_PROBED])
            del model  # only one model is in memory at a time
            again = bases.load_model(base, config).to(_device())
            found = proofs.check(again, settings.out / ADAPTER, trained, prompter, data.heldout[:_PROBED])
        self.record["proofs"] = [asdict(proof) for proof in found]
        self.record["comparisons"] = [{**asdict(c), "better": c.better} for c in compare(self.record)]
        self._write("finished")
        shutil.rmtree(settings.out / CHECKPOINTS, ignore_errors=True)  # they were for going on

    def _begin(self, base: bases.Base, data: TaskData, tokenizer: Any) -> None:
        """Put into the record what the run is about; a resumed one must be about the same."""
        about = {
            "task": {
                "name": data.name,
                "unit": data.unit,
                "answer_tokens": data.answer_tokens,
                "facts": list(data.facts),
                "chat": bool(tokenizer.chat_template),
            },
            "base": {
                "model": base.model_id,
                "revision": base.revision,
                "sha256": base.digest,
                "origin": base.origin,
                "loading": bases.loading_snippet(base),
            },
            "recipe": self.settings.recipe.as_dict(),
            "data": _fingerprint(data),
            "examples": [{"prompt": e.prompt, "target": e.target, "group": e.group} for e in data.heldout],
        }
        if self.resumed:
            names = {"base": "the base model", "recipe": "the recipe", "data": "the data (another Python, say)"}
            facts = [text for key, text in names.items() if self.record.get(key, about[key]) != about[key]]
            if facts:
                raise SettingsError(
                    f"The interrupted run in {self.settings.out} was about something else. What changed:",
                    name="--out",
                    value=str(self.settings.out),
                    facts=facts,
                    remedy="Start over with --fresh, or choose another --out.",
                )
        self.record.update(about)
        prompter = Prompter(tokenizer, data.question, data.prompt_tokens)
        self.record["try"] = prompter.asked(data.heldout[0])
        self.record["adapter"] = str(self.settings.out / ADAPTER)
        self._write("begun" if not self.resumed else self.record["state"])

    def _measure_untrained(self, model: Any, prompter: Prompter, data: TaskData) -> None:
        if not self._has("best constant"):
            with self._stage("choosing the trivial baselines", spinner=True):
                constant = baselines.best_constant(data.train, data.heldout)
                copied = baselines.copied_words(data.train, data.heldout, data.copying)
                frequencies = baselines.token_frequency_losses(prompter, data.train, data.heldout)
            self._add(constant)
            self._add(copied)
            self._add(evaluate.Measured("token frequencies", loss=frequencies, note="of the training answers"))
        self._measure("base", model, prompter, data)
        shots = baselines.short_shots(prompter, data.train)
        self._measure(f"base, {len(shots)} examples shown", model, prompter, data, shots)

    def _train(self, model: Any, prompter: Prompter, data: TaskData, base: bases.Base) -> None:
        """Train, or take up the finished training's last checkpoint; save the adapter."""
        from transformers import set_seed

        import hf_lora  # noqa: F401  # puts add_lora on the model
        from hf_lora import LoRAConfig

        recipe, out = self.settings.recipe, self.settings.out
        set_seed(recipe.seed)
        model.add_lora(
            LoRAConfig(
                r=recipe.rank,
                alpha=recipe.alpha,
                target_modules=list(recipe.targets),
                task_type="CAUSAL_LM",
                base_model=base.model_id,
                revision=base.revision,
            )
        )
        folder = out / CHECKPOINTS
        with self._stage("training"), self._bar("training", recipe.steps) as bar:

            def step(done: int, loss: float | None) -> None:
                bar(done, "" if loss is None else f"loss {loss:.2f}")

            losses = train(model, prompter, data, recipe, folder, step)
        self.record["training"] = losses
        with self._stage("saving the adapter"):
            model.save_lora(out / ADAPTER)
            weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora" not in n.lower())
            self.record["sizes"] = {"adapter": folder_bytes(out / ADAPTER), "base": weights}
            self._write("trained")

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def _measure(
        self, name: str, model: Any, prompter: Prompter, data: TaskData, shots: tuple[Example, ...] = ()
    ) -> None:
        if self._has(name):
            return
        examples = data.heldout
        with self._stage(f"measuring {name}"), self._bar(f"measuring {name}", len(examples)) as bar:
            done = 0

            def step(count: int) -> None:
                nonlocal done
                done += count
                bar(done, "")

            loss, texts = evaluate.measure(model, prompter, examples, shots, new_tokens=data.answer_tokens, step=step)
            rouge = tuple(evaluate.rouge_l(t, e.references) for t, e in zip(texts, examples, strict=True))
        self._add(evaluate.Measured(name, rouge=rouge, loss=loss, texts=texts))

    def _has(self, name: str) -> bool:
        return any(contestant["name"] == name for contestant in self.record["contestants"])

    def _add(self, measured: evaluate.Measured) -> None:
        self.record["contestants"].append({k: v for k, v in asdict(measured).items() if v})
        self._write(self.record["state"])

    # ---- the record and the screen -----------------------------------------------------------------------------------

    def _write(self, state: str) -> None:
        self.record["state"] = state
        write_json(self.settings.out / RECORD, self.record)

    @contextlib.contextmanager
    def _stage(self, name: str, *, spinner: bool = False) -> Iterator[None]:
        """Name what is under way, for an interruption's message, and add up its seconds."""
        self.stage, start = name, time.perf_counter()
        with self.console.status(f"{name} …") if spinner else contextlib.nullcontext():
            yield
        seconds = self.record["seconds"]
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 1)

    @contextlib.contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console) as progress:
            task = progress.add_task(name, total=total, note="")

            def update(done: int, note: str) -> None:
                said = note or progress.tasks[task].fields["note"]
                progress.update(task, completed=done, note=said)

            yield update

    def kept(self) -> str:
        """What an interrupted run leaves, for its last message."""
        return (
            f"Interrupted while {self.stage}. Kept in {self.settings.out}: {self._done()}. "
            "The same command goes on from there."
        )

    def _done(self) -> str:
        done = [c["name"] for c in self.record["contestants"] if c["name"] != OURS]
        parts = [f"{len(done)} baselines measured"] if done else []
        checkpoint = complete_checkpoint(self.settings.out / CHECKPOINTS)
        if checkpoint:
            parts.append(f"training at step {checkpoint.name.rpartition('-')[2]} of {self.settings.recipe.steps}")
        if self.record["state"] == "trained":
            parts.append("the trained adapter")
        if self._has(OURS):
            parts.append("its measurement")
        return ", ".join(parts) or "nothing yet"


def _report(console: Any, record: dict[str, Any], settings: Settings) -> int:
    from . import report

    comparisons = compare(record)
    lost = [c for c in comparisons if not c.better]
    broken = [proof for proof in record["proofs"] if not proof["held"]]
    report.show_results(console, record, comparisons)
    report.show_sizes(console, record, str(settings.out / ADAPTER))
    report.show_proofs(console, record)
    report.show_before_after(console, record)
    minutes = sum(record["seconds"].values()) / 60
    took = f"All of it took {minutes:.1f} minutes; every number is in {settings.out / RECORD}.\n"
    console.print(took, markup=False, highlight=False)
    if not lost and not broken:
        console.print(
            "[bold green]The adapter beats the base and every baseline by more than the error.[/bold green]\n"
        )
    for c in lost:
        console.print(
            f"[bold red]Not shown to be better[/bold red] than {c.name} in {c.metric}: {c.mean:+.3f} ± {c.error:.3f}. "
            "More --steps may help."
        )
    for proof in broken:
        console.print(f"[bold red]Not the same outputs[/bold red], {proof['claim']}: {proof['detail']}.")
    report.show_next(console, record, _other_task(settings))
    return NOT_BETTER if lost or broken else 0


def _other_task(settings: Settings) -> str:
    longer = f"    hf-lora quickstart --task {settings.task}"
    longer += f" --data {settings.data}" if settings.data else ""
    return f"{longer} --steps {4 * settings.recipe.steps} --out {settings.out}-longer"


def _fingerprint(data: TaskData) -> str:
    """SHA-256 of every example: another Python or another folder gives another one."""
    content = [[e.prompt, e.target, *e.references, e.group] for e in (*data.train, *data.heldout)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own bars and warnings off the screen: what matters here is said by the journey."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

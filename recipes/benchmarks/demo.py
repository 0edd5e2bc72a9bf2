"""Fifty visitors at once on the demo: how long each waits, beside the same requests one at a time.

    python recipes/benchmarks/demo.py [--requests 50] [--adapters spaces_demo/adapters] [--out docs/benchmarks]

The page runs as `hf-lora demo` runs it, on a port of this machine, and is asked through gradio_client. Every answer is
compared with PEFT's greedy answer to the same prompt alone, on a base of its own. Writes demo.json and demo.md. Needs
hf_lora[demo,bench], the base that the adapters name, 4 GB of memory and no network.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 10  # each is a visitor


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--adapters", type=Path, default=ROOT / "spaces_demo" / "adapters")
    parser.add_argument("--out", type=Path, help="folder; nothing is written unless it is given")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="what to say when it was")
    return parser.parse_args()


def measure(adapters: Path, count: int) -> dict[str, Any]:
    """Ask one at a time and all at once; every answer checked."""
    from gradio_client import Client

    from hf_lora.demo import launch_options, make, make_demo

    demo = make_demo(None, adapters)
    asked = _requests(demo, count)
    expected = _alone(demo, asked)
    page = make(demo)
    try:
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **launch_options())
        clients = [Client(url, verbose=False) for _ in range(CLIENTS)]

        def ask(i: int) -> tuple[float, dict[str, Any]]:
            name, fields = asked[i]
            begun = time.perf_counter()
            found = clients[i % CLIENTS].predict(name, fields, False, api_name="/ask")
            return time.perf_counter() - begun, found

        for i in range(min(4, count)):  # every adapter once: loaded, and everything warm
            ask(i)
        ways: dict[str, Any] = {}
        for way, workers in (("one at a time", 1), (f"{count} at once", count)):
            before = demo.dispatcher.batches
            begun = time.perf_counter()
            with ThreadPoolExecutor(workers) as pool:
                answers = list(pool.map(ask, range(count)))
            wall = time.perf_counter() - begun
            wrong = [
                (asked[i], answer["answers"][0]["text"], expected[i])
                for i, (_, answer) in enumerate(answers)
                if answer["state"] != "done" or answer["answers"][0]["text"] != expected[i]
            ]
            ways[way] = {
                "seconds": [seconds for seconds, _ in answers],
                "wall": wall,
                "tokens": sum(answer["answers"][0]["tokens"] for _, answer in answers),
                "batches": demo.dispatcher.batches - before,
                "switch_ms": [answer["switch_ms"] for _, answer in answers],
                "wrong": wrong,
            }
        for client in clients:
            client.close()
        return {"requests": count, "tasks": list(demo.library.shipped), "base": demo.base_name, "ways": ways}
    finally:
        page.close(verbose=False)
        demo.close()


def _requests(demo: Any, count: int) -> list[tuple[str, dict[str, str]]]:
    """Task after task, each with its examples in turn."""
    tasks = {name: itertools.cycle(a.task.examples) for name, a in demo.library.shipped.items() if a.task.examples}
    return [(name, dict(next(tasks[name]))) for name, _ in zip(itertools.cycle(tasks), range(count), strict=False)]


def _alone(demo: Any, asked: list[tuple[str, dict[str, str]]]) -> list[str]:
    """PEFT's answers, each prompt by itself."""
    import copy

    import torch
    from peft import PeftModel

    base, tokenizer = copy.deepcopy(demo.engine.model), demo.engine.tokenizer
    model: Any = None
    known: dict[str, str] = {}
    found = []
    for name, fields in asked:
        adapter = demo.library.shipped[name]
        if model is None:
            model = PeftModel.from_pretrained(base, str(adapter.folder), adapter_name=name)
        elif name not in model.peft_config:
            model.load_adapter(str(adapter.folder), adapter_name=name)
        model.set_adapter(name)
        text = adapter.task.written(tokenizer, adapter.task.text(fields))
        key = f"{name} {text}"
        if key not in known:
            ids = torch.tensor([demo.engine.encode(text, special=not adapter.task.chat)])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=adapter.task.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=demo.engine.pad,
                )
            answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).lstrip()
            stops = [at for at in (answer.find(stop) for stop in adapter.task.stop) if at > 0]
            known[key] = (answer[: min(stops)] if stops else answer).strip()
        found.append(known[key])
    return found


def _quantile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


def as_markdown(found: dict[str, Any], date: str) -> str:
    tasks = found["tasks"]
    lines = [
        f"Measured on {date}, {os.cpu_count()} cores, `{found['base']}`, {len(tasks)} tasks ({', '.join(tasks)}).",
        "Every answer equals PEFT's to the same prompt alone.",
        "",
        "| requests | p50, s | p95, s | all of them, s | tokens/s | batches | median switch, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, row in found["ways"].items():
        middle, late = _quantile(row["seconds"], 0.5), _quantile(row["seconds"], 0.95)
        lines.append(
            f"| {way} | {middle:.2f} | {late:.2f} | {row['wall']:.1f} | {row['tokens'] / row['wall']:.0f} "
            f"| {row['batches']} | {statistics.median(row['switch_ms']):.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = arguments()
    found = measure(options.adapters, options.requests)
    text = as_markdown(found, options.date)
    print(text)
    wrong = {way: row["wrong"] for way, row in found["ways"].items() if row["wrong"]}
    if wrong:
        sys.exit(f"Some answers differ from PEFT's: {json.dumps(wrong, indent=1)}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "demo.json").write_text(json.dumps({"date": options.date, **found}, indent=1) + "\n")
        (options.out / "demo.md").write_text(text)


if __name__ == "__main__":
    main()

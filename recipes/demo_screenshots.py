"""The pictures of the demo in docs/demo: desktop, dark, phone, and one batch, of the real page in a real browser.

    python recipes/demo_screenshots.py [--adapters spaces_demo/adapters] [--out docs/demo]

Needs hf_lora[demo], playwright and a chromium, and the base that the adapters name.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

ROOT = Path(__file__).resolve().parents[1]
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
TASK = "restaurants"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=ROOT / "spaces_demo" / "adapters")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "demo")
    return parser.parse_args()


def ask(page: Any) -> None:
    page.locator(f"#ask-task input[value={TASK}]").check()
    page.wait_for_selector(f"#ask-{TASK}-name", state="visible")
    page.get_by_role("button", name="Ask both").click()
    page.wait_for_selector("#ask-state .note.good", timeout=120_000)
    page.mouse.move(0, 0)
    page.wait_for_timeout(400)


def main() -> None:
    options = arguments()
    from playwright.sync_api import sync_playwright

    from hf_lora.demo import launch_options, make, make_demo

    options.out.mkdir(parents=True, exist_ok=True)
    demo = make_demo(None, options.adapters)
    page = make(demo)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **launch_options())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGS)

        def visit(**look: Any) -> Any:
            opened = browser.new_context(**look).new_page()
            opened.goto(url)
            opened.wait_for_selector("#ask-run")
            return opened

        desktop = visit(viewport={"width": 1240, "height": 860})
        ask(desktop)
        desktop.screenshot(path=options.out / "desktop.png")
        desktop.get_by_role("tab", name="One batch").click()
        desktop.get_by_role("button", name="Run as one batch").click()
        desktop.wait_for_selector("#batch-state .note.good", timeout=120_000)
        desktop.wait_for_timeout(400)
        desktop.screenshot(path=options.out / "batch.png", full_page=True)
        dark = visit(viewport={"width": 1240, "height": 860}, color_scheme="dark")
        dark.get_by_role("tab", name="Adapters").click()
        dark.wait_for_selector("#adapters-spectrum img")
        dark.wait_for_timeout(600)
        dark.screenshot(path=options.out / "dark.png")
        phone = visit(viewport={"width": 390, "height": 844}, device_scale_factor=2)
        ask(phone)
        phone.screenshot(path=options.out / "phone.png")
        browser.close()
    page.close(verbose=False)
    demo.close()


if __name__ == "__main__":
    main()

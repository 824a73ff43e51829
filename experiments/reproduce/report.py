"""Train 16 small runs on the sources of your Python, draw their report, time it, and take its pictures in a browser.

Eight learning rates by two seeds. Writes `results/report.json`, and with chromium, chromedriver and selenium
`results/report-*.png`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.reproduce.record import write_result
from tfm_jax import config as configs
from tfm_jax.errors import UserError

EXAMPLES = "  python -m experiments.reproduce.report"
CONFIG = "configs/gpt_stdlib.py:smoke"
RATES, SEEDS, STEPS = [1e-3 * 2**i for i in range(8)], 2, 60
COMMON = {"train.steps": STEPS, "train.eval_every": 20, "log.every": 2, "log.tensorboard": False, "checkpoint.every": 0}
WAIT_S = 60
FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars", "window-size=1100,1000",
    "host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--workdir", type=Path, default=Path("runs/report"))
    made.add_argument("--pictures", type=Path, default=Path("results"), help="folder of the screenshots")
    flags, _ = cli.parse(made, argv)
    cli.setup()
    from tfm_jax.train.run import train

    for rate in RATES:
        for seed in range(SEEDS):
            changes = {**COMMON, "optim.lr": rate, "optim.schedule": "constant", "train.seed": seed, "data.seed": seed}
            config = configs.resolve(configs.load(CONFIG), [(key, str(value)) for key, value in changes.items()])
            train(config, flags.workdir / f"lr={rate:.3g},seed={seed}")
    command = [sys.executable, "-m", "experiments.report", str(flags.workdir), "--json"]
    began = time.perf_counter()
    # In a process of its own: the start belongs to it.
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    said = json.loads(done.stdout.splitlines()[-1])
    figures: dict[str, Any] = {"runs": said["runs"], "seconds": round(seconds, 2), "bytes": said["bytes"]}
    write_result("report", figures, config={"file": CONFIG, "rates": RATES, "seeds": SEEDS, **COMMON})
    subprocess.run(
        [*command[:-1], "--prompt", "def main(", "--attend", "for i in range(10):", "--heads", "0.0", "1.3"], check=True
    )
    for path in screenshots(Path(said["page"]), flags.pictures):
        print(path)
    print(f"{said['runs']} runs: {seconds:.1f} s, {said['bytes'] / 1e6:.2f} MB.")
    if flags.json:
        cli.print_json(figures)
    return 0 if seconds <= 10 and said["bytes"] < 5e6 else 1


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window and without a network, by selenium.

    Raises:
      UserError: selenium, chromium or chromedriver is not installed.
    """
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        raise UserError("A browser needs selenium: pip install selenium.") from None
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise UserError("A browser needs chromium and chromedriver on the PATH.")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as opened:
        yield opened


def screenshots(page: Path, folder: Path) -> list[Path]:
    """`report-settings.png` at a desk's width and `report-phone.png`.

    Raises:
      UserError: see `browser`; the page is not drawn.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    with browser() as opened:
        for name, width, height, place in (("settings", 1000, 800, "settings"), ("phone", 400, 800, "runs")):
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            opened.get(page.absolute().as_uri())
            deadline = time.monotonic() + WAIT_S
            while not opened.execute_script("return window.Bokeh && Bokeh.documents[0] && Bokeh.documents[0].is_idle"):
                if time.monotonic() > deadline:
                    raise UserError(f"{page} was not drawn within {WAIT_S} s.")
                time.sleep(0.1)
            opened.execute_script(
                f"document.querySelector('nav').remove(); document.getElementById('{place}').scrollIntoView()"
            )
            time.sleep(0.5)
            paths.append(folder / f"report-{name}.png")
            opened.save_screenshot(str(paths[-1]))
    return paths


if __name__ == "__main__":
    cli.run(main)

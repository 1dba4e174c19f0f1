"""Screenshots of the pages: ``python docs/pictures/screenshots.py``. Needs chromium.

The report is of generated loads of DeepSeek-V2-Lite, the plan of the 671B job.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.browser import FLAGS
from tests.support.synthetic_trace import run_info, write_run

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUN = run_info(
    26,
    64,
    6,
    flavor="16B",
    world_size=64,
    pp=1,
    dp_shard=64,
    ep=8,
    schedule=None,
    local_batch_size=4,
    global_batch_size=256,
    micro_batch_size=4,
    seq_len=4096,
)
PLAN = ["plan", "--job-config", "configs/deepseek_v3/671b.toml", "--hardware", "h100"]
PLAN += ["--ep", "16,32,64", "--hot-experts", "8", "--imbalance", "1,1.5,2,lognormal:0.5"]


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "titan_moe_lb.cli", *arguments], check=True, cwd=ROOT)


def photograph(page: Path, name: str, height: int) -> None:
    """Photograph a page in both themes, 1,200 pixels wide."""
    for theme, scheme in (("dark", 0), ("light", 1)):
        subprocess.run(
            [
                "chromium",
                *FLAGS,
                "--hide-scrollbars",
                f"--blink-settings=preferredColorScheme={scheme}",
                f"--user-data-dir={page.parent / 'browser'}",
                "--virtual-time-budget=15000",
                f"--window-size=1200,{height}",
                f"--screenshot={HERE / f'{name}_{theme}.png'}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, plan = Path(folder) / "deepseek_v2_lite", Path(folder) / "plan.html"
        write_run(run, RUN, 120, skew=1.6, every=10)
        command("report", str(run))
        command(*PLAN, "-o", str(plan))
        photograph(run / "report.html", "report", 1080)
        photograph(plan, "plan", 855)


if __name__ == "__main__":
    main()

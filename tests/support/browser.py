"""Real browser that opens a page, runs a script on it, and returns the result."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from bootstrap import PROGRAMS

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Time of the page, which runs as fast as the page computes: animations and timers do not wait.
VIRTUAL_MILLISECONDS = 60_000

ACT = """
<script type="module">
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
const until = async (condition) => {
  while (!condition()) await new Promise((again) => setTimeout(again, 20));
};
const act = async () => { %s };
const shown = await act().catch((error) => { errors.push(String(error)); });
const result = document.createElement("pre");
result.id = "what-the-test-saw";
result.textContent = JSON.stringify({ shown, errors });
document.body.append(result);
</script>
"""


def act(page: Path, script: str, dark: bool = False) -> Any:
    """Run ``script``, the body of an async function, on the loaded page; return its result as JSON.

    With ``dark``, the reader prefers a dark theme. The script may wait with ``await until(() =>
    condition)``. An error on the page fails the test.
    """
    browser = next(filter(None, map(shutil.which, PROGRAMS["chromium"])), None)
    if browser is None:
        pytest.skip(
            "needs a browser: sudo apt-get install chromium (./run_tests.sh does so as root on Debian)"
        )
    acted = page.with_suffix(".acted.html")
    html = page.read_text(encoding="utf-8")
    acted.write_text(html.replace("</body>", ACT % script + "</body>"), encoding="utf-8")
    result = subprocess.run(
        [
            browser,
            *FLAGS,
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={page.parent / 'browser'}",
            f"--virtual-time-budget={VIRTUAL_MILLISECONDS}",
            "--dump-dom",
            acted.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="what-the-test-saw">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, f"the page did not come to an end: {result.stderr[-2000:]}"
    saw = json.loads(unescape(found[1]))
    assert not saw["errors"], saw["errors"]
    return saw["shown"]

"""HTML pages of one file, which open without a network: what report and plan share."""

from __future__ import annotations

import base64
import os
import zlib
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from titan_moe_lb.errors import JobError


def render(template: str, **content: Any) -> str:
    """Fill a template; its path and those it includes are relative to the package.

    Besides ``content`` the template gets ``plotly``, the packed script.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("titan_moe_lb", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(plotly=packed_plotly(), **content)


def packed_plotly() -> str:
    """The script that draws, packed: it is 4.8 MB otherwise."""
    return packed(get_plotlyjs())


def packed(text: str) -> str:
    """Deflated and base64, as the page's script inflates it."""
    return base64.b64encode(zlib.compress(text.encode(), level=9)).decode()


def write(page: str, output: Path) -> None:
    """Write a page whole: who reloads it never sees half.

    Raises:
        JobError: the file cannot be written.
    """
    partial = output.with_name(output.name + ".new")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise JobError(
            f"{output} cannot be written ({error.strerror}): name another file with --output"
        ) from None

"""HTML pages of one file, which open without a network: what report and plan share."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from titan_moe_lb.pages import output_file


def render(template: str, **content: Any) -> str:
    """Fill a template; its path and those it includes are relative to the package.

    Besides ``content`` the template gets ``plotly``, the packed script, and ``mark``, by
    which the page is known as ours.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("titan_moe_lb", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(
        plotly=packed_plotly(), mark=output_file.MARK, **content
    )


def packed_plotly() -> str:
    """The script that draws, packed: it is 4.8 MB otherwise."""
    return packed(get_plotlyjs())


def packed(text: str) -> str:
    """Deflated and base64, as the page's script inflates it."""
    return base64.b64encode(zlib.compress(text.encode(), level=9)).decode()

"""HTML pages of one file, which open without a network."""

from __future__ import annotations

import base64
import functools
import json
import zlib
from collections.abc import Iterable
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from titan_moe_lb.pages import output_file, palette
from titan_moe_lb.pages.charts import Chart


def render(template: str, **content: Any) -> str:
    """Fill a template that extends ``pages/page.html.jinja``; paths are relative to the package.

    Besides ``content`` the template gets ``plotly``, the packed script; ``palette``, its
    colours; and ``mark``, by which the page is known as ours.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("titan_moe_lb", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(
        plotly=packed_plotly(), palette=palette.css(), mark=output_file.MARK, **content
    )


def drawings(charts: Iterable[Chart]) -> str:
    """The figures of every panel of every chart, packed."""
    return packed(json.dumps([[plain(panel.figure) for panel in chart.panels] for chart in charts]))


def plain(figure: go.Figure) -> dict[str, Any]:
    """The figure as plotly's script takes it."""
    return json.loads(figure.to_json())


@functools.cache
def packed_plotly() -> str:
    """The script that draws, packed: it is 4.8 MB otherwise."""
    return packed(get_plotlyjs())


def packed(text: str) -> str:
    """Deflated and base64, as the page's script inflates it."""
    return base64.b64encode(zlib.compress(text.encode(), level=9)).decode()

"""HTML pages in a single file, which need no network."""

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
    """Render a template that extends ``pages/page.html.jinja``.

    Args:
        template: path of the template in the package.
        **content: variables of the template, besides ``plotly`` (the packed script), ``palette``
            (the colours) and ``mark`` (the tag that :func:`output_file.check` recognises).

    Returns:
        The HTML page.
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
    """Pack the figures of every panel of every chart."""
    return packed(json.dumps([[plain(panel.figure) for panel in chart.panels] for chart in charts]))


def plain(figure: go.Figure) -> dict[str, Any]:
    """Convert a figure to the JSON structure of plotly's script."""
    return json.loads(figure.to_json())


@functools.cache
def packed_plotly() -> str:
    """Pack plotly's script, which has 4.8 MB unpacked."""
    return packed(get_plotlyjs())


def packed(text: str) -> str:
    """Deflate a text and encode it as base64; ``inflate`` of ``page.js`` is the inverse."""
    return base64.b64encode(zlib.compress(text.encode(), level=9)).decode()

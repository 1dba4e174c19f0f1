"""Optional flags in ``--help``, without a default of None or False."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
"""Flag without a value."""


def optional_flag(metavar: str, *aliases: str) -> Any:
    """Describe a flag that may be left out; its text names its default, if it has one."""
    return tyro.conf.arg(metavar=metavar, aliases=aliases, help_behavior_hint="")

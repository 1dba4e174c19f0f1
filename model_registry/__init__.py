"""One package per model: its registry entry, config functions and defaults with their sources."""

from titan_moe_lb.upstream import cpu

cpu.prepare()

"""Anticipatory routing: experts that parameters of some steps ago chose."""

from titan_moe_lb.balancing.anticipatory_routing.anticipatory import Anticipatory as Anticipatory

"""Losses, bias rules and forced routing, and the router that applies them."""

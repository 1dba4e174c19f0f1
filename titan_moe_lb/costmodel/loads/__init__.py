"""Loads of experts: assumed, drawn and recorded."""

"""Loads of experts: two-level, log-normal and recorded."""

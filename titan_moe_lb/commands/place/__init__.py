"""Experts of a checkpoint in another order: ``titan-moe-lb place``."""

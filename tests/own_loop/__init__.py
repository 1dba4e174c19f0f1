"""Tests of own_loop."""

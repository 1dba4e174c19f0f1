"""Tests of refused input."""

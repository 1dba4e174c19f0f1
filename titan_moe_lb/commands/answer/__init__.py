"""Answers of ``plan`` and ``study`` as data, and one renderer each for terminal, JSON and page."""

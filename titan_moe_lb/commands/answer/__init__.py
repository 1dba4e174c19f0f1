"""Answers of ``plan`` and ``study`` as data, with renderers for terminal, JSON and HTML page."""

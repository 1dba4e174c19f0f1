"""Devices and links, and the time of a single operation on them."""

"""Devices, links, and the time of one operation on them."""

"""Comparison of the gradient of a global batch between layouts.

``python -m tests.parity --loss sequence_wise --layout "pp=2,dp_shard=2,ac=full"``
"""

"""MoE load balancing for torchtitan pre-training."""

__version__ = "0.1.0"

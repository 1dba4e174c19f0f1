"""MoE load balancing for torchtitan pre-training."""

"""Load balancing without torchtitan's Trainer, in a user's training loop."""

"""Balance without torchtitan's Trainer: a model, an optimizer, a loop of one's own."""

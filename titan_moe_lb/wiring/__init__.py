"""How losses, bias rules and records get into a model of torchtitan."""

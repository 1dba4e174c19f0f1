"""What changes training: losses, rules of the expert bias, forced routing, and the router they act in."""

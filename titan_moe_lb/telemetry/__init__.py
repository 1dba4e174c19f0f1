"""What is seen: recorder, reduction, metrics."""

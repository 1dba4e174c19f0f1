"""Insertion of losses, bias rules and records into torchtitan's models."""

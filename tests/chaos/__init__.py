"""Faults of a job: it is killed, stopped or damaged, and must end as if undisturbed."""

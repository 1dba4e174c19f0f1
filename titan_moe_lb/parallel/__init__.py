"""Placement of a job on its ranks: layout, cut of the batch, local shards, pipeline schedules."""

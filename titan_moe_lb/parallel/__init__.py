"""How a job lies on its ranks: layout, cut of the batch, local shard, pipeline schedules."""

"""``titan-moe-lb import``: a run folder from the loads of another framework."""

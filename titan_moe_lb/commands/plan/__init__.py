"""``titan-moe-lb plan``: predicted step time and memory of one job, under several loads."""

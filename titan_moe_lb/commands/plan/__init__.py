"""``titan-moe-lb plan``: the cost model's answers for one job, as a table, JSON or a page."""

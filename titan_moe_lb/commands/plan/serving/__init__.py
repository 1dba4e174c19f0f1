"""``titan-moe-lb plan --serve``: predicted step time and memory of a deployment."""

"""``titan-moe-lb watch``: a live run in the terminal."""

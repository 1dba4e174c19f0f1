"""``titan-moe-lb place``: write a checkpoint with its experts in another order."""

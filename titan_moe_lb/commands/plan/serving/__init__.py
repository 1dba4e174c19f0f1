"""``titan-moe-lb plan --serve``: what the model of a job takes where it is served."""

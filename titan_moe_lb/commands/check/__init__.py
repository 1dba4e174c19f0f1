"""``titan-moe-lb check``: test that the losses and biases of a job act."""

"""``titan-moe-lb study``: the same job under many settings, and what comes of each."""

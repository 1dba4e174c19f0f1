"""``titan-moe-lb study``: a comparison of one job under many settings."""

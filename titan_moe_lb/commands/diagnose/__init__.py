"""``titan-moe-lb diagnose``: what is wrong with the balance of a run, and what to change."""

"""``titan-moe-lb diagnose``: faults in the balance of a run, and their remedies."""

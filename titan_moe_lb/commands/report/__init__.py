"""``titan-moe-lb report``: an HTML page about a run, from its trace."""

"""Jobs, ranks and traces that several tests share."""

"""Which tokens may teach a router, and the sequences that they form."""

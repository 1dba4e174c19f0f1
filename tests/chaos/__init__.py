"""A job that is killed, stopped, starved and lied to, and has to come out as if it had not been."""

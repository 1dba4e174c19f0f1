"""Conversion of TOML and flags to the config of a job; catalog of jobs; help."""

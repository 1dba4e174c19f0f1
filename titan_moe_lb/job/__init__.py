"""From TOML and flags to the config of a job: catalog, help, dry run."""

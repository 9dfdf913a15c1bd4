"""Settings of a run: every setting, its registries, YAML, and the JSON schema."""

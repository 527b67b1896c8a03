"""The YAML: schema, presets, loading and checking."""

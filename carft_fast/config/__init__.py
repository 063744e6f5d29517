"""Settings: their bounds and documentation, TOML in and out, and methods as presets of them."""

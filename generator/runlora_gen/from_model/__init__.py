"""A live model, or a config that Transformers builds one of, read as an architecture: torch is imported here."""

"""Real loaders of public formats, one per file, and splits that do not leak."""

"""General helpers: processes, seeds, progress, provenance, files."""

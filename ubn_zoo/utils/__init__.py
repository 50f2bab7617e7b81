"""Helpers without knowledge of models: processes, seeds, progress, provenance, files."""

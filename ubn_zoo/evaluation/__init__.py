"""Measurements of models: accuracy, feature condensation, and their tables and plots."""

"""Evaluate models: accuracy, feature condensation, speed, tables and plots."""

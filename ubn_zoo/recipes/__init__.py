"""Recipes: settings of training runs, their keys and files."""

"""Training runs as data: recipes, their keys and their files."""

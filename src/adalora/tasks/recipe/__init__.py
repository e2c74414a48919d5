"""A recipe: its fields, their checks, its file."""

"""Recipes and the tasks that they train: data, metrics, the run."""

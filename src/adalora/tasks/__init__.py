"""Recipes and the tasks that they train: data, metrics, models, the run. Nothing of the method.

A task is a module in `kinds/` with a class below `kinds.base.Task`, its options in `recipe/options.py`, its line in
`REGISTRY`.
"""

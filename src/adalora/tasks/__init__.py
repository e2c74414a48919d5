"""Recipes and the tasks that they train: data, metrics, models, the run. Nothing of the method.

A task is a module with a class below `base.Task`, and options in `options`.
"""

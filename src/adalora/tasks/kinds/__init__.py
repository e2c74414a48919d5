"""One file for each kind of task: its features, its model class, its measures."""

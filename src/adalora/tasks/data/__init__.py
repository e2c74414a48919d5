"""From a recipe's data part to rows with the task's column names."""

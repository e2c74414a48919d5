"""The optimizers that train an adapter, and what they remember of its parameters."""

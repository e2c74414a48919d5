"""How many triplets a model may have, and takes away those that are not kept."""

"""Training in several processes, and the engines that cannot be trained with."""

"""Where training happens: the Hugging Face Trainer and what is built on it."""

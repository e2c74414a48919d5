"""Where training happens: one module for each trainer, launcher or logger that calls the controller."""

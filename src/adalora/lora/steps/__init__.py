"""What goes on around every optimizer step."""

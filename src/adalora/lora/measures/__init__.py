"""What is read off an adapter while it trains; nothing is changed."""

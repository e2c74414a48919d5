"""How an adapter starts, before its first step."""

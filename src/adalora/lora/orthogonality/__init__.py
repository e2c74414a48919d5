"""Keeps P and Q orthogonal, by a regulariser or exactly."""

"""Blocks that encoders share."""

"""Turns of conversations in a persona space: trajectories, page and tables."""

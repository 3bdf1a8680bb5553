"""Sampling responses: one file per engine, and the noise that makes them reproducible."""

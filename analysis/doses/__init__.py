"""Dose-response: what responses become as a model is moved along a direction."""

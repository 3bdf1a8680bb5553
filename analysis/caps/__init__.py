"""Activation caps: thresholds on the Assistant Axis, and ranges of layers for them."""

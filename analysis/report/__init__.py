"""The report of a fitted run."""

"""Fitted runs beside each other: measures, page and tables."""

"""Scoring how far responses play their roles, by a model that reads them."""

"""Exact PCA that learns in pieces."""

from personaspace.analysis.pca.estimator import ExactIncrementalPCA

__all__ = ["ExactIncrementalPCA"]

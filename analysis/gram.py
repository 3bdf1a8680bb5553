"""Axis, first component and positions from inner products alone, which is all that resampling needs to know.

Vectors are `default`'s first, then the roles'. With K their Gram matrix and a the coefficients of the axis
(1 for `default`, -1/R for each role), axis . v = K a, |axis|^2 = a K a, and PC1 is the leading eigenvector of the
roles' centred Gram matrix (the dual form of PCA). Shape suffixes: R roles, V = R + 1 vectors.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisGeometry:
    """The axis of some vectors, as far as their inner products tell."""

    position_R: Floats
    """Each role's position: the mean role at 0, `default` at 1."""
    cos_axis_pc1: float
    """abs(cosine) of the axis and the first component of the roles."""


def axis_coefficients(roles: int, drawn_R: NDArray[np.intp] | None = None) -> Floats:
    """``(V,)``: what the axis takes of each vector; with ``drawn_R`` of roles drawn with replacement."""
    counts = np.ones(roles) if drawn_R is None else np.bincount(drawn_R, minlength=roles)
    return np.concatenate([[1.0], -counts / counts.sum()])


def axis_geometry(gram_VV: Floats, drawn_R: NDArray[np.intp] | None = None) -> AxisGeometry:
    """Positions of all roles on the axis, and its cosine with PC1. ``drawn_R``: roles that make axis and PC1."""
    roles = len(gram_VV) - 1
    a_V = axis_coefficients(roles, drawn_R)
    along_V = gram_VV @ a_V
    squared = float(a_V @ along_V)
    drawn = np.arange(roles) if drawn_R is None else drawn_R
    origin = along_V[1:][drawn].mean()
    centred_RR = centre(gram_VV[1:, 1:][np.ix_(drawn, drawn)])
    value, vector_R1 = eigh(centred_RR, subset_by_index=[len(drawn) - 1, len(drawn) - 1])
    along_R = along_V[1:][drawn] - origin
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = abs(float(vector_R1[:, 0] @ along_R)) / np.sqrt(float(value[0]) * squared)
        return AxisGeometry(position_R=(along_V[1:] - origin) / squared, cos_axis_pc1=float(cosine))


def held_out_positions(cross_VV: Floats, fit_VV: Floats, drawn_R: NDArray[np.intp] | None = None) -> Floats:
    """Positions ``(R,)`` of held-out role vectors on the axis of others.

    ``cross_VV[i, j]``: inner product of held-out vector i and fitted vector j; ``fit_VV``: the Gram matrix of the
    latter.
    """
    a_V = axis_coefficients(len(fit_VV) - 1, drawn_R)
    along_V = cross_VV @ a_V
    drawn = slice(None) if drawn_R is None else drawn_R
    position_R: Floats = (along_V[1:] - along_V[1:][drawn].mean()) / float(a_V @ fit_VV @ a_V)
    return position_R


def centre(gram_RR: Floats) -> Floats:
    """The Gram matrix of vectors less their mean."""
    mean_R = gram_RR.mean(axis=0)
    centred_RR: Floats = gram_RR - mean_R - mean_R[:, None] + mean_R.mean()
    return centred_RR

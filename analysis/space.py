"""The persona space and the Assistant Axis of one layer, from role means (arXiv 2601.10387, section 2).

Shape suffixes: R role vectors without default, D hidden, K components, L layers, T thresholds.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

VARIANCE_THRESHOLDS = (0.7, 0.8, 0.9, 0.95)
"""Shares of the role vectors' variance for which the number of components is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonaSpace:
    """Axis and principal components of one layer. Arrays are float64."""

    default_D: NDArray[np.float64]
    """Mean of the default rollouts."""
    role_RD: NDArray[np.float64]
    """Role vectors: each role's mean."""
    core: NDArray[np.intp]
    """Places of the role vectors that the axis rests on: roles that were fully played, or all if nobody judged."""
    axis_D: NDArray[np.float64]
    """mean(default) - mean(core role vectors): points to the Assistant."""
    component_KD: NDArray[np.float64]
    """Unit vectors. PC1 points to the Assistant; the others' signs are free, and fixed by the largest loading."""
    variance_ratio_K: NDArray[np.float64]
    needed_T: NDArray[np.int64]
    """Components that hold each share of VARIANCE_THRESHOLDS of the variance."""

    @property
    def origin_D(self) -> NDArray[np.float64]:
        """Mean of the core role vectors: origin of the space."""
        mean_D: NDArray[np.float64] = self.role_RD[self.core].mean(axis=0)
        return mean_D

    @property
    def scale_D(self) -> NDArray[np.float64]:
        """Projecting ``x - origin`` on this gives the position on the axis: the mean role at 0, default at 1."""
        scale: NDArray[np.float64] = self.axis_D / (self.axis_D @ self.axis_D)
        return scale


def fit_space(
    default_D: NDArray[np.float64],
    role_RD: NDArray[np.float64],
    components: int,
    *,
    core: NDArray[np.intp] | None = None,
    standardise: bool = False,
) -> PersonaSpace:
    """Axis, and PCA of all role vectors, mean-centred; `default` takes no part in the PCA.

    ``core``: places of the role vectors that make the axis; default: all. ``components`` is lowered to what the roles
    can span (R - 1). ``standardise``: the PCA sees each dimension divided by its standard deviation over the roles;
    its components are then given as the directions of the residual stream that read them, at unit length, and are no
    longer orthogonal.
    """
    core = np.arange(len(role_RD)) if core is None else core
    axis_D = default_D - role_RD[core].mean(axis=0)
    scale_D = StandardScaler().fit(role_RD).scale_ if standardise else np.ones(role_RD.shape[1])
    pca = PCA(svd_solver="full").fit(role_RD / scale_D)
    kept = min(components, len(role_RD) - 1, role_RD.shape[1])
    component_KD = pca.components_[:kept] / scale_D
    component_KD /= np.linalg.norm(component_KD, axis=1, keepdims=True)
    largest_K = np.abs(component_KD).argmax(axis=1)
    component_KD *= np.sign(np.take_along_axis(component_KD, largest_K[:, None], axis=1))
    if component_KD[0] @ axis_D < 0:
        component_KD[0] *= -1
    return PersonaSpace(
        default_D=default_D,
        role_RD=role_RD,
        core=core,
        axis_D=axis_D,
        component_KD=component_KD,
        variance_ratio_K=pca.explained_variance_ratio_[:kept],
        needed_T=1 + np.searchsorted(np.cumsum(pca.explained_variance_ratio_), VARIANCE_THRESHOLDS),
    )


def layer_signs(component_LKD: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Signs ``(L, K)`` with which PC2 and on continue the layer before, so that maps don't mirror.

    PC1 keeps its own.
    """
    signs = [np.ones(len(component_LKD[0]))]
    for before_KD, component_KD in itertools.pairwise(component_LKD):
        agreement_K = signs[-1] * np.einsum("kd,kd->k", component_KD, before_KD)
        sign_K = np.where(agreement_K < 0, -1.0, 1.0)
        sign_K[0] = 1.0
        signs.append(sign_K)
    return np.stack(signs)

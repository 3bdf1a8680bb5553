"""The persona space and the Assistant Axis of every layer, from role means (arXiv 2601.10387, section 2).

Shape suffixes: R roles without default, L layers, D hidden, K components, N rollouts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonaSpace:
    """Axis and principal components per layer. Arrays are float64."""

    axis_LD: NDArray[np.float64]
    """mean(default) - mean(role vectors): points to the Assistant."""
    role_mean_LD: NDArray[np.float64]
    """Mean of the role vectors: origin of the space."""
    component_LKD: NDArray[np.float64]
    """Unit vectors. PC1 points to the Assistant; the others have their largest loading positive."""
    variance_ratio_LK: NDArray[np.float64]

    def position(self, x_NLD: NDArray[np.float64]) -> NDArray[np.float64]:
        """Place on the axis ``(N, L)``, scaled so that the mean of the role vectors is 0 and default is 1."""
        scale_L = np.einsum("ld,ld->l", self.axis_LD, self.axis_LD)
        place: NDArray[np.float64] = np.einsum("nld,ld->nl", x_NLD - self.role_mean_LD, self.axis_LD) / scale_L
        return place

    def scores(self, x_NLD: NDArray[np.float64]) -> NDArray[np.float64]:
        """Coordinates in the persona space ``(N, L, K)``, relative to the mean of the role vectors."""
        scores: NDArray[np.float64] = np.einsum("nld,lkd->nlk", x_NLD - self.role_mean_LD, self.component_LKD)
        return scores


def fit_space(default_LD: NDArray[np.float64], role_RLD: NDArray[np.float64], components: int) -> PersonaSpace:
    """Axis and PCA of the role vectors, per layer; `default` takes no part in the PCA.

    ``components`` is lowered to what the roles can span (roles - 1).
    """
    role_mean_LD = role_RLD.mean(axis=0)
    axis_LD = default_LD - role_mean_LD
    kept = min(components, len(role_RLD) - 1, role_RLD.shape[2])
    component_LKD = np.zeros((axis_LD.shape[0], kept, axis_LD.shape[1]))
    variance_ratio_LK = np.zeros((axis_LD.shape[0], kept))
    for layer in range(axis_LD.shape[0]):
        pca = PCA(n_components=kept, svd_solver="full").fit(role_RLD[:, layer])
        component_LKD[layer] = pca.components_
        variance_ratio_LK[layer] = pca.explained_variance_ratio_
        if pca.components_[0] @ axis_LD[layer] < 0:
            component_LKD[layer, 0] *= -1
    return PersonaSpace(
        axis_LD=axis_LD,
        role_mean_LD=role_mean_LD,
        component_LKD=component_LKD,
        variance_ratio_LK=variance_ratio_LK,
    )


def cosine(a_LD: NDArray[np.float64], b_LD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of two vectors per layer ``(L,)``."""
    dot = np.einsum("ld,ld->l", a_LD, b_LD)
    norms = np.linalg.norm(a_LD, axis=1) * np.linalg.norm(b_LD, axis=1)
    ratio: NDArray[np.float64] = dot / norms
    return ratio

"""The persona space and the Assistant Axis of one layer, from role means (arXiv 2601.10387, section 2).

Shape suffixes: R roles without default, D hidden, K components.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonaSpace:
    """Axis and principal components of one layer. Arrays are float64."""

    default_D: NDArray[np.float64]
    """Mean of the default rollouts."""
    role_RD: NDArray[np.float64]
    """Role vectors: each role's mean."""
    axis_D: NDArray[np.float64]
    """mean(default) - mean(role vectors): points to the Assistant."""
    component_KD: NDArray[np.float64]
    """Unit vectors. PC1 points to the Assistant; the others' signs are free, and fixed by the largest loading."""
    variance_ratio_K: NDArray[np.float64]

    @property
    def origin_D(self) -> NDArray[np.float64]:
        """Mean of the role vectors: origin of the space."""
        mean_D: NDArray[np.float64] = self.role_RD.mean(axis=0)
        return mean_D

    @property
    def scale_D(self) -> NDArray[np.float64]:
        """Projecting ``x - origin`` on this gives the position on the axis: the mean role at 0, default at 1."""
        scale: NDArray[np.float64] = self.axis_D / (self.axis_D @ self.axis_D)
        return scale


def fit_space(default_D: NDArray[np.float64], role_RD: NDArray[np.float64], components: int) -> PersonaSpace:
    """Axis, and PCA of the role vectors, mean-centred; `default` takes no part in the PCA.

    ``components`` is lowered to what the roles can span (R - 1).
    """
    axis_D = default_D - role_RD.mean(axis=0)
    pca = PCA(n_components=min(components, len(role_RD) - 1, role_RD.shape[1]), svd_solver="full").fit(role_RD)
    component_KD = pca.components_.copy()
    largest_K = np.abs(component_KD).argmax(axis=1)
    component_KD *= np.sign(np.take_along_axis(component_KD, largest_K[:, None], axis=1))
    if component_KD[0] @ axis_D < 0:
        component_KD[0] *= -1
    return PersonaSpace(
        default_D=default_D,
        role_RD=role_RD,
        axis_D=axis_D,
        component_KD=component_KD,
        variance_ratio_K=pca.explained_variance_ratio_,
    )


def align_layers(spaces: Sequence[PersonaSpace]) -> list[PersonaSpace]:
    """Give PC2 and on the sign that continues the layer before, so that maps don't mirror from layer to layer."""
    aligned = [spaces[0]]
    for space in spaces[1:]:
        agreement_K = np.einsum("kd,kd->k", space.component_KD, aligned[-1].component_KD)
        sign_K = np.where(agreement_K < 0, -1.0, 1.0)
        sign_K[0] = 1.0
        aligned.append(replace(space, component_KD=space.component_KD * sign_K[:, None]))
    return aligned

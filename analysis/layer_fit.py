"""All that is computed of one layer: two passes over its activations, and what lies between them.

The first pass sums up (`summary`); from the sums come axis, components, evidence and the pooled PCA; the second pass
places every rollout. Shape suffixes: N rollouts, R role vectors, T traits, D hidden, K components.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personaspace.analysis.cells import Cells, selection
from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.evidence import Evidence, gather_evidence
from personaspace.analysis.groups import Groups
from personaspace.analysis.pca.eigen import Decomposition, decompose
from personaspace.analysis.separation import Folds, Separation, fit_folds, length_correlation, separation
from personaspace.analysis.space import PersonaSpace, fit_space
from personaspace.analysis.summary import Rows, Summary, Values

Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is fitted in every layer alike."""

    rows: Rows
    """All usable rollouts."""
    groups: Groups
    kinds: tuple[str, ...]
    """Of the roles that the axis rests on."""
    role_N: NDArray[np.intp]
    """Place of each row's group: 0 for `default`, then the roles; -1 for the rest."""
    question_N: NDArray[np.intp]
    tokens_N: NDArray[np.int64]
    """Length of each response."""
    config: AnalysisConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFit:
    """The result of one layer."""

    space: PersonaSpace
    trait_TD: Floats
    """Trait vectors: the positive pole's mean less the negative one's."""
    pooled: Decomposition
    """PCA over all rollouts of `default` and the roles."""
    mean_D: Floats
    """Of the same rollouts."""
    norm: float
    """Their root mean square length, from 0: what coefficients of steering are counted in."""
    evidence: Evidence
    default_auc: Separation | None
    length_correlation: Floats
    """Over all rollouts, and within roles."""
    position_N: NDArray[np.float32]
    score_NK: NDArray[np.float32]


def finish_layer(summary: Summary, values: Values, layer: int, plan: Plan) -> LayerFit:
    """From the sums of a layer to all that is known of it, reading its activations once more."""
    groups, config = plan.groups, plan.config
    vectors = 1 + len(groups.roles)
    by_group = [place * groups.questions + np.arange(groups.questions) for place in range(vectors)]
    poles = [np.array([cell]) for cell in range(groups.vector_cells, groups.cells)]
    offset_VD, _ = summary.cells.vectors(selection([*by_group, *poles], groups.cells))
    mean_VD = (offset_VD + summary.cells.shift_D).astype(np.float64)
    space = fit_space(
        mean_VD[0], mean_VD[1:vectors], config.components, core=groups.core, standardise=config.standardise
    )
    core = len(groups.core)
    of_axis = _first(summary.cells, (1 + core) * groups.questions)
    folds = fit_folds(of_axis, core, groups.questions)
    mean_D = summary.moments.mean_D
    norm = float(np.sqrt(mean_D @ mean_D + summary.moments.scatter_DD.trace() / summary.moments.n))
    place_N, position_N, score_NK = _place(values, layer, plan.rows, plan.question_N, space, folds, of_axis.shift_D)
    in_axis_N = np.where(plan.role_N <= core, plan.role_N, -1)
    return LayerFit(
        space=space,
        trait_TD=mean_VD[vectors::2] - mean_VD[vectors + 1 :: 2],
        pooled=decompose(summary.moments, min(config.components, len(plan.rows.row_N) - 1, values.shape[2])),
        mean_D=mean_D,
        norm=norm,
        evidence=gather_evidence(of_axis, core, groups.questions, plan.kinds, config),
        default_auc=None
        if folds is None
        else separation(
            place_N,
            in_axis_N,
            plan.question_N,
            folds,
            roles=core,
            draws=config.bootstrap,
            generator=np.random.default_rng(config.seed),
        ),
        length_correlation=length_correlation(position_N, plan.tokens_N, in_axis_N),
        position_N=position_N,
        score_NK=score_NK,
    )


def _place(
    values: Values,
    layer: int,
    rows: Rows,
    question_N: NDArray[np.intp],
    space: PersonaSpace,
    folds: Folds | None,
    shift_D: NDArray[np.float32],
) -> tuple[Floats, NDArray[np.float32], NDArray[np.float32]]:
    """Every rollout's held-out place ``(N,)``, position on the axis ``(N,)`` and scores ``(N, K)``."""
    direction_PD = np.concatenate([space.scale_D[None], space.component_KD])
    origin_P = direction_PD @ (space.origin_D - shift_D)
    place_N = np.full(len(rows.row_N), np.nan)
    score_NP = np.empty((len(rows.row_N), len(direction_PD)), dtype=np.float32)
    begin = 0
    for block in rows.blocks():
        part = slice(begin, begin + len(block.row_N))
        x_ND = values[block.row_N, layer, :] - shift_D
        score_NP[part] = x_ND @ direction_PD.T.astype(np.float32) - origin_P
        if folds is not None:
            place_N[part] = folds.places(x_ND, question_N[part])
        begin = part.stop
    return place_N, score_NP[:, 0], score_NP[:, 1:]


def _first(cells: Cells, count: int) -> Cells:
    """The first cells, without a copy."""
    return Cells(shift_D=cells.shift_D, sum_CD=cells.sum_CD[:count], count_C=cells.count_C[:count])

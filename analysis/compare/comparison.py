"""Fitted runs beside each other: base against instruct, model against model, one set of prompts against another.

Only what the runs share is compared (``pairing``): roles by their ids, layers by relative depth. The paper (arXiv
2601.10387, section 3) compares models by the correlation of the roles' loadings on PC1, above 0.92 for its pairs.
Shape suffixes: R common roles, L layers of the first run, D hidden, C components, P permutations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import beta

from personaspace.analysis import similarity
from personaspace.analysis.compare.pairing import Fitted, common_roles, layer_pairs
from personaspace.analysis.similarity import Floats, Indices
from personaspace.store.errors import InputError
from personaspace.store.layout import ranges

QUANTILE = 0.99
"""Of the nulls."""
NULLS = ("any", "kind")
"""Roles relabelled freely, and only among roles of one kind: what the kinds alone explain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One way to compare, a number for each layer; NaN where it can't be computed."""

    name: str
    """Variable of the dataset; ``NAME_p99`` holds the 99th percentile of its nulls."""
    label: str
    """What people call it."""
    one_basis: bool = False
    """Whether it compares directions, which needs models that share a residual basis."""


MEASURES = (
    Measure(name="pc1_correlation", label="Loadings on PC1 (correlation)"),
    Measure(name="position_correlation", label="Positions on the axis (correlation)"),
    Measure(name="rank_correlation", label="Order along the axis (rank correlation)"),
    Measure(name="procrustes", label="Procrustes similarity"),
    Measure(name="cka", label="Linear CKA"),
    Measure(name="role_cosine", label="Cosine of the roles' offsets", one_basis=True),
    Measure(name="axis_cosine", label="Cosine of the axes", one_basis=True),
)


def compare_pair(a: Fitted, b: Fitted, *, components: int = 5, permutations: int = 500, seed: int = 0) -> xr.Dataset:
    """All measures of two runs, float64, along ``place``: a layer of the first and its counterpart in the second.

    Besides ``MEASURES`` and their nulls (null, place): ``position`` and its standard error ``position_error``
    (run, role, place) from the spread of the role's rollouts, ``component_correlation`` (place, component) of matched
    components with ``component_match``, 0-based, and ``cka_layers`` (layer_of_a, layer_of_b). Procrustes and matching
    use ``components`` leading components. Raises InputError where the runs share too little.
    """
    roles, pairs = common_roles(a, b), layer_pairs(a, b)
    ours, theirs = (_small_in_memory(run.space.sel(role=_rows(run.space, roles))) for run in (a, b))
    kinds = [str(kind) for kind in ours["role_kind"].values]
    generator = np.random.default_rng(seed)
    dealt = [similarity.relabellings(groups, permutations, generator) for groups in ([""] * len(roles), kinds)]
    kept = min(components, len(roles) - 1, a.space.sizes["component"], b.space.sizes["component"])
    grams = [_grams(space) for space in (ours, theirs)]
    places: list[dict[str, Any]] = []
    for layer, other in pairs:
        gram_pair = [gram[_index(run.space, at)] for gram, run, at in zip(grams, (a, b), (layer, other), strict=True)]
        places.append(_place(ours.sel(layer=layer), theirs.sel(layer=other), gram_pair, dealt, kept))
    stacked = {name: np.stack([place[name] for place in places]) for name in places[0]}
    if len(set(kinds)) == len(kinds):
        # Where every role is its own kind, relabelling within kinds changes nothing, and is no null.
        for name in (name for name in stacked if name.endswith("_p99")):
            stacked[name][:, NULLS.index("kind")] = np.nan
    arrays: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {}
    for measure in (m.name for m in MEASURES if m.name in stacked):
        arrays[measure] = (("place",), stacked[measure])
        arrays[f"{measure}_p99"] = (("place", "null"), stacked[f"{measure}_p99"])
    arrays["component_correlation"] = (("place", "component"), stacked["component_correlation"])
    arrays["component_correlation_p99"] = (("place", "null", "component"), stacked["component_correlation_p99"])
    arrays["component_match"] = (("place", "component"), stacked["component_match"])
    arrays["cka_layers"] = (("layer_of_a", "layer_of_b"), similarity.linear_cka(*grams))
    for name, of in (("position", _positions), ("position_error", _errors)):
        layers = [[pair[side] for pair in pairs] for side in (0, 1)]
        values = [of(space, at) for space, at in zip((ours, theirs), layers, strict=True)]
        arrays[name] = (("run", "role", "place"), np.stack(values))
    return xr.Dataset(
        arrays,
        coords={
            "place": np.arange(len(pairs)),
            "layer_a": ("place", [layer for layer, _ in pairs]),
            "layer_b": ("place", [layer for _, layer in pairs]),
            "depth_a": ("place", [a.relative(layer) for layer, _ in pairs]),
            "depth_b": ("place", [b.relative(layer) for _, layer in pairs]),
            "run": [a.name, b.name],
            "role": np.array(roles),
            "role_kind": ("role", kinds),
            "null": list(NULLS),
            "layer_of_a": a.space["layer"].values,
            "layer_of_b": b.space["layer"].values,
        },
        attrs={"permutations": permutations, "components": kept, "seed": seed},
    )


def _rows(space: xr.Dataset, roles: Sequence[str]) -> list[Any]:
    own = {str(role): role for role in space["role"].values}
    return [own[role] for role in roles]


def _small_in_memory(space: xr.Dataset) -> xr.Dataset:
    # Else each place reads its own small pieces, which an object store answers one by one.
    return space.assign({name: space[name].compute() for name in ("role_score", "role_position", "axis")})


def _index(space: xr.Dataset, layer: int) -> int:
    return int(np.flatnonzero(space["layer"].values == layer)[0])


def _grams(space: xr.Dataset) -> Floats:
    # Layer by layer: the vectors of all layers of a large model need not be in memory at once.
    vectors = space["role_vector"].transpose("layer", "role", "hidden")
    return np.stack([similarity.centred_gram(vectors[at].values.astype(np.float64)) for at in range(len(vectors))])


def _place(
    a: xr.Dataset, b: xr.Dataset, grams: Sequence[Floats], dealt: Sequence[Indices], components: int
) -> dict[str, Any]:
    """Measure -> value at one place, and -> its nulls' 99th percentiles."""
    score_RC, other_RC = (
        space["role_score"].transpose("role", "component").values[:, :components].astype(np.float64) for space in (a, b)
    )
    x_R, y_R = (space["role_position"].values.astype(np.float64) for space in (a, b))
    gram_RR, other_RR = grams
    found: dict[str, Any] = {}

    def add(name: str, observed: Any, null: Sequence[Any]) -> None:
        found[name], found[f"{name}_p99"] = observed, np.stack([np.quantile(draws, QUANTILE, axis=0) for draws in null])

    pc1_R, own_R = other_RC[:, 0], score_RC[:, 0]
    add(
        "pc1_correlation",
        similarity.correlation(own_R, pc1_R),
        [similarity.correlation(own_R, pc1_R[p]) for p in dealt],
    )
    add("position_correlation", similarity.correlation(x_R, y_R), [similarity.correlation(x_R, y_R[p]) for p in dealt])
    add(
        "rank_correlation",
        similarity.rank_correlation(x_R, y_R),
        [similarity.rank_correlation(x_R, y_R[p]) for p in dealt],
    )
    shape = similarity.procrustes_similarity
    add("procrustes", shape(score_RC, other_RC), [shape(score_RC, other_RC[p]) for p in dealt])
    relabelled = [[(gram_RR * other_RR[np.ix_(p, p)]).sum() for p in draws] for draws in dealt]
    add("cka", (gram_RR * other_RR).sum(), relabelled)
    matching = similarity.match_components(score_RC, other_RC)
    drawn = [
        [np.abs(similarity.match_components(score_RC, other_RC[p]).correlation_C) for p in draws] for draws in dealt
    ]
    add("component_correlation", matching.correlation_C, drawn)
    found["component_match"] = matching.of_C
    if a.sizes["hidden"] == b.sizes["hidden"]:
        cosine_RR = similarity.offset_cosines(*(space["role_vector"].values.astype(np.float64) for space in (a, b)))
        rows = np.arange(len(x_R))
        add("role_cosine", np.median(np.diag(cosine_RR)), [np.median(cosine_RR[rows, p], axis=1) for p in dealt])
        axis_D, other_D = (space["axis"].values.astype(np.float64) for space in (a, b))
        found["axis_cosine"] = axis_D @ other_D / (np.linalg.norm(axis_D) * np.linalg.norm(other_D))
        # Relabelling leaves the axis as it is: the bar is that of two random directions, far easier to beat.
        bar = np.sqrt(beta.ppf(2 * QUANTILE - 1, 0.5, (len(axis_D) - 1) / 2))
        found["axis_cosine_p99"] = np.array([bar, np.nan])
    return found


def _positions(space: xr.Dataset, layers: Sequence[int]) -> Floats:
    position: Floats = space["role_position"].sel(layer=layers).transpose("role", "layer").values.astype(np.float64)
    return position


def _errors(space: xr.Dataset, layers: Sequence[int]) -> Floats:
    """Standard error ``(R, L)`` of the roles' positions, as if rollouts were independent; NaN for fewer than two."""
    of_N = space["rollout_role"].values.astype(str)
    position_NL = space["rollout_position"].sel(layer=layers).transpose("rollout", "layer").values
    error_RL = np.full((space.sizes["role"], len(layers)), np.nan)
    for row, role in enumerate(space["role"].values.astype(str)):
        own_NL = position_NL[of_N == role].astype(np.float64)
        if len(own_NL) > 1:
            error_RL[row] = own_NL.std(axis=0, ddof=1) / np.sqrt(len(own_NL))
    return error_RL


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two of the runs."""

    a: Fitted
    b: Fitted
    data: xr.Dataset
    """What ``compare_pair`` found."""
    at: int
    """Place nearest in depth to the layer that the comparison is about."""

    def value(self, measure: str) -> float:
        """A measure at that place; NaN where it was not computed."""
        return float(self.data[measure][self.at]) if measure in self.data else float("nan")

    def chance(self, measure: str, null: str = "any") -> float:
        """The 99th percentile of a null there."""
        return float(self.data[f"{measure}_p99"].sel(null=null)[self.at]) if measure in self.data else float("nan")

    @property
    def layers(self) -> tuple[int, int]:
        """The layers of that place."""
        return int(self.data["layer_a"][self.at]), int(self.data["layer_b"][self.at])


def compare(
    runs: Sequence[Fitted], *, layer: int | None = None, components: int = 5, permutations: int = 500, seed: int = 0
) -> list[Pair]:
    """Every pair of the runs, looked at where ``layer`` of the first run is (default: its target layer).

    Raises InputError for fewer than two runs, and for a layer that the first has no fit of.
    """
    if len(runs) < 2:
        raise InputError(f"compare: {len(runs)} run; give at least two, such as runs/base runs/instruct.")
    first, wanted = runs[0], runs[0].target if layer is None else layer
    stored = [int(value) for value in first.space["layer"].values]
    if wanted not in stored:
        raise InputError(f"compare --layer: {wanted}; the fit of {first.name} has layers {ranges(stored)}.")
    pairs = []
    for a, b in combinations(runs, 2):
        data = compare_pair(a, b, components=components, permutations=permutations, seed=seed)
        at = int(np.abs(data["depth_a"].values - first.relative(wanted)).argmin())
        pairs.append(Pair(a=a, b=b, data=data, at=at))
    return pairs

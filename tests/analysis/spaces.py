"""Spaces for the tests of pages and figures, built without a run."""

from typing import Any

import numpy as np
import xarray as xr

KINDS = {
    "professional": "consultant teacher lawyer engineer librarian nurse analyst editor accountant scientist",
    "everyday": "neighbour gardener grandmother student commuter cook tourist barista",
    "dramatic": "detective pirate gladiator diva rebel jester hacker poet spy",
    "fantastical": "ghost dragon oracle wizard vampire leviathan golem <script>window.hacked=1</script>",
    "abstract": "river silence swarm entropy <img/src=x/onerror=window.hacked=1>",
}
TRAITS = ["calm", "blunt", "playful", "<b>formal</b>"]


def build_space(layers: int = 30, rollouts_per_role: int = 12, components: int = 10) -> xr.Dataset:
    """A space such as a small model gives: kinds line up along the axis, more clearly in the middle layers."""
    rng = np.random.default_rng(7)
    kind_of = {role: kind for kind, roles in KINDS.items() for role in roles.split()}
    roles, L, R, K, T = list(kind_of), layers, len(kind_of), components, np.dtypes.StringDType()
    strength_L = 0.25 + 0.75 * np.exp(-(((np.arange(L) - 0.6 * L) / (0.3 * L)) ** 2))
    level_R = np.array([0.8 - 0.4 * list(KINDS).index(kind) for kind in kind_of.values()]) + rng.normal(0, 0.2, R)
    position_RL = (level_R - level_R.mean())[:, None] * strength_L + rng.normal(0, 0.1, (R, L))
    position_NL = np.vstack([position_RL, np.ones(L)]).repeat(rollouts_per_role, axis=0)
    score_RLK = rng.normal(size=(R, L, K)) * 6 / np.sqrt(1 + np.arange(K))
    score_RLK[..., 0] += 12 * position_RL
    variance_LK = score_RLK.var(axis=0)
    data: dict[str, Any] = {
        "axis": (("layer", "hidden"), rng.normal(size=(L, 48))),
        "explained_variance_ratio": (("layer", "component"), variance_LK / variance_LK.sum(1, keepdims=True)),
        "role_score": (("role", "layer", "component"), score_RLK),
        "default_score": (("layer", "component"), 20 * strength_L[:, None] / (1 + np.arange(K)) ** 2),
        "role_position": (("role", "layer"), position_RL),
        "rollout_position": (("rollout", "layer"), position_NL + rng.normal(0, 0.3, position_NL.shape)),
    }
    data["components_needed"] = (("layer", "variance"), np.tile([3, 5, 8, 10], (L, 1)))
    spread_SB = np.array([[-0.15, 0.15], [-0.1, 0.1]])
    data["role_position_interval"] = (
        ("role", "layer", "resampled", "bound"),
        position_RL[:, :, None, None] + spread_SB * rng.uniform(0.5, 2, (R, L, 1, 1)),
    )
    trait_TL = rng.uniform(-0.7, 0.7, (len(TRAITS), L))
    data["trait_axis_cosine"] = (("trait", "layer"), trait_TL)
    noise_L = 0.04 * rng.random(L)
    measures = {"cos_axis_pc1": 0.9 * strength_L, "cos_null_p99": 0.7 + noise_L, "cos_random_p99": 0.1 + noise_L}
    measures |= {"rank_correlation": 0.85 * strength_L, "rank_correlation_null_p99": 0.36 + noise_L}
    measures |= {"kind_auc": 0.5 + 0.46 * strength_L, "kind_auc_null_p99": 0.68 + noise_L}
    measures |= {"default_auc": 0.6 + 0.38 * strength_L, "length_correlation": 0.3 - 0.4 * strength_L}
    measures |= {"length_correlation_within": 0.1 * strength_L}
    for name in ("cos_axis_pc1", "rank_correlation", "kind_auc", "default_auc"):
        interval_LSB = np.clip(measures[name][:, None, None] + spread_SB, 0, 1)
        data[f"{name}_interval"] = (("layer", "resampled", "bound"), interval_LSB)
    data |= {name: ("layer", value_L) for name, value_L in measures.items()}
    coords = {
        "role": np.array(roles, T),
        "role_kind": ("role", np.array(list(kind_of.values()), T)),
        "role_description": ("role", np.array([f"You are a {role}; never break character & co." for role in roles], T)),
        "role_count": ("role", np.full(R, rollouts_per_role)),
        "layer": np.arange(L),
        "trait": np.array(TRAITS, T),
        "variance": [0.7, 0.8, 0.9, 0.95],
        "resampled": ["roles", "questions"],
        "bound": ["low", "high"],
        "rollout_role": ("rollout", np.array([*roles, "default"], T).repeat(rollouts_per_role)),
    }
    attrs: dict[str, Any] = {"target_layer": L // 2, "default_count": rollouts_per_role, "null_permutations": 200}
    attrs |= {"suggested_layer": int(0.6 * L), "suggested_layer_reason": "farthest above the nulls"}
    attrs |= {"positive_kind": "professional", "negative_kind": "fantastical"}
    return xr.Dataset(data, coords, attrs).astype(dict.fromkeys(data, np.float32))

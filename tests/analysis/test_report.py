"""The report: one harmless, self-contained page, whose charts follow the layer and the search in a real browser."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from personaspace.analysis import figures
from personaspace.analysis.report import Completeness, DroppedRollout, Sample, render_report

KINDS = {
    "professional": "consultant teacher lawyer engineer librarian nurse analyst editor accountant scientist",
    "everyday": "neighbour gardener grandmother student commuter cook tourist barista",
    "dramatic": "detective pirate gladiator diva rebel jester hacker poet spy",
    "fantastical": "ghost dragon oracle wizard vampire leviathan golem siren",
    "abstract": "river silence swarm entropy paradox",
}
HOSTILE = {"<script>window.hacked=1</script>": "fantastical", '<img src=x onerror="window.hacked=1">': "dramatic"}
QUESTION = "What should I do about a friend who never listens to my advice?"


def build_space(
    *, layers: int = 30, rollouts_per_role: int = 12, hostile: bool = False, kinds: bool = True, components: int = 10
) -> xr.Dataset:
    """A space such as a small model gives: kinds line up along one direction, more clearly in the middle layers."""
    rng = np.random.default_rng(7)
    kind_of = {role: kind for kind, roles in KINDS.items() for role in roles.split()} | (HOSTILE if hostile else {})
    roles, L, D, K = list(kind_of), layers, 48, components
    R, N = len(roles), (len(roles) + 1) * rollouts_per_role
    strength = 0.25 + 0.75 * np.exp(-(((np.arange(L) - 0.6 * L) / (0.3 * L)) ** 2))
    level = np.array([0.9 - 0.5 * list(KINDS).index(kind) for kind in kind_of.values()]) + rng.normal(0, 0.25, R)
    direction = rng.normal(size=(L, D)) / np.sqrt(D)
    signal = strength[None, :, None] * level[:, None, None] * direction
    role_RLD = signal + 0.18 * rng.normal(size=(R, L, D)) * np.linspace(0.4, 1, D)
    default_LD = 1.7 * strength[:, None] * direction + 0.05 * rng.normal(size=(L, D))
    mean_LD = role_RLD.mean(0)
    axis_LD = default_LD - mean_LD
    norm_L = np.linalg.norm(axis_LD, axis=1)
    position_RL = np.einsum("rld,ld->rl", role_RLD - mean_LD, axis_LD) / norm_L**2
    u, s, components_LKD = np.linalg.svd((role_RLD - mean_LD).transpose(1, 0, 2), full_matrices=False)
    sign_L = np.sign(np.einsum("ld,ld->l", components_LKD[:, 0], axis_LD))
    score_RLK = np.einsum("lrk,lk,l->rlk", u, s, sign_L)[..., :K]
    owner = np.repeat(np.arange(R + 1), rollouts_per_role)
    place_NL = np.vstack([position_RL, np.ones((1, L))])[owner] + rng.normal(0, 0.3, (N, L))
    cosine_L = np.abs(np.einsum("ld,ld->l", components_LKD[:, 0], axis_LD)) / norm_L
    nan_L = np.full(L, np.nan)
    data: dict[str, Any] = {
        "role_vector": (("role", "layer", "hidden"), role_RLD),
        "default_vector": (("layer", "hidden"), default_LD),
        "axis": (("layer", "hidden"), axis_LD),
        "axis_norm": ("layer", norm_L),
        "component_vector": (("layer", "component", "hidden"), components_LKD[:, :K]),
        "explained_variance_ratio": (("layer", "component"), (s**2 / (s**2).sum(1, keepdims=True))[:, :K]),
        "role_score": (("role", "layer", "component"), score_RLK),
        "default_score": (("layer", "component"), np.einsum("lkd,ld,l->lk", components_LKD, axis_LD, sign_L)[:, :K]),
        "role_position": (("role", "layer"), position_RL),
        "rollout_position": (("rollout", "layer"), place_NL),
        "rollout_score": (("rollout", "layer", "component"), np.zeros((N, L, K))),
        "cos_axis_pc1": ("layer", cosine_L),
        "cos_null_p99": ("layer", 0.72 + 0.05 * rng.random(L)),
        "cos_random_p99": ("layer", np.full(L, 0.36)),
        "auc": ("layer", 0.5 + 0.46 * strength if kinds else nan_L),
        "auc_null_p99": ("layer", 0.68 + 0.03 * rng.random(L) if kinds else nan_L),
        "rank_correlation": ("layer", 0.85 * strength),
        "rank_correlation_null_p99": ("layer", 0.36 + 0.03 * rng.random(L)),
    }
    coords = {
        "role": roles,
        "role_kind": ("role", list(kind_of.values()) if kinds else ["unknown"] * R),
        "role_description": ("role", [f"You are a {role}; stay in character & never break it." for role in roles]),
        "role_count": ("role", np.full(R, rollouts_per_role)),
        "layer": np.arange(L),
        "rollout_role": ("rollout", np.array([*roles, "default"])[owner]),
    }
    attrs = {"target_layer": L // 2, "default_count": rollouts_per_role, "null_permutations": 200}
    attrs |= {"positive_kind": "professional", "negative_kind": "fantastical"}
    space = xr.Dataset(data, coords, attrs)
    return space.astype({name: np.float32 for name in space.data_vars})


def render(space: xr.Dataset, **changes: Any) -> str:
    """The report with everyday texts around the dataset."""
    answer = "Ah, 'tis a stubborn ear they have! \"Listen\", I'd say, and then say nothing at all for a while. " * 4
    prompts = {str(role): Sample(system_prompt=f"You are a {role}.", question=QUESTION, response=answer + str(role))
               for role in space.role.values}  # fmt: skip
    samples = prompts | {"default": Sample(system_prompt="", question=QUESTION, response="Here are three steps.")}
    dropped = [DroppedRollout(rollout_id="9f2c11aa", role="poet", question=QUESTION, reason="empty response")]
    rows = [("Model", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("Revision", "12fd25f77366fa6b3b4b768ec3050bf629380bac")]
    rows += [
        ("Identity hash", "sha256:" + "3b" * 32),
        ("Layers", "all"),
        ("Precision", "16 bits"),
        ("Finished", "2026-03-01"),
    ]
    arguments: dict[str, Any] = {
        "title": "Persona space of SmolLM2-135M-Instruct",
        "samples": samples,
        "provenance": rows,
        "dropped": dropped,
        "completeness": Completeness(rows_planned=492, rows_ok=491, rows_dropped=1, rows_pending=0),
    }
    return render_report(space, **(arguments | changes))

"""How far two judges agree on the rollouts that both have scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from personaspace.store.errors import InputError
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder
from personaspace.store.plan import read_plan_table
from personaspace.store.records import committed_slots
from personaspace.store.scores import read_scores

SCORES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Two judges side by side. Scores that are no whole numbers are rounded first."""

    rollouts: int
    """That both have scored."""
    share: float
    """Of them, with the same score."""
    within_one: float
    """Share of them with scores that differ by one at most."""
    kappa: float | None
    """Cohen's kappa: agreement beyond chance; None where both gave one and the same score throughout."""
    weighted_kappa: float | None
    """The same with quadratic weights: far disagreements count more."""
    difference: float
    """Mean of the second judge's score less the first's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAgreement:
    """Two judges on one run."""

    first: str
    second: str
    only_first: int
    """Rollouts that only the first has scored."""
    only_second: int
    all: Agreement
    confusion: tuple[tuple[int, ...], ...]
    """Rollouts by the first judge's score (rows, 0 to 3) and the second's (columns)."""
    roles: Mapping[str, Agreement]


def agree(first_N: NDArray[np.floating], second_N: NDArray[np.floating]) -> Agreement:
    """Agreement of two judges' scores of N rollouts, none of them missing. N may not be 0."""
    a_N, b_N = np.rint(first_N).astype(int), np.rint(second_N).astype(int)
    return Agreement(
        rollouts=len(a_N),
        share=float(np.mean(a_N == b_N)),
        within_one=float(np.mean(abs(a_N - b_N) <= 1)),
        kappa=_kappa(a_N, b_N, None),
        weighted_kappa=_kappa(a_N, b_N, "quadratic"),
        difference=float(np.mean(second_N - first_N)),
    )


def agreement_of_run(folder: Folder, first: str, second: str) -> RunAgreement:
    """Agreement of two judges of a run. Raises InputError for unknown judges, and where they share no rollout."""
    manifest = require_manifest(folder)
    committed = committed_slots(folder)
    found = [read_scores(folder, manifest.layout, committed, judge) for judge in (first, second)]
    a_R, b_R = (scores for scores in found if scores is not None)
    both_R = ~np.isnan(a_R) & ~np.isnan(b_R)
    if not both_R.any():
        raise InputError(f"{folder.url}: {first} and {second} have scored no rollout in common.")
    plan = read_plan_table(folder, manifest)
    role_R = np.full(len(a_R), -1)
    role_R[plan["row"].to_numpy()] = plan["role_id"].to_numpy()
    names: Sequence[str] = [str(role["id"]) for role in manifest.tables["roles"]]
    roles = {role: both_R & (role_R == number) for number, role in enumerate(names)}
    whole = [np.rint(scores[both_R]).astype(int) for scores in (a_R, b_R)]
    return RunAgreement(
        first=first,
        second=second,
        only_first=int(np.sum(~np.isnan(a_R) & np.isnan(b_R))),
        only_second=int(np.sum(np.isnan(a_R) & ~np.isnan(b_R))),
        all=agree(a_R[both_R], b_R[both_R]),
        confusion=tuple(tuple(map(int, row)) for row in confusion_matrix(*whole, labels=SCORES)),
        roles={role: agree(a_R[chosen], b_R[chosen]) for role, chosen in roles.items() if chosen.any()},
    )


def describe_agreement(found: RunAgreement) -> str:
    """The agreement for people."""
    everything = found.all
    alone = f"only {found.first}: {found.only_first}, only {found.second}: {found.only_second}"
    lines = [
        f"{everything.rollouts} rollouts scored by both ({alone})",
        f"same score: {everything.share:.1%}, at most one apart: {everything.within_one:.1%}",
        f"Cohen's kappa: {_text(everything.kappa)}, with quadratic weights: {_text(everything.weighted_kappa)}",
        f"{found.second} scores {everything.difference:+.2f} against {found.first}, on average",
        "",
        f"rows: {found.first}, columns: {found.second}",
        "     " + "".join(f"{score:>7}" for score in SCORES),
        *(
            f"{score:>5}" + "".join(f"{count:>7}" for count in row)
            for score, row in zip(SCORES, found.confusion, strict=True)
        ),
        "",
        f"{'role':<28}{'rollouts':>9}{'same':>8}{'kappa':>8}{'weighted':>10}{'difference':>12}",
    ]
    for role, of_role in sorted(found.roles.items(), key=lambda item: (item[1].share, item[0])):
        lines.append(
            f"{role:<28}{of_role.rollouts:>9}{of_role.share:>8.0%}{_text(of_role.kappa):>8}"
            f"{_text(of_role.weighted_kappa):>10}{of_role.difference:>+12.2f}"
        )
    return "\n".join(lines)


def _kappa(a_N: NDArray[np.integer], b_N: NDArray[np.integer], weights: str | None) -> float | None:
    # Where only one score occurs, chance explains everything, and kappa is 0/0.
    if len({*a_N.tolist(), *b_N.tolist()}) == 1:
        return None
    return float(cohen_kappa_score(a_N, b_N, labels=SCORES, weights=weights))


def _text(kappa: float | None) -> str:
    return "-" if kappa is None else f"{kappa:.2f}"

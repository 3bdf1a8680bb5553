"""Which rollouts make which vector."""

import numpy as np
import pytest

from personaspace.analysis.groups import NO_CELL, group_rollouts, pooled
from personaspace.store.errors import InputError

ROLES = [
    {"id": "default", "kind": "assistant"},
    {"id": "pirate", "kind": "dramatic"},
    {"id": "ghost", "kind": "fantastical"},
    {"id": "calm.positive", "kind": "trait", "pole": "positive"},
    {"id": "calm.negative", "kind": "trait", "pole": "negative"},
    {"id": "bold.positive", "kind": "trait", "pole": "positive"},
    {"id": "talk", "kind": "scenario"},
]
ROLE_N = np.repeat([0, 1, 2, 3, 4, 5, 6], 4)
QUESTION_N = np.tile([0, 1, 0, 1], 7)


def scores(pirate: list[float], ghost: list[float]) -> np.ndarray:
    score_N = np.full(28, np.nan)
    score_N[4:8], score_N[8:12], score_N[12:20] = pirate, ghost, 3
    return score_N


def test_without_scores_every_rollout_counts_for_its_role() -> None:
    groups = group_rollouts(ROLES, 2, ROLE_N, None, needed=None, where="run")
    assert [(group.role_id, group.level, group.count) for group in groups.roles] == [(1, "all", 4), (2, "all", 4)]
    assert groups.default.count == 4
    assert [(trait, positive.role_id, negative.role_id) for trait, positive, negative in groups.traits] == [
        ("calm", 3, 4)
    ], "bold has one pole only"
    assert groups.filter == "none: nobody judged the rollouts"
    cell_N = groups.cell_of_row(ROLE_N, QUESTION_N, None)
    expected = [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, *[6] * 4, *[7] * 4, *[NO_CELL] * 8]
    assert cell_N.tolist() == expected
    assert groups.cells == 8


def test_scores_keep_fully_and_somewhat_played_roles_apart() -> None:
    score_N = scores(pirate=[3, 3, 2, 0], ghost=[3, np.nan, 3, 1])
    groups = group_rollouts(ROLES, 2, ROLE_N, score_N, needed=1, where="run", judge="j")
    found = [(group.role_id, group.level, group.count) for group in groups.roles]
    assert found == [(1, "fully", 2), (2, "fully", 2), (1, "somewhat", 1)]
    assert groups.core.tolist() == [0, 1]
    cell_N = groups.cell_of_row(ROLE_N, QUESTION_N, score_N)
    assert cell_N[:12].tolist() == [0, 1, 0, 1, 2, 3, 6, NO_CELL, 4, NO_CELL, 4, NO_CELL], "default is never filtered"
    assert groups.filter == "scores of j: 3 is fully, 2 somewhat"


def test_vectors_of_too_few_rollouts_are_left_out_by_name() -> None:
    score_N = scores(pirate=[3, 3, 2, 0], ghost=[3, 3, 3, 3])
    groups = group_rollouts(ROLES, 2, ROLE_N, score_N, needed=2, where="run", judge="j")
    assert groups.too_few == ("pirate (somewhat)",)
    assert groups.needed == 2


@pytest.mark.parametrize(("rollouts", "needed"), [(1, 1), (24, 1), (48, 2), (1200, 50), (12_000, 50)])
def test_how_many_are_needed_grows_with_the_run(rollouts: int, needed: int) -> None:
    role_N = np.repeat([0, 1, 2], rollouts)
    assert group_rollouts(ROLES, 1, role_N, None, needed=None, where="run").needed == needed


def test_a_judge_that_found_too_little_is_told() -> None:
    with pytest.raises(InputError) as error:
        group_rollouts(ROLES, 2, ROLE_N, scores([3] * 4, [2, 2, 1, 0]), needed=2, where="runs/x", judge="gpt")
    assert str(error.value) == (
        "runs/x: 1 of `default` and 1 other roles have usable rollouts; the axis needs `default` and at least two "
        "roles. Only rollouts that gpt scored 3 count, and a role needs 2 of them. Let the judge go on, or lower "
        "--analysis.min-count, or take every rollout with --analysis.unfiltered."
    )
    with pytest.raises(InputError, match=r"A role needs 9 rollouts; lower --analysis\.min-count\.$"):
        group_rollouts(ROLES, 2, ROLE_N, None, needed=9, where="runs/x")


def test_the_pooled_pca_takes_roles_and_default_but_neither_traits_nor_conversations() -> None:
    assert pooled(ROLES, ROLE_N).tolist() == [True] * 12 + [False] * 16

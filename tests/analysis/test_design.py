"""How cells are put together anew: what every draw keeps, and that batches don't matter."""

import numpy as np
import pytest
from scipy.sparse import vstack

from personaspace.analysis.design import Design

ROLES, QUESTIONS = 20, 12


@pytest.fixture
def design() -> Design:
    """Eight rollouts of `default` by question and one of each role; a role without any, and one without question 2."""
    count_VQ = np.ones((1 + ROLES, QUESTIONS), dtype=np.int64)
    count_VQ[0] = 8
    count_VQ[3, 2] = count_VQ[5] = 0
    return Design(count_VQ=count_VQ)


def test_permuting_keeps_the_mean_of_each_question_and_moves_every_answer_once(design: Design) -> None:
    [weights] = design.permuted(np.random.default_rng(0), 1, 1)
    np.testing.assert_array_equal(weights.sum(axis=0), (design.count_VQ > 0).ravel().astype(float))
    own = design.weights().toarray()
    np.testing.assert_array_equal(weights.toarray()[[0, ROLES + 1]], own[[0, ROLES + 1]], "default keeps its answers")
    assert (weights.toarray()[5] == 0).all(), "a role without answers is dealt none"
    np.testing.assert_array_equal(weights.sum(axis=1), own.sum(axis=1), "every role answers its own questions")
    assert (weights.toarray() != own).any()


def test_drawing_questions_keeps_answers_with_their_role_and_each_half_as_large(design: Design) -> None:
    [weights] = design.resampled(np.random.default_rng(0), 1, 1)
    own, drawn = design.weights().toarray(), weights.toarray()
    assert not drawn[own == 0].any()
    np.testing.assert_array_equal(drawn[[0, ROLES + 1]].sum(axis=1), [QUESTIONS / 2, QUESTIONS / 2])
    assert drawn.max() > 1


@pytest.mark.parametrize("how", ["permuted", "resampled"])
def test_batches_give_the_same_draws(design: Design, how: str) -> None:
    draw = getattr(design, how)
    [whole] = draw(np.random.default_rng(3), 5, 5)
    parts = list(draw(np.random.default_rng(3), 5, 2))
    assert [part.shape[0] for part in parts] == [4 * (1 + ROLES), 4 * (1 + ROLES), 2 * (1 + ROLES)]
    assert (vstack(parts) != whole).nnz == 0

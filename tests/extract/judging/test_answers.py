import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.judging.answers import MalformedAnswerError, read_answer
from personaspace.extract.judging.instructions import Scale

FOUR, HUNDRED = Scale(), Scale(top=100)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reason": "speaks as a ghost", "score": 3}', (3.0, "speaks as a ghost")),
        ('```json\n{"score": "2", "reason": "an AI that rhymes"}\n```', (2.0, "an AI that rhymes")),
        ('Let me see. {"note": {"a": 1}}\n{"score": 1.0}', (1.0, None)),
        ('<think>{"score": 3}, or rather not</think> {"score": 0}', (0.0, None)),
        ("2", (2.0, None)),
        (" **3**.\n", (3.0, None)),
        ("Score: 1", (1.0, "Score: 1")),
        ("The rating is 0, since it declines.", (0.0, "The rating is 0, since it declines.")),
    ],
)
def test_scores_are_read_in_the_forms_that_models_use(text: str, expected: tuple[float, str | None]) -> None:
    assert read_answer(text, FOUR) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the answer is empty"),
        ("What a lovely answer!", "the answer holds no score: 'What a lovely answer!'"),
        ("It is 2 or 3.", "the answer holds no score"),
        ("score: 2, and on second thoughts score: 3", "the answer holds several scores"),
        ('{"score": 1} or {"score": 2}', "the answer holds several scores"),
        ('{"score": 7}', "the score 7 is not between 0 and 3"),
        ("-1", "the score -1 is not between 0 and 3"),
        ("2.5", "the score 2.5 is no whole number"),
        ('{"score": null}', "the score None is not between 0 and 3"),
        ('{"score": true}', "the score True is not between 0 and 3"),
        ('{"score": NaN}', "the score nan is not between 0 and 3"),
        ('{"score": [3]}', r"the score \[3\] is not between 0 and 3"),
    ],
)
def test_what_holds_no_score_is_refused(text: str, message: str) -> None:
    with pytest.raises(MalformedAnswerError, match=message):
        read_answer(text, FOUR)


def test_an_answer_that_was_cut_off_counts_only_if_its_object_is_complete() -> None:
    assert read_answer('{"score": 2} And then', FOUR, complete=False) == (2.0, None)
    for text in ("1", "Score: 1", '{"reason": "so mu'):
        with pytest.raises(MalformedAnswerError, match="was cut off before a score"):
            read_answer(text, FOUR, complete=False)


def test_scale_of_a_hundred_and_its_refusals() -> None:
    assert read_answer("50", HUNDRED) == (1.5, None)
    assert read_answer("REFUSAL", HUNDRED) == (0.0, "refused")
    assert read_answer("100", Scale(top=100, reverse=True)) == (0.0, None)
    assert read_answer("REFUSAL", Scale(top=100, reverse=True)) == (0.0, "refused")
    with pytest.raises(MalformedAnswerError, match="no score"):
        read_answer("REFUSAL", FOUR)


@given(st.text(), st.booleans())
def test_any_text_gives_a_score_or_the_reason_why_not(text: str, complete: bool) -> None:
    try:
        score, said = read_answer(text, FOUR, complete=complete)
    except MalformedAnswerError as error:
        score, said = 0, str(error)
    assert score in (0, 1, 2, 3)
    assert said is None or len(said) < 1200


@given(st.integers(0, 3), st.text(max_size=200))
def test_the_form_that_is_asked_for_is_always_read(score: int, reason: str) -> None:
    text = json.dumps({"reason": reason, "score": score})
    assert read_answer(text, FOUR)[0] == score

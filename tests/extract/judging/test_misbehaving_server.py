"""The judge against a real HTTP server that fails in every way that servers do."""

import logging
import random
from pathlib import Path

import pytest

from personaspace.extract.endpoint import EndpointError
from personaspace.judging import BudgetError, JudgeOptions, judge_run
from personaspace.store import open_run
from personaspace.store.errors import InputError
from personaspace.store.judging import read_answers, read_ledger
from personaspace.store.objects import Folder
from personaspace.store.scores import Judgement, read_judgements
from personaspace.store.status import read_sessions
from personaspace.store.verify import verify
from tests.extract.judging.chat_server import BEHAVIOURS, ChatServer, expected_score
from tests.extract.judging.runs import KEY, fill_run, make_run, settings

OPTIONS = JudgeOptions(lease_timeout=20, patience=0)
JUDGED = range(4, 24)
"""Rows that are not `default`'s."""


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def scores(folder: Folder, judge: str = "judge") -> dict[int, float]:
    return {row: score.score for part in parts(folder, judge) for row, score in part.scores.items()}


def unjudged(folder: Folder) -> dict[int, str]:
    return {row: why for part in parts(folder) for row, why in part.unjudged.items()}


def parts(folder: Folder, judge: str = "judge") -> list[Judgement]:
    return list(read_judgements(folder, judge).values())


def right(rows: range = JUDGED) -> dict[int, float]:
    return {row: float(expected_score(row)) for row in rows}


def assert_key_nowhere(folder: Folder, *texts: str) -> None:
    for text in texts:
        assert KEY not in text
    for entry in folder.list():
        assert KEY.encode() not in folder.get(entry.key), entry.key


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_each_failure_is_overcome(tmp_path: Path, behaviour: str) -> None:
    folder = make_run(tmp_path / "run")
    with ChatServer(behaviour=lambda row, before: behaviour if before == 0 and row % 3 == 0 else "good") as server:
        judge_run(folder, settings(server, timeout=1.5 if behaviour == "hang" else 60), OPTIONS)
        asked = server.rows_asked
    assert scores(folder) == right()
    assert unjudged(folder) == {}
    again = 0 if behaviour == "slow" else 1
    assert asked == {row: 1 + again * (row % 3 == 0) for row in JUDGED}
    assert verify(folder).problems == ()


def test_everything_at_once_ends_scored_or_recorded_and_none_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    folder = make_run(tmp_path / "run", rows=84)
    hopeless = {8: "nonsense", 21: "400", 34: "score 7"}

    def behave(row: int, before: int) -> str:
        chance = random.Random(f"{row} {before}")
        bad = (*BEHAVIOURS, "tells the key", "no usage")
        return hopeless.get(row) or (chance.choice(bad) if before < 4 and chance.random() < 0.5 else "good")

    with ChatServer(behaviour=behave) as server:
        judge_run(folder, settings(server, asks=6, attempts=9, timeout=1), OPTIONS)
        done = len(server.requests)
        judge_run(folder, settings(server), OPTIONS)
        assert len(server.requests) == done  # Nobody is asked about what is recorded.
        assert {request.key for request in server.requests} == {KEY}
        ledger = read_ledger(folder, "judge")
        assert ledger is not None
        spent = sum(spending.usd or 0 for spending in ledger.sessions.values())
        assert spent >= server.usd
    rows = range(4, 84)
    assert scores(folder) == {row: score for row, score in right(rows).items() if row not in hopeless}
    reasons = unjudged(folder)
    assert reasons.keys() == hopeless.keys()
    assert reasons[8] == "no score in 6 answers; the last: the answer holds no score: 'What a lovely answer!'"
    assert reasons[21] == "400: no"
    assert reasons[34] == "no score in 6 answers; the last: the score 7 is not between 0 and 3"
    assert read_answers(folder, "judge") == {}
    output = capsys.readouterr()
    assert_key_nowhere(folder, output.out, output.err, caplog.text)
    run = open_run(tmp_path / "run", scores="judge")
    assert float(run["score"][5]) == expected_score(5)


def test_every_kind_of_storage(storage: Folder) -> None:
    fill_run(storage)
    with ChatServer(behaviour=lambda row, before: "500" if before == 0 and row % 5 == 0 else "good") as server:
        judge_run(storage, settings(server, sample=5), OPTIONS)
        judge_run(storage, settings(server), OPTIONS)
    assert scores(storage) == right()
    assert verify(storage).harmful == []


def test_again_asks_about_what_could_not_be_scored_and_about_nothing_else(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with ChatServer(behaviour=lambda row, before: "nonsense" if row == 9 else "good") as server:
        judge_run(folder, settings(server), OPTIONS)
    assert unjudged(folder).keys() == {9}
    with ChatServer() as server:
        judge_run(folder, settings(server), JudgeOptions(again=True, lease_timeout=20, patience=0))
        assert server.rows_asked == {9: 1}
    assert scores(folder) == right()
    assert unjudged(folder) == {}


def test_retry_after_holds_all_requests_back(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    limited = ChatServer(behaviour=lambda row, before: "429" if (row, before) == (4, 0) else "good", retry_after=0.5)
    with limited as server:
        judge_run(folder, settings(server, concurrency=1), OPTIONS)
        first, *others = [request.arrived for request in server.requests]
    assert min(others) - first >= 0.5


def test_concurrency_and_rate_are_bounded(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with ChatServer(delay=0.02) as server:
        judge_run(folder, settings(server, concurrency=3, requests_per_minute=1200), OPTIONS)
        arrived = [request.arrived for request in server.requests]
        assert 1 <= server.most_under_way <= 3
    assert arrived[-1] - arrived[0] >= 0.9 * (len(JUDGED) - 1) * 60 / 1200


@pytest.mark.parametrize("chaotic", [False, True])
def test_the_budget_holds_over_several_commands(tmp_path: Path, chaotic: bool) -> None:
    folder = make_run(tmp_path / "run", rows=84)

    def behave(row: int, before: int) -> str:
        chance = random.Random(f"{row} {before}")
        return chance.choice(BEHAVIOURS) if chaotic and before < 3 and chance.random() < 0.2 else "good"

    with ChatServer(behaviour=behave) as server:
        counts = []
        for budget in (0.02, 0.02, 0.03):
            with pytest.raises(
                BudgetError, match=r"judge.budget: of 0.0\d USD too little is left for another request;"
            ):
                judge_run(folder, settings(server, budget=budget), OPTIONS)
            assert server.usd <= budget
            counts.append(len(scores(folder)))
        assert 0 < counts[0] == counts[1] < counts[2]
        judge_run(folder, settings(server, budget=5), OPTIONS)
    assert scores(folder) == right(range(4, 84))
    assert verify(folder).problems == ()


def test_a_budget_needs_prices(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with ChatServer() as server:
        with pytest.raises(InputError, match=r"judge.budget: 1 USD can't be kept without prices. Give judge.price_in"):
            judge_run(folder, settings(server, budget=1, price_in=None, price_out=None), OPTIONS)
        assert server.requests == []


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("401", r"refuses the key in the variable OPENAI_API_KEY \(401\): no"),
        ("404", r"knows no model 'judge-model', or no chat completions \(404\): no"),
        ("no credit", r"the account has no credit left \(429\): pay first"),
        ("400", r"rollouts in a row got no score. The last: 400: no. These are not recorded"),
        ("500", r"rollouts in a row got no score. The last: no answer in 6 attempts; the last: 500: broken"),
        ("wrong model", r"the endpoint answered as 'another-model', asked for 'judge-model'"),
        ("tells the key", r"did not like the header Authorization: Bearer \(key\)"),
    ],
)
def test_a_useless_endpoint_stops_it_and_nothing_is_recorded(tmp_path: Path, behaviour: str, message: str) -> None:
    folder = make_run(tmp_path / "run")
    with ChatServer(behaviour=lambda row, before: behaviour) as server:
        with pytest.raises(EndpointError, match=message) as raised:
            judge_run(folder, settings(server, stop_after=6), OPTIONS)
        assert parts(folder) == []
        assert read_sessions(folder)[-1].outcome == "failed"
        assert_key_nowhere(folder, str(raised.value))
        server.behaviour = lambda row, before: "good"
        judge_run(folder, settings(server), OPTIONS)
    assert scores(folder) == right()


def test_a_model_that_never_rates_is_recorded_if_the_rollouts_are_few(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with ChatServer(behaviour=lambda row, before: "nonsense") as server:
        judge_run(folder, settings(server, asks=2), OPTIONS)
        assert server.rows_asked == dict.fromkeys(JUDGED, 2)
    assert unjudged(folder).keys() == set(JUDGED)


def test_a_key_in_the_judges_words_is_not_stored(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with ChatServer(behaviour=lambda row, before: "says the key") as server:
        judge_run(folder, settings(server), OPTIONS)
    assert parts(folder)[0].scores[4].reason == "your key is (key)"
    assert_key_nowhere(folder)


def test_the_prompt_asks_for_a_rating_in_the_form_that_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run")
    with ChatServer() as server:
        judge_run(folder, settings(server), JudgeOptions(dry_run=True))
        assert server.requests == []
    shown = capsys.readouterr().out
    assert "to judge: 20 rollouts with judge-model" in shown
    assert "example, rollout of row 4:" in shown
    assert "The model was asked to take on this role: poet." in shown
    assert 'Answer with one line of JSON and nothing else: {"reason": "at most twenty words", "score":' in shown

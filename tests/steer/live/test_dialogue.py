"""A conversation with both sides: the same turns, answers of their own, dials that turn one side only."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personaspace.extract.config import ModelConfig
from personaspace.steer.live.dialogue import SIDES, Dialogue, Record, saved, transcript_file
from personaspace.steer.live.dials import CapTable, Dials, read_cap_table
from personaspace.steer.live.gauge import Gauge, read_gauges
from personaspace.steer.live.talker import Ask, BusyError, Talker
from personaspace.store.errors import InputError
from personaspace.store.formats.transcripts import read_transcripts
from personaspace.store.local import LocalFolder
from tests.analysis.caps.small_fit import LAYOUT, write_fitted
from tests.models import tiny_checkpoint

AXIS_LD = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
GAUGE = Gauge(layer=4, axis_D=AXIS_LD[4], role_mean=0.0, default_mean=2.0, low=0.5, high=1.5)
CAPS = CapTable(
    layers=tuple(range(6)),
    axis_LD=AXIS_LD,
    threshold_PL=np.linspace(40, -1e6, 99)[:, None].repeat(6, axis=1),
    suggested=Dials(percentile=1.0, first=3, last=4),
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talker]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    with Talker(ModelConfig(id=str(folder), dtype="float32"), [GAUGE], device="cpu") as talker:
        yield talker


@pytest.fixture
def dialogue(talker: Talker) -> Dialogue:
    return Dialogue(talker, GAUGE, CAPS, max_tokens=8)


def settled(dialogue: Dialogue) -> Record:
    deadline = time.monotonic() + 60
    while dialogue.busy:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return dialogue.record


def test_both_sides_answer_and_go_their_own_ways(dialogue: Dialogue) -> None:
    before = dialogue.version
    dialogue.say("  Who are you? ")
    assert dialogue.busy
    dialogue.say("not while an answer is on its way")
    record = settled(dialogue)
    assert record.said == ["Who are you?"]
    assert dialogue.version > before
    plain, capped = (record.answers[side][0] for side in SIDES)
    assert plain.text != capped.text
    assert (plain.cap, capped.cap) == ("", "p1 at layers 3 to 4")
    assert capped.position is not None
    assert capped.position >= 20 - 1e-3, "at its own layer the cap holds for every token"
    dialogue.say("Why?")
    record = settled(dialogue)
    for side in SIDES:
        roles = [message["role"] for message in record.messages(side)]
        assert roles == ["user", "assistant", "user"]
        assert record.messages(side)[1]["content"] == record.answers[side][0].text


def test_a_cap_that_nothing_touches_gives_the_same_answer(dialogue: Dialogue) -> None:
    dialogue.dials = replace(dialogue.dials, percentile=99.0)
    dialogue.say("Who are you?")
    record = settled(dialogue)
    assert record.answers["plain"][0].text == record.answers["capped"][0].text


def test_again_changes_the_capped_side_alone(dialogue: Dialogue) -> None:
    dialogue.again()
    assert not dialogue.busy, "nothing was said yet"
    dialogue.say("Who are you?")
    before = {side: list(turns) for side, turns in settled(dialogue).answers.items()}
    dialogue.dials = Dials(percentile=99.0, first=0, last=5)
    dialogue.again()
    after = settled(dialogue).answers
    assert after["plain"] == before["plain"]
    assert [turn.cap for turn in after["capped"]] == ["p99 at layers 0 to 5"]
    assert after["capped"][0].text == after["plain"][0].text


def test_stopping_keeps_what_was_said(talker: Talker) -> None:
    dialogue = Dialogue(talker, GAUGE, CAPS, max_tokens=200)
    dialogue.say("Tell me of the sea.")
    while not any(dialogue.partial.values()):
        time.sleep(0.01)
    dialogue.stop()
    record = settled(dialogue)
    assert {turn.finish_reason for turns in record.answers.values() for turn in turns} <= {"cancelled", "stop"}


def test_what_the_model_can_not_take_is_refused_and_leaves_nothing(dialogue: Dialogue) -> None:
    with pytest.raises(InputError, match="the model's context holds 256"):
        dialogue.say("Why? " * 400)
    assert (dialogue.record.said, dialogue.busy) == ([], False)


def test_beginning_anew_forgets_answers_on_their_way(talker: Talker) -> None:
    dialogue = Dialogue(talker, GAUGE, CAPS, max_tokens=200)
    dialogue.say("Tell me of the sea.")
    dialogue.restart()
    time.sleep(0.3)
    assert (dialogue.record, dialogue.busy) == (Record(), False)


def test_where_one_side_finds_no_place_neither_answers(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    model = ModelConfig(id=str(folder), dtype="float32")
    with Talker(model, [GAUGE], device="cpu", at_once=1, waiting=1) as talker:
        dialogue = Dialogue(talker, GAUGE, CAPS, max_tokens=200)
        ticket = talker.ask(Ask(messages=({"role": "user", "content": "Hi."},), max_tokens=200), lambda _: None)
        while talker.load != (1, 0):
            time.sleep(0.01)
        with pytest.raises(BusyError):
            dialogue.say("Tell me of the sea.")
        ticket.cancel()
        while talker.load != (0, 0):
            time.sleep(0.01)
        assert (dialogue.record, dialogue.busy) == (Record(), False)


def test_saved_opened_and_exported(dialogue: Dialogue, tmp_path: Path) -> None:
    dialogue.restart(Record(system="You are a ghost."))
    dialogue.say("Who are you?")
    settled(dialogue)
    dialogue.say("Why?")
    record = settled(dialogue)
    assert Record.from_json(saved(record).encode()) == record
    for side in SIDES:
        file = tmp_path / side / "transcript.json"
        file.parent.mkdir()
        file.write_text(transcript_file(record.transcript(side, "tiny")), encoding="utf-8")
        [read] = read_transcripts(file)
        assert [message["role"] for message in read.conversation] == [
            "system",
            "user",
            "assistant",
            "user",
            "assistant",
        ]
        assert read.conversation[-1]["content"] == record.answers[side][-1].text
        assert read.origin["written_by"] == "tiny"


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"format": "personaspace-chat", "version": 2}', b"\xff"])
def test_other_files_are_not_opened(raw: bytes) -> None:
    with pytest.raises(InputError):
        Record.from_json(raw)


def test_dials_and_gauges_of_a_run(tmp_path: Path) -> None:
    write_fitted(LocalFolder(tmp_path / "run"))
    table, gauges = read_cap_table(tmp_path / "run"), read_gauges(tmp_path / "run")
    assert (table.layers, list(gauges)) == (tuple(range(8)), list(range(8)))
    assert (table.suggested.first, table.suggested.last, table.suggested.percentile) == (6, 6, 25.0)
    assert (np.diff(table.threshold_PL, axis=0) <= 0).all(), "the higher the percentile, the lower the threshold"
    found = table.interventions(Dials(percentile=50.0, first=2, last=4))
    assert [one.layer for one in found] == [2, 3, 4]
    assert [one.value for one in found] == table.threshold_PL[49, 2:5].tolist()
    at: Any = gauges[LAYOUT.layers - 1]
    assert at.position(at.role_mean) == 0
    assert at.position(at.default_mean) == 1
    assert at.low < at.high

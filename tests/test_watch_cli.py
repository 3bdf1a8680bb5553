"""`personaspace watch`: each turn's place, beside a forward pass of transformers; and the exit code of a CI."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from personaspace.cli import main
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.spans import locate
from personaspace.steer.live.gauge import Gauge, read_gauge
from personaspace.store.local import LocalFolder
from tests.analysis.caps.small_fit import LAYOUT, write_fitted
from tests.models import tiny_checkpoint

HIDDEN = 32
TALK = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A ghost of the old house, I think."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Well?"},
]
ASSISTANT = [message["content"] for message in TALK if message["role"] == "assistant"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its model, and a transcript."""
    place = tmp_path_factory.mktemp("watch")
    write_fitted(LocalFolder(place / "run"), hidden=HIDDEN)
    tiny_checkpoint(place / "tiny", layers=LAYOUT.layers, hidden=HIDDEN)
    (place / "talks").mkdir()
    (place / "talks" / "a.json").write_text(json.dumps({"conversation": TALK}))
    return place


def arguments(place: Path, *more: str) -> list[str]:
    model = ["--model", str(place / "tiny"), "--device", "cpu"]
    return ["watch", str(place / "talks"), "--space", str(place / "run"), *model, *more]


def positions_of_transformers(place: Path, gauge: Gauge) -> list[float]:
    config = ModelConfig(id=str(place / "tiny"))
    conversation = locate(ChatFormat(resolve(config), config), TALK[:-1])
    model = AutoModelForCausalLM.from_pretrained(place / "tiny", dtype=torch.float32).eval()
    with torch.inference_mode():
        tokens = torch.tensor([[*conversation.prompt, *conversation.response]])
        states_TD = model(tokens, output_hidden_states=True).hidden_states[gauge.layer + 1][0].double().numpy()
    unit_D = gauge.axis_D.astype(np.float64) / np.linalg.norm(gauge.axis_D.astype(np.float64))
    spans = [span for span in conversation.spans if span.part == "whole"]
    return [gauge.position(float(states_TD[span.start : span.stop].mean(axis=0) @ unit_D)) for span in spans]


def test_places_are_those_of_a_forward_pass(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gauge = read_gauge(place / "run", 3, "layer")
    truth = positions_of_transformers(place, gauge)
    below = sum(position < gauge.low for position in truth)
    assert main(arguments(place, "--layer", "3", "--json", "--allow", str(below))) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["layer"], told["default_range"]) == (3, [gauge.low, gauge.high])
    [talk] = told["transcripts"]
    assert (talk["file"], talk["below"]) == (str(place / "talks" / "a.json"), below)
    np.testing.assert_allclose([turn["position"] for turn in talk["turns"]], truth, rtol=1e-4, atol=1e-4)
    assert all(turn["tokens"] > 0 for turn in talk["turns"])


def test_the_exit_code_counts_turns_below(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At some layer the tiny model's turns are below the range, and at some they are not."""
    codes = set()
    for layer in (0, 3, 6):
        gauge = read_gauge(place / "run", layer, "layer")
        below = [position < gauge.low for position in positions_of_transformers(place, gauge)]
        code = main(arguments(place, "--layer", str(layer)))
        assert code == (9 if any(below) else 0)
        told = capsys.readouterr().out
        assert f"{sum(below) or 'none'} of 2 turns below the range" in told
        assert all(text in told for text in ASSISTANT)
        assert told.count("<") == sum(below)
        codes.add(code)
        assert main(arguments(place, "--layer", str(layer), "--allow", "2")) == 0
        assert main(arguments(place, "--layer", str(layer), "--turns", "1")) == (9 if below[0] else 0)
        capsys.readouterr()
    assert codes == {0, 9}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--allow", "-1"], "--allow takes a number from 0 on"),
        (["--turns", "0"], "--turns one from 1 on"),
        (["--layer", "9"], "watch --layer: 9; the fit has the layers 0 to 7."),
        (["--nonsense", "1"], "unknown argument --nonsense"),
    ],
)
def test_refusals(place: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(place, *more)) == 2
    assert message in capsys.readouterr().err


def test_what_can_not_be_read_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--space", str(place / "run"), "--model", str(place / "tiny"), "--device", "cpu"]
    assert main(["watch", str(tmp_path / "none.json"), *rest]) == 2
    assert "none.json does not exist" in capsys.readouterr().err
    long = tmp_path / "long.json"
    long.write_text(json.dumps({"conversation": [*TALK[:-1], TALK[1], {"role": "assistant", "content": "oh " * 900}]}))
    with pytest.warns(UserWarning, match="1 of 1 conversations dropped"):
        assert main(["watch", str(long), *rest]) == 2
    error = capsys.readouterr().err
    assert "long.json: " in error
    assert "--turns N" in error
    assert main(["watch", str(long), *rest, "--turns", "2", "--allow", "2"]) == 0

"""What a user gets from the commands when a run goes wrong: one clear end, nothing lost, and a way to go on."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from personaspace.cli import main
from personaspace.store import open_run
from personaspace.store.layout import ZARR_GROUP, rollouts_key, shard_key
from personaspace.store.local import LocalFolder
from personaspace.store.reader import open_spans
from personaspace.store.records import (
    COORDINATES_RECORD,
    ROLLOUTS,
    SPAN_COORDINATES_RECORD,
    committed_slots,
    read_records,
    record_key,
)
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.cluster.small_jobs import committed_objects, poison, talk, write_responses
from tests.models import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("commands_join")

CONFIG = """
model: {{id: {model}, dtype: float32}}
generate: {{responses: {responses}}}
extract: {{window_rows: 4}}
store: {{root: {root}, run: run, precision: lossless, unit_rows: 4, layer_group: 2}}
"""
CONVERSATIONS = {
    role: [
        talk("Who are you?", f"<think>I am the {role}.</think>Guess."),
        talk("Again?", f"The {role}.", "Really?", "Really."),
        talk("Where?", "Here."),
        talk("Why?", f"<think>A {role} needs no reason.</think>\n\nWhy not?"),
    ]
    for role in ("default", "ghost")
}


def config_file(folder: Path, model: Path) -> str:
    responses = write_responses(folder / "responses", CONVERSATIONS)
    file = folder / "config.yaml"
    file.write_text(CONFIG.format(model=model, responses=responses, root=folder))
    return str(file)


@pytest.mark.nightly
def test_broken_weights_end_the_run_at_the_limit_unless_it_allows_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = poison(tiny_checkpoint(tmp_path / "model"), tmp_path / "broken", layer=4)
    extract = ["extract", config_file(tmp_path, model)]
    summary = (
        "error: 4 of 8 rollouts are dropped, more than extract.max_dropped (25%) allows:\n"
        "  4 x non-finite activations\n"
        "What is committed stays. Mend the cause, or go on with a higher --extract.max-dropped.\n"
    )
    folder = LocalFolder(tmp_path / "run")
    capsys.readouterr()
    assert main(extract) == 7
    assert capsys.readouterr().err == summary
    before = committed_objects(folder)
    assert set(committed_slots(folder)) >= {(COORDINATES_RECORD, 0, 0), (ROLLOUTS, 0, 0), (ROLLOUTS, 1, 0)}
    assert verify(folder).harmful == []
    # The same command ends at once: no model is loaded to find out again. The other four may have been stored, too.
    assert main(extract) == 7
    printed = capsys.readouterr()
    assert printed.err in (summary, summary.replace("4 of 8", "8 of 8").replace("4 x", "8 x"))
    assert "replica(s)" not in printed.out

    assert main([*extract, "--extract.max-dropped", "1"]) == 0
    after = committed_objects(folder)
    assert {key: after[key] for key in before} == before
    run = open_run(folder).load()
    assert run["status"].values.tolist() == [2] * 8
    assert np.isfinite(run[RESID_POST_MEAN].values[:, :4]).all()
    assert np.isnan(run[RESID_POST_MEAN].values[:, 4:]).all()
    lost = [record.dropped for record in read_records(folder, COORDINATES_RECORD).values()]
    assert lost == [dict.fromkeys(rows, "non-finite activations") for rows in (range(4), range(4, 8))]
    assert verify(folder).problems == ()


@pytest.mark.nightly
def test_a_model_that_can_t_be_packed_is_one_clear_error(tmp_path: Path) -> None:
    config = config_file(tmp_path, tiny_checkpoint(tmp_path / "model", "gpt_oss"))
    # A process of its own, since Ray's log would not show up in this one's.
    done = subprocess.run(
        [sys.executable, "-m", "personaspace", "run", config, "--extract.packing", "packed"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.fullmatch(
        r"error: GptOssModel with eager attention: a rollout's states differ by \d+\.\d% when others share its "
        r"micro-batch, so packed rollouts see each other\. Set extract\.packing to `padded`, or model\.attention to "
        r"`flash_attention_2`\.\n",
        done.stderr,
    ), done.stderr
    assert done.returncode == 1
    folder = LocalFolder(tmp_path / "run")
    assert committed_slots(folder) == {(ROLLOUTS, 0, 0): 0, (ROLLOUTS, 1, 0): 0}
    assert verify(folder).problems == ()


def test_repair_makes_damaged_spans_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_file(tmp_path, tiny_checkpoint(tmp_path / "model"))
    assert main(["extract", config, "--extract.reductions", "mean", "turns", "parts"]) == 0
    folder = LocalFolder(tmp_path / "run")
    before, spans_before = committed_objects(folder), open_spans(folder).load()
    spans = f"spans.{RESID_POST_MEAN}"
    damaged = [
        shard_key(f"spans/{RESID_POST_MEAN}", 0, 1),
        f"{ZARR_GROUP}/spans/count/c/1",
        record_key((SPAN_COORDINATES_RECORD, 0, 0), 0),
        record_key((spans, 1, 0), 0),
        # What tells whether a shard of spans is whole is damaged, too.
        rollouts_key(0),
        record_key((spans, 0, 2), 0),
    ]
    for key in damaged:
        data = bytearray(folder.get(key))
        data[len(data) // 2] ^= 1
        (folder.path / key).write_bytes(data)
    (folder.path / ZARR_GROUP / "spans" / "part" / "c" / "1").unlink()
    found = {problem.key for problem in verify(folder).problems}
    assert found == {*damaged, f"{ZARR_GROUP}/spans/part/c/1"}
    capsys.readouterr()
    assert main(["store", "repair", str(folder.path)]) == 0
    out = capsys.readouterr().out
    assert f"{shard_key(f'spans/{RESID_POST_MEAN}', 1, 0)}: whole, and recorded again\n" in out
    assert verify(folder).problems == ()
    after = committed_objects(folder)
    assert {key: data for key, data in after.items() if not key.startswith("commits/")} == {
        key: data for key, data in before.items() if not key.startswith("commits/")
    }
    assert open_spans(folder).load().identical(spans_before)
    shards = read_records(folder, spans)
    assert {slot: record.generation for slot, record in shards.items() if record.generation} == {
        (spans, 0, 1): 1,
        (spans, 0, 2): 1,
        (spans, 1, 0): 1,
    }
    assert [slot for slot, record in shards.items() if record.adopted] == [(spans, 1, 0)]

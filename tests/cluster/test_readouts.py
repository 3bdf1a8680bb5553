"""Runs that read several sites and reductions at once: each array holds what one process without a store computes."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from personaspace.cluster.adoption import adopt_orphans
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Note, StepStarted
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job
from personaspace.cluster.session import hold_run
from personaspace.cluster.sharding import extraction_shares
from personaspace.extract.config import Site
from personaspace.extract.engine import Extractor
from personaspace.store import open_run
from personaspace.store.catalog import summarize
from personaspace.store.errors import IdentityError, InputError
from personaspace.store.layout import ZARR_GROUP, shard_key
from personaspace.store.reader import open_spans
from personaspace.store.records import (
    COORDINATES_RECORD,
    SPAN_COORDINATES_RECORD,
    read_record,
    read_records,
    record_key,
)
from personaspace.store.schema import RESID_POST_MEAN, ArraySpec
from personaspace.store.verify import verify
from tests.cluster.small_jobs import committed_objects, job_for, make_place, poison, run_job, talk, write_responses

SITES: tuple[Site, ...] = ("resid_post", "resid_pre", "attn_out", "mlp_out")
REDUCTIONS = ("mean", "last_prompt", "first_3", "turns", "parts")
CONVERSATIONS = {
    "default": [
        talk("Who are you?", "An assistant, and a patient one."),
        talk("Why?", "<think>They want to know.</think>It is so."),
        talk("What now?", "First I say this.", "And then?", "<think>Go on.</think>\n\nThen that."),
    ],
    "ghost": [
        talk("Who?", "<think>I was alive once.</think>Boo.", "Again?", "<think>They ask again.</think>Boo, I said."),
        talk("Speak.", ""),
        talk("Speak on.", "so it goes, " * 40),
        [{"role": "narrator", "content": "It is night."}, *talk("Who?", "Me.")],
        talk("One?", "Yes.", "Two?", "Yes, yes.", "Three?", "No."),
    ],
    "pirate": [talk("Ahoy?", "  \n "), talk("Ahoy there?", "The sea is wide, " * 7), talk("Aye?", "Aye")],
}
"""11 rollouts in three units, of up to three turns; the last answers in fewer than three tokens."""
LOST = {
    4: "the response is empty",
    5: "376 tokens exceed the model's context of 256",
    6: "message 0 has the role 'narrator'; allowed are system, user, assistant",
    8: "the response is only white space",
}
TURN, THOUGHT = ("whole", "answer"), ("whole", "think", "answer")
SPANS = [
    (row, turn, part)
    for row, turns in {
        0: [TURN],
        1: [THOUGHT],
        2: [TURN, THOUGHT],
        3: [THOUGHT, THOUGHT],
        7: [TURN, TURN, TURN],
        9: [TURN],
        10: [TURN],
    }.items()
    for turn, parts in enumerate(turns)
    for part in parts
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("readouts"), CONVERSATIONS)


@pytest.fixture(scope="module")
def whole(place: Path, own_ray: None) -> Job:
    """A run that reads everything, in two stages."""
    job = job_for(place, "whole", sites=SITES, reductions=REDUCTIONS)
    run_job(job, stages=2)
    return job


def assert_close(values: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Equal up to ``tolerance`` of the largest value, and NaN in the same places."""
    assert np.nanmax(np.abs(values - expected)) <= tolerance * np.nanmax(np.abs(expected))
    np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))


def test_every_array_is_what_one_process_computes(whole: Job) -> None:
    conversations = [[*row.messages, {"role": "assistant", "content": row.response}] for row in whole.plan.rows]
    extractor = Extractor(whole.model, device="cpu")
    with pytest.warns(UserWarning, match="4 of 11 conversations dropped"):
        expected = extractor.extract(conversations, sites=SITES, reductions=REDUCTIONS)
    run, spans = open_run(whole.folder).load(), open_spans(whole.folder).load()
    assert sorted(run.data_vars) == sorted(
        f"{site}_{name}" for site in SITES for name in ("mean", "last_prompt", "first_3")
    )
    for name, values in run.data_vars.items():
        assert_close(values.values[:11], expected[name].values, 1e-6)
        assert np.isnan(values.values[11:]).all()
    assert sorted(spans.data_vars) == sorted(f"{site}_mean" for site in SITES)
    for name, values in spans.data_vars.items():
        assert_close(values.values, expected[f"span_{name}"].values, 1e-6)
    for stored, computed in (("rollout", "span_rollout"), ("turn", "turn"), ("part", "part"), ("count", "count")):
        assert spans[stored].values.tolist() == expected[computed].values.tolist()


def test_coordinates_say_what_each_row_is(whole: Job) -> None:
    run, spans = open_run(whole.folder).load(), open_spans(whole.folder).load()
    assert run["status"].values.tolist() == [2 if row in LOST else 1 for row in range(11)] + [3]
    columns = (spans[name].values.tolist() for name in ("rollout", "turn", "part"))
    assert list(zip(*columns, strict=True)) == SPANS
    # The response as a span is the response as a rollout.
    answers = {row: place for place, (row, _, part) in enumerate(SPANS) if part == "whole"}
    assert spans["count"].values[list(answers.values())].tolist() == run["n_tokens"].values[list(answers)].tolist()
    for site in SITES:
        name = f"{site}_mean"
        np.testing.assert_array_equal(spans[name].values[list(answers.values())], run[name].values[list(answers)])
    for array in (COORDINATES_RECORD, SPAN_COORDINATES_RECORD):
        records = read_records(whole.folder, array).values()
        assert {row: why for record in records for row, why in record.dropped.items()} == LOST
        assert {len(record.covers) for record in records} == {16 * 3}
    summary = summarize(whole.folder)
    assert (summary.state, summary.shards, summary.shards_wanted) == ("complete", 16 * 3 * 3, 16 * 3 * 3)
    assert verify(whole.folder).problems == ()


def test_nothing_behind_the_last_layer_that_is_asked_for_is_run(place: Path, whole: Job) -> None:
    """Broken weights in layer 4 do no harm to a run that ends before it."""
    poison(place / "model", place / "broken", layer=4)
    job = job_for(place, "layers", model="broken", layers=(3,))
    [share] = extraction_shares(job, ClusterConfig(), actors=1)
    assert (share.first, share.stop) == (0, 4)
    message = (
        "cluster.stages: stages must be 1 to 2 (layer groups of 2), not 3. Use fewer stages, or a new run with a "
        "smaller layer_group."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        extraction_shares(job, ClusterConfig(), actors=3)
    # The first of two stages has no layer to read: it only hands on.
    [note] = [event.text for event in run_job(job, stages=2) if isinstance(event, Note)]
    assert "replicas of 2 (pipeline: stage of layers 0 to 1, stage of layers 2 to 3), " in note
    run, expected = open_run(job.folder).load(), open_run(whole.folder).load()
    np.testing.assert_array_equal(run[RESID_POST_MEAN].values[:, 2:4], expected[RESID_POST_MEAN].values[:, 2:4])
    assert np.isnan(run[RESID_POST_MEAN].values[:, [0, 1, 4, 5]]).all()
    assert run["status"].values.tolist() == expected["status"].values.tolist()
    shards = {key: data for key, data in committed_objects(job.folder).items() if f"{RESID_POST_MEAN}/c/" in key}
    assert list(shards) == [shard_key(RESID_POST_MEAN, unit, 1) for unit in range(3)]
    assert shards == {key: whole.folder.get(key) for key in shards}


def test_packed_rollouts_are_as_good_as_padded_ones(place: Path, whole: Job) -> None:
    job = job_for(place, "packed", packing="packed", reductions=("mean", "turns", "parts"))
    run_job(job)
    for read in (open_run, open_spans):
        packed, padded = read(job.folder).load(), read(whole.folder).load()
        assert_close(packed[RESID_POST_MEAN].values, padded[RESID_POST_MEAN].values, 1e-5)
        assert not np.array_equal(packed[RESID_POST_MEAN].values, padded[RESID_POST_MEAN].values)
    with pytest.raises(IdentityError, match=r"\n  extract\.packed: true -> false\n"):
        job_for(place, "packed", reductions=("mean", "turns", "parts"))


@pytest.mark.nightly
def test_a_run_grows_by_sites_by_reductions_and_by_spans(place: Path, whole: Job) -> None:
    write_responses(place / "more", {**CONVERSATIONS, "sailor": [talk("Ship?", "Ahoy.", "Sea?", "Wide.")]})
    job = job_for(place, "grown")
    run_job(job)
    arrays = [RESID_POST_MEAN]
    for asked, added, responses in (
        ({"sites": ("resid_pre",), "reductions": ("last_prompt",)}, "resid_pre_last_prompt", "responses"),
        # By another rollout at the same time, which gets the other arrays, too.
        ({"reductions": ("turns", "parts")}, f"spans/{RESID_POST_MEAN}", "more"),
    ):
        before = committed_objects(job.folder)
        message = (
            f"{job.folder.url}: the config asks for more than this run stores (the arrays ['{added}']). Add "
            "--store.grow to extract that, too. Nothing was changed."
        )
        with pytest.raises(IdentityError, match=f"^{re.escape(message)}$"):
            job_for(place, "grown", **asked)
        with hold_run(job_for(place, "grown", grow=True, **asked), say=print):
            pass  # Planned, and not extracted yet: what is there can be read as before.
        assert open_run(job.folder).attrs[RESID_POST_MEAN] == "6 of 6 layers complete"
        run_job(job_for(place, "grown", responses=responses, grow=True, **asked))
        arrays.append(added)
        after = committed_objects(job.folder)
        assert {key: after[key] for key in before} == before
        covers = tuple(sorted(f"{array.replace('/', '.')}.{group:03d}" for array in arrays for group in range(3)))
        assert {record.covers for record in read_records(job.folder, COORDINATES_RECORD).values()} == {covers}
    assert {record.covers for record in read_records(job.folder, SPAN_COORDINATES_RECORD).values()} == {covers}
    assert verify(job.folder).problems == ()
    assert summarize(job.folder).state == "complete"
    # All that was added is what a run has that reads it from the beginning.
    expected = committed_objects(whole.folder)
    stored = {key: data for key, data in after.items() if "/c/" in key and key.split("/c/")[1][0] != "3"}
    assert stored == {key: expected[key] for key in stored}
    assert {key.removeprefix(f"{ZARR_GROUP}/").split("/c/")[0] for key in stored} > {*arrays, "spans/rollout", "status"}
    run, spans = open_run(job.folder).load(), open_spans(job.folder).load()
    assert run["role"].values[12:].tolist() == ["sailor", "", "", ""]
    assert run["status"].values[12:].tolist() == [1, 3, 3, 3]
    assert spans["turn"].values[spans["rollout"].values == 12].tolist() == [0, 0, 1, 1]
    assert all(np.isfinite(values.values[12]).all() for values in run.data_vars.values())
    assert np.isfinite(spans[RESID_POST_MEAN].values).all()

    before = {entry.key: job.folder.get(entry.key) for entry in job.folder.list()}
    for asked, parts in (
        ({"reductions": ("turns",)}, ("whole",)),
        ({"sites": ("mlp_out",), "reductions": ("parts",)}, ("think", "answer")),
    ):
        message = (
            f"extract.reductions: the spans of this run are the parts ('whole', 'think', 'answer') of turns, not "
            f"{parts}; use the reductions that the run began with, or another --store.run."
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            job_for(place, "grown", responses="more", grow=True, **asked)
    longer = {**CONVERSATIONS, "sailor": [talk("1?", "One.", "2?", "Two.", "3?", "Three.", "4?", "Four.")]}
    write_responses(place / "longer", longer)
    message = (
        f"{job.folder.url}: rollouts of up to 4 assistant turns need 12 places for spans, and this run has 9 for each. "
        "Use another --store.run for longer conversations."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        job_for(place, "grown", responses="longer", grow=True)
    assert {entry.key: job.folder.get(entry.key) for entry in job.folder.list()} == before


def test_spans_have_places_for_rollouts_that_the_config_lacks(place: Path) -> None:
    job = job_for(place, "lacking")
    with hold_run(job, say=print) as fence:
        generate(job, fence, ClusterConfig(), lambda _: None)
    write_responses(place / "short", {role: talks[:1] for role, talks in CONVERSATIONS.items() if role != "ghost"})
    larger = job_for(place, "lacking", responses="short", grow=True, reductions=("turns",))
    assert larger.manifest.spans_per_rollout == 3


def test_spans_that_lost_their_records_are_recorded_again(place: Path, whole: Job) -> None:
    shutil.copytree(whole.folder.path, place / "orphans")
    job = job_for(place, "orphans", sites=SITES, reductions=REDUCTIONS)
    before = committed_objects(job.folder)
    spans = f"spans.{RESID_POST_MEAN}"
    lost = [(spans, 0, 1), (SPAN_COORDINATES_RECORD, 1, 0), (COORDINATES_RECORD, 1, 0), (SPAN_COORDINATES_RECORD, 2, 0)]
    for slot in lost:
        (job.folder.path / record_key(slot, 0)).unlink()
    for name in ("rollout", "part"):
        (job.folder.path / ZARR_GROUP / "spans" / name / "c" / "2").unlink()
    events = run_job(job)
    assert not [event for event in events if isinstance(event, Note)]  # No model was needed.
    assert [event.dropped for event in events if isinstance(event, StepStarted)] == [LOST, LOST]
    after = committed_objects(job.folder)
    assert {key for key, data in before.items() if after.pop(key) != data} == {record_key(slot, 0) for slot in lost}
    assert after == {}
    assert read_record(job.folder, (spans, 0, 1), 0).adopted
    assert verify(job.folder).problems == ()


def test_spans_of_other_rollouts_are_not_taken_for_a_unit_s_own(place: Path, whole: Job) -> None:
    shutil.copytree(whole.folder.path, place / "swapped")
    job = job_for(place, "swapped", sites=SITES, reductions=REDUCTIONS)
    spans = ArraySpec(name=RESID_POST_MEAN, description="", spans=("whole",))
    for group, unit in ((0, 0), (1, 1), (2, 2)):
        (job.folder.path / shard_key(spans.path, 1, group)).write_bytes(
            whole.folder.get(shard_key(spans.path, unit, group))
        )
        (job.folder.path / record_key((spans.record, 1, group), 0)).unlink()
    with hold_run(job, say=print) as fence:
        adopt_orphans(job, fence)
    assert job.missing_shards(job.committed(), 1) == ((spans.record, 0), (spans.record, 2))

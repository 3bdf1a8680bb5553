"""Conversations of a run in its own space and in another run's: what comes with them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personaspace.analysis.drift.run import drift_of, read_talks
from personaspace.analysis.drift.tables import conversations_table, turns_table
from personaspace.extract.config import GenerateConfig, PersonasConfig
from personaspace.extract.imported import plan_finished
from personaspace.store.errors import InputError
from personaspace.store.exchange.export import export
from personaspace.store.manifest import require_manifest
from personaspace.store.reader import open_spans
from personaspace.store.space import open_space
from tests.analysis.drift.talk_runs import BY_TURN, MEAN, TALKS, write_fitted_run, write_talk_run


def test_conversations_in_the_run_s_own_space(tmp_path: Path) -> None:
    folder = write_fitted_run(tmp_path / "both")
    drift = drift_of(folder)
    assert drift["scenario"].values.tolist() == ["coding.slow", "coding.flaky", "therapy.city"]
    assert drift["domain"].values.tolist() == ["coding", "coding", "therapy"]
    assert drift["topic"].values[0] == "About coding.slow."
    assert drift["conversation"].values.tolist() == [16, 17, 18]
    assert drift["rollout_id"].values[2] == f"{18:016x}"
    assert drift["tokens"].values[1].tolist() == [2, 3, 0, 0]
    space, spans = open_space(folder).load(), open_spans(folder).load()
    origin = space["default_vector"] - space["axis"]
    for row, way in zip((16, 17, 18), list(TALKS.values())[:3], strict=True):
        own = spans.isel(span=spans["rollout"].values == row)["resid_post_mean"]
        place = ((own - origin) * space["axis"]).sum("hidden") / (space["axis"] ** 2).sum("hidden")
        found = drift["position"].sel(conversation=row).values[: len(way)]
        np.testing.assert_allclose(found, place.transpose("span", "layer"), rtol=1e-5)
    assert drift.sel(layer=1)["first_below"].values.tolist()[2] == 1
    assert drift.attrs["run"] == drift.attrs["space"] == folder.url
    assert (drift.attrs["single_turn"], drift.attrs["notes"], drift.attrs["target_layer"]) == (17, [], 1)


def test_another_run_s_space_gives_the_same(tmp_path: Path) -> None:
    own = drift_of(write_fitted_run(tmp_path / "both"))
    fitted = write_fitted_run(tmp_path / "roles", talks=False, arrays=(MEAN,))
    talks = write_talk_run(tmp_path / "talks", roles=False, template_hash="another")
    drift = drift_of(talks, fitted)
    assert drift["conversation"].values.tolist() == [0, 1, 2]
    assert drift.attrs["notes"] == ['template_hash: "t" -> "another"']
    # The noise of a turn is its row's, and the rows differ.
    np.testing.assert_allclose(drift["position"], own["position"], atol=0.2)
    np.testing.assert_allclose(drift["drift"], own["drift"], atol=1e-5)
    assert drift_of(talks, fitted, layer=0)["layer"].values.tolist() == [0]
    assert drift_of(talks, fitted, layer=0).attrs["target_layer"] == 0


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({"files": {"model.safetensors": "cd34"}}, 'files.model.safetensors: "ab12" -> "cd34"'),
        ({"dtype": "bfloat16"}, 'dtype: "float32" -> "bfloat16"'),
        ({"quantization": {"bits": 4}}, "quantization.bits: (absent) -> 4"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, model: dict[str, Any], line: str) -> None:
    fitted = write_fitted_run(tmp_path / "roles", talks=False)
    talks = write_talk_run(tmp_path / "talks", roles=False, **model)
    with pytest.raises(InputError) as error:
        drift_of(talks, fitted)
    said = str(error.value)
    assert said.startswith(f"{talks.url}: was read from another model than the space of {fitted.url}")
    assert f"\n  {line}\n" in said
    assert said.endswith("Name a run of the same model with --space.")


def test_a_hub_s_commit_and_a_folder_can_t_be_told_apart_by_their_files(tmp_path: Path) -> None:
    fitted = write_fitted_run(tmp_path / "roles", talks=False)
    hub = {"name": "org/tiny", "revision": "0" * 40, "files": {"model.safetensors": "blob"}}
    drift = drift_of(write_talk_run(tmp_path / "talks", roles=False, **hub), fitted)
    assert drift.attrs["notes"][0].startswith("the files of the two models can't be compared")
    assert 'name: "tiny" -> "org/tiny"' in drift.attrs["notes"]


def test_what_is_missing_is_refused_with_the_way_to_get_it(tmp_path: Path) -> None:
    fitted = write_fitted_run(tmp_path / "roles", talks=False)
    talks = write_talk_run(tmp_path / "talks", roles=False)
    with pytest.raises(InputError, match=r"the run has no fitted space of its own\. .* has one: --space RUN"):
        drift_of(talks)
    with pytest.raises(InputError, match=r"/talks: no persona space yet; run `fit` first\.$"):
        drift_of(write_fitted_run(tmp_path / "both"), talks)
    with pytest.raises(InputError, match=r"the run has no averages of turns\. .* --extract\.reductions mean turns"):
        drift_of(write_fitted_run(tmp_path / "plain", arrays=(MEAN,)))
    with pytest.raises(InputError, match=r"^--layer: 9; .* has turns of layers 0 to 1\.$"):
        drift_of(talks, fitted, layer=9)


def test_a_space_of_another_array_is_refused(tmp_path: Path) -> None:
    fitted = write_fitted_run(tmp_path / "roles", talks=False)
    attention = tuple(
        type(spec)(name="attn_out_mean", description="test", spans=spec.spans) for spec in (MEAN, BY_TURN)
    )
    talks = write_talk_run(tmp_path / "talks", roles=False, arrays=attention)
    with pytest.raises(InputError, match=r"has turns of attn_out_mean, and the space was fitted to resid_post_mean\."):
        drift_of(talks, fitted)


def test_what_was_said_in_each_turn(tmp_path: Path) -> None:
    folder = write_talk_run(tmp_path / "talks", roles=False)
    talks = read_talks(folder, require_manifest(folder), [1, 2])
    assert list(talks) == [1, 2]
    assert (talks[1].system, talks[2].system) == ("Be kind.", "")
    assert talks[2].turns[1] == ("Said 1 in 2", "Answer 1 in 2 <script>window.hacked=1</script>")
    assert list(talks[1].turns) == [0, 1]
    assert (talks[1].written_by, talks[2].written_by) == ("tiny", "somebody/else-70B")


def test_tables_have_a_row_for_each_turn_and_each_conversation(tmp_path: Path) -> None:
    drift = drift_of(write_fitted_run(tmp_path / "both"))
    turns, conversations = turns_table(drift), conversations_table(drift)
    assert (turns.num_rows, conversations.num_rows) == (2 * (4 + 2 + 4), 2 * 3)
    labels = ["row", "rollout_id", "domain", "scenario", "sample", "layer"]
    assert turns.column_names == [*labels, "turn", "tokens", "position", "pc1", "pc2"]
    wide = ["turns", "drift", "slope", "slope_low", "slope_high", "below", "above", "first_below"]
    assert conversations.column_names == [*labels, *wide]
    last = turns.to_pylist()[-1]
    assert (last["row"], last["layer"], last["turn"], last["tokens"], last["scenario"]) == (18, 1, 3, 5, "therapy.city")
    assert last["position"] == float(drift["position"].sel(conversation=18, layer=1)[3])
    flaky, city = conversations.to_pylist()[2], conversations.to_pylist()[4]
    assert (flaky["turns"], flaky["slope_low"], flaky["first_below"]) == (2, None, None)
    assert (city["turns"], city["below"], city["first_below"]) == (4, 3, 1)


def test_exported_conversations_are_imported_again(tmp_path: Path) -> None:
    folder = write_talk_run(tmp_path / "talks", roles=False)
    out = tmp_path / "out"
    export(folder, out, "transcripts", say=lambda _: None)
    written = {file.stem: json.loads(file.read_text()) for file in out.rglob("*.json")}
    assert {entry["model"] for entry in written.values()} == {"tiny", "somebody/else-70B"}
    plan = plan_finished(GenerateConfig(responses=str(out)), PersonasConfig())
    assert [role.id for role in plan.roles] == ["scenario.coding", "scenario.therapy"]
    asked = {plan.questions[row.question].id: row for row in plan.rows}
    assert set(asked) == set(TALKS)
    assert [asked[name].turns for name in TALKS] == [4, 2, 4, 1]
    assert asked["therapy.city"].origin == {"written_by": "somebody/else-70B", "user": {"played_by": "script"}}
    assert asked["coding.flaky"].messages[0] == {"role": "system", "content": "Be kind."}

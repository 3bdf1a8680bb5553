"""`personaspace store ...` as a user types it, on small runs."""

import json
import shutil
from pathlib import Path

import pytest

from personaspace.cli import main
from personaspace.store.index import write_index
from personaspace.store.layout import shard_key
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import MANIFEST, MANIFEST_COPY, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.scores import Score, commit_scores, scores_key
from personaspace.store.verify import verify
from tests.store.small_runs import LAYOUT, complete, create


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with a complete run and a half-finished one."""
    make(LocalFolder(tmp_path / "runs" / "whole"), range(LAYOUT.units))
    make(LocalFolder(tmp_path / "runs" / "half"), [0])
    return tmp_path / "runs"


def make(folder: Folder, units: range | list[int]) -> None:
    with acquire(folder, timeout=60, say=print) as lease:
        manifest = create(lease.fence)
        complete(lease.fence, units=units)
        for unit in units:
            scores = [Score(row=row, score=3.0) for row in LAYOUT.unit_row_range(unit)]
            commit_scores(lease.fence, LAYOUT, "judge", unit, scores)
        write_index(lease.fence, manifest)


def data(folder: Path) -> dict[str, bytes]:
    """Key -> bytes of everything that a copy must have."""
    kept = ("activations.zarr", "rollouts", "scores", "commits", "plan")
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.relative_to(folder).parts[0] in kept
    }


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """The message of a command that ends with ``code``."""
    assert main(["store", *map(str, arguments)]) == code
    return capsys.readouterr().err


def test_ls_shows_and_filters(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "broken").mkdir()
    (root / "broken" / MANIFEST).write_text("{}")
    (root / "no run").mkdir()
    assert main(["store", "ls", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "broken", "half", "whole"]
    assert "damaged" in lines[1]
    assert "4/10" in lines[2]
    assert "partial" in lines[2]
    assert "10/10" in lines[3]
    assert "complete" in lines[3]

    def names(*filters: str) -> list[str]:
        assert main(["store", "ls", str(root), "--json", *filters]) == 0
        return [json.loads(line)["run"] for line in capsys.readouterr().out.splitlines()]

    assert names("--state", "complete") == ["whole"]
    assert names("--state", "damaged") == ["broken"]
    assert names("--model", "TIN") == ["half", "whole"]
    assert names("--model", "llama") == []
    assert names("--layer", "4") == ["whole"]


def test_ls_of_a_run_points_to_show(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a run, not a store of runs" in refused(capsys, 2, "ls", root / "whole")


def test_show_says_what_is_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "show", str(root / "half")]) == 0
    out = capsys.readouterr().out
    for line in ("state      partial", "extracted  4/10 rollouts (0 dropped)", "scores     judge", "shards     2/6"):
        assert line in out
    assert "no run here" in refused(capsys, 2, "show", root / "nothing")


def test_verify_names_damage_and_its_cost(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root / "whole"
    assert main(["store", "verify", str(run)]) == 0
    assert "0 problem(s)" in capsys.readouterr().out
    (run / shard_key(RESID_POST_MEAN, 2, 0)).unlink()
    assert main(["store", "verify", str(run)]) == 4
    out = capsys.readouterr().out
    assert "missing   activations.zarr/resid_post_mean/c/2/0/0: is recorded, but not there" in out
    assert "They cost 2 rollout(s): 0000000000000008, 0000000000000009 (roles hacker)" in out
    assert f"Next: personaspace store repair {run}" in out
    assert main(["store", "verify", str(run), "--json"]) == 4
    findings = json.loads(capsys.readouterr().out)
    assert findings["rows"] == [8, 9]
    assert findings["problems"][0]["kind"] == "missing"


def test_repair_restores_what_is_kept_twice(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root / "whole"
    before = data(run)
    for key in (MANIFEST, "plan/000000.parquet", scores_key("judge", 1), "activations.zarr/role/zarr.json"):
        content = bytearray((run / key).read_bytes())
        content[len(content) // 2] ^= 1
        (run / key).write_bytes(content)
    (run / "index.parquet").unlink()
    (run / "lease.json").write_text("{}")
    (run / "commits" / "000000" / "scores.judge.000.000.json").unlink()
    assert main(["store", "repair", str(run)]) == 0
    assert "0 problem(s)" in capsys.readouterr().out
    after = data(run)
    assert {key for key in before if before[key] != after.get(key)} == {"commits/000000/scores.judge.000.000.json"}
    assert verify(LocalFolder(run)).problems == ()


def test_repair_says_what_nothing_can_restore(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("plan/000000.parquet", "plan/000000.copy.parquet"):
        (root / "whole" / key).write_bytes(b"x")
    assert main(["store", "repair", str(root / "whole")]) == 4
    assert "both copies are damaged; restore the run from a copy" in capsys.readouterr().out
    for key in (MANIFEST, MANIFEST_COPY):
        (root / "half" / key).write_bytes(b"x")
    assert "both copies of run.json are damaged" in refused(capsys, 4, "repair", root / "half")


def test_repair_of_a_run_without_config_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "whole" / shard_key(RESID_POST_MEAN, 0, 0)).unlink()
    message = refused(capsys, 2, "repair", root / "whole")
    assert "was imported, so nothing of it can be computed here" in message


def test_freeze_is_final_and_the_same_for_a_copy(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is partial, 4 of 10 rollouts" in refused(capsys, 2, "freeze", root / "half")
    hashes = []
    assert main(["store", "cp", str(root / "whole"), str(root / "copy")]) == 0
    for name in ("whole", "copy"):
        assert main(["store", "freeze", str(root / name)]) == 0
        hashes.append(capsys.readouterr().out.split()[-1])
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 64
    assert "the run is frozen as" in refused(capsys, 2, "freeze", root / "whole")
    assert "perhaps cited by somebody" in refused(capsys, 2, "rm", root / "whole", "--yes")
    assert (root / "whole" / MANIFEST).exists()
    assert main(["store", "rm", str(root / "whole"), "--yes", "--frozen"]) == 0
    assert not (root / "whole").exists()


def test_cp_goes_on_where_it_was_interrupted(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_new, written = LocalFolder.put_new, []

    def interrupted(self: LocalFolder, key: str, content: bytes) -> bool:
        written.append(key)
        if len(written) == 30:
            raise KeyboardInterrupt
        return put_new(self, key, content)

    with monkeypatch.context() as patched:
        patched.setattr(LocalFolder, "put_new", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(["store", "cp", str(root / "whole"), str(root / "copy")])
    assert "no run here" in refused(capsys, 2, "show", root / "copy")
    assert main(["store", "cp", str(root / "whole"), str(root / "copy")]) == 0
    assert data(root / "copy") == data(root / "whole")
    assert verify(LocalFolder(root / "copy")).problems == ()


def test_cp_never_mixes_two_runs(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = LocalFolder(root / "other")
    with acquire(other, timeout=60, say=print) as lease:
        create(lease.fence, identity={**require_manifest(LocalFolder(root / "half")).identity, "more": 1})
    assert "holds another run" in refused(capsys, 2, "cp", root / "whole", other.path)
    put_new = LocalFolder.put_new

    def interrupted(self: LocalFolder, key: str, content: bytes) -> bool:
        if key.startswith("rollouts/"):
            raise KeyboardInterrupt
        return put_new(self, key, content)

    with monkeypatch.context() as patched:
        patched.setattr(LocalFolder, "put_new", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(["store", "cp", str(root / "whole"), str(root / "copy")])
    assert "the beginning of another run's copy" in refused(capsys, 2, "cp", other.path, root / "copy")


def test_cp_refuses_itself_and_damage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "are the same" in refused(capsys, 2, "cp", root / "half", root / "half")
    (root / "whole" / shard_key(RESID_POST_MEAN, 0, 0)).write_bytes(b"x")
    assert "differ from their record" in refused(capsys, 4, "cp", root / "whole", root / "copy")
    assert not (root / "copy" / MANIFEST).exists()


def test_rm_asks_and_never_under_a_live_driver(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LocalFolder(root / "half")
    assert "nobody is there to be asked; add --yes. Nothing was deleted." in refused(capsys, 2, "rm", run.path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["store", "rm", str(run.path)]) == 1
    with acquire(run, timeout=60, say=print, after_epoch=require_manifest(run).last_epoch):
        assert "the run is being written by" in refused(capsys, 3, "rm", run.path, "--yes")
    assert verify(run).problems == ()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(["store", "rm", str(run.path)]) == 0
    assert sorted(path.name for path in root.iterdir()) == ["whole"]


def test_gc_deletes_leftovers_of_all_runs_but_those_being_written(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = data(root / "whole")
    for name in ("half", "whole"):
        (root / name / ".tmp").mkdir(exist_ok=True)
        (root / name / ".tmp" / "half-written").write_bytes(b"x")
    orphan = root / "half" / shard_key(RESID_POST_MEAN, 2, 0)
    orphan.parent.mkdir(parents=True)
    shutil.copy(root / "whole" / shard_key(RESID_POST_MEAN, 2, 0), orphan)
    (root / "half" / "notes.txt").write_text("mine")
    whole = LocalFolder(root / "whole")
    with acquire(whole, timeout=60, say=print, after_epoch=require_manifest(whole).last_epoch):
        assert main(["store", "gc", str(root), "--yes"]) == 3
        captured = capsys.readouterr()
    assert "left alone" in captured.err
    assert not orphan.exists()
    assert not (root / "half" / ".tmp" / "half-written").exists()
    assert (root / "half" / "notes.txt").exists()
    assert (root / "whole" / ".tmp" / "half-written").exists()
    assert main(["store", "gc", str(root), "--yes", "--foreign"]) == 0
    assert not (root / "half" / "notes.txt").exists()
    assert data(root / "whole") == before
    assert "neither a run nor a store" in refused(capsys, 2, "gc", root / "nothing", "--yes")


def test_unknown_arguments_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "store show: unknown argument --fast" in refused(capsys, 2, "show", root / "whole", "--fast")


def test_urls_with_credentials_are_refused_without_repeating_them(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, 2, "show", "s3://AKIAKEY:verysecret@bucket/run")
    assert "the URL carries credentials" in message
    assert "verysecret" not in message
    assert "AKIAKEY" not in message

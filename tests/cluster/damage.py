"""Flips bits and deletes objects of a real run, and checks what `store verify` finds and `store repair` mends.

The table of docs/crashes.md comes from:

    python -m tests.cluster.damage --flips 100 --deletions 20

Damage comes in rounds of some objects each, every round on a fresh copy of the same run. A round is right when
`verify` names every damaged object and nothing else, and when `repair` leaves a run without problems whose data
equals the undamaged run's, byte for byte. Both copies of one document are never hit in the same round: what is kept
twice is lost if both copies are.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import require_manifest
from personaspace.store.scores import Score, commit_scores
from personaspace.store.verify import verify
from tests.models import tiny_checkpoint

CONFIG = """
model: {{id: {model}, dtype: float32}}
personas: {{only: [pirate, ghost, teacher], prompts: 3, max_questions: 10}}
generate: {{max_new_tokens: 8, batch_rows: 480}}
extract: {{micro_batch_tokens: 2048, window_rows: 64, reductions: [mean, turns]}}
store: {{root: {root}, run: whole, unit_rows: 8, layer_group: 2}}
analysis: {{permutations: 20}}
"""

CATEGORIES: dict[str, Callable[[str], bool]] = {
    "shard": lambda key: key.startswith("activations.zarr/resid_post_mean/c/"),
    "shard of spans": lambda key: key.startswith("activations.zarr/spans/resid_post_mean/c/"),
    "coordinate": lambda key: "/c/" in key and key.startswith("activations.zarr/") and "/resid" not in key,
    "zarr.json": lambda key: key.startswith("activations.zarr/") and key.endswith("zarr.json"),
    "record": lambda key: key.startswith("commits/"),
    "manifest": lambda key: key in ("run.json", "run.copy.json", "lease.json"),
    "rollouts": lambda key: key.startswith("rollouts/"),
    "plan": lambda key: key.startswith("plan/"),
    "scores": lambda key: key.startswith("scores/"),
    "fit": lambda key: key.startswith("space/"),
    "index": lambda key: key.startswith("index."),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What became of one round."""

    flipped: tuple[str, ...]
    deleted: tuple[str, ...]
    missed: tuple[str, ...]
    """Damaged objects that `verify` did not name."""
    false: tuple[str, ...]
    """What it named though it was sound."""
    left: tuple[str, ...]
    """Problems after the repair."""
    different: tuple[str, ...]
    """Data objects that differ from the undamaged run's after the repair."""

    @property
    def is_right(self) -> bool:
        return not (self.missed or self.false or self.left or self.different)


def build(folder: Path) -> Path:
    """A complete small run with scores and a fit; its folder."""
    config = folder / "damage.yaml"
    config.write_text(CONFIG.format(model=tiny_checkpoint(folder / "model"), root=folder / "runs"))
    command("run", str(config), check=True)
    run = LocalFolder(folder / "runs" / "whole")
    manifest = require_manifest(run)
    with acquire(run, timeout=60, say=print, after_epoch=manifest.last_epoch) as lease:
        for unit in range(manifest.layout.units):
            scores = [Score(row=row, score=float(row % 4)) for row in manifest.layout.unit_row_range(unit)]
            commit_scores(lease.fence, manifest.layout, "judge-1", unit, scores)
    return run.path


def command(*arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "personaspace", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=600,
    )
    if check and done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stdout}\n{done.stderr}")
    return done


def damage(whole: Path, target: Path, flips: int, deletions: int, draw: random.Random) -> Round:
    """One round on a fresh copy in ``target``."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    flipped, deleted = choose(target, flips, draw), []
    for key in flipped:
        data = bytearray((target / key).read_bytes())
        bit = draw.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << (bit % 8)
        (target / key).write_bytes(data)
    deleted = choose(target, deletions, draw, without={twin(key) for key in flipped} | set(flipped))
    for key in deleted:
        (target / key).unlink()

    named = {problem.key for problem in verify(LocalFolder(target)).problems}
    # One finding stands for both files of the index.
    hit = {"index.json" if key.startswith("index.") else key for key in (*flipped, *deleted)}
    done = command("store", "repair", str(target))
    left = [f"{problem.kind} {problem.key}" for problem in verify(LocalFolder(target)).problems]
    return Round(
        flipped=tuple(flipped),
        deleted=tuple(deleted),
        missed=tuple(sorted(hit - named)),
        false=tuple(sorted(named - hit)),
        left=tuple(left) if done.returncode == 0 else (*left, done.stdout[-2000:] + done.stderr[-2000:]),
        different=tuple(different(whole, target)),
    )


def choose(run: Path, count: int, draw: random.Random, without: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Random objects, every category as likely as the others; never both copies of one document."""
    keys = sorted(file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file())
    chosen: list[str] = []
    while len(chosen) < count:
        fits = draw.choice(list(CATEGORIES.values()))
        key = draw.choice([key for key in keys if fits(key) and (run / key).stat().st_size])
        if key not in without and key not in chosen and twin(key) not in chosen:
            chosen.append(key)
    return chosen


def twin(key: str) -> str:
    """The other copy of a document that is kept twice, or the other file of the index."""
    if key.startswith("index."):
        return "index.json" if key.endswith("parquet") else "index.parquet"
    stem, _, suffix = key.rpartition(".")
    return f"{stem.removesuffix('.copy')}.{suffix}" if stem.endswith(".copy") else f"{stem}.copy.{suffix}"


def different(whole: Path, repaired: Path) -> list[str]:
    """Keys of data that the repair left other than it was: everything but records, manifests, lease and fit."""
    kept = ("activations.zarr/", "rollouts/", "plan/", "scores/", "index.parquet")
    keys = [file.relative_to(whole).as_posix() for file in whole.rglob("*") if file.is_file()]
    return [
        key
        for key in sorted(keys)
        if key.startswith(kept)
        and (not (repaired / key).exists() or (whole / key).read_bytes() != (repaired / key).read_bytes())
    ]


def main() -> None:
    """Run the rounds and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--deletions", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = build(Path(scratch))
        assert not verify(LocalFolder(whole)).problems
        print("| round | flips | deletions | found | falsely reported | problems after repair | data identical |")
        print("|---|---|---|---|---|---|---|")
        for number in range(arguments.rounds):
            share = [
                count * (number + 1) // arguments.rounds - count * number // arguments.rounds
                for count in (arguments.flips, arguments.deletions)
            ]
            done = damage(whole, Path(scratch) / "runs" / "damaged", *share, draw)
            rounds.append(done)
            hit = len(done.flipped) + len(done.deleted)
            print(
                f"| {number + 1} | {len(done.flipped)} | {len(done.deleted)} | {hit - len(done.missed)} of {hit} | "
                f"{len(done.false)} | {len(done.left)} | {'yes' if not done.different else 'NO'} |",
                flush=True,
            )
            if not done.is_right:
                print(json.dumps(asdict(done), indent=1), flush=True)
    hits = [key for done in rounds for key in (*done.flipped, *done.deleted)]
    kinds = Counter(name for key in hits for name, fits in CATEGORIES.items() if fits(key))
    print(f"\nobjects hit: {', '.join(f'{count} {name}' for name, count in kinds.items())}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(done) for done in rounds], indent=1) + "\n")
    sys.exit(0 if all(done.is_right for done in rounds) else 1)


if __name__ == "__main__":
    main()

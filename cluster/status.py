"""How far a run is: read from the store alone, from any machine that can see it."""

import time
from pathlib import Path

import numpy as np

from personaspace.store import open_run
from personaspace.store.commit import ROLLOUTS, committed_slots
from personaspace.store.lease import Holder, read_holder
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import LocalFolder
from personaspace.store.schema import RESID_POST_MEAN, STATUS


def describe(run_folder: Path) -> str:
    """Lines for people: what is committed, what is missing, who writes. Raises InputError if there is no run."""
    folder = LocalFolder(run_folder)
    manifest = require_manifest(folder)
    layout = manifest.layout
    committed = committed_slots(folder)
    generated = sum(len(layout.unit_row_range(unit)) for array, unit, _ in committed if array == ROLLOUTS)
    shards = sum(array == RESID_POST_MEAN for array, _, _ in committed)
    status = open_run(run_folder)["status"].values
    ok, dropped = (int(np.sum(status == STATUS.index(name))) for name in ("ok", "dropped"))
    lines = [
        f"run        {run_folder}  (identity {manifest.identity_hash})",
        f"model      {manifest.identity['model']['name']}, {layout.layers} layers x {layout.hidden}",
        f"generated  {generated}/{layout.rows} rollouts",
        f"extracted  {ok + dropped}/{layout.rows} rollouts ({dropped} dropped)",
        f"shards     {shards}/{layout.units * layout.groups}",
        f"fitted     {'yes' if folder.exists('space/latest') else 'no'}",
        f"report     {run_folder / 'report.html' if folder.exists('report.html') else 'no'}",
        f"driver     {_driver(read_holder(folder))}",
        f"sessions   {len(manifest.sessions)}",
    ]
    return "\n".join(lines)


def _driver(holder: Holder | None) -> str:
    if holder is None:
        return "none yet"
    who = f"{holder.host} pid {holder.pid}, epoch {holder.epoch}"
    if holder.released:
        return f"none (last: {who})"
    ago = f"last sign of life {time.time() - holder.heartbeat:.0f} s ago"
    return f"{who}, {'gone' if holder.is_dead(float('inf')) else 'running'}, {ago}"

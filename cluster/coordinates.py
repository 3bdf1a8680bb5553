"""A unit's coordinates: written by the driver, last of all, once every layer of the unit is committed."""

from collections.abc import Mapping

import numpy as np

from personaspace.cluster.job import Job
from personaspace.store.commit import COORDINATES_RECORD, commit, read_records
from personaspace.store.layout import coordinate_key
from personaspace.store.lease import Fence
from personaspace.store.schema import COORDINATES, RESID_POST_MEAN, STATUS, encode_coordinate


def commit_coordinates(job: Job, fence: Fence, unit: int, tokens: Mapping[int, int]) -> tuple[int, int]:
    """Commit the coordinates of a unit whose shards all have records; returns its rows, and how many are dropped.

    ``tokens`` is the response length of each row. A row is dropped if any of its shards' records says so.
    """
    layout = job.layout
    planned = layout.unit_row_range(unit)
    dropped: dict[int, str] = {}
    for record in read_records(job.folder, RESID_POST_MEAN, unit).values():
        dropped.update(record.dropped)

    rows = [job.plan.rows[row] for row in planned]
    padding = [0] * (layout.unit_rows - len(rows))
    status = [STATUS.index("dropped" if row in dropped else "ok") for row in planned]
    columns = {
        "role": np.array([job.plan.roles[row.role_id].id for row in rows] + [""] * len(padding), dtype=object),
        "role_id": np.array([row.role_id for row in rows] + padding, dtype=np.int32),
        "prompt": np.array([row.prompt for row in rows] + padding, dtype=np.int32),
        "question": np.array([row.question for row in rows] + padding, dtype=np.int32),
        "sample": np.array([row.sample for row in rows] + padding, dtype=np.int32),
        "n_tokens": np.array([tokens[row] for row in planned] + padding, dtype=np.int32),
        "status": np.array(status + [STATUS.index("pad")] * len(padding), dtype=np.uint8),
    }
    commit(
        fence,
        (COORDINATES_RECORD, unit, 0),
        {coordinate_key(name, unit): encode_coordinate(columns[name], layout, name) for name in COORDINATES},
        rows=planned,
        dropped=dropped,
    )
    return len(rows), len(dropped)

"""What `store verify` and `store repair` say of a run."""

from personaspace.store.catalog import human_bytes
from personaspace.store.errors import IntegrityError
from personaspace.store.objects import Folder
from personaspace.store.plan import read_plan
from personaspace.store.verify import Verification


def describe_findings(folder: Folder, found: Verification) -> str:
    """What was found, line by line, whom it costs what, and what to do next."""
    lines = [f"{problem.kind:9s} {problem.key}: {problem.detail}" for problem in found.problems]
    lines.append(f"{found.objects} objects, {human_bytes(found.bytes)} checked: {len(found.problems)} problem(s)")
    if found.writing:
        lines.append("A driver is writing this run; what it has in hand was not judged.")
    rows = found.rows()
    if rows:
        lines.append(f"They cost {len(rows)} rollout(s): {_who(folder, found, rows)}")
    if found.harmful:
        lines.append(f"Next: personaspace store repair {folder.url}")
    elif found.problems:
        lines.append(f"No data is lost. Next: personaspace store gc {folder.url}")
    return "\n".join(lines)


def _who(folder: Folder, found: Verification, rows: list[int]) -> str:
    """Roles and ids of rows, as far as the plan can still be read."""
    try:
        plan = {row.row: row for row in read_plan(folder, found.manifest)}
    except IntegrityError:
        return f"rows {rows[0]} to {rows[-1]} of the rollout axis"
    roles = sorted({str(found.manifest.tables["roles"][plan[row].role_id]["id"]) for row in rows})
    shown = ", ".join(plan[row].rollout_id for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
    return f"{shown} (roles {', '.join(roles)})"

"""A report with everyday texts around a made space."""

from typing import Any

import xarray as xr

from personaspace.analysis.report.render import Completeness, DroppedRollout, Sample, render_report

QUESTION = "What should I do about a friend who never listens to my advice?"


def render(space: xr.Dataset, **changes: Any) -> str:
    """The report with everyday texts around the dataset."""
    answer = "Ah, 'tis a stubborn ear they have! \"Listen\", I'd say, and then say nothing at all for a while. " * 4
    samples = {"default": Sample(system_prompt="", question=QUESTION, response="Here are three steps.")}
    for role in space.role.values:
        samples[str(role)] = Sample(system_prompt=f"You are a {role}.", question=QUESTION, response=f"{answer} {role}")
    usual: dict[str, Any] = {
        "title": "Persona space of SmolLM2-135M-Instruct",
        "samples": samples,
        "provenance": [("Model", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("Identity hash", "sha256:" + "3b" * 32)],
        "dropped": [DroppedRollout(rollout_id="9f2c11aa", role="poet", question=QUESTION, reason="empty response")],
        "completeness": Completeness(rows_planned=492, rows_ok=491, rows_dropped=1, rows_pending=0),
    }
    return render_report(space, **(usual | changes))

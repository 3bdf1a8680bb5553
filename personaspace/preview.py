"""`personaspace preview`: some rollouts with the tokens marked that are averaged, on the terminal and as HTML."""

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.terminal_theme import MONOKAI
from rich.text import Text

from personaspace.cluster.job import plan_rollouts
from personaspace.config import RunConfig
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.personas import PersonaPlan, PlannedRollout
from personaspace.extract.preview import ShownToken, list_averages, show_tokens
from personaspace.extract.reductions import Readout, plan_arrays
from personaspace.extract.rollouts import AWAITED, awaited_rollout, imported_rollout
from personaspace.extract.scenarios import Script
from personaspace.store.errors import InputError
from personaspace.store.location import run_folder
from personaspace.store.manifest import read_manifest
from personaspace.store.plan import read_plan
from personaspace.store.rollouts import Rollout, read_rollouts, to_rollouts
from personaspace.store.schema import ArraySpec

HTML_WIDTH = 120
SHADES = {
    "response": ("on #1b5e20", "on #388e3c"),
    "think": ("on #7a5200", "on #a87000"),
    "earlier turn": ("on #0d3c61", "on #1b6299"),
    "last prompt token": ("on #6a1b9a", "on #6a1b9a"),
}
"""What a token is averaged into -> its background; two in turns, so that each token can be told from the next."""
OPENING, CLOSING = "⟦", "⟧"
"""Around what is averaged, where there are no colours."""


def preview(config: RunConfig, *, count: int, role: str | None, html: Path | None) -> None:
    """Print up to ``count`` rollouts, evenly spread over the plan (of one role, if given); also into ``html``.

    Shows what the run has stored where it has, else what the config imports, else prompts with no response yet.
    Raises InputError for an unknown role. Writes nothing but ``html``.
    """
    checkpoint = resolve(config.model)
    chat = ChatFormat(checkpoint, config.model)
    plan = plan_rollouts(config.personas, config.generate, checkpoint.name)
    arrays = plan_arrays(config.extract.sites, config.extract.reductions, config.extract.layers)
    rows = _choose(plan, role, count)
    stored = _stored(config, {row.rollout_id for row in rows})
    shown: list[tuple[Rollout, str, Script | None]] = []
    for row in rows:
        name = plan.roles[row.role_id].id
        rollout = stored.get(row.rollout_id)
        if rollout is None and row.response is not None:
            rollout = imported_rollout(row, name, chat=chat, max_positions=checkpoint.max_positions)
        elif rollout is None:
            rollout = awaited_rollout(row, name, chat=chat)
        shown.append((rollout, plan.questions[row.question].id, row.script))
    console = Console(highlight=False)
    _print(console, shown, arrays, chat)
    if html is not None:
        recorder = Console(
            file=io.StringIO(),
            record=True,
            width=HTML_WIDTH,
            highlight=False,
            force_terminal=True,
            color_system="truecolor",
        )
        _print(recorder, shown, arrays, chat)
        html.write_text(recorder.export_html(theme=MONOKAI), encoding="utf-8")
        console.print(f"preview: {html}", soft_wrap=True)


def _choose(plan: PersonaPlan, role: str | None, count: int) -> list[PlannedRollout]:
    rows = [row for row in plan.rows if role in (None, plan.roles[row.role_id].id)]
    if not rows:
        known = ", ".join(known.id for known in plan.roles)
        raise InputError(f"--role: {role!r} is not in this config. It has {known}.")
    step = max(1, len(rows) // count)
    return rows[::step][:count]


def _stored(config: RunConfig, ids: set[str]) -> dict[str, Rollout]:
    """Those of the rollouts that the run has already, by id."""
    folder = run_folder(config.store.root, config.store.run)
    manifest = read_manifest(folder)
    if manifest is None:
        return {}
    units = {row.row // manifest.layout.unit_rows for row in read_plan(folder, manifest) if row.rollout_id in ids}
    rollouts = to_rollouts(read_rollouts(folder, sorted(units)))
    return {rollout.rollout_id: rollout for rollout in rollouts if rollout.rollout_id in ids}


def _print(
    console: Console, shown: Sequence[tuple[Rollout, str, Script | None]], arrays: Sequence[ArraySpec], chat: ChatFormat
) -> None:
    legend = Text("averaged: ")
    if console.color_system is None:
        legend.append(f"all between {OPENING} and {CLOSING}")
    else:
        for name, (shade, _) in SHADES.items():
            legend.append(f" {name} ", style=shade).append(" ")
        legend.append("not averaged", style="dim")
    console.print(legend)
    names = ", ".join(spec.path for spec in arrays)
    console.print(f"arrays: {names}; chat template {chat.template_hash}", soft_wrap=True)
    readout = Readout.of_arrays(arrays)
    for rollout, question, script in shown:
        console.print(_panel(rollout, question, script, readout, chat, marked=console.color_system is None))


def _panel(
    rollout: Rollout, question: str, script: Script | None, readout: Readout, chat: ChatFormat, *, marked: bool
) -> Panel:
    averages = list_averages(readout, rollout.spans) if rollout.spans else []
    tokens = show_tokens(chat, [*rollout.prompt_token_ids, *rollout.response_token_ids], averages)
    body = Text()
    inside = False
    for place, token in enumerate(tokens):
        kind = _kind(token, response=place >= len(rollout.prompt_token_ids))
        if marked and (kind is not None) != inside:
            inside = kind is not None
            body.append(OPENING if inside else CLOSING)
        # Line breaks are tokens, too: it must be seen whether they are averaged.
        body.append(token.text.replace("\n", "⏎\n"), style="dim" if kind is None else SHADES[kind][place % 2])
    if inside:
        body.append(CLOSING)
    if rollout.finish_reason == AWAITED:
        body.append(" the response comes here; all of its tokens count ", style="italic")
        body.append(_to_come(script), style="dim")
    if rollout.dropped is not None:
        body.append(f"\ndropped: {rollout.dropped}", style="bold red")
    for average in averages:
        count = average.stop - average.start
        body.append(f"\n{average.name}: {count} tokens [{average.start}, {average.stop})", style="italic dim")
    return Panel(
        body,
        title=f"{rollout.role} · prompt {rollout.prompt} · {question} · sample {rollout.sample}",
        subtitle=rollout.finish_reason,
        title_align="left",
        subtitle_align="left",
    )


def _to_come(script: Script | None) -> str:
    """What else the user will say in a conversation that is not held yet."""
    if script is None:
        return ""
    told = [f"\nturn {number} of {script.turns}, user: {text}" for number, text in enumerate(script.said[1:], start=2)]
    return "".join(told) or f"\n{script.turns} turns; the user is played: {script.user}"


def _kind(token: ShownToken, *, response: bool) -> str | None:
    """What a token is shown as, a key of SHADES; None if it is in no average. ``response``: it belongs to it."""
    if not token.averages:
        return None
    if any(name.endswith(" think") for name in token.averages):
        return "think"
    if response:
        return "response"
    return "last prompt token" if token.averages == ("last_prompt",) else "earlier turn"

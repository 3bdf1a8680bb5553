"""The page of `personaspace chat`: the model as it is and capped, side by side, with a chart of where each turn lies.

A browser's conversation lives on the server, under the browser's cookie; every tab of it shows the same, and so does
the page after a reload.
"""

import hmac
from collections import OrderedDict
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from fastapi import FastAPI
from nicegui import app, events, ui

from personaspace.extract.scenarios import Scenario
from personaspace.steer.live.dialogue import SIDES, Dialogue, Record, Side, saved, transcript_file
from personaspace.steer.live.dials import CapTable
from personaspace.steer.live.gauge import Gauge
from personaspace.steer.live.talker import Talker
from personaspace.steer.live.turn_chart import COLOURS, FIRST_SIDE, NAMES, turn_chart
from personaspace.store.errors import PersonaspaceError

MOST_DIALOGUES = 200
"""That are kept; whose has not been looked at for longest goes first."""
LOOK_SECONDS = 0.15
"""Between two looks for something new to show."""
MOST_BYTES = 2_000_000
"""Of a conversation that is opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What the page is about."""

    talker: Talker
    gauge: Gauge
    caps: CapTable
    scenarios: tuple[Scenario, ...]
    """Stories whose turns can be said one after the other."""
    token: str | None = None
    """What a browser has to bring along, once, as `?token=`; None: nothing is asked."""
    max_tokens: int = 512
    """Of an answer."""


def add_page(api: FastAPI, room: Room, secret: str) -> None:
    """Put the page at `/` of the application; ``secret`` signs the browsers' cookies."""
    dialogues: OrderedDict[str, Dialogue] = OrderedDict()

    def dialogue_of(browser: str) -> Dialogue:
        if browser not in dialogues:
            dialogues[browser] = Dialogue(room.talker, room.gauge, room.caps, max_tokens=room.max_tokens)
        dialogues.move_to_end(browser)
        while len(dialogues) > MOST_DIALOGUES:
            _, oldest = dialogues.popitem(last=False)
            oldest.stop()
        return dialogues[browser]

    @ui.page("/", title=f"{room.talker.name}, capped and not")
    def show(token: str = "") -> None:
        known = app.storage.user
        if room.token is not None and not known.get("allowed"):
            known["allowed"] = hmac.compare_digest(token.encode(), room.token.encode())
            if not known["allowed"]:
                ui.label("This page asks for a token: open it as /?token=...")
                return
        _Page(room, dialogue_of(str(app.storage.browser["id"]))).build()

    ui.run_with(api, storage_secret=secret, show_welcome_message=False, dark=None, reconnect_timeout=10.0)


class _Slider(ui.slider):
    LOOPBACK = False  # An echo from the server would undo what was moved meanwhile.


class _Range(ui.range):
    LOOPBACK = False


class _Page:
    """One tab."""

    def __init__(self, room: Room, dialogue: Dialogue) -> None:
        self._room, self._dialogue = room, dialogue
        self._seen = -1
        self._drawn: list[Any] = []
        self._partial: dict[Side, ui.label] = {}
        """Labels of answers that are on their way."""
        self._filled: dict[Side, tuple[int, ...]] = {}
        self._story: Scenario | None = None

    def build(self) -> None:
        """All of it, and a timer that looks for what is new."""
        ui.add_css((resources.files("personaspace.steer.live") / "page.css").read_text(encoding="utf-8"))
        with ui.column().classes("w-full max-w-7xl mx-auto gap-3"):
            with ui.row().classes("w-full items-baseline justify-between"):
                ui.label(f"{self._room.talker.name}, as it is and capped").classes("text-xl font-medium")
                with ui.row().classes("gap-2"):
                    ui.button("New", on_click=self._restart).props("flat dense").mark("new")
                    ui.button("Save", on_click=self._save).props("flat dense").mark("save")
                    self._transcript_menu()
                    self._open_button()
            self._controls()
            self._plot = (
                ui.plotly(turn_chart(self._dialogue.record, self._room.gauge)).classes("w-full").style("height: 260px")
            )
            self._plot.on("plotly_click", self._clicked)
            with ui.row().classes("w-full sides"):
                self._columns = {side: self._column(side) for side in SIDES}
            self._composer()
        ui.timer(LOOK_SECONDS, self._look)

    def _controls(self) -> None:
        dials, layers = self._dialogue.dials, self._room.caps.layers
        with ui.row().classes("w-full items-center gap-6 dials"):
            with ui.column().classes("gap-0 grow"):
                self._strength = ui.label().classes("text-sm")
                _Slider(min=1, max=99, value=dials.percentile, on_change=self._turn_strength).mark("strength").props(
                    'aria-label="strength of the cap"'
                )
            with ui.column().classes("gap-0 grow"):
                self._where = ui.label().classes("text-sm")
                _Range(
                    min=layers[0],
                    max=layers[-1],
                    value={"min": dials.first, "max": dials.last},
                    on_change=self._turn_layers,
                ).mark("layers").props('aria-label="layers that are capped"')
            ui.button("Answer again with this cap", on_click=self._again).props("outline").mark("again")
        self._say_dials()

    def _composer(self) -> None:
        stories = {scenario.id: scenario.topic for scenario in self._room.scenarios}
        with ui.row().classes("w-full items-center gap-2 composer"):
            self._input = (
                ui.textarea(placeholder="Say something to both").props("autogrow rows=1 outlined dense").classes("grow")
            )
            self._input.on("keydown.enter.prevent", self._send).mark("input")
            ui.button("Send", on_click=self._send).mark("send")
            self._stop = ui.button("Stop", on_click=self._dialogue.stop).props("outline").mark("stop")
        with ui.row().classes("w-full items-center gap-2"):
            ui.select(stories, label="Story", on_change=self._choose_story, clearable=True).props(
                "dense outlined"
            ).classes("grow").mark("story")
            self._next = ui.button("Say its next turn", on_click=self._say_next).props("outline").mark("next")
            self._next.disable()

    def _column(self, side: Side) -> ui.column:
        with ui.column().classes("side gap-2"):
            ui.label(NAMES[side]).classes("text-base font-medium").style(f"color: {COLOURS[side]}")
            return ui.column().classes("w-full gap-2").mark(f"turns-{side}")

    def _transcript_menu(self) -> None:
        with ui.button("Transcript").props("flat dense").mark("transcript"), ui.menu():
            for side in SIDES:
                ui.menu_item(NAMES[side], on_click=lambda side=side: self._export(side))

    def _open_button(self) -> None:
        files = ui.upload(on_upload=self._open, auto_upload=True, max_file_size=MOST_BYTES).props("accept=.json")
        files.style("display: none")  # NiceGUI takes nothing from elements that it hides itself.
        # In the browser, since only a click there may ask for a file.
        choose = f"() => runMethod({files.id}, 'pickFiles', [])"
        ui.button("Open").props("flat dense").on("click", js_handler=choose).mark("open")

    def _look(self) -> None:
        """Show what has changed since the last look."""
        dialogue = self._dialogue
        if dialogue.version == self._seen:
            return
        self._seen = dialogue.version
        self._stop.set_visibility(dialogue.busy)
        for side in SIDES:
            self._fill(side)
        answers = [list(dialogue.record.answers[side]) for side in SIDES]
        if answers != self._drawn:
            self._drawn = answers
            self._plot.update_figure(turn_chart(self._dialogue.record, self._room.gauge))
        if dialogue.problem:
            ui.notify(dialogue.problem, type="negative")
            dialogue.problem = ""

    def _fill(self, side: Side) -> None:
        """The turns of one side. While an answer grows, nothing else is touched."""
        record, partial = self._dialogue.record, self._dialogue.partial
        filled = (id(record), len(record.said), len(record.answers[side]))
        if side in partial and side in self._partial and self._filled.get(side) == filled:
            self._partial[side].set_text(partial[side] + " …")
            return
        self._filled[side] = filled
        self._partial.pop(side, None)
        column = self._columns[side]
        column.clear()
        with column:
            for number, said in enumerate(record.said):
                ui.label(said).classes("said").props('dir="auto"')
                if number < len(record.answers[side]):
                    turn = record.answers[side][number]
                    with ui.column().classes("answer gap-0").props(f'id="turn-{side}-{number}"'):
                        ui.label(turn.text).classes("text").props('dir="auto"')
                        ui.label(self._place(turn.position, turn.finish_reason, turn.cap)).classes("place")
                elif side in partial:
                    self._partial[side] = ui.label(partial[side] + " …").classes("answer text partial")

    def _place(self, position: float | None, reason: str, cap: str) -> str:
        gauge = self._room.gauge
        words = []
        if position is not None:
            below = ", below the default range" if position < gauge.low else ""
            words.append(f"position {position:.2f}{below}")
        if cap:
            words.append(f"cap {cap}")
        if reason != "stop":
            words.append({"length": "cut off", "cancelled": "stopped"}[reason])
        return " · ".join(words)

    def _clicked(self, event: events.GenericEventArguments) -> None:
        """Show the turn of the point that was clicked."""
        [point, *_] = event.args.get("points") or [{}]
        number = point.get("curveNumber", 0) - FIRST_SIDE
        if 0 <= number < len(SIDES):
            name = f"turn-{SIDES[number]}-{int(point['x']) - 1}"
            ui.run_javascript(
                f"const turn = document.getElementById('{name}'); turn?.scrollIntoView({{block: 'center'}});"
                "document.querySelectorAll('.answer.marked').forEach(other => other.classList.remove('marked'));"
                "turn?.classList.add('marked');"
            )

    def _send(self) -> None:
        self._try(lambda: self._dialogue.say(self._input.value or ""), clear=True)

    def _say_next(self) -> None:
        if self._story is not None and len(self._dialogue.record.said) < len(self._story.turns):
            text = self._story.turns[len(self._dialogue.record.said)]
            self._try(lambda: self._dialogue.say(text))

    def _again(self) -> None:
        self._try(self._dialogue.again)

    def _try(self, work: Any, *, clear: bool = False) -> None:
        if self._dialogue.busy:
            return
        try:
            work()
        except PersonaspaceError as error:
            ui.notify(str(error), type="negative", multi_line=True)
            return
        if clear:
            self._input.value = ""

    def _choose_story(self, event: events.ValueChangeEventArguments[Any]) -> None:
        """A story begins a conversation of its own."""
        self._story = next((story for story in self._room.scenarios if story.id == event.value), None)
        self._next.set_enabled(self._story is not None)
        if self._story is not None:
            system = self._story.system.replace("{model_name}", self._room.talker.name)
            self._dialogue.restart(Record(system=system))

    def _restart(self) -> None:
        self._dialogue.restart()

    def _turn_strength(self, event: events.ValueChangeEventArguments[Any]) -> None:
        self._dialogue.dials = replace(self._dialogue.dials, percentile=float(event.value))
        self._say_dials()

    def _turn_layers(self, event: events.ValueChangeEventArguments[Any]) -> None:
        chosen = event.value
        self._dialogue.dials = replace(self._dialogue.dials, first=int(chosen["min"]), last=int(chosen["max"]))
        self._say_dials()

    def _say_dials(self) -> None:
        dials = self._dialogue.dials
        self._strength.set_text(f"Cap: leaves {dials.percentile:.0f}% of the run's rollouts alone (less is stronger)")
        self._where.set_text(f"Layers {dials.first} to {dials.last}")

    def _save(self) -> None:
        ui.download.content(saved(self._dialogue.record), "conversation.json", "application/json")

    def _export(self, side: Side) -> None:
        transcript = self._dialogue.record.transcript(side, self._room.talker.name)
        ui.download.content(transcript_file(transcript), f"transcript-{side}.json", "application/json")

    async def _open(self, event: events.UploadEventArguments) -> None:
        raw = await event.file.read()
        self._try(lambda: self._dialogue.restart(Record.from_json(raw)))
        event.sender.reset()  # type: ignore[attr-defined]

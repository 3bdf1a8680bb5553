"""When each stage of each replica computed and wrote: a trace that opens in Perfetto, and shares of time from it.

The format is Chrome's trace events (JSON): a process for each replica, a track for what each of its stages does.
"""

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from personaspace.cluster.events import Event, ReplicaLost, ReplicaStarted, Worked
from personaspace.cluster.watching.occupancy import Interval, Occupancy, occupancy

MOST_SLICES = 40_000
"""Above so many, neighbours on a track become one; 40,000 are about 6 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A stretch of work of one stage."""

    name: str
    start: float
    """Unix seconds."""
    stop: float
    busy: float
    """Seconds of it at work: all of it, unless neighbours were joined."""
    pieces: int = 1
    """Pieces of work that it is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A moment in the life of a replica."""

    name: str
    at: float
    """Unix seconds."""
    details: Mapping[str, Any]


ELLIPSIS = " ... "
COMPUTING = ("forward", "generate")
"""Activities that are what a replica is there for."""
Track = tuple[str, int, int, str]
"""Step, replica, stage, activity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """How a stage of a replica spent its time with one activity, from its first to its last piece of work."""

    step: str
    replica: int
    stage: int
    activity: str
    pieces: int
    seconds: float
    """At work."""
    busy: float
    """Share of the time."""
    intervals: tuple[Interval, ...]
    """Seconds since the timeline begins. Of pieces that were joined, as many seconds as they worked."""


class Timeline:
    """Collects what workers did. Another thread may ask."""

    def __init__(self, most_slices: int = MOST_SLICES) -> None:
        self._most = most_slices
        self._tracks: dict[Track, list[Slice]] = {}
        self._marks: list[tuple[str, int, Mark]] = []
        self._count = 0
        self._lock = threading.Lock()

    def report(self, event: Event, now: float) -> None:
        """Take in an event that came at ``now`` (Unix seconds)."""
        with self._lock:
            match event:
                case Worked():
                    for stage, busy in enumerate(event.busy):
                        self._add(
                            (event.step, event.replica, stage, busy.activity),
                            Slice(name=event.batch, start=busy.start, stop=busy.stop, busy=busy.stop - busy.start),
                        )
                case ReplicaStarted():
                    for stage, worker in enumerate(event.workers):
                        loading = Slice(name="load", start=now - worker.seconds, stop=now, busy=worker.seconds)
                        self._add((event.step, event.replica, stage, "load"), loading)
                    details = {"nodes": [w.node for w in event.workers], "pids": [w.pid for w in event.workers]}
                    self._marks.append((event.step, event.replica, Mark(name="ready", at=now, details=details)))
                case ReplicaLost():
                    details = {"reason": event.reason, "windows": event.windows, "rollouts": event.rollouts}
                    self._marks.append((event.step, event.replica, Mark(name="lost", at=now, details=details)))

    def _add(self, track: Track, piece: Slice) -> None:
        self._tracks.setdefault(track, []).append(piece)
        self._count += 1
        if self._count > self._most:
            self._tracks = {key: join_neighbours(slices) for key, slices in self._tracks.items()}
            self._count = sum(map(len, self._tracks.values()))

    def trace(self, title: str) -> bytes:
        """The trace as it stands."""
        with self._lock:
            tracks = {key: list(slices) for key, slices in self._tracks.items()}
            marks = list(self._marks)
        return encode_trace(title, tracks, marks)


def join_neighbours(slices: Sequence[Slice]) -> list[Slice]:
    """Half as many slices, each from two neighbours in time."""
    ordered = sorted(slices, key=lambda piece: piece.start)
    joined = [
        Slice(
            name=f"{first.name.split(ELLIPSIS)[0]}{ELLIPSIS}{second.name.split(ELLIPSIS)[-1]}",
            start=first.start,
            stop=max(first.stop, second.stop),
            busy=first.busy + second.busy,
            pieces=first.pieces + second.pieces,
        )
        for first, second in zip(ordered[::2], ordered[1::2], strict=False)
    ]
    return joined + ordered[2 * len(joined) :]


def encode_trace(title: str, tracks: Mapping[Track, Sequence[Slice]], marks: Iterable[tuple[str, int, Mark]]) -> bytes:
    """Chrome trace events, in microseconds since the first one."""
    marks = list(marks)
    begin = min(
        [piece.start for slices in tracks.values() for piece in slices] + [mark.at for *_, mark in marks], default=0
    )
    replicas = {(step, replica): 0 for step, replica, *_ in [*tracks, *marks]}
    processes = {replica: number for number, replica in enumerate(replicas, start=1)}
    events: list[dict[str, Any]] = []
    for (step, replica), process in processes.items():
        events.append(_named("process_name", process, 0, f"{step} replica {replica}"))
        events.append({"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}})
    threads: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for step, replica, stage, activity in sorted(tracks):
        threads.setdefault((step, replica), []).append((stage, activity))
    for (step, replica, stage, activity), slices in sorted(tracks.items()):
        process, thread = processes[step, replica], 1 + threads[step, replica].index((stage, activity))
        events.append(_named("thread_name", process, thread, f"stage {stage} {activity}"))
        events += [
            {
                "ph": "X",
                "pid": process,
                "tid": thread,
                "name": piece.name,
                "cat": activity,
                "ts": round((piece.start - begin) * 1e6, 1),
                "dur": round((piece.stop - piece.start) * 1e6, 1),
                "args": {"busy_seconds": round(piece.busy, 6), "pieces": piece.pieces, "stage": stage},
            }
            for piece in slices
        ]
    for step, replica, mark in marks:
        place = {"pid": processes[step, replica], "tid": 0, "ts": round((mark.at - begin) * 1e6, 1)}
        events.append({"ph": "i", "s": "p", "name": mark.name, "cat": "replica", "args": dict(mark.details), **place})
    document = {"displayTimeUnit": "ms", "otherData": {"title": title, "begin": begin}, "traceEvents": events}
    return json.dumps(document, separators=(",", ":")).encode()


def shares(trace: bytes) -> list[Share]:
    """How busy each stage of each replica was, by activity."""
    events = json.loads(trace)["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    tracks: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["args"]["stage"], event["cat"]), []).append(event)
    found = []
    for (process, stage, activity), pieces in tracks.items():
        step, _, replica = processes[process].split(" ")
        intervals = tuple(interval for piece in pieces for interval in _at_work(piece))
        span = max(stop for _, stop in intervals) - min(start for start, _ in intervals)
        busy = sum(piece["args"]["busy_seconds"] for piece in pieces)
        found.append(
            Share(
                step=step,
                replica=int(replica),
                stage=stage,
                activity=activity,
                pieces=sum(piece["args"]["pieces"] for piece in pieces),
                seconds=busy,
                busy=min(1.0, busy / span) if span > 0 else 1.0,
                intervals=intervals,
            )
        )
    return sorted(found, key=lambda share: (share.step != "generate", share.step, share.replica, share.stage))


def replica_occupancy(found: Iterable[Share]) -> dict[tuple[str, int], Occupancy]:
    """(Step, replica) -> how much of the time its stages did not compute, and why."""
    stages: dict[tuple[str, int], list[Sequence[Interval]]] = {}
    for share in found:
        if share.activity in COMPUTING:
            stages.setdefault((share.step, share.replica), []).append(share.intervals)
    return {replica: occupancy(intervals) for replica, intervals in stages.items()}


def describe_shares(found: Sequence[Share]) -> str:
    """A table of busy shares, and for each step what its stages did not compute: mean over replicas."""
    lines = ["step       replica  stage  activity   pieces    seconds   busy"]
    lines += [
        f"{s.step:10s} {s.replica:7d}  {s.stage:5d}  {s.activity:9s} {s.pieces:7d} {s.seconds:10.1f}  {s.busy:5.1%}"
        for s in found
    ]
    replicas = replica_occupancy(found)
    for step in dict.fromkeys(step for step, _ in replicas):
        own = [of for (name, _), of in replicas.items() if name == step]
        idle, bubble, imbalance = (fmean(getattr(of, name) for of in own) for name in ("idle", "bubble", "imbalance"))
        lines.append(f"{step}: stages idle {idle:.1%}: bubble {bubble:.1%}, uneven stages {imbalance:.1%}")
    return "\n".join(lines)


def _at_work(piece: Mapping[str, Any]) -> tuple[Interval, Interval]:
    # Joined pieces keep where they begin and end; what they were idle lies between.
    start, stop, half = piece["ts"] / 1e6, (piece["ts"] + piece["dur"]) / 1e6, piece["args"]["busy_seconds"] / 2
    return (start, start + half), (stop - half, stop)


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}

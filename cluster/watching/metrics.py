"""Ray metrics of a session, fed from its events in the driver; Ray's own Prometheus endpoint exports them."""

from ray.util.metrics import Counter, Gauge, Histogram

from personaspace.cluster.events import (
    Event,
    Progressed,
    Quarantined,
    ReplicaLost,
    StepStarted,
    Worked,
)
from personaspace.cluster.watching.tally import Tally

TAGS = ("run", "model", "step")
WRITE_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
"""Borders of the histogram of the time that a commit takes."""
EXPORTED = (
    "ray_personaspace_tokens_total",
    "ray_personaspace_rollouts_total",
    "ray_personaspace_rollouts_repeated_total",
    "ray_personaspace_rollouts_quarantined_total",
    "ray_personaspace_replicas_lost_total",
    "ray_personaspace_busy_seconds_total",
    "ray_personaspace_write_seconds",
    "ray_personaspace_rollouts_planned",
    "ray_personaspace_rollouts_committed",
    "ray_personaspace_rollouts_dropped",
    "ray_personaspace_replicas",
    "ray_personaspace_windows_waiting",
    "ray_personaspace_seconds_left",
)
"""Names under which Ray exports them: with its prefix, counters with `_total`, the histogram in three series."""


class Metrics:
    """The metrics of one session, by run, model and step. Needs a Ray cluster to be connected to."""

    def __init__(self, *, run: str, model: str) -> None:
        self._tags = {"run": run, "model": model}

        def counter(name: str, description: str, *tags: str) -> Counter:
            return Counter(f"personaspace_{name}", description=description, tag_keys=(*TAGS, *tags))

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(f"personaspace_{name}", description=description, tag_keys=TAGS)

        self._tokens = counter("tokens", "Tokens that went through the model.")
        self._rollouts = counter("rollouts", "Rollouts that went through the model.")
        self._repeated = counter("rollouts_repeated", "Rollouts that came through and were lost with their replica.")
        self._quarantined = counter("rollouts_quarantined", "Rollouts left out because they ended their worker.")
        self._lost = counter("replicas_lost", "Replicas that were lost, and started anew.", "reason")
        self._busy = counter("busy_seconds", "Seconds at work, of a stage of all replicas.", "stage", "activity")
        self._write = Histogram(
            "personaspace_write_seconds",
            description="Seconds that a stage takes to check, encode and store a window.",
            boundaries=WRITE_SECONDS,
            tag_keys=(*TAGS, "stage"),
        )
        self._planned = gauge("rollouts_planned", "Rollouts of the run.")
        self._committed = gauge("rollouts_committed", "Rollouts in the store.")
        self._dropped = gauge("rollouts_dropped", "Rollouts that can't be used.")
        self._replicas = gauge("replicas", "Replicas at work.")
        self._waiting = gauge("windows_waiting", "Windows that no replica has taken.")
        self._left = gauge("seconds_left", "Seconds until the step is done, at its pace so far.")

    def report(self, event: Event, tally: Tally) -> None:
        """Take in one event, which ``tally`` has counted."""
        if isinstance(event, StepStarted):
            self._tags["step"] = event.step
        if "step" not in self._tags:
            return
        tags = self._tags
        match event:
            case Progressed():
                _add(self._tokens, event.tokens, tags)
                _add(self._rollouts, event.rows, tags)
            case ReplicaLost():
                _add(self._lost, 1, {**tags, "reason": event.kind})
                _add(self._repeated, event.rollouts, tags)
            case Quarantined():
                _add(self._quarantined, len(event.rollouts), tags)
            case Worked():
                for stage, busy in enumerate(event.busy):
                    seconds = max(0.0, busy.stop - busy.start)
                    _add(self._busy, seconds, {**tags, "stage": str(stage), "activity": busy.activity})
                    if busy.activity == "commit":
                        self._write.observe(seconds, {**tags, "stage": str(stage)})
        if not isinstance(event, Progressed | Worked):
            self._report_state(tally)

    def _report_state(self, tally: Tally) -> None:
        # Not with every micro-batch: Ray's metrics cost more than the rest of the driver's work on one.
        now, tags = tally.step, self._tags
        self._planned.set(now.rows, tags)
        self._committed.set(now.committed, tags)
        self._dropped.set(now.dropped, tags)
        self._replicas.set(now.replicas, tags)
        self._waiting.set(now.windows_waiting, tags)
        if now.seconds_left is not None:
            self._left.set(now.seconds_left, tags)


def _add(counter: Counter, amount: float, tags: dict[str, str]) -> None:
    # Ray refuses to add nothing.
    if amount > 0:
        counter.inc(amount, tags)

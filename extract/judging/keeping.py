"""What a judging session keeps in the store: answers as they come, units when they are complete, and the ledger."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from personaspace.store.judging import (
    Answer,
    Ledger,
    Spending,
    drop_answers,
    read_answers,
    read_ledger,
    write_answers,
    write_ledger,
)
from personaspace.store.layout import Layout
from personaspace.store.lease import Fence
from personaspace.store.scores import Judgement, Score, commit_scores, read_judgements
from personaspace.store.sessions import Outcome, SessionProgress, StepProgress, write_session


class Keeper:
    """The store's side of a session. Its methods block, and are called one at a time."""

    def __init__(self, fence: Fence, layout: Layout, judge: str, about: Mapping[str, Any]) -> None:
        self._fence, self._layout, self._judge, self._about = fence, layout, judge, about
        self._judgements: dict[int, Judgement] = read_judgements(fence.folder, judge)
        self._ledger = read_ledger(fence.folder, judge) or Ledger(about=about)
        self._answers: dict[int, Answer] = {}
        """Row -> answer that is not committed."""
        self._unwritten: set[int] = set()
        """Rows of those that are in no part."""
        self._parts: dict[str, set[int]] = {}
        """Key of a part -> its rows that are not committed."""
        self._number = 0
        for key, answers in read_answers(fence.folder, judge).items():
            fresh = [answer for answer in answers if self._is_news(answer)]
            self._parts[key] = {answer.row for answer in fresh}
            self._answers |= {answer.row: answer for answer in fresh}
        self.recovered = len(self._answers)
        """Answers that an earlier session had and could not commit."""

    @property
    def spent_before(self) -> float:
        """USD that earlier sessions may have spent."""
        return self._ledger.usd(before=self._fence.epoch)

    @property
    def has_answers(self) -> bool:
        """Whether there is something that is not committed."""
        return bool(self._answers)

    def missing(self, rows: Sequence[int], *, again: bool) -> list[int]:
        """Rows without an answer; with ``again`` also those that the judge could not score."""
        return [row for row in rows if not self._has_score(row) and (again or not self._is_unjudged(row))]

    def take(self, answer: Answer) -> None:
        """Note an answer; `flush` or `commit` keeps it."""
        self._answers[answer.row] = answer
        self._unwritten.add(answer.row)

    def flush(self, spending: Spending) -> None:
        """Keep the answers since the last time, and what was spent."""
        rows = sorted(self._unwritten & self._answers.keys())
        if rows:
            key = write_answers(self._fence, self._judge, self._number, [self._answers[row] for row in rows])
            self._number += 1
            self._parts[key] = set(rows)
            self._unwritten.difference_update(rows)
        if self._ledger.sessions.get(self._fence.epoch) != spending:
            self._ledger = self._ledger.with_session(self._fence.epoch, spending)
            write_ledger(self._fence, self._judge, self._ledger)

    def commit(self, unit: int) -> None:
        """Commit a unit's answers together with what is recorded of it, and delete the parts that are used up."""
        rows = [row for row in self._layout.unit_row_range(unit) if row in self._answers]
        if not rows:
            return
        before = self._judgements.get(unit, Judgement())
        scores = dict(before.scores)
        unjudged = dict(before.unjudged)
        for row in rows:
            answer = self._answers[row]
            unjudged.pop(row, None)
            if answer.score is None:
                unjudged[row] = answer.reason or "no reason"
            else:
                scores[row] = Score(row=row, score=answer.score, reason=answer.reason)
        after = Judgement(scores=scores, unjudged=unjudged, about=self._about, generation=before.generation + 1)
        commit_scores(
            self._fence,
            self._layout,
            self._judge,
            unit,
            [scores[row] for row in sorted(scores)],
            unjudged=unjudged,
            about=self._about,
            generation=after.generation,
        )
        self._judgements[unit] = after
        for row in rows:
            del self._answers[row]
            self._unwritten.discard(row)
        for left in self._parts.values():
            left.difference_update(rows)
        used = [key for key, left in self._parts.items() if not left]
        drop_answers(self._fence, used)
        for key in used:
            del self._parts[key]

    def commit_all(self) -> None:
        """Commit every answer, also of units that are not complete."""
        for unit in sorted({row // self._layout.unit_rows for row in self._answers}):
            self.commit(unit)
        drop_answers(self._fence, [key for key, left in self._parts.items() if not left])

    def tell(self, step: StepProgress, outcome: Outcome, message: str = "") -> None:
        """Say how far the session is, for `personaspace status`."""
        self._fence.check()
        said = SessionProgress(
            epoch=self._fence.epoch, written=time.time(), outcome=outcome, message=message, steps=(step,)
        )
        write_session(self._fence.folder, said)

    def _judgement(self, row: int) -> Judgement:
        return self._judgements.get(row // self._layout.unit_rows, Judgement())

    def _is_news(self, answer: Answer) -> bool:
        """A crash may have come after the commit and before the part was deleted."""
        recorded = self._judgement(answer.row)
        return answer.row not in recorded.scores and (answer.score is not None or answer.row not in recorded.unjudged)

    def _has_score(self, row: int) -> bool:
        answer = self._answers.get(row)
        return row in self._judgement(row).scores or (answer is not None and answer.score is not None)

    def _is_unjudged(self, row: int) -> bool:
        answer = self._answers.get(row)
        return row in self._judgement(row).unjudged or (answer is not None and answer.score is None)

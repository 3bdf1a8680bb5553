"""Doses for the tests of table and page, built without a run."""

from personaspace.analysis.doses.measure import SPEAKERS, Dose, Said

EVIL = "<img src=x onerror=window.hacked=1></script><script>window.hacked=1</script>"


def some_doses(prompts: int = 12, doses: tuple[float, ...] = (-1.0, 0.0, 1.0), text: str = "") -> list[Dose]:
    """At dose -1 everybody else speaks, at 0 nobody says, at 1 the assistant; every fourth of -1 is broken."""

    def said(value: float, number: int) -> Said:
        speaker = "assistant" if value > 0 else "unsaid" if value == 0 else SPEAKERS[1 + number % 3]
        return Said(
            prompt=f"default/0/{number}/0",
            role="default" if number % 2 else "ghost",
            question=f"Question {number}?{text}",
            response=f"Answer {number} at {value:g}.{text}",
            category=speaker,
            coherent=value >= 0 or number % 4 > 0,
            whole=True,
        )

    steer = {"layers": [20], "positions": "all"}
    return [
        Dose(
            name=f"{value:g}",
            value=value,
            said=tuple(said(value, number) for number in range(prompts)),
            steer=steer if value else {},
        )
        for value in doses
    ]

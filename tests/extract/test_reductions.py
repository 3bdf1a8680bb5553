"""Reductions: which arrays a config asks for, and which tokens of a rollout go into each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.config import Site
from personaspace.extract.reductions import RAGGED, SITES, ArrayPlace, Readout, plan_arrays
from personaspace.store.errors import InputError
from personaspace.store.rollouts import Span
from personaspace.store.schema import ArraySpec

SPANS = [
    Span(turn=0, part="whole", start=3, stop=7),
    Span(turn=0, part="answer", start=3, stop=7),
    Span(turn=1, part="whole", start=10, stop=20),
    Span(turn=1, part="think", start=11, stop=14),
    Span(turn=1, part="answer", start=16, stop=20),
]
"""Two turns, of which the second one thinks."""
SITE_NAMES = st.lists(st.sampled_from(sorted(SITES)), min_size=1, unique=True)
NAMES = ("mean", "last_prompt", "first_1", "first_8", "turns", "parts")
REDUCTIONS = st.lists(st.sampled_from(NAMES), min_size=1, unique=True)


def described(specs: tuple[ArraySpec, ...]) -> dict[str, str]:
    return {spec.path: spec.description for spec in specs}


def test_arrays_of_each_reduction() -> None:
    specs = plan_arrays(["resid_post"], ["mean", "last_prompt", "first_8", "turns"], (1, 3))
    assert described(specs) == {
        "resid_post_mean": "Mean over the response tokens of the residual stream after each block",
        "resid_post_last_prompt": "Last token of the prompt of the residual stream after each block",
        "resid_post_first_8": (
            "Mean over the first 8 response tokens (all, if there are fewer) of the residual stream after each block"
        ),
        "spans/resid_post_mean": "Mean over the tokens of each span of the residual stream after each block",
    }
    assert {spec.layers for spec in specs} == {(1, 3)}
    assert [spec.spans for spec in specs] == [(), (), (), ("whole",)]


def test_arrays_of_each_site() -> None:
    assert described(plan_arrays(tuple(SITES), ["mean"], None)) == {
        f"{site}_mean": f"Mean over the response tokens of {description}" for site, description in SITES.items()
    }


@pytest.mark.parametrize(
    ("reductions", "parts"),
    [
        (["turns"], ("whole",)),
        (["parts"], ("think", "answer")),
        (["turns", "parts"], ("whole", "think", "answer")),
        (["parts", "mean", "turns"], ("whole", "think", "answer")),
        (["mean"], None),
    ],
)
def test_turns_and_parts_share_one_array(reductions: list[str], parts: tuple[str, ...] | None) -> None:
    spans = [spec.spans for spec in plan_arrays(["mlp_out"], reductions, None) if spec.spans]
    assert spans == ([] if parts is None else [parts])


ALLOWED = "allowed are `mean`, `last_prompt`, `first_K` (such as `first_8`), `turns` and `parts`."


@pytest.mark.parametrize(
    ("sites", "reductions", "message"),
    [
        (["resid_post"], ["median"], f"extract.reductions: 'median'; {ALLOWED}"),
        (["resid_post"], ["mean", "first_0"], f"extract.reductions: 'first_0'; {ALLOWED}"),
        (["resid_post"], ["first_"], f"extract.reductions: 'first_'; {ALLOWED}"),
        (["resid_post"], ["first_08"], f"extract.reductions: 'first_08'; {ALLOWED}"),
        (["resid_post"], ["first_8 "], f"extract.reductions: 'first_8 '; {ALLOWED}"),
        (["resid_post"], [], "extract.reductions: []; give at least one, and each once."),
        (["resid_post"], ["mean", "mean"], "extract.reductions: ['mean', 'mean']; give at least one, and each once."),
        ([], ["mean"], "extract.sites: []; give at least one, and each once."),
        (
            ["mlp_out", "mlp_out"],
            ["mean"],
            "extract.sites: ['mlp_out', 'mlp_out']; give at least one, and each once.",
        ),
        (["resid"], ["mean"], "extract.sites: 'resid'; allowed are resid_post, resid_pre, attn_out, mlp_out."),
    ],
)
def test_names_that_are_refused(sites: list[Site], reductions: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        plan_arrays(sites, reductions, None)
    assert str(error.value) == message


def test_segments() -> None:
    readout = Readout.of_arrays(plan_arrays(["resid_post"], NAMES, None))
    assert readout.reductions == ("mean", "last_prompt", "first_1", "first_8")
    assert readout.segments(SPANS) == (
        (10, 20),
        (9, 10),
        (10, 11),
        (10, 18),
        *((span.start, span.stop) for span in SPANS),
    )


def test_first_tokens_of_a_shorter_response() -> None:
    readout = Readout(sites=("resid_post",), reductions=("first_8",), parts=())
    assert readout.segments([Span(turn=0, part="whole", start=5, stop=8)]) == ((5, 8),)


@pytest.mark.parametrize(
    ("parts", "rows"),
    [(("whole",), [0, 2]), (("think", "answer"), [1, 3, 4]), (("whole", "think", "answer"), [0, 1, 2, 3, 4]), ((), [])],
)
def test_spans_with_a_row_of_their_own(parts: tuple[str, ...], rows: list[int]) -> None:
    readout = Readout(sites=("resid_post",), reductions=("mean",), parts=parts)
    assert readout.spans(SPANS) == tuple(SPANS[row] for row in rows)
    assert readout.segments(SPANS) == ((10, 20), *((SPANS[row].start, SPANS[row].stop) for row in rows))


@given(SITE_NAMES, REDUCTIONS)
def test_readout_is_what_the_arrays_need(sites: list[Site], reductions: list[str]) -> None:
    specs = plan_arrays(sites, reductions, None)
    readout = Readout.of_arrays(specs)
    assert readout.sites == tuple(sites)
    assert readout.reductions == tuple(name for name in reductions if name not in RAGGED)
    assert readout.parts == tuple(part for name in RAGGED if name in reductions for part in RAGGED[name])


@given(SITE_NAMES, REDUCTIONS, st.data())
def test_each_array_has_its_place_among_the_sums(sites: list[Site], reductions: list[str], data: st.DataObject) -> None:
    specs = plan_arrays(sites, reductions, None)
    # A run's arrays come in any order, and a stage may be asked for some of them.
    asked = data.draw(st.lists(st.sampled_from(specs), min_size=1, unique_by=lambda spec: spec.path))
    readout = Readout.of_arrays(asked)
    segments = readout.segments(SPANS)
    for place in readout.places(asked):
        assert isinstance(place, ArrayPlace)
        site = readout.sites[place.site]
        assert place.spec.name.startswith(f"{site}_")
        found = segments[place.segments]
        if place.spec.spans:
            assert found == tuple((span.start, span.stop) for span in SPANS if span.part in place.spec.spans)
        else:
            reduction = place.spec.name.removeprefix(f"{site}_")
            assert found == Readout(sites=(site,), reductions=(reduction,), parts=()).segments(SPANS)
    assert [place.spec for place in readout.places(asked)] == asked


def test_array_that_was_not_extracted_here() -> None:
    spec = ArraySpec(name="steering_mean", description="")
    message = (
        "array steering_mean: no site of resid_post, resid_pre, attn_out, mlp_out in its name; "
        "it was not extracted here."
    )
    for read in (lambda: Readout.of_arrays([spec]), lambda: SOME.places([spec])):
        with pytest.raises(InputError) as error:
            read()
        assert str(error.value) == message


SOME = Readout(sites=("resid_post",), reductions=("mean",), parts=())

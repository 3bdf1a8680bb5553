"""What servers say of themselves. The rest is met by tests/extract/generate and tests/extract/judging."""

import pytest

from personaspace.extract.endpoint import same_model


@pytest.mark.parametrize(
    ("asked", "answered", "same"),
    [
        ("gpt-4.1-mini", "gpt-4.1-mini", True),
        ("gpt-4.1-mini", "gpt-4.1-mini-2025-04-14", True),
        ("gpt-4.1-mini", "openai/gpt-4.1-mini", True),
        ("Qwen/Qwen3-8B", "Qwen3-8B", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct@main", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4.1", "gpt-4.1-mini-2025-04-14", False),
        ("gpt-4o-mini", "gpt-4o", False),
        ("judge", "another", False),
        ("judge", "None", False),
    ],
)
def test_which_model_answered(asked: str, answered: str, same: bool) -> None:
    assert same_model(asked, answered) is same

"""Tiny checkpoints shared by the tests of extract/; they are read only."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ModelConfig
from tests.models import CHATML, tiny_checkpoint

# The first example of a test pays for loading a tokenizer or a model class.
settings.register_profile("extract", deadline=None)
settings.load_profile("extract")


@pytest.fixture(autouse=True, scope="session")
def _light() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path_factory.mktemp("llama")))))


@pytest.fixture(scope="session")
def chat_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ChatFormat]:
    """``chat_with(template, **config)``: the chat format of a tiny model whose tokenizer has that template."""
    checkpoints: dict[str | None, Checkpoint] = {}

    def build(template: str | None = CHATML, **config: str) -> ChatFormat:
        if template not in checkpoints:
            folder: Path = tiny_checkpoint(tmp_path_factory.mktemp("chat"), layers=1, hidden=8, chat_template=template)
            checkpoints[template] = resolve(ModelConfig(id=str(folder)))
        checkpoint = checkpoints[template]
        return ChatFormat(checkpoint, ModelConfig(id=checkpoint.source, **config))

    return build

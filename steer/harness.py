"""lm-evaluation-harness with a changed model: what capping or steering costs in capability.

Imported, it registers the model `personaspace` with the harness: a Hugging Face model that runs with interventions.

    lm_eval's own:  model="hf", model_args="pretrained=MODEL"
    ours:           model="personaspace", model_args="pretrained=MODEL,steer_source=runs/demo,steer_percentile=25"
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pydantic import TypeAdapter, ValidationError

from personaspace.steer.config import SteerConfig
from personaspace.steer.interventions import steered
from personaspace.steer.sources import resolve_interventions
from personaspace.store.errors import InputError

PREFIX = "steer_"
"""Of the settings of `steer` among model_args."""


@register_model("personaspace")
class SteeredLM(HFLM):
    """The harness's own model of transformers; what it runs is changed as the `steer_...` arguments say.

    All other arguments are HFLM's. Without `steer_source` it is HFLM. Raises InputError for settings that can't be.
    """

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        asked = {name.removeprefix(PREFIX): arguments.pop(name) for name in list(arguments) if name.startswith(PREFIX)}
        interventions = resolve_interventions(_steer_config(asked))
        if any(intervention.positions == "response" for intervention in interventions):
            raise InputError("steer_positions: response; most tasks score texts without generating. Use all.")
        super().__init__(pretrained, **arguments)
        self._steering = ExitStack()
        self._steering.enter_context(steered(self.model, interventions))

    def release(self) -> None:
        """Give the model back as it was."""
        self._steering.close()


def compare_capability(
    model: Any, tokenizer: Any, steer: SteerConfig, tasks: Sequence[str], **settings: Any
) -> dict[str, dict[str, Any]]:
    """Results by `plain` and `steered`: task -> metric -> value, as `lm_eval.simple_evaluate` gives them.

    ``settings`` are that function's; ``include_path`` is where further tasks lie.
    """
    manager = TaskManager(include_path=settings.pop("include_path", None))
    batch_size = settings.pop("batch_size", 1)
    found: dict[str, dict[str, Any]] = {}
    for name, arguments in (("plain", {}), ("steered", _arguments(steer))):
        lm = SteeredLM(model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device), **arguments)
        try:
            results = lm_eval.simple_evaluate(
                lm, tasks=list(tasks), task_manager=manager, log_samples=False, **settings
            )
        finally:
            lm.release()
        assert results is not None  # Only ranks other than the first get none.
        found[name] = dict(results["results"])
    return found


def check_tasks(tasks: Sequence[str], include_path: Path | None) -> None:
    """Raise InputError for tasks that the harness does not know, before a model is loaded."""
    known = TaskManager(include_path=None if include_path is None else str(include_path)).match_tasks(list(tasks))
    missing = [task for task in tasks if not known or (task not in known and "*" not in task)]
    if missing:
        raise InputError(
            f"--tasks: {missing[0]} is no task of the harness (`lm-eval ls tasks` lists them), nor in --include-path."
        )


def _arguments(steer: SteerConfig) -> dict[str, Any]:
    return {f"{PREFIX}{name}": value for name, value in TypeAdapter(SteerConfig).dump_python(steer).items()}


def _steer_config(asked: Mapping[str, Any]) -> SteerConfig:
    """From model_args, where every value may be a text."""
    unknown = asked.keys() - SteerConfig.__dataclass_fields__.keys()
    if unknown:
        raise InputError(
            f"{PREFIX}{min(unknown)}: unknown; there are "
            f"{', '.join(PREFIX + name for name in SteerConfig.__dataclass_fields__)}."
        )
    given = {name: str(value) if name == "layers" and value is not None else value for name, value in asked.items()}
    try:
        return TypeAdapter(SteerConfig).validate_python(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(f"{PREFIX}{problem['loc'][0]}: {problem['msg']}, not {problem['input']!r}.") from error

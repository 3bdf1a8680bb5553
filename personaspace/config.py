"""The whole config: composes the parts that the folders define; loaded from YAML, overridden by flags.

Flag beats YAML beats default. Everything is checked before any work: an unknown key, a wrong type or a value
out of range is refused with the key, the value and what is allowed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from personaspace.analysis.config import AnalysisConfig
from personaspace.cluster.config import ClusterConfig
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.extract.judging.config import JudgeConfig
from personaspace.steer.config import SteerConfig
from personaspace.store.config import StoreConfig
from personaspace.store.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run, from the model to the report."""

    model: ModelConfig
    personas: PersonasConfig = field(default_factory=PersonasConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    steer: SteerConfig = field(default_factory=SteerConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def load_config(file: Path, flags: Sequence[str] = (), *, prog: str = "personaspace run CONFIG") -> RunConfig:
    """Read ``file`` and apply ``flags`` (``--store.run NAME``).

    Raises InputError naming key, value and what is allowed.
    """
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {file}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {file}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"config {file}: holds {type(document).__name__}; expected sections such as `model:`.")
    return _with_flags(_check(document, str(file)), flags, prog)


def stored_config(execution: Mapping[str, Any], where: str, flags: Sequence[str], *, prog: str) -> RunConfig:
    """The config with which a run was last carried out, with ``flags`` applied.

    Raises InputError for a run that was imported and has none.
    """
    if "config" not in execution:
        raise InputError(
            f"{where}: was imported, so nothing of it can be computed here. Import it again from its source."
        )
    return _with_flags(_check(execution["config"], where), flags, prog)


def with_judge_flags(config: JudgeConfig, flags: Sequence[str], *, prog: str) -> JudgeConfig:
    """The judge's section with ``flags`` (``--model NAME``) applied. Raises InputError as for a whole config."""
    if not flags:
        return config
    changed = tyro.cli(JudgeConfig, prog=prog, default=config, args=list(flags))
    return _check(asdict(RunConfig(model=ModelConfig(id="-"), judge=changed)), "the command line").judge


def with_steer_flags(config: SteerConfig, flags: Sequence[str], *, prog: str) -> SteerConfig:
    """The section `steer` with ``flags`` (``--percentile 50``) applied. Raises InputError as for a whole config."""
    if not flags:
        return config
    changed = tyro.cli(SteerConfig, prog=prog, default=config, args=list(flags))
    return _check(asdict(RunConfig(model=ModelConfig(id="-"), steer=changed)), "the command line").steer


def print_flags(prog: str) -> None:
    """Print the help text of all flags, with the defaults of a config that only names a model; does not return."""
    tyro.cli(
        RunConfig, prog=prog, default=RunConfig(model=ModelConfig(id="HUGGING_FACE_ID_OR_FOLDER")), args=["--help"]
    )


def _with_flags(config: RunConfig, flags: Sequence[str], prog: str) -> RunConfig:
    if not flags:
        return config
    changed = tyro.cli(RunConfig, prog=prog, default=config, args=list(flags))
    return _check(asdict(changed), "the command line")


def _check(document: dict[str, Any], where: str) -> RunConfig:
    try:
        text = json.dumps(document)
    except TypeError as error:
        raise InputError(f"{where}: {error}; use plain YAML values.") from error
    try:
        return _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(dict(problem))}" for problem in error.errors(include_url=False))
        raise InputError(f"{where}: not a usable config:\n{problems}") from error


def _explain(problem: dict[str, Any]) -> str:
    """One line per problem: key, value, what is allowed."""
    *parents, key = problem["loc"] or ("config",)
    name = ".".join(str(part) for part in (*parents, key))
    if problem["type"] == "unexpected_keyword_argument":
        section: Any = RunConfig
        for parent in parents:
            section = next((f.type for f in fields(section) if f.name == parent), section)
        allowed = ", ".join(f.name for f in fields(section)) if is_dataclass(section) else ""
        return f"{name}: unknown key (value {problem['input']!r}). Allowed here: {allowed}."
    if problem["type"] == "missing":
        return f"{name}: is missing and has no default."
    return f"{name}: {problem['msg']}, not {problem['input']!r}."


def _strict(section: type) -> None:
    """Make pydantic refuse unknown keys in this dataclass and in those it is composed of."""
    section.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    for part in fields(section):
        if isinstance(part.type, type) and is_dataclass(part.type):
            _strict(part.type)


_strict(RunConfig)
_ADAPTER = TypeAdapter(RunConfig)

"""The config: strict, explained, and overridable by flags."""

from pathlib import Path

import pytest

from personaspace.config import RunConfig, load_config
from personaspace.store.errors import InputError


def load(tmp_path: Path, text: str, *flags: str) -> RunConfig:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_config(file, flags)


def test_flag_beats_yaml_beats_default(tmp_path: Path) -> None:
    text = "model: {id: m}\ngenerate: {seed: 1, top_p: 0.5}\n"
    config = load(tmp_path, text, "--generate.seed", "2", "--personas.only", "ghost", "pirate")
    assert config.generate.seed == 2
    assert config.generate.top_p == 0.5
    assert config.generate.temperature == 0.7
    assert config.personas.only == ("ghost", "pirate")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {id: m}\nextracts: {}\n",
            "extracts: unknown key (value {}). Allowed here: model, personas,",
        ),
        ("model: {id: m, dtyp: x}\n", "model.dtyp: unknown key (value 'x'). Allowed here: id, revision, dtype,"),
        (
            "model: {id: m, dtype: int8}\n",
            "model.dtype: Input should be 'auto', 'bfloat16', 'float16' or 'float32', not",
        ),
        ("model: {id: m}\ngenerate: {seed: '1'}\n", "generate.seed: Input should be a valid integer, not '1'."),
        (
            "model: {id: m}\ngenerate: {top_p: 1.5}\n",
            "top_p: Input should be less than or equal to 1, not 1.5.",
        ),
        ("model: {id: m}\nstore: {unit_rows: 0}\n", "unit_rows: Input should be greater than or equal to 1, not 0."),
        ("store: {run: r}\n", "model: is missing and has no default."),
        ("- 1\n", "holds list; expected sections such as `model:`."),
        ("model: [\n", "not valid YAML:"),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        load(tmp_path, text)
    assert message in str(refused.value)


def test_flags_are_checked_like_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the command line: .*\n.*analysis.components: Input should be greater"):
        load(tmp_path, "model: {id: m}\n", "--analysis.components", "1")


def test_missing_file() -> None:
    with pytest.raises(InputError, match=r"config nope\.yaml: cannot be read: No such file or directory\."):
        load_config(Path("nope.yaml"))


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda f: f.name
)
def test_shipped_configs_load(file: Path) -> None:
    load_config(file)

"""The text of a new config: what the checkpoint says of itself, and what the plan makes of it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from transformers.utils import logging as transformers_logging

from personaspace.config import RunConfig
from personaspace.extract.anatomy import check_supported
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import DtypeChoice, GenerateConfig, ModelConfig
from personaspace.extract.counting import count_shape, read_config
from personaspace.extract.shape import BYTES_OF
from personaspace.extract.template_facts import TemplateFacts, examine_template
from personaspace.planning import sketch_plan
from personaspace.store.config import StoreConfig

LONGEST = 512
"""New tokens, as in the paper."""

CONFIG = Template("""\
# $name: $parameters billion parameters, $layers layers x $hidden. Written by `personaspace new`.
#   personaspace plan $file
#   personaspace run $file
#   ray job submit --address http://HEAD:8265 --working-dir . -- python -m personaspace run $file

model:
  id: $id
$model
personas:
  prompts: 5
  pairing: cross         # every prompt with every question

generate:
  max_new_tokens: $longest
  temperature: 0.7
  top_p: 0.9

store:
  root: $root
  run: $run

analysis:
  target_layer: $target       # the middle, as in the paper; the report shows all layers

cluster:                 # planned for $machines
  sharding: $sharding
  stages: $stages              # of $fullest GiB at most; replicas are as many as there is room for
""")


def draft_config(flags: argparse.Namespace, run: str, file: Path) -> tuple[str, Sequence[str]]:
    """The config's text, and what the plan warns of.

    Raises InputError where model or machines are not found, UnsupportedModelError where the model can't be read.
    """
    transformers_logging.set_verbosity_error()
    folder = Path(flags.target).expanduser()
    source = str(folder.resolve()) if folder.is_dir() else flags.target
    model = ModelConfig(id=source, revision=flags.revision, trust_remote_code=flags.trust_remote_code)
    checkpoint = resolve(model, hashed=False)
    check_supported(checkpoint)
    config = read_config(model)
    shape = count_shape(config, checkpoint.name, trust_remote_code=flags.trust_remote_code)
    facts = examine_template(checkpoint, model)
    dtype = _dtype(config)
    longest = LONGEST if checkpoint.max_positions is None else min(LONGEST, max(1, checkpoint.max_positions // 2))
    on_cluster = flags.nodes is not None or flags.gpus_per_node is not None
    draft = RunConfig(
        model=ModelConfig(id=source, revision=checkpoint.revision, dtype=dtype),
        generate=GenerateConfig(max_new_tokens=longest),
        store=StoreConfig(root="runs", run=run),
    )
    plan = sketch_plan(draft, shape, flags)
    extraction = plan.extraction
    assert extraction is not None  # The draft does not capture.
    text = CONFIG.substitute(
        name=checkpoint.name,
        parameters=f"{shape.parameters / 1e9:.3g}",
        layers=shape.layers,
        hidden=shape.hidden,
        file=file,
        id=json.dumps(source),
        model=_model_lines(checkpoint, facts, dtype, config, flags.trust_remote_code),
        longest=longest,
        root="/shared/personaspace  # absolute, on every node; or s3://BUCKET/PATH" if on_cluster else "runs",
        run=json.dumps(run),
        target=shape.layers // 2,
        machines=plan.machines.describe(),
        stages=len(extraction.stages),
        fullest=f"{max(stage.need.total for stage in extraction.stages) / 2**30:.1f}",
        sharding=extraction.sharding,
    )
    return text, plan.warnings


def _model_lines(
    checkpoint: Checkpoint, facts: TemplateFacts, dtype: DtypeChoice, config: Any, trust_remote_code: bool
) -> str:
    lines = []
    if checkpoint.revision is not None:
        lines.append(f"  revision: {checkpoint.revision}")
    lines.append(
        "  dtype: auto            # bfloat16, as the checkpoint has it, where machines compute in it; else float32"
        if dtype == "auto"
        else f"  dtype: {dtype}        # as the checkpoint has it"
    )
    if getattr(config, "quantization_config", None) is not None:
        lines.append("  # Quantised: transformers loads it by the quantization_config in the checkpoint.")
    if facts.choice == "plain":
        lines.append("  chat_template: plain   # User: and Assistant: lines, since the tokenizer has no template")
    else:
        how = "system prompts open the first user turn" if facts.folds_system else "takes a system message"
        also = "; blanks around messages are stripped" if facts.trims else ""
        lines.append(f"  chat_template: builtin # {how}{also}")
    if facts.thinking_switch:
        lines.append(
            "  thinking: false        # true: it reasons first; then raise max_new_tokens, and read `parts`, too"
        )
    if trust_remote_code:
        lines.append("  trust_remote_code: true")
    return "".join(f"{line}\n" for line in lines)


def _dtype(config: Any) -> DtypeChoice:
    """The checkpoint's own precision, where a run can have it; bfloat16 only where machines compute in it."""
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    name = str(stated).removeprefix("torch.")
    return next((known for known in BYTES_OF if known == name and known != "bfloat16"), "auto")

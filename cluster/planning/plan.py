"""`personaspace plan`: what a run would take, from the model's shape, its work and the machines. Pure functions."""

from dataclasses import dataclass, replace

from personaspace.cluster.planning.advice import advise
from personaspace.cluster.planning.costs import Asked
from personaspace.cluster.planning.extraction import ExtractionPlan, Setting, plan_extraction
from personaspace.cluster.planning.fitting import fuses_attention
from personaspace.cluster.planning.generation import GenerationPlan, plan_generation
from personaspace.cluster.planning.machines import Machines, Rates
from personaspace.cluster.planning.workload import Workload, count_work
from personaspace.extract.config import Dtype, ExtractConfig, GenerateConfig, ModelConfig
from personaspace.extract.personas import PersonaPlan
from personaspace.extract.shape import ModelShape
from personaspace.store.config import StoreConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a run would take."""

    shape: ModelShape
    dtype: Dtype
    machines: Machines
    rates: Rates
    work: Workload
    generation: GenerationPlan | None
    """None where responses are imported."""
    extraction: ExtractionPlan | None
    """None where activations are captured while generating, which takes no second pass."""
    warnings: tuple[str, ...]
    """What does not fit or wastes, each with the nearest way out."""

    @property
    def flop(self) -> float:
        """Of generating and extracting."""
        generated = self.generation.prefill_flop + self.generation.decode_flop if self.generation else 0.0
        return generated + (self.extraction.flop if self.extraction else 0.0)

    @property
    def hours(self) -> float:
        """Of generating, then extracting; fit and report are minutes and not counted."""
        return sum(step.seconds for step in (self.generation, self.extraction) if step) / 3600

    @property
    def device_hours(self) -> float:
        """Hours of all devices, used or not."""
        return self.hours * self.machines.devices


def plan_run(
    shape: ModelShape,
    personas: PersonaPlan,
    *,
    model: ModelConfig,
    generate: GenerateConfig,
    extract: ExtractConfig,
    store: StoreConfig,
    machines: Machines,
    rates: Rates,
    asked: Asked,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
) -> RunPlan:
    """Plan a run. Means of prompts and responses, in tokens, are estimated where not given.

    Raises InputError for sites or reductions that don't exist.
    """
    work = count_work(
        personas,
        shape,
        generate,
        extract,
        store,
        model.attention,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
    )
    fused = fuses_attention(shape, model.attention)
    groups = -(-work.run_layers // work.layout.layer_group)
    stages = None if asked.stages is None else min(asked.stages, groups)
    setting = Setting(
        shape=shape,
        dtype=model.settled_dtype,
        work=work,
        machines=machines,
        rates=rates,
        asked=replace(asked, stages=stages),
        fused_attention=fused,
    )
    generation = plan_generation(setting)
    extraction = None if generate.capture else plan_extraction(setting)
    return RunPlan(
        shape=shape,
        dtype=model.settled_dtype,
        machines=machines,
        rates=rates,
        work=work,
        generation=generation,
        extraction=extraction,
        warnings=tuple(advise(replace(setting, asked=asked), generation, extraction)),
    )

"""`personaspace plan`: what is said to fit fits, more GPUs are never slower, and what does not fit has a way out."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.cluster.planning.costs import Asked
from personaspace.cluster.planning.extraction import INDIFFERENT
from personaspace.cluster.planning.fitting import HEADROOM, MicroBatchLoad, fit_stages, layer_boundaries, stage_needs
from personaspace.cluster.planning.machines import GPUS, Device, GiB, Machines, Node, find_gpu, gpu_rates, parse_bytes
from personaspace.cluster.planning.plan import RunPlan, plan_run
from personaspace.cluster.planning.workload import expected_response
from personaspace.extract.catalogue import Question, Role
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig
from personaspace.extract.personas import PersonaPlan, PlannedRollout
from personaspace.extract.shape import ModelShape, shipped_shape
from personaspace.store.config import StoreConfig
from personaspace.store.errors import InputError
from personaspace.store.layout import choose_layer_group

LOAD = MicroBatchLoad(tokens=8192, longest=600, segments=20, fused_attention=True)


def shape_of(name: str) -> ModelShape:
    shape = shipped_shape(name)
    assert shape is not None
    return shape


LLAMA, QWEN, GEMMA = (
    shape_of(name) for name in ("meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen3-32B", "google/gemma-2-27b-it")
)


def personas(roles: int = 276, each: int = 1200) -> PersonaPlan:
    """Roles with as many rollouts each."""
    message = ({"role": "user", "content": "What should I do about a friend who never listens to my advice? " * 4},)
    rows = tuple(
        PlannedRollout(row=row, role_id=row // each, prompt=0, question=0, sample=0, rollout_id="", messages=message)
        for row in range(roles * each)
    )
    return PersonaPlan(
        roles=tuple(Role(id=f"r{number}", kind="", description="", prompts=("",)) for number in range(roles)),
        questions=(Question(id="q", category="", text=""),),
        rows=rows,
    )


PAPER = personas()
SMALL = personas(40, 240)


def cluster(nodes: int, gpus: int, device: Device = GPUS["H100"], host: int = 1000 * GiB) -> Machines:
    return Machines(nodes=(Node(devices=gpus, memory_bytes=host),) * nodes, device=device, source="test")


def plan(
    shape: ModelShape,
    machines: Machines,
    rollouts: PersonaPlan = SMALL,
    asked: Asked | None = None,
    store: StoreConfig | None = None,
    generate: GenerateConfig | None = None,
    **extract: int,
) -> RunPlan:
    return plan_run(
        shape,
        rollouts,
        model=ModelConfig(id=shape.name, dtype="bfloat16"),
        generate=generate or GenerateConfig(),
        extract=ExtractConfig(**extract),  # type: ignore[arg-type]
        store=store or StoreConfig(root="/store", run="run"),
        machines=machines,
        rates=gpu_rates(machines.device, peak_share=0.45, bandwidth_share=0.6, layers=shape.layers),
        asked=asked or Asked(),
    )


def test_the_paper_on_one_node() -> None:
    found = plan(LLAMA, cluster(1, 8), PAPER)
    work, run = found.work, found.extraction
    assert (work.rollouts, work.layout.unit_rows, work.layout.layer_group) == (331_200, 120, 10)
    assert (work.shards, work.stored_values) == (22_080, 331_200 * 80 * 8192)
    assert work.store_bytes == pytest.approx(627e9, rel=0.02)
    assert (run.sharding, run.replicas, [(stage.first, stage.stop) for stage in run.stages]) == (
        "pipeline",
        4,
        [(0, 40), (40, 80)],
    )
    # 2 x 68.45e9 parameters and attention, for each token.
    assert run.flop == pytest.approx(2.02 * 68.45e9 * work.tokens / 0.97, rel=0.01)
    assert run.seconds == pytest.approx(run.flop / (8 * 0.45 * 989e12), rel=0.06)
    assert run.bubble < 0.05
    made = found.generation
    assert made is not None
    assert made.generators * made.devices_each == 8
    assert made.need.fits(made.memory_bytes)


def test_a_server_generates_elsewhere() -> None:
    own, asked = plan(LLAMA, cluster(1, 8)), plan(LLAMA, cluster(1, 8), generate=GenerateConfig(engine="openai"))
    assert asked.generation is None
    assert asked.work.longest == own.work.longest
    assert asked.extraction == own.extraction


def test_what_is_captured_is_not_extracted_again() -> None:
    own, captured = (plan(LLAMA, cluster(1, 8), generate=GenerateConfig(capture=capture)) for capture in (False, True))
    assert captured.extraction is None
    assert captured.generation == own.generation
    assert own.extraction is not None
    assert own.hours - captured.hours == pytest.approx(own.extraction.seconds / 3600)
    assert own.flop - captured.flop == pytest.approx(own.extraction.flop)
    assert captured.work == own.work


@pytest.mark.parametrize(("shape", "stages"), [(GEMMA, 1), (QWEN, 1), (LLAMA, 2)])
def test_fewest_stages_on_80_gb(shape: ModelShape, stages: int) -> None:
    group = choose_layer_group(shape.layers)
    assert fit_stages(shape, "bfloat16", LOAD, GPUS["H100"].memory_bytes, group) == stages


@settings(deadline=None)
@given(
    shape=st.sampled_from([LLAMA, QWEN, GEMMA]),
    memory=st.integers(2, 200),
    tokens=st.integers(256, 65_536),
    group=st.integers(1, 20),
)
def test_what_is_said_to_fit_fits_and_fewer_stages_do_not(
    shape: ModelShape, memory: int, tokens: int, group: int
) -> None:
    load = replace(LOAD, tokens=tokens)
    stages = fit_stages(shape, "bfloat16", load, memory * GiB, group)
    if stages is not None:
        needs = stage_needs(shape, "bfloat16", group, stages, load, "cuda")
        assert max(need.total for need in needs) <= memory * GiB * (1 - HEADROOM)
        assert sum(need.weights for need in needs) == shape.whole_bytes("bfloat16") - 2 * shape.head_parameters
    for fewer in range(1, stages or -(-shape.layers // group) + 1):
        assert any(not need.fits(memory * GiB) for need in stage_needs(shape, "bfloat16", group, fewer, load, "cuda"))


@settings(deadline=None)
@given(shape=st.sampled_from([LLAMA, QWEN, GEMMA]), group=st.integers(1, 20), stages=st.integers(1, 80))
def test_stages_share_the_layers_at_multiples_of_the_group(shape: ModelShape, group: int, stages: int) -> None:
    stages = min(stages, -(-shape.layers // group))
    cuts = layer_boundaries(shape, group, stages)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, shape.layers, stages + 1)
    assert all(first < stop and first % group == 0 for first, stop in pairwise(cuts))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([LLAMA, QWEN, GEMMA]),
    device=st.sampled_from(sorted(GPUS)),
    nodes=st.integers(1, 6),
    gpus=st.integers(1, 16),
    more_nodes=st.booleans(),
    host=st.sampled_from([64, 250, 1000]),
)
def test_more_gpus_are_never_slower(
    shape: ModelShape, device: str, nodes: int, gpus: int, more_nodes: bool, host: int
) -> None:
    few = plan(shape, cluster(nodes, gpus, GPUS[device], host * GiB))
    many = plan(shape, cluster(nodes + more_nodes, gpus + (not more_nodes), GPUS[device], host * GiB))
    assert many.extraction.seconds <= few.extraction.seconds * (1 + INDIFFERENT)
    assert few.generation is not None
    assert many.generation is not None
    assert many.generation.seconds <= few.generation.seconds


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([LLAMA, QWEN, GEMMA]),
    memory=st.integers(4, 200),
    nodes=st.integers(1, 4),
    gpus=st.integers(1, 8),
)
def test_a_pipeline_that_is_chosen_fits_its_gpus(shape: ModelShape, memory: int, nodes: int, gpus: int) -> None:
    machines = cluster(nodes, gpus, replace(GPUS["H100"], memory_bytes=memory * GiB))
    found = plan(shape, machines)
    run = found.extraction
    if run.sharding == "pipeline":
        assert run.fits
        assert run.replicas * len(run.stages) <= machines.devices
    else:
        assert any("does not fit" in warning for warning in found.warnings)
    assert 0 <= run.bubble < 1


def warned(found: RunPlan, text: str) -> None:
    assert any(text in warning for warning in found.warnings), found.warnings


def test_too_few_gpus_name_the_nodes_that_are_enough() -> None:
    found = plan(LLAMA, cluster(1, 2, GPUS["A100-40GB"]))
    assert found.extraction.sharding == "offload"
    warned(found, "Llama-3.3-70B-Instruct does not fit, not even on all 2 devices: it needs 6 stages. Use 3 nodes, or")
    assert plan(LLAMA, cluster(3, 2, GPUS["A100-40GB"])).extraction.sharding == "pipeline"


def test_a_layer_group_that_is_too_large_names_one_that_fits() -> None:
    small = replace(GPUS["L4"], memory_bytes=8 * GiB)
    found = plan(LLAMA, cluster(8, 8, small))
    warned(found, "one group of 10 layers is too large for a device of 8.0 GiB. With store.layer_group: 1 it needs 54")
    finer = plan(LLAMA, cluster(8, 8, small), store=StoreConfig(root="/s", run="r", layer_group=1))
    assert finer.extraction.sharding == "pipeline"


def test_a_layer_that_is_too_large_asks_for_smaller_micro_batches() -> None:
    tiny = replace(GPUS["L4"], memory_bytes=3 * GiB)
    warned(plan(LLAMA, cluster(1, 8, tiny)), "even a single layer with a micro-batch of 8192 tokens is too large for a")


def test_stages_that_were_asked_for_and_do_not_fit_name_the_nearest_layout() -> None:
    found = plan(LLAMA, cluster(1, 8), PAPER, Asked(stages=1))
    warned(found, "1 stage takes 133.3 GiB of a device with 79.1 GiB; the nearest layout that fits is 4 x 2 stages.")
    warned(
        plan(LLAMA, cluster(1, 8), PAPER, Asked(stages=2, replicas=5)), "5 x 2 stages need 10 GPUs, and there are 8."
    )
    warned(
        plan(LLAMA, cluster(1, 8), asked=Asked(stages=9)), "cluster.stages: 9, but the layers lie in 8 groups of 10;"
    )


def test_a_replica_over_two_nodes_is_told() -> None:
    warned(plan(LLAMA, cluster(4, 1)), "A replica of 4 stages spans nodes")


def test_windows_too_few_for_the_gpus_name_a_size() -> None:
    found = plan(GEMMA, cluster(4, 8), personas(10, 240), Asked(stages=1))
    warned(found, "windows of 2040 rollouts: 2 of 32 devices are used in extraction. Set extract.window_rows:")


def test_sums_too_large_for_the_host_name_a_window_that_is_not() -> None:
    found = plan(LLAMA, cluster(1, 8, host=100 * GiB), PAPER, Asked(stages=2))
    warned(found, "Sums of uncommitted windows take 60 GiB of a node's 100 GiB. Set extract.window_rows: 1680.")
    fewer = plan(LLAMA, cluster(1, 8, host=100 * GiB), PAPER, Asked(stages=2), window_rows=1680)
    assert not any("Sums" in warning for warning in fewer.warnings)


def test_a_pipeline_with_one_micro_batch_in_flight_waits() -> None:
    found = plan(LLAMA, cluster(1, 8), PAPER, Asked(stages=4, in_flight=1))
    assert found.extraction.bubble > 0.7
    warned(found, "or cluster.in_flight above 1, keep them busier.")


def test_a_gang_divides_weights_and_time() -> None:
    found = plan(LLAMA, cluster(1, 8), PAPER, Asked(sharding="tensor"))
    run = found.extraction
    assert (run.sharding, run.replicas, len(run.stages)) == ("tensor", 4, 2)
    assert run.fits
    assert run.seconds > plan(LLAMA, cluster(1, 8), PAPER).extraction.seconds


def test_eager_attention_takes_memory_and_flash_does_not() -> None:
    eager = plan(GEMMA, cluster(1, 8), asked=Asked(stages=1)).extraction.stages[0].need.activations
    flash = plan(replace(GEMMA, eager_attention=False), cluster(1, 8), asked=Asked(stages=1)).extraction
    assert eager - flash.stages[0].need.activations > 0.8 * GiB


@given(st.integers(1, 100_000))
def test_a_response_is_no_longer_than_it_may_be(longest: int) -> None:
    assert 0 < expected_response(longest) <= longest
    assert expected_response(longest) <= expected_response(longest + 1)


@pytest.mark.parametrize(
    ("text", "count"), [("80GiB", 80 * GiB), ("80 GB", 80_000_000_000), ("1.5tib", 1536 * GiB), ("512", 512)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["lots", "-3GiB", "80 G", "0GB", "nanGB"])
def test_bad_amounts_of_memory(text: str) -> None:
    with pytest.raises(InputError, match=r"is no amount of memory; give one such as 80GiB\. Units: B, kB, MB,"):
        parse_bytes(text)


def test_gpus_by_their_names() -> None:
    assert find_gpu("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    assert find_gpu("a100-40gb") is GPUS["A100-40GB"]
    assert find_gpu("NVIDIA L40S") is GPUS["L40S"]
    assert find_gpu("RTX 9999") is None


def test_planning_needs_neither_ray_nor_torch() -> None:
    modules = "personaspace.cluster.planning.plan, personaspace.plan_cli"
    code = f"import sys, {modules}; print({{'ray', 'torch'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"

"""Carrying out a config: the steps of a run in one process, and the parts of it that a repair makes again."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

from transformers.utils import logging as transformers_logging

from personaspace.analysis.fit import fit, fitted_array, target_layer
from personaspace.analysis.quality.assess import assess
from personaspace.analysis.quality.words import warnings
from personaspace.analysis.report.publish import publish_report
from personaspace.cluster.dask_workers import analysis_workers
from personaspace.cluster.droplimit import DropLimit
from personaspace.cluster.engines import check_engine, check_hooks
from personaspace.cluster.events import Note
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job, prepare
from personaspace.cluster.nodes import check_nodes, model_files
from personaspace.cluster.precision import settle_dtype
from personaspace.cluster.repair import adopt_whole, slots_to_redo
from personaspace.cluster.session import check_shared_paths, hold_run, ray_cluster
from personaspace.cluster.sharding import check_sharding
from personaspace.cluster.watching.progress import ProgressDisplay
from personaspace.cluster.watching.watch import Watch
from personaspace.config import RunConfig, stored_config
from personaspace.extract.checkpoint import means_folder
from personaspace.judging import JudgeOptions, check_judge_config, judge_run
from personaspace.steer.interventions import check_hidden, layer_hooks
from personaspace.steer.sources import intervention_identity, resolve_interventions
from personaspace.store.catalog import REPORT
from personaspace.store.formats.role_names import SCENARIO
from personaspace.store.interruption import orderly_end
from personaspace.store.location import run_folder
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder
from personaspace.store.verify import Verification

LOOKED_AT = 20_000
"""Rollouts that are looked at for flaws between generation and extraction: seconds, while the cluster waits."""


def carry_out(config: RunConfig, steps: Sequence[str]) -> None:
    """Do some of `generate`, `extract`, `judge`, `fit` and `report`, in this order; each continues what is committed.

    `judge` is left out where the config names none.
    """
    if config.judge.model is None:
        steps = [step for step in steps if step != "judge"]
    with orderly_end():
        job = _prepare(config)
        if len(steps) > 1 and all(role.kind == SCENARIO for role in job.plan.roles):
            steps = [step for step in steps if step not in ("fit", "report")]
            print("the run holds conversations alone, of which no persona space is made: no fit, no report", flush=True)
        if "fit" in steps:
            spec = fitted_array(config.analysis, job.manifest.arrays)
            target_layer(config.analysis, spec.wanted_layers(job.layout))
        if "judge" in steps:
            check_judge_config(config.judge)
        print(f"run {job.folder.url}  (identity {job.manifest.identity_hash}, {job.layout.rows} rollouts)", flush=True)
        if {"generate", "extract"} & set(steps):
            with ExitStack() as stack:
                display = stack.enter_context(ProgressDisplay())
                fence = stack.enter_context(hold_run(job, say=print))
                stack.enter_context(ray_cluster(config.cluster))
                watch = stack.enter_context(Watch(job, fence, display.report))
                report = DropLimit(watch.report, rows=job.layout.rows, share=config.extract.max_dropped).report
                check_nodes(job.folder, model_files(job.checkpoint))
                job = replace(job, folder=fence.folder)
                if "generate" in steps or config.generate.responses is not None:
                    generate(job, fence, config.cluster, report)
                    for line in warnings(assess(job.folder, at_most=LOOKED_AT)):
                        watch.report(Note(text=line))
                if "extract" in steps:
                    extract(job, fence, config.cluster, report)
        if "judge" in steps:
            options = JudgeOptions(lease_timeout=config.store.lease_timeout, patience=config.store.patience)
            judge_run(job.folder, config.judge, options, cluster=config.cluster)
        if "fit" in steps:
            _fit(job.folder, config)
        if "report" in steps:
            print(f"report: {publish_report(job.folder)}")
        print(_outcome(job.folder, steps), flush=True)


def compute_again(folder: Folder, found: Verification, flags: Sequence[str]) -> None:
    """Make the damaged pieces of a run again, with the config that it was made with, changed by ``flags``.

    Pieces that are whole and only lost their record are recorded again. Raises InputError where the config no
    longer gives the same run.
    """
    with orderly_end():
        config = _config_of(folder, flags)
        job = _prepare(config, keep=True)
        with ExitStack() as stack:
            display = stack.enter_context(ProgressDisplay())
            fence = stack.enter_context(hold_run(job, say=print))
            adopted = adopt_whole(job, fence, found, print)
            redo = {slot: number for slot, number in slots_to_redo(job, found.harmful).items() if slot not in adopted}
            if redo:
                stack.enter_context(ray_cluster(config.cluster))
                watch = stack.enter_context(Watch(job, fence, display.report))
                check_nodes(job.folder, model_files(job.checkpoint))
                job = replace(job, folder=fence.folder, redo=redo)
                generate(job, fence, config.cluster, watch.report)
                extract(job, fence, config.cluster, watch.report)


def analyse(folder: Folder, steps: Sequence[str], flags: Sequence[str]) -> None:
    """Do `fit` and `report` for a stored run, with the analysis settings that it was last made with.

    Neither model nor personas are needed, so runs that were imported or copied from elsewhere can be fitted, too:
    here, or on the cluster that RAY_ADDRESS or ``flags`` name.
    """
    if "fit" in steps:
        manifest = require_manifest(folder)
        stored = dict(manifest.execution.get("config", {"model": {"id": manifest.identity["model"]["name"]}}))
        stored.pop("cluster", None)  # That is where it was made.
        config = stored_config({"config": stored}, folder.url, flags, prog="personaspace fit RUN")
        _fit(folder, config)
    if "report" in steps:
        print(f"report: {publish_report(folder)}")


def _outcome(folder: Folder, steps: Sequence[str]) -> str:
    """The last line of a command that succeeded: what is seen of it in a job's log."""
    if {"generate", "extract", "fit", "report"} <= set(steps):
        return f"done: run {folder.url} is complete, report at {folder.url}/{REPORT}"
    return f"done: {', '.join(steps)} of run {folder.url}"


def _fit(folder: Folder, config: RunConfig) -> None:
    with analysis_workers(config.cluster, folder, print):
        space = fit(folder, config.analysis)
    layer = space.sel(layer=space.attrs["target_layer"])
    print(f"fit: filter by score: {space.attrs['filter']}")
    if space.attrs["too_few"]:
        print(f"fit: left out, with fewer than {space.attrs['min_count']} rollouts: {space.attrs['too_few']}")
    print(
        f"fit: {space.sizes['role']} role vectors; at layer {int(layer['layer'])} |cos(axis, PC1)| "
        f"{float(layer['cos_axis_pc1']):.2f} (null {float(layer['cos_null_p99']):.2f}), default against roles AUC "
        f"{float(layer['default_auc']):.2f}; suggested layer {space.attrs['suggested_layer']}"
    )


def _config_of(folder: Folder, flags: Sequence[str]) -> RunConfig:
    """The config in run.json, for the place where the run now is."""
    config = stored_config(require_manifest(folder).execution, folder.url, flags, prog="personaspace store repair RUN")
    root, _, run = folder.url.rpartition("/")
    return replace(config, store=replace(config.store, root=root, run=run, grow=False))


def _prepare(config: RunConfig, *, keep: bool = False) -> Job:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    shared = {"store.root": config.store.root}
    if means_folder(config.model.id):
        shared["model.id"] = config.model.id
    check_shared_paths(config.cluster, shared)
    folder = run_folder(config.store.root, config.store.run)
    # From here on, and in run.json, there is no `auto`.
    config = replace(config, model=settle_dtype(config.model, config.cluster, folder))
    interventions = resolve_interventions(config.steer)
    job = prepare(
        model=config.model,
        personas=config.personas,
        generate=config.generate,
        extract=config.extract,
        store=config.store,
        execution={"config": asdict(config)},
        keep=keep,
        hooks=layer_hooks(interventions),
        steering=intervention_identity(config.steer, interventions) if interventions else None,
    )
    check_hidden(interventions, job.checkpoint.hidden)
    check_hooks(job.hooks, job.checkpoint.layers, config.generate, config.personas.auditor, config.cluster)
    check_engine(config.generate, config.cluster)
    check_sharding(job, config.cluster)
    return job

"""Judging a stored run: who the judge is, what is missing, what it would cost, and the session itself."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from personaspace.cluster.config import ClusterConfig
from personaspace.extract.judging.config import JudgeConfig
from personaspace.extract.judging.cost import Prices
from personaspace.extract.judging.endpoint import Endpoint, Judge, api_key, endpoint_url, extra_body
from personaspace.extract.judging.estimate import describe_estimate, estimate
from personaspace.extract.judging.instructions import Instructions, load_instructions
from personaspace.extract.judging.keeping import Keeper
from personaspace.extract.judging.progress import JudgingProgress
from personaspace.extract.judging.session import JudgingSession
from personaspace.extract.judging.work import Task, assign, load_tasks, stored_roles
from personaspace.judging_display import JudgingDisplay, summary
from personaspace.store.errors import InputError, PersonaspaceError
from personaspace.store.formats.role_names import DEFAULT_ROLE
from personaspace.store.holding import holding
from personaspace.store.judging import read_ledger
from personaspace.store.lease import Fence
from personaspace.store.manifest import Manifest, refuse_frozen, require_manifest, write_manifest
from personaspace.store.objects import Folder
from personaspace.store.patience import PatientFolder
from personaspace.store.provenance import session_entry
from personaspace.store.records import committed_slots
from personaspace.store.scores import LABELLER, SCORES, check_judge, read_judgements

DECIDES = ("model", "instructions_hash", "temperature", "extra_body")
"""What of a judge decides its scores."""


class BudgetError(PersonaspaceError):
    """The rest of the rollouts does not fit into the budget."""

    exit_code = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeOptions:
    """What is no setting of a judge, but of one command."""

    again: bool = False
    """Ask again about rollouts that the judge could not score."""
    dry_run: bool = False
    """Say what it would take, and ask nothing."""
    lease_timeout: float = 60.0
    """Seconds without a sign of life after which another host's driver counts as dead."""
    patience: float = 300.0
    """Seconds to wait for storage that fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What a command is going to do."""

    name: str
    """Of the judge."""
    about: Mapping[str, Any]
    config: JudgeConfig
    instructions: Instructions
    prices: Prices | None
    units: Mapping[int, Sequence[int]]
    """Unit -> rows that the config wants judged, in the order of work."""
    load: Callable[[int, Sequence[int]], Iterator[Task]]


def judge_run(
    folder: Folder,
    config: JudgeConfig,
    options: JudgeOptions,
    *,
    cluster: ClusterConfig | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Have a run's rollouts judged, those that are missing; or say what that would take.

    ``cluster`` is where a local judge's actors run. Raises InputError for settings that can't be used or a name that
    belongs to another judge, BudgetError where the budget ends first, EndpointError where the endpoint is no good. What
    is scored up to then is kept.
    """
    manifest = require_manifest(folder)
    plan = _plan(folder, manifest, config, say)
    if options.dry_run:
        _tell_what_it_takes(folder, plan, options, say)
        return
    refuse_frozen(folder, manifest)
    with ExitStack() as stack:
        judge = stack.enter_context(_judge(config, cluster or ClusterConfig()))
        fence = stack.enter_context(holding(folder, manifest, timeout=options.lease_timeout, say=say))
        sessions = (*manifest.sessions, session_entry(fence.epoch))
        write_manifest(fence, manifest, replace(manifest, sessions=sessions))
        patient = Fence(PatientFolder(fence.folder, options.patience), fence.epoch)
        progress = _session(patient, manifest, plan, judge, options, say)
    if progress.is_over_budget:
        raise BudgetError(
            f"judge.budget: of {config.budget:g} USD too little is left for another request; "
            f"{progress.rows - progress.done} rollouts are not judged. What is scored is kept; the same command with a "
            "larger budget goes on."
        )


def check_judge_config(config: JudgeConfig) -> None:
    """Raise InputError for settings that can't be used, before hours of other work."""
    describe_judge(config, load_instructions(config.instructions))
    Prices.of(config)
    if config.engine == "endpoint":
        api_key(config, endpoint_url(config))


def describe_judge(config: JudgeConfig, instructions: Instructions) -> dict[str, Any]:
    """What is stored with the scores about who gave them; no key."""
    if config.model is None:
        raise InputError("judge.model: is not set. Give the name of the judge's model, as its endpoint knows it.")
    endpoint = endpoint_url(config) if config.engine == "endpoint" else "local"
    labels = {"labels": list(instructions.labels)} if instructions.labels else {}
    return {
        "model": config.model,
        "endpoint": endpoint,
        **labels,
        "instructions": config.instructions,
        "instructions_version": instructions.version,
        "instructions_hash": instructions.hash,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "extra_body": extra_body(config),
    }


def judge_name(config: JudgeConfig, about: Mapping[str, Any]) -> str:
    """The name given, or the model's with eight digits of a hash over what decides the scores.

    That of a judge of categories ends with `LABELLER`.
    """
    ending = LABELLER if "labels" in about else ""
    if config.name is not None:
        return check_judge(config.name.removesuffix(LABELLER) + ending)
    decides = json.dumps({key: about[key] for key in DECIDES}, sort_keys=True)
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", str(about["model"]).rsplit("/", 1)[-1]).strip("-.")
    return check_judge(f"{model or 'judge'}-{hashlib.sha256(decides.encode()).hexdigest()[:8]}{ending}")


def check_same_judge(folder: Folder, name: str, about: Mapping[str, Any]) -> None:
    """Raise InputError if the name belongs to another judge."""
    ledger = read_ledger(folder, name)
    if ledger is not None:
        known = [ledger.about]
    else:  # A copy of a run has no ledgers, and humans have none.
        units = [unit for array, unit, _ in committed_slots(folder) if array == f"{SCORES}.{name}"]
        known = [judgement.about for judgement in read_judgements(folder, name, units[:1]).values()]
    for other in known:
        different = [key for key in DECIDES if json.dumps(other.get(key)) != json.dumps(about.get(key))]
        if different:
            lines = "\n".join(f"  {key}: {other.get(key)!r} -> {about.get(key)!r}" for key in different)
            raise InputError(
                f"judge.name: {name!r} is the name of another judge. Stored -> asked for:\n{lines}\nGive these scores "
                "another name, or none. Nothing was changed."
            )


def _plan(folder: Folder, manifest: Manifest, config: JudgeConfig, say: Callable[[str], None]) -> _Plan:
    instructions = load_instructions(config.instructions)
    prices, about = Prices.of(config), describe_judge(config, instructions)
    name = judge_name(config, about)
    check_same_judge(folder, name, about)
    roles = stored_roles(manifest)
    bare = [role.id for role in roles if not role.description and not role.judge and role.id != DEFAULT_ROLE]
    if bare and not instructions.labels:
        say(f"judge: no description of {', '.join(bare[:5])}; for {len(bare)} roles the judge goes by the name alone")
    assignment = assign(folder, manifest, config, everyone=bool(instructions.labels))
    if assignment.waiting:
        say(f"judge: {assignment.waiting} rollouts are not generated yet; the same command judges them later")
    return _Plan(
        name=name,
        about=about,
        config=config,
        instructions=instructions,
        prices=prices,
        units=assignment.units,
        load=lambda unit, rows: load_tasks(folder, unit, rows, roles, instructions),
    )


def _tell_what_it_takes(folder: Folder, plan: _Plan, options: JudgeOptions, say: Callable[[str], None]) -> None:
    judgements = read_judgements(folder, plan.name)
    done = {row for judgement in judgements.values() for row in judgement.scores}
    if not options.again:
        done |= {row for judgement in judgements.values() for row in judgement.unjudged}
    missing = {unit: [row for row in rows if row not in done] for unit, rows in plan.units.items()}
    found = estimate(missing, plan.load, plan.config, plan.prices)
    say(f"judge {plan.name} of {folder.url}: {sum(map(len, plan.units.values())) - found.rows} rollouts judged before")
    say(describe_estimate(found, plan.config))
    if found.example is not None:
        messages = found.example.prompt.messages
        text = "\n".join(f"--- {message['role']} ---\n{message['content'].rstrip()}" for message in messages)
        say(f"\nexample, rollout of row {found.example.row}:\n{text}")


def _session(
    fence: Fence, manifest: Manifest, plan: _Plan, judge: Judge, options: JudgeOptions, say: Callable[[str], None]
) -> JudgingProgress:
    keeper = Keeper(fence, manifest.layout, plan.name, plan.about)
    missing = {unit: keeper.missing(rows, again=options.again) for unit, rows in plan.units.items()}
    wanted, left = sum(map(len, plan.units.values())), sum(map(len, missing.values()))
    resumed = f", {wanted - left} of them done before" if wanted > left else ""
    taken_over = (
        f" ({keeper.recovered} answers taken over from a session that was cut short)" if keeper.recovered else ""
    )
    say(f"judge: {wanted} rollouts by {plan.name}{resumed}{taken_over}")
    with JudgingDisplay() as display:
        session = JudgingSession(
            config=plan.config,
            instructions=plan.instructions,
            judge=judge,
            keeper=keeper,
            prices=plan.prices,
            load=plan.load,
            report=display.report,
        )
        progress = session.run(missing, done_before=wanted - left)
    say(summary(plan.name, progress))
    return progress


@contextmanager
def _judge(config: JudgeConfig, cluster: ClusterConfig) -> Iterator[Judge]:
    """Whoever answers."""
    if config.engine == "endpoint":
        yield Endpoint(config)
        return
    from personaspace.cluster.judges import local_judge

    with local_judge(config, cluster) as judge:
        yield judge

"""Ask the machine and the client, and make the plan of a run; nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from . import clients, credentials, directories, plan, process, selection
from .clients import Client, Dumper, Facts, Settings
from .errors import UserError
from .intents import RunHook
from .logical import Logicals
from .mounts import mountinfo
from .names import Dataset, RunId, is_within
from .plan import ClientPlan, DatasetFacts, Plan, Pool, Request
from .redact import check_arguments, journaled
from .subvolumes import Filesystem
from .volumes import btrfs, lvm, plain
from .volumes.zfs import Zfs, pools_for


def choose_client(name: str | None, command: Sequence[str], env: Mapping[str, str]) -> str:
    """Return the client that was named, or else the one that the environment tells of."""
    if name:
        return name
    if command:
        return "command"
    if env.get("RESTIC_REPOSITORY") or env.get("RESTIC_REPOSITORY_FILE"):
        return "restic"
    from .clients import kopia  # which a job that names its client needs not

    if kopia.is_connected(env):
        return "kopia"
    if env.get("BORG_REPO"):
        return "borg"
    raise UserError(
        "no backup client was named, and the environment names none",
        hint="set RESTIC_REPOSITORY or BORG_REPO, connect kopia to a repository, or give --client "
        "or --command",
    )


def settings(
    command: Sequence[str],
    extra: Sequence[str],
    env: Mapping[str, str],
    *,
    cwd: str = "",
    chosen: Mapping[str, str] | None = None,
    sources: credentials.Sources = (),
) -> Settings:
    """
    Return how the user wants the client to be run; refuse a secret among its arguments.

    The variables that were *chosen* and the credentials are laid over *env*.  Raises UserError
    for a credential that cannot be had.
    """
    check_arguments([*command, *extra])
    chosen = chosen or {}
    whole = credentials.overlaid(env, {**chosen, **credentials.read(sources, env)})
    names = frozenset(chosen)
    return Settings(tuple(command), tuple(extra), whole, cwd or _cwd(), names, sources)


def _cwd() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as exc:
        raise UserError(
            "the current directory does not exist any more", hint="`cd` to another one"
        ) from exc


def inventory(
    request: Request, zfs: Zfs, table: mountinfo.Table
) -> tuple[list[Pool], list[DatasetFacts]]:
    """List the imported pools, and the datasets of those that *request* needs: one `zfs` each."""
    named = _pools_of(request, table)
    if not request.all and not named:
        return [], []  # a machine without ZFS has no `zpool`
    pools = pools_for(request.names, zfs.pools)
    healthy = {pool.name for pool in pools if pool.health != "SUSPENDED"}
    wanted = healthy if request.all else named & healthy
    listed = (zfs.datasets(pool, may_go=request.all) for pool in sorted(wanted))
    return pools, [*chain.from_iterable(listed)]


def _pools_of(request: Request, table: mountinfo.Table) -> set[str]:
    names = set()
    for text in request.names:
        if text.startswith("/"):
            entry = mountinfo.containing(table, plan.normal(text))
            source = entry.source if entry and entry.fstype == "zfs" else ""
        else:
            source = text
        if source:
            names.add(Dataset(source).pool)
    return names


def filesystems(request: Request, table: mountinfo.Table) -> list[Filesystem]:
    """List the subvolumes of each btrfs on which something is named."""
    return btrfs.filesystems((*request.names, *request.exclude), table)


def make_plan(
    request: Request,
    *,
    client_name: str,
    wanted: Settings,
    zfs: Zfs,
    state: Path,
    keep_snapshots: bool = False,
    retries: int = 0,
    keep_for_s: int = 0,
    time_limit_s: int = 0,
    grace_s: int = plan.GRACE_S,
    hooks: Sequence[RunHook] = (),
    retention: Sequence[str] = (),
    on_stop: str = "undo",
    nice: int = 0,
    io_class: str = "",
) -> Plan:
    """
    Return the plan of a new run: the one that `--dry-run` prints and the journal stores.

    Raises UserError for what is wrong with the request, the datasets or the client.
    """
    client = clients.load(client_name)
    plain.reach(request.live)
    table = mountinfo.read().without_echoes()
    request, volumes = lvm.named(request, table)
    plain.check_there((*request.names, *request.exclude), table)
    logicals = Logicals(volumes, table, request.cow_size)
    on_zfs = tuple(text for text in request.names if not logicals.means(text))
    pools, datasets = inventory(replace(request, names=on_zfs), zfs, table)
    found = filesystems(request, table)
    live = directories.select(request, table, plain.identify, logicals.offers, plain.is_file)
    chosen = selection.select(request, datasets, pools, table, found, volumes, live)
    facts = client.inspect(wanted)
    made = plan.assemble(
        request,
        chosen,
        pools=pools,
        run=RunId.new(),
        client=_client_plan(client, wanted, facts),
        # Not as they are named: it is where a link leads to that must not be frozen, nor saved.
        live_paths=map(os.path.realpath, (*client.live_paths(wanted), str(state))),
        notes=facts.notes,
        keep_snapshots=keep_snapshots,
        retries=retries,
        keep_for_s=keep_for_s,
        time_limit_s=time_limit_s,
        grace_s=grace_s,
        hooks=hooks,
        retention=client.policy(tuple(retention)) if retention else (),
        on_stop=on_stop,
        nice=nice,
        io_class=io_class,
        by_volume=isinstance(client, Dumper),
    )
    if made.whole_root and isinstance(client, Dumper):
        raise UserError(
            f"{client.name} saves each file system by itself", hint="leave out --whole-root"
        )
    client.check(wanted, *plan.as_read(made), made.root if made.whole_root else "")
    _check_cwd(made)
    _check_priority(made, wanted)
    return made


def _client_plan(client: Client, wanted: Settings, facts: Facts) -> ClientPlan:
    environment, secrets = journaled(
        wanted.env, client.name, chosen=wanted.chosen, elsewhere=dict(wanted.credentials)
    )
    return ClientPlan(
        name=client.name,
        command=wanted.command,
        extra=wanted.extra,
        cwd=wanted.cwd,
        version=facts.version,
        repository=facts.repository,
        environment=environment,
        secrets=secrets,
        credentials=wanted.credentials,
    )


def _check_cwd(made: Plan) -> None:
    """The tree's root is a directory of the host: a client that stands in it would hold it."""
    if made.root and is_within(made.client.cwd, made.root):
        raise UserError(
            f"the current directory is inside the root {made.root}", hint="`cd` out of it"
        )


def _check_priority(made: Plan, wanted: Settings) -> None:
    for program in plan.prioritized(made, ())[:1]:
        if process.which(program, wanted.env) is None:
            raise UserError(
                f"{program} is not installed, or not in the PATH",
                hint="install it, or leave out its key or option (nice, io-class)",
            )

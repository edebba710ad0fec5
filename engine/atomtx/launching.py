"""How the client of a run is run: at the plan, at a resume, and for what follows a backup."""

from __future__ import annotations

import os
from dataclasses import replace

from . import clients, credentials, plan, redact
from .clients import Dumper, Facts, Housed, Launch, Moment, Settings
from .errors import UserError
from .intents import ApplyRetention
from .inventory import ancestors
from .plan import ClientPlan, Plan


def environment_of(client: ClientPlan) -> dict[str, str]:
    """
    Return the client's environment: ours, what was journaled of the first attempt's, credentials.

    Raises CredentialError for a credential that cannot be had, nor is in our environment.
    """
    values = credentials.read_or_inherit(client.credentials, os.environ)
    journaled = dict(client.environment)
    known = {*journaled, *client.secrets, *values}
    ours = {n: v for n, v in os.environ.items() if n in known or not redact.is_of_a_client(n)}
    return credentials.overlaid(ours, {**journaled, **values}, keep=client.secrets)


def settings_of(client: ClientPlan) -> Settings:
    """Return how to run the client, at the plan and at a resume alike."""
    env = environment_of(client)
    return Settings(client.command, client.extra, env, client.cwd, credentials=client.credentials)


def launch_of(made: Plan, moment: Moment) -> Launch:
    """Return the client's commands as they are run, with the plan's niceness."""
    config = made.client
    launch = clients.load(config.name).launch(settings_of(config), facts_of(config), moment)
    commands = tuple(plan.prioritized(made, argv) for argv in launch.commands)
    return replace(launch, commands=commands)


def make_folders(made: Plan) -> None:
    """
    Make the client's own folders in the set, as it would: before the snapshots, after the plan.

    In the frozen files it could not, and there would be nothing to bind the live ones over.
    Raises UserError for one that cannot be made.
    """
    client = clients.load(made.client.name)
    if not isinstance(client, Housed):
        return
    for path in map(os.path.realpath, client.folders(settings_of(made.client))):
        if path in made.live_paths:
            _make_private(path)


def _make_private(path: str) -> None:
    missing = [each for each in (path, *ancestors(path)) if not os.path.exists(each)]
    try:
        for each in reversed(missing):
            os.makedirs(each, 0o700, exist_ok=True)
    except OSError as exc:
        raise UserError(
            f"cannot make {exc.filename}, which the client needs: {exc.strerror}",
            hint="make it, or have the client's cache elsewhere",
        ) from exc


def facts_of(client: ClientPlan) -> Facts:
    """Return what was found when the run was planned."""
    return Facts(client.version, client.repository)


def mended(client: ClientPlan) -> tuple[str, ...]:
    """Let the client mend what its killed predecessor left in the repository; say what it did."""
    return clients.load(client.name).after_loss(settings_of(client), facts_of(client))


def bare_settings_of(client: ClientPlan) -> Settings:
    """Return the client's settings without its secrets, which a look at files does not need."""
    return Settings(client.command, client.extra, dict(client.environment), client.cwd)


def swept(client: ClientPlan, run: str) -> tuple[str, ...]:
    """Remove what dead attempts of a run left half made in a destination; say what it did."""
    found = clients.load(client.name)
    if not isinstance(found, Dumper):
        return ()
    return found.remove_parts(bare_settings_of(client), client.repository, run)


def retention_of(made: Plan, moment: Moment) -> ApplyRetention | None:
    """Return the step that applies the plan's retention to the job's own backups; maybe none."""
    if not made.retention:
        return None
    name = made.client.name
    return ApplyRetention(name, clients.load(name).stored_paths(moment), made.retention)

"""
What a configuration can hold: the one definition.

From the dataclasses below come the parser and its errors, the nearest right key, `config show`,
the file that `config init` writes, the JSON schema, the options' defaults on the command line
and the table in docs/configuration.md.  A key is a field made by `config_kinds.key`, its name
with `-` for `_`.

To add a key: a field in :class:`Job`, and whoever acts on it.  To add a table to a job: a frozen
dataclass of such fields, and a field of :class:`Job` of the kind ``Table(ThatClass)``, or
``Named(Table(ThatClass), ...)`` for many by name.  What concerns several keys is said in
:func:`problems`.  Nothing is accepted on which nothing acts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from . import clients, convention, redact, retention, steps, system
from .config_kinds import (
    Flag,
    Named,
    Number,
    Program,
    Span,
    Table,
    Text,
    Variables,
    Words,
    default_text,
    key,
    keys,
    shown,
)
from .convention import Pattern
from .credentials import Sources, clashes, thing_of
from .errors import UserError
from .intents import AFTER_FAILURE, AFTER_SUCCESS, AROUND_RUN, AROUND_SNAPSHOT, FINALLY, RunHook
from .names import Target
from .notices import TIME_LIMIT_S, Event, NotifySettings, is_address, is_sender
from .plan import COW_SIZE, GRACE_S
from .retention import Policy
from .tomllines import Place
from .words import SHARE, SIZE

DEFAULT = f"{system.here.CONFIGURATION}/atomtx.toml"
LAYOUTS = ("namespace", "tree")
IO_CLASSES = r"idle|(best-effort|realtime)(:[0-7])?"
JOB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}"
COW_PATTERN = f"(?:{SHARE.pattern})|(?:{SIZE.pattern})"
_YEAR_S = 366 * 86_400
_ABSOLUTE = r"/[^\0]*"
_PATH = Text("an absolute path", _ABSOLUTE)
_FILE = f"{system.here.CONFIGURATION}/..."
_WHERE = f'name where the value is: {{ file = "{_FILE}" }} or {{ credential = "..." }}'


def _holder(of: str) -> Text:
    """Return the kind of a path where a secret is, which may be typed there by mistake."""
    return Text(f"the absolute path of a file that holds {of}", _ABSOLUTE, is_by_a_secret=True)


def _hook(what: str, example: list[str]) -> Any:
    return key(Program(), what, (), unset="none", example=example)


@dataclass(frozen=True)
class Credential:
    """Where the value of a variable is."""

    file: str = key(
        _holder("the value"), "A file of root's that nobody else can read.", "", unset="none"
    )
    credential: str = key(
        Text("the name of a systemd credential", r"[A-Za-z0-9._-]+", is_by_a_secret=True),
        "The name of a file in systemd's $CREDENTIALS_DIRECTORY.",
        "",
        unset="none",
    )

    @property
    def source(self) -> str:
        return f"file:{self.file}" if self.file else f"credential:{self.credential}"


@dataclass(frozen=True)
class Job:
    """How a backup is made; the command line makes one as well."""

    volumes: tuple[str, ...] = key(
        Words(),
        "ZFS datasets by name or mountpoint, btrfs subvolumes by path, logical volumes as VG/LV or "
        "by path; or directories in these.",
        (),
        unset="none",
        example=["tank/home"],
    )
    recursive: bool = key(Flag(), "Include what lies below each volume.", False)
    all: bool = key(Flag(), "All mounted datasets of all ZFS pools, in place of volumes.", False)
    exclude: tuple[str, ...] = key(
        Words(),
        "Volumes to leave out, with what is below.",
        (),
        unset="none",
        example=["tank/home/scratch"],
    )
    read_live: tuple[str, ...] = key(
        Words(),
        "Directories to read as they are, on file systems without snapshots: not a moment.",
        (),
        unset="none",
        example=["/boot"],
    )
    client: str = key(
        Text("a client", choices=tuple(clients.KNOWN)),
        "The backup program.",
        "",
        unset="the environment decides",
        example="restic",
    )
    command: tuple[str, ...] = key(
        Words(),
        "Run this, with the paths appended; with client, a wrapper of that client.",
        (),
        unset="the client's own program",
        example=["/usr/local/bin/my-backup", "--all"],
    )
    arguments: tuple[str, ...] = key(
        Words(),
        "Options for the client; those after -- on the command line are appended.",
        (),
        unset="none",
        example=["--tag", "nightly"],
    )
    environment: Mapping[str, str] = key(
        Variables(),
        "Variables for the client that are no secrets.",
        {},
        unset="none",
        example={"RESTIC_REPOSITORY": "/srv/restic"},
    )
    credentials: Mapping[str, Credential] = key(
        Named(
            Table(Credential, instead_of_a_secret=_WHERE),
            r"[A-Za-z_][A-Za-z0-9_]*",
            "the name of a variable",
        ),
        "Variables for the client whose values are in files, or are systemd credentials.",
        {},
        unset="none",
        example={"RESTIC_PASSWORD": {"file": "/etc/atomtx/home.password"}},
    )
    working_directory: str = key(_PATH, "Where the client is run.", "/")
    layout: str = key(
        Text("a layout", choices=LAYOUTS),
        "Where the client reads: at the live paths, or in a tree.",
        system.here.LAYOUT,
    )
    root: str = key(
        _PATH,
        "The root of the tree.",
        system.here.TREE,
        unset=system.here.TREE or "none",
        example="/restic",
    )
    whole_root: bool = key(Flag(), "Give the client the root of the tree itself.", False)
    leave_dirs: bool = key(Flag(), "Leave the directories of the tree in place.", False)
    snap_pattern: str = key(
        Text("a name with the parts of a date and a time, as strftime(3) has them"),
        "The names of the snapshots that `atomtx snap` takes, in UTC.",
        convention.PATTERN,
    )
    snap_keep: tuple[str, ...] = key(
        Words(),
        "What `atomtx prune` keeps of the snapshots that `atomtx snap` took.",
        (),
        unset="prune is refused",
        example=["--keep-hourly", "24", "--keep-daily", "7"],
    )
    keep_until_saved: bool = key(
        Flag(), "What a completed backup of the job has not saved yet, `atomtx prune` keeps.", False
    )
    clone_targets: tuple[str, ...] = key(
        Words(),
        "Where `atomtx clone` keeps copies of the snapshots that `atomtx snap` took.",
        (),
        unset="clone is refused",
        example=["backup/here", "root@nas:backup/here"],
    )
    clone_rate: str = key(
        Text('a size such as "10M"', SIZE.pattern),
        "How much `atomtx clone` sends a second, at most.",
        "",
        unset="no limit",
        example="10M",
    )
    steps: tuple[str, ...] = key(
        Words(),
        "What `atomtx run` does, in this order: each the words of a command, as for a shell.",
        (),
        unset="run is refused",
        example=["snap", "backup --from-snapshots", "prune"],
    )
    keep_snapshots: bool = key(Flag(), "Keep the snapshots of a good backup.", False)
    cow_size: str = key(
        Text('a share of the origin such as "20%", or a size such as "10G"', COW_PATTERN),
        "The room of a classic LVM snapshot for what changes during the run.",
        COW_SIZE,
    )
    require_atomic: bool = key(Flag(), "Refuse a set that is not of one moment.", False)
    retries: int = key(
        Number(0, 1000), "How often to try again after network or repository trouble.", 1
    )
    keep_for: int = key(Span(), "Keep the moment that long when the client keeps failing.", 0)
    time_limit: int = key(
        Span(), "Stop a client that runs longer: the backup has failed. 0: no limit.", 0
    )
    grace: int = key(
        Span(),
        "How long a client that was stopped may take to end; then it is killed.",
        GRACE_S,
    )
    on_stop: str = key(
        Text("what to do", choices=("undo", "keep")),
        "What SIGTERM, as of a shutdown, makes of the moment; kept, `recover` goes on with it.",
        "undo",
    )
    keep_history: int = key(
        Span(),
        "Forget runs of any job that ended longer ago. "
        "0: all but the last whole one of each job, one more of it, and those of the last minute.",
        _YEAR_S,
    )
    nice: int = key(Number(0, 19), "The client's niceness.", 0)
    io_class: str = key(
        Text('"idle", "best-effort" or "realtime", the latter two with ":0" to ":7"', IO_CLASSES),
        "The client's class of input and output, as ionice sets it.",
        "",
        unset="as it is",
        example="idle",
    )

    retention: tuple[str, ...] = key(
        Words(),
        "After a backup that completed, forget older ones of its paths that no rule keeps.",
        (),
        unset="all are kept",
        example=["--keep-daily", "7", "--keep-weekly", "5"],
    )
    pre_hook: tuple[str, ...] = _hook(
        "Run this first; if it fails, there is no backup.", ["systemctl", "stop", "app"]
    )
    post_hook: tuple[str, ...] = _hook(
        "Run this last, whatever happens: it undoes pre-hook.", ["systemctl", "start", "app"]
    )
    quiesce: tuple[str, ...] = _hook("Run this just before the snapshots.", ["db-pause"])
    thaw: tuple[str, ...] = _hook(
        "Run this just after the snapshots, whatever happens: it undoes quiesce.", ["db-resume"]
    )
    after_success: tuple[str, ...] = _hook("Run this after a backup that completed.", ["notify"])
    after_failure: tuple[str, ...] = _hook("Run this after a run that did not.", ["alarm"])
    hook_limit: int = key(
        Span(), "A hook that takes longer is ended and has failed. 0: no limit.", 300
    )

    write_paths: tuple[str, ...] = key(
        Words(),
        "Paths that hooks or a command of your own write, for the service of systemd.",
        (),
        unset="none",
        example=["/var/backups"],
    )

    notify_mail: tuple[str, ...] = key(
        Words(), "Tell these addresses of trouble.", (), unset="none", example=["root"]
    )
    notify_mail_from: str = key(Text(), "The sender of these mails.", NotifySettings.mail_from)
    notify_command: tuple[str, ...] = key(
        Program(), "Tell this command of trouble.", (), unset="none", example=["/root/tell"]
    )
    notify_on: tuple[str, ...] = key(
        Words(),
        f"What mail, command and apprise are told of: {', '.join(Event)}.",
        (),
        unset="all but completed",
        example=["failed", "parked"],
    )
    ping_url_file: str = key(
        _holder("the URL"),
        "A file with the URL to ping.",
        "",
        unset="none",
        example="/etc/atomtx/home.ping",
    )
    ping_exit_status: bool = key(Flag(), "Ping URL/STATUS in place of URL/fail.", False)
    apprise_file: str = key(
        _holder("URLs of apprise"),
        "A file with URLs of apprise.",
        "",
        unset="none",
        example="/etc/atomtx/apprise",
    )
    notify_limit: int = key(
        Span(), "How long all of telling may take.", 0, unset=f"{TIME_LIMIT_S:.0f}s", example="30s"
    )

    @property
    def notices(self) -> NotifySettings:
        """Return who is told of the job's runs."""
        return NotifySettings(
            on=frozenset(map(Event, self.notify_on)),
            command=self.notify_command,
            mail=self.notify_mail,
            mail_from=self.notify_mail_from,
            ping_url_file=self.ping_url_file,
            ping_exit_status=self.ping_exit_status,
            apprise_file=self.apprise_file,
            time_limit_s=float(self.notify_limit),
        )

    @property
    def hooks(self) -> tuple[RunHook, ...]:
        """Return the hooks; a post-hook without a pre-hook runs at the end of every run."""
        limit = self.hook_limit
        without = RunHook(FINALLY, self.post_hook, (), limit)
        found = (
            RunHook(AROUND_RUN, self.pre_hook, self.post_hook, limit) if self.pre_hook else without,
            RunHook(AROUND_SNAPSHOT, self.quiesce, self.thaw, limit),
            RunHook(AFTER_SUCCESS, self.after_success, (), limit),
            RunHook(AFTER_FAILURE, self.after_failure, (), limit),
        )
        return tuple(hook for hook in found if hook.command)

    @property
    def sources(self) -> Sources:
        """Return the credentials as the journal keeps them."""
        return tuple((name, each.source) for name, each in self.credentials.items())


@dataclass(frozen=True)
class File:
    """A whole configuration file as it was read."""

    defaults: Job = key(Table(Job), "What holds for every job that does not say otherwise.", Job())
    jobs: Mapping[str, Job] = key(
        Named(Table(Job), JOB_NAME, "a job's name: letters, digits and . _ -, at most 60"),
        "The jobs by name: `atomtx backup NAME`.",
        {},
    )


_HOOKS = (
    "pre_hook",
    "post_hook",
    "quiesce",
    "thaw",
    "after_success",
    "after_failure",
    "notify_command",
)
# What cannot be the same for all jobs.
NOT_IN_DEFAULTS = ("volumes", "all", "read-live")
_TABLES = ("environment", "credentials")
_PRINTED_BY = {
    "BORG_PASSCOMMAND": "BORG_PASSPHRASE",
    "RESTIC_PASSWORD_COMMAND": "RESTIC_PASSWORD",
}


def merged(defaults: Job, job: Job, said: Collection[str]) -> Job:
    """
    Return *job* with the *defaults* for the keys that are not *said* in it.

    Variables are merged one by one, also where the job gives one in another way, such as
    RESTIC_PASSWORD_FILE for RESTIC_PASSWORD.
    """
    values = {
        each.name: getattr(defaults, each.name)
        for name, each in keys(Job).items()
        if name not in said
    }
    own = {thing_of(n) for n in (*job.environment, *job.credentials)}
    for name in _TABLES:
        inherited = getattr(defaults, name).items()
        rest = {n: v for n, v in inherited if thing_of(n) not in own}
        values[name] = {**rest, **getattr(job, name)}
    return replace(job, **values)


def problems(job: Job) -> Iterator[tuple[Place, str]]:
    """Tell what is wrong with the keys of a whole job together: (the key's path, what)."""
    if job.all and job.volumes:
        yield ("all",), "all and volumes exclude each other"
    if not job.all and not job.volumes and not job.read_live:
        yield (), "no volumes are named; give volumes, or all = true"
    if job.layout == "namespace" and not system.here.NAMESPACES:
        yield ("layout",), f'{system.here.NAME} has no mount namespaces; leave out "namespace"'
    if job.layout == "tree" and not job.root.strip("/"):
        yield ("layout",), 'the layout "tree" needs a root below /, such as root = "/restic"'
    if job.root != system.here.TREE and job.layout != "tree":
        yield ("root",), 'root is of no use without layout = "tree"'
    for name in ("whole_root", "leave_dirs"):
        if getattr(job, name) and job.layout != "tree":
            dashed = name.replace("_", "-")
            yield (dashed,), f'{dashed} is of no use without layout = "tree"'
    for word in job.read_live:
        if not word.startswith("/"):
            yield ("read-live",), f"read-live: {shown(word)} is no absolute path"
    for word in job.write_paths:
        if not word.startswith("/"):
            yield ("write-paths",), f"write-paths: {shown(word)} is no absolute path"
    for word in job.notify_on:
        if word not in set(Event):
            yield ("notify-on",), f"notify-on: {word!r} is none of {', '.join(Event)}"
    for word in job.notify_mail:
        if not is_address(word):
            yield ("notify-mail",), f"notify-mail: {word!r} is no address"
    if not is_sender(job.notify_mail_from):
        hint = 'such as "backup@example.org", or "Backups <root>"'
        words = f"notify-mail-from: {job.notify_mail_from!r} is no address, {hint}"
        yield ("notify-mail-from",), words
    if job.thaw and not job.quiesce:
        yield ("thaw",), "thaw undoes quiesce, which is not there"
    if job.client == "command" and not job.command:
        yield ("client",), 'the client "command" needs a command, such as command = ["my-backup"]'
    yield from _of_snapshots(job)
    yield from _of_retention(job)
    yield from _of_steps(job)
    yield from _secrets(job)


def _of_snapshots(job: Job) -> Iterator[tuple[Place, str]]:
    try:
        Pattern.parse(job.snap_pattern)
    except UserError as exc:
        yield ("snap-pattern",), f"snap-pattern: {exc.message}"
    try:
        Policy.parse(dict(retention.words(job.snap_keep)))
    except UserError as exc:
        yield ("snap-keep",), f"snap-keep: {exc.message}"
    for word in job.clone_targets:
        try:
            Target.parse(word)
        except UserError as exc:
            yield ("clone-targets",), f"clone-targets: {exc.message}"


def _of_retention(job: Job) -> Iterator[tuple[Place, str]]:
    """Ask the client, where the job says which one it is."""
    client = job.client or ("command" if job.command else "")
    if not (client and job.retention):
        return
    try:
        clients.load(client).policy(job.retention)
    except UserError as exc:
        yield ("retention",), f"retention: {exc.message}"


def _of_steps(job: Job) -> Iterator[tuple[Place, str]]:
    for text in job.steps:
        try:
            redact.check_arguments(steps.parse(text))
        except UserError as exc:
            yield ("steps",), f"steps: {exc.message}"


def _secrets(job: Job) -> Iterator[tuple[Place, str]]:
    for name in sorted(redact.secret_names(job.environment)):
        # A file has the secret, not the command that prints it.
        wanted = _PRINTED_BY.get(name, name)
        yield (
            ("environment", name),
            f"environment.{name} looks like a secret; name a file with it under credentials: "
            f'{wanted} = {{ file = "{_FILE}" }}',
        )
    for name, each in job.credentials.items():
        if bool(each.file) == bool(each.credential):
            yield ("credentials", name), f"credentials.{name} needs either file or credential"
        if name in job.environment:
            yield ("credentials", name), f"{name} is in both environment and credentials"
    for one, other in clashes((*job.environment, *job.credentials)):
        table = "credentials" if other in job.credentials else "environment"
        yield (table, other), f"{one} and {other} say the same thing in two ways"
    for name in ("command", "arguments", *_HOOKS):
        try:
            redact.check_arguments(getattr(job, name))
        except UserError as exc:
            yield (name.replace("_", "-"),), f"{name.replace('_', '-')}: {exc.message}"


# -- what is made of the definition ------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file."""
    schema = Table(File).schema()
    inherited = schema["properties"]["defaults"]["properties"]
    for name in NOT_IN_DEFAULTS:
        del inherited[name]
    for name in ("defaults", "jobs"):
        schema["properties"][name].pop("default", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The configuration of atomtx",
        **schema,
    }


def reference() -> str:
    """Return the table of a job's keys for docs/configuration.md."""
    rows = ["| key | value | without it | what it is |", "| --- | --- | --- | --- |"]
    for name, each in keys(Job).items():
        kind = _described(each.metadata["kind"])
        without = default_text(each) if each.metadata["unset"] else f"`{default_text(each)}`"
        rows.append(f"| `{name}` | {kind} | {without} | {each.metadata['what']} |")
    return "\n".join(rows) + "\n"


def _described(kind: Any) -> str:
    if getattr(kind, "choices", ()):
        return ", ".join(f'`"{word}"`' for word in kind.choices)
    if isinstance(kind, Named):
        inner = ", or ".join(f'`{{ {each.name} = "..." }}`' for each in fields(kind.of.of))
        return f"a table of variables, each {inner}"
    return str(kind.name)

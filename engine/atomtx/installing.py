"""
Units of systemd, written and taken away.

Only files that begin with our marker are ever replaced or removed.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from . import clients, credentials, lvmio, process, units
from .clients import Checker, Settings
from .config import Config
from .config_schema import DEFAULT, Job
from .errors import AtomtxError, EffectError, UserError
from .names import is_within
from .preparing import choose_client
from .statedir import make_directory, sync_directory, write_new
from .units import Program, Schedule, Service

# What a service may write without our word: units.py, and ProtectSystem= in systemd.exec(5).
_WRITABLE = (units.CACHE, "/tmp", "/var/tmp", "/var/lib/atomtx", "/run/atomtx", "/dev")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SYSTEMCTL_S = 120.0


def program(env: Mapping[str, str], config_path: str) -> Program:
    """Return how a unit starts this very program."""
    variables = {name: os.path.abspath(env[name]) for name in units.PASSED_ON if env.get(name)}
    variables["ATOMTX_CONFIG"] = os.path.abspath(config_path)
    home = os.path.expanduser("~root")
    variables = {"HOME": home, "XDG_CACHE_HOME": units.CACHE, **variables}
    return Program(_words(), variables, has_lvm=lvmio.is_installed())


def _words() -> tuple[str, ...]:
    own = Path(sys.argv[0])
    if own.name == "atomtx" and own.is_file() and os.access(own, os.X_OK):
        return (str(own.absolute()),)
    return (sys.executable, "-P", "-m", "atomtx")


# -- from a job to its service -----------------------------------------------------------------


def warnings(
    config: Config,
    names: Sequence[str],
    made: Program,
    *,
    of_steps: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[str]:
    """Tell of the jobs that the services of *names* back up without what a backup needs."""
    where = () if config.path == DEFAULT else ("--config", config.path)
    tried = ("atomtx", "backup", "--dry-run", *where)
    backed_up = (job for name in names for job in of_steps.get(name, (name,)))
    return [
        f"job {name}: its service has no {what}: each backup will fail, unless a drop-in of yours "
        f"names one; try, in a shell that has none either: {shlex.join((*tried, name))}"
        for name in dict.fromkeys(backed_up)
        for what in _lacks(config.job(name), made)
    ]


def _lacks(job: Job, made: Program) -> tuple[str, ...]:
    """Return what a backup in a service lacks; a wrapper may name what no variable does."""
    env = _environment(job, made)
    try:
        client = clients.load(choose_client(job.client, job.command, env))
    except UserError:
        return ('client (client = "restic")',)
    if job.command or not isinstance(client, Checker):
        return ()
    wanted = Settings((), job.arguments, env, job.working_directory, credentials=job.sources)
    try:
        return client.lacks(wanted)
    except UserError:  # arguments that the client refuses: the note has them
        return ()


def service(
    name: str, job: Job, made: Program, *, has_client: bool = True
) -> tuple[Service, list[str]]:
    """Return what the service of a job needs, and what its user should know."""
    env = _environment(job, made)
    notes: list[str] = []
    wanted = [*(_paths(job, env, notes) if has_client else ()), *job.write_paths]
    wanted += [job.root] if job.layout == "tree" else []
    state = made.environment.get("ATOMTX_STATE_DIR")
    wanted += [state] if state else []
    writes = tuple(dict.fromkeys(os.path.normpath(path) for path in wanted))
    writes = tuple(path for path in writes if not any(is_within(path, w) for w in _WRITABLE))
    notes += [
        f"job {name}: {path} is not there yet, and the service cannot make it"
        for path in writes
        if not os.path.lexists(path)
    ]
    there, missing = _credentials(job)
    notes += [f"job {name}: {note}" for note in missing]
    made_of = Service(
        job=name,
        grace_s=job.grace,
        writes=writes,
        credentials=there,
        has_hooks=bool(job.hooks),
        hooks_s=_hooks_s(job),
        is_command=bool(job.command) or job.client == "command",
        has_priority=bool(job.nice or job.io_class),
        quiesces=bool(job.quiesce),
    )
    return made_of, notes


def service_of_steps(
    name: str, config: Config, backed_up: Sequence[str], made: Program
) -> tuple[Service, list[str]]:
    """Do so for a job with steps: what it needs itself, and what the jobs that these back up."""
    own = service(name, config.job(name), made, has_client=name in backed_up)
    others = (service(each, config.job(each), made) for each in backed_up if each != name)
    found = [own, *others]
    return _together([each for each, _ in found]), [note for _, notes in found for note in notes]


def _together(services: Sequence[Service]) -> Service:
    """Return the service of the first job, with what the others' need."""
    limits = [each.hooks_s for each in services if each.hooks_s is not None]
    return Service(
        job=services[0].job,
        grace_s=max(each.grace_s for each in services),
        writes=tuple(dict.fromkeys(path for each in services for path in each.writes)),
        credentials={k: v for each in services for k, v in each.credentials.items()},
        has_hooks=any(each.has_hooks for each in services),
        hooks_s=max(limits) if len(limits) == len(services) else None,
        is_command=any(each.is_command for each in services),
        has_priority=any(each.has_priority for each in services),
        quiesces=any(each.quiesces for each in services),
        has_steps=True,
    )


def _hooks_s(job: Job) -> int | None:
    """Return how long all hooks and their undoing may take; None where nothing limits them."""
    if job.hooks and not job.hook_limit:
        return None
    return sum(1 + bool(hook.undo) for hook in job.hooks) * job.hook_limit


def _environment(job: Job, made: Program) -> dict[str, str]:
    """Return the client's environment in a service, as far as it is known outside of one."""
    env = {"PATH": _PATH, **made.environment, **job.environment}
    for variable, source in job.sources:
        try:
            env |= credentials.read(((variable, source),), {})
        except UserError:  # systemd's, or not there yet: it names no path that we could know
            continue
    return env


def _paths(job: Job, env: Mapping[str, str], notes: list[str]) -> Iterator[str]:
    """Yield what the client writes: its cache, a repository on this machine, its settings."""
    wanted = Settings(job.command, job.arguments, env, job.working_directory)
    try:
        chosen = choose_client(job.client, job.command, env)
    except UserError:  # a warning tells of it
        return
    try:
        yield from clients.load(chosen).live_paths(wanted)
    except AtomtxError as exc:
        notes.append(f"what its client writes is not known: {exc}")


def _credentials(job: Job) -> tuple[dict[str, str], list[str]]:
    """Return the files of systemd's credentials, and which are not there."""
    there, missing = {}, []
    for name in dict.fromkeys(each.credential for each in job.credentials.values()):
        if not name:
            continue
        files = units.credential_files(name)
        found = next((file for file in files if os.path.lexists(file)), None)
        there[name] = found or files[0]
        if found is None:
            missing.append(
                f"the credential {name} is not there: `systemd-creds encrypt --name={name} - "
                f"{files[0]}`"
            )
    return there, missing


# -- files -------------------------------------------------------------------------------------


def pages(
    config: Config,
    names: Sequence[str],
    schedule: Mapping[str, Any],
    made: Program,
    directory: Path,
    *,
    of_steps: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> tuple[dict[str, str], list[str]]:
    """
    Return the files to write, by their names below the directory, and what to know of them.

    *schedule* has fields of Schedule: what it says nothing of stays as it is in a timer that is
    there.  *of_steps* has of each job with steps the jobs that these back up.
    """
    found = {
        name: service_of_steps(name, config, of_steps[name], made)
        if name in of_steps
        else service(name, job, made)
        for name, job in config.jobs.items()
    }
    wanted = [found[name][0] for name in names]
    shared = units.files([each for each, _ in found.values()], made)
    texts = {name: shared[name] for name in units.SHARED}
    texts |= {name: text for name, text in units.files(wanted, made).items() if "/" in name}
    for name in names:
        file = units.timer_name(name)
        there = _text(directory / file)
        if schedule or there is None:
            before = Schedule() if there is None else units.schedule_of(there)
            texts[file] = units.timer(name, replace(before, **schedule))
    notes = [note for name in names for note in found[name][1]]
    notes += [
        f"job {name} is installed, and is not in {config.path}: its service will fail; "
        f"`atomtx uninstall systemd --job {name}` takes it away"
        for name in jobs_of(ours(directory))
        if name not in config.jobs
    ]
    return texts, notes


def check_shared(
    config: Config, names: Sequence[str], texts: Mapping[str, str], directory: Path
) -> None:
    """
    Refuse what would leave jobs that are installed without their configuration or state.

    The clean-up at boot and the notices of all jobs have one of each.  Raises UserError.
    """
    there = _text(directory / units.BACKUP)
    if there is None:
        return
    installed = jobs_of(ours(directory))
    left = (set(config.jobs), set(names))  # those of the new configuration; the new drop-ins
    for variable, known in zip(units.PASSED_ON, left, strict=True):
        others = [name for name in installed if name not in known]
        old, new = (_variable(text, variable) for text in (there, texts[units.BACKUP]))
        if others and old != new:
            raise UserError(
                f"job {others[0]} is installed with another {variable}: {old}",
                hint=f"nothing was changed; `atomtx uninstall systemd --job {others[0]}` first, "
                "or install all jobs from one configuration",
            )


def _variable(text: str, name: str) -> str:
    """Return a variable's value in a unit, as it is written there."""
    lines = (line.removeprefix("Environment=").strip('"') for line in text.splitlines())
    found = [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]
    return found[0] if found else {"ATOMTX_CONFIG": DEFAULT}.get(name, "the usual one")


def write(directory: Path, texts: Mapping[str, str]) -> list[str]:
    """
    Write what is not there or differs, each atomically; return the names of those.

    Raises UserError, before anything is written, for a file that is not ours.
    """
    foreign = [name for name in texts if not _is_ours_or_absent(directory / name)]
    if foreign:
        raise UserError(
            f"{directory / foreign[0]} was not written by `atomtx install systemd`",
            hint="nothing was changed; move it away, or look at `--print`",
        )
    changed = [name for name, text in texts.items() if _text(directory / name) != text]
    try:
        for name in changed:
            _replace(directory / name, texts[name])
    except OSError as exc:
        raise EffectError(f"cannot write {exc.filename or directory}: {exc.strerror}") from exc
    return changed


def _replace(path: Path, text: str) -> None:
    make_directory(path.parent, 0o755)
    new = path.with_name(_new(path.name))
    write_new(new, text, 0o644)
    try:
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _new(name: str) -> str:
    return f".{name}.new"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise EffectError(f"cannot read {path}: {exc.strerror}") from exc


def _is_ours_or_absent(path: Path) -> bool:
    text = None if path.is_symlink() else _text(path)
    return text.startswith(f"{units.MARKER}\n") if text is not None else not os.path.lexists(path)


def ours(directory: Path, names: Sequence[str] = ()) -> list[str]:
    """
    Return the names of our files that are there: those of some jobs, or all.

    In the order in which they are removed: what all jobs share is the last to go, because
    systemd disables no instance of a template that is not there.
    """
    drop_ins = (f"{units.instance(t, '*')}.d/{units.DROP_IN}" for t in units.SHARED[:2])
    patterns = ["atomtx@*.timer", *drop_ins, *reversed(units.SHARED)]
    if names:
        patterns = [
            pattern
            for name in names
            for pattern in (
                units.timer_name(name),
                *(f"{units.instance(t, name)}.d/{units.DROP_IN}" for t in units.SHARED[:2]),
            )
        ]
    found: list[Path] = []
    for pattern in map(PurePath, patterns):
        found += sorted(directory.glob(str(pattern.with_name(_new(pattern.name)))))
        found += filter(_is_ours_or_absent, sorted(directory.glob(str(pattern))))
    return [str(path.relative_to(directory)) for path in found]


def remove(directory: Path, names: Iterable[str]) -> None:
    """Remove files of ours, and the directories of drop-ins that are then empty; idempotent."""
    try:
        for name in names:
            path = directory / name
            if _is_ours_or_absent(path) or path.suffix == ".new":
                path.unlink(missing_ok=True)
            if path.parent != directory and path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()
        sync_directory(directory)
    except OSError as exc:
        raise EffectError(f"cannot remove {exc.filename}: {exc.strerror}") from exc


def jobs_of(names: Iterable[str]) -> list[str]:
    """Return the jobs to which files belong."""
    of_job = ("atomtx@", "atomtx-resume@")
    found = (name.partition("@")[2] for name in names if name.startswith(of_job))
    jobs = (rest.split("/")[0].removesuffix(".d").rpartition(".")[0] for rest in found)
    return [job for job in dict.fromkeys(jobs) if job]


# -- the service manager -----------------------------------------------------------------------


def is_booted() -> bool:
    """Tell whether systemd runs this machine: sd_booted(3)."""
    return os.path.isdir("/run/systemd/system")


def check_calendar(expression: str) -> None:
    """Raise UserError for what is no time of systemd's; systemd itself is asked."""
    if process.which("systemd-analyze") is None:
        return
    answer = process.run(["systemd-analyze", "calendar", "--", expression], timeout_s=_SYSTEMCTL_S)
    if not answer.ok:
        raise UserError(
            f"{expression!r} is no time for OnCalendar=",
            hint="such as 'Mon *-*-* 03:00' or daily; see systemd.time(7)",
        )


def systemctl(*words: str) -> None:
    """Run `systemctl`; EffectError with its own words where it fails."""
    answer = process.run(["systemctl", *words], timeout_s=_SYSTEMCTL_S)
    if not answer.ok:
        raise answer.error(f"systemctl {words[0]} failed", hint=f"`systemctl {' '.join(words)}`")


def start(names: Sequence[str]) -> None:
    """Let the service manager read the units, and start the timers of the jobs *names*."""
    systemctl("daemon-reload")
    resumed = [units.instance(units.RESUME, name) for name in names]
    systemctl("enable", units.RECOVER, *resumed)
    timers = [units.timer_name(name) for name in names]
    systemctl("enable", "--now", *timers)


def stop(directory: Path, found: Sequence[str]) -> None:
    """Stop the timers among our files, and start nothing at boot; a backup at work goes on."""
    timers = [name for name in found if name.endswith(".timer")]
    if timers:
        systemctl("disable", "--now", *timers)
    for name in timers:  # the time of its last start
        if "\nPersistent=true\n" in (_text(directory / name) or ""):
            systemctl("clean", "--what=state", name)
    resumed = [units.instance(units.RESUME, name) for name in jobs_of(found)]
    if resumed and (directory / units.RESUME).exists():  # else they were disabled before
        systemctl("disable", *resumed)
    if units.RECOVER in found:
        systemctl("disable", units.RECOVER)

"""
The units of systemd for the jobs of a configuration, as text.  Pure.

    atomtx@.service          backs up a job, once; or runs its steps
    atomtx@JOB.timer         starts it
    atomtx-recover.service   at boot: cleans up what needs no client and no network
    atomtx-resume@.service   at boot, when there is a network: goes on with the same moment
    atomtx-notify@.service   when one of these has ended: gives the notices that it left

What concerns one job is in a drop-in of its service and of its resumption, both the same but for
the command of a job with steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

MARKER = "# Written by `atomtx install systemd`, which replaces it; put changes into a drop-in."
DIRECTORY = "/etc/systemd/system"
CACHE = "/var/cache/atomtx"
RECOVER, NOTIFY = "atomtx-recover.service", "atomtx-notify@.service"
BACKUP, RESUME = "atomtx@.service", "atomtx-resume@.service"
DROP_IN = "10-job.conf"
SHARED = (BACKUP, RESUME, RECOVER, NOTIFY)
# Of each job, empty ones as well: what all jobs share may be written anew for another.
PASSED_ON = ("ATOMTX_CONFIG", "ATOMTX_STATE_DIR")
_STORES = ("/etc/credstore.encrypted", "/etc/credstore")
_STOP_S = 180  # for cleaning up, when the client has ended
_START_S = 900  # for cleaning up at boot
# What a program of the user's own may need: to become another user, and to signal one.
_FOR_HOOKS = ("CAP_KILL", "CAP_SETGID", "CAP_SETUID")
# And to write files as they are: other owners, devices, set-user-id.
_FOR_COMMANDS = (*_FOR_HOOKS, "CAP_FSETID", "CAP_MKNOD", "CAP_SETFCAP")
# No PrivateTmp=, ProtectKernelModules= and InaccessiblePaths=: each mounts something else over
# what may have to be backed up.  No PrivateDevices= and ProtectClock=: they close /dev/zfs and
# the disks.  No RestrictNamespaces=yes: the client is shown the snapshots in one of its own.
_CONFINED = """\
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths=/tmp /var/tmp -/etc/lvm -/run/lvm -/run/lock/lvm
ProtectHome=read-only
PrivateMounts=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelTunables=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=mnt
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service @mount fanotify_init fanotify_mark
SystemCallErrorNumber=EPERM
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_PTRACE
"""


@dataclass(frozen=True)
class Program:
    """How a unit starts `atomtx`: its words, and variables that it needs."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    has_lvm: bool = False  # on this machine


@dataclass(frozen=True)
class Service:
    """What the service of one job needs beyond what every job's has."""

    job: str
    grace_s: int
    writes: tuple[str, ...] = ()  # paths
    credentials: Mapping[str, str] = field(default_factory=dict)  # name -> file
    has_hooks: bool = False
    hooks_s: int | None = 0  # the longest that all of them take; None: without a limit
    is_command: bool = False  # its client is a program of the user's own
    has_priority: bool = False  # its configuration says how nice its client is
    quiesces: bool = False
    has_steps: bool = False  # `atomtx run` is what it does


@dataclass(frozen=True)
class Schedule:
    """When a job's timer starts its service."""

    on_calendar: tuple[str, ...] = ("daily",)
    is_persistent: bool = True
    randomized_delay_s: int = 0
    wakes: bool = False


def files(services: Sequence[Service], program: Program) -> dict[str, str]:
    """Return all units but the timers: their names below the directory, and their texts."""
    found = {
        BACKUP: _backup(program),
        RESUME: _resume(program),
        RECOVER: _recover(program, services),
        NOTIFY: _notify(program),
    }
    for service in services:
        drop_in = _drop_in(program, service)
        ran = _ran(program) if service.has_steps else ""
        found[f"{instance(BACKUP, service.job)}.d/{DROP_IN}"] = drop_in + ran
        found[f"{instance(RESUME, service.job)}.d/{DROP_IN}"] = drop_in
    return found


def instance(template: str, job: str) -> str:
    """Return the name of a template's instance: a job's name needs no escape, but see `%i`."""
    return template.replace("@.", f"@{job}.")


def timer_name(job: str) -> str:
    return f"atomtx@{job}.timer"


def credential_files(name: str) -> tuple[str, ...]:
    """Return where a credential may be, the best place first."""
    return tuple(f"{store}/{name}" for store in _STORES)


def word(text: str) -> str:
    """Return one word of a list in a unit: quoted and escaped where it must be."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    text = text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return f'"{text}"' if any(c in text for c in " \"'\\;#") or not text else text


# -- the units ---------------------------------------------------------------------------------


def _page(*lines: str) -> str:
    return "\n".join([MARKER, "", *lines]) + "\n"


def _command(program: Program, *words: str) -> str:
    first, *rest = map(word, program.words)  # in the first no variable is looked for
    return " ".join([first, *(each.replace("$", "$$") for each in rest), *words])


def _variables(program: Program, more: Mapping[str, str] | None = None) -> Iterator[str]:
    for name, value in {**program.environment, **(more or {})}.items():
        yield f"Environment={word(f'{name}={value}')}"


def _common(program: Program) -> list[str]:
    """Return what every service that acts on runs has."""
    return [
        "NotifyAccess=main",
        # 3: some files could not be read; 4: something is left to remove; 143: it was stopped.
        # These are told by a notice, and are no crash.
        "SuccessExitStatus=3 4 143",
        # A stop reaches atomtx alone, which stops the client in the client's own way.
        "KillMode=mixed",
        f"TimeoutStopSec={60 + _STOP_S}",
        # Where memory runs out, the client is what goes; atomtx cleans up, or tries again.
        "OOMPolicy=continue",
        *_variables(program, {"ATOMTX_NOTIFY_LATER": "1"}),
        "StateDirectory=atomtx",
        "StateDirectoryMode=0700",
        "CacheDirectory=atomtx",
        "CacheDirectoryMode=0700",
        "RuntimeDirectory=atomtx",
        "RuntimeDirectoryMode=0700",
        "RuntimeDirectoryPreserve=yes",
        "UMask=0077",
        "Nice=10",
        "IOSchedulingClass=idle",
        "LimitNOFILE=65536",
        "",
        *_CONFINED.splitlines(),
    ]


def _settle(program: Program) -> str:
    """Return the clean-up after a service, however it ended; it changes no result."""
    words = ("recover", "--stop", "--no-resume", "--job", "%i")
    return f"ExecStopPost=-{_command(program, *words)}"


def _backup(program: Program) -> str:
    # A confined service may load no module: at the first snapshot lvcreate would want this one.
    module = "modprobe@dm_snapshot.service"
    loaded = [f"Wants={module}", f"After={module}"] if program.has_lvm else []
    return _page(
        "[Unit]",
        "Description=Back up the job %i",
        "Wants=network-online.target",
        f"After=network-online.target local-fs.target remote-fs.target zfs.target {RECOVER}",
        *loaded,
        *_told(),
        "",
        "[Service]",
        "Type=oneshot",
        f"ExecStart={_command(program, 'backup', '--wait', '--on-stop', 'keep', '--job', '%i')}",
        _settle(program),
        *_common(program),
    )


def _unawaited() -> list[str]:
    """
    Return what keeps targets from waiting for a unit that they want: systemd.target(5).

    The resumption as well: it waits for the clean-up, and a target would with it.
    """
    return [
        "DefaultDependencies=no",
        "Requires=sysinit.target",
        "After=sysinit.target basic.target",
        "Conflicts=shutdown.target",
        "Before=shutdown.target",
    ]


def _resume(program: Program) -> str:
    return _page(
        "[Unit]",
        "Description=Go on with the interrupted backup of the job %i",
        *_unawaited(),
        "Wants=network-online.target",
        f"After=network-online.target local-fs.target remote-fs.target zfs.target {RECOVER}",
        *_told(),
        "",
        "[Service]",
        # It is started when its program is: the boot does not wait for an upload.
        "Type=exec",
        f"ExecStart={_command(program, 'recover', '--job', '%i')}",
        _settle(program),
        *_common(program),
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    )


def _recover(program: Program, services: Sequence[Service]) -> str:
    ours = [path for service in services for path in service.writes]
    limits = [service.hooks_s for service in services]
    hooks_s = None if None in limits else sum(each or 0 for each in limits)
    lines = [*_common(program), f"TimeoutStopSec={_span(60 + _STOP_S, hooks_s)}"]
    lines += _read_write(dict.fromkeys(ours))
    if any(service.has_hooks for service in services):
        lines.append(f"CapabilityBoundingSet={' '.join(_FOR_HOOKS)}")
    return _page(
        "[Unit]",
        "Description=Clean up after interrupted backups",
        *_unawaited(),
        "After=local-fs.target zfs-import.target zfs-mount.service",
        *_told(),
        "",
        "[Service]",
        "Type=oneshot",
        f"ExecStart={_command(program, 'recover', '--no-resume', '--no-wait')}",
        f"TimeoutStartSec={_span(_START_S, hooks_s)}",
        *lines,
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    )


def _notify(program: Program) -> str:
    """Return the unit that is not confined: a mailer is set-group-id, and has its own queue."""
    return _page(
        "[Unit]",
        "Description=Give the notices of %i",
        "Wants=network-online.target",
        "After=network-online.target",
        "",
        "[Service]",
        "Type=oneshot",
        f"ExecStart={_command(program, 'notify', '%i')}",
        "TimeoutStartSec=15min",
        *_variables(program),
    )


def _told() -> list[str]:
    """Return what starts the notices: always, for a drop-in's Environment= may ask for them."""
    # By two names: of a unit that both name, systemd does not tell the other one how it ended.
    failed, ended = (NOTIFY.replace("@.", f"@{each}.") for each in ("%N", "ended-%N"))
    return [f"OnFailure={failed}", f"OnSuccess={ended}"]


def _drop_in(program: Program, service: Service) -> str:
    own = {name: program.environment.get(name, "") for name in PASSED_ON}
    return _page("[Service]", *_variables(Program((), own)), *_of_job(service))


def _ran(program: Program) -> str:
    """Return what makes a service run the steps of its job; an empty one takes the other away."""
    command = _command(program, "run", "--wait", "--on-stop", "keep", "%i")
    return f"ExecStart=\nExecStart={command}\n"


def _of_job(service: Service) -> Iterator[str]:
    yield f"TimeoutStopSec={_span(service.grace_s + _STOP_S, service.hooks_s)}"
    yield from _read_write(service.writes)
    for name, path in service.credentials.items():
        kind = "LoadCredentialEncrypted" if path.startswith(_STORES[0]) else "LoadCredential"
        yield f"{kind}={name}:{path.replace('%', '%%')}"
    if service.is_command:
        yield f"CapabilityBoundingSet={' '.join(_FOR_COMMANDS)}"
        yield "RestrictSUIDSGID=no"
    elif service.has_hooks:
        yield f"CapabilityBoundingSet={' '.join(_FOR_HOOKS)}"
    if service.has_priority or service.quiesces:
        # The configuration's count, for the client alone; and what is frozen must not wait long.
        yield "Nice=0"
        yield "IOSchedulingClass=best-effort"


def _span(seconds: int, hooks_s: int | None) -> str:
    """Return a time limit: hooks are undone at a stop as well, and nothing cuts that short."""
    return "infinity" if hooks_s is None else str(seconds + hooks_s)


def _read_write(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        yield f"ReadWritePaths={word(f'-{path}')}"  # "-": also where it is not there yet


def schedule_of(timer: str) -> Schedule:
    """Return the schedule of a timer that was written here: the other way of `timer`."""
    lines = [line.partition("=")[::2] for line in timer.splitlines()]
    found = dict(lines)
    delay = found.get("RandomizedDelaySec", "")
    return Schedule(
        tuple(value for name, value in lines if name == "OnCalendar") or Schedule.on_calendar,
        is_persistent="Persistent" in found,
        randomized_delay_s=int(delay) if delay.isdecimal() else 0,
        wakes="WakeSystem" in found,
    )


def timer(job: str, schedule: Schedule) -> str:
    """Return a job's timer."""
    lines = [f"OnCalendar={each}" for each in schedule.on_calendar]
    if schedule.is_persistent:
        lines.append("Persistent=true")
    if schedule.randomized_delay_s:
        lines.append(f"RandomizedDelaySec={schedule.randomized_delay_s}")
    else:
        lines.append("AccuracySec=1s")
    if schedule.wakes:
        lines.append("WakeSystem=true")
    return _page(
        "[Unit]",
        f"Description=Back up the job {job} in time",
        "",
        "[Timer]",
        *lines,
        "",
        "[Install]",
        "WantedBy=timers.target",
    )

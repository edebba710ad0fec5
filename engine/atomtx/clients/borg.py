"""
borg 1.2 to 1.4, and wrappers of it that pass their arguments on.

Its files cache goes by the absolute path, so the live paths make it serve.  SIGINT is the stop
signal: borg then writes a checkpoint, and the next attempt sends only the rest; after a SIGTERM
all since the last checkpoint is lost.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC

from .. import process
from ..errors import UserError
from ..redact import check_arguments
from . import Backup, Facts, Launch, Moment, Settings
from .borg_locks import has_own_address, remove_stale
from .borg_reader import BorgReader, said_of
from .program import (
    Option,
    Syntax,
    absolute,
    ask,
    document_of,
    find,
    keeping_some,
    program,
    refuse,
    rules,
    things,
)

Version = tuple[int, int]

OLDEST: Version = (1, 2)
_TOO_NEW: Version = (2, 0)
_LOCK_WAIT = "--lock-wait=600"
_SPANS = ("secondly", "minutely", "hourly", "daily", "weekly", "monthly", "yearly")
_RULES = frozenset(
    [
        *(f"--keep-{span}" for span in (*_SPANS, "last", "within")),
        *("--keep-13weekly", "--keep-3monthly"),  # from 1.4 on
    ]
)

_GLOBAL_VALUED = frozenset(
    [
        "--debug-topic",
        "--lock-wait",
        "--remote-buffer",
        "--remote-path",
        "--remote-ratelimit",
        "--rsh",
        "--socket",
        "--umask",
        "--upload-buffer",
        "--upload-ratelimit",
    ]
)
_OTHER_VALUED = frozenset(
    [
        "--checkpoint-interval",
        "--chunker-params",
        "--comment",
        "--compression",
        "--debug-profile",
        "--exclude",
        "--exclude-from",
        "--exclude-if-present",
        "--files-cache",
        "--filter",
        "--paths-delimiter",
        "--pattern",
        "--patterns-from",
        "--stdin-group",
        "--stdin-mode",
        "--stdin-name",
        "--stdin-user",
        "--timestamp",
    ]
)
_SYNTAX = Syntax(
    valued=_GLOBAL_VALUED | _OTHER_VALUED,
    short={
        "-C": "--compression",
        "-c": "--checkpoint-interval",
        "-e": "--exclude",
        "-h": "--help",
        "-n": "--dry-run",
        "-p": "--progress",
        "-s": "--stats",
        "-v": "--info",
        "-x": "--one-file-system",
    },
)
_STREAM = "atomtx backs up the files of snapshots, not a stream"
_OWN_PATHS = "atomtx itself names what to back up"
_QUIET = "atomtx reads the warnings: they tell which files could not be read"
_REFUSED = {
    "--bypass-lock": "without its lock the repository could be damaged",
    "--content-from-command": _STREAM,
    "--critical": _QUIET,
    "--dry-run": "nothing would be saved; `atomtx backup --dry-run` prints the plan",
    "--error": _QUIET,
    "--help": "nothing would be saved",
    "--one-file-system": "each snapshot is a file system of its own, and those below another "
    "would be saved as empty directories without a warning; name the datasets instead",
    "--paths-delimiter": _OWN_PATHS,
    "--paths-from-command": _OWN_PATHS,
    "--paths-from-stdin": _OWN_PATHS,
    "--patterns-from": "such a file can name more to back up; use --exclude-from or --pattern",
    "--show-version": "atomtx asks for it",
    "--stdin-group": _STREAM,
    "--stdin-mode": _STREAM,
    "--stdin-name": _STREAM,
    "--stdin-user": _STREAM,
    "--timestamp": "the time of a backup is the time of its snapshots",
}
_SAID_ANYWAY = ("--json", "--log-json", "--progress", "--stats")
_NAMES = _SYNTAX.valued | frozenset(_REFUSED) | frozenset(_SAID_ANYWAY)
_REMOTE = re.compile(r"ssh://|(?:[^@:/]+@)?(?:\[[0-9a-fA-F:.]+\]|[^:/]+):(?!//)")
_SLUG_CHARS = 40


def _options(settings: Settings) -> tuple[Option, ...]:
    """Read the user's options; a :class:`UserError` for one that breaks a promise."""
    options = _SYNTAX.parse(settings.extra)
    check_arguments([option.word for option in options])
    refuse(options, _REFUSED, "borg")
    for option in options:
        _check_option(option)
    return tuple(option for option in options if option.name not in _SAID_ANYWAY)


def _check_option(option: Option) -> None:
    """Refuse what would be read as another option, or names a path to back up."""
    # argparse takes the beginning of an option for the option.
    long = option.name.startswith("--") and option.name not in _NAMES
    whole = [name for name in sorted(_NAMES) if long and name.startswith(option.name)]
    if whole:
        raise UserError(f"borg would read {option.name} as {whole[0]}", hint="write it in full")
    if option.name == "--pattern" and (option.value or "").startswith(("R", "r")):
        raise UserError(f"cannot pass --pattern={option.value} to borg: {_OWN_PATHS}")


def _globals(options: Iterable[Option]) -> tuple[str, ...]:
    """Return what also `list`, `prune` and `extract` must be told: how to connect."""
    return tuple(option.word for option in options if option.name in _GLOBAL_VALUED)


def _english(settings: Settings) -> Settings:
    """Return *settings* in a locale of UTF-8, without which borg's JSON may be none."""
    return replace(settings, env={**settings.env, "LC_ALL": "C.UTF-8"})


def _parse_version(text: str) -> Version | None:
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def check_version(text: str) -> None:
    """Raise UserError for a version of borg that lacks what is used of it, or is another one."""
    version = _parse_version(text)
    if version is None or not OLDEST <= version < _TOO_NEW:
        raise UserError(f"borg {text} cannot be used", hint="atomtx needs borg 1.2, 1.3 or 1.4")


def local_repository(location: str) -> str | None:
    """
    Return the path of a repository in the file system; None for any other.

    Of one with placeholders, the folder above the first: what they become is borg's to say.
    """
    if not location or _REMOTE.match(location):
        return None
    path, brace, _ = location.removeprefix("file://").partition("{")
    return os.path.dirname(path) if brace else path


def archive_prefix(paths: Iterable[str]) -> str:
    """
    Return how all archives of this host and of exactly *paths* begin, and no others.

    borg prunes by name alone, so the name has to tell what restic has as host and paths.
    """
    paths = sorted(paths)
    digest = hashlib.sha256("\0".join(paths).encode(errors="surrogateescape"))
    first = _plain(paths[0]).strip("-")[:_SLUG_CHARS] or "root"
    return f"{_plain(os.uname().nodename)}-{first}-{digest.hexdigest()[:8]}"


def _plain(text: str) -> str:
    """Return *text* without what means something in a location, a placeholder or a pattern."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text)


def _archive(moment: Moment) -> str:
    """Return the name of a backup: one of a lost attempt, or run, may be there already."""
    again = f"-{moment.run}" if moment.is_kept else ""
    again += f"-{moment.attempt}" if moment.attempt > 1 else ""
    at = f"{moment.at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    return f"{archive_prefix(moment.sources)}-{at}{again}"


def _excluded(moment: Moment) -> Iterator[str]:
    """Yield the excludes first: of several patterns the first that matches counts."""
    root = moment.root if moment.whole else ""
    for path in moment.excludes:
        yield f"--exclude=pp:{(root.rstrip('/') + path).lstrip('/')}"


def _targets(moment: Moment) -> tuple[str, ...]:
    """Return the arguments: borg stores paths without their first slash in any case."""
    if moment.whole or not moment.root:
        return moment.sources
    return tuple(target.lstrip("/") or "." for target in moment.targets)


def _anchored_repository(settings: Settings) -> dict[str, str]:
    """Return a relative repository made absolute, as a variable; nothing for any other."""
    location = settings.env.get("BORG_REPO", "")
    if not location or _REMOTE.match(location) or location.startswith(("/", "file://")):
        return {}
    return {"BORG_REPO": os.path.join(settings.cwd, location)}


def _anchored(options: Iterable[Option], cwd: str) -> Iterator[Option]:
    for option in options:
        if option.name == "--exclude-from" and option.value:
            yield Option(option.name, os.path.join(cwd, option.value))
        else:
            yield option


_NO_PASSPHRASE = UserError(
    "borg: there is no passphrase for the repository",
    hint="set BORG_PASSCOMMAND, or BORG_PASSPHRASE as a credential of a job: nobody can be asked",
)


def _check_descriptor(env: Mapping[str, str]) -> None:
    if "BORG_PASSPHRASE_FD" in env and not {"BORG_PASSPHRASE", "BORG_PASSCOMMAND"} & set(env):
        raise UserError(
            "borg: the descriptor of BORG_PASSPHRASE_FD does not reach the client",
            hint="set BORG_PASSCOMMAND, such as 'cat /etc/atomtx/borg.passphrase'",
        )


def _temporary() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="atomtx-borg-")
    except OSError as exc:
        raise UserError(
            f"borg: a temporary directory cannot be made: {exc.strerror}",
            hint="set TMPDIR to a directory that can be written",
        ) from exc


def _unusable(answer: process.Completed, settings: Settings) -> UserError:
    """Return the error that tells why the repository cannot be used, in one line."""
    # Judged as it came: a passphrase may be one of the words that are looked for.
    text, said = answer.stderr, settings.redact(said_of(answer))
    if "NoPassphraseFailure" in text or "PasswordRetriesExceeded" in text:
        return _NO_PASSPHRASE
    if "PasscommandFailure" in text:
        return UserError(f"borg: BORG_PASSCOMMAND failed: {said}")
    if "PassphraseWrong" in text:
        return UserError("borg: the passphrase is wrong for this repository")
    if "Invalid location format" in text:
        return UserError("borg: no repository is named", hint="set BORG_REPO")
    for variable, what in (
        ("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "unencrypted, and was never used here"),
        ("BORG_RELOCATED_REPO_ACCESS_IS_OK", "not where it was"),
    ):
        if variable in text:
            return UserError(
                f"borg: the repository is {what}: nobody can be asked whether that is right",
                hint=f"`borg list` asks it once; or set {variable}=yes",
            )
    if "DoesNotExist" in text or "InvalidRepository" in text:
        return UserError(
            f"borg: the repository is absent or out of reach: {said}",
            hint="is its disk mounted, its server up? `borg init` makes a new one",
        )
    return UserError(f"borg: the repository cannot be used: {said}")


class Borg:
    """Backs up with `borg create --json --log-json`."""

    name = "borg"
    stop_signal = signal.SIGINT

    def inspect(self, settings: Settings) -> Facts:
        """
        Ask for the version and the repository's id; makes nothing but borg's own records of it.

        Without its lock, which another machine's backup may hold for hours.
        """
        settings = _english(settings)
        argv = program(settings, "borg")
        options = _options(settings)
        find(argv, settings)
        _check_descriptor(settings.env)
        version, notes = self._version(argv, settings)
        answer = self._list((*argv, "list"), _globals(options), settings)
        found = document_of(answer.stdout)
        if not answer.ok or not found or "repository" not in found:
            raise _unusable(answer, settings)
        return Facts(version, str(found["repository"]["id"]), notes)

    def _list(
        self, argv: tuple[str, ...], own: tuple[str, ...], settings: Settings
    ) -> process.Completed:
        # Nor with the lock of the cache, which --bypass-lock does not pass by: with an empty one.
        with _temporary() as cache:
            elsewhere = replace(settings, env={**settings.env, "BORG_CACHE_DIR": cache})
            question = ("--json", "--log-json", "--bypass-lock", "--first=1")
            return ask((*argv, *question, *own), elsewhere)

    def _version(self, argv: tuple[str, ...], settings: Settings) -> tuple[str, tuple[str, ...]]:
        """Return the version, and what to know; a wrapper may not tell it."""
        notes = []
        if not settings.env.get("BORG_HOST_ID") and not has_own_address():
            notes.append(
                "this machine has no MAC address, by which borg knows its own locks: "
                "set BORG_HOST_ID, or the lock of a borg that was killed stays"
            )
        match = re.search(r"\bborg\S* v?(\d+\.\d+\S*)", ask((*argv, "--version"), settings).stdout)
        if not match:
            oldest = "{}.{}".format(*OLDEST)
            notes.append(f"{argv[0]} does not tell borg's version: taken for {oldest}")
            return oldest, tuple(notes)
        check_version(match[1])
        return match[1], tuple(notes)

    def check(
        self,
        settings: Settings,
        targets: tuple[str, ...],
        excludes: tuple[str, ...],
        root: str = "",
    ) -> None:
        """Do nothing: borg leaves out any path."""

    def live_paths(self, settings: Settings) -> tuple[str, ...]:
        """Return the cache, what borg knows of repositories, a local one, TMPDIR, the agent."""
        return absolute(self._live_paths(settings), settings.cwd)

    def _live_paths(self, settings: Settings) -> Iterator[str]:
        env = settings.env
        yield from self.folders(settings)
        location = env.get("BORG_REPO", "")
        repository = local_repository(location)
        if repository is not None:
            yield repository
        elif location and env.get("SSH_AUTH_SOCK"):
            yield env["SSH_AUTH_SOCK"]  # not its folder: gpg-agent's holds the keys
        if env.get("TMPDIR"):
            yield env["TMPDIR"]

    def folders(self, settings: Settings) -> tuple[str, ...]:
        """Return the cache, which `inspect` does without, and what borg knows of repositories."""
        env = settings.env
        cache = _folder(env, "BORG_CACHE_DIR", "XDG_CACHE_HOME", ".cache")
        config = _folder(env, "BORG_CONFIG_DIR", "XDG_CONFIG_HOME", ".config")
        security = env.get("BORG_SECURITY_DIR") or os.path.join(config, "security")
        return absolute((cache, security), settings.cwd)

    def launch(self, settings: Settings, facts: Facts, moment: Moment) -> Launch:
        """Return one `borg create`; its own options first, so that the user's count."""
        options = _options(settings)
        env = {"LC_ALL": "C.UTF-8"}
        if "BORG_EXIT_CODES" not in settings.env:
            env["BORG_EXIT_CODES"] = "modern"
        if moment.root:
            options = tuple(_anchored(options, settings.cwd))
            env |= _anchored_repository(settings)
        argv = (
            *(*program(settings, "borg"), "create", "--json", "--log-json", "--progress"),
            *(f"--timestamp={moment.at.astimezone(UTC):%Y-%m-%dT%H:%M:%S}", _LOCK_WAIT),
            *_excluded(moment),
            *(option.word for option in options),
            *("--", f"::{_archive(moment)}", *_targets(moment)),
        )
        return Launch((argv,), moment.root or settings.cwd, env)

    def reader(self, moment: Moment) -> BorgReader:
        return BorgReader(moment)

    def lacks(self, settings: Settings) -> tuple[str, ...]:
        """Return the repository and the passphrase, where no variable has them."""
        said = things(settings)
        wanted = {
            "BORG_REPO": "repository (BORG_REPO)",
            "BORG_PASSPHRASE": "passphrase (BORG_PASSPHRASE) for a repository that is encrypted",
        }
        return tuple(what for name, what in wanted.items() if name not in said)

    def policy(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """Return the rules of `borg prune`."""
        return keeping_some(rules(words, _RULES, "borg"), "borg")

    def stored_paths(self, moment: Moment) -> tuple[str, ...]:
        """Return the paths that the archives' names tell of: of a tree, the live ones."""
        return moment.sources

    def forgetting(
        self, settings: Settings, facts: Facts, paths: tuple[str, ...], policy: tuple[str, ...]
    ) -> tuple[tuple[str, ...], ...]:
        """Return `borg prune` of the archives that are named so, then `borg compact`."""
        argv = program(settings, "borg")
        own = (_LOCK_WAIT, *_globals(_options(settings)))
        names = f"--glob-archives={archive_prefix(paths)}-*"
        return (*argv, "prune", names, *policy, *own), (*argv, "compact", *own)

    def after_loss(self, settings: Settings, facts: Facts) -> tuple[str, ...]:
        """
        Remove the locks of this machine's processes that are gone, from what can be seen here.

        A repository behind ssh is locked by its server's process, which ends with ours.
        """
        cache = _folder(settings.env, "BORG_CACHE_DIR", "XDG_CACHE_HOME", ".cache")
        locked = [os.path.join(cache, facts.repository)] if facts.repository else []
        repository = local_repository(settings.env.get("BORG_REPO", ""))
        locked += [repository] if repository is not None else []
        host_id = settings.env.get("BORG_HOST_ID")
        return tuple(
            line for path in absolute(locked, settings.cwd) for line in remove_stale(path, host_id)
        )

    def restore_command(
        self, settings: Settings, facts: Facts, backup: Backup, to: str
    ) -> tuple[str, ...]:
        """
        Return the command: `borg extract` knows no other place than the current directory.

        Holes in files are made again where there are zeros.
        """
        env = [f"{name}={value}" for name, value in _anchored_repository(settings).items()]
        extract = (
            *(*program(settings, "borg"), "extract", "--sparse"),
            *(*_globals(_options(settings)), f"::{backup.backup_id}"),
        )
        there = ("sh", "-c", 'mkdir -p -- "$0" && cd -- "$0" && exec "$@"', to)
        return (*(("env", *env) if env else ()), *there, *extract)


def _folder(env: Mapping[str, str], own: str, xdg: str, below_home: str) -> str:
    """Return the folder that *own* names, or borg's default for it."""
    if env.get(own):
        return env[own]
    home = env.get("HOME") or os.path.expanduser(f"~{env.get('USER', '')}")
    base = env.get("BORG_BASE_DIR")
    folder = (not base and env.get(xdg)) or os.path.join(base or home, below_home)
    return os.path.join(folder, "borg")

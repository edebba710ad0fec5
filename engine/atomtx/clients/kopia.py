"""
kopia 0.23, and wrappers of it that pass their arguments on.

Its exit status tells little: 0 also when a signal cut the backup short, 1 also when all but one
file was saved.  The manifest that it prints for each source tells whole from partial.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC
from fnmatch import fnmatchcase
from typing import Any

from .. import process
from ..errors import UserError
from ..names import is_within
from ..redact import check_arguments
from . import Backup, Facts, Launch, Moment, Settings
from .kopia_reader import KopiaReader
from .program import (
    Option,
    Syntax,
    absolute,
    ask,
    document_of,
    ended,
    find,
    home_folder,
    last_value,
    program,
    refuse,
    rules,
)

_GLOBAL_VALUED = frozenset(
    {"--config-file", "--file-log-level", "--log-dir", "--log-file", "--log-level", "--password"}
)
_GLOBAL = _GLOBAL_VALUED | {
    "--disable-content-log",
    "--disable-file-logging",
    "--no-use-keyring",
    "--use-keyring",
}
_SYNTAX = Syntax(
    valued=_GLOBAL_VALUED
    | {
        "--checkpoint-interval",
        "--description",
        "--end-time",
        "--force-hash",
        "--log-dir-detail",
        "--log-entry-detail",
        "--override-source",
        "--parallel",
        "--pin",
        "--progress-estimation-type",
        "--progress-update-interval",
        "--start-time",
        "--stdin-file",
        "--tags",
        "--upload-limit-mb",
    },
    short={"-p": "--password"},
)
_TIME = "the time of a backup is the time of its snapshots"
_REFUSED = {
    "--all": "atomtx itself names what to back up",
    "--end-time": _TIME,
    "--help": "nothing would be saved",
    "--json-indent": "atomtx reads one manifest a line",
    "--no-json": "atomtx reads the result as JSON",
    "--override-source": "atomtx itself names the source",
    "--start-time": _TIME,
    "--stdin-file": "atomtx backs up the files of snapshots, not a stream",
    "--upload-limit-mb": "the backup would not be whole",
}
_FILE_OPTIONS = ("--config-file", "--log-dir", "--log-file")
_NOTES = (
    "kopia does not keep hard links (they become copies), extended attributes, ACLs, "
    "file capabilities or special files",
    "kopia leaves out what its policies ignore, and directories with a CACHEDIR.TAG",
    "kopia applies its retention policy after each backup, and its maintenance when that is due",
)
_RULES = frozenset(
    f"--keep-{span}" for span in ("latest", "hourly", "daily", "weekly", "monthly", "annual")
)


def _options(settings: Settings) -> tuple[Option, ...]:
    """Read the user's options; a :class:`UserError` for one that breaks a promise."""
    options = _SYNTAX.parse(settings.extra)
    check_arguments([option.word for option in options])
    refuse(options, _REFUSED, "kopia")
    return tuple(option for option in options if option.name not in ("--json", "--progress"))


def _globals(options: Iterable[Option]) -> tuple[str, ...]:
    return tuple(option.word for option in options if option.name in _GLOBAL)


def _anchored(options: Iterable[Option], cwd: str) -> Iterator[Option]:
    """Make the files in *options* absolute; a bare name of a configuration is not a path."""
    for option in options:
        if option.name in _FILE_OPTIONS and "/" in (option.value or ""):
            yield Option(option.name, os.path.join(cwd, option.value or ""))
        else:
            yield option


def _config_file(settings: Settings) -> str | None:
    """Return where the connection to the repository is described; None without a home."""
    env = settings.env
    named = last_value(_options(settings), "--config-file") or env.get("KOPIA_CONFIG_PATH")
    if named and "/" in named:
        return os.path.join(settings.cwd, named)
    for folder in home_folder(env, "XDG_CONFIG_HOME", ".config"):
        return os.path.join(settings.cwd, folder, "kopia", named or "repository.config")
    return None


def _config(path: str | None) -> dict[str, Any]:
    try:
        with open(path or "", encoding="utf-8") as file:
            return document_of(file.read()) or {}
    except (OSError, UnicodeDecodeError):
        return {}


def _source(path: str, config: Mapping[str, Any]) -> str:
    """
    Return the source under which the backup of *path* is kept.

    In full where it can be known: kopia would take an `@` in a bare path for a user's name.
    """
    user, host = config.get("username"), config.get("hostname")
    return f"{user}@{host}:{path}" if user and host else path


def _unusable(answer: process.Completed, settings: Settings) -> UserError:
    """Return the error that tells why the repository cannot be used, in one line."""
    # Judged as it came: a password may be one of the words that are looked for.
    text = answer.stderr
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = settings.redact(lines[-1] if lines else ended(answer.status))
    if "is not connected" in text:
        return UserError(
            "kopia is not connected to a repository", hint="`kopia repository connect`"
        )
    if "password prompt error" in text:
        return UserError(
            "kopia: there is no password for the repository",
            hint="set KOPIA_PASSWORD, or connect with --persist-credentials: nobody can be asked",
        )
    if "invalid repository password" in text:
        return UserError("kopia: the password is wrong for this repository")
    return UserError(f"kopia: the repository is absent or out of reach: {said}")


def ignore_rule(path: str, target: str) -> str:
    """Return the rule of a policy of *target* that leaves out exactly *path*."""
    return "/" + re.sub(r"([\\*?\[ ])", r"\\\1", os.path.relpath(path, target))


def _parents(path: str, target: str) -> list[str]:
    """Return *path* and its parents below *target*, relative to it."""
    parts = os.path.relpath(path, target).split("/")
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def _matches(rule: str, relative: str) -> bool:
    pattern = rule.rstrip("/")
    if "/" not in pattern:
        return fnmatchcase(os.path.basename(relative), pattern)
    words, names = pattern.lstrip("/").split("/"), relative.split("/")
    pairs = zip(names, words, strict=False)
    return len(words) == len(names) and all(fnmatchcase(name, word) for name, word in pairs)


def is_ignored(path: str, target: str, rules: Iterable[str]) -> bool:
    """
    Tell whether *rules* of a policy (in the syntax of .gitignore) leave *path* out for certain.

    Only what is sure: `**` is not understood here, and a negated rule never counts.
    """
    parents = _parents(path, target)
    exact = {ignore_rule(os.path.join(target, parent), target) for parent in parents}
    return any(
        rule.rstrip("/") in exact or any(_matches(rule, parent) for parent in parents)
        for rule in rules
        if rule.strip() and rule[0] not in "!#" and "**" not in rule
    )


def _is_tagged(path: str) -> bool:
    """Tell whether kopia leaves out the content of *path* as a cache."""
    try:
        with open(os.path.join(path, "CACHEDIR.TAG"), "rb") as file:
            return file.read(43) == b"Signature: 8a477f597d28d172789f06886806bc55"
    except OSError:
        return False


class Kopia:
    """Backs up with `kopia snapshot create --json`."""

    name = "kopia"
    stop_signal = signal.SIGTERM

    def inspect(self, settings: Settings) -> Facts:
        """Ask for the version and the repository's id, changing nothing."""
        argv = program(settings, "kopia")
        options = _options(settings)
        find(argv, settings)
        match = re.search(r"\bv?(\d+\.\d+[.\d]*)", ask((*argv, "--version"), settings).stdout)
        status = ("repository", "status", "--json")
        answer = ask((*argv, *status, *_globals(options)), settings)
        found = document_of(answer.stdout)
        if not answer.ok or found is None:
            raise _unusable(answer, settings)
        repository = found.get("uniqueIDHex")
        return Facts(match[1] if match else "", repository and str(repository), _NOTES)

    def check(
        self, settings: Settings, targets: tuple[str, ...], excludes: tuple[str, ...]
    ) -> None:
        """
        Raise a :class:`UserError` unless kopia's policies do what this backup needs.

        kopia has no option to leave a path out, so its policy must ignore each of *excludes*;
        and none may keep it from the file systems below a target, where it skips silently.
        """
        for target in targets:
            policy = self._policy(settings, target)
            if policy.get("oneFileSystem"):
                raise UserError(
                    f"kopia's policy for {target} keeps it on one file system: each snapshot is "
                    "one of its own, and those below would be left out without a warning",
                    hint=f"`{_command('kopia', 'policy', 'set', target)} --one-file-system=false`",
                )
            self._check_target(target, policy, [e for e in excludes if is_within(e, target)])

    def _policy(self, settings: Settings, target: str) -> dict[str, Any]:
        """Return the part about files of the policy that is in effect for *target*."""
        argv = (*program(settings, "kopia"), "policy", "show", "--json", target)
        answer = ask((*argv, *_globals(_options(settings))), settings)
        policy = document_of(answer.stdout)
        if not answer.ok or policy is None:
            raise _unusable(answer, settings)
        files = policy.get("files")
        return files if isinstance(files, dict) else {}

    def _check_target(self, target: str, policy: Mapping[str, Any], excludes: list[str]) -> None:
        rules = [str(rule) for rule in policy.get("ignore") or ()]
        tagged = policy.get("ignoreCacheDirs", True)
        missing = [
            path
            for path in excludes
            if not is_ignored(path, target, rules) and not (tagged and _is_tagged(path))
        ]
        if not missing:
            return
        if target in missing:
            raise UserError(f"kopia cannot leave out {target}, which it is to back up")
        # Rules of a target replace those that it inherits: they have to be said again.
        wanted = [*rules, *(ignore_rule(path, target) for path in missing)]
        words = [word for rule in wanted for word in ("--add-ignore", rule)]
        raise UserError(
            f"kopia's policy for {target} does not ignore {', '.join(missing)}, which must stay "
            "live while kopia runs, and cannot be told otherwise",
            hint=f"`{_command('kopia', 'policy', 'set', target, *words)}`",
        )

    def live_paths(self, settings: Settings) -> tuple[str, ...]:
        """Return the folders of configuration, cache and logs, a local repository, TMPDIR."""
        return absolute(self._live_paths(settings), settings.cwd)

    def _live_paths(self, settings: Settings) -> Iterator[str]:
        env, options = settings.env, _options(settings)
        file = _config_file(settings)
        config = _config(file)
        if file is not None:
            folder = os.path.dirname(file)
            yield folder
            # Written relative to the configuration (repo/local_config.go).
            cache = config.get("caching", {}).get("cacheDirectory")
            yield from [os.path.join(folder, cache)] if cache else []
        logs = last_value(options, "--log-dir") or env.get("KOPIA_LOG_DIR")
        caches = home_folder(env, "XDG_CACHE_HOME", ".cache")
        yield from [logs] if logs else [os.path.join(folder, "kopia") for folder in caches]
        storage = config.get("storage", {})
        if storage.get("type") == "filesystem":
            yield storage["config"]["path"]
        yield from [env["TMPDIR"]] if env.get("TMPDIR") else []

    def launch(self, settings: Settings, facts: Facts, moment: Moment) -> Launch:
        """Return one command for all live targets, or one for each target of a tree."""
        env = {"KOPIA_CHECK_FOR_UPDATES": "false"}
        options = tuple(option.word for option in _anchored(_options(settings), settings.cwd))
        time = f"{moment.at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        argv = (
            *(*program(settings, "kopia"), "snapshot", "create", "--json"),
            *("--progress", "--progress-update-interval=1s", f"--start-time={time}", *options),
        )
        if not moment.root:
            return Launch(((*argv, *moment.targets),), settings.cwd, env)
        if moment.whole:
            return Launch(((*argv, moment.root),), settings.cwd, env)
        config, root = _config(_config_file(settings)), moment.root.rstrip("/")
        # One command each: an overridden source counts for every directory of a command.
        commands = tuple(
            (*argv, f"--override-source={_source(target, config)}", root + target)
            for target in moment.targets
        )
        return Launch(commands, settings.cwd, env)

    def reader(self, moment: Moment) -> KopiaReader:
        return KopiaReader(moment)

    def policy(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """Return the rules of `kopia policy set`."""
        return rules(words, _RULES, "kopia")

    def stored_paths(self, moment: Moment) -> tuple[str, ...]:
        """Return the sources' paths: of a tree, the live ones."""
        return moment.sources

    def forgetting(
        self, settings: Settings, paths: tuple[str, ...], policy: tuple[str, ...]
    ) -> tuple[tuple[str, ...], ...]:
        """Return what sets each source's policy and applies it; kopia keeps it from then on."""
        argv, config = program(settings, "kopia"), _config(_config_file(settings))
        own = _globals(_options(settings))
        sources = [_source(path, config) for path in paths]
        set_ = [(*argv, "policy", "set", *policy, *own, source) for source in sources]
        expire = (*argv, "snapshot", "expire", "--delete", *own, *sources)
        return (*set_, expire)

    def after_loss(self, settings: Settings, facts: Facts) -> tuple[str, ...]:
        """Do nothing: kopia has no locks, and uses again what it finds."""
        return ()

    def restore_command(self, settings: Settings, backup: Backup, to: str) -> tuple[str, ...]:
        """Return the command; of a source that had not changed, its newest backup is named."""
        source = backup.backup_id or (backup.paths[0] if backup.paths else "")
        words = ("snapshot", "restore", source, to)
        return (*program(settings, "kopia"), *words, *_globals(_options(settings)))


def _command(*words: str) -> str:
    return process.abridged(words, limit=2000)

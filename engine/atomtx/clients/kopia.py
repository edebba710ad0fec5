"""
kopia 0.23, and wrappers of it that pass their arguments on.

Its exit status tells little: 0 also when a signal cut the backup short, 1 also when all but one
file was saved.  The manifest that it prints for each source tells whole from partial.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    objects_of,
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
_SET = ("kopia", "policy", "set")
_REMEMBERED = ".kopia-password"
_FILE_OPTIONS = ("--config-file", "--log-dir", "--log-file")
_NOTES = (
    "kopia does not keep hard links (they become copies), extended attributes, ACLs, "
    "file capabilities, special files or the times of directories",
    "kopia leaves out what its policies ignore, and directories with a CACHEDIR.TAG",
    "kopia applies its retention policy after each backup, and its maintenance when that is due",
)
_NO_POLICIES = "what kopia printed of its policies is no list of them"
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


def is_connected(env: Mapping[str, str]) -> bool:
    """Tell whether the connection to a repository is described where the environment has it."""
    return os.path.exists(_config_file(Settings((), (), env, "")) or "")


def _config_file(settings: Settings) -> str | None:
    """
    Return where the connection to the repository is described; None without a home.

    kopia looks for a name alone in its own folder.
    """
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


def _typed(path: str, config: Mapping[str, Any]) -> str:
    """Return the source as short as kopia understands it: `@home` is a common subvolume."""
    return _source(path, config) if "@" in path else path


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


def _is_of(target: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Tell whether a policy may be of the user and host of this connection."""
    pairs = (("userName", "username"), ("host", "hostname"))
    return all(not config.get(ours) or target[theirs] == config[ours] for theirs, ours in pairs)


def _check_crossing(path: str, files: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    if files.get("oneFileSystem"):
        raise UserError(
            f"kopia's policy for {path} keeps it on one file system: each snapshot is "
            "one of its own, and those below would be left out without a warning",
            hint=f"`{_command(*_SET, _typed(path, config))} --one-file-system=false`",
        )


def _ignores(files: Mapping[str, Any]) -> list[str]:
    return [str(rule) for rule in files.get("ignore") or ()]


def _may_take_back(rule: str, path: str, target: str) -> bool:
    """Tell whether a negated rule of a policy of *target* may take back that *path* is ignored."""
    return rule.startswith("!") and ("**" in rule or is_ignored(path, target, [rule[1:]]))


def _goes_into(path: str, policies: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tell whether kopia may go into *path*: no policy above it ignores it for certain."""
    above = [
        (target, rule)
        for target, files in policies.items()
        if is_within(path, target)
        for rule in _ignores(files)
    ]
    if any(_may_take_back(rule, path, target) for target, rule in above):
        return True
    return not any(is_ignored(path, target, [rule]) for target, rule in above)


def _below(
    target: str,
    policy: Mapping[str, Any],
    defined: Mapping[str, Mapping[str, Any]],
    excludes: Sequence[str],
) -> dict[str, Mapping[str, Any]]:
    """
    Return the policies of directories below *target* into which kopia may go.

    Not those within *excludes*, which have to be ignored: that is checked apart.
    """
    found = {target: policy}
    for path in sorted(defined):  # parents before children
        if (
            path != target
            and is_within(path, target)
            and not any(is_within(path, exclude) for exclude in excludes)
            and _goes_into(path, found)
        ):
            found[path] = defined[path]
    del found[target]
    return found


def _check_negations(
    path: str, files: Mapping[str, Any], excludes: Iterable[str], config: Mapping[str, Any]
) -> None:
    """Refuse a rule of a lower policy that may take back what one above it ignores."""
    for exclude in excludes:
        for rule in _ignores(files):
            if _may_take_back(rule, exclude, path):
                words = (*_SET, _typed(path, config), "--remove-ignore", rule)
                raise UserError(
                    f"the rule {rule} of kopia's policy for {path} may take back that {exclude} is "
                    "ignored, which must stay live while kopia runs",
                    hint=f"`{_command(*words)}`",
                )


def _check_target(
    target: str,
    policy: Mapping[str, Any],
    excludes: list[str],
    root: str,
    config: Mapping[str, Any],
) -> None:
    """Refuse a policy that does not ignore what has to be left out of *target*."""
    rules = _ignores(policy)
    tagged = policy.get("ignoreCacheDirs", True)
    missing = [
        path
        for path in excludes
        if not is_ignored(path, target, rules)
        and not (tagged and _is_tagged(path.removeprefix(root)))
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
        hint=f"`{_command(*_SET, _typed(target, config), *words)}`",
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
        self,
        settings: Settings,
        targets: tuple[str, ...],
        excludes: tuple[str, ...],
        root: str = "",
    ) -> None:
        """
        Raise a :class:`UserError` unless kopia's policies do what this backup needs.

        kopia has no option to leave a path out, so its policy must ignore each of *excludes*;
        and none may keep it from the file systems below a target, where it skips silently.
        The policies of directories below a target count from there on downwards.
        """
        defined, config = self._defined(settings), _config(_config_file(settings))
        for target in targets:
            within = [e for e in excludes if is_within(e, target)]
            policy = self._policy(settings, _typed(target, config))
            below = _below(target, policy, defined, within)
            for path, files in ((target, policy), *below.items()):
                _check_crossing(path, files, config)
            _check_target(target, policy, within, root, config)
            for path, files in below.items():
                inner = [e for e in within if is_within(e, path)]
                _check_negations(path, files, inner, config)

    def _defined(self, settings: Settings) -> dict[str, dict[str, Any]]:
        """
        Return the part about files of each policy of ours, by its path, as it was defined.

        Where the connection does not tell who we are, everybody's may be ours.
        """
        argv = (*program(settings, "kopia"), "policy", "list", "--json")
        answer = ask((*argv, *_globals(_options(settings))), settings)
        listed = objects_of(answer.stdout)
        if not answer.ok or listed is None:
            raise _unusable(answer, settings)
        if not listed and not re.search(r"\[\s*\]", answer.stdout):
            raise UserError(_NO_POLICIES)
        config = _config(_config_file(settings))
        try:
            return {
                str(each["target"]["path"]): dict(each.get("files") or {})
                for each in listed
                if _is_of(each["target"], config) and each["target"]["path"]
            }
        except (KeyError, TypeError) as exc:
            raise UserError(_NO_POLICIES) from exc

    def _policy(self, settings: Settings, source: str) -> dict[str, Any]:
        """Return the part about files of the policy that is in effect for *source*."""
        argv = (*program(settings, "kopia"), "policy", "show", "--json", source)
        answer = ask((*argv, *_globals(_options(settings))), settings)
        policy = document_of(answer.stdout)
        if not answer.ok or policy is None:
            raise _unusable(answer, settings)
        files = policy.get("files")
        return files if isinstance(files, dict) else {}

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
        return rules(words, _RULES, "kopia", counts=("inherit", "default"))

    def stored_paths(self, moment: Moment) -> tuple[str, ...]:
        """Return the sources' paths: of a tree, the live ones."""
        return moment.sources

    def forgetting(
        self, settings: Settings, facts: Facts, paths: tuple[str, ...], policy: tuple[str, ...]
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

    def uncached(self, settings: Settings, folder: str) -> tuple[str, ...]:
        """
        Return the options with a copy of the connection that has another cache.

        kopia keeps metadata and the contents of files in it, and has no option for another one.
        What it remembers of the password lies beside the connection.
        """
        file = _config_file(settings) or ""
        with open(file, encoding="utf-8") as source:
            found = json.load(source)
        caching = {**(found.get("caching") or {}), "cacheDirectory": f"{folder}/kopia"}
        own = os.path.join(folder, "repository.config")
        _write_secret(own, json.dumps({**found, "caching": caching}))
        if os.path.exists(file + _REMEMBERED):
            with open(file + _REMEMBERED, encoding="utf-8") as password:
                _write_secret(own + _REMEMBERED, password.read())
        rest = (o.word for o in _SYNTAX.parse(settings.extra) if o.name != "--config-file")
        return (*rest, f"--config-file={own}")

    def restore_command(
        self, settings: Settings, facts: Facts, backup: Backup, to: str
    ) -> tuple[str, ...]:
        """
        Return the command; of a source that had not changed, its newest backup is named.

        Each path of a set is a backup of its own, and is restored below *to* as others restore it.
        """
        path = backup.paths[0]
        below = os.path.join(to, path.lstrip("/"))
        source = _typed(path, _config(_config_file(settings)))
        words = ("snapshot", "restore", backup.backup_id or source, below)
        return (*program(settings, "kopia"), *words, *_globals(_options(settings)))


def _write_secret(path: str, text: str) -> None:
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _command(*words: str) -> str:
    return process.abridged(words, limit=2000)

"""
restic 0.14 to 0.19, and wrappers of it that pass their arguments on.

SIGINT is the stop signal of all versions: below 0.17 a SIGTERM kills restic at once and leaves
its lock in the repository, and from 0.17 on both do the same.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from .. import process
from ..errors import ClientError, UserError
from ..redact import check_arguments
from . import Backup, Facts, Launch, Moment, Settings
from .program import (
    Option,
    Syntax,
    absolute,
    ask,
    document_of,
    ended,
    find,
    home_folder,
    keeping_some,
    last_value,
    local_repository,
    local_time,
    objects_of,
    program,
    refuse,
    rules,
    things,
)
from .restic_reader import ResticReader

Version = tuple[int, int]

OLDEST: Version = (0, 14)
_WITH_SPARSE: Version = (0, 15)  # of a restore
_WITH_XATTR_FILTER: Version = (0, 18)  # of a restore
_WITH_HOST_VARIABLE: Version = (0, 17)  # else the retention would look for another host's
_WITH_GROUP_BY: Version = (0, 16)  # and --retry-lock, and `repair index`
# An unknown feature is a fatal error, and this one is announced to go with repository format 3.
_WITH_HARDLINK_FEATURE: tuple[Version, Version] = ((0, 17), (0, 19))
_HARDLINK_FEATURE = "device-id-for-hardlinks"
_RETRY_LOCK = "10m"
_FORGET_S = 3600.0
_NO_GROUPS = "what restic printed of what there is to forget is no list of groups"
_SPANS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_RULES = frozenset(
    [
        *(f"--keep-{span}" for span in (*_SPANS, "within", "tag")),
        *(f"--keep-within-{span}" for span in _SPANS[1:]),
    ]
)

_GLOBAL_VALUED = frozenset(
    [
        "--cacert",
        "--cache-dir",
        "--compression",
        "--http-user-agent",
        "--key-hint",
        "--limit-download",
        "--limit-upload",
        "--option",
        "--pack-size",
        "--password-command",
        "--password-file",
        "--repo",
        "--repository-file",
        "--retry-lock",
        "--stuck-request-timeout",
        "--tls-client-cert",
    ]
)
_GLOBAL = _GLOBAL_VALUED | frozenset(
    [
        "--cleanup-cache",
        "--insecure-no-password",
        "--insecure-tls",
        "--no-cache",
        "--no-extra-verify",
    ]
)
_SYNTAX = Syntax(
    valued=_GLOBAL_VALUED
    | frozenset(
        [
            "--exclude",
            "--exclude-file",
            "--exclude-if-present",
            "--exclude-larger-than",
            "--files-from",
            "--files-from-raw",
            "--files-from-verbatim",
            "--group-by",
            "--host",
            "--iexclude",
            "--iexclude-file",
            "--parent",
            "--read-concurrency",
            "--stdin-filename",
            "--tag",
            "--time",
        ]
    ),
    short={
        "-e": "--exclude",
        "-f": "--force",
        "-g": "--group-by",
        "-H": "--host",
        "-h": "--help",
        "-n": "--dry-run",
        "-o": "--option",
        "-p": "--password-file",
        "-q": "--quiet",
        "-r": "--repo",
        "-v": "--verbose",
        "-x": "--one-file-system",
    },
)
_STREAM = "atomtx backs up the files of snapshots, not a stream"
_OWN_PATHS = "atomtx itself names what to back up"
_REFUSED = {
    "--dry-run": "nothing would be saved; `atomtx backup --dry-run` prints the plan",
    "--files-from": _OWN_PATHS,
    "--files-from-raw": _OWN_PATHS,
    "--files-from-verbatim": _OWN_PATHS,
    "--help": "nothing would be saved",
    "--one-file-system": "each snapshot is a file system of its own, and those below another "
    "would be saved as empty directories without a warning; name the datasets instead",
    "--stdin": _STREAM,
    "--stdin-filename": _STREAM,
    "--stdin-from-command": _STREAM,
    "--time": "the time of a backup is the time of its snapshots",
}
_REPOSITORY = {"RESTIC_REPOSITORY", "--repo", "--repository-file"}
_SECRET = {
    "RESTIC_PASSWORD",
    "--password-file",
    "--password-command",
    "--insecure-no-password",
}
_FILE_OPTIONS = frozenset(
    [
        "--cacert",
        "--cache-dir",
        "--exclude-file",
        "--iexclude-file",
        "--password-file",
        "--repository-file",
        "--tls-client-cert",
    ]
)
_FILE_VARIABLES = (
    "RESTIC_CACERT",
    "RESTIC_CACHE_DIR",
    "RESTIC_PASSWORD_FILE",
    "RESTIC_REPOSITORY_FILE",
    "RESTIC_TLS_CLIENT_CERT",
)


def _options(settings: Settings) -> tuple[Option, ...]:
    """Read the user's options; a :class:`UserError` for one that breaks a promise."""
    options = _SYNTAX.parse(settings.extra)
    check_arguments([option.word for option in options])
    refuse(options, _REFUSED, "restic")
    return tuple(option for option in options if option.name != "--json")


def _globals(options: Iterable[Option]) -> tuple[str, ...]:
    """Return what also `cat`, `unlock` and `restore` must be told: where and how to connect."""
    return tuple(option.word for option in options if option.name in _GLOBAL)


def _parse_version(text: str) -> Version | None:
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def check_version(text: str) -> None:
    """Raise UserError for a version of restic that lacks what is used of it."""
    version = _parse_version(text)
    if version is None or version < OLDEST:
        hint = "atomtx needs {}.{} or newer".format(*OLDEST)
        raise UserError(f"restic {text} is too old", hint=hint)


def _location(settings: Settings, options: Iterable[Option]) -> str:
    """Return the repository's location, from where restic takes it; empty for none."""
    options = tuple(options)
    named = last_value(options, "--repo") or settings.env.get("RESTIC_REPOSITORY")
    if named:
        return named
    pointer = last_value(options, "--repository-file") or settings.env.get("RESTIC_REPOSITORY_FILE")
    return _first_text(os.path.join(settings.cwd, pointer)) if pointer else ""


def _first_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def escaped(path: str) -> str:
    """Return the exclude pattern that matches exactly *path* (and what lies below it)."""
    return re.sub(r"([\\*?\[])", r"\\\1", path)


def _features(env: Mapping[str, str], version: Version) -> dict[str, str]:
    """
    Ask to store a file's device only where it has hard links, if the user did not decide it.

    Each snapshot has a device number of its own: without it every directory looks changed.
    """
    given = env.get("RESTIC_FEATURES", "")
    oldest, newest = _WITH_HARDLINK_FEATURE
    if not oldest <= version <= newest or _HARDLINK_FEATURE in given:
        return {}
    return {"RESTIC_FEATURES": ",".join(filter(None, (given, _HARDLINK_FEATURE)))}


def _anchored(options: Iterable[Option], cwd: str) -> Iterator[Option]:
    """Make the files in *options* absolute: a tree is backed up from another directory."""
    for option in options:
        if option.name == "--repo" and option.value:
            yield replace(option, value=_anchored_location(option.value, cwd))
        elif option.name in _FILE_OPTIONS and option.value:
            yield replace(option, value=os.path.join(cwd, option.value))
        else:
            yield option


def _anchored_location(location: str, cwd: str) -> str:
    path = local_repository(location)
    return location if path is None else os.path.join(cwd, path)


def _anchored_variables(settings: Settings) -> dict[str, str]:
    """Return the variables that name a relative file, made absolute."""
    env, cwd = settings.env, settings.cwd
    found = {name: os.path.join(cwd, env[name]) for name in _FILE_VARIABLES if env.get(name)}
    if env.get("RESTIC_REPOSITORY"):
        found["RESTIC_REPOSITORY"] = _anchored_location(env["RESTIC_REPOSITORY"], cwd)
    return {name: value for name, value in found.items() if value != env[name]}


def _patience(version: Version, options: Iterable[Option]) -> tuple[str, ...]:
    """Return how long to wait for another's lock, where the user did not decide."""
    is_given = any(option.name == "--retry-lock" for option in options)
    return () if is_given or version < _WITH_GROUP_BY else (f"--retry-lock={_RETRY_LOCK}",)


def _is_saved(settings: Settings, options: Iterable[Option], backup: str) -> bool:
    """Tell whether the repository has a backup: the user may have forgotten it since."""
    query = ("cat", "snapshot", backup, "--no-lock", *_globals(options))
    try:
        return ask((*program(settings, "restic"), *query), settings).ok
    except UserError:  # out of reach: the backup itself tells it
        return False


def _with_parent(moment: Moment, settings: Settings, options: Sequence[Option]) -> Moment:
    """Return a moment whose parent, if it has one, is there, and not the user's to choose."""
    is_given = any(option.name in ("--parent", "--force") for option in options)
    if moment.parent is None or (not is_given and _is_saved(settings, options, moment.parent)):
        return moment
    return replace(moment, parent=None)


def _own_options(
    version: Version, moment: Moment, options: Sequence[Option], env: Mapping[str, str]
) -> Iterator[str]:
    """Return the options that atomtx adds where the user did not decide."""
    given = {option.name for option in options}
    yield from _patience(version, options)
    if version < _WITH_HOST_VARIABLE and "--host" not in given and env.get("RESTIC_HOST"):
        yield f"--host={env['RESTIC_HOST']}"
    if moment.parent is not None:
        yield f"--parent={moment.parent}"
    # Patterns are matched with the real location, also of a relative argument.
    root = moment.root.rstrip("/")
    yield from (f"--exclude={escaped(root + path)}" for path in moment.excludes)


def _targets(moment: Moment) -> tuple[str, ...]:
    """
    Return the arguments: below a root relative ones, if not the root itself is wanted.

    The tree in the repository is then the same as at the live paths, and the directories above
    the volumes, made anew for each run, are not in it.
    """
    if not moment.root:
        return moment.targets
    if moment.whole:
        return (moment.root,)
    return tuple(target.lstrip("/") or "." for target in moment.targets)


def _host(settings: Settings) -> str:
    """Return the host that a backup bears: restic's defaults."""
    host = last_value(_options(settings), "--host") or settings.env.get("RESTIC_HOST")
    return host or os.uname().nodename


def _of_its_own(settings: Settings, backup: Backup) -> list[str]:
    """
    Return what keeps the backups of other hosts away, and those that lack one of the paths.

    Those of more paths stay: restic's `--path` asks that a backup includes a path, and has no
    option for those that have no other.
    """
    root = settings.below.rstrip("/")
    paths = ((root + path).rstrip("/") or "/" for path in backup.paths)
    return [f"--host={_host(settings)}", *(f"--path={path}" for path in paths)]


def _removed(text: str, host: str, paths: Collection[str]) -> list[str]:
    """
    Return the backups to remove of the groups that have exactly these paths.

    restic prints nothing where there are no groups; ClientError for anything else that is no list.
    """
    groups = objects_of(text)
    if groups is None:
        raise ClientError(_NO_GROUPS)
    try:
        return [
            str(each["id"])
            for group in groups
            if group["host"] == host and set(group["paths"] or ()) == set(paths)
            for each in group["remove"] or ()
        ]
    except (KeyError, TypeError) as exc:
        raise ClientError(_NO_GROUPS) from exc


def _unusable(answer: process.Completed, settings: Settings) -> UserError:
    """Return the error that tells why the repository cannot be used, in one line."""
    # Judged as it came: a password may be one of the words that are looked for.
    text = answer.stderr
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = next((line for line in lines if "Fatal" in line or "Resolving" in line), "")
    said = (fatal or (lines or [ended(answer.status)])[-1]).replace("Fatal: ", "")
    said = settings.redact(said)
    if answer.status == 12 or "wrong password or no key found" in text:
        return UserError("restic: the password is wrong for this repository")
    if "an empty password is not" in text:
        return UserError(
            "restic: there is no password for the repository",
            hint="set RESTIC_PASSWORD_FILE or RESTIC_PASSWORD_COMMAND: nobody can be asked",
        )
    if "specify repository location" in text:
        return UserError(
            "restic: no repository is named", hint="set RESTIC_REPOSITORY, or add `-- -r REPO`"
        )
    if answer.status == 10 or "unable to open" in text:
        return UserError(
            f"restic: the repository is absent or out of reach: {said}",
            hint="is its disk mounted, its server up? `restic init` makes a new one",
        )
    return UserError(f"restic: the repository cannot be used: {said}")


class Restic:
    """Backs up with `restic backup --json`."""

    name = "restic"
    stop_signal = signal.SIGINT

    def inspect(self, settings: Settings) -> Facts:
        """Ask for the version and the repository's id; makes nothing but restic's own cache."""
        argv = program(settings, "restic")
        options = _options(settings)
        find(argv, settings)
        version, notes = self._version(argv, settings)
        answer = ask((*argv, "cat", "config", "--no-lock", *_globals(options)), settings)
        config = document_of(answer.stdout)
        if not answer.ok or not config or "id" not in config:
            raise _unusable(answer, settings)
        return Facts(version, str(config["id"]), notes)

    def _version(self, argv: tuple[str, ...], settings: Settings) -> tuple[str, tuple[str, ...]]:
        """Return the version; of a wrapper that does not tell, the oldest that can be used."""
        match = re.search(r"\brestic v?(\d+\.\d+[.\d]*)", ask((*argv, "version"), settings).stdout)
        if not match:
            oldest = "{}.{}".format(*OLDEST)
            note = f"{argv[0]} does not tell restic's version: nothing newer than {oldest} is used"
            return oldest, (note,)
        check_version(match[1])
        return match[1], ()

    def check(
        self,
        settings: Settings,
        targets: tuple[str, ...],
        excludes: tuple[str, ...],
        root: str = "",
    ) -> None:
        """Do nothing: restic leaves out any path."""

    def live_paths(self, settings: Settings) -> tuple[str, ...]:
        """Return the cache, a local repository, TMPDIR and the agent's socket."""
        return absolute(self._live_paths(settings), settings.cwd)

    def _live_paths(self, settings: Settings) -> Iterator[str]:
        env, options = settings.env, _options(settings)
        if not any(option.name == "--no-cache" for option in options):
            yield from self._cache(env, options)
        location = _location(settings, options)
        repository = local_repository(location)
        if repository is not None:
            yield repository
        if env.get("TMPDIR"):
            yield env["TMPDIR"]
        if location.startswith("sftp:") and env.get("SSH_AUTH_SOCK"):
            yield env["SSH_AUTH_SOCK"]  # not its folder: gpg-agent's holds the keys

    def _cache(self, env: Mapping[str, str], options: tuple[Option, ...]) -> Iterator[str]:
        named = last_value(options, "--cache-dir") or env.get("RESTIC_CACHE_DIR")
        if named:
            yield named
        else:
            folders = home_folder(env, "XDG_CACHE_HOME", ".cache")
            yield from (os.path.join(folder, "restic") for folder in folders)

    def launch(self, settings: Settings, facts: Facts, moment: Moment) -> Launch:
        """
        Return one `restic backup`; its own options first, so that the user's count.

        A parent that the repository has no more would end it: it is asked for first.
        """
        options = _options(settings)
        moment = _with_parent(moment, settings, options)
        version = _parse_version(facts.version) or OLDEST
        env = {"RESTIC_PROGRESS_FPS": "1", **_features(settings.env, version)}
        time, zone = local_time(moment.at, settings.env)
        if moment.root:
            options = tuple(_anchored(options, settings.cwd))
            env |= _anchored_variables(settings)
        argv = (
            *program(settings, "restic"),
            *("backup", "--json", f"--time={time}"),
            *_own_options(version, moment, options, settings.env),
            *(option.word for option in options),
            *("--", *_targets(moment)),
        )
        return Launch((argv,), moment.root or settings.cwd, env | zone)

    def reader(self, moment: Moment) -> ResticReader:
        return ResticReader(moment)

    def lacks(self, settings: Settings) -> tuple[str, ...]:
        """Return the repository and the password, where no variable and no option has them."""
        said = things(settings) | {option.name for option in _options(settings)}
        wanted = (
            ("repository (RESTIC_REPOSITORY)", _REPOSITORY),
            ("password (RESTIC_PASSWORD)", _SECRET),
        )
        return tuple(what for what, ways in wanted if not ways & said)

    def policy(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """Return the rules of `restic forget`."""
        return keeping_some(rules(words, _RULES, "restic", counts=("unlimited",)), "restic")

    def stored_paths(self, moment: Moment) -> tuple[str, ...]:
        """Return the absolute paths of the arguments: of a tree, those below its root."""
        root = moment.root.rstrip("/")
        below = ((root + path).rstrip("/") or "/" for path in moment.targets)
        return moment.sources if moment.whole else tuple(below)

    def forgetting(
        self, settings: Settings, facts: Facts, paths: tuple[str, ...], policy: tuple[str, ...]
    ) -> tuple[tuple[str, ...], ...]:
        """
        Return one `restic forget --prune` of single backups, or nothing.

        `--path` alone would not do: it also takes every backup that has more paths than these,
        and would apply the rules to them.
        """
        options, host = _options(settings), _host(settings)
        argv, own = (*program(settings, "restic"), "forget"), _globals(options)
        filters = (f"--host={host}", *(f"--path={path}" for path in paths), "--group-by=host,paths")
        query = (*argv, *filters, *policy, "--dry-run", "--json", "--no-lock", *own)
        answer = process.run(query, env=settings.env, cwd=settings.cwd, timeout_s=_FORGET_S)
        if not answer.ok:
            said = settings.redact(answer.last_line())
            raise ClientError(f"restic does not tell what there is to forget: {said}")
        ids = _removed(answer.stdout, host, paths)
        patience = _patience(_parse_version(facts.version) or OLDEST, options)
        return ((*argv, "--prune", *own, *patience, *ids),) if ids else ()

    def after_loss(self, settings: Settings, facts: Facts) -> tuple[str, ...]:
        """
        Remove stale locks and index the packs that the killed client had uploaded.

        `unlock` takes away only locks of this host whose process is gone, and very old ones.
        Without an index those packs would be uploaded once more.
        """
        version = _parse_version(facts.version) or OLDEST
        modern = version >= _WITH_GROUP_BY
        index = ("repair", "index") if modern else ("rebuild-index",)
        return tuple(self._mend(settings, verb) for verb in (("unlock",), index))

    def _mend(self, settings: Settings, verb: tuple[str, ...]) -> str:
        argv = (*program(settings, "restic"), *verb, *_globals(_options(settings)))
        # Never killed: a half-mended repository is worse than a late answer.
        answer = process.run(argv, env=settings.env, cwd=settings.cwd)
        said = settings.redact(answer.last_line())
        name = f"restic {' '.join(verb)}"
        return f"{name}: done" if answer.ok else f"{name} failed: {said}"

    def uncached(self, settings: Settings, folder: str) -> tuple[str, ...]:
        """Return the options with another cache: snapshots, indexes and trees are kept in it."""
        return (*settings.extra, f"--cache-dir={folder}")

    def restore_command(
        self, settings: Settings, facts: Facts, backup: Backup, to: str
    ) -> tuple[str, ...]:
        """
        Return the command; a backup without an id was the same as the one before it.

        That one is asked for as restic finds it, by host and paths: the latest of all may be
        another machine's.  It may still be a later one, or one of more paths.

        Holes are made again where there are zeros.  Onto an XFS, restic from 0.18 on would set
        each ACL and then take it away: XFS keeps it in an attribute that it shows as well, and
        restic removes what the backup does not have.
        """
        version = _parse_version(facts.version) or OLDEST
        words = ["restore", backup.backup_id or "latest", "--target", to]
        words += [] if backup.backup_id else _of_its_own(settings, backup)
        words += ["--sparse"] if version >= _WITH_SPARSE else []
        words += ["--exclude-xattr=trusted.SGI_ACL_*"] if version >= _WITH_XATTR_FILTER else []
        return (*program(settings, "restic"), *words, *_globals(_options(settings)))

"""
Credentials of a job: variables of the client whose values are in files, or come from systemd.

The journal and the configuration have only their *sources*: "file:/etc/atomtx/home.password", or
"credential:home", a file of that name in $CREDENTIALS_DIRECTORY.  A value is read when the
client is asked or started, and goes nowhere but into its environment (promise 11).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping

from . import trust
from .errors import CredentialError, UserError

Sources = tuple[tuple[str, str], ...]  # (variable, source)
MAX_BYTES = 65_536  # a variable of 128 KiB cannot be given to a program: execve(2)

# RESTIC_PASSWORD, RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND: ways to say one thing.
_WAYS = re.compile(r"_(FILE|COMMAND)$")
_OTHER_WAYS = {"BORG_PASSCOMMAND": "BORG_PASSPHRASE", "BORG_PASSPHRASE_FD": "BORG_PASSPHRASE"}


def read(sources: Sources, env: Mapping[str, str]) -> dict[str, str]:
    """
    Return the variables with their values; the last line's end does not belong to them.

    Raises CredentialError for the first one that is not there, is refused, or is no possible value.
    """
    return {name: _value(name, source, env) for name, source in sources}


def read_or_inherit(sources: Sources, env: Mapping[str, str]) -> dict[str, str]:
    """Do as :func:`read`, but take from *env* what cannot be read and is a variable there."""
    found = {}
    for name, source in sources:
        try:
            found[name] = _value(name, source, env)
        except CredentialError:
            if name not in env:
                raise
            found[name] = env[name]
    return found


def trouble(name: str, source: str, env: Mapping[str, str]) -> str | None:
    """Tell why one of them cannot be read, or None."""
    try:
        _value(name, source, env)
    except CredentialError as exc:
        return str(exc)
    return None


def described(source: str) -> str:
    """Return a source in words."""
    kind, _, place = source.partition(":")
    return f"file {place}" if kind == "file" else f"systemd credential {place}"


def overlaid(
    base: Mapping[str, str], top: Mapping[str, str], keep: Collection[str] = ()
) -> dict[str, str]:
    """
    Return *base* with *top* over it, also over other ways to say the same.

    Where *top* has RESTIC_PASSWORD_FILE, *base*'s RESTIC_PASSWORD would be a second password.
    What is named in *keep* stays.
    """
    said = {thing_of(name) for name in top}
    rest = {n: v for n, v in base.items() if n in keep or thing_of(n) not in said}
    return {**rest, **top}


def thing_of(variable: str) -> str:
    """Return what a variable tells, whether itself, by a file or by a command."""
    return _OTHER_WAYS.get(variable) or _WAYS.sub("", variable)


def clashes(variables: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of variables that say the same thing in two ways."""
    seen: dict[str, str] = {}
    found = []
    for variable in variables:
        other = seen.setdefault(thing_of(variable), variable)
        if other != variable:
            found.append((other, variable))
    return found


def _value(name: str, source: str, env: Mapping[str, str]) -> str:
    kind, _, place = source.partition(":")
    try:
        if kind == "credential":
            value = _of_systemd(name, place, env)
        else:
            value = trust.read(place, f"the file of {name}", secret=True, limit=MAX_BYTES)
    except CredentialError:
        raise
    except UserError as exc:
        raise CredentialError(exc.message, hint=exc.hint) from exc
    value = value.removesuffix("\n").removesuffix("\r")
    if not value:
        raise CredentialError(f"{name} is empty: nothing is in the {described(source)}")
    if "\0" in value:
        raise CredentialError(
            f"{name} cannot be a variable: a null byte is in the {described(source)}"
        )
    return value


def _of_systemd(name: str, place: str, env: Mapping[str, str]) -> str:
    directory = env.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise CredentialError(
            f"{name} comes from the systemd credential {place}, and there is no "
            "$CREDENTIALS_DIRECTORY",
            hint=f"run it in a unit with LoadCredential={place}:...",
        )
    path = os.path.join(directory, place)
    # systemd made it for this unit alone; its mode is 0440 in some versions, with an ACL.
    if not os.path.exists(path):
        raise CredentialError(
            f"{name} comes from the systemd credential {place}, which is not in {directory}",
            hint=f"add LoadCredential={place}:... to the unit",
        )
    return trust.read(path, f"the credential of {name}", limit=MAX_BYTES)

"""
What of a client's environment and arguments is secret, and how to keep it out of sight.  Pure.

Promise 11: a secret never reaches the journal, a log, an error message or a process list.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from urllib.parse import unquote

from .errors import UserError

HIDDEN = "***"
# encoding/json of Go, HTMLEscape
_OF_GO = str.maketrans({"&": "\\u0026", "<": "\\u003c", ">": "\\u003e"})
_SHORTEST = 4  # hiding shorter values would make any text unreadable and hide nothing

# Names that the pattern below does not find: our own, and from the clients' lists of variables.
_SECRET = frozenset(
    [
        "ATOMTX_NOTIFY_APPRISE",
        "ATOMTX_PING_URL",
        "AZURE_CLIENT_CERTIFICATE",
        "B2_ACCOUNT_ID",
        "BORG_RSH",
        "BORGSTORE_RSH",
        "KOPIA_METRICS_PUSH_USERNAME",
        "KOPIA_SERVER_CONTROL_USER",
        "KOPIA_SERVER_USERNAME",
        "KOPIA_WEBDAV_USERNAME",
        "RESTIC_AWS_ASSUME_ROLE_EXTERNAL_ID",
        "RESTIC_REST_USERNAME",
    ]
)
# Names that the pattern finds although they hold a path, an identifier or a switch.
_HARMLESS = frozenset(
    [
        "BORG_DEBUG_PASSPHRASE",
        "BORG_DISPLAY_PASSPHRASE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "KOPIA_PERSIST_CREDENTIALS_ON_CONNECT",
        "KOPIA_USE_KEYRING",
        "RESTIC_KEY_HINT",
    ]
)
# A header of rclone's may let in by any name: RCLONE_HEADER_UPLOAD, RCLONE_WEBDAV_HEADERS.
_HEADERS = r"^RCLONE_(?:.*_)?HEADER"
_SECRET_NAME = re.compile(
    r"PASS|SECRET|TOKEN|KEY|SAS|CREDENTIAL|CONNECTION_STRING|GRANT|COOKIE|AUTHORIZATION"
    rf"|^RCLONE_CONFIG_|{_HEADERS}",
    re.IGNORECASE,
)
_POINTER_NAME = re.compile(
    r"_(FILE|FILE2|FD|DIR|DIRECTORY|PATH|SOCK)$|^RCLONE_CONFIG_.*_(TYPE|PROVIDER|REGION)$",
    re.IGNORECASE,
)
# `scheme://user:password@host`, and borg 2's `s3:key:secret@...`.
_URL_PASSWORD = re.compile(r"((?:://|\b(?:s3|b2):)[^/\s:@]*:)([^/\s]+)@")
# What is assigned within a value: a connection string of rclone's (`:s3,secret_access_key=...:`)
# or of Azure's, and options that another program is given.  What a shell puts in is none.
_ASSIGNED = re.compile(
    r"(?:(?:^|[\s,;:'\"-])[\w.-]*(?:secret|token|pass(?:word|wd|phrase)?|sas"
    r"|(?:access|account|storage|application|shared)[_-]?key)|[,;]key)"
    r"=('(?!\$)[^']+'|\"(?!\$)[^\"]+\"|(?![$'\"])[^\s,;:]+)",
    re.IGNORECASE,
)
# sshpass(1)
_SSHPASS = re.compile(r"\bsshpass\s+-p\s*(?!\$)(\S+)")
# `Authorization: Bearer TOKEN`; in rclone's lists of headers a comma stands for the colon.
_AUTHORIZATION = re.compile(r"\bauthorization[\"']?\s*[:,=]|\bbearer\s+\S", re.IGNORECASE)
_HEADER_TOKEN = re.compile(
    r"(?:\b(?:bearer|basic)\s+|\bauthorization[\"']?\s*[:,=]\s*[\"']?(?:[^\s,\"']+[ \t]+)?)"
    r"([^\s,\"']+)",
    re.IGNORECASE,
)
_HEADER_NAME = re.compile(r"(?:^|[,\n])\s*[\"']?[\w-]+:\s+")
_SCHEME = re.compile(r"[\w-]+\s+(\S+)")

_OF_CLIENTS = {
    "restic": ("RESTIC_",),
    "kopia": ("KOPIA_",),
    "borg": ("BORG_", "BORGSTORE_"),
    "xfsdump": (),
}
_RELEVANT_PREFIX = re.compile(
    r"(RESTIC|KOPIA|BORG|BORGSTORE|RCLONE|AWS|B2|AZURE|GOOGLE|OS|ST)_|(https?|no|all)_proxy$",
    re.IGNORECASE,
)
_RELEVANT = frozenset(
    [
        "HOME",
        "PATH",
        "TMPDIR",
        "TZ",
        "LANG",
        "LC_ALL",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "SSH_AUTH_SOCK",
    ]
)

# Those of them that a login, a timer and a service have each their own of, and that name no place
# of backups; the others of a home may lead to a program's configuration.
_OF_A_SESSION = _RELEVANT - {"HOME", "XDG_CONFIG_HOME"}
_PROXY = re.compile(r"_proxy$", re.IGNORECASE)

_SECRET_FLAG = re.compile(
    r"--([a-z0-9-]+-)?"
    r"(pass|password|password-hash|passphrase|secret|token|access-key|storage-key)"
)
# Elsewhere `-p` and `--key` commonly name a file.
_SECRET_KOPIA_FLAG = re.compile(r"--key|--key-id|--client-cert|-p.*")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(?![\"']?\$)(.+)", re.DOTALL)


def _is_secret(name: str, value: str) -> bool:
    if _URL_PASSWORD.search(value) or _AUTHORIZATION.search(value) or _assigned(value):
        return True
    if name in _HARMLESS or _POINTER_NAME.search(name):
        return False
    return name in _SECRET or bool(_SECRET_NAME.search(name))


def secret_names(env: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the variables whose values must not be shown or stored."""
    return frozenset(name for name, value in env.items() if _is_secret(name, value))


def is_of_a_client(name: str) -> bool:
    """Tell whether a variable is one by which a client is told where and how to back up."""
    return bool(_RELEVANT_PREFIX.match(name)) and not _PROXY.search(name)


def tells_where(name: str) -> bool:
    """Tell whether a variable of a client, as journaled, may tell it where its backups go."""
    return not is_of_a_session(name) and not _PROXY.search(name)


def is_of_a_session(name: str) -> bool:
    """Tell whether each login, timer and service has a variable of its own, which means nothing."""
    return name in _OF_A_SESSION


def _is_relevant(name: str) -> bool:
    return name in _RELEVANT or bool(_RELEVANT_PREFIX.match(name))


def _of_others(client: str) -> tuple[str, ...]:
    """Return how the variables begin that other clients read, and this one does not."""
    if client not in _OF_CLIENTS:
        return ()
    return tuple(start for name in _OF_CLIENTS if name != client for start in _OF_CLIENTS[name])


def journaled(
    env: Mapping[str, str],
    client: str = "",
    *,
    chosen: Collection[str] = (),
    elsewhere: Collection[str] = (),
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """
    Return what a resume needs of *env*: harmless variables with values, and names of secrets.

    Only variables that the *client* reads, those of any client for a command of the user's, and
    those *chosen* for it: a resume must not wait for a secret of something else.  The sources of
    those *elsewhere* are journaled, not their values.
    """
    others = _of_others(client)
    names = (
        name
        for name in sorted(env)
        if name in chosen or (_is_relevant(name) and not name.startswith(others))
    )
    relevant = {name: env[name] for name in names if name not in elsewhere}
    secrets = secret_names(relevant)
    harmless = tuple((name, value) for name, value in relevant.items() if name not in secrets)
    return harmless, tuple(sorted(secrets))


def _assigned(text: str) -> set[str]:
    """Return the secrets that are assigned within a text."""
    found = (*_ASSIGNED.findall(text), *_SSHPASS.findall(text))
    return {value.strip("'\"") for value in found}


def _without_url_passwords(text: str) -> str:
    return _URL_PASSWORD.sub(rf"\1{HIDDEN}@", text)


def _tokens(text: str) -> tuple[str, ...]:
    """Return by what a header in *text* lets in; nothing where there is none that does."""
    return tuple(_HEADER_TOKEN.findall(text)) if _AUTHORIZATION.search(text) else ()


def _header_values(text: str) -> set[str]:
    """
    Return the values of headers as rclone has them, `Name: value` or `Name,value`.

    Where a name cannot be told from a value for certain it is one of them.  What a value has
    behind a scheme (`Token T`) is one of them alone, too.
    """
    pieces = re.split(r"[,:\n]", _HEADER_NAME.sub(",", text))
    values = {piece.strip().strip("\"'") for piece in pieces}
    return values | {match[1] for value in values if (match := _SCHEME.fullmatch(value))}


def _secret_parts(name: str, value: str) -> set[str]:
    """
    Return what to hide of a secret's *value*: of a URL only the password, as is and decoded.

    Of what assigns secrets to names only these.

    Of a header also its value alone, and by what it lets in.
    """
    passwords = {match[2] for match in _URL_PASSWORD.finditer(value)} | _assigned(value)
    of_headers = {*_tokens(value)}
    if re.match(_HEADERS, name, re.IGNORECASE):
        of_headers |= _header_values(value)
    if passwords:
        return {*passwords, *map(unquote, passwords), *of_headers}
    return {
        *of_headers,
        value,
        value.strip(),
        *value.splitlines(),  # the log is written line by line
    }


def _spellings(secret: str) -> set[str]:
    """Return how a log may spell it: in JSON, as Go writes it too, and where it is not UTF-8."""
    if secret.isascii() and not set(secret) & set('"\\\t&<>'):
        return set()
    import json  # 8 ms that most need not pay

    texts = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    texts |= {text.translate(_OF_GO) for text in texts}
    return {*texts, secret.encode("utf-8", "surrogateescape").decode("utf-8", "replace")}


class Redactor:
    """Replaces the secrets of one environment in any text; *also* names some of them."""

    def __init__(self, env: Mapping[str, str], also: Collection[str] = ()) -> None:
        names = secret_names(env) | {name for name in also if name in env}
        parts = {part for name in names for part in _secret_parts(name, env[name])}
        parts |= {spelt for part in parts for spelt in _spellings(part)}
        words = sorted((word for word in parts if len(word) >= _SHORTEST), key=len, reverse=True)
        # The longest first: one secret may be a part of another.
        self._pattern = re.compile("|".join(map(re.escape, words))) if words else None

    def redact(self, text: str) -> str:
        """Return *text* with each secret's value and each password of a URL replaced."""
        if self._pattern is not None:
            text = self._pattern.sub(HIDDEN, text)
        return _without_url_passwords(text)


def _secret_of(word: str, *, for_kopia: bool) -> str | None:
    """Return how to call the secret that *word* carries, without its value; None for none."""
    flag = word.partition("=")[0]
    if _SECRET_FLAG.fullmatch(flag):
        return flag
    if for_kopia and _SECRET_KOPIA_FLAG.fullmatch(flag):
        return "-p" if not flag.startswith("--") else flag
    assignment = _ASSIGNMENT.fullmatch(word)
    if assignment and _is_secret(assignment[1], assignment[2]):
        return f"{assignment[1]}=..."
    # A shell puts a variable's value in only where it runs the word.
    if any(not token.startswith("$") for token in _tokens(word)):
        return "Authorization: ..."
    if found := _ASSIGNED.search(word):
        return f"{found[0][: found.start(1) - found.start()].strip()}..."
    if _SSHPASS.search(word):
        return "sshpass -p ..."
    return _without_url_passwords(word) if _URL_PASSWORD.search(word) else None


def check_arguments(argv: Sequence[str]) -> None:
    """Raise a :class:`UserError` where an argument of a client would carry a secret."""
    for_kopia = any(word.rpartition("/")[2] == "kopia" for word in argv)
    for word in argv:
        secret = _secret_of(word, for_kopia=for_kopia)
        if secret is not None:
            raise UserError(
                f"the argument {secret} carries a secret: arguments are visible in the list of "
                "processes, and the journal keeps them",
                hint="put it in a file or in the environment",
            )

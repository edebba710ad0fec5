"""
The kinds of values that a configuration holds: how each is read, written and described.  Pure.

`read` takes what `tomllib` made of a value and returns the program's own; what is wrong with it
goes to *complain*, with the place, and None is returned: all errors are found at once.  Where a
secret may have been typed in place of where it is, the value is not repeated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from .errors import UserError
from .redact import Redactor
from .tomllines import Place
from .words import MOST_YEARS, SPAN, UNITS_S, seconds

Complain = Callable[[Place, str], None]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class Kind:
    """A kind of value; a simple one is read by :meth:`parse`, which raises ValueError."""

    name: str  # in the reference

    def read(self, value: Any, at: Place, complain: Complain) -> Any:
        try:
            return self.parse(value)
        except ValueError as exc:
            complain(at, f"{key_of(at)} {exc}")
            return None

    def parse(self, value: Any) -> Any:
        raise NotImplementedError

    def written(self, value: Any) -> Any:
        """Return the plain value that :meth:`read` turns into *value*."""
        return value

    def schema(self) -> dict[str, Any]:
        """Return its JSON schema."""
        raise NotImplementedError


class Flag(Kind):
    name = "true or false"

    def parse(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, not {shown(value)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Number(Kind):
    least: int
    most: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.least} to {self.most}"

    def parse(self, value: Any) -> int:
        if type(value) is not int or not self.least <= value <= self.most:
            raise ValueError(f"must be a whole number from {self.name}, not {shown(value)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True)
class Text(Kind):
    """One of some words, or a text that matches *pattern*, which *name* describes."""

    name: str = "text"
    pattern: str = r"[^\0]+"
    choices: tuple[str, ...] = ()
    is_by_a_secret: bool = False  # it says where one is

    def parse(self, value: Any) -> str:
        but = "" if self.is_by_a_secret else f", not {shown(value)}"
        if not isinstance(value, str):
            raise ValueError(f"must be a text in quotes{but}")
        if self.choices and value not in self.choices:
            raise ValueError(
                f"must be one of {_listed(self.choices)}, not {shown(value)}"
                f"{_guess(value, self.choices)}"
            )
        if not re.fullmatch(self.pattern, value, re.DOTALL):
            raise ValueError(f"must be {self.name}{but}")
        return value

    def schema(self) -> dict[str, Any]:
        if self.choices:
            return {"enum": list(self.choices)}
        return {"type": "string", "pattern": f"^(?:{self.pattern})$"}


class Span(Kind):
    """A time, in seconds."""

    name = 'a time, such as `"90s"`, `"15m"`, `"6h"`, `"2d"`'

    def parse(self, value: Any) -> int:
        if not isinstance(value, str):
            raise ValueError(f'must be a time in quotes such as "90s", "6h", not {shown(value)}')
        try:
            return seconds(value)
        except UserError as exc:
            is_long = SPAN.fullmatch(value.strip())
            what = f"is longer than {MOST_YEARS}y" if is_long else "is not a time"
            raise ValueError(
                f'must be a time such as "90s", "6h", "2d"; {shown(value)} {what}'
            ) from exc

    def written(self, value: Any) -> str:
        for unit in ("w", "d", "h", "m"):
            if value and value % UNITS_S[unit] == 0:
                return f"{value // UNITS_S[unit]}{unit}"
        return f"{value}s" if value else "0"

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": rf"^\s*{SPAN.pattern}\s*$"}


class Words(Kind):
    """A list of texts, none empty."""

    name = "a list of words"

    def parse(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise ValueError(f'must be a list such as ["a", "b"], not {shown(value)}')
        for word in value:
            if not isinstance(word, str) or not word or "\0" in word:
                raise ValueError(
                    f"must be a list of texts in quotes, none empty; it holds {shown(word)}"
                )
        return tuple(value)

    def written(self, value: Any) -> list[str]:
        return list(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "string", "minLength": 1}}


class Program(Words):
    """The words of a command: a program, and what it is given."""

    def parse(self, value: Any) -> tuple[str, ...]:
        words = super().parse(value)
        if words and words[0].startswith("-"):
            raise ValueError(f"must begin with a program, not with the option {shown(words[0])}")
        return words


class Variables(Kind):
    """Names of variables with their values."""

    name = "a table of variables"

    def read(self, value: Any, at: Place, complain: Complain) -> Any:
        if not isinstance(value, dict):
            complain(at, f'{key_of(at)} must be a table such as {{ A = "b" }}')
            return None
        found = {}
        for name, text in value.items():
            if not _VARIABLE.fullmatch(name):
                complain((*at, name), f"{key_of(at)}: {shown(name)} cannot be a variable")
            elif not isinstance(text, str) or "\0" in text:
                complain((*at, name), f"{key_of(at)}.{name} must be a text in quotes")
            else:
                found[name] = text
        return found

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^{_VARIABLE.pattern}$"},
            "additionalProperties": {"type": "string"},
        }


@dataclass(frozen=True)
class Table(Kind):
    """A table whose keys are the fields of a dataclass, each made by :func:`key`."""

    of: type[Any]
    name: str = "a table"
    instead_of_a_secret: str = ""  # what it must do; empty: it holds none

    def read(self, value: Any, at: Place, complain: Complain) -> Any:
        if not isinstance(value, dict):
            wanted = self.instead_of_a_secret or f"be a table, not {shown(value)}"
            complain(at, f"{key_of(at)} must {wanted}")
            return None
        known = keys(self.of)
        found: dict[str, Any] = {}
        for name, each in value.items():
            if name not in known:
                complain((*at, name), f"unknown key {shown(name)}{_guess(name, tuple(known))}")
                continue
            read = known[name].metadata["kind"].read(each, (*at, name), complain)
            if read is not None:
                found[known[name].name] = read
        return self.of(**found)

    def written(self, value: Any) -> dict[str, Any]:
        return {
            name: each.metadata["kind"].written(getattr(value, each.name))
            for name, each in keys(self.of).items()
            if getattr(value, each.name) != default(each)
        }

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: _schema_of(each) for name, each in keys(self.of).items()},
        }


@dataclass(frozen=True)
class Named(Kind):
    """Tables by names that match *pattern*, which *name* describes."""

    of: Table
    pattern: str
    name: str

    def read(self, value: Any, at: Place, complain: Complain) -> Any:
        if not isinstance(value, dict):
            but = "" if self.of.instead_of_a_secret else f", not {shown(value)}"
            complain(at, f"{key_of(at)} must be a table of tables{but}")
            return None
        found = {}
        for name, each in value.items():
            if not re.fullmatch(self.pattern, name):
                complain((*at, name), f"{shown(name)} must be {self.name}")
            found[name] = self.of.read(each, (*at, name), complain)
        return {name: each for name, each in found.items() if each is not None}

    def written(self, value: Any) -> dict[str, Any]:
        return {name: self.of.written(each) for name, each in value.items()}

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^(?:{self.pattern})$"},
            "additionalProperties": self.of.schema(),
        }


# -- keys --------------------------------------------------------------------------------------


def key(kind: Kind, what: str, default: Any, *, unset: str = "", example: Any = None) -> Any:
    """
    Define a field as a key: its kind, what it is for, what holds without it.

    *unset* says in words what an empty default means; *example* is a value to show.
    """
    metadata = {"kind": kind, "what": what, "unset": unset, "example": example}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def keys(of: type[Any]) -> dict[str, Field[Any]]:
    """Return the keys of a dataclass as they are written, in order."""
    return {each.name.replace("_", "-"): each for each in fields(of)}


def default(of: Field[Any]) -> Any:
    """Return the value that a field has where nothing is said."""
    return of.default if of.default_factory is MISSING else of.default_factory()


def default_text(of: Field[Any]) -> str:
    """Return a field's default as people read it."""
    unset: str = of.metadata["unset"]
    return unset or toml(of.metadata["kind"].written(default(of)))


def _schema_of(each: Field[Any]) -> dict[str, Any]:
    kind: Kind = each.metadata["kind"]
    schema = {"description": each.metadata["what"], **kind.schema()}
    if not each.metadata["unset"]:
        schema["default"] = kind.written(default(each))
    return schema


# -- words -------------------------------------------------------------------------------------


def key_of(at: Place) -> str:
    """Return how a place is called within its job or section."""
    inner = at[2:] if at[0] == "jobs" and len(at) > 2 else at[1:] or at
    return ".".join(map(str, inner))


def shown(value: Any) -> str:
    """Return a value as it can be put into an error: no dump of a long one, no URL's password."""
    text = Redactor({}).redact(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 60 else f"{text[:50]}..."


def near(word: str, words: Sequence[str]) -> str | None:
    """Return the one of *words* that was probably meant, or None."""
    from difflib import get_close_matches  # only where something is wrong

    close = get_close_matches(word, words, n=1)
    return close[0] if close else None


def _guess(word: str, words: Sequence[str]) -> str:
    meant = near(word.lower().replace("_", "-"), words)
    return f'; did you mean "{meant}"?' if meant else ""


def _listed(words: Sequence[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


# -- TOML --------------------------------------------------------------------------------------


def toml(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        inner = ", ".join(f"{toml_key(name)} = {toml(each)}" for name, each in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return str(value)


def toml_key(name: str) -> str:
    """Return a key, quoted where it must be."""
    return name if _BARE_KEY.fullmatch(name) else toml(name)

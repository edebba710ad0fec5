"""The line of each key of a TOML text."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx.tomllines import Place, lines

TEXT = '''# a comment with [a.header] and key = 1

[defaults]
client = "restic"  # [jobs.no]
"working-directory" = "/"

[jobs."my home"]
volumes = [
    "tank/home",  # x = 1
    "[jobs.not]",
]
environment.A = "1"
environment."B C" = """
[jobs.neither]
retries = 3
"""
credentials = { P = { file = "/p" }, Q = { credential = "q" } }

[jobs.mail.credentials]
P.file = \'\'\'
/a\'\'\'

[jobs.mail]
volumes = ["a"]

[[hooks]]
command = ["a"]
[[hooks]]
command = ["b"]
[hooks.env]
A = "1"
'''

EXPECTED: dict[Place, int] = {
    ("defaults", "client"): 4,
    ("defaults", "working-directory"): 5,
    ("jobs", "my home"): 7,
    ("jobs", "my home", "volumes"): 8,
    ("jobs", "my home", "environment"): 12,
    ("jobs", "my home", "environment", "A"): 12,
    ("jobs", "my home", "environment", "B C"): 13,
    ("jobs", "my home", "credentials", "Q", "credential"): 17,
    ("jobs", "mail"): 19,
    ("jobs", "mail", "credentials"): 19,
    ("jobs", "mail", "credentials", "P", "file"): 20,
    ("jobs", "mail", "volumes"): 24,
    ("hooks", 0): 26,
    ("hooks", 0, "command"): 27,
    ("hooks", 1): 28,
    ("hooks", 1, "command"): 29,
    ("hooks", 1, "env"): 30,
    ("hooks", 1, "env", "A"): 31,
}


@pytest.mark.parametrize("place", EXPECTED, ids=str)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_line(place: Place, end: str) -> None:
    """A key has the line where it begins, whatever way it is written."""
    assert lines(TEXT.replace("\n", end))[place] == EXPECTED[place]


def _all_in(value: Any, at: Place = ()) -> Iterator[Place]:
    yield at
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _all_in(child, (*at, key))


def test_every_key() -> None:
    """Each key of the text has a line, and no line is of a key that is not in it."""
    assert set(lines(TEXT)) == set(_all_in(tomllib.loads(TEXT)))


KEYS = ("a", '"b c"', "'d.e'", "f.g", '"\u00e9"')
VALUES = (
    "1",
    '"x # y"',
    '[1,\n  "[no]", # c\n]',
    '"""\n[no]\na = 1\n"""',
    "'''\\\n'''",
    "{ z = 1 }",
)
FILLERS = ("", "\n", "# [no]\n", "  \n# a = 1\n\n")


@given(
    st.lists(
        st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES), st.sampled_from(FILLERS)),
        unique_by=lambda statement: statement[0],
    )
)
def test_counted(statements: list[tuple[str, str, str]]) -> None:
    """Whatever stands between two keys, and in their values, each has the line that is counted."""
    text = "[table]\n"
    expected = {}
    for key, value, filler in statements:
        text += filler
        expected[key] = text.count("\n") + 1
        text += f"{key} = {value}\n"
    found = lines(text)
    for key, line in expected.items():
        (path,) = _leaf(tomllib.loads(f"{key} = 1"))
        assert found[("table", *path)] == line


def test_long_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of many lines is not read again at each of them: a configuration may be long."""
    reads: list[str] = []
    loads = tomllib.loads

    def counted(text: str) -> dict[str, Any]:
        reads.append(text)
        return loads(text)

    monkeypatch.setattr(tomllib, "loads", counted)
    text = "a = [\n" + '  "/home/*/cache",\n' * 500 + "]\nb = 1\n"
    assert lines(text)[("b",)] == 503
    assert len(reads) < 10


def _leaf(said: dict[str, Any]) -> list[Place]:
    return [place for place in _all_in(said) if len(place) == str(said).count("{")]

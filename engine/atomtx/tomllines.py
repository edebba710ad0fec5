"""
The line of each key of a TOML text, which `tomllib` does not tell.  Pure.

The text is cut into its statements, and `tomllib` itself reads each alone: a statement is what
it can read, from one line on, with as few lines as possible.  So quoted and dotted keys, inline
tables and strings of several lines are understood as they are when the whole text is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Place = tuple[str | int, ...]

_ENDS = ("]", "}", '"""', "'''")  # one of them is in the last line of a value of several


def lines(text: str) -> dict[Place, int]:
    """
    Return where each key of a valid TOML text begins: its path -> the line, from 1.

    A table has the line of its first header, or of the first statement that makes it; what is
    inside a value of several lines has that of the value.
    """
    found: dict[Place, int] = {(): 1}
    header: Place = ()
    counts: dict[Place, int] = {}
    for number, statement, is_header in _statements(text):
        if is_header:
            header = _header(statement, counts)
            places: Iterator[Place] = _prefixes(header)
        else:
            places = (header + place for place in _places(statement))
        for place in places:
            found.setdefault(place, number)
    return found


def _statements(text: str) -> Iterator[tuple[int, dict[str, Any], bool]]:
    """Cut the text: (line of the first word, what it says, whether it is a header)."""
    import tomllib

    first, collected = 1, ""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        is_first = not collected
        collected += line + "\n"
        if not (is_first or any(end in line for end in _ENDS)):
            continue  # a list of a thousand lines is not to be read a thousand times
        try:
            said = tomllib.loads(collected)
        except tomllib.TOMLDecodeError:  # it goes on
            continue
        if said:
            yield first, said, collected.lstrip().startswith("[")
        first, collected = number + 1, ""


def _header(said: dict[str, Any], counts: dict[Place, int]) -> Place:
    """Return the path of a header; each one of an array of tables is counted."""
    place: Place = ()
    value: Any = said
    while value:
        if isinstance(value, list):
            counts[place] = counts.get(place, -1) + 1
            return (*place, counts[place])
        ((key, value),) = value.items()
        place = (*place, key)
        if place in counts and isinstance(value, dict):  # a table of the array's last one
            place = (*place, counts[place])
    return place


def _prefixes(place: Place) -> Iterator[Place]:
    return (place[: n + 1] for n in range(len(place)))


def _places(value: object) -> Iterator[Place]:
    """Return the paths of all keys and items in a value, parents first."""
    children: Iterator[tuple[str | int, object]]
    if isinstance(value, dict):
        children = iter(value.items())
    elif isinstance(value, list):
        children = iter(enumerate(value))
    else:
        return
    for key, child in children:
        yield (key,)
        yield from ((key, *below) for below in _places(child))

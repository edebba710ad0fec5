"""What a kill or a power cut leaves in mid-commit, built by hand: the rollback journal."""

from __future__ import annotations

from pathlib import Path

_MAGIC = bytes.fromhex("d9d505f920a163d7")
_NONCE, _SECTOR = 12345, 512


def write(path: Path, before: bytes) -> None:
    """
    Write the rollback journal that takes the database *path* back to *before*.

    Every page is in it, as in that of a commit that changed every page.
    See https://www.sqlite.org/fileformat2.html#the_rollback_journal
    """
    size = int.from_bytes(before[16:18], "big")
    pages = [before[at : at + size] for at in range(0, len(before), size)]
    numbers = (len(pages), _NONCE, len(pages), _SECTOR, size)
    header = _MAGIC + b"".join(n.to_bytes(4, "big") for n in numbers)
    records = (
        number.to_bytes(4, "big") + page + _checksum(page).to_bytes(4, "big")
        for number, page in enumerate(pages, 1)
    )
    journal = path.with_name(path.name + "-journal")
    journal.write_bytes(header.ljust(_SECTOR, b"\0") + b"".join(records))


def _checksum(page: bytes) -> int:
    return (_NONCE + sum(page[at] for at in range(len(page) - 200, 0, -200))) % 2**32

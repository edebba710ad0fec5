"""Packs resume tokens of `zfs receive` as kernels do, and unpacks them, for what stands for it."""

from __future__ import annotations

import struct
import zlib

BLOCKS = 4  # of each snapshot's played stream
BOOLEAN, UINT64, STRING = 1, 8, 9
HEAD = bytes((0, 1, 0, 0)) + struct.pack("<ii", 0, 1)


def aligned(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 8) * 8, b"\0")


def pair(name: bytes, kind: int, value: bytes = b"") -> bytes:
    """Pack a pair as nvpair.c does."""
    body = aligned(name + b"\0") + aligned(value)
    head = struct.pack("<ihxxii", 16 + len(body), len(name) + 1, kind != BOOLEAN, kind)
    return head + body


def number(name: bytes, value: int) -> bytes:
    return pair(name, UINT64, struct.pack("<Q", value))


def token(*pairs: bytes, head: bytes = HEAD, end: bytes = bytes(4), size: int | None = None) -> str:
    data = head + b"".join(pairs) + end
    packed = zlib.compress(data).hex()
    return f"1-0-{len(data) if size is None else size:x}-{packed}"


def made(snapshot: str, *, done: int, to: str, base: str = "", raw: bool = False) -> str:
    """Return the token of a stream of which *done* blocks have arrived."""
    return token(
        *(number(name, done) for name in (b"object", b"offset", b"bytes")),
        number(b"toguid", int(to)),
        pair(b"toname", STRING, snapshot.encode() + b"\0"),
        *((number(b"fromguid", int(base)),) if base else ()),
        *((pair(b"rawok", BOOLEAN),) if raw else ()),
    )


def unpacked(text: str) -> dict[str, str]:
    """Return what `made` packed, number by number in decimal."""
    data = zlib.decompress(bytes.fromhex(text.split("-")[3]))
    at, values = len(HEAD), {}
    while data[at:] != bytes(4):
        size, length, _, kind = struct.unpack_from("<ihxxii", data, at)
        name = data[at + 16 : at + 16 + length - 1].decode()
        value = data[at + 16 + len(aligned(bytes(length))) : at + size]
        if kind == UINT64:
            values[name] = str(struct.unpack("<Q", value)[0])
        else:
            values[name] = value.rstrip(b"\0").decode()
        at += size
    return values

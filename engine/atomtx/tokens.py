"""
What a resume token of `zfs receive` asks for.  Pure.

A token comes from the other end of a clone, which may be anybody's, and `zfs send -t` does what it
says.  So it is read here, byte by byte as libzfs reads it, and whatever is not understood, or is
said twice, makes all of it nothing.  What `zfs send -nvt` prints is no substitute: a name in a
token can hold line ends, and so pretend to be other lines.

Sources, of OpenZFS: lib/libzfs/libzfs_sendrecv.c (zfs_send_resume_token_to_nvlist),
module/nvpair/nvpair.c (nvs_native), include/sys/nvpair.h (nvpair_t); openzfs/zfs#14153.
"""

from __future__ import annotations

import struct
import sys
import zlib

from .replica import Token

_VERSION = "1"
_MAX_BYTES = 64 * 1024  # an honest one has some hundreds
_NATIVE = 0  # NV_ENCODE_NATIVE, as kernels write it, in their own order of bytes
_IS_LITTLE = sys.byteorder == "little"
_HEAD = struct.Struct("=BBxxii")  # encoding, is little-endian; version, flags
_PAIR = struct.Struct("=ihxxii")  # size of all of it, length of the name; elements, type
_END = bytes(4)
_BOOLEAN, _UINT64, _STRING = 1, 8, 9
_TYPES = {
    "toname": _STRING,
    **dict.fromkeys(("object", "offset", "bytes", "toguid", "fromguid"), _UINT64),
    **dict.fromkeys(("embedok", "compressok", "largeblockok", "rawok"), _BOOLEAN),
}
_NEEDED = {"toname", "object", "offset", "bytes", "toguid"}


def read(token: str) -> Token | None:
    """Return what a token asks for; None for one that is not understood to its last byte."""
    try:
        values = _pairs(_unpacked(token))
    except (ValueError, struct.error, zlib.error):
        return None
    if not values.keys() >= _NEEDED:
        return None
    return Token(
        dataset=str(values["toname"]).partition("@")[0],
        to_guid=str(values["toguid"]),
        from_guid=str(values.get("fromguid", "")),
        is_raw="rawok" in values,
    )


def _unpacked(token: str) -> bytes:
    """Undo the packing: VERSION-CHECKSUM-SIZE-HEX of a deflated list."""
    version, _, size, packed = token.split("-")
    wanted = int(size, 16)
    if version != _VERSION or wanted > _MAX_BYTES:
        raise ValueError(token)
    inflate = zlib.decompressobj()
    data = inflate.decompress(bytes.fromhex(packed), wanted + 1)
    if len(data) != wanted or not inflate.eof or inflate.unused_data:
        raise ValueError(token)
    return data


def _pairs(data: bytes) -> dict[str, int | str]:
    """Return the pairs of a packed list, each of the type that it has to be."""
    encoding, is_little, version, _ = _HEAD.unpack_from(data)
    if (encoding, bool(is_little), version) != (_NATIVE, _IS_LITTLE, 0):
        raise ValueError("not written as kernels do")
    values: dict[str, int | str] = {}
    at = _HEAD.size
    while data[at:] != _END:
        (size,) = struct.unpack_from("=i", data, at)
        name, value = _pair(data[at : at + max(size, 0)], size)
        if name in values:
            raise ValueError(name)
        values[name] = value
        at += size
    return values


def _pair(data: bytes, size: int) -> tuple[str, int | str]:
    _, length, count, kind = _PAIR.unpack_from(data)
    begins = _PAIR.size + _aligned(length)
    name = _text(data[_PAIR.size : begins], length)
    if _TYPES.get(name) != kind or count != (kind != _BOOLEAN) or len(data) != size:
        raise ValueError(name)
    value = data[begins:]
    if kind == _UINT64:
        return name, struct.unpack("=Q", value)[0]
    if kind == _STRING:
        return name, _text(value, len(value.rstrip(b"\0")) + 1)
    if value:
        raise ValueError(name)
    return name, 1


def _text(padded: bytes, length: int) -> str:
    """Return a string of *length* bytes with its end, which zeros fill up to whole words."""
    text, rest = padded[: length - 1], padded[length - 1 :]
    if not text or len(padded) != _aligned(length) or any(rest) or b"\0" in text:
        raise ValueError("not a string")
    return text.decode()


def _aligned(length: int) -> int:
    return -(-length // 8) * 8

"""
A repository of restic, written by hand: snapshots at any time, and a password that costs nothing.

restic makes one snapshot a process, and each process spends half a second on the password
(scrypt); a repository of hundreds would take minutes.  The format is restic's doc/design.rst;
what is in it must not be secret, so that one nonce serves for all.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

PASSWORD = "sesame"
_NONCE = bytes(range(1, 17))
_SALT = bytes(64)
_COST = {"N": 2, "r": 1, "p": 1}  # of scrypt: the least there is
_POLYNOMIAL = "3d14e36d5d9a0b"  # irreducible; restic checks that
_PRIME = 2**130 - 5
_CLAMP = 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF


@dataclass(frozen=True)
class Key:
    """AES-256 in counter mode, and Poly1305-AES: internal/crypto/crypto.go."""

    encrypt: bytes
    k: bytes
    r: bytes

    def seal(self, plain: bytes) -> bytes:
        """Return the nonce, *plain* encrypted, and the code that proves it."""
        cipher = bytes(a ^ b for a, b in zip(plain, self._stream(len(plain)), strict=True))
        return _NONCE + cipher + self._code(cipher)

    def as_json(self) -> bytes:
        text = {"mac": {"k": _base64(self.k), "r": _base64(self.r)}}
        return json.dumps({**text, "encrypt": _base64(self.encrypt)}).encode()

    def _stream(self, size: int) -> bytes:
        while len(self._known) < size:
            counter = int.from_bytes(_NONCE) + len(self._known) // 16
            self._known.extend(self._aes.encrypt(counter.to_bytes(16)))
        return bytes(self._known[:size])

    def _code(self, message: bytes) -> bytes:
        r = int.from_bytes(self.r, "little") & _CLAMP
        total = 0
        for at in range(0, len(message), 16):
            total = (total + int.from_bytes(message[at : at + 16] + b"\1", "little")) * r % _PRIME
        return ((total + self._pad) % 2**128).to_bytes(16, "little")

    @cached_property
    def _aes(self) -> Aes:
        return Aes(self.encrypt)

    @cached_property
    def _known(self) -> bytearray:
        return bytearray()

    @cached_property
    def _pad(self) -> int:
        return int.from_bytes(Aes(self.k).encrypt(_NONCE), "little")


MASTER = Key(bytes(range(32)), bytes(range(16)), bytes(range(16, 32)))


@dataclass
class Repository:
    """A repository at *path*, which has no snapshot yet."""

    path: Path
    _files: list[Path] = field(default_factory=list, init=False)

    def create(self) -> Repository:
        """Write what a repository has before its first snapshot."""
        for name in ("data", "index", "keys", "locks", "snapshots"):
            (self.path / name).mkdir(parents=True)
        derived = hashlib.scrypt(PASSWORD.encode(), salt=_SALT, n=2, r=1, p=1, dklen=64)
        user = Key(derived[:32], derived[32:48], derived[48:])
        sealed = {"salt": _base64(_SALT), "data": _base64(user.seal(MASTER.as_json()))}
        self._write("keys", json.dumps({"kdf": "scrypt", **_COST, **sealed}).encode())
        config = {"version": 2, "id": "ab" * 32, "chunker_polynomial": _POLYNOMIAL}
        (self.path / "config").write_bytes(MASTER.seal(json.dumps(config).encode()))
        return self

    def add(self, time: str, **other: Any) -> str:
        """Write a snapshot of *time*, in RFC 3339, and return its id."""
        facts = {"time": time, "tree": "cd" * 32, "paths": ["/"], "hostname": "host", **other}
        file = self._write("snapshots", MASTER.seal(json.dumps(facts).encode()))
        self._files.append(file)
        return file.name

    def clear(self) -> None:
        """Take away every snapshot that was added."""
        for file in self._files:
            file.unlink()
        self._files.clear()

    def _write(self, folder: str, data: bytes) -> Path:
        path = self.path / folder / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        return path


# -- AES ---------------------------------------------------------------------------------------


class Aes:
    """AES of one block, with a key of 16 or 32 bytes: FIPS 197."""

    def __init__(self, key: bytes) -> None:
        self._rounds = list(_round_keys(key))

    def encrypt(self, block: bytes) -> bytes:
        state = _xor(block, self._rounds[0])
        for key in self._rounds[1:-1]:
            state = _xor(_mixed(_shifted(state)), key)
        return _xor(_shifted(state), self._rounds[-1])


def _round_keys(key: bytes) -> Iterator[bytes]:
    count = len(key) // 4
    words = [key[at : at + 4] for at in range(0, len(key), 4)]
    constant = 1
    for n in range(count, 4 * (count + 7)):
        word = words[-1]
        if n % count == 0:
            word = bytes(_SBOX[byte] for byte in word[1:] + word[:1])
            word = bytes([word[0] ^ constant]) + word[1:]
            constant = _double(constant)
        elif count > 6 and n % count == 4:
            word = bytes(_SBOX[byte] for byte in word)
        words.append(_xor(words[n - count], word))
    for at in range(0, len(words), 4):
        yield b"".join(words[at : at + 4])


def _shifted(state: bytes) -> bytes:
    """Put every byte through the S-box, and shift the rows."""
    return bytes(_SBOX[state[(n + 4 * (n % 4)) % 16]] for n in range(16))


def _mixed(state: bytes) -> bytes:
    """Mix the columns."""
    found = bytearray()
    for at in range(0, 16, 4):
        column = state[at : at + 4]
        for n in range(4):
            a, b, c, d = (column[(n + step) % 4] for step in range(4))
            found.append(_double(a) ^ _double(b) ^ b ^ c ^ d)
    return bytes(found)


def _double(byte: int) -> int:
    """Multiply by x in AES's field."""
    return (byte << 1 ^ 0x11B) & 0xFF if byte & 0x80 else byte << 1


def _substitutions() -> list[int]:
    """Return the S-box: of each byte the inverse, then a map of its bits."""
    powers = [1]
    for _ in range(254):
        powers.append(powers[-1] ^ _double(powers[-1]))  # times 3, which generates the field
    found = [0x63] * 256
    for n, power in enumerate(powers):
        inverse = powers[-n % 255]
        bits = inverse * 0x101
        found[power] = (
            inverse ^ (bits >> 4) ^ (bits >> 5) ^ (bits >> 6) ^ (bits >> 7)
        ) & 0xFF ^ 0x63
    return found


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


_SBOX = _substitutions()

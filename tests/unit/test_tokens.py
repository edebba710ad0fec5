"""Resume tokens: real ones are read, and whatever could be read in another way is refused."""

from __future__ import annotations

import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import tokens
from atomtx.replica import Token
from tests.faketoken import BOOLEAN, HEAD, STRING, UINT64, made, number, pair, token, unpacked

# As OpenZFS 2.3.9 made them: `zfs get receive_resume_token`.
PLAIN = (
    "1-10f4184393-118-789c636064000310a501c49c50360710a715e5e7a69766a6304001cfb3cc595bdf266c5"
    "100b2d991d4e52765a526973030b040d561c8a7a515a796806458e0f26c48f2499525a9c5407a83001b56fd2"
    "5f91057887778b9159f736cd34092e704cbe725e6a602e9c4bc6cfd440763987b25a0fa61fe4bcd4d4a4dc9c"
    "f069bcf8d249e9c9f5b50945a5c0c9482030090142392"
)
RAW = (
    "1-120e815f04-118-789c636064000310a501c49c50360710a715e5e7a69766a63040c1f7c5eaef83ef34072"
    "900d9ec48eaf293b252934b18181aa0ea30e4d3d28a534b40322c70793624f9a4ca92d46220dda3c286557f4"
    "93ec41572bf652fd488f1bfd74092e704cbe725e6a602e9c4bc6cfdd4bc640763843bb81910fe4bcecf2d284"
    "a2d2ececf86884940dd01932f4a2c87493100005e742486"
)
WHOLE = (
    "1-de5b6d0cb-f0-789c636064000310a500c4ec50360710e72765a52697303030439460caa7a515a79680647"
    "8e0f26c48f2499525a9c52009713eacfa4bf2d34b335380e63c8ad19a2329a5a78124cf0996cf4bcc4d05d28"
    "979d9fa890e865067304840f5c3dc9d9a9b949a929f0d369f1b493c393fb7a028b5b818280507005bbd1a51"
)
pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the real tokens are of x86")


def test_real() -> None:
    """What `zfs send -nvt` said of these."""
    to, begins = 0x8641CE73464A8817, 0xB460EDB59A69E60C
    assert tokens.read(PLAIN) == Token("tank/a", str(to), str(begins), False)
    to, begins = 0xEF0F167CD01DFB1E, 0x5283DC53EF27A3F7
    assert tokens.read(RAW) == Token("tank/enc", str(to), str(begins), True)
    assert tokens.read(WHOLE) == Token("tank/a", str(0x2E1A199C2A5CE26F), "", False)


TO = pair(b"toname", STRING, b"tank/a@x\0")
NUMBERS = b"".join(number(name, 1) for name in (b"object", b"offset", b"bytes"))
GUID = number(b"toguid", 7)


def test_played() -> None:
    """Those of played pools are real ones, and real ones are unpacked as they are."""
    plain = made("tank/a@x", done=2, to="7", base="3")
    assert tokens.read(plain) == Token("tank/a", "7", "3", False)
    assert tokens.read(made("tank/a@x", done=2, to="7", raw=True)) == Token("tank/a", "7", "", True)
    assert unpacked(plain)["bytes"] == "2"
    assert unpacked(PLAIN)["toname"].startswith("tank/a@")
    assert unpacked(PLAIN)["fromguid"] == str(0xB460EDB59A69E60C)
    assert "rawok" in unpacked(RAW)


def test_made() -> None:
    """What the tests below pack is a token, but for what each of them has wrong."""
    assert tokens.read(token(NUMBERS, GUID, TO)) == Token("tank/a", "7", "", False)
    raw = token(NUMBERS, GUID, TO, pair(b"rawok", BOOLEAN))
    assert tokens.read(raw) == Token("tank/a", "7", "", True)


@pytest.mark.parametrize(
    "bad",
    [
        token(NUMBERS, GUID, TO, TO),  # which of the two does libzfs take?
        token(NUMBERS, GUID, TO, number(b"toguid", 8)),
        token(NUMBERS, GUID, TO, pair(b"q", STRING, b"x\n\ttoname = tank/b@y\0")),
        token(NUMBERS, GUID, TO, pair(b"x\n\trawok", BOOLEAN)),
        token(NUMBERS, GUID, TO, pair(b"savedok", BOOLEAN)),  # another kind of stream
        token(NUMBERS, GUID, TO, pair(b"redact_snaps", 16, bytes(8))),
        token(NUMBERS, GUID, TO, pair(b"rawok", UINT64, bytes(8))),
        token(NUMBERS, GUID, TO, pair(b"rawok", BOOLEAN, bytes(8))),
        token(NUMBERS, GUID, TO, number(b"fromguid", 3)[:-8]),
        token(NUMBERS, GUID, pair(b"toname", STRING, b"tank/a@x\0tank/b@y\0")),
        token(NUMBERS, GUID, pair(b"toname", STRING, b"tank/a@x")),
        token(NUMBERS, GUID, pair(b"toname", STRING, b"")),
        token(NUMBERS, GUID),
        token(NUMBERS, TO),
        token(NUMBERS, GUID, TO, end=b""),
        token(NUMBERS, GUID, TO, end=bytes(8)),
        token(NUMBERS, GUID, TO, head=bytes((1, 1, 0, 0)) + HEAD[4:]),  # XDR
        token(NUMBERS, GUID, TO, head=bytes((0, 0, 0, 0)) + HEAD[4:]),  # of the other order
        token(NUMBERS, GUID, TO, size=1 << 40),
        token(NUMBERS, GUID, TO, size=5),
        token(NUMBERS, GUID, TO) + "00",
        token(NUMBERS, GUID, TO).replace("1-", "2-", 1),
        "1-0-4-zz",
        "",
        "-",
        "1-0--",
    ],
)
def test_refused(bad: str) -> None:
    assert tokens.read(bad) is None


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    """Nothing that is packed in a token makes reading it fail in another way."""
    packed = zlib.compress(data).hex()
    assert tokens.read(f"1-0-{len(data):x}-{packed}") is None
    assert tokens.read(data.decode("latin-1")) is None


@given(st.integers(0), st.integers(0, 255))
def test_any_change(place: int, value: int) -> None:
    """A real token with one byte changed is refused, or asks for something that can be told."""
    data = bytearray(tokens._unpacked(PLAIN))
    data[place % len(data)] = value
    found = tokens.read(f"1-0-{len(data):x}-{zlib.compress(bytes(data)).hex()}")
    assert found is None or "\0" not in found.dataset

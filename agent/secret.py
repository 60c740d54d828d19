"""A private key on its way through the agent: one buffer that is overwritten, never a `bytes`."""

import ctypes
from collections.abc import Iterable, Iterator

# Where a bytes object's content begins in CPython.
_CONTENT = bytes.__basicsize__ - 1
# Of glibc, malloc.h.
_M_PERTURB = -6
# Wire type of protobuf.
_LENGTH = 2


class Secret:
    """Owns its only copy. Not shown by `repr`, not to be pickled or compared."""

    __slots__ = ("_content",)

    def __init__(self, content: memoryview) -> None:
        self._content = bytearray(content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        return f"<secret, {len(self._content)} bytes>"

    def __reduce__(self) -> str:
        raise TypeError("a secret stays where it is")

    def append_to(self, target: bytearray) -> None:
        target += self._content

    def wipe(self) -> None:
        """Safe to repeat."""
        wipe(self._content)


def wipe(content: bytearray) -> None:
    for place in range(len(content)):
        content[place] = 0


def wipe_all(secrets: Iterable[Secret]) -> None:
    for secret in secrets:
        secret.wipe()


def wipe_received(content: bytes) -> None:
    """Overwrites what a library handed over as `bytes`, of which nobody else makes use.

    Python has no other way; shorter ones may be shared by the interpreter and are left alone.
    """
    if len(content) > 1:
        ctypes.memset(id(content) + _CONTENT, 0, len(content))


def overwrite_freed_memory() -> bool:
    """For copies that a library makes and gives back as they are: from now on the C library
    overwrites all that this process frees beyond a kilobyte. False: it is one that can't."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_PERTURB, 0xA5))


def appended(message: bytes, place: tuple[int, int], secret: Secret) -> bytearray:
    """A protobuf message with `secret` as a field of a field, of which the library never learns:
    a message field that comes twice is merged by whoever reads it (protobuf, encoding), and the
    second one holds nothing but the secret. The caller wipes the result."""
    outer, inner = place
    head = bytes([*_varint(inner << 3 | _LENGTH), *_varint(len(secret))])
    payload = bytearray(message)
    payload += bytes([*_varint(outer << 3 | _LENGTH), *_varint(len(head) + len(secret))])
    payload += head
    # Last: what grows moves, and what moves leaves a copy.
    secret.append_to(payload)
    return payload


def _varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value

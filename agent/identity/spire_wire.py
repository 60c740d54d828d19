"""Takes the SPIRE agent's answers apart so that keys lie nowhere but in a `Secret`.

The protobuf library would copy them into memory of its own, which it frees as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from agent.identity.ca import CaError
from agent.secret import Secret, wipe_all, wipe_received
from proto.gen import spire_pb2

_SVIDS = spire_pb2.SubscribeToX509SvidsResponse.X509_SVIDS_FIELD_NUMBER
_SVID = spire_pb2.X509SvidWithKey.X509_SVID_FIELD_NUMBER
_KEY = spire_pb2.X509SvidWithKey.X509_SVID_KEY_FIELD_NUMBER


@dataclass(frozen=True)
class Svid:
    """An identity document as it came, unchecked."""

    identity: str
    # DER, leaf first.
    chain: tuple[bytes, ...]
    key: Secret


class _Torn(Exception):
    """A length leads beyond the end, or a field is of no known type."""


def take_svids(answer: bytes) -> list[Svid]:
    """The caller wipes the keys; `answer` is overwritten. Raises CaError for what is no answer."""
    found: list[Svid] = []
    try:
        for number, content in _fields(memoryview(answer)):
            if number == _SVIDS:
                found.append(_svid(content))
    except (_Torn, DecodeError) as exc:
        wipe_all(svid.key for svid in found)
        raise CaError(f"the SPIRE agent's answer can't be read: {exc}") from exc
    finally:
        wipe_received(answer)
    return found


def _svid(message: memoryview) -> Svid:
    parts = dict(_fields(message))
    document = spire_pb2.X509Svid.FromString(bytes(parts.get(_SVID, b"")))
    return Svid(
        f"spiffe://{document.id.trust_domain}{document.id.path}",
        tuple(document.cert_chain),
        Secret(parts.get(_KEY, memoryview(b""))),
    )


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields with a length; numbers are passed over. Raises _Torn."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        match tag & 7:
            case 2:
                length, place = _varint(message, place)
                end = place + length
                if end > len(message):
                    raise _Torn(f"field {tag >> 3} is cut off")
                yield tag >> 3, message[place:end]
                place = end
            case 0:
                _, place = _varint(message, place)
            case 1:
                place += 8
            case 5:
                place += 4
            case other:
                raise _Torn(f"wire type {other}")
    if place > len(message):
        raise _Torn("it ends within a number")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise _Torn("it ends within a number")
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise _Torn("a number is too long")

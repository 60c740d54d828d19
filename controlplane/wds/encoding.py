"""Resources as bytes, encoded once; responses are put together from them for all streams."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import Message

from proto.gen import discovery_pb2

ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
TYPES = (ADDRESS, AUTHORIZATION)

# Key of DeltaDiscoveryResponse.resources (field 2, length-delimited).
_RESOURCES_KEY = b"\x12"


@dataclass(frozen=True, slots=True)
class Resource:
    """`framed` is the resource as it stands inside a DeltaDiscoveryResponse."""

    name: str
    version: str
    message: Message
    framed: bytes


def resource(type_url: str, name: str, message: Message) -> Resource:
    """The version is a hash of the content, so that it survives restarts of this process."""
    body = message.SerializeToString(deterministic=True)
    version = hashlib.blake2b(body, digest_size=8).hexdigest()
    made = discovery_pb2.Resource(name=name, version=version)
    made.resource.type_url = type_url
    made.resource.value = body
    encoded = made.SerializeToString()
    return Resource(name, version, message, _RESOURCES_KEY + _varint(len(encoded)) + encoded)


def response(
    type_url: str, nonce: str, resources: Iterable[Resource], removed: Iterable[str]
) -> bytes:
    """A DeltaDiscoveryResponse; the order of fields on the wire has no meaning."""
    head = discovery_pb2.DeltaDiscoveryResponse(
        type_url=type_url, nonce=nonce, removed_resources=sorted(removed)
    )
    return b"".join((head.SerializeToString(), *(item.framed for item in resources)))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)

"""The outermost fields of a response, read without decoding it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.xds import wire
from proto.gen import discovery_pb2

NAMES = st.lists(st.text(max_size=20), max_size=5)


@given(NAMES, NAMES, st.text(max_size=20), st.text(max_size=300))
def test_reads_what_a_decoder_reads(
    sent: list[str], removed: list[str], nonce: str, type_url: str
) -> None:
    message = discovery_pb2.DeltaDiscoveryResponse(
        nonce=nonce, type_url=type_url, removed_resources=removed
    )
    for name in sent:
        message.resources.add(name=name, version="1", aliases=["other"]).ttl.seconds = 5
    raw = message.SerializeToString()
    assert wire.header(raw) == wire.Header(type_url, nonce)
    # Proto3 leaves an empty name out, so there is nothing to read.
    assert wire.names(raw) == ({name for name in sent if name}, set(removed))


@given(st.binary(max_size=200))
def test_never_fails_on_noise_otherwise_than_it_says(noise: bytes) -> None:
    wire.header(noise)
    try:
        wire.names(noise)
    except wire.MalformedError:
        return


def test_cut_message_is_malformed() -> None:
    message = discovery_pb2.DeltaDiscoveryResponse(removed_resources=["abcdef"])
    with pytest.raises(wire.MalformedError):
        wire.names(message.SerializeToString()[:-1])

"""What a SPIRE agent's answers are taken apart into, and what is no answer."""

import contextlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from agent.identity.ca import CaError
from agent.identity.spire_answer import check_svid, roots_of
from agent.identity.spire_wire import Svid, take_svids
from agent.secret import Secret
from proto.gen import spire_pb2
from tests.support.small_ca import SmallCa
from tests.support.spire_server import FakeSpire, roots_pem

WEB = "spiffe://cluster.local/ns/shop/sa/web"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
Response = spire_pb2.SubscribeToX509SvidsResponse


def answer(*svids: spire_pb2.X509SvidWithKey) -> bytes:
    return Response(x509_svids=svids, federates_with=["other.td"]).SerializeToString()


def held(secret: Secret) -> bytes:
    content = bytearray()
    secret.append_to(content)
    return bytes(content)


def test_identities_chains_and_keys_come_out_and_nothing_is_left() -> None:
    spire = FakeSpire(Path("/nowhere"))
    wire = answer(spire._issue(WEB), spire._issue("spiffe://cluster.local/ns/shop/sa/db"))
    found = take_svids(wire)
    assert [svid.identity.rpartition("/")[2] for svid in found] == ["web", "db"]
    assert [held(svid.key) for svid in found] == spire.keys
    assert [len(svid.chain) for svid in found] == [1, 1]
    assert not any(wire)


def test_fields_of_a_later_release_are_passed_over() -> None:
    later = b"\x18\x96\x01" + b"\x21" + bytes(8) + b"\x2d" + bytes(4) + b"\x32\x02hi"
    [svid] = take_svids(b"\x0a\x02\x18\x05" + later)
    assert (svid.identity, svid.chain, len(svid.key)) == ("spiffe://", (), 0)


@pytest.mark.parametrize(
    "wire",
    [b"\x0a\x05\x0a", b"\x0a", b"\x0b", b"\x09\x00", b"\xff" * 11, b"\x0a\x03\x0a\x01\x0a"],
    ids=["cut off", "no length", "a group", "half a number", "endless number", "bad certificate"],
)
def test_what_is_no_answer_is_refused_and_overwritten(wire: bytes) -> None:
    copy = bytes(bytearray(wire))
    with pytest.raises(CaError, match="can't be read"):
        take_svids(copy)
    assert len(copy) == 1 or not any(copy)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_read_as_the_library_reads_them_or_refused(wire: bytes) -> None:
    with contextlib.suppress(CaError, DecodeError):
        found = take_svids(bytes(bytearray(wire)))
        expected = Response.FromString(wire).x509_svids
        assert [held(svid.key) for svid in found] == [svid.x509_svid_key for svid in expected]


@pytest.mark.parametrize(
    ("svid", "words"),
    [
        (Svid(WEB, (), Secret(memoryview(b"k"))), "without a certificate"),
        (Svid(WEB, (b"c",), Secret(memoryview(b""))), "without a key"),
        (Svid(WEB, (b"c",), Secret(memoryview(b"k"))), "no certificate"),
    ],
)
def test_an_incomplete_svid_is_refused(svid: Svid, words: str) -> None:
    with pytest.raises(CaError, match=words):
        check_svid(svid, WEB, ("root",), NOW)


def test_roots_are_those_of_the_own_trust_domain() -> None:
    cas = [SmallCa("a"), SmallCa("b")]
    bundle = b"".join(_der(ca) for ca in cas)
    other = {"spiffe://other.td": _der(SmallCa("c"))}
    for name in ("spiffe://cluster.local", "cluster.local"):
        assert roots_of({name: bundle, **other}, "cluster.local") == roots_pem(cas)


@pytest.mark.parametrize(
    ("bundle", "words"),
    [(b"", "is empty"), (b"\x30\x82\xff\xff", "can't be read"), (b"\x30\x00", "can't be read")],
)
def test_a_bundle_without_roots_is_refused(bundle: bytes, words: str) -> None:
    with pytest.raises(CaError, match=words):
        roots_of({"spiffe://cluster.local": bundle}, "cluster.local")


def test_more_roots_than_the_data_plane_takes_are_refused() -> None:
    with pytest.raises(CaError, match="65 roots"):
        roots_of({"cluster.local": _der(SmallCa()) * 65}, "cluster.local")


def _der(ca: SmallCa) -> bytes:
    return ca.root.public_bytes(Encoding.DER)

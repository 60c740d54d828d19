"""Packets and DNS messages as the tracer reads them; those of somebody who means harm too."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from agent.trace import dns, packet
from agent.trace.dns import Lookups
from tests.support.dns import AAAA, query

if TYPE_CHECKING:
    from agent.trace.tracer import Record

V4 = bytes([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 1, 0, 2, 10, 96, 0, 1])
V6 = bytes([0x60, 0, 0, 0, 0, 20, 17, 64]) + b"\xfd" + bytes(14) + b"\x01" + b"\xfd" + bytes(15)


def udp(source: int, destination: int, payload: bytes, behind: bytes = b"") -> bytes:
    header = struct.pack("!4H", source, destination, 8 + len(payload), 0)
    return V6 + header + payload + behind


def answer(question: bytes, *records: bytes, code: int = 0) -> bytes:
    head = question[:2] + struct.pack("!5H", 0x8180 | code, 1, len(records), 0, 0)
    return head + question[12:] + b"".join(records)


def address(value: bytes, kind: int = 1) -> bytes:
    return b"\xc0\x0c" + struct.pack("!2HIH", kind, 1, 60, len(value)) + value


def test_ends_and_flags_of_tcp() -> None:
    found = packet.parse(V4 + struct.pack("!2H8xBB", 41000, 80, 0x50, 0x12))
    assert found is not None
    assert found.ends == ("10.1.0.2:41000", "10.96.0.1:80")
    assert (found.protocol, found.flags) == ("tcp", "SYN ACK")


def test_payload_ends_where_the_packet_does() -> None:
    found = packet.parse(udp(1, 53, b"payload", behind=b"other memory"))
    assert found is not None
    assert found.ends == ("[fd00::1]:1", "[fd00::]:53")
    assert found.payload == b"payload"


def test_later_fragments_have_no_ports() -> None:
    fragment = V4[:6] + b"\x00\x10" + V4[8:] + bytes(20)
    found = packet.parse(fragment)
    assert found is not None
    assert (found.protocol, found.ports) == ("tcp", ())


def test_what_is_no_packet_gives_none() -> None:
    for content in (b"", b"\x45", V4[:19], V6[:39], b"\x00" * 64):
        assert packet.parse(content) is None


def test_an_answers_addresses_are_read() -> None:
    question = query("api.shop")
    found = dns.read(answer(question, address(b"\x0a\x60\0\1"), address(bytes(15) + b"\1", AAAA)))
    assert found is not None
    assert (found.name, found.type, found.code) == ("api.shop", "A", "NOERROR")
    assert found.addresses == ("10.96.0.1", "::1")


def test_names_cannot_speak_to_the_terminal() -> None:
    found = dns.read(bytes(4) + b"\0\1" + bytes(6) + b"\x05a\x1b[2J\0\0\1\0\1")
    assert found is not None
    assert found.name == "a\\027[2J"


@pytest.mark.parametrize(
    "name",
    [
        b"\xc0\x0c",  # to itself
        b"\x01a\xc0\x0c",  # to what leads here again
        b"\xc0\xff",  # ahead
        b"\x40a",  # neither a label nor a pointer
        b"\x3fa",  # past the end
    ],
)
def test_names_without_an_end_are_refused(name: bytes) -> None:
    assert dns.read(bytes(4) + b"\0\1" + bytes(6) + name) is None


def test_noise_is_never_an_error() -> None:
    for size in range(80):
        for _ in range(20):
            noise = os.urandom(size)
            dns.read(noise)
            dns.read(bytes(4) + b"\0\1\0\3" + bytes(4) + noise)
            packet.parse(b"\x45" + noise)


# ---- questions and answers


def record(time: int, source: int, destination: int, payload: bytes, cgroup: int = 1) -> Record:
    return {
        "time": time,
        "cgroup": cgroup,
        "netns": 7,
        "pid": 4711,
        "comm": "curl",
        "sent": 1,
        "packet": udp(source, destination, payload).hex(),
    }


def reverse(made: Record) -> Record:
    raw = bytes.fromhex(made["packet"])
    return made | {"packet": (raw[:8] + raw[24:40] + raw[8:24] + raw[40:]).hex()}


def test_an_answer_is_matched_and_timed_from_the_first_question() -> None:
    state, question = Lookups(lambda cgroup: cgroup == 77, 15053), query("api")
    assert not list(state.feed(record(1000, 40000, 15053, question)))
    assert not list(state.feed(record(3000, 40000, 15053, question)))
    reply = answer(question, address(b"\x0a\x60\0\1"), code=0)
    (found,) = state.feed(reverse(record(9000, 53, 40000, reply)))
    assert (found.latency_ns, found.via, found.own) == (8000, 15053, False)
    assert (found.addresses, found.process, found.pid) == (("10.96.0.1",), "curl", 4711)
    # What the client asked, not where it was led.
    assert found.server == "[fd00::]:53"
    assert not list(state.feed(reverse(record(9500, 53, 40000, reply))))


def test_an_answer_to_another_port_or_name_is_not_its() -> None:
    state, question = Lookups(lambda _: False, 15053), query("api")
    list(state.feed(record(1, 40000, 53, question)))
    assert not list(state.feed(reverse(record(2, 53, 40001, answer(question)))))
    other = question[:2] + query("db")[2:]
    assert not list(state.feed(reverse(record(3, 53, 40000, answer(other)))))
    (found,) = state.due(dns.PATIENCE_NS + 1)
    assert (found.name, found.code, found.latency_ns) == ("api", "", None)


def test_questions_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "KEPT", 10)
    state = Lookups(lambda _: False, 15053)
    for port in range(1000, 1100):
        list(state.feed(record(port, port, 53, query("api"))))
    assert len(list(state.due(10**15))) == 10

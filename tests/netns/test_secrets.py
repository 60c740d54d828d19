"""Private keys stay in the data plane, tokens in their files: searched for in the memory of a real
agent, in everything both processes log, and in everything they show."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.story import greets
from agent.dataplane import Dataplane

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")

# P-256, the one kind of key in the mesh: PKCS#8 and SEC1 up to the secret number itself, and PEM.
KEYS = re.compile(
    rb"\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07"
    rb"\x04[\x27\x6d]\x30[\x25\x6b]\x02\x01\x01\x04\x20"
    rb"|\x30\x77\x02\x01\x01\x04\x20"
    # Libraries hold the words; a key has its base64 behind them.
    rb"|-----BEGIN (?:EC )?PRIVATE KEY-----\\?\r?\n?M[A-Za-z0-9+/]{20}"
)

HOLDER = """\
import sys
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
key = ec.generate_private_key(ec.SECP256R1())
encoding, form = getattr(Encoding, sys.argv[1]), getattr(PrivateFormat, sys.argv[2])
held = key.private_bytes(encoding, form, NoEncryption())
print("held", flush=True)
sys.stdin.read()
"""


def keys_in(pid: int) -> list[bytes]:
    """What looks like a private key in the process's writable memory."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
        for line in maps:
            bounds, rights, *_, last = line.split()
            if not rights.startswith("rw") or last in ("[vvar]", "[vsyscall]"):
                continue
            start, end = (int(part, 16) for part in bounds.split("-"))
            try:
                memory.seek(start)
                content = memory.read(end - start)
            except OSError:
                continue
            found += [match.group()[:8] for match in KEYS.finditer(content)]
    return found


@pytest.mark.parametrize(
    ("encoding", "form"),
    [("DER", "PKCS8"), ("DER", "TraditionalOpenSSL"), ("PEM", "PKCS8")],
)
async def test_the_search_finds_a_key_where_there_is_one(encoding: str, form: str) -> None:
    pipe = asyncio.subprocess.PIPE
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, encoding, form, stdin=pipe, stdout=pipe
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert await holder.stdout.readline() == b"held\n"
        assert keys_in(holder.pid)
    finally:
        holder.stdin.close()
        await holder.wait()


async def test_no_private_key_is_in_the_agents_memory(mesh: Mesh, shop: Shop) -> None:
    assert await greets(shop.web, shop.db)
    for node in mesh.world.nodes:
        held = await mesh.admin(node, "certificates")
        assert any(entry["state"] == "Available" for entry in held)
        status = await mesh.admin(node, "status")
        assert keys_in(status["pid"]) == []


async def test_neither_keys_nor_tokens_are_logged_or_shown(mesh: Mesh, shop: Shop) -> None:
    assert await greets(shop.web, shop.db)
    shown = b""
    for node in mesh.world.nodes:
        for page in ("status", "pods", "certificates", "connections", "workloads"):
            shown += json.dumps(await mesh.admin(node, page)).encode()
        observer = await Dataplane.connect(
            mesh.run_dir / node.name / "dataplane.sock", role="observer"
        )
        try:
            for section in ("workloads", "services", "policies", "certificates", "workloadState"):
                async for chunk in observer.dump(section):
                    shown += chunk
        finally:
            await observer.close()
    assert b"certChain" in shown
    for log in mesh.folder.glob("*.log"):
        shown += log.read_bytes()
    assert b"certificate installed" in shown
    assert b"PRIVATE KEY" not in shown
    assert KEYS.search(shown) is None
    for node in mesh.world.nodes:
        token = (mesh.folder / f"{node.name}.token").read_bytes().strip()
        assert len(token) > 20
        assert token not in shown
        # The part that signs it alone would do, too.
        assert token.rpartition(b".")[2] not in shown

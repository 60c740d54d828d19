"""A part that is told to end while something happens ends."""

import asyncio

from agent.identity import CaConfig, IdentityManager
from tests.support.targets import RecordingKeeper


async def test_cancellation_in_the_moment_of_an_event_is_not_lost() -> None:
    config = CaConfig(address="https://127.0.0.1:1", root_cert="SYSTEM", node_name="n1")
    for _ in range(20):
        manager = IdentityManager(config, "cluster.local")
        task = asyncio.create_task(manager.run())
        manager.attach(RecordingKeeper(), [])
        await asyncio.sleep(0.001)
        # Both reach the loop in the same turn.
        manager.wanted("spiffe://other.td/ns/a/sa/b", connection=False)
        await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5)
        assert done
        assert task.cancelled()

"""The nftables library, used in the network namespace that the calling thread is in."""

from __future__ import annotations

import json
from typing import Any

from redirect.base import NotRetryable, RedirectError

NO_LIBRARY = (
    "the nftables Python library can't be loaded ({0}); install the packages nftables and"
    " python3-nftables, and let the virtual environment see system packages"
)


class Exists(RedirectError):
    """Something that was to be created is there."""


def run(text: str) -> None:
    """Applies the text as one transaction: all of it, or RedirectError and nothing; Exists where
    it creates what is there."""
    code, _, error = _context().cmd(text)
    if code != 0:
        raise explain(error)


def read(family: str, table: str, *, counters: bool = False) -> list[dict[str, Any]] | None:
    """The objects of a table as nft's JSON has them, None when there is no such table.

    Without handles, and without the values of counters unless asked for.
    """
    nft = _context()
    nft.set_json_output(True)
    nft.set_stateless_output(not counters)
    code, output, error = nft.cmd(f"list table {family} {table}")
    if code != 0:
        if "No such file or directory" in error:
            return None
        raise explain(error)
    objects = [item for item in json.loads(output)["nftables"] if "metainfo" not in item]
    for item in objects:
        for fields in item.values():
            fields.pop("handle", None)
        if not counters and "counter" in item:
            # Printed whatever is asked for.
            item["counter"].update(packets=0, bytes=0)
    return objects


def counters(family: str, table: str) -> dict[str, int]:
    """Packets of the table's named counters; none without the table."""
    nft = _context()
    nft.set_json_output(True)
    code, output, error = nft.cmd(f"list counters table {family} {table}")
    if code != 0:
        if "No such file or directory" in error:
            return {}
        raise explain(error)
    found = (item["counter"] for item in json.loads(output)["nftables"] if "counter" in item)
    return {one["name"]: one["packets"] for one in found}


def explain(error: str) -> RedirectError:
    """What nft printed, as an exception with a remedy where one is known."""
    first = next((line for line in error.splitlines() if line.strip()), "no message").strip()
    if "cgroupv2 path fails" in error:
        # The leaf went away between our look at it and nft's.
        return RedirectError(f"nft: {first}; is the data plane running?")
    if "File exists" in error:
        return Exists(f"nft: {first}")
    if "Operation not permitted" in error:
        return NotRetryable(f"nft: {first}; give the agent CAP_NET_ADMIN")
    if "Operation not supported" in error or "Protocol error" in error:
        return NotRetryable(
            f"nft: {first}; the kernel lacks a part of nftables:"
            " load nft_chain_nat, nft_redir, nft_ct, nft_socket and nft_reject_inet"
        )
    if "No such file or directory" in error:
        return RedirectError(
            f"nft: {first}; a part of nftables may be missing in the kernel:"
            " load nft_chain_nat, nft_redir, nft_ct, nft_socket and nft_reject_inet"
        )
    return RedirectError(f"nft: {first}")


def _context() -> Any:
    """A new context: its netlink socket belongs to the namespace it was opened in."""
    try:
        import nftables

        context: Any = nftables.Nftables  # untyped library
        return context()
    except (ImportError, OSError, AttributeError) as exc:
        raise NotRetryable(NO_LIBRARY.format(exc)) from exc

"""pyroute2's netlink for routes and rules, without the rest of it.

The package's front door imports sixty kinds of sockets, a database and a file server: five
megabytes of every agent (measured), for three netlink messages.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

_PACKAGE = "pyroute2"


def _load() -> tuple[Any, Any]:
    """Imports two modules of the package past its front door, which stays closed for nobody else:
    a later `import pyroute2` is as usual."""
    spec = None if _PACKAGE in sys.modules else importlib.util.find_spec(_PACKAGE)
    if spec is not None:
        sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        from pyroute2.iproute.linux import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    finally:
        if spec is not None:
            del sys.modules[_PACKAGE]
    return IPRoute, NetlinkError


# An untyped library; errors have a `code`.
IPRoute, NetlinkError = _load()

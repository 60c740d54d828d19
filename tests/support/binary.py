"""Where the data plane's binary lies, as the agent finds it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from agent.config import BINARY


def dataplane_binary() -> str:
    named = os.environ.get("UNDERPASS_DATAPLANE_BIN")
    beside = Path(sys.executable).parent / BINARY
    found = named or (str(beside) if beside.exists() else shutil.which(BINARY))
    assert found, f"{BINARY} is neither named nor beside {sys.executable} nor in PATH"
    return found

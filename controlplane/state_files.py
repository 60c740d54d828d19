"""Files of the state folder: written whole or not at all, secrets readable by the owner alone."""

import os
import secrets
from pathlib import Path

SECRET = 0o600
PUBLIC = 0o644


def ensure_folder(state: Path) -> None:
    """Creates the state folder for its owner alone; an existing one keeps its mode."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)


def write(path: Path, data: bytes, mode: int) -> None:
    """Replaces `path` in one step, so that a reader or a crash never meets half a file."""
    scratch = _scratch(path, data, mode)
    os.replace(scratch, path)


def create(path: Path, data: bytes, mode: int) -> bytes:
    """Creates `path` unless it exists; returns what it holds. Two creators agree on one content."""
    scratch = _scratch(path, data, mode)
    try:
        os.link(scratch, path)
    except FileExistsError:
        return path.read_bytes()
    finally:
        scratch.unlink()
    return data


def _scratch(path: Path, data: bytes, mode: int) -> Path:
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(handle, mode)
        file.write(data)
        file.flush()
        os.fsync(handle)
    return scratch

"""Builds the control plane's parts, binds them and serves until told to end."""

from controlplane.options import Options, OptionsError

__all__ = ["Options", "OptionsError", "run"]


def run(options: Options) -> int:
    """Blocks until SIGTERM or SIGINT. 0: clean end; 64: bad options; 1: can't serve."""
    raise NotImplementedError

"""Start and end of the process: bad options together, taken ports and folders, SIGTERM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from controlplane.options import Options
from controlplane.server import ControlPlane, StartError, run
from tests.unit.controlplane.plane import plane

_PROGRAM = """
import sys
from pathlib import Path
from controlplane.server import Options, run
base = Path(sys.argv[1])
sys.exit(run(Options(base, base / "state", listen=("127.0.0.1:0", "[::1]:0"))))
"""


def test_bad_options_are_reported_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        Options(
            tmp_path / "none",
            tmp_path / "state",
            listen=("15012", "127.0.0.1:99999"),
            trust_domain="a/b",
            vip_ranges=("10.0.0.1/8",),
            extra_sans=("not a name",),
        )
    )
    shown = capsys.readouterr().err
    assert code == 64
    for flag in ("--manifests", "--listen 15012", "--listen 127.0.0.1:99999", "--trust-domain",
                 "--vip-range", "--san"):  # fmt: skip
        assert flag in shown
    assert not (tmp_path / "state").exists()


async def test_a_state_folder_serves_one_control_plane(tmp_path: Path) -> None:
    async with plane(tmp_path) as running:
        with pytest.raises(StartError, match="another control plane uses it"):
            await ControlPlane.bind(running.running.options)


async def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    async with plane(tmp_path) as running:
        options = Options(tmp_path / "manifests", tmp_path / "second", listen=(running.address,))
        with pytest.raises(StartError, match="is the port taken"):
            await ControlPlane.bind(options)


def test_sigterm_ends_it_cleanly(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout
        ready = process.stdout.readline().split()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert ready[0] == "ready"
    assert len(ready) == 3
    assert process.returncode == 0
    assert "control plane ended" in log

"""docs/limits.md names only settings and metrics that exist, and all settings that are limits."""

import re
from pathlib import Path

import pytest

from agent.settings import SETTINGS
from proto.gen import control_pb2

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "dataplane" / "core" / "src"
AGENT = ROOT / "agent" / "admin" / "metrics.py"
SETTING = re.compile(r"`([a-z0-9]+(?:\.[a-z0-9-]+)+)`")
METRIC = re.compile(r"`([a-z_0-9]+)(?:\{reason=\"([a-z_]+)\"\})?`")


def rows() -> list[list[str]]:
    text = (ROOT / "docs" / "limits.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in table if row[-1] not in ("metric", "---")]


def named(pattern: re.Pattern[str], column: int) -> set[tuple[str, ...]]:
    return {match.groups() for row in rows() for match in pattern.finditer(row[column])}


def test_every_setting_on_the_page_exists() -> None:
    known = {setting.name for setting in SETTINGS}
    assert {name for (name,) in named(SETTING, 3)} <= known


def test_every_limit_is_on_the_page() -> None:
    settings = {s.name for s in SETTINGS if s.name.startswith(("limits.", "http2."))}
    assert settings <= {name for (name,) in named(SETTING, 3)}
    fields = {field.name for field in control_pb2.Limits.DESCRIPTOR.fields}
    words = {"limits." + re.sub("_ms$", "", name).replace("_", "-") for name in fields}
    # How long a drain may take is no bound on what peers do.
    assert words - {"limits.drain-deadline"} <= settings


def test_every_metric_and_reason_on_the_page_exists() -> None:
    sources = [path.read_text() for path in (*SOURCES.rglob("*.rs"), AGENT)]
    registered = {name for text in sources for name in re.findall(r'"([a-z_0-9]+)"', text)}
    header = (ROOT / "bpf" / "include" / "reasons.h").read_text()
    registered |= {name.lower() for name in re.findall(r"\bREASON_([A-Z_]+) = ", header)}
    for name, reason in named(METRIC, 4):
        assert {name, name.removesuffix("_total")} & registered, name
        assert reason is None or reason in registered, reason


def test_every_bound_names_how_it_shows() -> None:
    table = rows()
    assert len(table) > 20
    silent = [row[0] for row in table if not METRIC.search(row[4])]
    assert silent == [], "rows without a metric"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_a_default_that_is_a_setting_is_the_settings_own(row: list[str]) -> None:
    settings = {setting.name: setting.default for setting in SETTINGS}
    for name in SETTING.findall(row[3])[:1]:
        default = settings[name]
        if isinstance(default, int) and not isinstance(default, bool):
            size = f"{default >> 20} MiB" if default % (1 << 20) == 0 else str(default)
            assert size in row[2], (name, default)

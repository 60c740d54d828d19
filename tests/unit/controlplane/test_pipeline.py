"""What happens between folder and index when something runs out."""

import logging
from pathlib import Path

import pytest

from controlplane.model.translate import Translator
from controlplane.model.vips import Ranges
from controlplane.options import parse_ranges
from controlplane.pipeline import Pipeline
from controlplane.sources.manifests import Manifests
from controlplane.vip_store import VipStore, VipStoreError
from controlplane.wds.encoding import ADDRESS
from controlplane.wds.index import Index
from tests.unit.controlplane.world import MESH, pod


def services(count: int) -> str:
    return "---\n".join(
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: s{n}}}\n"
        "spec: {ports: [{port: 80}]}\n"
        for n in range(count)
    )


async def test_a_full_range_is_told_and_stops_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "a.yaml").write_text(services(3) + "---\n" + pod("cart"))
    manifests, index = Manifests(folder), Index()
    ranges = Ranges(*parse_ranges(("10.0.0.0/30",)))
    vips = VipStore.load(tmp_path, ranges)
    pipeline = Pipeline(manifests, Translator(MESH), vips, index)
    await manifests.load()
    with caplog.at_level(logging.ERROR):
        pipeline.refresh()
    assert index.count(ADDRESS) == 4
    assert len([v4 for v4, _ in vips.assigned.values() if v4]) == 2
    assert "10.0.0.0/30 has no free address" in pipeline.notices[0]
    assert "larger --vip-range" in caplog.text


def test_a_broken_vip_file_is_not_forgotten_silently(tmp_path: Path) -> None:
    (tmp_path / "vips.json").write_text('{"a": [')
    with pytest.raises(VipStoreError, match="restore it, or remove it"):
        VipStore.load(tmp_path, Ranges(None, None))

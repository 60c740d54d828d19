"""The agent checks names that the data plane's access log has."""

import re
from pathlib import Path

from agent.values import ACCESS_FIELDS

ROOT = Path(__file__).parents[2]


def test_fields_that_may_be_omitted_are_those_of_the_access_log() -> None:
    source = (ROOT / "dataplane/core/src/telemetry/access.rs").read_text()
    found = re.search(r"FIELDS: &\[&str\] = &\[(.*?)\];", source, re.DOTALL)
    assert found is not None
    assert tuple(re.findall(r'"([a-z_.]+)"', found[1])) == ACCESS_FIELDS

"""Writes docs/compatibility-env.md from the table of upstream's names; `--check` only compares."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility-env.md"
sys.path.insert(0, str(ROOT))

from agent.dropin.rows import PROXY_CONFIG_ROWS, ROWS, Row  # noqa: E402
from agent.dropin.translate import MARKERS, MESH_FILE  # noqa: E402

# Paragraphs; each becomes one line of the page.
HEAD = """# Environment names of upstream's node proxy

`underpass agent` takes the environment of upstream's node proxy, so that it starts in its place:
without a flag of ours it then serves the pods of the CNI node agent's socket (`--pods zds`), or
the one workload of dedicated mode. Our own flags, environment and file win over all of these. They
are read only where at least one of {markers} is set. Bad values are reported together with ours,
and the agent exits with 64.

`PROXY_CONFIG` and `defaultConfig` of `./{mesh}` are read first; a name below wins over them. An
empty value is as none.

One thing differs on purpose: listeners never share their ports. While another proxy still holds
those of a pod, ours answers the CNI node agent with an error for it, the traffic stays with the
old proxy, and the ports are tried every 100 ms. It is ready meanwhile, so that a rolling upgrade
proceeds. Nor does it exit when the CNI node agent breaks the protocol: it says so and connects
anew, since the node's connections can't help it.

This page is written by `tools/env_table.py`.
"""


def main() -> int:
    page = render()
    if "--check" in sys.argv[1:]:
        stale = not PAGE.exists() or PAGE.read_text() != page
        if stale:
            print(f"{PAGE.name} is stale: run tools/env_table.py", file=sys.stderr)
        return int(stale)
    PAGE.write_text(page)
    return 0


def render() -> str:
    markers = ", ".join(f"`{name}`" for name in MARKERS)
    return "\n".join(
        (
            *(
                paragraph.replace("\n", " ").strip() + "\n"
                for paragraph in HEAD.format(markers=markers, mesh=MESH_FILE).split("\n\n")
            ),
            "| name | our setting | note |\n|---|---|---|",
            *map(line, ROWS),
            "",
            "Keys of ProxyConfig:\n",
            "| key | our setting | note |\n|---|---|---|",
            *map(line, PROXY_CONFIG_ROWS),
            "",
        )
    )


def line(row: Row) -> str:
    shown = f"`{row.setting}`" if row.setting else "none"
    if row.ignored:
        shown = "ignored, with a warning"
    return f"| `{row.name}` | {shown} | {row.note} |"


if __name__ == "__main__":
    raise SystemExit(main())

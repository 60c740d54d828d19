"""`underpass agent`: every setting as a flag; `agent.config` reads them together."""

import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from agent import config
from agent.errors import ConfigErrors
from agent.settings import SETTINGS, Setting
from agent.values import Listen

# EX_USAGE of sysexits.h: no restart will help (design, configuration).
EXIT_CONFIG = 64


@click.pass_context
def _run(context: click.Context, /, config_file: Path | None, **options: Any) -> None:
    sought = context.find_root().obj
    try:
        wanted = config.load(_with_outer(options, sought), os.environ, config_file)
    except ConfigErrors as errors:
        click.echo(f"{len(errors.mistakes)} mistake(s) in the configuration:", err=True)
        for mistake in errors.mistakes:
            click.echo(f"  {mistake}", err=True)
        sys.exit(EXIT_CONFIG)

    from agent import app

    sys.exit(app.run(wanted))


def _with_outer(options: Mapping[str, Any], sought: Any) -> dict[str, Any]:
    """`underpass --node N agent` means the same as `underpass agent --node N`."""
    merged = dict(options)
    root = click.get_current_context().find_root()
    for name in ("node", "run_dir"):
        source = root.get_parameter_source(name)
        if merged.get(name) is None and source is click.core.ParameterSource.COMMANDLINE:
            merged[name] = str(getattr(sought, name))
    return merged


def _option(setting: Setting) -> click.Option:
    # Neither type nor environment is click's business: all mistakes are reported together.
    return click.Option(
        [setting.flag, setting.option],
        help=f"{setting.help}  {_hints(setting)}",
        multiple=isinstance(setting.default, dict),
        metavar=_metavar(setting),
    )


def _hints(setting: Setting) -> str:
    shown = _shown(setting.default)
    return f"[env: {setting.env}{f'; default: {shown}' if shown else ''}]"


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "true" if default else "false"
    if isinstance(default, Listen):
        return f"{default.host}:{default.port}"
    if isinstance(default, timedelta):
        seconds = int(default.total_seconds())
        for unit, size in (("h", 3600), ("m", 60)):
            if seconds >= size and seconds % size == 0:
                return f"{seconds // size}{unit}"
        return f"{seconds}s"
    return "" if default in (None, "", {}) else str(default)


def _metavar(setting: Setting) -> str:
    if isinstance(setting.default, bool):
        return "true|false"
    if isinstance(setting.default, dict):
        return "NAME=VALUE"
    if isinstance(setting.default, timedelta):
        return "DURATION"
    if isinstance(setting.default, int):
        return "NUMBER"
    return "TEXT"


_IN_FILE = "; ".join(f"{row.name}: {row.help}" for row in SETTINGS if row.only_in_file)

agent = click.Command(
    "agent",
    callback=_run,
    params=[
        click.Option(
            ["--config", "config_file"],
            type=click.Path(path_type=Path),
            help=f"YAML file with any of these settings, and with {_IN_FILE}  "
            f"[env: {config.CONFIG_FILE_ENV}]",
        ),
        *(_option(setting) for setting in SETTINGS if not setting.only_in_file),
    ],
    help=(
        "Run this node's agent and its data plane.\n\n"
        "A flag wins over the environment, the environment over the file. Durations are numbers"
        " with ms, s, m, h or d. Needs root (or NET_ADMIN, NET_RAW, SYS_ADMIN)."
    ),
)

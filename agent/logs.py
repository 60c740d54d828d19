"""Log lines as facts with fields, `pod added uid=… netns=…`, as text or JSON, on stderr."""

import json
import logging
import sys
from datetime import UTC, datetime

from agent.slices import Log

# What a LogRecord always has; everything else came as `extra` and is a field.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL,
}
# Loggers that have a level of their own, by `setup`.
_chosen: set[str] = set()


def setup(config: Log) -> None:
    """Replaces whatever handlers were there. Safe to repeat, for example on a changed filter."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if config.format == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # What an earlier filter named and this one may not.
    for target in _chosen:
        logging.getLogger(target).setLevel(logging.NOTSET)
    _chosen.clear()
    # The same directives configure the data plane: `LEVEL` or `target=LEVEL`, comma-separated.
    for directive in config.filter.split(","):
        target, equals, level = directive.strip().rpartition("=")
        chosen = LEVELS.get(level.lower())
        if chosen is not None:
            name = target.replace("::", ".") if equals else None
            logging.getLogger(name).setLevel(chosen)
            _chosen.update({name} if name else ())


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_quoted(value)}" for key, value in _fields(record).items())
        level = record.levelname.lower()
        line = f"{_time(record)} {level:7} {record.name}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "scope": record.name,
            "message": record.getMessage(),
        } | {key: _plain(value) for key, value in _fields(record).items()}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _OWN}


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond:06d}Z"


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | None) else str(value)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or set(text) & set(' "=\n') else text

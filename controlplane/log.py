"""Log lines as facts with fields: `pod added uid=… node=…`."""

import json
import logging


def fact(logger: logging.Logger, level: int, what: str, **fields: object) -> None:
    """Logs `what` followed by its fields; a value with spaces or quotes is quoted as JSON."""
    if logger.isEnabledFor(level):
        rest = "".join(f" {name}={_value(value)}" for name, value in fields.items())
        logger.log(level, "%s%s", what, rest)


def _value(value: object) -> str:
    text = str(value)
    if not text or any(char.isspace() or char in '"=\\' for char in text):
        return json.dumps(text, ensure_ascii=False)
    return text

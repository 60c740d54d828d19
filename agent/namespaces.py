"""What an operator sets per namespace of pods, from `namespaces: NAME: {registryOnly: on, …}` in
the configuration file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from agent.errors import Mistake

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_FIELDS = {"registryOnly": "registry_only", "waypointRequired": "waypoint_required"}
_SWITCHES = {"cutPrecapture": "cut_precapture"}
# Known names whose features aren't there yet: ignoring one would let somebody believe in it.
_LATER = ("sameNode",)
_UDP = ("allow", "deny")
# YAML reads bare `on` and `off` as true and false.
_ENFORCEMENT = {"off": "off", "dry-run": "dry-run", "on": "on", True: "on", False: "off"}


@dataclass(frozen=True)
class NamespaceRules:
    """off, dry-run (passes, is logged and counted) or on."""

    # A destination that the control plane doesn't know is refused.
    registry_only: str = "off"
    # Inbound traffic that didn't come through the workload's waypoint is refused.
    waypoint_required: str = "off"
    # Connections older than a pod's capture are cut as it is captured; None: as for the node.
    cut_precapture: bool | None = None
    # UDP other than DNS, and what is like it, is refused in both directions.
    udp_deny: bool = False


NamespaceTable = Mapping[str, NamespaceRules]


def namespace_table(value: object) -> NamespaceTable:
    """Raises Mistake naming namespace and key."""
    if not isinstance(value, Mapping):
        raise Mistake("a mapping is wanted: NAME: {registryOnly: on}")
    return MappingProxyType({_name(name): _rules(str(name), raw) for name, raw in value.items()})


def _name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise Mistake(f"{value}: not a namespace; lower-case letters, digits and '-'")
    return value


def _rules(name: str, raw: object) -> NamespaceRules:
    if not isinstance(raw, Mapping):
        raise Mistake(f"{name}: a mapping is wanted, for example {{registryOnly: on}}")
    found: dict[str, Any] = {}
    for key, value in raw.items():
        if key in _LATER:
            raise Mistake(f"{name}: {key}: comes with a later release; take it out")
        if key in _SWITCHES:
            if not isinstance(value, bool):
                raise Mistake(f"{name}: {key}: {value!r} is unknown; write true or false")
            found[_SWITCHES[key]] = value
            continue
        if key == "udp":
            if value not in _UDP:
                raise Mistake(f"{name}: {key}: {value!r} is unknown; write allow or deny")
            found["udp_deny"] = value == "deny"
            continue
        if key not in _FIELDS:
            known = ", ".join((*_FIELDS, *_SWITCHES, "udp", *_LATER))
            raise Mistake(f"{name}: {key}: unknown; known are {known}")
        if not isinstance(value, str | bool) or value not in _ENFORCEMENT:
            raise Mistake(f"{name}: {key}: {value!r} is unknown; write off, dry-run or on")
        found[_FIELDS[key]] = _ENFORCEMENT[value]
    return NamespaceRules(**found)

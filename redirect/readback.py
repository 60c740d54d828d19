"""Compares a table read from a pod with what the kernel makes of a fresh rendering."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from redirect.base import InstalledRule

if TYPE_CHECKING:
    from collections.abc import Sequence

Objects = list[dict[str, Any]]


def differences(found: Objects | None, wanted: Objects) -> tuple[str, ...]:
    """What somebody did to the table, in words that name chain and rule; () when nothing."""
    if found is None:
        return ("the table was removed",)
    found_chains, wanted_chains = _chains(found), _chains(wanted)
    problems = [
        *_objects(found, wanted),
        *(f"chain {name} is missing" for name in wanted_chains if name not in found_chains),
        *(f"chain {name} was added" for name in found_chains if name not in wanted_chains),
    ]
    for name, chain in wanted_chains.items():
        if name in found_chains:
            if found_chains[name] != chain:
                problems.append(f"chain {name} hooks in differently")
            problems += _rules(name, _rules_of(found, name), _rules_of(wanted, name))
    return tuple(problems)


def installed(found: Objects | None) -> tuple[InstalledRule, ...]:
    """Rules with their counters, in the order in which they stand."""
    rules = []
    for item in found or []:
        if (rule := item.get("rule")) is not None:
            # A named one is shared by rules.
            counters = [e["counter"] for e in rule["expr"] if isinstance(e.get("counter"), dict)]
            counter: dict[str, int] = counters[0] if counters else {}
            rules.append(
                InstalledRule(
                    rule["chain"],
                    _name(rule),
                    counter.get("packets", 0),
                    counter.get("bytes", 0),
                )
            )
    return tuple(rules)


def _rules(chain: str, found: Sequence[Any], wanted: Sequence[Any]) -> list[str]:
    found_names, wanted_names = [_name(r) for r in found], [_name(r) for r in wanted]
    missing = Counter(wanted_names) - Counter(found_names)
    extra = Counter(found_names) - Counter(wanted_names)
    problems = [f"rule {name} is missing in {chain}" for name in missing.elements()]
    problems += [f"rule {name} was added to {chain}" for name in extra.elements()]
    expected = {_name(rule): rule["expr"] for rule in wanted}
    problems += [
        f"rule {name} in {chain} was changed"
        for name, rule in zip(found_names, found, strict=True)
        if name in expected and rule["expr"] != expected[name]
    ]
    common = [name for name in found_names if name in expected]
    if not problems and common != wanted_names:
        problems.append(f"rules of {chain} stand in another order")
    return problems


def _objects(found: Objects, wanted: Objects) -> list[str]:
    """Sets, maps, flowtables and the like, and flags of the table itself."""

    def others(objects: Objects) -> list[str]:
        return [
            json.dumps(item, sort_keys=True)
            for item in objects
            if "rule" not in item and "chain" not in item
        ]

    problems = []
    for text in sorted(set(others(found)) ^ set(others(wanted))):
        kind, fields = next(iter(json.loads(text).items()))
        problems.append(f"{kind} {fields.get('name', '')} isn't as installed")
    return problems


def _chains(objects: Objects) -> dict[str, Any]:
    return {item["chain"]["name"]: item["chain"] for item in objects if "chain" in item}


def _rules_of(objects: Objects, chain: str) -> list[Any]:
    return [i["rule"] for i in objects if "rule" in i and i["rule"]["chain"] == chain]


def _name(rule: Any) -> str:
    return str(rule.get("comment") or "without a name")

"""Whatever is done to a table, the comparison says so; counters and handles are no difference."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from redirect.readback import differences, installed

Objects = list[dict[str, Any]]

TABLE = {"table": {"family": "inet", "name": "underpass"}}


def chain(name: str) -> dict[str, Any]:
    return {"chain": {"name": name, "type": "nat", "hook": "output", "prio": -100}}


def rule(chain: str, name: str | None, port: int) -> dict[str, Any]:
    fields = {"chain": chain, "expr": [{"counter": None}, {"redirect": {"port": port}}]}
    return {"rule": fields | ({"comment": name} if name else {})}


@st.composite
def tables(draw: st.DrawFn) -> Objects:
    """Chains with rules whose names are unique in their chain, as `ruleset` makes them."""
    found: Objects = [TABLE]
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True)):
        found.append(chain(name))
        for number in range(draw(st.integers(1, 5))):
            found.append(rule(name, f"rule-{number}", draw(st.integers(1, 3))))
    return found


@given(tables())
def test_a_table_equals_itself(table: Objects) -> None:
    assert differences(copy.deepcopy(table), table) == ()


@given(tables(), st.data())
def test_a_removed_part_is_named(table: Objects, data: st.DataObject) -> None:
    index = data.draw(st.integers(1, len(table) - 1))
    found = [*table[:index], *table[index + 1 :]]
    kind, fields = next(iter(table[index].items()))
    name = fields["name"] if kind == "chain" else fields["comment"]
    assert any(f"{kind} {name} is missing" in problem for problem in differences(found, table))


@given(tables(), st.data(), st.sampled_from([None, "foreign", "rule-0"]))
def test_an_added_rule_is_named_also_when_it_takes_a_name_of_ours(
    table: Objects, data: st.DataObject, name: str | None
) -> None:
    index = data.draw(st.integers(1, len(table) - 1))
    where = next(iter(table[index].values())).get("chain") or table[index]["chain"]["name"]
    found = [*table[:index], rule(where, name, 9), *table[index:]]
    problems = differences(found, table)
    assert any("was added" in problem for problem in problems), problems


@given(tables(), st.data())
def test_a_changed_rule_is_named(table: Objects, data: st.DataObject) -> None:
    found = copy.deepcopy(table)
    changed = data.draw(st.sampled_from([item["rule"] for item in found if "rule" in item]))
    changed["expr"] = [{"accept": None}]
    expected = f"rule {changed['comment']} in {changed['chain']} was changed"
    assert differences(found, table) == (expected,)


@given(tables(), st.data())
def test_another_order_is_named(table: Objects, data: st.DataObject) -> None:
    pairs = [
        number
        for number in range(len(table) - 1)
        if "rule" in table[number] and "rule" in table[number + 1]
    ]
    if not pairs:
        return
    at = data.draw(st.sampled_from(pairs))
    found = [*table[:at], table[at + 1], table[at], *table[at + 2 :]]
    where = table[at]["rule"]["chain"]
    assert differences(found, table) == (f"rules of {where} stand in another order",)


def test_a_missing_table_is_one_problem() -> None:
    assert differences(None, [TABLE]) == ("the table was removed",)


def test_counters_are_read_in_order() -> None:
    counted = {
        "rule": {
            "chain": "a",
            "comment": "outbound-v4",
            "expr": [{"match": {}}, {"counter": {"packets": 2, "bytes": 120}}],
        }
    }
    found = installed([TABLE, chain("a"), counted, rule("a", None, 1)])
    assert [(r.name, r.packets, r.bytes) for r in found] == [
        ("outbound-v4", 2, 120),
        ("without a name", 0, 0),
    ]

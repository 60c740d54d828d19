"""Hostile and broken YAML of operators' files."""

import pytest

from agent import yaml_text


def test_ordinary_text_is_read() -> None:
    assert yaml_text.load("- {name: a, ports: [1, 2]}\n") == [{"name": "a", "ports": [1, 2]}]
    assert yaml_text.load("") is None


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000 + "x"])
def test_nesting_that_would_end_the_process_is_refused(text: str) -> None:
    with pytest.raises(yaml_text.NotYaml, match="line 1 is nested over 64 levels"):
        yaml_text.load(text)


@pytest.mark.parametrize("text", ["{ this is : not [ a list", "a: 2020-13-45", "a: !!python/x 1"])
def test_every_failure_is_of_one_kind_and_one_line(text: str) -> None:
    with pytest.raises(yaml_text.NotYaml) as caught:
        yaml_text.load(text)
    assert "\n" not in str(caught.value)

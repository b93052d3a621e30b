from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from llmcompress import plugins
from llmcompress.errors import EnvironmentProblem


@pytest.fixture(autouse=True)
def _forget() -> None:
    plugins.discover.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    point = EntryPoint("mine", value, "llmcompress.families")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == point.group else [])


def test_entry_points_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "fractions:Fraction")
    assert plugins.discover("llmcompress.families")["mine"].__name__ == "Fraction"
    assert plugins.discover("other") == {}


@pytest.mark.parametrize("value", ["no_such_module:thing", "fractions:NoSuchThing"])
def test_broken_plug_ins_are_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    install(monkeypatch, value)
    with pytest.raises(EnvironmentProblem, match="mine"):
        plugins.discover("llmcompress.families")

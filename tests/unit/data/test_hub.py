"""Whether the hub answers is asked once for all that a recipe names."""

from __future__ import annotations

import urllib.error
from typing import Any

import pytest

from llmcompress.data import hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were asked; nobody answers."""
    import datasets
    import huggingface_hub.constants as constants

    found: list[str] = []

    def refuse(request: Any, timeout: float) -> Any:
        found.append(request.full_url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(hub, "_ASKED", {})
    monkeypatch.setattr(hub.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return found


def test_a_silent_hub_is_asked_once_a_minute(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    now = [100.0]
    monkeypatch.setattr(hub.time, "monotonic", lambda: now[0])
    for _ in range(3):
        assert hub.hub_silence() == "https://hub.example does not answer (no route to host)"
        assert hub.out_of_reach(["nobody/one", "nobody/two"]).keys() == {"nobody/one", "nobody/two"}
    assert asked == ["https://hub.example"]
    now[0] += hub.RECENT + 1
    hub.hub_silence()
    assert len(asked) == 2
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    assert "mirror.example" in str(hub.hub_silence())
    assert asked[2:] == ["https://mirror.example"]


def test_an_answer_holds_as_long(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Any, timeout: float) -> Any:
        asked.append(request.full_url)
        raise urllib.error.HTTPError(request.full_url, 501, "no such method", {}, None)  # type: ignore[arg-type]

    monkeypatch.setattr(hub.urllib.request, "urlopen", answer)
    assert [hub.hub_silence() for _ in range(3)] == [None, None, None]
    assert len(asked) == 1


def test_a_network_that_is_off_is_not_asked_and_not_remembered(asked: list[str]) -> None:
    with hub.offline(True):
        assert "switched off" in str(hub.hub_silence())
    assert asked == [] and hub._ASKED == {}

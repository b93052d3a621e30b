from __future__ import annotations

import pytest

from llmcompress.errors import ExportError
from llmcompress.export.registry import FORMATS, exporter


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_an_exporter_of_its_name(name: str) -> None:
    assert exporter(name).name == name


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(ExportError) as caught:
        exporter("onnx")
    assert "compressed-tensors" in str(caught.value.hint)


def test_only_the_native_format_keeps_policies() -> None:
    assert [name for name in FORMATS if not exporter(name).losses({"pesf": {}})] == ["native"]

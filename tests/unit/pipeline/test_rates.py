from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmcompress.errors import InputError
from llmcompress.pipeline.rates import CURVES, NUMBERS, SHIPPED, Rates, rate_at


def test_rates_are_interpolated_between_widths_and_constant_outside() -> None:
    curve = ((100.0, 1e9), (10000.0, 1e11))
    assert rate_at(curve, 50) == 1e9 and rate_at(curve, 20000) == 1e11
    assert rate_at(curve, 1000) == pytest.approx(1e10)
    assert rate_at(curve[::-1], 1000) == rate_at(curve, 1000)


def test_every_rate_of_a_file_is_needed(tmp_path: Path) -> None:
    data = json.loads(SHIPPED.read_text())
    assert set(CURVES) | set(NUMBERS) <= set(data) and len(CURVES) + len(NUMBERS) > 20
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(data))
    assert Rates.load(path) == Rates.load()
    for name in (*CURVES, *NUMBERS):
        path.write_text(json.dumps({key: value for key, value in data.items() if key != name}))
        with pytest.raises(InputError, match=name):
            Rates.load(path)

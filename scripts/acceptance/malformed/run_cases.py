from __future__ import annotations

from malformed.bench import Case

CASES: list[Case] = []

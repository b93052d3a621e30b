from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.evaluation.config import RecallConfig
from llmcompress.evaluation.recall import prompts, recall, scores, values
from llmcompress.models.handle import load_tokenizer
from llmcompress.models.paths import resolve_path

TEXT = torch.randint(300, 4000, (2000,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve_path("asset:reference_moe"))


def config(**options: Any) -> RecallConfig:
    source = {"kind": "inline", "texts": ["x"]}
    return RecallConfig(**{"source": source, "distances": (40, 200), "samples": 6, "candidates": 5, **options})


class Oracle:
    """A model that answers with the token at a fixed distance from the end."""

    device = torch.device("cpu")

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, 5000)
        if input_ids.shape[1] > self.reach:
            logits[torch.arange(len(input_ids)), -1, input_ids[:, -1 - self.reach]] = 1.0
        return SimpleNamespace(logits=logits)


def test_the_word_stands_exactly_at_the_distance(tokenizer: Any) -> None:
    for distance in (40, 200):
        ids, candidates = prompts(tokenizer, TEXT, distance, config())
        assert torch.equal(ids[:, -1 - distance], candidates[:, 0])
        assert all(len(set(row.tolist())) == 5 for row in candidates)
        assert tokenizer.decode(ids[0]).endswith(" is")
    assert set(candidates.flatten().tolist()) <= set(values(tokenizer))


def test_a_model_that_looks_back_remembers_and_others_do_not(tokenizer: Any) -> None:
    parts = recall(Oracle(40), tokenizer, TEXT, config(), batch=4)  # type: ignore[arg-type]
    assert parts[0]["accuracy"] == 1.0
    assert parts[1]["accuracy"] == 0.0, "a tie is not a memory"
    assert [score.metric for score in scores(parts)] == ["at_40", "at_200"]
    assert scores(parts)[0].rows == (1.0,) * 6


def test_the_error_is_that_of_a_share(tokenizer: Any) -> None:
    class Every(Oracle):
        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            found = super().__call__(input_ids, use_cache)
            found.logits[::3] = 0.0
            return found

    (part, _) = recall(Every(40), tokenizer, TEXT, config(), batch=6)  # type: ignore[arg-type]
    assert part["rows"] == [0.0, 1.0, 1.0] * 2
    assert part["stderr"] == pytest.approx(torch.tensor(part["rows"]).std().item() / 6**0.5)


def test_nan_is_refused_and_no_lack_of_memory(tokenizer: Any) -> None:
    class Broken(Oracle):
        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 5000), float("nan")))

    with pytest.raises(InputError, match="not finite"):
        recall(Broken(40), tokenizer, TEXT, config())  # type: ignore[arg-type]


def test_equal_settings_ask_equal_questions(tokenizer: Any) -> None:
    first, again = prompts(tokenizer, TEXT, 60, config()), prompts(tokenizer, TEXT, 60, config())
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], prompts(tokenizer, TEXT, 60, config(seed=1))[0])


def test_a_text_too_short_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="distances: 200 does not fit"):
        prompts(tokenizer, TEXT[:50], 200, config())

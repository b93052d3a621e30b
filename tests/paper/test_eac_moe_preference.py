"""EAC-MoE Eq. 3 and 4: expert preference of a text, and how alike two texts use the experts."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.algorithms.expert_preference import by_layer, preference, similarities, similarity
from llmcompress.evaluation.expert_preference import count_choices, preference_report
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.skipping import attach


def counts(*layers):
    return [torch.tensor(layer) for layer in layers]


def test_preference_and_similarity_by_hand():
    first, second = counts([3, 1], [0, 2, 2]), counts([1, 1], [4, 0, 0])
    assert preference(first).tolist() == [0.75, 0.25, 0, 0.5, 0.5]
    # (0.75 + 0.25)/2 over the product of the lengths; the second layer's choices have nothing in common
    lengths = math.sqrt(0.75**2 + 0.25**2 + 0.5) * math.sqrt(0.5 + 1)
    assert similarity(preference(first), preference(second)) == pytest.approx(0.5 / lengths)
    assert similarities([first, second])[0] == pytest.approx([1.0, 0.5 / lengths])
    assert by_layer(first, second) == pytest.approx([0.5 / math.sqrt((0.75**2 + 0.25**2) / 2), 0.0])


def test_the_length_of_a_text_does_not_count():
    some = counts([3, 1, 0], [1, 1, 2])
    assert similarity(preference(some), preference([7 * layer for layer in some])) == pytest.approx(1)
    assert similarity(preference(counts([0, 0])), preference(counts([1, 1]))) == 0


def test_counts_are_those_of_the_models_own_choice(tiny, moe_family):
    model = tiny.model(moe_family)
    layout = layout_from_config(model.config.to_dict())
    banks = [block.bank for block in layout.blocks if block.bank is not None]
    windows = torch.randint(3, 64, (5, 16), generator=torch.Generator().manual_seed(0))
    # what an expert-skipping policy would take away counts all the same
    attach(model, layout, {"alpha": 1.0})
    found = count_choices(model, layout, windows)
    assert model.llmcompress_skipping.policy.alpha == 1.0
    assert found.tokens == 80
    model.llmcompress_skipping.detach()
    chosen = {}
    for bank in banks:
        router = model.get_submodule(bank.router.module)
        router.register_forward_hook(lambda _m, _a, out, key=bank.module: chosen.setdefault(key, []).append(out[2]))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for number, bank in enumerate(banks):
        per_window = [torch.bincount(index.flatten(), minlength=bank.num_experts) for index in chosen[bank.module]]
        assert torch.equal(found.counts[number], sum(per_window))
        assert torch.equal(found.halves[0][number], sum(per_window[::2]))


def test_texts_of_one_kind_are_more_alike(tiny):
    """Two texts of the same few tokens are alike as far as their length allows, one of others is not."""
    model = tiny.model("olmoe")
    layout = layout_from_config(model.config.to_dict())
    generator = torch.Generator().manual_seed(0)
    texts = {
        name: torch.randint(low, low + 6, (12, 32), generator=generator)
        for name, low in (("one", 5), ("again", 5), ("other", 40))
    }
    report = preference_report(model, layout, texts)
    (_, same, other), (back, _, _), _ = report["similarity"]
    assert same == back > other + 0.05
    assert [row["own"] > other for row in report["texts"][:2]] == [True, True]
    assert [row["tokens"] for row in report["texts"]] == [384] * 3
    for row in report["layers"]:
        assert row["lowest"] <= 1 and set(row["unused"]) == set(texts)


def test_one_window_has_no_halves_to_compare(tiny):
    model = tiny.model("mixtral")
    layout = layout_from_config(model.config.to_dict())
    report = preference_report(model, layout, {"short": torch.randint(3, 64, (1, 16))})
    assert report["texts"][0]["own"] is None and report["layers"][0]["lowest"] is None
    assert report["similarity"][0][0] == pytest.approx(1)

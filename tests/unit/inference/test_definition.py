"""The definition of the decode step against transformers and the step itself, and whether each fact is put to the test.

A model's facts go one way only: from its modules into a :class:`~llmcompress_kernels.decode.Decoder`, which C++ and the
definition read. So an error of a fact shows as a difference from transformers, one of C++ as one from the definition.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from llmcompress_kernels import decode as native
from llmcompress_kernels.decode_delta import Delta
from llmcompress_kernels.decode_layer import Latents, Layer, Routing
from llmcompress_kernels.reference import decode_step

from llmcompress.inference.coverage import DELTAS, FAMILIES
from llmcompress.inference.native import open_engine

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")

# logits are of size 8: some units of the last place; modules take tokens through delta rules in chunks
EXACT, IN_CHUNKS = 5e-5, 2e-4
TOKENS = 20
# other forms of families, for facts that the usual ones have not
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere-normed": ("cohere", {"use_qk_norm": True}),
    "phi-normed": ("phi", {"qk_layernorm": True}),
    "lfm2": (
        "lfm2",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "conv_bias": True,
            "block_auto_adjust_ff_dim": False,
            "head_dim": None,
        },
    ),
}


def engine_of(decoders: Any, name: str) -> Any:
    """An engine of a packed model of a family or one of :data:`FORMS`."""
    family, changes = FORMS.get(name, (name, {}))
    return open_engine(decoders.packed(family, 4, **changes), positions=32)


@pytest.mark.parametrize("name", [*FAMILIES, *DELTAS, *FORMS])
def test_definition_says_what_transformers_and_the_step_say(decoders: Any, ids: torch.Tensor, name: str) -> None:
    engine, tokens = engine_of(decoders, name), ids[:TOKENS]
    with torch.no_grad():
        expected = engine.model(tokens[None], use_cache=False).logits[0]
        found = decode_step.logits(engine.decoder, tokens)
    assert (found - expected).abs().max() < (IN_CHUNKS if name in DELTAS else EXACT)
    stepped = [engine.prompt(0, tokens[:9].tolist())]
    stepped += [engine.step(tokens[at : at + 1])[0].clone() for at in range(9, TOKENS)]
    assert (torch.stack(stepped) - found[8:]).abs().max() < EXACT


# facts of models that are not among these, and where they are compared
ELSEWHERE = {
    **dict.fromkeys(("mixes", "reads_aside", "aside", "entry", "exit"), "test_hybrid.py"),
    **dict.fromkeys(("screen", "screen_error", "floor"), "test_engine.py"),
    **dict.fromkeys(("member_embeddings", "member_heads"), "../../integration/test_family_native.py"),
    **dict.fromkeys(("codec", "fixed"), "test_delta_states.py"),
}
OWNERS = (native.Decoder, Layer, Routing, Latents, Delta)


def defaults_of(owner: type) -> dict[str, Any]:
    """Facts that a model may be without, and what stands for that."""
    missing = dataclasses.MISSING
    return {each.name: each.default for each in dataclasses.fields(owner) if each.init and each.default is not missing}


def facts_of(decoder: Any) -> set[str]:
    """Facts of a model that are not their defaults."""
    layers = list(decoder.layers)
    owners = [decoder, *layers, decoder.routing, decoder.latents, *(layer.delta for layer in layers)]
    found: set[str] = set()
    for owner in (owner for owner in owners if owner is not None):
        for name, default in defaults_of(type(owner)).items():
            value = getattr(owner, name)
            if value is not default and (isinstance(value, torch.Tensor) or value != default):
                found.add(name)
    return found


def without(decoder: Any, fact: str) -> Any:
    """A decoder without a fact."""

    def plain(owner: Any) -> Any:
        known = None if owner is None else defaults_of(type(owner))
        return owner if known is None or fact not in known else dataclasses.replace(owner, **{fact: known[fact]})

    layers = [dataclasses.replace(plain(layer), delta=plain(plain(layer).delta)) for layer in decoder.layers]
    rest = {"routing": plain(decoder.routing), "latents": plain(decoder.latents)}
    rest = {name: value for name, value in rest.items() if name != fact}
    return dataclasses.replace(plain(decoder), layers=layers, **rest)


def test_every_fact_is_of_some_model_and_changes_what_it_says(decoders: Any, ids: torch.Tensor) -> None:
    """No fact that the step reads is left untried: one that no model here has would be compared with nothing."""
    tokens, tried = ids[:TOKENS], set(ELSEWHERE)
    for name in (*FAMILIES, *DELTAS, *FORMS):
        decoder = engine_of(decoders, name).decoder
        left = facts_of(decoder) - tried
        own = decode_step.logits(decoder, tokens) if left else torch.empty(0)
        for fact in sorted(left):
            try:
                other = decode_step.logits(without(decoder, fact), tokens)
            except (AssertionError, RuntimeError, ValueError, TypeError):
                # what else the model has makes no sense without it
                tried.add(fact)
                continue
            if (own - other).abs().max() > 100 * EXACT:
                tried.add(fact)
    known = {fact for owner in OWNERS for fact in defaults_of(owner)}
    assert tried == known

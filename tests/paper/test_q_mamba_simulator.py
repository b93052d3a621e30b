"""The per-token simulator: equal to transformers' scan without quantization, equal to decoding with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.algorithms.decoupled_scales import fake_quantize, quantize
from llmcompress.algorithms.selective_scan import ScanInputs, scan
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.mixers import attach, detach, recurrent_evaluation
from llmcompress.quant.states import SCALE, StateSpec

TOKENS = torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(0))


def long_memory(tiny: Any, family: str) -> tuple[Any, Any]:
    """A tiny model whose states remember, and its layout."""
    model = tiny.model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.sub_(3.0)
    return model, layout_from_config(model.config.to_dict())


def logits(model: Any, ids: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_without_quantization_it_is_the_forward_pass(ssm_family: str, tiny: Any) -> None:
    model, layout = long_memory(tiny, ssm_family)
    expected = logits(model)
    attach(model, layout, {"bits": 16, "codec": "none"})
    # all tokens belong to the prompt, so that time steps are limited as in a prefill
    with recurrent_evaluation(model, TOKENS.shape[1]):
        found = logits(model)
    assert not torch.equal(found, expected), "the scan was not replaced"
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
    detach(model, layout)
    assert torch.equal(logits(model), expected)


def hooked_decode(model: Any, layout: Any, spec: StateSpec) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Independent of our scan: transformers' own decoding, a hook rounds each state after each token."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    trace: list[torch.Tensor] = []
    handles = []
    for block in layout.blocks:
        view = block.scan
        if view is None:
            continue

        def hook(module: Any, _args: Any, _kwargs: Any, _output: Any, view: Any = view) -> None:
            state = cache.layers[module.layer_idx].recurrent_states[0]
            # a delta rule has columns of keys before those of values
            across = view.rule
            fresh = state.float().view(-1, view.heads, *state.shape[2:]).mT if across else state.float()
            fresh = fresh.reshape(-1, view.heads, view.channels, view.states)
            trace.append(fresh.clone())
            stored = fake_quantize(fresh, spec)
            state.copy_((stored.mT if across else stored).reshape(state.shape))

        handles.append(model.get_submodule(view.module).register_forward_hook(hook, with_kwargs=True))
    word = "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values"
    outputs = []
    with torch.no_grad():
        for t in range(TOKENS.shape[1]):
            position = torch.full((3, 1), t)
            extra = {} if word == "cache_params" else {"position_ids": position}
            outputs.append(model(TOKENS[:, t : t + 1], **{word: cache}, use_cache=True, **extra).logits)
    for handle in handles:
        handle.remove()
    return torch.cat(outputs, 1), trace


@pytest.mark.parametrize("bits", [4, 8])
def test_with_it_every_state_is_that_of_decoding_token_by_token(ssm_family: str, tiny: Any, bits: int) -> None:
    model, layout = long_memory(tiny, ssm_family)
    plain = logits(model)
    expected, trace = hooked_decode(model, layout, StateSpec(bits))
    runtime = attach(model, layout, {"bits": bits, "codec": "dsq"})
    seen: dict[tuple[int, int], torch.Tensor] = {}
    runtime.observe = lambda layer, fresh, token: seen.update({(token, layer): fresh.clone()})
    found = logits(model)
    layers = sorted({layer for _, layer in seen})
    ordered = [seen[token, layer] for token in range(TOKENS.shape[1]) for layer in layers]
    assert len(ordered) == len(trace)
    spec = StateSpec(bits)
    # the two sum in different orders, so a value that lies between two codes may go either way; later layers see that.
    # By processor that are up to 0.5 % of 8-bit codes; states rounded elsewhere differ in most
    first = [*zip(ordered, trace)][:: len(layers)]
    differ = torch.stack([quantize(ours, spec).codes != quantize(theirs, spec).codes for ours, theirs in first])
    assert float(differ.float().mean()) < 1e-2
    # Zamba2's shared transformers, random here, multiply such a difference with every token; half of them are compared
    compared = slice(TOKENS.shape[1] // 2 if ssm_family == "zamba2" else None)
    assert float((found - expected)[:, compared].norm()) < 0.2 * float((found - plain)[:, compared].norm())


def test_a_prompt_stays_in_float_until_its_last_token(tiny: Any) -> None:
    model, layout = long_memory(tiny, "mamba2")
    plain = logits(model)
    runtime = attach(model, layout, {"bits": 4, "codec": "dsq"})
    with recurrent_evaluation(model, 8):
        found = logits(model)
    torch.testing.assert_close(found[:, :8], plain[:, :8], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[:, 8:], plain[:, 8:], atol=1e-4)
    with recurrent_evaluation(model, torch.tensor([8, 1, 20])):
        mixed = logits(model)
    assert torch.equal(mixed[0], found[0])
    assert torch.equal(mixed[1], logits(model)[1])
    torch.testing.assert_close(mixed[2], plain[2], atol=1e-5, rtol=1e-5)
    assert runtime.prompt == 1


def test_decoding_with_a_cache_is_the_simulator_with_a_prompt(tiny: Any) -> None:
    """Prefill of 8 tokens, then token by token, against one simulated pass."""
    from transformers import DynamicCache

    model, layout = long_memory(tiny, "bamba")
    plain = logits(model)
    attach(model, layout, {"bits": 4, "codec": "dsq", "window": 3})
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(TOKENS[:, :8], past_key_values=cache, use_cache=True).logits]
        for t in range(8, 20):
            step = model(TOKENS[:, t : t + 1], past_key_values=cache, position_ids=torch.full((3, 1), t))
            parts.append(step.logits)
    with recurrent_evaluation(model, 8):
        simulated = logits(model)
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[:, :8], simulated[:, :8], atol=1e-4, rtol=1e-4)
    # the two sum in different orders, on every processor in others: a value between two codes may go either way
    near = torch.isclose(found, simulated, atol=1e-4, rtol=1e-4).all(-1)
    assert float(near.float().mean()) > 0.5
    assert float((found - simulated).norm()) < 0.1 * float((simulated - plain)[:, 8:].norm())


def test_error_identity() -> None:
    """Section 3.2 (2): E_t = a_t E_{t-1} + e_t reproduces the difference of quantized and float states."""
    generator = torch.Generator().manual_seed(0)
    x, b = torch.randn(2, 50, 4, 8, generator=generator), torch.randn(2, 50, 2, 16, generator=generator)
    dt = torch.rand(2, 50, 4, 1, generator=generator) * 0.2
    a = -torch.rand(4, 1, 1, generator=generator)
    inputs, spec = ScanInputs(x, dt, a, b, b), StateSpec(4)
    exact: list[torch.Tensor] = []
    scan(inputs, None, lambda fresh, t: exact.append(fresh) or fresh)  # type: ignore[func-returns-value]
    error, largest = torch.zeros(2, 4, 8, 16), 0.0

    def store(fresh: torch.Tensor, t: int) -> torch.Tensor:
        nonlocal error, largest
        stored = fake_quantize(fresh, spec)
        error = (dt[:, t, :, :, None] * a).exp() * error + (stored - fresh)
        largest = max(largest, float((error - (stored - exact[t])).abs().max()))
        return stored

    scan(inputs, None, store)
    assert float(error.abs().max()) > 1e-2
    assert largest < 1e-5


@pytest.mark.parametrize("policy", [{}, {"codec": "dsq_static_p"}, {"window": 3}, {"bits": 8}, {"head_bits": [4, 8]}])
def test_kernels_and_plain_loop_agree(policy: dict[str, Any], tiny: Any) -> None:
    """A size for which there are kernels: simulation and decoding with them against the loops they replace."""
    from transformers import DynamicCache

    from llmcompress.nn import mixers, states

    model = tiny.model("mamba2", head_dim=32, num_heads=2, state_size=32, hidden_size=32, n_groups=1)
    layout = layout_from_config(model.config.to_dict())
    widths = {name: policy["head_bits"] for name, _ in mixers.scans(layout)} if "head_bits" in policy else None
    options = {"bits": 4, "codec": "dsq", **policy, "head_bits": widths}
    for name, view in mixers.scans(layout):
        scale = torch.full((view.heads, view.channels), 0.3, dtype=torch.float16)
        model.get_submodule(name).register_buffer(SCALE, scale if "codec" in policy else None)
    runtime = attach(model, layout, options)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [model(TOKENS[:, :8], cache_params=cache, use_cache=True).logits]
            parts += [model(TOKENS[:, t : t + 1], cache_params=cache, use_cache=True).logits for t in range(8, 20)]
        return logits(model), torch.cat(parts, 1)

    fast = both()
    plain, sizes = runtime, states.KERNEL_STATES
    states.KERNEL_STATES = ()  # type: ignore[assignment]
    try:
        slow = both()
    finally:
        states.KERNEL_STATES = sizes
    assert plain is runtime
    for ours, theirs in zip(fast, slow):
        # sums of other order move a value over the edge between two codes now and then, which later tokens remember
        furthest = (ours - theirs).abs().amax(-1)
        assert furthest.median() < 2e-5
        assert furthest.max() < 0.1, "logits are of size 1; one code moves them by less"

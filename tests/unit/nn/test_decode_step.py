"""Decode steps and prompts of a packed Mamba-2 by the GPU's launches, under Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from llmcompress_kernels import gpu

from llmcompress.models.registry import layout_from_config
from llmcompress.nn import decode_step
from llmcompress.nn.mixers import attach

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)
if triton.__version__ < "3.9" and np.__version__ >= "2.4":
    pytest.skip("the interpreter of this triton needs numpy < 2.4", allow_module_level=True)

SIZES: dict[str, dict[str, int]] = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 32},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 32},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 32},
}
PROMPT = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
TOKENS = 7


def generate(model: Any) -> Any:
    return model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def quantized(tiny: Any, family: str = "mamba2", **policy: Any) -> Any:
    model = tiny.model(family, **SIZES[family])
    model.generation_config.eos_token_id = None
    attach(model, layout_from_config(model.config.to_dict()), {"bits": 4, "codec": "dsq", **policy})
    return model


def on_the_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> list[Any]:
    """Decode as tensors of a GPU would be, from now on; filled with the calls."""
    calls = []

    def decode(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return gpu.mamba2_decode(*arguments)

    monkeypatch.setattr(gpu, "no_triton", lambda: None)
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "triton")
    monkeypatch.setattr(decode_step, "TOKEN_TYPES", {"cpu": (dtype,)})
    monkeypatch.setattr(decode_step.DecodeStep, "fits_prompt", lambda *_: False)
    monkeypatch.setattr(decode_step.kernels, "mamba2_decode", decode)
    return calls


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("mamba2", {}),
        *((family, {"rounding": "dither", "window": 3}) for family in SIZES),
    ],
)
def test_three_launches_generate_what_transformers_forward_does(
    monkeypatch: pytest.MonkeyPatch, tiny: Any, family: str, policy: dict[str, Any]
) -> None:
    model = quantized(tiny, family, **policy)
    monkeypatch.setattr(decode_step, "TOKEN_TYPES", {})
    plain = generate(model)
    calls = on_the_gpu(monkeypatch, torch.float32)
    found = generate(model)
    mixers = sum(type(module).__name__ in decode_step.PLAIN for module in model.modules())
    assert len(calls) == (TOKENS - 1) * mixers > 0
    assert torch.equal(found.sequences, plain.sequences)
    # a value between two codes may go the other way, because sums have another order
    assert max(map(apart, found.logits, plain.logits)) < 2e-3


def test_sixteen_bits_are_as_near_to_fp32_as_transformers_forward(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    """They are not the same: what transformers rounds to 16 bits in between stays in fp32."""
    model = quantized(tiny, rounding="dither").bfloat16()
    monkeypatch.setattr(decode_step, "TOKEN_TYPES", {})
    plain, exact = generate(model), generate(model.float())
    calls = on_the_gpu(monkeypatch, torch.bfloat16)
    found = generate(model.bfloat16())
    assert calls
    begin = PROMPT.shape[1]
    agree = [
        t
        for t in range(1, TOKENS)
        if all(torch.equal(one.sequences[:, : begin + t], exact.sequences[:, : begin + t]) for one in (plain, found))
    ]
    assert len(agree) >= 3
    errors = [sum(apart(one.logits[t], exact.logits[t]) for t in agree) for one in (found, plain)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(SIZES))
def test_a_prompt_by_a_gpus_kernels_is_transformers_forward(
    monkeypatch: pytest.MonkeyPatch, tiny: Any, family: str, dtype: torch.dtype
) -> None:
    """Its logits, and those of more text after it, which starts from the packed state and the convolution's."""
    model = quantized(tiny, family)
    mixers = sum(type(module).__name__ in decode_step.PLAIN for module in model.modules())
    ids = torch.randint(3, 64, (2, 29), generator=torch.Generator().manual_seed(1))

    def read() -> list[torch.Tensor]:
        held = model(ids[:, :21], use_cache=True)
        name = "cache_params" if getattr(held, "cache_params", None) is not None else "past_key_values"
        return [held.logits, model(ids[:, 21:], use_cache=True, **{name: held[name]}).logits]

    calls = []

    def prompt(*arguments: Any) -> torch.Tensor:
        *operands, limits, epsilon = arguments
        calls.append(operands[0].dtype)
        return gpu.mamba2_prefill(*operands, *limits, epsilon)

    monkeypatch.setattr(decode_step, "TOKEN_TYPES", {})
    with torch.no_grad():
        exact, plain = read(), None
        if dtype != torch.float32:
            model.to(dtype)
            plain = read()
        monkeypatch.setattr(decode_step, "TOKEN_TYPES", {"cpu": (dtype,)})
        monkeypatch.setattr(gpu, "no_triton", lambda: None)
        monkeypatch.setenv("LLMCOMPRESS_KERNELS", "triton")
        monkeypatch.setattr(decode_step.kernels, "mamba2_prefill", prompt)
        found = read()
    assert calls == [dtype] * (2 * mixers) != []
    if plain is None:
        assert apart(found[0], exact[0]) < 2e-5
        # a value between two codes may go the other way, because sums have another order
        assert apart(found[1], exact[1]) < 2e-3
        return
    for mine, theirs, truth in zip(found, plain, exact):
        assert apart(mine, truth) < 1.2 * apart(theirs, truth)


def test_a_gpu_without_the_kernel_keeps_transformers_forward(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    """The definition would go token by token."""
    model = quantized(tiny)
    mixer = next(module for module in model.modules() if type(module).__name__ in decode_step.PLAIN)
    view = next(block.scan for block in layout_from_config(model.config.to_dict()).blocks if block.scan is not None)
    hidden: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    step = decode_step.DecodeStep(mixer)
    monkeypatch.setattr(gpu, "no_triton", lambda: "no CUDA device")
    assert not step._scans(hidden, view)
    monkeypatch.setattr(gpu, "no_triton", lambda: None)
    assert step._scans(hidden, view)
    hidden.dtype = torch.float64
    assert not step._scans(hidden, view)

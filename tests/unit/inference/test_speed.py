"""The protocol of the speed comparison, with tiny models and a stand-in for llama.cpp's process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompress_kernels import decode as native_step

from llmcompress.errors import InputError
from llmcompress.inference import speed
from llmcompress.inference.engine import Engine

CASES = [speed.Case("prefill", 12), speed.Case("decode", 9, 2, 3)]


def test_every_candidate_in_every_case(decoders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress_kernels.bench.timing.PROBE_BYTES", 1 << 20)
    model = decoders.packed("llama", 4)
    candidates = {"transformers": speed.transformers(model), "dense": speed.transformers(speed.dense_twin(model))}
    if native_step.unavailable() is None:
        candidates["native"] = speed.native(Engine(model))
    rows = speed.measure(candidates, CASES, rounds=2, budget=0.5, threads=1)
    assert [(row["case"], row["candidate"]) for row in rows] == [(c.name, name) for c in CASES for name in candidates]
    for row in rows:
        tokens = 12 if row["phase"] == "prefill" else 6
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
        assert 0 < row["tokens_per_second"] <= row["best"]


def test_a_sample_leaves_the_context_as_it_was(decoders: Any) -> None:
    model = decoders.dense("llama")
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["past_key_values"].get_seq_length()) if "past_key_values" in kwargs
        else None, with_kwargs=True,
    )  # fmt: skip
    sample = speed.transformers(model)(CASES[1])
    sample()
    sample()
    assert seen == [0, 9, 10, 11, 9, 10, 11]


@pytest.mark.parametrize("family", ["mamba2", "granitemoehybrid", "falcon_h1"])
def test_states_go_on_and_keys_are_taken_back(family: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    made: list[Any] = []
    plain = transformers.DynamicCache
    monkeypatch.setattr(transformers, "DynamicCache", lambda **kw: made.append(plain(**kw)) or made[-1])
    sample = speed.transformers(tiny.model(family))(CASES[1])
    for _ in range(2):
        sample()
    (cache,) = made
    kept = [layer for layer in cache.layers if not hasattr(layer, "recurrent_states")]
    assert [layer.get_seq_length() for layer in kept] == [9] * (1 if family == "granitemoehybrid" else 0)


def test_a_cache_of_its_own_kind(decoders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    plain, model = speed.prompt_cache, decoders.dense("minimax")
    monkeypatch.setattr(speed, "prompt_cache", lambda model: made.append(plain(model)) or made[-1])
    sample = speed.transformers(model)(CASES[1])
    for _ in range(2):
        sample()
    (cache,) = made
    kinds = model.config.layer_types
    assert [layer.get_seq_length() for layer in cache.layers] == [9 * (kind == "full_attention") for kind in kinds]


def test_dense_twin_has_the_shape_and_no_packed_weight(decoders: Any) -> None:
    model = decoders.packed("mixtral", 3)
    twin = speed.dense_twin(model)
    assert twin.dtype == torch.bfloat16
    assert twin.model.layers[1].mlp.experts.gate_up_proj.shape == (8, 160, 48)
    assert type(twin.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_llama_cpp_answers_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(speed.PEER_VARIABLE, raising=False)
    with pytest.raises(InputError, match="names no Python"):
        speed.LlamaCpp(tmp_path / "m.gguf", 1, 32)
    monkeypatch.setenv(speed.PEER_VARIABLE, sys.executable)
    stand_in = tmp_path / "worker.py"
    stand_in.write_text(
        "import sys\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    if '\"batch\": 2' in line: raise SystemExit(7)\n"
        "    print(0.5, flush=True)\n"
    )
    monkeypatch.setattr("llmcompress.inference.llamacpp_worker.__file__", str(stand_in))
    peer = speed.LlamaCpp(tmp_path / "m.gguf", 1, 32)
    peer(CASES[0])()
    with pytest.raises(InputError, match="exit code 7"):
        peer(CASES[1])()
    peer.close()

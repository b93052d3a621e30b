from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.algorithms.hessian import Gram
from llmcompress.errors import InputError
from llmcompress.models import memory_limits
from llmcompress.models import walker as module
from llmcompress.models.capture import expert_weight, recorded_inputs, write_expert_weight
from llmcompress.models.handle import ModelHandle
from llmcompress.models.memory_limits import Limits
from llmcompress.models.stream_pairs import StreamRecorder
from llmcompress.models.walker import Walker

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
         "pad_token_id": 0}  # fmt: skip
DENSE = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    "phi3": {"sliding_window": 8},
    "glm": {},
    "stablelm": {},
    "starcoder2": {},
    "glm4": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "exaone4": {"sliding_window": 8},
    "nemotron": {},
    "cohere2": {"sliding_window": 8, "tie_word_embeddings": False},
    "phi": {},
    "apertus": {},
    "nanochat": {},
    "opt": {"num_key_value_heads": 4, "ffn_dim": 48},
    "gpt_neo": {"num_key_value_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
}
MIXED = {"first_k_dense_replace": 1, "moe_intermediate_size": 20, "n_routed_experts": 6, "num_experts_per_tok": 3}
PLAIN = {**DENSE, "glm4_moe": {**MIXED, "use_qk_norm": True, "routed_scaling_factor": 2.5}}
TOKENS = torch.randint(3, 64, (5, 16), generator=torch.Generator().manual_seed(0))


class Spy:
    """Wants everything, keeps what it is shown, changes weights by ``change``."""

    def __init__(self, model: Any, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.model, self.change, self.affinity = model, change, False
        self.grams: dict[str, Gram] = {}
        self.order: list[str] = []
        self.counts: list[int] = []
        self.shared: dict[str, torch.Tensor] = {}

    def wants(self, names: Sequence[str]) -> bool:
        return True

    def linears(self, group: Any, gram: Gram | None) -> None:
        for linear in group.linears:
            assert gram is not None
            self.grams[linear.name] = gram
            self.order.append(linear.name)
            if self.change is not None:
                weight = self.model.get_parameter(f"{linear.name}.weight")
                weight.data.copy_(self.change(weight.data))

    def router(self, bank: Any, router: Any, x: torch.Tensor) -> None:
        self.order.append(bank.router.module)

    def routed(self, bank: Any, counts: list[int]) -> None:
        self.counts = counts

    def experts(self, bank: Any, name: str, experts: slice, gram: Gram | None, shared: Any) -> None:
        assert gram is not None
        self.order.append(name)
        self.shared[name] = shared(experts.start)
        for expert in range(experts.start, experts.stop):
            own = slice(expert - experts.start, expert - experts.start + 1)
            self.grams[f"{name}.{expert}"] = Gram.of(gram.total[own], gram.tokens[own])
        if self.change is not None:
            owner = self.model.get_submodule(bank.module)
            write_expert_weight(owner, bank, name, experts, self.change(expert_weight(owner, bank, name, experts)))


def saved(folder: Path, tiny: Any, model_type: str) -> ModelHandle:
    if model_type in PLAIN:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SMALL, **PLAIN[model_type]})
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    else:
        tiny.model(model_type).save_pretrained(folder)
    return ModelHandle.open(folder, "float32")


def walk(
    handle: ModelHandle,
    visitor: Callable[[Any], Any] | None = None,
    advance: bool = True,
    tap: Any = None,
    **memory: Any,
) -> Any:
    """Run all blocks; return final hidden states, the skeleton and the visitors."""
    model = handle.skeleton()
    walker = Walker(model, TOKENS, **memory)
    hidden = walker.embed([block.name for block in handle.layout.blocks])
    visitors = []
    for block in handle.layout.blocks:
        handle.load_block(model, block.index)
        visitors.append(visitor(model) if visitor is not None else None)
        walker.forward(block, hidden, visitors[-1], advance, tap)
    norm = next(
        (view.name for view in handle.layout.outside if "norm" in view.name or ".ln_f." in view.name),
        "model.norm.weight",
    )
    return model.get_submodule(norm.removesuffix(".weight"))(hidden), model, visitors


def dense_hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.base_model(input_ids=TOKENS, use_cache=False).last_hidden_state
    return result


def check_family(model_type: str, tiny: Any, folder: Path) -> None:
    handle = saved(folder, tiny, model_type)
    dense = handle.dense_model()
    hidden, _, _ = walk(handle)
    torch.testing.assert_close(hidden, dense_hidden(dense), rtol=1e-4, atol=1e-4)

    # a visitor that halves every weight on sight must give the output of the halved model
    hidden, _, _ = walk(handle, lambda m: Spy(m, lambda w: w * 0.5))
    for name, *_ in handle.layout.quantizable():
        parameter = dense.get_parameter(name if ".experts." in name else f"{name}.weight")
        parameter.data.mul_(0.5)
    torch.testing.assert_close(hidden, dense_hidden(dense), rtol=1e-4, atol=1e-4)


def test_moe_families(moe_family: str, tiny: Any, tmp_path: Path) -> None:
    check_family(moe_family, tiny, tmp_path)


@pytest.mark.parametrize("model_type", sorted(PLAIN))
def test_other_families(model_type: str, tiny: Any, tmp_path: Path) -> None:
    check_family(model_type, tiny, tmp_path)


def test_sequences_of_which_an_earlier_layer_chooses_a_part_are_refused(tiny: Any, tmp_path: Path) -> None:
    tiny.model("glm_moe_dsa", index_topk=TOKENS.shape[1] - 1).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="16 tokens, and an earlier layer chooses 15 for it") as caught:
        walk(ModelHandle.open(tmp_path / "model"))
    assert "length of at most 15" in str(caught.value.hint)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_statistics_are_those_of_the_real_inputs(model_type: str, tiny: Any, tmp_path: Path) -> None:
    handle = saved(tmp_path, tiny, model_type)
    _, _, spies = walk(handle, Spy)
    dense = handle.dense_model()
    names = [linear.name for block in handle.layout.blocks for linear in block.linears()]
    inputs: dict[str, torch.Tensor] = {}

    def seen(position: int, x: torch.Tensor) -> None:
        inputs[names[position]] = x.flatten(0, -2)

    routed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    banks = [block.bank for block in handle.layout.blocks if block.bank is not None]
    hooks = [
        dense.get_submodule(bank.router.module).register_forward_hook(
            lambda _m, args, out, name=bank.module: routed.update({name: (args[0].flatten(0, -2), out[2])})
        )
        for bank in banks
    ]
    with recorded_inputs([dense.get_submodule(name) for name in names], seen):
        dense_hidden(dense)
    for hook in hooks:
        hook.remove()
    for block, spy in zip(handle.layout.blocks, spies):
        for linear in block.linears():
            x = inputs[linear.name]
            torch.testing.assert_close(spy.grams[linear.name].hessian()[0], 2 * x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        if block.bank is None:
            continue
        x, index = routed[block.bank.module]
        assert spy.counts == [int((index == e).sum()) for e in range(block.bank.num_experts)]
        for expert in range(block.bank.num_experts):
            mine = x[(index == expert).any(-1)]
            expected = 2 * mine.T @ mine / max(len(mine), 1)
            found = spy.grams[f"{block.bank.gate_up}.{expert}"].hessian()[0]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(spy.shared[block.bank.gate_up], 2 * x.T @ x / len(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "zamba2"])
def test_what_a_tap_keeps_stays_as_it_was_shown(model_type: str, tiny: Any, tmp_path: Path) -> None:
    handle = saved(tmp_path, tiny, model_type)
    recorder = StreamRecorder({name for name, *_ in handle.layout.quantizable()})
    walk(handle, Spy, tap=recorder)
    seen: dict[str, list[torch.Tensor]] = {}
    dense, names = handle.dense_model(), list(recorder.inputs)
    with recorded_inputs(
        [dense.get_submodule(name) for name in names],
        lambda at, x: seen.setdefault(names[at], []).append(x.flatten(0, -2).clone()),
    ):
        dense_hidden(dense)
    assert seen.keys() == recorder.inputs.keys()
    for name, kept in recorder.inputs.items():
        # a module that several blocks run is recorded by the block that owns it, its first use
        torch.testing.assert_close(torch.cat(kept), seen[name][0], rtol=1e-4, atol=1e-4)


def test_order_is_attention_router_experts(tiny: Any, tmp_path: Path) -> None:
    handle = saved(tmp_path, tiny, "mixtral")
    _, _, spies = walk(handle, Spy)
    layer = "model.layers.1"
    assert spies[1].order == [
        *(f"{layer}.self_attn.{p}_proj" for p in "qkvo"),
        f"{layer}.mlp.gate", f"{layer}.mlp.experts.gate_up_proj", f"{layer}.mlp.experts.down_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("activations", [None, 1, 20_000])
def test_memory_limits_do_not_change_a_bit(model_type: str, activations: int | None, tiny: Any, tmp_path: Path) -> None:
    handle = saved(tmp_path, tiny, model_type)
    hidden, _, spies = walk(handle, Spy)
    frugal, _, others = walk(handle, Spy, limits=Limits(1, 0, activations), folder=tmp_path / "spill")
    assert (tmp_path / "spill").exists() == (activations == 1 or (activations is not None and model_type != "llama"))
    assert not list(tmp_path.glob("spill/*"))
    assert torch.equal(frugal, hidden)
    for spy, other in zip(spies, others):
        assert spy.grams.keys() == other.grams.keys()
        for name, gram in spy.grams.items():
            assert torch.equal(other.grams[name].total, gram.total), name


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_inputs_share_memory_without_overwriting_each_other(
    model_type: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = saved(tmp_path, tiny, model_type)
    # several batches, so that the inputs of the last projection move into what the module's inputs have left
    monkeypatch.setattr(module, "BATCH_TOKENS", 32)
    hidden, _, spies = walk(handle, Spy)
    frugal, _, others = walk(handle, Spy, limits=Limits(keep=0))
    assert torch.equal(frugal, hidden)
    for spy, other in zip(spies, others):
        for name, gram in spy.grams.items():
            assert torch.equal(other.grams[name].total, gram.total), name


def test_rounded_inputs_are_the_same_in_every_pass(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = saved(tmp_path, tiny, "llama")
    exact, _, _ = walk(handle, Spy)
    monkeypatch.setattr(memory_limits, "EXACT_BYTES", 0)
    monkeypatch.setattr(module, "BATCH_TOKENS", 32)
    rounded, _, _ = walk(handle, Spy)
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 2e-3
    # resumed blocks run without a visitor, and where there is no room inputs are computed twice
    assert torch.equal(walk(handle)[0], rounded)
    assert torch.equal(walk(handle, Spy, limits=Limits(keep=0))[0], rounded)


def test_staged_and_plain_passes_agree_bit_for_bit(moe_family: str, tiny: Any, tmp_path: Path) -> None:
    handle = saved(tmp_path, tiny, moe_family)
    assert torch.equal(walk(handle, Spy)[0], walk(handle)[0])


def test_short_last_batch_and_output_not_needed(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = saved(tmp_path, tiny, "mixtral")
    monkeypatch.setattr(module, "BATCH_TOKENS", 32)
    hidden, _, _ = walk(handle, Spy)
    torch.testing.assert_close(hidden, dense_hidden(handle.dense_model()), rtol=1e-4, atol=1e-4)
    _, _, spies = walk(handle, Spy, advance=False)
    assert spies[0].order[-1].endswith("down_proj")


def test_forced_pass_shows_the_expert_random_tokens(tiny: Any, tmp_path: Path) -> None:
    handle = saved(tmp_path, tiny, "mixtral")
    first = walk(handle, Spy)[2][0].shared
    again = walk(handle, Spy)[2][0].shared
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert float(value.diagonal().min()) > 0


def test_nan_is_refused_by_name(tiny: Any, tmp_path: Path) -> None:
    handle = saved(tmp_path, tiny, "llama")
    model = handle.skeleton()
    walker = Walker(model, TOKENS)
    hidden = walker.embed([block.name for block in handle.layout.blocks])
    handle.load_block(model, 0)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.0.*NaN"):
        walker.forward(handle.layout.blocks[0], hidden.clone())
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj.*NaN"):
        walker.forward(handle.layout.blocks[0], hidden, Spy(model))

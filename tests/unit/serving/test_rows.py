"""Sequences that join and leave: each decodes as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.inference.speed import rounded
from llmcompress.models.registry import layout_from_config
from llmcompress.nn import skipping
from llmcompress.nn.mixers import attach
from llmcompress.quant.spec import QuantSpec
from llmcompress.serving.mixed_rows import MixedRows, disagrees
from llmcompress.serving.rows import NativeRows, SeparateRows

MODELS = ("mixtral", "qwen3_moe", "afmoe", "deepseek_v2", "mamba2", "mamba", "bamba", "granitemoehybrid", "falcon_h1")
HYBRIDS = ("jamba", "nemotron_h", "zamba2")


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by transformers' own loop."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=10**6
    )
    return out[0, len(prompt) :].tolist()


def decode(rows: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy, one more sequence joining each step; each leaves when it has enough."""
    written: dict[int, list[int]] = {}
    waiting, alive = list(range(len(prompts))), []
    while waiting or alive:
        if waiting:
            key = waiting.pop(0)
            written[key] = [int(rows.join(key, prompts[key], None, len(prompts[key]) + count).argmax())]
            alive.append(key)
        found = rows.step({key: written[key][-1] for key in alive})
        for key in list(alive):
            if len(written[key]) == count:
                rows.leave(key)
                alive.remove(key)
            else:
                written[key].append(int(found[key].argmax()))
    assert rows.held_bytes() == 0
    return [written[key] for key in range(len(prompts))]


def prompts(lengths: tuple[int, ...] = (3, 9, 5, 6), vocabulary: int = 64) -> list[list[int]]:
    draws = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocabulary, (n,), generator=draws).tolist() for n in lengths]


def check_size(rows: Any) -> None:
    """What full caches take is told before anything is in them."""
    told = rows.full_bytes(36)
    assert rows.held_bytes() == 0
    for key in range(2):
        rows.join(key, [5 + key] * 18, None, 18)
    assert told == rows.held_bytes() > 0
    for key in range(2):
        rows.leave(key)


def check(model: Any, count: int) -> None:
    """Both ways of transformers' modules write what each sequence writes alone."""
    mixed, separate = MixedRows(model, 8, 64), SeparateRows(model, 8, 64)
    assert disagrees(mixed, separate, (), 64) is None
    asked = prompts()
    expected = [alone(model, prompt, count) for prompt in asked]
    assert decode(mixed, asked, count) == expected
    assert decode(separate, asked, count) == expected
    for rows in (mixed, separate):
        rows.limit = 2
        check_size(rows)


@pytest.mark.parametrize("family", (*MODELS, *HYBRIDS))
def test_mixed_rows_are_each_alone(tiny: Any, family: str) -> None:
    model = tiny.model(family)
    check(model, 6)


@pytest.mark.parametrize("codec", ["dsq", "per_channel"])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba", "zamba2"])
def test_sequences_join_and_leave_within_replay_windows(tiny: Any, family: str, codec: str) -> None:
    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 32} if family == "mamba2" else {}
    model = tiny.model(family, **sizes)
    attach(model, layout_from_config(model.config.to_dict()), {"bits": 8, "codec": codec, "window": 4})
    check(model, 11)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_each_goes_by_what_was_decided_on_its_own_prompt(tiny: Any, scope: str) -> None:
    model = tiny.model("mixtral")
    layout = layout_from_config(model.config.to_dict())
    asked = prompts((24, 3, 20, 22))
    free = [alone(model, prompt, 6) for prompt in asked]
    # the prompt of three tokens is too short for the policy
    skipping.attach(model, layout, {"alpha": 0.9, "scope": scope, "decode": "sticky", "min_len": 8})
    expected = [alone(model, prompt, 6) for prompt in asked]
    assert [own == other for own, other in zip(free, expected)] != [True] * 4
    for rows in (MixedRows(model, 8, 64), SeparateRows(model, 8, 64)):
        assert decode(rows, asked, 6) == expected


def dense(family: str, **changes: Any) -> Any:
    """A random float32 model without experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 72, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **changes})).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return model


def test_windows_of_attention_are_kept() -> None:
    model = dense("mistral", sliding_window=6)
    asked = prompts((3, 11, 7), 72)
    assert decode(MixedRows(model, 8, 64), asked, 8) == [alone(model, prompt, 8) for prompt in asked]


def test_attention_that_is_not_known_is_refused(tiny: Any) -> None:
    model = tiny.model("gpt_oss")
    reason = disagrees(MixedRows(model, 8, 64), SeparateRows(model, 8, 64), (), 64)
    assert reason is not None
    assert "s_aux" in reason
    assert model.config._attn_implementation != "llmcompress_rows"


def test_bounds_that_only_masks_know_are_refused(tiny: Any) -> None:
    """A prompt of the trial is shorter than the bounds of real models, so both ways would agree."""
    model = tiny.model("llama4_text", attention_chunk_size=64)
    reason = disagrees(MixedRows(model, 8, 64), SeparateRows(model, 8, 64), (), 64)
    assert reason is not None
    assert "chunked_attention" in reason


def test_tables_of_longrope_are_those_of_a_sequence_alone() -> None:
    """A prompt of the trial is shorter than the first length, and a batch has one table: that of its longest."""
    longrope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 8.0,
        "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [2.0, 3.0, 4.0, 5.0],
    }  # fmt: skip
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = dense("phi3", rope_parameters=longrope, original_max_position_embeddings=16, **ends)
    reason = disagrees(MixedRows(model, 8, 64), SeparateRows(model, 8, 64), (), 72)
    assert reason is not None
    assert "more than 16 tokens" in reason
    assert disagrees(MixedRows(model, 8, 16), SeparateRows(model, 8, 16), (), 72) is None
    # they pass the first length while others run that do not, at once after a prompt or later, or begin beyond it
    asked, rows = prompts((16, 3, 11, 15, 20), 72), SeparateRows(model, 8, 64)
    with torch.inference_mode():
        for key, prompt in enumerate(asked):
            found = [rows.join(key, prompt, None, 64)]
            text = list(prompt)
            for token in range(5, 15):
                text.append(token)
                found.append(rows.step({key: token})[key])
            whole = [
                model(torch.tensor([text[:n]]), use_cache=False).logits[0, -1]
                for n in range(len(prompt), len(text) + 1)
            ]
            torch.testing.assert_close(torch.stack(found), torch.stack(whole), atol=1e-4, rtol=0)
    for key in range(len(asked)):
        rows.leave(key)
    assert decode(rows, asked, 8) == [alone(model, prompt, 8) for prompt in asked]


def test_native_rows_are_each_alone() -> None:
    from llmcompress.inference.engine import Engine, decline

    model = dense("llama")
    if (reason := decline(model)) is not None:
        pytest.skip(reason)
    asked = prompts((3, 9, 40, 6, 4, 5, 7, 8, 2, 3), 72)
    rows = NativeRows(Engine(model, slots=10, positions=64), 10, 64)
    assert decode(rows, asked, 12) == [alone(model, prompt, 12) for prompt in asked]


def native_rows(model: Any, places: int, prefixes: bool = True) -> NativeRows:
    from llmcompress.inference.native import decline, open_engine

    if (reason := decline(model)) is not None:
        pytest.skip(reason)
    return NativeRows(open_engine(model, places, 200), places, 200, prefixes)


def read(rows: Any, key: int, prompt: list[int], chunk: int) -> tuple[torch.Tensor, int]:
    """Logits after a prompt that is read in parts, and their number."""
    for count in range(1, 100):
        logits = rows.join(key, prompt, None, len(prompt) + 8, chunk)
        if logits is not None:
            return logits, count
    raise AssertionError("never ended")


def test_prompts_are_read_in_parts_beside_the_steps_of_others() -> None:
    model = dense("llama")
    rows = native_rows(model, 4)
    other, prompt = prompts((5, 100), 72)
    written = [int(rows.join(0, other, None, 40).argmax())]
    first = None
    while first is None:
        first = rows.join(1, prompt, None, 120, 30)
        written.append(int(rows.step({0: written[-1]})[0].argmax()))
    assert len(written) == 5
    assert rows.reused(1) == 0
    found = [int(first.argmax())]
    for _ in range(5):
        logits = rows.step({0: written[-1], 1: found[-1]})
        written.append(int(logits[0].argmax()))
        found.append(int(logits[1].argmax()))
    assert written == alone(model, other, 10)
    assert found == alone(model, prompt, 6)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("prefixes", [True, False])
def test_a_second_turn_reads_what_is_new(family: str, prefixes: bool, tiny: Any) -> None:
    model = dense(family) if family == "llama" else tiny.model(family)
    rows = native_rows(model, 3, prefixes)
    (prompt,) = prompts((60,), 64)
    tokens = [int(read(rows, 0, prompt, 16)[0].argmax())]
    for _ in range(6):
        tokens.append(int(rows.step({0: tokens[-1]})[0].argmax()))
    rows.leave(0)
    assert rows.held_bytes() == 0
    again = [*prompt, *tokens[:-1], 5, 6, 7]
    logits, parts = read(rows, 1, again, 16)
    assert rows.reused(1) == (66 if prefixes else 0)
    assert parts == (1 if prefixes else 5)
    assert int(logits.argmax()) == alone(model, again, 1)[0]
    # another one beside it, which begins alike
    other = [*prompt[:50], 8, 9]
    logits, _ = read(rows, 2, other, 16)
    assert rows.reused(2) == (50 if prefixes else 0)
    assert int(logits.argmax()) == alone(model, other, 1)[0]
    assert int(rows.step({1: 5, 2: 6})[1].argmax()) == alone(model, [*again, 5], 1)[0]


def state_model(tiny: Any, family: str) -> Any:
    """With states at 4 bits; of the hybrid weights are packed too, so that prompts come in parts."""
    sizes: dict[str, Any] = {"mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 32}}.get(family, {})
    if family == "falcon_mamba":
        sizes = {"state_size": 16, "time_step_rank": 16}
    if family == "bamba":
        sizes = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 32, "mamba_n_groups": 2, "hidden_size": 48}
        sizes |= {"attn_layer_indices": [1], "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 3}
    model = tiny.model(family, **sizes)
    if family == "bamba":
        model = rounded(model, QuantSpec(8, 16, symmetric=True))
    attach(model, layout_from_config(model.config.to_dict()), {"bits": 4, "codec": "dsq"})
    return model


@pytest.mark.parametrize("family", ["mamba2", "falcon_mamba", "bamba"])
def test_states_go_on_from_snapshots_bit_by_bit(family: str, tiny: Any) -> None:
    model = state_model(tiny, family)
    rows, whole = native_rows(model, 3), native_rows(model, 1, False)

    def answer(key: int, prompt: list[int], chunk: int) -> tuple[list[torch.Tensor], int]:
        logits, parts = read(rows, key, prompt, chunk)
        found = [logits]
        for token in (5, 6):
            found.append(rows.step({key: token})[key])
        return found, parts

    def fresh(prompt: list[int]) -> list[torch.Tensor]:
        logits, _ = read(whole, 0, prompt, 1000)
        found = [logits, *(whole.step({0: token})[0] for token in (5, 6))]
        whole.leave(0)
        return found

    first, other = prompts((150, 40))
    found, parts = answer(0, first, 70)
    assert (rows.reused(0), parts) == (0, 3)
    # the next turn: the prompt, its answer, a question
    second = [*first, 5, 6, *other]
    found, parts = answer(1, second, 70)
    assert (rows.reused(1), parts) == (128, 1)
    for logits, expected in zip(found, fresh(second)):
        assert torch.equal(logits, expected)
    # where two prompts part, somebody may begin
    third, fourth = [*first[:100], *other], [*first[:90], *other[::-1], *other]
    found, _ = answer(2, third, 1000)
    assert rows.reused(2) == 0
    rows.leave(0)
    found, _ = answer(3, fourth, 70)
    assert rows.reused(3) == 64
    for logits, expected in zip(found, fresh(fourth)):
        assert torch.equal(logits, expected)
    # and those who were there before have lost nothing
    assert int(rows.step({1: 7})[1].argmax()) == int(alone(model, [*second, 5, 6, 7], 1)[0])


def test_snapshots_keep_to_their_bytes(tiny: Any) -> None:
    model = state_model(tiny, "falcon_mamba")
    engine = native_rows(model, 2)._engine
    one = engine.snapshot_bytes(200)
    many = prompts((150, 140, 130, 120))
    for most, kept in ((0, 0), (one - 1, 0), (one, 1), (1 << 30, 4)):
        rows = NativeRows(engine, 2, 200, True, most)
        assert rows.full_bytes(1) == engine.reserved_bytes + min(most, 4 * one)
        for key, prompt in enumerate(many):
            read(rows, key, prompt, 64)
            rows.leave(key)
        # the one used last is kept longest
        reused = []
        for key, prompt in enumerate(many[::-1]):
            read(rows, key, [*prompt, 3, 4], 64)
            reused.append(rows.reused(key))
            rows.leave(key)
        assert sum(count > 0 for count in reused) == kept
        assert kept == 0 or reused[0] == 64


def test_a_policy_that_counts_over_the_prompt_keeps_it_whole(tiny: Any) -> None:
    model = tiny.model("mixtral")
    skipping.attach(model, layout_from_config(model.config.to_dict()), {"alpha": 0.9, "min_len": 8})
    rows = native_rows(model, 2)
    (prompt,) = prompts((60,))
    expected = alone(model, prompt, 1)
    for key in range(2):
        logits, parts = read(rows, key, prompt, 16)
        assert (rows.reused(key), parts) == (0, 1)
        assert [int(logits.argmax())] == expected


def test_bounds_of_requests_let_a_model_with_two_rotary_tables_decode_natively(tiny_tokenizer: Any) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    from llmcompress.serving.limits import Limits
    from llmcompress.serving.served import serve_model

    torch.manual_seed(0)
    rotary = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 24,
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, original_max_position_embeddings=24, rope_parameters=rotary,
        pad_token_id=0,
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    kinds = []
    for new_tokens in (8, 9):
        limits = Limits(rows=2, prompt_tokens=16, new_tokens=new_tokens)
        (batch,) = serve_model(model, tiny_tokenizer, "phi", limits).batches
        kinds.append(batch.kind)
        assert batch.tokens == 16 + new_tokens
    assert kinds[0] == "native" != kinds[1]
    assert "--max-new-tokens" in batch.reason

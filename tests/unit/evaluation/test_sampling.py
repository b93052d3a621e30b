"""The sampler against plain decoding, one prompt at a time and without a cache."""

import pytest
import torch

from llmcompress.evaluation.sampling import Sampling, _choose, sample, why_batched
from llmcompress.inference.greedy import GreedyWriter

END, PAD = 2, 1


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=128, pad_token_id=PAD, eos_token_id=END, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        # so that a token attends to few others, and where they stand decides what is written
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 30
        elif "proj" in name:
            weight.data *= 4
    return model


PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [3, 4], [12, 3, 3, 3], [5, 6]]


def plain(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


def test_greedy_equals_plain_decoding_whatever_leaves_the_batch(model):
    # an end token that the model likes ends rows at different steps
    model.lm_head.weight.data[END] += 0.15
    found = sample(model, PROMPTS, Sampling(20, batch=4), END, PAD, seed=0)
    expected = [plain(model, prompt, 20) for prompt in PROMPTS]
    assert found == expected
    assert len({len(ids) for ids in expected}) > 1, "the case is not worth its name"


def test_the_native_engine_writes_the_same_where_it_is_asked(model):
    plainly = sample(model, PROMPTS, Sampling(20, batch=4), END, PAD, seed=0)
    writer = GreedyWriter(model)
    assert sample(model, PROMPTS, Sampling(20, batch=4), END, PAD, 0, writer=writer) == plainly
    assert writer.engine == "native" and writer.tokens == sum(map(len, plainly))
    writer = GreedyWriter(model)
    for settings in (Sampling(3, batch=64), Sampling(3, temperature=1.0, batch=4)):
        sample(model, PROMPTS, settings, END, PAD, 0, writer=writer)
        assert writer.tokens == 0
    assert "batches of 64" in why_batched(model, Sampling(3, batch=64))
    assert why_batched(model, Sampling(3, temperature=1.0)) == "responses are sampled"


def test_seeds_decide(model):
    hot = Sampling(8, temperature=2.0)
    one, two, other = (sample(model, PROMPTS, hot, END, PAD, seed) for seed in (1, 1, 2))
    assert one == two != other


def test_choices_follow_the_distribution_and_top_p_cuts_it():
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    found = torch.bincount(_choose(logits, Sampling(1, temperature=1.0), generator), minlength=4) / 4000
    torch.testing.assert_close(found, logits[0].softmax(-1), atol=0.03, rtol=0)
    cut = torch.bincount(_choose(logits, Sampling(1, temperature=1.0, top_p=0.7), generator), minlength=4)
    # 0.665 is below 0.7, so the second token stays, the third does not
    assert (cut > 0).tolist() == [True, True, False, False]
    cold = _choose(logits, Sampling(1, temperature=1.0, top_p=0.1), generator)
    assert (cold == 0).all()


def test_a_decoder_of_fixed_shape_writes_the_same(model):
    from llmcompress.evaluation.static_decoding import decoder_of, supports

    assert supports(model)
    choose = lambda logits: logits.argmax(-1)  # noqa: E731
    decoder = decoder_of(model, 6, 5, 20)
    for prompts in (PROMPTS, PROMPTS[:4], [PROMPTS[2]]):
        with torch.inference_mode():
            found = decoder.decode(model, prompts, END, PAD, choose)
        assert found == [plain(model, prompt, 20) for prompt in prompts]
    assert decoder_of(model, 6, 5, 20) is decoder
    assert decoder_of(model, 6, 5, 21) is not decoder
    decoder = decoder_of(model, 6, 5, 20)
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert decoder_of(model, 6, 5, 20) is not decoder


def test_the_decoder_of_fixed_shape_leaves_settings_alone(model):
    from llmcompress.evaluation.static_decoding import StaticDecoder

    before = model.config._attn_implementation
    torch.set_deterministic_debug_mode("warn")
    try:
        with torch.inference_mode():
            StaticDecoder(model, 2, 8, 4).decode(model, PROMPTS[:2], END, PAD, lambda logits: logits.argmax(-1))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.set_deterministic_debug_mode("default")
    assert model.config._attn_implementation == before


def test_windows_and_other_models_are_decoded_the_plain_way(model):
    import copy
    from types import SimpleNamespace

    from llmcompress.evaluation.static_decoding import supports
    from llmcompress.nn import lora

    def like(**config):
        found = torch.nn.Module()
        found.config, found.device = SimpleNamespace(**config), torch.device("cpu")
        return found

    assert supports(like(model_type="mistral", sliding_window=None))
    assert not supports(like(model_type="mistral", sliding_window=4096))
    assert supports(like(model_type="qwen2", sliding_window=4096, use_sliding_window=False))
    assert not supports(like(model_type="qwen3", layer_types=["full_attention", "sliding_attention"]))
    assert not supports(like(model_type="gemma2"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not supports(model)
    adapted = copy.deepcopy(model)
    lora.attach(adapted, ["model.layers.0.mlp.up_proj"], 2, 4.0, 0)
    assert not supports(adapted)

"""The sampler against plain decoding, one prompt at a time and without a cache."""

import pytest
import torch

from llmcompress.evaluation.sampling import Sampling, _choose, sample

END, PAD = 2, 1


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=128, pad_token_id=PAD, eos_token_id=END, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


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

from __future__ import annotations

import copy

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.evaluation.config import GenerationConfig
from llmcompress.evaluation.generation import generate, side_by_side
from llmcompress.inference.greedy import GreedyWriter


@pytest.fixture(scope="module")
def model(tiny, tiny_tokenizer):
    return tiny.model("mixtral", vocab_size=len(tiny_tokenizer))


@torch.inference_mode()
def greedy(model, ids, count, end):
    new = []
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        new.append(token)
        if token == end:
            break
    return new


def test_greedy_is_the_argmax_whatever_the_checkpoint_says(model, tiny_tokenizer):
    config = GenerationConfig(prompts=("The cat", "Nobody"), max_new_tokens=6)
    model = copy.deepcopy(model)
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.no_repeat_ngram_size, model.generation_config.num_beams = 1, 3
    expected = [greedy(model, tiny_tokenizer(p)["input_ids"], 6, 2) for p in config.prompts]
    assert generate(model, tiny_tokenizer, config) == expected
    assert model.generation_config.num_beams == 3, "the settings stay the model's"


def test_a_turn_ends_where_the_settings_say(model, tiny_tokenizer):
    config = GenerationConfig(prompts=("The cat",), max_new_tokens=6)
    model = copy.deepcopy(model)
    first = generate(model, tiny_tokenizer, config)[0][0]
    model.generation_config.eos_token_id = [2, first]
    assert generate(model, tiny_tokenizer, config) == [[first]]
    assert generate(model, tiny_tokenizer, config, GreedyWriter(model)) == [[first]]


def test_the_native_engine_writes_the_same(model, tiny_tokenizer):
    config = GenerationConfig(prompts=("The cat", "Nobody", "the warm sea"), max_new_tokens=12)
    writer = GreedyWriter(model)
    assert generate(model, tiny_tokenizer, config, writer) == generate(model, tiny_tokenizer, config)
    assert writer.engine == "native" and writer.tokens > 0
    hot = config.model_copy(update={"temperature": 2.0})
    assert generate(model, tiny_tokenizer, hot, writer) == generate(model, tiny_tokenizer, hot)


def test_sampling_repeats_with_its_seed_and_leaves_the_generator_alone(model, tiny_tokenizer):
    config = GenerationConfig(prompts=("The cat",), max_new_tokens=8, temperature=3.0)
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    first = generate(model, tiny_tokenizer, config)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == generate(model, tiny_tokenizer, config)
    assert first != generate(model, tiny_tokenizer, config.model_copy(update={"seed": 1}))


def test_chat_uses_the_template(model, tiny_tokenizer):
    config = GenerationConfig(prompts=("cat",), max_new_tokens=4, chat=True)
    with pytest.raises(InputError, match="no chat template"):
        generate(model, tiny_tokenizer, config)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "The {{ messages[0].content }}"
    plain = GenerationConfig(prompts=("The cat",), max_new_tokens=4)
    assert generate(model, tokenizer, config) == generate(model, tiny_tokenizer, plain)


def test_side_by_side_counts_equal_tokens(tiny_tokenizer):
    config = GenerationConfig(prompts=("a",))
    ids = tiny_tokenizer(" the warm sea")["input_ids"]
    (record,) = side_by_side(tiny_tokenizer, config, [ids], [[*ids[:-1], 3]])
    assert record["same_tokens"] == len(ids) - 1
    assert record["dense"] == " the warm sea"
    (alone,) = side_by_side(tiny_tokenizer, config, [ids], None)
    assert alone["compressed"] is None and "same_tokens" not in alone


def test_empty_prompt_is_refused(model, tiny_tokenizer):
    with pytest.raises(InputError, match="no tokens"):
        generate(model, tiny_tokenizer, GenerationConfig(prompts=("",)))

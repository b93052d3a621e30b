"""Tokens as answers name them."""

from __future__ import annotations

from typing import Any

from llmcompress.serving.answers import ChatShape, CompletionShape
from llmcompress.serving.scheduler import TokenChoice


def sentencepiece() -> Any:
    """A tokenizer whose words carry the space before them, as Llama 2's and Mistral's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "\u2581the": 1, "\u2581cat": 2, "s": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def choices(*tokens: int) -> list[TokenChoice]:
    return [TokenChoice(token, -0.5, ((token, -0.5), (0, -2.0))) for token in tokens]


def test_spaces_before_words_belong_to_their_tokens() -> None:
    words = sentencepiece()
    found = CompletionShape().logprobs(words, choices(1, 2, 3), 7)
    assert found["tokens"] == [" the", " cat", "s"]
    assert found["text_offset"] == [7, 11, 15]
    assert list(found["top_logprobs"][1]) == [" cat", "[UNK]"]
    first, *_ = ChatShape().logprobs(words, choices(1), 0)["content"]
    assert (first["token"], bytes(first["bytes"])) == (" the", b" the")


def test_a_token_is_among_the_likely_ones_even_if_it_is_not() -> None:
    drawn = [TokenChoice(2, -7.0, ((1, -0.1), (0, -2.0))), TokenChoice(3, -3.0, ())]
    found = CompletionShape().logprobs(sentencepiece(), drawn, 0)["top_logprobs"]
    assert found == [{" the": -0.1, "[UNK]": -2.0, " cat": -7.0}, {"s": -3.0}]


def test_a_text_of_several_tokens_stands_for_the_likeliest() -> None:
    class Parts:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return "\ufffd"

        def convert_ids_to_tokens(self, token: int) -> str:
            return "<0xE2>"

    found = CompletionShape().logprobs(Parts(), [TokenChoice(2, -7.0, ((1, -0.1),))], 0)  # type: ignore[arg-type]
    assert (found["token_logprobs"], found["top_logprobs"]) == ([-7.0], [{"\ufffd": -0.1}])


def test_tokens_with_bytes_are_as_they_are(tiny_tokenizer: Any) -> None:
    text = "The cat sat on a café"
    ids = tiny_tokenizer(text)["input_ids"]
    found = CompletionShape().logprobs(tiny_tokenizer, choices(*ids), 0)
    assert "".join(found["tokens"]).replace("\ufffd", "") == text.replace("é", "")

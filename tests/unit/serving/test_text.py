from __future__ import annotations

from typing import Any

import pytest

from llmcompress.serving.text import TextStream

TEXT = "Ünder the bridge a café sold naïve little cakes — 東京 style. 🙂 END and more"


def pieces(words: Any, text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(words, stops)
    out = [stream.put(token) for token in words(text)["input_ids"]]
    return [*out, stream.end()], stream


def test_pieces_are_the_whole_text_and_whole_characters(tiny_tokenizer: Any) -> None:
    out, stream = pieces(tiny_tokenizer, TEXT)
    assert "".join(out) == TEXT
    assert not any("\ufffd" in piece for piece in out)
    assert not stream.stopped
    assert sum(bool(piece) for piece in out) > 20


@pytest.mark.parametrize("stops", [("END",), ("nothing like it", "END and"), (" END", "END")])
def test_nothing_of_a_stop_string_comes_out(tiny_tokenizer: Any, stops: tuple[str, ...]) -> None:
    out, stream = pieces(tiny_tokenizer, TEXT, stops)
    assert stream.stopped
    assert "".join(out) == TEXT[: min(at for stop in stops if (at := TEXT.find(stop)) >= 0)]


def test_what_only_looked_like_a_stop_string_comes_out_at_the_end(tiny_tokenizer: Any) -> None:
    out, stream = pieces(tiny_tokenizer, "the end is EN", ("END",))
    assert "".join(out) == "the end is EN"
    assert out[-1] == "EN"
    assert not stream.stopped


def test_bytes_that_never_become_a_character_are_given_up(tiny_tokenizer: Any) -> None:
    broken = tiny_tokenizer("東")["input_ids"][0]
    stream = TextStream(tiny_tokenizer)
    out = "".join(stream.put(broken) for _ in range(20)) + stream.end()
    assert out == tiny_tokenizer.decode([broken] * 20)

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


def test_what_ends_an_answer_may_be_part_of_it(tiny_tokenizer: Any) -> None:
    stream = TextStream(tiny_tokenizer, ("EN", "END"), included=True)
    out = "".join(stream.put(token) for token in tiny_tokenizer(TEXT)["input_ids"])
    # however the text comes, the shorter one is there first
    assert stream.stopped and out == TEXT[: TEXT.index("END") + len("EN")]


def test_nothing_ends_an_answer_that_is_too_short(tiny_tokenizer: Any) -> None:
    text = "END and END and"
    tokens = tiny_tokenizer(text)["input_ids"]
    first = next(n for n in range(len(tokens)) if "END" in tiny_tokenizer.decode(tokens[: n + 1]))
    for least, expected in ((0, ""), (first + 1, "END and ")):
        stream = TextStream(tiny_tokenizer, ("END",), least=least)
        out = "".join(stream.put(token) for token in tokens)
        assert stream.stopped and out == expected


def test_special_tokens_are_text_where_they_are_kept(tiny_tokenizer: Any) -> None:
    tokens = [*tiny_tokenizer("a", add_special_tokens=False)["input_ids"], 1]
    for kept, expected in ((frozenset({1}), f"a{tiny_tokenizer.decode([1])}"), (frozenset[int](), "a")):
        stream = TextStream(tiny_tokenizer, kept=kept)
        assert "".join(stream.put(token) for token in tokens) + stream.end() == expected

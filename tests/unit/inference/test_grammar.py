"""What may come next, against a slow twin that knows regular expressions only; cache, refusals."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance")

from llmcompress.errors import EnvironmentProblem, InputError
from llmcompress.inference import grammar
from llmcompress.inference.grammar import (
    GrammarError,
    Grammars,
    Walk,
    inline_schema,
    of_choice,
    of_grammar,
    of_regex,
    of_schema,
)

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "stone"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}


def nested(depth: int) -> dict[str, Any]:
    """A schema of lists of lists."""
    found: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        found = {"type": "array", "items": found}
    return found


def walk(words: Any, text: str, ends: Sequence[int] = (2,)) -> Walk:
    return Grammars().walk(words, len(words), ends, text)


def write(words: Any, text: str, seed: int, ends: Sequence[int] = (2,), most: int = 200) -> str:
    """What random logits write by a grammar, without the token that ends it."""
    at, draws, written = walk(words, text, ends), torch.Generator().manual_seed(seed), list[int]()
    while not at.ended and len(written) < most:
        row = at.restrict(torch.randn(len(words), generator=draws))
        token = int(torch.multinomial(row.softmax(-1), 1, generator=draws))
        at.take(token)
        written.append(token)
    assert at.ended
    return str(words.decode([token for token in written if token not in ends], clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("pattern", ["[ab]{2,5}", "(cat|The cat) sat[.!]?", "x*", "é+ [0-9]{2}"])
@pytest.mark.parametrize("seed", range(5))
def test_what_random_logits_write_matches(tiny_tokenizer: Any, pattern: str, seed: int) -> None:
    assert re.fullmatch(pattern, write(tiny_tokenizer, of_regex(pattern), seed))


@pytest.mark.parametrize("ends", [(2,), (2, 7)])
def test_exactly_those_tokens_may_come_after_which_some_text_matches(tiny_tokenizer: Any, ends: Sequence[int]) -> None:
    """The twin tries all texts that match."""
    words, texts = tiny_tokenizer, ["The cat", "The cats", "There", "a"]
    at, so_far = walk(words, of_choice(texts), ends), ""
    for token in words("The cat", add_special_tokens=False)["input_ids"]:
        row = at.restrict(torch.zeros(len(words)))
        pieces = {n: words.decode([n]) for n in range(3, len(words)) if n not in ends}
        expected = {n for n, piece in pieces.items() if any(text.startswith(so_far + piece) for text in texts)}
        expected |= set(ends) if so_far in texts else set()
        assert set(row.isfinite().nonzero()[:, 0].tolist()) == expected
        at.take(token)
        so_far += pieces[token]
    row = at.restrict(torch.zeros(len(words)))
    assert set(ends) <= set(row.isfinite().nonzero()[:, 0].tolist()) and not at.ended
    at.take(ends[-1])
    assert at.ended


def test_a_grammar_that_nothing_can_follow_has_ended_without_a_token_for_that(tiny_tokenizer: Any) -> None:
    at = walk(tiny_tokenizer, of_regex("ab"))
    for token in tiny_tokenizer("ab", add_special_tokens=False)["input_ids"]:
        assert not at.ended
        at.take(token)
    assert at.ended


@pytest.mark.parametrize("space", [None, "", " {0,2}"])
@pytest.mark.parametrize("inline", [False, True])
def test_json_keeps_to_its_schema(tiny_tokenizer: Any, space: str | None, inline: bool) -> None:
    text = of_grammar(f"start: {inline_schema(SCHEMA, space)}") if inline else of_schema(SCHEMA, space)
    for seed in range(4):
        written = write(tiny_tokenizer, text, seed)
        found = json.loads(written)
        assert set(found) == {"kind", "age"} and found["kind"] in ("cat", "stone") and 0 <= found["age"] <= 99
        if space == "":
            assert re.search(r"\s", written) is None
        elif space is None:
            # what is written between two words at most
            assert re.search(r"[ \t]{42}|\n\s*\n", written) is None


@pytest.mark.parametrize("inline", [False, True])
def test_a_schema_may_be_true(tiny_tokenizer: Any, inline: bool) -> None:
    text = of_grammar(f"start: {inline_schema(True)}") if inline else of_schema(True)
    for written in ("[1, null]", '{"a": true}', '"x"', "3"):
        found = walk(tiny_tokenizer, text)
        for token in tiny_tokenizer(written, add_special_tokens=False)["input_ids"]:
            found.take(token)
    with pytest.raises(GrammarError):
        found.take(tiny_tokenizer("x", add_special_tokens=False)["input_ids"][0])


def test_notations_of_grammars() -> None:
    assert of_grammar('start: "a" | "b" /[0-9]+/') != of_grammar('root ::= "a" | "b" [0-9]+')


@pytest.mark.parametrize(
    ("make", "given", "words"),
    [
        (of_regex, "[a", "unclosed character class"),
        (of_regex, "(?=x)y", "look-ahead"),
        (of_schema, {"type": "nonsense"}, "Invalid type: nonsense"),
        (of_schema, {"not": {"type": "string"}}, "Unimplemented keys"),
        (of_schema, {"$ref": "http://example.com/x.json"}, "example.com"),
        (of_schema, {"enum": []}, "Unsatisfiable"),
        (of_schema, False, "Unimplemented keys"),
        (of_schema, nested(200), "recursion limit"),
        (of_schema, nested(5000), "no JSON"),
        (inline_schema, nested(5000), "no JSON"),
        (of_schema, {"const": float("nan")}, "no JSON"),
        (of_grammar, "start: foo", "unknown name"),
        (of_grammar, "root ::= [", "GBNF"),
    ],
)
def test_what_is_no_grammar_is_said(tiny_tokenizer: Any, make: Callable[[Any], str], given: Any, words: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(words)):
        walk(tiny_tokenizer, make(given))


def test_a_token_that_may_not_come_is_an_error(tiny_tokenizer: Any) -> None:
    at = walk(tiny_tokenizer, of_regex("a"))
    with pytest.raises(GrammarError):
        at.take(tiny_tokenizer("b")["input_ids"][0])


def test_grammars_are_compiled_once_for_equal_tokenizers(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import copy

    import llguidance

    made: list[str] = []
    real = llguidance.LLMatcher

    class Counted:
        grammar_from_regex = staticmethod(real.grammar_from_regex)

        def __new__(cls, tokenizer: Any, text: str, **rest: Any) -> Any:
            made.append(text)
            return real(tokenizer, text, **rest)

    monkeypatch.setattr(llguidance, "LLMatcher", Counted)
    monkeypatch.setattr(grammar, "KEPT", 2)
    held, other = Grammars(), copy.deepcopy(tiny_tokenizer)
    first, second, third = (of_regex(pattern) for pattern in ("ab", "cd", "ef"))
    for words in (tiny_tokenizer, other, tiny_tokenizer):
        walks = [held.walk(words, len(words), (2,), first) for _ in range(2)]
    # one that goes on does not move the others
    walks[0].take(tiny_tokenizer("a")["input_ids"][0])
    allowed = [int(one.restrict(torch.zeros(len(tiny_tokenizer))).isfinite().sum()) for one in walks]
    assert made == [first] and allowed[1] >= 1
    with pytest.raises(GrammarError):
        walks[0].take(tiny_tokenizer("a")["input_ids"][0])
    walks[1].take(tiny_tokenizer("a")["input_ids"][0])
    for text in (second, third, first):
        held.walk(tiny_tokenizer, len(tiny_tokenizer), (2,), text)
    assert made == [first, second, third, first]


class PanicException(BaseException):
    """What pyo3 makes of a panic in Rust."""

    __module__ = "pyo3_runtime"


class Stalled:
    """llguidance's matcher, made only when the test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stalls: str) -> None:
        import llguidance

        self.made: list[str] = []
        self.begun, self.go = threading.Event(), threading.Event()
        real, outer = llguidance.LLMatcher, self

        class Matcher:
            grammar_from_regex = staticmethod(real.grammar_from_regex)

            def __new__(cls, tokenizer: Any, text: str, **rest: Any) -> Any:
                outer.made.append(text)
                if text == stalls:
                    outer.begun.set()
                    assert outer.go.wait(60)
                return real(tokenizer, text, **rest)

        monkeypatch.setattr(llguidance, "LLMatcher", Matcher)


def test_nobody_waits_for_the_grammar_of_another_and_all_for_one_of_theirs(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = of_regex("a{7}"), of_regex("b")
    held, stalled = Grammars(), Stalled(monkeypatch, slow)
    name = held.name(tiny_tokenizer, len(tiny_tokenizer), (2,))
    asked = [held.compiled(name, slow) for _ in range(5)]
    assert stalled.begun.wait(60)
    held.walk(tiny_tokenizer, len(tiny_tokenizer), (2,), quick)
    assert not any(future.done() for future in asked)
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.0)
    with pytest.raises(GrammarError, match="longer than 0 seconds"):
        held.walk(tiny_tokenizer, len(tiny_tokenizer), (2,), slow)
    stalled.go.set()
    walks = [held.begin(future.result(60)) for future in asked]
    assert stalled.made == [slow, quick] and len({id(one) for one in walks}) == 5


def test_a_grammar_that_nobody_waits_for_leaves_the_queue(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, other, last = of_regex("a{7}"), of_regex("b"), of_regex("c")
    monkeypatch.setattr(grammar, "COMPILERS", 1)
    held, stalled = Grammars(), Stalled(monkeypatch, slow)
    name = held.name(tiny_tokenizer, len(tiny_tokenizer), (2,))
    begun = held.compiled(name, slow)
    assert stalled.begun.wait(60)
    left, kept = [held.compiled(name, other) for _ in range(2)], [held.compiled(name, last) for _ in range(2)]
    for future in (*left, kept[0], begun):
        held.give_up(future)
    # of two who asked one still waits; what has begun goes on
    assert left[0].cancelled() and not kept[0].cancelled() and begun.running()
    stalled.go.set()
    assert held.begin(kept[1].result(60)) and held.begin(begun.result(60))
    assert stalled.made == [slow, last]
    # whoever asks again gets it
    held.walk(tiny_tokenizer, len(tiny_tokenizer), (2,), other)
    assert stalled.made == [slow, last, other]


def test_a_pattern_that_takes_all_is_refused_before_it_decodes(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # however busy the machine is
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 600.0)
    for pattern in ("(a?){3000}a{3000}", "((a?){3000}a{3000})?"):
        with pytest.raises(GrammarError, match="too many expressions"):
            walk(tiny_tokenizer, of_regex(pattern))


def test_a_panic_inside_the_library_is_an_error_of_the_grammar(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llguidance

    def panics(*_: Any, **__: Any) -> None:
        raise PanicException("index out of bounds")

    at = walk(tiny_tokenizer, of_regex("a"))
    monkeypatch.setattr(at, "_matcher", type("M", (), {"compute_logit_bias": panics, "consume_token": panics})())
    for act in (lambda: at.restrict(torch.zeros(3)), lambda: at.take(3)):
        with pytest.raises(GrammarError, match="gave up: index out of bounds"):
            act()
    text = of_regex("b")
    monkeypatch.setattr(llguidance, "LLMatcher", panics)
    with pytest.raises(GrammarError, match="gave up: index out of bounds"):
        walk(tiny_tokenizer, text)


def test_more_logits_than_tokens_and_fewer(tiny_tokenizer: Any) -> None:
    for size in (len(tiny_tokenizer) + 9, len(tiny_tokenizer) - 3):
        at = Grammars().walk(tiny_tokenizer, size, (2,), of_regex("a"))
        row = at.restrict(torch.zeros(size))
        assert row.isfinite().nonzero()[:, 0].tolist() == tiny_tokenizer("a")["input_ids"]


def test_what_a_model_must_have(tiny_tokenizer: Any) -> None:
    with pytest.raises(GrammarError, match="no token that ends"):
        walk(tiny_tokenizer, of_regex("a"), ends=())
    with pytest.raises(InputError, match="fast tokenizer"):
        Grammars().walk(object(), 10, (2,), of_regex("a"))  # type: ignore[arg-type]


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EnvironmentProblem, match="llguidance") as caught:
        of_regex("a")
    assert caught.value.hint == "pip install 'llmcompress[structured]'"

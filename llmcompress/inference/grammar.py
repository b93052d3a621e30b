"""What an answer may be, token by token: JSON of a schema, a regular expression, one of some texts, a grammar.

The grammars themselves are llguidance's (an optional extra): it compiles one and says, after any
tokens, which may come next. Here it gets the model's tokenizer, bounds, threads of its own to compile in, and a cache.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import EnvironmentProblem, InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTALL = "pip install 'llmcompress[structured]'"
# white space of JSON: a space, or a line's end and what it is indented by. Without a bound small models write nothing
# but blanks
SPACE = r" |\r?\n[ \t]{0,40}"
# compiled grammars that are kept
KEPT = 64
# that are compiled at once: one that takes long leaves a thread to the others
COMPILERS = 2
# what llguidance may do to prepare a grammar, in its unit, half of its own bound: a schema of 400 properties in many
# forms takes 0.3 million; a pattern that takes all has one core busy for some 4 seconds
FUEL = 500_000
# tokens that are tried of a new grammar
TRIED = 3
# seconds that a request waits for its grammar
COMPILE_SECONDS = 20.0


class GrammarError(InputError):
    """A grammar cannot be compiled, or not be followed any further."""


@contextmanager
def _calm() -> Iterator[None]:
    """A panic inside llguidance is an error of the grammar: Python knows it as a BaseException, which ends threads.

    Raises:
        GrammarError: There was one.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise GrammarError(f"llguidance gave up: {first_line(error)}") from error


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise EnvironmentProblem(f"structured outputs need the llguidance package ({error})", INSTALL) from error
    return llguidance


def of_schema(schema: Mapping[str, Any] | bool, space: str | None = None) -> str:
    """The grammar of JSON that a schema describes.

    Args:
        schema: JSON Schema; true is any JSON.
        space: Regular expression of the white space between tokens, by default :data:`SPACE`; empty for none.

    Raises:
        GrammarError: The schema is too deep, or no JSON.
    """
    try:
        text = _written(_object(schema))
        with _calm():
            found: str = _library().LLMatcher.grammar_from_json_schema(text, overrides=_spaced(space))
    except ValueError as error:
        raise GrammarError(first_line(error)) from error
    return found


def _object(schema: Mapping[str, Any] | bool) -> Mapping[str, Any]:
    """A schema without the short forms of all and nothing, which take no white space; the latter is refused."""
    return {} if schema is True else {"not": {}} if schema is False else schema


def _written(schema: Mapping[str, Any]) -> str:
    """A schema as text; json reads what it does not write."""
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is no JSON: {first_line(error)}") from error


def _spaced(space: str | None) -> dict[str, Any]:
    return {"whitespace_flexible": False} if space == "" else {"whitespace_pattern": space or SPACE}


def inline_schema(schema: Mapping[str, Any] | bool, space: str | None = None) -> str:
    """:func:`of_schema` as an expression of a Lark grammar."""
    return "%json " + _written({**_object(schema), "x-guidance": _spaced(space)})


def of_regex(pattern: str) -> str:
    """The grammar of what a regular expression matches as a whole (syntax of Rust's regex, without look-around)."""
    found: str = _library().LLMatcher.grammar_from_regex(pattern)
    return found


def of_choice(texts: Sequence[str]) -> str:
    """The grammar of some texts."""
    return of_lark("start: " + " | ".join(json.dumps(text) for text in texts))


def of_lark(text: str) -> str:
    """A grammar in Lark's notation as llguidance extends it."""
    found: str = _library().LLMatcher.grammar_from_lark(text)
    return found


def of_grammar(text: str) -> str:
    """A grammar in the notation of :func:`of_lark`, or in GBNF, llama.cpp's.

    Raises:
        GrammarError: It is neither.
    """
    try:
        with _calm():
            found: str = _library().grammar_from("grammar", text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(str(error)) from error
    return found


def behind(head: str, grammar: str) -> str:
    """A grammar with something before it.

    Args:
        head: Lark that begins at ``start`` and names the grammar ``@answer``.
        grammar: From :func:`of_schema` and the like.
    """
    made = json.loads(grammar) if grammar.startswith("{") else {"grammars": [{"lark_grammar": grammar}]}
    (first, *others) = made["grammars"]
    return json.dumps({**made, "grammars": [{"lark_grammar": head}, {**first, "name": "answer"}, *others]})


class Walk:
    """Where one answer stands in its grammar. Not thread-safe.

    Args:
        matcher: llguidance's.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.ended = False

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits float32 ``[V]`` with minus infinity for all tokens that may not come next; a new tensor.

        Raises:
            GrammarError: The grammar is too complex here.
        """
        # a byte for each token, 0 where it may not come
        with _calm():
            allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        return logits.masked_fill(allowed[: len(logits)] == 0, -torch.inf)

    def take(self, token: int) -> None:
        """A token has been chosen; :attr:`ended` tells whether nothing may follow it.

        Raises:
            GrammarError: It may not come here.
        """
        with _calm():
            self._matcher.consume_token(token)
        self._check()
        self.ended = bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(first_line(ValueError(self._matcher.get_error())))


class Grammars:
    """Compiled grammars of all models of a process, thread-safe.

    Each is compiled once, however many ask, on threads that do nothing else: nobody waits for the grammar of another.
    """

    def __init__(self) -> None:
        # reentrant: what is given up is done at once
        self._lock, self._naming = threading.RLock(), threading.Lock()
        # the tokenizer object stays beside what was made of it, so that no other one gets its id
        self._tokenizers: dict[tuple[int, int, tuple[int, ...]], tuple[Any, str]] = {}
        self._made: dict[str, Any] = {}
        self._compiled: OrderedDict[tuple[str, str], Future[Any]] = OrderedDict()
        # how many wait for those that are not compiled yet
        self._waiting = Counter[Future[Any]]()
        self._threads = ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammar")

    def walk(self, words: PreTrainedTokenizerBase, vocabulary: int, ends: Collection[int], grammar: str) -> Walk:
        """The beginning of a grammar.

        Args:
            words: Tokenizer of the model.
            vocabulary: Number of logits.
            ends: Token ids that end a text; they may come where the grammar may end.
            grammar: From :func:`of_schema` and the like.

        Raises:
            GrammarError: It cannot be compiled, or not in :data:`COMPILE_SECONDS`.
            InputError: llguidance cannot read the tokenizer.
            EnvironmentProblem: llguidance is missing.
        """
        future = self.compiled(self.name(words, vocabulary, ends), grammar)
        try:
            return self.begin(future.result(COMPILE_SECONDS))
        except TimeoutError as error:
            self.give_up(future)
            raise slow() from error

    def compiled(self, name: str, grammar: str) -> Future[Any]:
        """The matcher of llguidance, or :class:`GrammarError`, once it is there; does not wait. Who does not wait until
        then says so to :meth:`give_up`.

        Args:
            name: From :meth:`name`.
            grammar: From :func:`of_schema` and the like.
        """
        with self._lock:
            future = self._compiled.get((name, grammar))
            if future is None or future.cancelled():
                future = self._threads.submit(_compile, self._made[name], grammar)
                self._compiled[name, grammar] = future
                self._waiting[future] = 0
                future.add_done_callback(self._forget)
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end((name, grammar))
            if future in self._waiting:
                self._waiting[future] += 1
            return future

    def give_up(self, future: Future[Any]) -> None:
        """One who asked waits no longer; a grammar for which nobody waits leaves the queue, unless it has begun.

        Args:
            future: From :meth:`compiled`.
        """
        with self._lock:
            if future in self._waiting:
                self._waiting[future] -= 1
                if self._waiting[future] <= 0:
                    future.cancel()

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._waiting.pop(future, None)

    def begin(self, matcher: Any) -> Walk:
        """One more answer that follows a compiled grammar."""
        with self._lock, _calm():
            return Walk(matcher.deep_copy())

    def name(self, words: PreTrainedTokenizerBase, vocabulary: int, ends: Collection[int]) -> str:
        """Name of what llguidance makes of a tokenizer, which takes a while the first time.

        Args:
            words: As for :meth:`walk`.
            vocabulary: The same.
            ends: The same.

        Raises:
            GrammarError, InputError, EnvironmentProblem: As for :meth:`walk`.
        """
        library = _library()
        with self._naming, _calm():
            return self._name(library, words, vocabulary, ends)

    def _name(self, library: Any, words: Any, vocabulary: int, ends: Collection[int]) -> str:
        """Name of what llguidance made of a tokenizer; equal tokenizers of several members are made once."""
        key = (id(words), vocabulary, tuple(sorted(ends)))
        if key in self._tokenizers:
            return self._tokenizers[key][1]
        if not ends:
            raise GrammarError("the model has no token that ends a text")
        backend = getattr(words, "backend_tokenizer", None)
        if backend is None:
            raise InputError("structured outputs need a fast tokenizer (tokenizer.json), which this model has not")
        text = f"{backend.to_str()} {key[1:]}"
        name = hashlib.sha256(text.encode()).hexdigest()
        if name not in self._made:
            from llguidance.hf import from_tokenizer

            try:
                # logits may be more than tokens, or fewer
                size = max(vocabulary, len(words))
                self._made[name] = from_tokenizer(words, n_vocab=size, eos_token=list(key[2]))
            except (ValueError, RuntimeError) as error:
                raise InputError(f"llguidance cannot read the tokenizer: {first_line(error)}") from error
        self._tokenizers[key] = (words, name)
        return name


def slow() -> GrammarError:
    """A grammar takes too long."""
    return GrammarError(f"it takes longer than {COMPILE_SECONDS:g} seconds to compile")


def _compile(tokenizer: Any, grammar: str) -> Any:
    """The matcher of llguidance at the beginning of a grammar.

    Args:
        tokenizer: What it made of the model's.
        grammar: In its notation.

    Raises:
        GrammarError: There is none, or it is too complex in its first :data:`TRIED` tokens.
    """
    library = _library()
    with _calm():
        # its own words go to stderr otherwise
        limits = library.LLParserLimits(initial_lexer_fuel=FUEL)
        matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            # what this finds belongs to all copies
            matcher.compute_logit_bias()
        # what is too complex mostly is so at once, and would hold up the answers of others
        tried = matcher if matcher.is_error() else matcher.deep_copy()
        for _ in range(TRIED):
            if tried.is_stopped():
                break
            allowed = torch.frombuffer(bytearray(tried.compute_logit_bias()), dtype=torch.uint8)
            allowed[tokenizer.eos_tokens] = 0
            if tried.is_error() or not bool(allowed.any()):
                break
            tried.consume_token(int(allowed.argmax()))
        if tried.is_error():
            raise GrammarError(_plain(tried.get_error()))
    return matcher


def _plain(error: str) -> str:
    """The first line of what llguidance says of a grammar, with the one that its pointer is under."""
    lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
    return " ".join(lines[:6])[:400]

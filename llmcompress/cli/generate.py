"""``generate`` and ``chat``: look at what a model writes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.evaluate import DeviceOption, DtypeOption, MemberOption, ModelArgument
from llmcompress.cli.output import Output
from llmcompress.errors import InputError, UsageError, command_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.cli.models import OpenedModel
    from llmcompress.inference.generate import Sampling as How
    from llmcompress.inference.grammar import Walk

NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Length of the continuation.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus sampling; takes effect with a temperature.")
]
ChatTemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature", "-t", min=0.0, help="0 is greedy. Default: the model's generation_config.json, or 0.7."
    ),
]
ChatTopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p", min=0.0, max=1.0, help="Nucleus sampling. Default: the model's generation_config.json, or 0.95."
    ),
]
TopKOption = Annotated[
    int, typer.Option("--top-k", min=0, help="Choose among this many of the likeliest tokens; 0 for all.")
]
MinPOption = Annotated[
    float,
    typer.Option("--min-p", min=0.0, max=1.0, help="Least probability of a token, as a share of the likeliest one's."),
]
ChatTopKOption = Annotated[
    int | None, typer.Option("--top-k", min=0, help="0 for all. Default: the model's generation_config.json, or 0.")
]
ChatMinPOption = Annotated[
    float | None,
    typer.Option("--min-p", min=0.0, max=1.0, help="Default: the model's generation_config.json, or 0."),
]
RepetitionOption = Annotated[
    float,
    typer.Option("--repetition-penalty", min=0.01, max=100.0, help="Above 1: less of what was there; 1 for none."),
]
ChatRepetitionOption = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", min=0.01, max=100.0,
        help="Above 1: less of what was there. Default: the model's generation_config.json, or 1.",
    ),
]  # fmt: skip
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the random choice.")]
EngineOption = Annotated[
    str, typer.Option("--engine", metavar="NAME", help="auto, native (one C++ call per token) or transformers.")
]
Int8Option = Annotated[
    bool, typer.Option("--int8-activations", help="Native engine: round activations to 8 bits. Faster, not exact.")
]
HeadBitsOption = Annotated[
    int | None,
    typer.Option("--head-bits", metavar="8", help="Native engine: round the output head to 8 bits. Not exact."),
]
SchemaOption = Annotated[
    Path | None,
    typer.Option(
        "--json-schema", dir_okay=False, help="Write JSON of the schema in this file.", rich_help_panel="Format"
    ),
]
RegexOption = Annotated[
    str | None, typer.Option("--regex", help="Write what this pattern matches.", rich_help_panel="Format")
]
ChoiceOption = Annotated[
    list[str] | None,
    typer.Option("--choice", help="Write this text or another one that is given.", rich_help_panel="Format"),
]
TALK = (0.7, 0.95)
"""Temperature and top-p of a chat with a model that recommends none."""
ENGINES = ("auto", "native", "transformers")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(app, "generate")(generate)
    command(app, "chat")(chat)


def generate(
    out: Output,
    path: ModelArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; standard input if absent.")
    ] = None,
    max_new_tokens: NewTokensOption = 64,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionOption = 1.0,
    seed: SeedOption = 0,
    as_chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    json_schema: SchemaOption = None,
    regex: RegexOption = None,
    choice: ChoiceOption = None,
    member: MemberOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    engine: EngineOption = "auto",
    int8_activations: Int8Option = False,
    head_bits: HeadBitsOption = None,
) -> None:
    """Continue a prompt, with the likeliest token each time unless a temperature is given."""
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("no prompt", command_line("generate", path, "--prompt", "Once upon a time"))
        prompt = sys.stdin.read().rstrip("\n")
    prompt = _utf8(prompt)
    how = Sampling(max_new_tokens, temperature, top_p, seed, top_k, min_p, repetition_penalty)
    form = form_of(json_schema, regex, choice)
    writer = Writer(out, path, how, dtype, device, Speed(engine, int8_activations, head_bits), member, form)
    words = writer.render([{"role": "user", "content": prompt}]) if as_chat else prompt
    text, data = writer.write(words, stream=not out.json_mode, special=not as_chat)
    if out.json_mode:
        out.result({"path": path, "prompt": prompt, "text": text, **data}, "")
    if not data.get("complete", True):
        out.warning(f"{form.option if form else ''}: cut short after {max_new_tokens} tokens; raise --max-new-tokens")
    out.note(f"{data['new_tokens']} tokens, {data['tokens_per_second']:.1f} per second")


def chat(
    out: Output,
    path: ModelArgument,
    max_new_tokens: NewTokensOption = 256,
    temperature: ChatTemperatureOption = None,
    top_p: ChatTopPOption = None,
    top_k: ChatTopKOption = None,
    min_p: ChatMinPOption = None,
    repetition_penalty: ChatRepetitionOption = None,
    seed: SeedOption = 0,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    member: MemberOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    engine: EngineOption = "auto",
    int8_activations: Int8Option = False,
    head_bits: HeadBitsOption = None,
) -> None:
    """Talk with a model: a line in, an answer out. /reset forgets, /save FILE writes the conversation as JSON, /exit or
    Ctrl-D ends.

    A model without a chat template continues the text of the conversation instead.
    """
    how = Sampling(max_new_tokens, temperature, top_p, seed, top_k, min_p, repetition_penalty, talk=True)
    writer = Writer(out, path, how, dtype, device, Speed(engine, int8_activations, head_bits), member)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    if not writer.has_template:
        out.note("this model has no chat template; it continues the text instead")
    while (line := _read_line()) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(start)
            continue
        if line == "/save" or line.startswith("/save "):
            _save(out, line[5:].strip(), messages)
            continue
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        words = writer.render(asked) if writer.has_template else "\n".join(m["content"] for m in asked)
        try:
            answer, _ = writer.write(words, stream=not out.json_mode, special=not writer.has_template)
        except InputError as error:  # the conversation goes on: its next line may be /reset
            out.warning(f"{error.message}; /reset begins a new conversation, or: {error.hint}")
            continue
        messages = [*asked, {"role": "assistant", "content": answer.strip()}]
    if out.json_mode:
        out.result({"path": path, "messages": messages}, "")


def _save(out: Output, name: str, messages: list[dict[str, str]]) -> None:
    """Write a conversation as OpenAI's ``messages``; one that is in the way stays."""
    if not name:
        out.warning("/save: give a file, as in /save talk.json")
        return
    try:
        with Path(name).expanduser().open("x", encoding="utf-8") as file:
            file.write(_utf8(json.dumps(messages, ensure_ascii=False, indent=2)) + "\n")
    except (OSError, ValueError, RuntimeError) as error:
        # no such user of ~, or a sign that no name has, loses no conversation
        out.warning(f"/save: {name}: {getattr(error, 'strerror', None) or error}")
        return
    out.note(f"{len(messages)} messages are in {name}")


def _utf8(text: str) -> str:
    """Text as typed: where a locale is not UTF-8, Python hides bytes in signs that no tokenizer and no JSON takes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_line() -> str | None:
    """One line from standard input, None at its end; a prompt only where a person types."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


@dataclass(frozen=True, slots=True)
class Form:
    """What a continuation must be.

    Attributes:
        grammar: In llguidance's notation.
        option: That asks for it.
    """

    grammar: str
    option: str


def form_of(schema: Path | None, regex: str | None, choice: list[str] | None) -> Form | None:
    """The format that options ask for, None for any.

    Raises:
        UsageError: They ask for several, or for an empty text.
        InputError: The schema's file cannot be read, or is no schema.
        EnvironmentProblem: llguidance is missing.
    """
    if sum(given is not None for given in (schema, regex, choice or None)) > 1:
        raise UsageError("--json-schema, --regex and --choice: one format at a time", "leave out all but one")
    from llmcompress.inference.grammar import GrammarError, of_choice, of_regex, of_schema

    if schema is not None:
        try:
            found = json.loads(schema.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{schema}: {error}", "give a file with a JSON schema") from error
        if not isinstance(found, dict | bool):
            raise InputError(f"{schema}: a schema is a JSON object", 'write it like {"type": "object"}')
        try:
            return Form(of_schema(found), f"--json-schema {schema}")
        except GrammarError as error:
            raise InputError(f"{schema}: {error.message}", "give a file with a JSON schema") from error
    if regex is not None:
        return Form(of_regex(regex), "--regex")
    if choice and not all(choice):
        raise UsageError("--choice: a text is empty", "leave it out")
    return Form(of_choice(choice), "--choice") if choice else None


class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: Longest continuation.
        temperature: 0 is greedy. None is what the model's makers recommend, else :data:`TALK`; so is that of top_p.
        top_p: Nucleus.
        seed: Seed of sampling.
        top_k, min_p, repetition: Further limits; None is what the makers recommend, else none.
        talk: Whether what the makers recommend counts at all.
    """

    def __init__(
        self, max_new_tokens: int, temperature: float | None, top_p: float | None, seed: int,
        top_k: int | None = None, min_p: float | None = None, repetition: float | None = None, talk: bool = False,
    ) -> None:  # fmt: skip
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self.top_k = top_k
        self.min_p = min_p
        self.repetition = repetition
        self.talk = talk

    def of(self, model: PreTrainedModel) -> How:
        """The settings for one model."""
        from llmcompress.inference.generate import Recommended, recommended

        made = recommended(model.generation_config) if self.talk else Recommended()
        asked = Recommended(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition)
        return made.sampling(self.max_new_tokens, self.seed, asked, TALK)


class Speed:
    """What may make generation faster; see :class:`llmcompress.inference.engine.Engine`.

    Args:
        engine: ``auto``, ``native`` or ``transformers``.
        int8_activations: Round activations to 8 bits.
        head_bits: 8 rounds the output head, None keeps it.

    Raises:
        UsageError: An option is out of range, or asks transformers' engine for what only the native one does.
    """

    def __init__(self, engine: str, int8_activations: bool, head_bits: int | None) -> None:
        if engine not in ENGINES:
            raise UsageError(f"--engine {engine}: unknown", f"choose one of {', '.join(ENGINES)}")
        if head_bits not in (None, 8):
            raise UsageError(f"--head-bits {head_bits}: not supported", "leave it out, or use 8")
        if engine == "transformers" and (int8_activations or head_bits):
            raise UsageError("--int8-activations and --head-bits belong to the native engine", "use --engine native")
        self.engine = engine
        self.options = {"int8_activations": int8_activations, "head_bits": head_bits}


class Writer:
    """A loaded model that writes to stdout as it goes.

    Args:
        out: Where text and remarks go.
        path, dtype, device, member: As for :func:`llmcompress.cli.models.open_model`.
        sampling: How to sample.
        speed: By which engine.
        form: What the one continuation must be, None for anything.

    Raises:
        InputError: This model cannot keep to ``form``.
    """

    def __init__(
        self,
        out: Output,
        path: str,
        sampling: Sampling,
        dtype: str,
        device: str,
        speed: Speed,
        member: str | None = None,
        form: Form | None = None,
    ) -> None:
        from llmcompress.cli.models import open_model
        from llmcompress.inference.generate import Generator

        out.note(f"loading {path}")
        self._opened: OpenedModel = open_model(path, dtype, device, member=member)
        self._sampling = sampling
        name: Any = speed.engine
        self._generator = Generator(self._opened.model, name, conversation=sampling.talk, **speed.options)
        if self._generator.reason is not None and speed.engine == "auto":
            out.note(f"transformers' own loop decodes: {self._generator.reason}")
        self._walk = None if form is None else self._walks(form)

    def _walks(self, form: Form) -> Walk:
        """The beginning of a grammar."""
        from llmcompress.inference.grammar import GrammarError, Grammars
        from llmcompress.inference.greedy import end_tokens

        words = self._opened.tokenizer
        assert words is not None
        size = int(self._opened.model.config.get_text_config().vocab_size)
        try:
            return Grammars().walk(words, size, end_tokens(self._opened.model, words), form.grammar)
        except GrammarError as error:
            raise InputError(f"{form.option}: {error.message}", "simplify it, or correct it") from error

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self._opened.tokenizer, "chat_template", None))

    def render(self, messages: list[dict[str, str]]) -> str:
        """Messages through the chat template.

        Raises:
            InputError: There is none.
        """
        if not self.has_template:
            raise InputError(f"{self._opened.path}: the tokenizer has no chat template", "leave out --chat")
        words: Any = self._opened.tokenizer
        return str(words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def write(self, prompt: str, *, stream: bool, special: bool) -> tuple[str, dict[str, Any]]:
        """Continue ``prompt``.

        Args:
            prompt: The text.
            stream: Print while it is written.
            special: Let the tokenizer add its special tokens (a rendered template has them already).

        Returns:
            The continuation, and counts and speed.

        Raises:
            InputError: The prompt has no tokens, or leaves no room in the model's context.
        """
        from llmcompress.inference.greedy import end_tokens

        words, how = self._opened.tokenizer, self._sampling
        assert words is not None
        ends = end_tokens(self._opened.model, words)
        ids = list(words(_utf8(prompt), add_special_tokens=special)["input_ids"])
        self._check_room(len(ids))
        (found,) = self._generator.generate(
            [ids],
            how.of(self._opened.model),
            ends,
            _streamer(words) if stream else None,
            self._walk,
        )
        answer = str(words.decode(found.tokens, skip_special_tokens=True))
        speed = len(found.tokens) / found.seconds if found.seconds else 0.0
        data = {
            "prompt_tokens": len(ids), "new_tokens": len(found.tokens), "seconds": round(found.seconds, 3),
            "tokens_per_second": round(speed, 2), "engine": self._generator.engine,
        }  # fmt: skip
        if self._walk is not None:
            data["complete"] = self._walk.ended or (bool(found.tokens) and found.tokens[-1] in ends)
        return answer, data

    def _check_room(self, tokens: int) -> None:
        if tokens == 0:
            raise InputError("the prompt has no tokens", "give a prompt with text")
        context = getattr(self._opened.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and tokens + self._sampling.max_new_tokens > context:
            room = context - tokens
            hint = f"--max-new-tokens {room}" if room > 0 else "give a shorter prompt"
            raise InputError(
                f"{tokens} prompt tokens and {self._sampling.max_new_tokens} new ones exceed the model's {context}",
                hint,
            )


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

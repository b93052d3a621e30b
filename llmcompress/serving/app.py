"""The HTTP application: routes, checks, streaming. It knows requests and jobs; the scheduler knows models."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmcompress.errors import EnvironmentProblem, InputError
from llmcompress.inference.generate import Recommended, Sampling
from llmcompress.inference.grammar import COMPILE_SECONDS, GrammarError, Grammars, Walk, slow
from llmcompress.inference.penalties import Tally
from llmcompress.serving.answers import Answers, ChatShape, CompletionShape, Shape
from llmcompress.serving.conversation import chat_template, rendered, tool_form, toolbox, variables
from llmcompress.serving.guard import HEALTH, Guard, Unread
from llmcompress.serving.letters import Letters
from llmcompress.serving.limits import Limits
from llmcompress.serving.metrics import Metrics
from llmcompress.serving.protocol import ApiError, Ask, ChatAsk, CompletionAsk, DetokenizeAsk, TokenizeAsk, parse
from llmcompress.serving.scheduler import FAILED, STOPPED, UNFOLLOWED, Busy, Job, Piece, Scheduler
from llmcompress.serving.served import ServedModel
from llmcompress.serving.structured import Form, form_of
from llmcompress.serving.text import TextStream, loads, specials
from llmcompress.serving.thoughts import Thinking, thinking_of
from llmcompress.serving.tools import Toolbox

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

# of all logits of a prompt whose tokens' probabilities are wanted
ECHO_BYTES = 1 << 30
_EVENTS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request with its prompts read.

    Attributes:
        ask: Its body.
        model: That is to answer.
        prompts: Token ids.
        wanted: New tokens at most.
        logprobs: Number of likely tokens to report with each, None for none at all.
        shape: Of the answer.
        echoes: Texts of the prompts, where answers begin with them.
        tools: That may be called.
        thinking: How the answers think, None where thoughts are not told apart.
    """

    ask: Ask
    model: ServedModel
    prompts: list[list[int]]
    wanted: int
    logprobs: int | None
    shape: Shape
    echoes: list[str] | None = None
    tools: Toolbox | None = None
    thinking: Thinking | None = None

    @property
    def count(self) -> int:
        """How many answers."""
        return len(self.prompts) * self.ask.n


class Service:
    """What the routes share.

    Args:
        models: By name.
        scheduler: Decodes.
        limits: Bounds.
        metrics: Counters.
        parser: How thoughts are told from answers; see :func:`~llmcompress.serving.thoughts.thinking_of`.
    """

    def __init__(
        self, models: dict[str, ServedModel], scheduler: Scheduler, limits: Limits, metrics: Metrics,
        parser: str = "auto",
    ) -> None:  # fmt: skip
        self.models, self.scheduler, self.limits, self.metrics = models, scheduler, limits, metrics
        self.parser = parser
        self.letters = Letters()
        scheduler.told = self.letters.post
        self.created = int(time.time())
        self.grammars = Grammars()

    def model(self, name: str | None) -> ServedModel:
        """The model of a name, or the only one.

        Raises:
            ApiError: 404, or 400 where there are several.
        """
        if name is None:
            if len(self.models) > 1:
                raise ApiError(400, f"model: name one of {', '.join(self.models)}", param="model")
            name = next(iter(self.models))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"the model {name!r} does not exist; served are {known}", "model_not_found", "model")
        return self.models[name]

    def describe(self, name: str) -> dict[str, Any]:
        """OpenAI's model object; beyond it the length that a sequence may have, under vLLM's name for it."""
        own = {"owned_by": "llmcompress", "max_model_len": self.scheduler.room(name)}
        return {"id": name, "object": "model", "created": self.created, **own}

    async def health(self, _: Request) -> Response:
        """200 while requests are taken, else 503."""
        if self.scheduler.draining or not self.scheduler.alive:
            return JSONResponse({"status": "draining" if self.scheduler.alive else "down"}, 503)
        return JSONResponse({"status": "ok"})

    async def measures(self, _: Request) -> Response:
        """Prometheus metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_models(self, _: Request) -> Response:
        """Members of the family, or the one model."""
        return JSONResponse({"object": "list", "data": [self.describe(name) for name in self.models]})

    async def one_model(self, request: Request) -> Response:
        """One of them, or all: a client's path may end in a slash."""
        if not request.path_params["name"]:
            return await self.list_models(request)
        return JSONResponse(self.describe(self.model(request.path_params["name"]).name))

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        ask = parse(CompletionAsk, await _json(request))
        model = self.model(ask.model)
        special = ask.add_special_tokens is not False
        prompts = [await self.tokens(model, prompt, special) for prompt in ask.prompts()]
        if not prompts:
            raise ApiError(400, "prompt: give at least one", param="prompt")
        echoes = None
        if ask.echo:
            longest = max(map(len, prompts))
            most = ECHO_BYTES // (4 * model.vocabulary)
            if ask.logprobs is not None and longest > most:
                raise ApiError(400, f"echo: {longest} tokens, with logprobs at most {most} are taken", param="echo")
            words: Any = model.tokenizer
            given = zip(ask.prompts(), prompts)
            echoes = [
                text if isinstance(text, str) else str(words.decode(tokens, clean_up_tokenization_spaces=False))
                for text, tokens in given
            ]
        asked = Asked(ask, model, prompts, ask.max_tokens, ask.logprobs, CompletionShape(), echoes)
        return await self.answer(request, asked)

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        ask = parse(ChatAsk, await _json(request))
        model = self.model(ask.model)
        messages = [message.plain() for message in ask.messages]
        template = chat_template(model, ask.tools)
        tools = toolbox(model, ask, template)
        text, prompt = await run_in_threadpool(
            rendered, model, messages, variables(ask, template), bool(ask.add_special_tokens)
        )
        self.check_prompt(model, prompt, "messages")
        begun_with = messages[-1]["content"] if ask.continue_final_message else None
        thinking = thinking_of(template, text, self.parser, ask.include_reasoning, begun_with)
        room = min(self.scheduler.room(model.name), model.context or 1 << 40) - len(prompt)
        usual = model.sampling.max_new_tokens or self.limits.default_new_tokens
        wanted = ask.wanted or max(1, min(usual, self.limits.new_tokens, room))
        logprobs = (ask.top_logprobs or 0) if ask.logprobs else None
        shape = ChatShape(ask.n, tools, thinking)
        asked = Asked(ask, model, [prompt], wanted, logprobs, shape, tools=tools, thinking=thinking)
        return await self.answer(request, asked)

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or of a conversation."""
        ask = parse(TokenizeAsk, await _json(request))
        model = self.model(ask.model)
        words: Any = model.tokenizer
        if ask.messages is not None:
            messages = [message.plain() for message in ask.messages]
            how = variables(ask, chat_template(model, ask.tools))
            _, found = await run_in_threadpool(rendered, model, messages, how, bool(ask.add_special_tokens))
        else:
            special = ask.add_special_tokens is not False
            found = list((await run_in_threadpool(words, ask.prompt, add_special_tokens=special))["input_ids"])
        texts = words.convert_ids_to_tokens(found) if ask.return_token_strs else None
        room = self.scheduler.room(model.name)
        return JSONResponse({"count": len(found), "max_model_len": room, "tokens": found, "token_strs": texts})

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids."""
        ask = parse(DetokenizeAsk, await _json(request))
        model = self.model(ask.model)
        words: Any = model.tokenizer
        if any(token >= model.vocabulary for token in ask.tokens):
            raise ApiError(400, f"tokens: token ids are 0 to {model.vocabulary - 1}", param="tokens")
        text = await run_in_threadpool(words.decode, ask.tokens, clean_up_tokenization_spaces=False)
        return JSONResponse({"prompt": str(text)})

    async def tokens(self, model: ServedModel, prompt: str | list[int], special: bool) -> list[int]:
        """Token ids of a prompt, with those that the tokenizer adds of its own if ``special``.

        Raises:
            ApiError: It has none, too many, or unknown ones.
        """
        if isinstance(prompt, str):
            words: Any = model.tokenizer
            prompt = list((await run_in_threadpool(words, prompt, add_special_tokens=special))["input_ids"])
        elif any(not 0 <= token < model.vocabulary for token in prompt):
            raise ApiError(400, f"prompt: token ids are 0 to {model.vocabulary - 1}", param="prompt")
        self.check_prompt(model, prompt, "prompt")
        return prompt

    def check_prompt(self, model: ServedModel, prompt: Sequence[int], field: str) -> None:
        """Refuse empty and oversized prompts."""
        most = min(self.limits.prompt_tokens, self.scheduler.room(model.name) - 1, (model.context or 1 << 40) - 1)
        if not prompt:
            raise ApiError(400, f"{field}: no tokens", param=field)
        if len(prompt) > most:
            raise ApiError(
                400, f"{field}: {len(prompt)} tokens, at most {most} are taken", "context_length_exceeded", field
            )

    async def answer(self, request: Request, asked: Asked) -> Response:
        """Queue the jobs of a request and answer, at once or as a stream."""
        ask, model, prompts = asked.ask, asked.model, asked.prompts
        self.check_room(asked)
        ends = (frozenset() if ask.ignore_eos else model.stop).union(ask.stop_token_ids or ())
        form, penalties = form_of(ask), ask.penalties(model.sampling, ends)
        kept: frozenset[int] = frozenset()
        if asked.tools is not None:
            form, kept = tool_form(asked.tools, model, form), asked.tools.kept(model.tokenizer)
        if asked.thinking is not None:
            kept |= asked.thinking.kept(model.tokenizer)
        if any(token >= model.vocabulary for token, _ in penalties.bias):
            raise ApiError(400, f"logit_bias: token ids are 0 to {model.vocabulary - 1}", param="logit_bias")
        walks = [None] * asked.count if form is None else await self.walks(asked, form)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()
        seed = secrets.randbits(62) if ask.seed is None else ask.seed
        if not ask.skip_special_tokens:
            kept = specials(model.tokenizer)
        jobs = []
        for index, walk in enumerate(walks):
            how = _sampling(ask, model, asked.wanted, seed + index % ask.n & (1 << 63) - 1)
            own = (kept, ask.include_stop_str_in_output, ask.min_tokens)
            stream, prompt = TextStream(model.tokenizer, ask.stop or (), *own), prompts[index // ask.n]
            echo = None if asked.echoes is None else asked.echoes[index // ask.n]
            tally = None if penalties.idle else Tally(penalties, prompt, model.vocabulary)
            sink = partial(self.letters.put, loop, pieces, index)
            jobs.append(Job(model.name, prompt, how, ends, stream, sink, asked.logprobs, echo, walk, tally))
        try:
            self.scheduler.submit(jobs)
        except Busy as busy:
            if busy.draining:
                raise ApiError(503, str(busy), "server_draining", kind="server_error") from busy
            raise ApiError(429, str(busy), "queue_full", kind="rate_limit_error") from busy
        answers = Answers(asked.shape, model, f"{asked.shape.prefix}-{uuid.uuid4().hex}", jobs, prompts)
        if ask.stream:
            body = self.stream(answers, pieces, ask.wants_usage, ask.counts_always)
            return _Events(body, partial(self.scheduler.cancel, jobs))
        return await self.whole(request, answers, pieces)

    def check_room(self, asked: Asked) -> None:
        """Refuse too many and too long answers.

        Raises:
            ApiError: 400.
        """
        # all wait together before the first is taken
        most = min(self.limits.choices, self.limits.queue)
        if asked.count > most:
            raise ApiError(400, f"n: {asked.count} answers, at most {most}", param="n")
        if asked.wanted > self.limits.new_tokens:
            raise ApiError(400, f"max_tokens: {asked.wanted}, at most {self.limits.new_tokens}", param="max_tokens")
        if asked.ask.min_tokens > asked.wanted:
            raise ApiError(400, f"min_tokens: {asked.ask.min_tokens}, of {asked.wanted} at most", param="min_tokens")
        room = min(self.scheduler.room(asked.model.name), asked.model.context or 1 << 40)
        longest = max(map(len, asked.prompts))
        if longest + asked.wanted > room:
            raise ApiError(
                400, f"{longest} prompt tokens and {asked.wanted} new ones exceed the {room} that fit",
                "context_length_exceeded", "max_tokens",
            )  # fmt: skip

    async def walks(self, asked: Asked, form: Form) -> list[Walk | None]:
        """The beginning of a format's grammar, behind thoughts where there are any, for each answer.

        Raises:
            ApiError: 400 for a format that cannot be kept to, 501 without the library, 503 where too many are compiled.
        """
        grammars, model = self.grammars, asked.model
        try:
            grammar = await run_in_threadpool(form.grammar)
            if asked.thinking is not None:
                grammar = asked.thinking.before(grammar, model.tokenizer)
            name = await run_in_threadpool(grammars.name, model.tokenizer, model.vocabulary, model.stop)
            compiled = grammars.compiled(name, grammar)
            try:
                # a reader who goes away, or waits too long, does not end what others wait for
                matcher = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(compiled)), COMPILE_SECONDS)
            except TimeoutError as error:
                if not (compiled.running() or compiled.done()):
                    text = f"{form.field}: the formats of others are being compiled; try again"
                    raise ApiError(503, text, "compilers_busy", form.field, "server_error") from error
                raise slow() from error
            finally:
                # a place that nobody waits for is free for the next; what is done has none
                grammars.give_up(compiled)
            return [grammars.begin(matcher) for _ in range(asked.count)]
        except GrammarError as error:
            raise ApiError(400, f"{form.field}: {error}", param=form.field) from error
        except InputError as error:
            raise ApiError(400, f"{model.name}: {error}", param=form.field) from error
        except EnvironmentProblem as error:
            text = f"{form.field}: {error}; the server's owner can {error.hint}"
            raise ApiError(501, text, "not_installed", form.field, "server_error") from error

    async def stream(
        self, answers: Answers, pieces: asyncio.Queue[tuple[int, Piece]], usage: bool, always: bool
    ) -> AsyncIterator[bytes]:
        """Server-sent events; ``usage`` in the last one, or ``always``."""

        def counted(chunk: dict[str, Any]) -> bytes:
            # a stream that counts has the field in every chunk
            return _event({**chunk, "usage": answers.usage() if always else None} if usage else chunk)

        for opening in answers.openings():
            yield counted(opening)
        left = len(answers.jobs)
        while left:
            index, piece = await pieces.get()
            if piece.error is not None:
                yield _event(_failure(piece.error).body())
                return
            chunk = answers.chunk(index, piece)
            if chunk is not None:
                yield counted(chunk)
            left -= piece.reason is not None
        if usage:
            yield _event(answers.usage_chunk())
        yield b"data: [DONE]\n\n"

    async def whole(self, request: Request, answers: Answers, pieces: asyncio.Queue[tuple[int, Piece]]) -> Response:
        """One JSON object, unless the reader goes away before."""
        gone = asyncio.create_task(_disconnected(request))
        try:
            left = len(answers.jobs)
            while left:
                ready = asyncio.create_task(pieces.get())
                await asyncio.wait({ready, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not ready.done():
                    ready.cancel()
                    return Response(status_code=499)
                index, piece = ready.result()
                if piece.error is not None:
                    raise _failure(piece.error)
                answers.add(index, piece)
                left -= piece.reason is not None
            return JSONResponse(answers.body())
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            self.scheduler.cancel(answers.jobs)


class _Events(StreamingResponse):
    """A stream that says when it is over, also to a reader who has gone before its first byte: a generator that was
    never begun has no end to hook on to.

    Args:
        body: Server-sent events.
        over: Frees the places of the answers.
    """

    def __init__(self, body: AsyncIterator[bytes], over: Callable[[], None]) -> None:
        super().__init__(body, media_type="text/event-stream", headers=_EVENTS)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


def application(service: Service, api_key: str | None, origins: Sequence[str] = ()) -> ASGIApp:
    """The routes behind key, body and time limits.

    Args:
        service: What they do.
        api_key: Asked of every request but those after its health; None for no key.
        origins: Of pages whose scripts may read answers; browsers ask for them before, without the key.
    """
    routes = [
        *(Route(path, service.health, methods=["GET"]) for path in HEALTH),
        Route("/metrics", service.measures, methods=["GET"]),
        Route("/v1/models", service.list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.one_model, methods=["GET"]),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/tokenize", service.tokenize, methods=["POST"]),
        Route("/detokenize", service.detokenize, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _gone, Exception: _broken,
    }  # fmt: skip
    inside = Starlette(routes=routes, exception_handlers=handlers)
    guarded = Guard(inside, service.limits, service.metrics, api_key)
    if not origins:
        return guarded
    return CORSMiddleware(guarded, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])


def _failure(error: str) -> ApiError:
    if error == UNFOLLOWED:
        return ApiError(400, "the answer's format became too complex to keep to", "grammar_too_complex")
    draining = error == STOPPED
    text = "the server is shutting down" if draining else "the server failed to compute this answer"
    return ApiError(503 if draining else 500, text, "internal_error", kind="server_error")


async def _json(request: Request) -> Any:
    body = await request.body()
    try:
        # json itself lets half a surrogate pair pass in bytes, too
        return loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(data: Any) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    if isinstance(error, Unread):
        headers = {"Connection": "close"}
    return JSONResponse(error.body(), error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return JSONResponse(ApiError(error.status_code, text).body(), error.status_code, headers=error.headers)


async def _broken(_: Request, __: Exception) -> Response:
    """For what nobody foresaw; the traceback goes on to the server's log."""
    return JSONResponse(_failure(FAILED).body(), 500)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


def _sampling(ask: Ask, model: ServedModel, wanted: int, seed: int) -> Sampling:
    """How tokens are chosen: as the request says, else as the model's makers recommend, else as at OpenAI."""
    top_k = None if ask.top_k is None else max(0, ask.top_k)
    return model.sampling.sampling(wanted, seed, Recommended(ask.temperature, ask.top_p, top_k, ask.min_p))

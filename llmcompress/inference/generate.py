"""Continue prompts: natively where the engine can run the model, through transformers' ``generate`` elsewhere.

Greedy continuations are the same tokens either way. Sampled ones follow the same distribution and are repeatable with
the same seed and engine, but the two engines draw different random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from llmcompress_kernels.build import BuildError
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.inference.caches import PromptReader, Snapshots, shared_prefix
from llmcompress.inference.engine import longest
from llmcompress.inference.native import NativeEngine, decline, open_engine
from llmcompress.inference.penalties import Penalties, Tally

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from llmcompress.inference.grammar import Walk

EngineName = Literal["auto", "native", "transformers"]
# candidates that a nucleus is sought among before everything is sorted
NUCLEUS = 1024
# positions by which the cache of a conversation grows
TURNS = 1024
# of a conversation with a model of states: what its next turn goes on from
SNAPSHOT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Longest continuation.
        temperature: 0 is greedy.
        top_p: Nucleus: the smallest set of most likely tokens with at least this probability.
        top_k: Only the most likely ones; 0 for all.
        seed: Seed of the draws.
        min_p: Only those with at least this share of the likeliest one's probability, up to 1; 0 for all.
        repetition: See :class:`~llmcompress.inference.penalties.Penalties`; 1 changes nothing. A server has all of
            these in the place of this one.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    repetition: float = 1.0


@dataclass(frozen=True, slots=True)
class Recommended:
    """What a checkpoint's ``generation_config.json``, or a request, says of sampling; None where it says nothing.

    Attributes:
        temperature, top_p, top_k, min_p: As in :class:`Sampling`. A file that does not ask for sampling recommends
            none of these.
        repetition_penalty: See :class:`~llmcompress.inference.penalties.Penalties`.
        max_new_tokens: Longest continuation.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    def sampling(
        self, max_new_tokens: int, seed: int, asked: Recommended, otherwise: tuple[float, float] = (1.0, 1.0)
    ) -> Sampling:
        """How tokens are chosen for a request: as it says, else as the makers recommend, else as ``otherwise`` says.

        Args:
            max_new_tokens: Longest continuation.
            seed: Seed of the draws.
            asked: What the request says.
            otherwise: Temperature and top_p where neither does.
        """

        def first(*values: float | None) -> float:
            return next((value for value in values if value is not None), 0.0)

        return Sampling(
            max_new_tokens, first(asked.temperature, self.temperature, otherwise[0]),
            first(asked.top_p, self.top_p, otherwise[1]), int(first(asked.top_k, self.top_k)), seed,
            first(asked.min_p, self.min_p), first(asked.repetition_penalty, self.repetition_penalty, 1.0),
        )  # fmt: skip


def recommended(settings: GenerationConfig | None) -> Recommended:
    """The sampling that a model's makers recommend.

    Args:
        settings: The model's ``generation_config``.
    """
    given: Any = settings

    def positive(name: str) -> float | None:
        value = getattr(given, name, None)
        return value if isinstance(value, int | float) and value > 0 else None

    # with greedy decoding too
    repetition = positive("repetition_penalty")
    repetition, most = None if repetition == 1 else repetition, positive("max_new_tokens")
    always: dict[str, Any] = {
        "repetition_penalty": repetition, "max_new_tokens": None if most is None else int(most),
    }  # fmt: skip
    if given is None or not getattr(given, "do_sample", None):
        return Recommended(**always)
    top_k = positive("top_k")
    top_k = None if top_k is None else int(top_k)
    return Recommended(positive("temperature"), positive("top_p"), top_k, positive("min_p"), **always)


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Inside, ``model.generate`` takes from the checkpoint's settings nothing that a call leaves open: beams, banned
    repetitions and the like would be neither greedy nor what the native engine writes.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@dataclass(frozen=True, slots=True)
class Continuation:
    """What was written after one prompt.

    Attributes:
        tokens: New token ids; the stop token, if one was met, is the last.
        prompt_seconds: Time to read all prompts of the batch; 0 where transformers does not tell.
        seconds: Time of the whole batch.
        reused: First tokens of the prompt that the engine held already.
    """

    tokens: list[int]
    prompt_seconds: float
    seconds: float
    reused: int = 0


class Generator:
    """A model that continues prompts.

    Args:
        model: A causal language model in evaluation mode, dense or packed.
        engine: ``auto`` takes the native one where it can run; ``native`` insists on it.
        options: Options of the engine (:func:`~llmcompress.inference.native.open_engine`): ``cache_dtype``,
            ``int8_activations``, ``head_bits``, ``threads``.
        conversation: Whether a prompt is likely to begin with the last one and its continuation, which the native
            engine then keeps, where it can. Logits may differ by rounding from those of the whole prompt.

    Raises:
        InputError: ``native`` is asked for and declined.

    Attributes:
        engine: ``native`` or ``transformers``.
        reason: Why it is not the native one, None if it is.
    """

    def __init__(
        self, model: PreTrainedModel, engine: EngineName = "auto", conversation: bool = False, **options: Any
    ) -> None:
        self.model = model
        self._conversation = conversation
        # tokens in the engine's first slot
        self._held: list[int] = []
        self._native: NativeEngine | None = None
        self._snapshots = Snapshots(SNAPSHOT_BYTES) if conversation else None
        self._longest = longest(model)
        self.reason = "asked for" if engine == "transformers" else decline(model)
        if self.reason is None:
            try:
                self._native = open_engine(model, **options)
            except BuildError as error:
                self.reason = str(error).splitlines()[0]
        if engine == "native" and self.reason is not None:
            raise InputError(f"the native engine cannot run this model: {self.reason}", "use engine auto")

    @property
    def engine(self) -> str:
        """Which engine runs."""
        return "transformers" if self._native is None else "native"

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop: Collection[int] = (),
        streamer: Any = None,
        walk: Walk | None = None,
    ) -> list[Continuation]:
        """Continue every prompt.

        Args:
            prompts: Token ids, at least one each. They need not be of one length.
            sampling: How to sample.
            stop: Token ids that end a continuation.
            streamer: A transformers streamer, for a single prompt.
            walk: The beginning of a grammar that the continuation of a single prompt follows.

        Raises:
            InputError: A prompt is empty, several are streamed or follow one grammar, or a grammar became too complex.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise InputError("a prompt has no tokens", "give a prompt with text")
        if streamer is not None and len(prompts) > 1:
            raise InputError(f"{len(prompts)} prompts cannot be streamed at once")
        if walk is not None and len(prompts) > 1:
            raise InputError(f"{len(prompts)} prompts cannot follow one grammar at once")
        room = max(map(len, prompts)) + sampling.max_new_tokens
        if self._native is None or (self._longest is not None and room > self._longest):
            return [self._by_transformers(prompt, sampling, stop, streamer, walk) for prompt in prompts]
        results: list[Continuation] = []
        most = self._native.max_batch
        for first in range(0, len(prompts), most):
            results += self._natively(self._native, prompts[first : first + most], sampling, stop, streamer, walk)
        return results

    @torch.inference_mode()
    def _natively(
        self,
        engine: NativeEngine,
        prompts: Sequence[Sequence[int]],
        how: Sampling,
        stop: Collection[int],
        streamer: Any,
        walk: Walk | None,
    ) -> list[Continuation]:
        began = time.perf_counter()
        room = max(map(len, prompts)) + how.max_new_tokens
        room = -(-room // TURNS) * TURNS if self._conversation else room
        engine.reserve(room if self._longest is None else min(room, self._longest), len(prompts))
        draws = torch.Generator().manual_seed(how.seed)
        if streamer is not None:
            streamer.put(torch.tensor([list(prompts[0])]))
        reused = [0] * len(prompts)
        if self._conversation and engine.keeps_prefixes:
            known = shared_prefix(self._held, list(prompts[0]))
            reused[0] = known if engine.reusable(0, known) else 0
        # an error or an interrupt may leave anything
        self._held = []
        reader = PromptReader(engine, self._snapshots)
        reused[0] = reused[0] or reader.begin(0, prompts[0])
        first = torch.stack([
            reader.read(slot, prompt, start)
            for slot, (prompt, start) in enumerate(zip(prompts, reused))
        ])  # fmt: skip
        prompt_seconds = time.perf_counter() - began
        written: list[list[int]] = [[] for _ in prompts]
        open_slots = list(range(len(prompts)))
        tallies = _tallies(prompts, how, first.shape[-1])
        tokens = choose(_weighed(first, walk, tallies), how, draws)
        while True:
            for slot, token in zip(list(open_slots), tokens.tolist()):
                written[slot].append(token)
                if tallies:
                    tallies[slot].take(token)
                if _ends(token, stop, walk) or len(written[slot]) == how.max_new_tokens:
                    open_slots.remove(slot)
            if streamer is not None:
                streamer.put(tokens)
            if not open_slots:
                break
            tokens = torch.tensor([written[slot][-1] for slot in open_slots])
            if how.temperature > 0 or walk is not None or tallies:
                counts = [tallies[slot] for slot in open_slots] if tallies else []
                tokens = choose(_weighed(engine.step(tokens, open_slots), walk, counts), how, draws)
            else:
                tokens = engine.greedy(tokens, open_slots)
        if streamer is not None:
            streamer.end()
        seconds = time.perf_counter() - began
        # the last token has been chosen, and not been read
        self._held = [*prompts[0], *written[0][:-1]]
        return [Continuation(found, prompt_seconds, seconds, start) for found, start in zip(written, reused)]

    @torch.inference_mode()
    def _by_transformers(
        self, prompt: Sequence[int], how: Sampling, stop: Collection[int], streamer: Any, walk: Walk | None
    ) -> Continuation:
        from transformers import GenerationConfig

        sampled = how.temperature > 0
        # without a stop token an impossible one: None would mean the checkpoint's own
        ends = sorted(stop) or [int(self.model.config.get_text_config().vocab_size)]
        settings = GenerationConfig(
            max_new_tokens=how.max_new_tokens, do_sample=sampled, repetition_penalty=how.repetition,
            pad_token_id=ends[0], eos_token_id=ends,
            **({"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p} if sampled else {}),
            **({"min_p": how.min_p} if sampled and how.min_p > 0 else {}),
        )  # fmt: skip
        device = self.model.device
        ids = torch.tensor([list(prompt)], device=device)
        model: Any = self.model
        began = time.perf_counter()
        devices = [device] if device.type == "cuda" else []
        with without_own_settings(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(how.seed)
            full = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer,
                **({} if walk is None else _followed(walk)),
            )  # fmt: skip
        return Continuation(full[0, ids.shape[1] :].tolist(), 0.0, time.perf_counter() - began)


def _tallies(prompts: Sequence[Sequence[int]], how: Sampling, vocabulary: int) -> list[Tally]:
    """What counts repetitions, one for each prompt; none where they cost nothing."""
    if how.repetition == 1:
        return []
    return [Tally(Penalties(repetition=how.repetition), prompt, vocabulary) for prompt in prompts]


def _weighed(logits: Tensor, walk: Walk | None, tallies: Sequence[Tally]) -> Tensor:
    """Logits ``[B, V]``, with a grammar ``[1, V]``: minus infinity for what may not come, less for what was there."""
    if walk is not None:
        logits = walk.restrict(logits[0].float()).unsqueeze(0)
    return torch.stack([tally.apply(row.float()) for tally, row in zip(tallies, logits)]) if tallies else logits


def _ends(token: int, stop: Collection[int], walk: Walk | None) -> bool:
    """Whether a token that has been chosen is the last."""
    if walk is not None:
        walk.take(token)
    return token in stop or (walk is not None and walk.ended)


def _followed(walk: Walk) -> dict[str, Any]:
    """What makes transformers' ``generate`` follow a grammar."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    def restrict(_: Tensor, scores: Tensor) -> Tensor:
        return walk.restrict(scores[0].float().cpu()).unsqueeze(0).to(scores)

    def ended(ids: Tensor, _: Tensor, **__: Any) -> Tensor:
        return torch.tensor([_ends(int(ids[0, -1]), (), walk)], device=ids.device)

    steps: Any = [restrict]
    ends: Any = [ended]
    return {"logits_processor": LogitsProcessorList(steps), "stopping_criteria": StoppingCriteriaList(ends)}


def choose(logits: Tensor, how: Sampling, draws: torch.Generator) -> Tensor:
    """One token for every row.

    Args:
        logits: float32 ``[B, V]``.
        how: Temperature first, then top-k, then top-p, then min-p, as transformers orders them.
        draws: Random numbers.

    Returns:
        int64 ``[B]``.
    """
    if how.temperature == 0:
        return logits.argmax(-1)
    # from the largest down, so that the smallest temperatures give no infinity less infinity
    scaled = (logits - logits.amax(-1, keepdim=True)) / max(how.temperature, torch.finfo(torch.float32).tiny)
    if how.top_k == 0 and how.top_p >= 1 and how.min_p == 0:
        return torch.multinomial(scaled.softmax(-1), 1, generator=draws)[:, 0]
    vocabulary = logits.shape[-1]
    count = min(how.top_k or vocabulary, vocabulary)
    # sorting a vocabulary costs as much as a step; the nucleus is nearly always among the first
    tried = min(count, NUCLEUS)
    values, index = scaled.topk(tried, -1)
    everything = scaled if how.top_k == 0 else values if tried == count else scaled.topk(count, -1).values
    probabilities = (values - everything.logsumexp(-1, keepdim=True)).exp()
    before = probabilities.cumsum(-1) - probabilities
    # whether one that was not tried could be kept
    short = (before[:, -1] + probabilities[:, -1] < how.top_p) & (
        probabilities[:, -1] >= how.min_p * probabilities[:, 0]
    )
    if tried < count and bool(short.any()):
        values, index = scaled.topk(count, -1)
        probabilities = (values - everything.logsumexp(-1, keepdim=True)).exp()
        before = probabilities.cumsum(-1) - probabilities
    likely = probabilities >= how.min_p * probabilities[:, :1]
    kept = torch.where((before < how.top_p) & likely, probabilities, 0)
    kept[:, 0] = probabilities[:, 0]
    return index.gather(-1, torch.multinomial(kept, 1, generator=draws))[:, 0]

"""``sampler.engine: vllm``: responses for S2R written by vLLM (0.11 or later) instead of our own decoder.

Not run: no machine with a GPU and vLLM was at hand. ``tests/unit/training/test_vllm_writer.py`` holds every call
against the signatures of vLLM 0.11.2 and 0.33.0, and the chain of calls against a stand-in that computes.

What goes where:

- *Weights.* A folder in transformers' format, in the type of the run, is written anew before each round (adapters
  merged), and vLLM reads it: at first when it starts, later by its worker's ``reload_weights``. Between rounds it
  sleeps at level 2, which gives its memory back for training and forgets weights and cache.
- *Choices.* Temperature, ``top_p``, the longest response, a seed for each response. Settings of
  ``generation_config.json`` are not taken, and the end token is the tokenizer's alone, as with our decoder. A response
  keeps its end token. What is an attempt and what a verification is cut from the tokens afterwards, by the same code.
- *Log-probabilities* that train are those of our own model. vLLM's come from other kernels and another batch, in 16
  bit; taken for ``π_old`` they would make the ratio differ from 1 before anything was learned, by what adds up over a
  response. They serve as a check (:func:`~llmcompress.training.rl.sampler_gap`): where they are further from ours than
  the clip range, vLLM does not write with these weights, which sleep at level 2 has done to some models in silence.

Equal seeds need not give equal responses: vLLM's batches depend on the order in which responses end, so that a resumed
run may end in other weights than an uninterrupted one.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.distributed.world import World
from llmcompress.errors import EnvironmentProblem
from llmcompress.evaluation.sampling import Sampling
from llmcompress.models.handle import ModelHandle
from llmcompress.training.policy import Policy
from llmcompress.training.saving import save_model

MISSING = "pip install 'llmcompress[vllm]', or sampler.engine: own"


class VllmWriter:
    """vLLM with the weights of a policy.

    Args:
        policy: Policy whose weights it gets; dense, with or without adapters.
        source: Where its config and tokenizer come from.
        folder: For the weights on their way; removed when done.
        dtype: Name of the type that the weights are handed over and computed in.
        length: Longest prompt and response in tokens.
        memory: Share of the GPU's memory for weights and cache.
        seed: Seed of the engine; each response has one of its own.

    Attributes:
        told: Log-probabilities of the tokens of the responses written last, by vLLM.
    """

    def __init__(
        self, policy: Policy, source: ModelHandle, folder: Path, dtype: str, length: int, memory: float, seed: int
    ) -> None:
        self.policy, self.source, self.folder, self.dtype = policy, source, folder, dtype
        self.length, self.memory, self.seed = length, memory, seed
        self.told: list[Tensor] = []
        self._engine: Any = None
        # of an interrupted run
        shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def awake(self) -> Iterator[Callable[..., list[list[int]]]]:
        """Hand the policy's weights over; inside the ``with`` block what it gives writes like
        :func:`~llmcompress.evaluation.sampling.sample` of a model.

        Raises:
            EnvironmentProblem: vLLM is not installed or does not start.
        """
        self._hand_over()
        try:
            if self._engine is not None:
                # memory for the cache only when the weights are in their place
                self._engine.wake_up(tags=["weights"])
                self._engine.collective_rpc("reload_weights")
                self._engine.reset_prefix_cache()
                self._engine.wake_up(tags=["kv_cache"])
            yield self.write
        finally:
            if self._engine is not None:
                self._engine.sleep(level=2)

    def write(
        self, prompts: Sequence[Sequence[int]], settings: Sampling, end: int, pad: int, seed: int, world: World
    ) -> list[list[int]]:
        """Continue prompts; see :func:`~llmcompress.evaluation.sampling.sample`. ``pad`` is not needed."""
        vllm = _package()
        engine = self._engine = self._engine or self._started(vllm, settings)
        asked = [
            vllm.SamplingParams(
                temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_new_tokens,
                seed=(seed * 1_000_003 + place) % 2**63, stop_token_ids=[end], ignore_eos=True, logprobs=0,
                detokenize=False,
            )
            for place in range(len(prompts))
        ]  # fmt: skip
        outputs = engine.generate([{"prompt_token_ids": list(row)} for row in prompts], asked, use_tqdm=False)
        if len(outputs) != len(prompts):
            raise EnvironmentProblem(f"vLLM answered {len(outputs)} of {len(prompts)} prompts", "sampler.engine: own")
        found = [list(output.outputs[0].token_ids) for output in outputs]
        chances = [output.outputs[0].logprobs for output in outputs]
        self.told = [
            torch.tensor([place[token].logprob for token, place in zip(ids, row, strict=True)])
            for ids, row in zip(found, chances)
        ]
        return found

    def close(self) -> None:
        """End vLLM and remove the weights."""
        self._engine = None
        gc.collect()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _hand_over(self) -> None:
        """Write the weights where vLLM reads them; it holds no file of them open while it sleeps."""
        _package()
        shutil.rmtree(self.folder, ignore_errors=True)
        save_model(self.policy.model, self.source, self.folder, self.dtype)
        if torch.cuda.is_available():
            # what torch keeps for later is not free for another process
            torch.cuda.empty_cache()

    def _started(self, vllm: Any, settings: Sampling) -> Any:
        try:
            return vllm.LLM(
                model=str(self.folder), dtype=self.dtype, max_model_len=self.length, max_num_seqs=settings.batch,
                gpu_memory_utilization=self.memory, enable_sleep_mode=True, skip_tokenizer_init=True, seed=self.seed,
                generation_config="vllm", logprobs_mode="processed_logprobs",
            )  # fmt: skip
        except Exception as error:
            # what it may raise is no part of its interface
            raise EnvironmentProblem(
                f"vLLM does not start: {error}",
                "see its lines above; a GPU, a model it knows and enough memory (sampler.memory) are needed, or "
                "sampler.engine: own",
            ) from error


def _package() -> Any:
    """The package.

    Raises:
        EnvironmentProblem: It is not installed.
    """
    # it would report model and hardware to its makers
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise EnvironmentProblem(f"sampler.engine: vllm is not installed ({error})", MISSING) from error
    return vllm

"""Text samples of two models side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmcompress.errors import InputError
from llmcompress.evaluation.config import GenerationConfig, require_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmcompress.inference.greedy import GreedyWriter


@torch.inference_mode()
def generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, writer: GreedyWriter | None = None
) -> list[list[int]]:
    """Continue every prompt: greedily through the native engine where it can, else through transformers.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        config: Prompts, length and sampling.
        writer: Writer of this model; afterwards it tells which engine wrote.

    Returns:
        New token ids for each prompt, without the prompt itself.

    Raises:
        InputError: A prompt is empty, or ``chat`` is asked for without a chat template.
    """
    from transformers import GenerationConfig as HFGenerationConfig

    from llmcompress.inference.generate import without_own_settings
    from llmcompress.inference.greedy import end_tokens

    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"temperature": config.temperature, "top_k": 0, "top_p": 1.0} if config.temperature > 0 else {}
    settings = HFGenerationConfig(
        **sampling,
        do_sample=bool(sampling),
        max_new_tokens=config.max_new_tokens,
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
    )
    require_chat_template((), config, getattr(tokenizer, "chat_template", None))
    prompts = [_prompt_ids(tokenizer, prompt, config.chat) for prompt in config.prompts]
    if config.temperature == 0 and writer is not None:
        written = writer.write(prompts, config.max_new_tokens, ends)
        if written is not None:
            return written
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        with without_own_settings(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(config.seed)
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        results.append(output[0, ids.shape[1] :].tolist())
    return results


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    if chat:
        prompt = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
    # a rendered template already holds its special tokens
    ids = list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])
    if not ids:
        raise InputError(f"the prompt {prompt!r} has no tokens", "give a prompt with text")
    return ids


def side_by_side(
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    dense: list[list[int]] | None,
    compressed: list[list[int]] | None,
) -> list[dict[str, Any]]:
    """Pair the continuations for the report.

    Args:
        tokenizer: For decoding.
        config: The prompts.
        dense: Token ids per prompt, or None when the dense twin did not run.
        compressed: Token ids per prompt, or None when there is no compressed model.

    Returns:
        One record per prompt: prompt, dense, compressed, and how many tokens agree from the start.
    """
    records: list[dict[str, Any]] = []
    for index, prompt in enumerate(config.prompts):
        record: dict[str, Any] = {"prompt": prompt, "dense": None, "compressed": None}
        if dense is not None:
            record["dense"] = tokenizer.decode(dense[index], skip_special_tokens=True)
        if compressed is not None:
            record["compressed"] = tokenizer.decode(compressed[index], skip_special_tokens=True)
        if dense is not None and compressed is not None:
            pairs = list(zip(dense[index], compressed[index]))
            record["same_tokens"] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            record["new_tokens"] = max(len(dense[index]), len(compressed[index]))
        records.append(record)
    return records

"""Gradients block by block against one backward pass of the whole model, and against what errors really cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmcompress.models.handle import ModelHandle
from llmcompress.models.loss_sensitivity import loss_sensitivity, sampled
from llmcompress.models.memory_limits import GRADIENT_TOKENS

SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    # Qwen2 has biases, which are no part of what a weight puts out
    config = Qwen2Config(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("sensitivity") / "model"
    model.save_pretrained(path)
    return path


def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (24, 20), generator=torch.Generator().manual_seed(1))


def drawn(model: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """The tokens that the blocks' gradients are taken for: window by window from one generator."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        logits = [model(input_ids=row[None]).logits[0].float() for row in rows]
    return [torch.multinomial(each.softmax(-1), 1, generator=generator)[:, 0] for each in logits]


def test_blocks_give_what_the_whole_model_gives(folder: Path) -> None:
    handle, rows = ModelHandle.open(folder), tokens()
    found = loss_sensitivity(handle, rows, "cpu", "float32", SEED)
    model = handle.dense_model(torch.float32)
    names = [view.name for block in handle.layout.blocks for view in block.linears()]
    assert list(found) == names
    outputs: dict[str, torch.Tensor] = {}
    sizes: dict[str, torch.Tensor] = {}
    targets = torch.cat(drawn(model, rows))
    for name in names:

        def keep(_module: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            output.retain_grad()
            outputs[name], sizes[name] = output, inputs[0].detach().square().sum(-1)

        model.get_submodule(name).register_forward_hook(keep)
    embedded = model.get_input_embeddings()(rows).requires_grad_(True)
    logits = model(inputs_embeds=embedded).logits.float()
    F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").backward()
    for name, output in outputs.items():
        bias = model.get_submodule(name).bias
        plain = output.detach() - (0 if bias is None else bias)
        assert output.grad is not None
        felt = (output.grad.square().sum(-1) * sizes[name]).mean()
        energy = plain.square().sum(-1).mean() / (output.shape[-1] * sizes[name].mean())
        expected = 0.5 * felt * energy
        assert found[name] == pytest.approx(float(expected), rel=1e-3)


def test_predicts_what_an_error_costs(folder: Path) -> None:
    """Rounding noise of a known share in one weight moves predictions by about what was said."""
    handle, rows = ModelHandle.open(folder), tokens()
    found = loss_sensitivity(handle, rows, "cpu", "float32", SEED)
    model = handle.dense_model(torch.float32)
    with torch.no_grad():
        before = model(input_ids=rows).logits.float().log_softmax(-1)
        ratios = []
        for name in found:
            weight = model.get_parameter(f"{name}.weight")
            original, costs = weight.clone(), []
            for seed in range(4):
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
                noise *= original.norm() / noise.norm() * 0.02
                weight.copy_(original + noise)
                after = model(input_ids=rows).logits.float().log_softmax(-1)
                costs.append(float((before.exp() * (before - after)).sum(-1).mean()))
            weight.copy_(original)
            ratios.append(sum(costs) / len(costs) / (found[name] * 0.02**2))
    # noise without regard to the inputs' directions: right in the middle, within a factor each
    assert 0.5 < sorted(ratios)[len(ratios) // 2] < 2.0
    assert all(0.1 < ratio < 10.0 for ratio in ratios)
    # and the weights do differ by more than that: the figure says something
    assert max(found.values()) > 20 * min(found.values())


def test_few_tokens_suffice() -> None:
    assert len(sampled(torch.zeros(100, 256))) == GRADIENT_TOKENS // 256
    assert len(sampled(torch.zeros(3, 2 * GRADIENT_TOKENS))) == 1
    assert len(sampled(torch.zeros(3, 16))) == 3

"""Tiny random models of every MoE family, shared by the tests."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# before torch is loaded: threads that spin while they wait are slow on a shared machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# before triton is: its kernels run on CPU tensors here, and for real in scripts/gpu_check.sh
os.environ.setdefault("TRITON_INTERPRET", "1")
# who waits for a library that another process of the tests compiles, with a cold cache on a busy machine, waits for it
os.environ.setdefault("LLMCOMPRESS_BUILD_TIMEOUT", "3600")

# the same examples every time, however slow the machine: a change is judged by what it does, not by luck
settings.register_profile(
    "llmcompress", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("llmcompress")

_BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "first_k_dense_replace": 1, "intermediate_size": 48, "moe_intermediate_size": 16,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "head_dim": None,
}  # fmt: skip
MOE_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
                  "num_experts": 8, "num_experts_per_tok": 4, "decoder_sparse_step": 1},
    "qwen3_moe": {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2,
                  "norm_topk_prob": True, "decoder_sparse_step": 1},
    "olmoe": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 4},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 16, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
                    "routed_scaling_factor": 2.5},
    "deepseek_v32": {**_LATENT, "q_lora_rank": 16, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
                     "index_topk": 6, "index_n_heads": 2, "index_head_dim": 16},
    "glm_moe_dsa": {**_LATENT, "q_lora_rank": 16, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 16,
                    "indexer_types": ["full", "shared"]},
    "glm4_moe_lite": {**_LATENT, "q_lora_rank": 16, "n_group": 4, "topk_group": 2},
    "qwen3_next": {"intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
                   "num_experts": 8, "num_experts_per_tok": 3, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "layer_types": ["linear_attention", "full_attention"]},
    "minimax": {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "block_size": 8,
                "layer_types": ["linear_attention", "full_attention"], "linear_attn_alpha_factor": 1.4,
                "mlp_beta_factor": 0.8},
    "minimax_m2": {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 4},
    "ernie4_5_moe": {"intermediate_size": 48, "moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 3,
                     "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": {"intermediate_size": 16, "num_experts": 8, "moe_topk": 3},
    "granitemoeshared": {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 3,
                         "shared_intermediate_size": 24, "residual_multiplier": 0.6, "head_dim": None},
    "lfm2_moe": {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3,
                 "num_dense_layers": 1, "routed_scaling_factor": 1.5, "head_dim": None,
                 "layer_types": ["conv", "full_attention"]},
    "flex_olmo": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": None},
    "afmoe": {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3,
              "num_shared_experts": 1, "route_scale": 1.5, "num_dense_layers": 1, "sliding_window": 4},
    "mimo_v2_flash": {"intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8,
                      "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "v_head_dim": 6, "sliding_window": 4,
                      "num_key_value_heads": 1},
    "hy_v3": {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3},
    "laguna": {"intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
               "num_experts": 8, "num_experts_per_tok": 3, "moe_routed_scaling_factor": 1.5,
               "num_attention_heads_per_layer": [2, 4]},
    "cohere2_moe": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 1,
                    "expert_selection_fn": "sigmoid", "sliding_window": 4, "layer_norm_eps": 1e-5},
    "mellum": {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3,
               "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "granitemoe_swa": {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 3,
                       "shared_intermediate_size": 24, "residual_multiplier": 0.6, "head_dim": None,
                       "sliding_window": 4, "layer_rope_theta": [10000.0, 0]},
    # two experts a token, so that both ways of weighing them differ
    "llama4_text": {"intermediate_size": 24, "intermediate_size_mlp": 48, "num_local_experts": 8,
                    "num_experts_per_tok": 2, "attention_chunk_size": 8, "no_rope_layers": [1, 0]},
    "gemma4_text": {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8, "top_k_experts": 3,
                    "enable_moe_block": True, "attention_k_eq_v": True, "global_head_dim": 12,
                    "hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16,
                "layer_types": ["full_attention", "full_attention"]},
}  # fmt: skip

_SCAN = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 8,
         "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": None}  # fmt: skip
DENSE_FAMILIES: dict[str, dict[str, Any]] = {
    "lfm2": {
        "intermediate_size": 48,
        "block_auto_adjust_ff_dim": False,
        "head_dim": None,
        "layer_types": ["conv", "full_attention"],
    },
    "gemma3_text": {
        "intermediate_size": 48,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
    },
}
SSM_FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 16, "chunk_size": 8},
    "bamba": {**_SCAN, "attn_layer_indices": [1]},
    "falcon_h1": {**_SCAN, "mamba_d_ssm": 64, "mamba_rms_norm": True, "ssm_out_multiplier": 0.7,
                  "attention_in_multiplier": 0.8, "attention_out_multiplier": 0.9, "mlp_multipliers": [0.9, 1.1],
                  "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7]},
    "granitemoehybrid": {**_SCAN, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24,
                         "residual_multiplier": 0.6,
                         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8,
                   "intermediate_size": 48, "time_step_limit": [0.7, 1.5],
                   "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_group": 4,
                   "topk_group": 2, "moe_shared_expert_intermediate_size": 40, "moe_latent_size": 16,
                   "routed_scaling_factor": 1.5,
                   "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe", "linear_attention"]},
    "zamba2": {"n_mamba_heads": 8, "mamba_ngroups": 2, "mamba_d_state": 16, "chunk_size": 8, "intermediate_size": 48,
               "head_dim": None, "num_key_value_heads": None, "num_mem_blocks": 1, "adapter_rank": 16,
               "use_shared_attention_adapter": True, "use_mem_rope": True, "tie_word_embeddings": True,
               "num_hidden_layers": 4,
               "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "qwen3_5_text": {"intermediate_size": 48, "num_hidden_layers": 3, "linear_num_value_heads": 4,
                     "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
                     "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "olmo_hybrid": {"intermediate_size": 48, "num_hidden_layers": 3, "linear_num_value_heads": 4,
                    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
                    "head_dim": None, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "kimi_linear": {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8,
                    "num_shared_experts": 1, "num_experts_per_token": 3, "num_expert_group": 4, "topk_group": 2,
                    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                    "num_key_value_heads": 4, "head_dim": None, "linear_num_heads": 4, "linear_head_dim": 16,
                    "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"intermediate_size": 48, "num_hidden_layers": 3, "num_experts": 4, "mamba_d_state": 8,
              "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
}  # fmt: skip


class TinyModels:
    """Makes configs and random models with well separated router logits."""

    families = tuple(MOE_FAMILIES)

    @staticmethod
    def config(model_type: str, **changes: Any) -> Any:
        """The family's transformers config."""
        from transformers import AutoConfig

        values = {**_BASE, **{**MOE_FAMILIES, **SSM_FAMILIES, **DENSE_FAMILIES}[model_type], **changes}
        return AutoConfig.for_model(model_type, **{k: v for k, v in values.items() if v is not None})

    @classmethod
    def model(cls, model_type: str, seed: int = 0, **changes: Any) -> Any:
        """A float32 model in eval mode; every parameter is random, routers included."""
        import torch
        from transformers import AutoModelForCausalLM

        from llmcompress.models.registry import layout_from_config
        from llmcompress.nn.adapted_mixtures import adapt_mixtures

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(cls.config(model_type, **changes)).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    # without residual connections inside, random transformers amplify every error
                    gain = 0.3 if "shared_transformer" in name else 1.0
                    parameter.normal_(0, 0.3 if "embed" in name else gain * parameter.shape[-1] ** -0.5)
                elif "norm" not in name:
                    parameter.normal_(0, 0.1)
            for name, tensor in model.state_dict().items():
                if name.endswith(("e_score_correction_bias", "expert_bias")):
                    tensor.normal_(0, 0.1)
        adapt_mixtures(model, layout_from_config(model.config.to_dict()))
        return model

    @classmethod
    def state(
        cls, folder: Path, model_type: str, samples: int = 6, length: int = 32, wide: str = "", **changes: Any
    ) -> Any:
        """A run state with the model, saved to ``folder`` in bfloat16, and random calibration tokens.

        Parameters whose names end in ``wide`` are saved in float32.
        """
        import torch

        from llmcompress.data.calibration import CalibrationSet
        from llmcompress.models.handle import ModelHandle
        from llmcompress.stages.state import RunState

        if not folder.exists():
            model = cls.model(model_type, **changes)
            kept = {name: p.data for name, p in model.named_parameters() if wide and name.endswith(wide)}
            model.to(torch.bfloat16)
            for name, value in kept.items():
                model.get_parameter(name).data = value
            model.save_pretrained(folder)
        tokens = torch.randint(3, 64, (samples, length), generator=torch.Generator().manual_seed(1))
        return RunState(model=ModelHandle.open(folder, "float32"), calibration=CalibrationSet.of(tokens, {}))

    @staticmethod
    def context(folder: Path, stage: str = "quantize", events: list[Any] | None = None) -> Any:
        """A run context in ``folder`` on the CPU in float32; events are appended to ``events``."""
        from llmcompress.stages.state import RunContext

        stage_dir = folder / "stages" / stage
        stage_dir.mkdir(parents=True, exist_ok=True)
        emit = (lambda _event: None) if events is None else events.append
        return RunContext(folder, stage, stage_dir, 0, "cpu", "float32", {}, emit)


@pytest.fixture(scope="session")
def tiny() -> type[TinyModels]:
    """Factory of tiny MoE models: config, model, run state and run context."""
    return TinyModels


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seeds every generator before a test and the fixtures made for it.

    Those that draw without a seed of their own would draw something else after other tests, and in other processes.
    """
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads_are_restored() -> Iterator[None]:
    """A run sets torch's threads for its process; the next test must not inherit them.

    Another number of threads sums in another order, so exact comparisons with a fresh process would depend on
    which tests ran before.
    """
    import torch

    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with an argument ``moe_family`` or ``ssm_family`` run once per family."""
    # the hybrid has what no other family has: experts without a gate, which read a projection of the layer's input
    for name, table in (
        ("moe_family", (*MOE_FAMILIES, "nemotron_h", "kimi_linear")),
        ("ssm_family", tuple(SSM_FAMILIES)),
    ):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, sorted(table))


SENTENCES = (
    "The cat sat on the warm stone and looked at the sea.",
    "Nobody had opened the green door for seven years.",
    "She wrote the number three on the wall, then four, then five.",
    "Ünder the bridge a café sold naïve little cakes — 東京 style.",
    "When the rain stopped, the children ran down to the river again.",
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of at most 320 tokens: 0 pads, 1 begins, 2 ends a text; it adds nothing by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a tiny random Mixtral with its tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("tiny_mixtral")
    TinyModels.model("mixtral", vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder

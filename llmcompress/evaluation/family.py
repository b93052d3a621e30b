"""Perplexity of a family's members: dense, from the tree, by other methods, and on each other's texts.

Every figure is kept as soon as it is known, so that an interrupted run measures only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.durable import write_durably
from llmcompress.evaluation.batching import family_batch
from llmcompress.evaluation.family_baselines import Baselines
from llmcompress.evaluation.fidelity import fidelity
from llmcompress.evaluation.perplexity import Text, perplexity, tokenize, window_parts
from llmcompress.quant.codecs import codec, delta_tree
from llmcompress.quant.family import entry

if TYPE_CHECKING:
    from llmcompress.evaluation.config import PerplexityConfig
    from llmcompress.stages.state import FamilyState, RunContext


class Ledger:
    """Figures by key, one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The figure under ``key``, measured if it is not known."""
        if key not in self.rows:
            self.rows[key] = measure()
            write_durably(self.path, json.dumps(self.rows, sort_keys=True).encode())
        return self.rows[key]


def measure_family(config: Any, state: FamilyState, ctx: RunContext) -> dict[str, Any]:
    """Measure everything the stage asks for.

    Returns:
        ``members`` (per member dense and compressed), ``methods`` (per method its bits, mean relative increase and,
        where asked for, mean divergence ``kl`` in nats a token), ``cross`` (member → text → perplexity, dense and
        compressed).
    """
    return _Measurement(config, state, ctx).run()


class _Measurement:
    def __init__(self, config: Any, state: FamilyState, ctx: RunContext) -> None:
        self.config, self.state, self.ctx = config, state, ctx
        self.ledger = Ledger(ctx.stage_dir / "figures.json")
        self.names = [name for name in state.plan.order if config.text_of(name) is not None]
        self._texts: dict[tuple[str, str], Text] = {}

    def run(self) -> dict[str, Any]:
        """Method by method, one model in memory at a time."""
        state = self.state
        self._method("dense", lambda name: {})
        self._method("rqt", self._tree_weights)
        methods = {"rqt": self._summary("rqt", state.plan.linear_bits())}
        baselines = Baselines(state, self.ctx, self.config.baseline_group_size, self.config.baseline_sweeps)
        for method in self.config.baselines:
            self._method(method, partial(baselines.weights, method))
            bits = self.ledger.get(f"{method}/bits", partial(baselines.bits, method))
            methods[method] = self._summary(method, bits)
        # last, so that a run that is cut off has what all methods are compared by
        if self.config.cross:
            self._method("dense", lambda name: {}, cross=True)
            self._method("rqt", self._tree_weights, cross=True)
        members = {}
        for name in self.names:
            dense, compressed = self._own("dense", name), self._own("rqt", name)
            members[name] = {
                "dense": dense["perplexity"], "compressed": compressed["perplexity"], "stderr": compressed["stderr"],
                "tokens": compressed["tokens"], "relative": compressed["perplexity"] / dense["perplexity"] - 1,
            }  # fmt: skip
        rows: dict[str, Any] = {"members": members, "methods": methods}
        if self.config.cross:
            rows["cross"] = {
                method: {
                    name: {text: self.ledger.rows[f"{method}/{name}/{text}"]["perplexity"] for text in self.names}
                    for name in self.names
                }
                for method in ("dense", "rqt")
            }
        return rows

    def _summary(self, method: str, bits: float) -> dict[str, Any]:
        relative = {
            name: self._own(method, name)["perplexity"] / self._own("dense", name)["perplexity"] - 1
            for name in self.names
        }
        found = {"bits": bits, "relative": relative, "mean_relative": sum(relative.values()) / len(relative)}
        if self.config.divergence:
            found["kl"] = sum(self.ledger.rows[f"{method}/{name}/kl"] for name in self.names) / len(self.names)
        return found

    def _own(self, method: str, name: str) -> Any:
        return self.ledger.rows[f"{method}/{name}/{name}"]

    def _method(self, method: str, weights: Callable[[str], Mapping[str, Tensor]], cross: bool = False) -> None:
        """Measure one method on each member's own text, or on all."""
        for name in self.names:
            texts = self.names if cross else [name]
            missing = [text for text in texts if f"{method}/{name}/{text}" not in self.ledger.rows]
            apart = self.config.divergence and method != "dense" and f"{method}/{name}/kl" not in self.ledger.rows
            if not missing and not apart:
                continue
            model = self._model(name, weights(name), quantized=method != "dense")
            for text in missing:
                self.ledger.get(f"{method}/{name}/{text}", partial(self._perplexity, model, name, text))
            if apart:
                self.ledger.get(f"{method}/{name}/kl", partial(self._divergence, model, name))
            self.ctx.emit("note", text=f"{method}: {name} {self._own(method, name)['perplexity']:.3f}")

    def _model(self, name: str, weights: Mapping[str, Tensor], quantized: bool) -> Any:
        """A member as a dense model in compute type, with ``weights`` in place of its own."""
        dtype = getattr(torch, self.ctx.dtype)
        handle = self.state.family.members[name]
        model: Any = handle.dense_model(dtype)
        model = model.to(self.ctx.device)
        for linear, weight in weights.items():
            model.get_parameter(f"{linear}.weight").data.copy_(weight)
        if quantized:
            self._round_outside(model, name)
        return model.eval()

    def _round_outside(self, model: Any, name: str) -> None:
        """Store embedding and head as the artifact does; every method gets the same."""
        from llmcompress.export.family import outside_specs, pack_outside

        for tensor, spec in outside_specs(self.state.family.base, self.state.outside).items():
            original = self.state.family.members[name].checkpoint.tensor(tensor).to(self.ctx.device)
            place = model.get_parameter(tensor)
            place.data.copy_(codec(spec.codec).decode(pack_outside(original, spec), original.dtype))

    def _tree_weights(self, name: str) -> dict[str, Tensor]:
        plan, found = self.state.plan, {}
        for block in self.state.family.layout.blocks:
            patch = self.state.store.read_block(block.index)
            for linear in block.linears():
                nodes = [patch.packed[entry(node, linear.name)] for node in plan.path(linear.name, name)]
                found[linear.name] = delta_tree.reconstruct([node.to(self.ctx.device) for node in nodes])
        return found

    def _perplexity(self, model: Any, name: str, text: str) -> dict[str, Any]:
        settings: PerplexityConfig = self.config.text_of(text)
        result = perplexity(
            model, self._text(name, text), settings.length, settings.stride, keep_tail=settings.tail == "keep",
            batch=family_batch(settings.length, self.state.family.layout.vocab, self.ctx.device),
        )  # fmt: skip
        return {"perplexity": result.perplexity, "stderr": result.stderr, "tokens": result.tokens, "nll": result.nll}

    def _divergence(self, model: Any, name: str) -> float:
        """Mean KL of a member's predictions from its dense original's, on the full windows of its own text."""
        settings: PerplexityConfig = self.config.text_of(name)
        windows = window_parts(self._text(name, name), settings.length)[0]
        batch = family_batch(2 * settings.length, self.state.family.layout.vocab, self.ctx.device)
        return fidelity(self._model(name, {}, quantized=False), model, windows, batch).kl

    def _text(self, name: str, text: str) -> Text:
        """A text in a member's tokens."""
        from llmcompress.data.documents import read

        if (name, text) not in self._texts:
            settings: PerplexityConfig = self.config.text_of(text)
            tokenizer = self.state.family.members[name].tokenizer()
            joined = settings.separator.join(read(settings.source, tokenizer, settings.template).texts)
            self._texts[name, text] = tokenize(joined, tokenizer).first(settings.max_tokens)
        return self._texts[name, text]

"""Quantized states in transformers' own mixers.

Every mixer of a family calls two functions of its modelling file: a scan over a sequence and an update by one token.
A mixer is given a copy of its forward in which those two names mean ours; all other mathematics (projections,
convolution, norms, multipliers) stays transformers' own, and other mixers of the process are not touched.

With a cache, a sequence is scanned in float and its last state is stored; then each token decodes from the stored
state. Without one (or inside :func:`recurrent_evaluation`) the state is stored after every token, because a float scan
of the whole sequence never meets the quantized state and would make it look free.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, get_args

import torch
from llmcompress_kernels import state as kernels
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from llmcompress.algorithms.gated_delta import DeltaInputs
from llmcompress.algorithms.selective_scan import ScanInputs, scan
from llmcompress.errors import InputError
from llmcompress.nn import delta_rule
from llmcompress.nn.decode_step import DecodeStep
from llmcompress.nn.scan_override import forward_with
from llmcompress.nn.states import PackedState, StateQuantizer, adopt
from llmcompress.quant.states import BITS, CODECS, DITHERED, SCALE, Rounding, StateSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.models.layout import ModelLayout, ScanView

RUNTIME = "_llmcompress_states"
FUNCTIONS = {
    "mamba2": ("mamba2_chunk_scan", "mamba2_selective_state_update"),
    "mamba1": ("mamba_selective_scan", "mamba_selective_state_update"),
    "delta": delta_rule.FUNCTIONS,
    "kda": delta_rule.KIMI,
}


class StateRuntime:
    """How the states of a model are treated right now; shared by its mixers.

    Attributes:
        packed: Caches keep packed codes, otherwise the same values in float.
        recurrent: Store the state after every token even where a cache is filled.
        prompt: Tokens of the prompt when states are stored after every token: the state is first rounded after the
            last of them, and time steps are limited among them as in a prefill. 1 treats all tokens alike; int64
            ``[S]`` gives each sequence its own.
        resting: Keep all states in float, as if nothing were attached.
        inspect: Called with ``(layer, scan inputs)`` of every simulated sequence, for measurements.
        observe: Called with ``(layer, fresh state [S, H, P, N], token)`` of every stored state, for statistics.
        quantizers: How each mixer's states are stored, by its name.
    """

    def __init__(self) -> None:
        self.packed = True
        self.recurrent = False
        self.prompt: int | Tensor = 1
        self.resting = False
        self.inspect: Callable[[int, ScanInputs | DeltaInputs], None] | None = None
        self.observe: Callable[[int, Tensor, int], None] | None = None
        self.quantizers: dict[str, StateQuantizer] = {}


def runtime_of(model: nn.Module) -> StateRuntime | None:
    """The model's runtime, None when its states are not quantized."""
    found: StateRuntime | None = getattr(model, RUNTIME, None)
    return found


@contextmanager
def recurrent_evaluation(model: nn.Module, prompt: int | Tensor = 1) -> Iterator[None]:
    """Inside, every pass stores the state after every token, as decoding does; no effect on models without states.

    Args:
        model: Loaded or assembled by this package.
        prompt: See :class:`StateRuntime`; evaluation of continuations leaves the states of the context in float.
    """
    runtime = runtime_of(model)
    if runtime is None:
        yield
        return
    before = runtime.recurrent, runtime.prompt
    runtime.recurrent, runtime.prompt = True, prompt
    try:
        yield
    finally:
        runtime.recurrent, runtime.prompt = before


@contextmanager
def float_states(model: nn.Module) -> Iterator[None]:
    """Inside, states are not quantized."""
    runtime = runtime_of(model)
    if runtime is None:
        yield
        return
    runtime.resting = True
    try:
        yield
    finally:
        runtime.resting = False


def register_scales(model: nn.Module, layout: ModelLayout, policy: Mapping[str, Any]) -> None:
    """Give each mixer the buffer of its calibrated scale, where the codec has one; called before weights are read."""
    axis = {"dsq_static_p": "channels", "dsq_t": "states"}.get(spec_of(policy).codec)
    if axis is None:
        return
    for name, view in scans(layout):
        mixer = model.get_submodule(name)
        device = mixer.get_parameter("conv1d.weight").device
        shape = (view.heads, view.channels if axis == "channels" else view.states)
        mixer.register_buffer(SCALE, torch.empty(shape, dtype=torch.float16, device=device))


def scans(layout: ModelLayout) -> Iterator[tuple[str, ScanView]]:
    """Name and view of every mixer."""
    for block in layout.blocks:
        if block.scan is not None:
            yield block.scan.module, block.scan


def attach(model: PreTrainedModel, layout: ModelLayout, policy: Mapping[str, Any]) -> StateRuntime:
    """Quantize the states of a model from now on.

    Args:
        model: Model of this layout; calibrated scales are in place.
        layout: Its layout.
        policy: ``bits``, ``codec``, ``alpha``, ``sqrt_axis``, ``rounding``, ``seed``, ``refits``, ``window`` and
            ``head_bits`` (mixer name → widths), as in ``quantization_config``.

    Raises:
        InputError: The model has no states, or the installed transformers has other mixers.
    """
    spec = spec_of(policy)
    runtime = StateRuntime()
    found = list(scans(layout))
    if not found:
        raise InputError(f"{layout.model_type} has no state-space layers whose states could be quantized")
    widths = _heads(policy, found)
    for name, view in found:
        mixer = model.get_submodule(name)
        bits = torch.tensor(widths[name]) if name in widths else None
        static = mixer._buffers.get(SCALE)
        layer = int(mixer.layer_idx)  # type: ignore[arg-type]
        quantizer = StateQuantizer(spec, view, layer, static, bits, int(policy.get("window", 1)))
        runtime.quantizers[name] = quantizer
        Mixer(mixer, quantizer, runtime).install()
    setattr(model, RUNTIME, runtime)
    return runtime


_WORDS: dict[str, Callable[[Any], bool]] = {
    "bits": lambda v: v in (*BITS, 16),
    "codec": lambda v: v in CODECS,
    "alpha": lambda v: isinstance(v, int | float) and 0 <= v < 1,
    "sqrt_axis": lambda v: v in ("channel", "state"),
    "rounding": lambda v: v in get_args(Rounding),
    "seed": lambda v: isinstance(v, int),
    "refits": lambda v: isinstance(v, int) and v > 0,
    "window": lambda v: isinstance(v, int) and v > 0,
}


def spec_of(policy: Mapping[str, Any]) -> StateSpec:
    """The codec part of a saved policy.

    Raises:
        InputError: It holds words or values that this version does not know.
    """
    wrong = [word for word in policy if word not in (*_WORDS, "head_bits", "measured")]
    wrong += [f"{word}: {policy[word]!r}" for word, fits in _WORDS.items() if word in policy and not fits(policy[word])]
    if policy.get("rounding") == "dither" and policy.get("codec", "dsq") not in DITHERED:
        wrong.append(f"rounding: dither with codec {policy.get('codec')}")
    if wrong:
        raise InputError(
            f"quantization_config.policies.state_cache: not understood: {', '.join(wrong)}",
            "the model was saved by a newer version (upgrade llmcompress) or was damaged (export it again)",
        )
    return StateSpec.of(policy)


def _heads(policy: Mapping[str, Any], found: list[tuple[str, ScanView]]) -> Mapping[str, list[int]]:
    """Widths per head of a saved policy.

    Raises:
        InputError: They do not fit the model.
    """
    widths: Mapping[str, list[int]] = policy.get("head_bits") or {}
    sizes = {name: view.heads for name, view in found}
    for name, row in widths.items():
        if len(row) != sizes.get(name) or any(bits not in BITS for bits in row):
            raise InputError(
                f"quantization_config.policies.state_cache.head_bits: {name} does not fit this model",
                "export the model again",
            )
    return widths


def attach_mixer(mixer: nn.Module, view: ScanView, runtime: StateRuntime) -> None:
    """Attach one mixer with float states, to look into its scan."""
    Mixer(mixer, StateQuantizer(StateSpec(16, "none"), view, int(mixer.layer_idx)), runtime).install()  # type: ignore[arg-type]


def detach(model: PreTrainedModel, layout: ModelLayout) -> None:
    """Undo :func:`attach`."""
    for name, _ in scans(layout):
        model.get_submodule(name).__dict__.pop("forward", None)
    if hasattr(model, RUNTIME):
        delattr(model, RUNTIME)


class Mixer:
    """One mixer's two functions and the forward that uses them."""

    def __init__(self, mixer: nn.Module, quantizer: StateQuantizer, runtime: StateRuntime) -> None:
        self.mixer, self.quantizer, self.runtime = mixer, quantizer, runtime
        self.view = quantizer.scan
        # per forward pass
        self.held: PackedState | None = None
        self.cached = False

    def install(self) -> None:
        """Replace the mixer's forward."""
        names = FUNCTIONS[self.view.kind]
        forward = forward_with(self.mixer, dict(zip(names, self._functions())))
        # transformers' function over a sequence
        self.whole = inspect.unwrap(type(self.mixer).forward).__globals__[names[0]]
        quantized, one = self, None if self.view.rule else DecodeStep(self.mixer)

        def wrapped(mixer: nn.Module, hidden_states: Tensor, cache: Any = None, *args: Any, **kw: Any) -> Tensor:
            cache = kw.pop("cache_params", cache)  # its name in transformers before 5.24
            if quantized.runtime.resting:
                plain: Tensor = type(mixer).forward(mixer, hidden_states, cache, *args, **kw)  # type: ignore[operator]
                return plain
            quantized.begin(cache, hidden_states.shape[1])
            if one is not None:
                if one.fits(hidden_states, cache, quantized.held, (*args, kw.get("attention_mask"))):
                    assert quantized.held is not None
                    return one(hidden_states, cache, quantized.held)
                rest = (*args, kw.get("attention_mask"), quantized.runtime.inspect, quantized.runtime.observe)
                if not quantized.simulates and one.fits_prompt(hidden_states, cache, quantized.quantizer, rest):
                    return one.prompt(hidden_states, cache, quantized.held, quantized.view)
            result: Tensor = forward(mixer, hidden_states, cache, *args, **kw)
            quantized.held = None
            return result

        self.mixer.forward = MethodType(wrapped, self.mixer)

    def _functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What takes the place of the two, over a sequence and for a token."""
        if self.view.rule:
            rule = delta_rule.DeltaRule(self)
            return rule.over_sequence, rule.one_token
        return (self.chunk_scan, self.head_update) if self.view.kind == "mamba2" else (self.scan1, self.update1)

    def begin(self, cache: Any, tokens: int) -> None:
        """Adopt the cache's layer, remember the state that this pass starts from."""
        self.cached, self.held = cache is not None, None
        if cache is not None:
            self.held = adopt(cache.layers[self.quantizer.layer], self.quantizer, self.runtime.packed, tokens)

    @property
    def simulates(self) -> bool:
        """Whether a sequence is scanned with a state that is stored after every token."""
        return self.runtime.recurrent or not self.cached

    def chunk_scan(  # noqa: PLR0913, PLR0917 - the signature is transformers'
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Any = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``mamba2_chunk_scan`` of transformers: ``x [S, T, H, P]``, ``dt [S, T, H]``, ``B, C [S, T, G, N]``."""
        a = A.float()[:, None, None]
        state = None if self.held is None else self.held.load(a)
        native = self.quantizer.has_kernel and hidden_states.device.type == "cpu" and not torch.is_grad_enabled()
        if not self.simulates and not native:
            return self.whole(
                hidden_states, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, initial_states=state,
                dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=return_final_states, **kwargs,
            )  # fmt: skip
        dt = _time_steps(dt, dt_bias, dt_softplus)
        # transformers limits dt over a sequence but not in decoding
        limited = dt.clamp(dt_limit[0], dt_limit[1])
        if self.simulates:
            limited = torch.where(self._prompted(dt.shape[1], dt.device)[..., None], limited, dt)
        dt = limited
        inputs = ScanInputs(hidden_states.float(), dt.float().unsqueeze(-1), a, B.float(), C.float())
        if self.runtime.inspect is not None:
            self.runtime.inspect(self.quantizer.layer, inputs)
        output, state = self._scanned(inputs, state)
        if D is not None:
            output = output + D[:, None] * inputs.x
        output = output.to(hidden_states.dtype)
        return (output, state) if return_final_states else output

    def _scanned(self, inputs: ScanInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The recurrence with a stored state, by a kernel where there is one for this codec and size."""
        quantizer, prompt = self.quantizer, self.runtime.prompt
        # a prefill is scanned in float; its last state is stored by the cache
        prompt = prompt if self.simulates else inputs.x.shape[1] + 1
        if not quantizer.has_kernel or self.runtime.observe is not None or isinstance(prompt, Tensor):
            return scan(inputs, state, self.store)
        x, view = inputs.x, self.view
        if state is None:
            state = x.new_zeros(x.shape[0], view.heads, view.channels, view.states)
        bits = torch.full((view.heads,), quantizer.spec.bits) if quantizer.head_bits is None else quantizer.head_bits
        decay = (inputs.dt[..., 0] * inputs.a[:, 0, 0]).exp()
        widths = bits.to(x.device, torch.int32)
        return kernels.selective_scan_q(
            inputs.dt * x, decay, inputs.b, inputs.c, state, widths, quantizer.static, prompt, quantizer.window,
            quantizer.spec.refit, quantizer.spec.dither,
        )  # fmt: skip

    def head_update(  # noqa: PLR0913, PLR0917 - the signature is transformers'
        self,
        state: PackedState,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """``mamba2_selective_state_update``: ``x, dt [S, H, P]``, ``A [H, P, N]`` expanded, ``B, C [S, G, N]``."""
        dt = _time_steps(dt[..., :1], None if dt_bias is None else dt_bias[:, :1], dt_softplus)
        output = state.decode(hidden_states, dt.float(), A[:, :1, :1].float(), B, C)
        return _finished(output, hidden_states, D, z)

    def scan1(  # noqa: PLR0913, PLR0917 - the signature is transformers'
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``mamba_selective_scan``: ``x, dt, z [S, D, T]``, ``A [D, N]``, ``B, C [S, N, T]``.

        transformers' own starts from zeros even when a cache holds a state; this one does not.
        """
        if not self.simulates and self.held is None:
            return self.whole(
                hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
                return_last_state=return_last_state, **kwargs,
            )  # fmt: skip
        view = self.view
        dt = _time_steps(dt.transpose(1, 2), delta_bias, delta_softplus)
        a = A.float().view(view.heads, view.channels, view.states)
        inputs = ScanInputs(
            hidden_states.float().transpose(1, 2).unflatten(-1, (view.heads, view.channels)),
            dt.float().unflatten(-1, (view.heads, view.channels)),
            a,
            B.float().transpose(1, 2).unsqueeze(2),
            C.float().transpose(1, 2).unsqueeze(2),
        )
        state = None if self.held is None else self.held.load(a)
        if self.runtime.inspect is not None:
            self.runtime.inspect(self.quantizer.layer, inputs)
        rows, state = scan(inputs, state, self.store if self.simulates else None)
        output = _finished(rows.flatten(2).transpose(1, 2), hidden_states, None if D is None else D[:, None], z)
        return (output, state.flatten(1, 2)) if return_last_state else output

    def update1(  # noqa: PLR0913, PLR0917 - the signature is transformers'
        self,
        state: PackedState,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """``mamba_selective_state_update``: ``x, dt, z [S, D]``, ``A [D, N]``, ``B, C [S, N]``."""
        heads = (self.view.heads, self.view.channels)
        dt = _time_steps(dt, dt_bias, dt_softplus).float().unflatten(-1, heads)
        a = A.float().view(*heads, self.view.states)
        output = state.decode(hidden_states.unflatten(-1, heads), dt, a, B.unsqueeze(1), C.unsqueeze(1)).flatten(1)
        return _finished(output, hidden_states, D, z)

    def store(self, fresh: Tensor, token: int) -> Tensor:
        """What the state of token ``token`` of a sequence becomes by being stored."""
        if self.runtime.observe is not None:
            self.runtime.observe(self.quantizer.layer, fresh, token)
        since = token + 1 - self.runtime.prompt
        if isinstance(since, int):
            return self.quantizer.fake(fresh, token) if since >= 0 and self.quantizer.due(since) else fresh
        due = (since >= 0) & (since % self.quantizer.window == 0)
        if not bool(due.any()):
            return fresh
        return torch.where(due.to(fresh.device)[:, None, None, None], self.quantizer.fake(fresh, token), fresh)

    def _prompted(self, tokens: int, device: torch.device) -> Tensor:
        """Which tokens belong to the prompt, bool ``[1 or S, T]``."""
        position = torch.arange(tokens, device=device)[None]
        prompt = self.runtime.prompt
        return position < (prompt if isinstance(prompt, int) else prompt.to(device)[:, None])


def _finished(output: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """``(output + D x) silu(z)`` in fp32, then in the type of ``x``; D broadcast over ``x``."""
    if D is not None:
        output = output + x.float() * D.float()
    if z is not None:
        output = output * silu(z.float())
    return output.to(x.dtype)


def _time_steps(dt: Tensor, bias: Tensor | None, positive: bool) -> Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return softplus(dt) if positive else dt

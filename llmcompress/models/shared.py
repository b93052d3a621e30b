"""Modules that several blocks of a model run with the same weights.

transformers builds a copy in every such block and ties its parameters to the first one's. Packed weights cannot be tied
that way, and blocks that come and go would lose the tie; so the copies are replaced by stand-ins that call the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.models.layout import ModelLayout


class Borrowed(nn.Module):
    """Calls a module that belongs to another block; has no weights of its own.

    Args:
        owner: The module.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        # not registered, so that its weights have one name
        self.__dict__["owner"] = owner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.__dict__["owner"](*args, **kwargs)


def share_modules(model: PreTrainedModel, layout: ModelLayout) -> None:
    """Replace copies by stand-ins, in place; nothing happens in models without them. Harmless when repeated.

    Args:
        model: A transformers model of this layout, before or after its weights are read.
        layout: Its layout.
    """
    loans = [block.loan for block in layout.blocks if block.loan is not None]
    for loan in loans:
        place, _, key = loan.module.rpartition(".")
        setattr(model.get_submodule(place), key, Borrowed(model.get_submodule(loan.owner)))
    if not loans:
        return
    # transformers would look for the copies' parameters to tie them
    gone = tuple(f"{loan.module}." for loan in loans)
    body: Any = model.base_model
    owners: list[tuple[Any, str]] = [(model, ""), (body, f"{model.base_model_prefix}.")]
    for owner, prefix in owners:
        whole: dict[str, str] = owner.all_tied_weights_keys
        owner.all_tied_weights_keys = {k: v for k, v in whole.items() if not f"{prefix}{k}".startswith(gone)}
        rules: dict[str, str] = owner._tied_weights_keys or {}
        owner._tied_weights_keys = {k: v for k, v in rules.items() if not f"{prefix}{k}.".startswith(gone)}

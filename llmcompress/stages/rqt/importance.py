"""How much an error in one weight of one member counts when bits are given out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llmcompress.durable import write_durably

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmcompress.data.calibration import CalibrationSet
    from llmcompress.models.family import ModelFamily
    from llmcompress.stages.rqt.stage import RqtConfig
    from llmcompress.stages.state import RunContext

# what the loss of a member feels of each of its weights: member → weight → nats a token
Felt = dict[str, dict[str, float]]


def felt_by_loss(
    config: RqtConfig, family: ModelFamily, calibration: Mapping[str, CalibrationSet], ctx: RunContext
) -> Felt:
    """Sensitivities of every member, each kept in ``importance/<member>.json`` once it is known.

    Empty where bits are not chosen by error, where their choice does not ask the loss, or where there is no text.

    Raises:
        InputError: Gradients of a member are not finite.
    """
    # once bits are chosen nothing is asked any more
    if not config.asks_loss or (ctx.stage_dir / "plan.json").exists():
        return {}
    from llmcompress.models.loss_sensitivity import loss_sensitivity

    folder = ctx.stage_dir / "importance"
    folder.mkdir(parents=True, exist_ok=True)
    found: Felt = {}
    for name, handle in family.members.items():
        path = folder / f"{name}.json"
        if not path.exists():
            measured = loss_sensitivity(handle, calibration[name].tokens, ctx.device, ctx.dtype, ctx.seed)
            write_durably(path, json.dumps(measured, sort_keys=True).encode())
            ctx.emit("note", text=f"{name}: gradients of {len(measured)} weights")
        found[name] = json.loads(path.read_text())
    return found

"""The ``quantization_config`` of a native artifact: every weight's spec, and the policies. Torch-free.

Names are transformers' run-time names. A spec is written once and referred to by its index.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from llmcompress.errors import InputError
from llmcompress.quant.spec import QuantPlan, QuantSpec

METHOD = "llmcompress"
VERSION = 1

# run-time policies by name (``pesf``, ``state_cache`` …) → their settings, as saved
Policies = Mapping[str, Mapping[str, Any]]


def to_json(plan: QuantPlan, policies: Policies) -> dict[str, Any]:
    """Describe a plan and policies as JSON data; equal inputs give equal output, whatever their order."""
    # every field counts: specs that compare equal would keep the order of a set, which each process has its own
    key = attrgetter("codec", "bits", "group_size", "symmetric", "dense_rows")
    specs = sorted(set(plan.values()), key=key)
    number = {spec: index for index, spec in enumerate(specs)}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "specs": [spec.to_dict() for spec in specs],
        "modules": {name: number[spec] for name, spec in sorted(plan.items())},
        "policies": {name: dict(policy) for name, policy in sorted(policies.items())},
    }


def from_json(data: Mapping[str, Any]) -> tuple[QuantPlan, dict[str, dict[str, Any]]]:
    """Inverse of :func:`to_json`.

    Raises:
        InputError: Another method, a newer version, or malformed content.
    """
    method, version = data.get("quant_method"), data.get("version")
    if method != METHOD:
        raise InputError(f"quantization_config: quant_method is {method!r}, not {METHOD!r}")
    if not isinstance(version, int) or version > VERSION:
        raise InputError(
            f"quantization_config: version {version!r}; this release reads up to {VERSION}",
            "pip install --upgrade llmcompress",
        )
    try:
        specs = [QuantSpec.from_dict(spec) for spec in data["specs"]]
        plan = {str(name): specs[index] for name, index in data["modules"].items()}
        policies = {str(name): dict(policy) for name, policy in (data.get("policies") or {}).items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"quantization_config: malformed: {error}", "export the model again") from error
    return plan, policies

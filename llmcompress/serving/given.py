"""Objects of a request's body."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Given(BaseModel):
    """An object of a body, in which null is as good as nothing: clients write out what they do not set."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, found: Any) -> Any:
        return {name: value for name, value in found.items() if value is not None} if isinstance(found, dict) else found

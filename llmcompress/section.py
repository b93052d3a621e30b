"""The base of a recipe's sections, wherever they are defined."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change, docstrings of fields become the schema's."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

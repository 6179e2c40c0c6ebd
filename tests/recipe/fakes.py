"""Two small methods and a good recipe, so that these tests know nothing of the shipped methods."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from peftctl.errors import RecipeError
from peftctl.recipe.loader import MethodSchema, read_recipe
from peftctl.recipe.schema import Positive, Recipe, Section


class LoraConfig(Section):
    """The `method:` section of a fake low-rank method."""

    name: Literal["lora"] = "lora"
    r: Positive = 8
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] | None = None
    """Suffixes or a pattern."""
    warm: Positive | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Steps, or a share of the run."""
    scope: Literal["auto"] | Positive = "auto"
    start: str | None = "zero"
    """A default that is not null, so that null says something."""
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _dropout_needs_targets(self) -> "LoraConfig":
        if self.dropout == 0.9 and self.target_modules is None:
            raise ValueError("dropout 0.9 needs target_modules")
        return self


class PromptConfig(Section):
    """The `method:` section of a fake prompt method."""

    name: str
    tokens: Positive


METHODS = {
    "lora": MethodSchema(LoraConfig),
    "prompt": MethodSchema(
        PromptConfig,
        defaults={"train.learning_rate": 0.3, "train.warmup_ratio": 0.06, "data.max_length": 256},
        unread=frozenset({"train.weight_decay", "eval"}),
    ),
}

GOOD = """\
# a comment
model:
  name_or_path: org/tiny
method:
  name: lora
  r: 4
data:
  train: rows.jsonl
train:
  output_dir: runs/x
  learning_rate: 2e-4
"""


def write(folder: Path, text: str | bytes, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(text: str, *overrides: str) -> Recipe:
    """Read a recipe from the working directory under the name x.yaml."""
    write(Path(), text)
    return read_recipe("x.yaml", overrides, METHODS)


def problems(text: str, *overrides: str) -> list[str]:
    """Return the problems of a recipe, one a line."""
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return [str(problem) for problem in caught.value.problems]

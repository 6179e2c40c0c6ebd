"""NeFT: Let's Focus on Neuron: Neuron-Level Supervised Fine-tuning, Xu et al. 2024 (https://arxiv.org/abs/2403.11621).

    c_j = cos(w_j, w'_j)          w_j: row j of a weight of the base, w'_j: of the same model after full fine-tuning
    the x % of all rows of the chosen layers with the lowest c_j train, from the base

A neuron is a row of a linear layer's weight, one output. Two stages: `sft` trains all rows of the chosen layers; then
all begins anew and `main` trains the neurons that have turned most. A row that only became longer has c = 1 and is not
chosen: there FAR, which measures distances, differs. Rows that were equal have c = 1, also where they are zero; the
cosine of a zero row with any other is 0. Cosines are taken in float64: those of a short fine-tuning lie near 1.

The first stage may have been another run: `scores_from` names a finished run of `full`, whose rows are read one matrix
at a time. `select: random` is the paper's baseline: as many rows, drawn by `train.seed`.

(not verified: which layers the paper chooses, that it ranks all together, that biases stay, and how long it trains)

The first stage needs the memory of full fine-tuning: NeFT saves nothing but the size of what is stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from peftctl.errors import ArtifactError, RunError, UsageError
from peftctl.methods import base
from peftctl.methods._rows import Layer, RowMethod, highest, linear_layers
from peftctl.methods._shares import RunShare, exact, spread, two_stages
from peftctl.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Config(base.MethodConfig):
    """The `method:` section of NeFT."""

    name: Literal["neft"] = "neft"
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.06
    """x: share of the rows of all chosen layers that train."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers whose rows train: name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`."""
    select: Literal["cosine", "random"] = "cosine"
    """Which rows train: those whose direction full fine-tuning changes most, or random ones, the paper's baseline."""
    sft: RunShare = 0.33
    """Share of the run's steps that the first stage gets, one step at least."""
    scores_from: str | None = None
    """A finished run of `full` on the same base, or its model directory, in place of the first stage."""

    @model_validator(mode="after")
    def _random_rows_have_no_scores(self) -> Config:
        if self.select == "random" and self.scores_from is not None:
            raise ValueError("scores_from: random rows have no scores; remove it, or take select: cosine")
        return self


class Method(RowMethod):
    """The rows that full fine-tuning turns most."""

    Config = Config
    card = base.Card(
        title="NeFT",
        paper="Xu et al. 2024, arXiv 2403.11621",
        category="selective",
        summary="Full fine-tuning finds the rows of the weights that it turns most; from the base, only they train.",
        trains="a change of the chosen rows of the linear layers' weights; a classifier's head",
        count="Σ over the chosen rows of d_in, plus the head; announced for round(x * rows) rows dealt evenly to the "
        "layers, since which ones they are is found out",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs="The first stage needs the memory of full fine-tuning, unless `scores_from` names a run that was one.",
        supports=frozenset({"gradient_checkpointing", "resume"}),
    )

    def stages(self, recipe: Recipe) -> Sequence[base.Stage]:
        """Return full fine-tuning, where it is not done yet, and the run itself."""
        if not self._tunes:
            return (base.Stage(),)
        return two_stages(recipe, "sft", self.config.sft, "sft")

    def notices(self, model: PreTrainedModel) -> Sequence[str]:
        """Say what the first stage trains, or find its result."""
        layers = self._layers(model)
        if self.config.scores_from is not None:
            Tuned(self.config.scores_from).check({name: layer.module for name, layer in layers.items()})
        if not self._tunes:
            return ()
        tuned, share = sum(layer.size * layer.parameters for layer in layers.values()), f"{self.config.sft:.0%}"
        return [f"neft: {tuned:,} parameters train in the first {share} of the run, as in full fine-tuning"]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach changes of the first rows of each layer."""
        if self.config.scores_from is not None:
            Tuned(self.config.scores_from).refuse_other_base(context.recipe.model.name_or_path)
        return super().apply(model, context)

    def calibrate(self, model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Choose the rows where the run has no first stage."""
        import torch

        if self._tunes:
            return
        if self.config.scores_from is None:
            draw = torch.Generator().manual_seed(self._seed)
            self._choose(model, {name: torch.rand(size, generator=draw) for name, size in self._sizes.items()})
            return
        self._take_all(model)
        self._choose(model, turned(model, Tuned(self.config.scores_from)))

    def enter(self, model: Any, stage: base.Stage, batches: base.Batches) -> None:
        """Let all rows train; before the main stage choose, and begin anew from the base."""
        from peftctl.tuners.row_delta import begin_anew

        if stage.name == "sft":
            self._take_all(model)
        elif self._tunes:
            self._choose(model, turned(model))
            begin_anew(model)

    @property
    def _tunes(self) -> bool:
        return self.config.select == "cosine" and self.config.scores_from is None

    def _choose(self, model: Any, scores: Mapping[str, torch.Tensor]) -> None:
        from peftctl.backends import processes
        from peftctl.tuners.row_delta import place

        place(model, processes.from_first(highest(scores, self._kept(sum(self._sizes.values())))))

    def _layers(self, model: PreTrainedModel) -> dict[str, Layer]:
        chosen = linear_layers(model, self.config.target_modules, self.config.name)
        return {name: Layer(module) for name, module in chosen.items()}

    def _counts(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        sizes = {name: layer.size for name, layer in layers.items()}
        shares = spread(self._kept(sum(sizes.values())), sizes)
        return {name: k for name, k in shares.items() if k}

    def _kept(self, rows: int) -> int:
        kept = round(exact(self.config.ratio) * rows)
        if not kept:
            raise UsageError(f"method.ratio: {self.config.ratio} of {rows:,} rows is none; raise it")
        return kept


def turned(model: Any, tuned: Tuned | None = None) -> dict[str, torch.Tensor]:
    """Return name of a layer -> 1 - c of its rows, (d_out,) float64, on the CPU.

    Args:
        model: With all rows of every layer.
        tuned: Where the weights after full fine-tuning lie; left out, they are W and its change.

    Raises:
        RunError: No row has turned.
    """
    import torch

    from peftctl.tuners.row_delta import layers

    scores = {}
    for name, layer in layers(model):
        rows = layer.lines(layer.weight.detach()).cpu().double()
        if tuned is None:
            after = rows + layer.delta_weight["default"].detach().cpu().double()
        else:
            after = layer.lines(tuned.weight(name)).double()
        scores[name] = 1 - cosines(rows, after)
    if not any(torch.any(score > 0) for score in scores.values()):
        raise RunError("neft: full fine-tuning has changed no row; raise train.learning_rate or method.sft")
    return scores


def cosines(rows: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the cosine of every row with what became of it: 1 of equal ones, 0 of a zero row with another.

    Args:
        rows: (d_out, d_in), float64.
        after: Likewise.
    """
    lengths = rows.norm(dim=1) * after.norm(dim=1)
    cosine = (rows * after).sum(dim=1) / lengths.where(lengths > 0, lengths.new_ones(()))
    return cosine.masked_fill((rows == after).all(dim=1), 1.0)


class Tuned:
    """The weights of a finished run of `full`, read one at a time.

    Args:
        target: The run directory, or the model directory in it.

    Raises:
        UsageError: There is no model.
    """

    def __init__(self, target: str):
        self.target, path = target, Path(target).expanduser()
        self.folder = path / "model" if (path / "model").is_dir() else path
        self.files = sorted(self.folder.glob("*.safetensors"))
        if not (self.folder / "config.json").is_file() or not self.files:
            raise UsageError(
                f"method.scores_from: {target} holds no model with its weights; give a finished run of full"
            )

    def refuse_other_base(self, base_name: str) -> None:
        """Raise where the run says that it began from another base.

        Raises:
            UsageError: It does.
        """
        manifest = self.folder / "peftctl.json"
        if not manifest.is_file():
            return
        name = json.loads(manifest.read_text(encoding="utf-8"))["base"]["name"]
        if name != base_name and name.rsplit("/", 1)[-1] != base_name.rstrip("/").rsplit("/", 1)[-1]:
            raise UsageError(f"method.scores_from: {self.target} began from {name}, this recipe from {base_name}")

    def check(self, modules: Mapping[str, Any]) -> None:
        """Raise where the weight of a layer is missing or of another shape; only the files' heads are read.

        Raises:
            UsageError: One is.
        """
        places = self._places
        for name, module in modules.items():
            shape = tuple(module.weight.shape)
            if f"{name}.weight" not in places:
                raise UsageError(f"method.scores_from: {self.target} has no {name}.weight; give a run of the same base")
            with self._open(places[f"{name}.weight"]) as tensors:
                found = tuple(tensors.get_slice(f"{name}.weight").get_shape())
            if found != shape:
                raise UsageError(
                    f"method.scores_from: {name}.weight of {self.target} is {found}, expected {shape}; give a run of "
                    "the same base"
                )

    def weight(self, name: str) -> torch.Tensor:
        """Return the weight of a layer, as it is stored."""
        with self._open(self._places[f"{name}.weight"]) as tensors:
            return tensors.get_tensor(f"{name}.weight")

    @property
    def _places(self) -> dict[str, Path]:
        places: dict[str, Path] = {}
        for file in self.files:
            with self._open(file) as tensors:
                places |= dict.fromkeys(tensors.keys(), file)
        return places

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: is damaged or cut off ({error})") from error

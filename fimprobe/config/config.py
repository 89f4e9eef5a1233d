"""Configuration: keywords and YAML, one set of names, all mistakes reported at once."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fimprobe.config.error_messages import format_validation_errors
from fimprobe.config.yaml_source import YamlFile, read_yaml
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import LIKELIHOODS, get_likelihood
from fimprobe.training.schedule import At, Budget, Every, Schedule


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class ScheduleConfig(_Section):
    """Exactly one of the three."""

    budget: float | None = Field(None, gt=0, lt=1, description="share of wall time")
    every: int | None = Field(None, ge=1, description="optimizer steps between probes")
    at: list[int] | None = Field(None, description="optimizer steps to probe at")

    @model_validator(mode="after")
    def _one(self) -> ScheduleConfig:
        given = [k for k in ("budget", "every", "at") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of budget, every, at (got {given or 'none'})")
        return self

    def build(self) -> Schedule:
        """A fresh schedule."""
        if self.every is not None:
            return Every(self.every)
        if self.at is not None:
            return At(self.at)
        assert self.budget is not None
        return Budget(self.budget)


class LayersConfig(_Section):
    """Which layers get TensorBoard charts of their own; all are in the JSONL file."""

    include: list[str] = Field(["*"], description="shell patterns of layer names")
    exclude: list[str] = Field([], description="shell patterns of layer names")
    top: int = Field(12, ge=0, description="layers charted, those that need most draws first")


class SecondOrderConfig(_Section):
    """Random probes for Î₂'s second derivatives."""

    probes: int = Field(2, ge=2, description="probes; the noise they add falls as 1/sqrt(probes)")


class TensorboardConfig(_Section):
    """Where the run is written."""

    log_dir: str | None = Field(None, description="default runs/fimprobe/<time>_<host>")
    histograms: bool = Field(True, description="errors and sizes over all parameters")
    figures: bool = Field(True, description="pictures at reports 4, 8, 16, ... (matplotlib)")


class Config(_Section):
    """All options of :func:`fimprobe.attach`, each optional.

    >>> Config(draws=4).schedule.budget
    0.02
    """

    schedule: ScheduleConfig = ScheduleConfig(budget=0.02)
    likelihood: Any = Field("auto", description="auto, " + ", ".join(sorted(LIKELIHOODS)))
    estimators: list[Literal["i1", "i2", "ih", "empirical"]] = Field(
        ["i1", "i2"], min_length=1, description="i1 is always measured"
    )
    draws: int | Literal["auto", "exact"] = Field(
        2, description="labels for each input, or exact, or auto (exact where that is cheap)"
    )
    label_sampling: Literal["size_biased", "model"] = Field(
        "size_biased",
        description="where drawn labels come from: where the score is large (weighted back), or the "
        "model",
    )
    batch: int = Field(32, ge=1, description="inputs probed, drawn from the captured batch")
    second_order: SecondOrderConfig | Literal["exact", "off"] = Field(
        SecondOrderConfig(probes=2), description="how Î₂ is had: probes, exact (BackPACK) or off"
    )
    bounds: bool = Field(True, description="bounds, covariance norms, hidden layers")
    engine: Literal["auto", "autograd", "backpack"] = "auto"
    memory_mb: float = Field(512, gt=0, description="ceiling of the probe's working memory")
    layers: LayersConfig = LayersConfig()
    tensorboard: TensorboardConfig | Literal[False] = TensorboardConfig()
    jsonl: str | Literal[False] | None = Field(None, description="default <log_dir>/fimprobe.jsonl")
    on_error: Literal["warn", "raise"] = "warn"
    seed: int = 0

    @field_validator("estimators", mode="before")
    @classmethod
    def _listed(cls, estimators: Any) -> Any:
        """As :func:`fimprobe.measure` takes them: one name, or a tuple too."""
        if isinstance(estimators, (tuple, set, frozenset)):
            return list(estimators)
        return [estimators] if isinstance(estimators, str) else estimators

    @field_validator("likelihood")
    @classmethod
    def _known(cls, likelihood: Any) -> Any:
        if likelihood != "auto":
            try:
                get_likelihood(likelihood)
            except FimprobeError as error:
                near = difflib.get_close_matches(str(likelihood).lower(), ["auto", *LIKELIHOODS], 1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{error}{meant}") from None
        return likelihood

    @field_validator("draws")
    @classmethod
    def _number_of_labels(cls, draws: int | str) -> int | str:
        if isinstance(draws, int) and draws < 1:
            raise ValueError("this is no number of labels; use 1, 2, ..., exact or auto")
        return draws


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the YAML file; ``config.schema.json`` in the package holds it."""
    return Config.model_json_schema()


ALLOWED_VALUES = {
    "schedule": "{budget: 0.02} (a share of the wall time), {every: 100} or {at: [0, 10, 100]} "
    "(steps)",
    "schedule.budget": "a share above 0 and below 1, such as 0.02",
    "schedule.every": "a whole number of steps from 1",
    "schedule.at": "a list of steps, such as [0, 10, 100]",
    "likelihood": "auto, " + ", ".join(sorted(LIKELIHOODS)),
    "estimators": "one or several of i1, i2, ih, empirical, such as [i1, i2]",
    "draws": "a whole number of labels from 1, exact or auto",
    "label_sampling": "size_biased or model",
    "batch": "a whole number of inputs from 1",
    "second_order": "{probes: 2} (random probes), exact or off",
    "second_order.probes": "a whole number of probes from 2",
    "bounds": "true or false",
    "engine": "auto, autograd or backpack",
    "memory_mb": "a number of megabytes above 0",
    "layers": "{include: ['*'], exclude: [], top: 12} or some of these keys",
    "layers.include": "a list of patterns of layer names, such as ['encoder.*']",
    "layers.exclude": "a list of patterns of layer names, such as ['encoder.*']",
    "layers.top": "a whole number of layers from 0",
    "tensorboard": "{log_dir: ..., histograms: ..., figures: ...} or some of these keys, or false; "
    "without the key it is on",
    "tensorboard.log_dir": "a path, or null for runs/fimprobe/<time>_<host>",
    "tensorboard.histograms": "true or false",
    "tensorboard.figures": "true or false",
    "jsonl": "a path, false, or null for <log_dir>/fimprobe.jsonl",
    "on_error": "warn or raise",
    "seed": "a whole number",
}
"""What messages say that each option takes."""

SECTIONS: dict[str, type[BaseModel]] = {
    "": Config,
    "schedule": ScheduleConfig,
    "layers": LayersConfig,
    "second_order": SecondOrderConfig,
    "tensorboard": TensorboardConfig,
}
"""The mappings that a file holds, by the key they stand under."""


def load_config(config: str | Path | Mapping[str, Any] | Config | None, **options: Any) -> Config:
    """A configuration from a YAML path, a mapping or keywords; keywords win.

    Raises :class:`FimprobeError` with every mistake, each with file and line where there is one.
    """
    file = YamlFile({}, {}, [])
    if config is None:
        values: dict[str, Any] = {}
    elif isinstance(config, Config):
        values = {name: getattr(config, name) for name in config.model_fields_set}
    elif isinstance(config, Mapping):
        values = dict(config)
    elif isinstance(config, (str, Path)):
        file = read_yaml(Path(config))
        values = file.values
    else:
        raise FimprobeError(
            f"config={config!r} is no configuration; pass a YAML path, a mapping or fimprobe.Config"
        )
    values = {str(key): value for key, value in values.items()} | options
    lines = {place: line for place, line in file.lines.items() if place[0] not in options}
    mistakes = list(file.duplicates)
    try:
        made = Config(**values)
    except ValidationError as error:
        keys = {name: section.model_fields for name, section in SECTIONS.items()}
        mistakes += format_validation_errors(
            error.errors(), allowed=ALLOWED_VALUES, keys=keys, lines=lines
        )
    if mistakes:
        raise FimprobeError("\n".join(sorted(mistakes, key=_line)))
    return made


def _line(mistake: str) -> int:
    """The number in ``file:line: ...``; those without one come last."""
    found = re.match(r"[^\n]*?:(\d+): ", mistake)
    return int(found[1]) if found else sys.maxsize

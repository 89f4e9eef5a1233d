"""Configuration: keywords and YAML, one set of names, all mistakes reported at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fimprobe.likelihoods import LIKELIHOODS, get_likelihood
from fimprobe.schedule import At, Budget, Every, Schedule
from fimprobe.types import FimprobeError


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
    draws: int | Literal["exact"] = Field(2, description="labels for each input, or exact")
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
                raise ValueError(str(error)) from None
        return likelihood

    @field_validator("draws")
    @classmethod
    def _number_of_labels(cls, draws: int | str) -> int | str:
        if isinstance(draws, int) and draws < 1:
            raise ValueError("this is no number of labels; use 1, 2, ... or exact")
        return draws


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the YAML file; ``config.schema.json`` in the package holds it."""
    return Config.model_json_schema()


def load_config(config: str | Path | Mapping[str, Any] | Config | None, **options: Any) -> Config:
    """A configuration from a YAML path, a mapping or keywords; keywords win.

    Raises :class:`FimprobeError` with every mistake, each with file and line where there is one.
    """
    where: dict[tuple[Any, ...], str] = {}
    if config is None:
        values: dict[str, Any] = {}
    elif isinstance(config, Config):
        values = {name: getattr(config, name) for name in config.model_fields_set}
    elif isinstance(config, Mapping):
        values = dict(config)
    elif isinstance(config, (str, Path)):
        values, where = _read_yaml(Path(config))
    else:
        raise FimprobeError(
            f"config={config!r} is no configuration; pass a YAML path, a mapping or fimprobe.Config"
        )
    values |= options
    try:
        return Config(**values)
    except ValidationError as error:
        raise FimprobeError(_explain(error, where)) from None


def _explain(error: ValidationError, where: dict[tuple[Any, ...], str]) -> str:
    lines, seen = [], set()
    for problem in error.errors():
        branch = _is_tag(problem["loc"][-1]) if problem["loc"] else False
        if branch and problem["type"] == "literal_error" and isinstance(problem["input"], dict):
            continue  # a mapping was meant: what is wrong inside of it says more
        loc = tuple(part for part in problem["loc"] if part in ("",) or not _is_tag(part))
        name = ".".join(map(str, loc))
        if problem["type"] == "extra_forbidden":
            known = _keys(loc[:-1])
            near = difflib.get_close_matches(str(loc[-1]), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            text = f"unknown key {name!r}; {hint}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = problem.get("input")
            text = (
                f"{name}={shown!r}: {message}"
                if name and not isinstance(shown, dict)
                else (f"{name}: {message}" if name else message)
            )
        mark = next((where[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in where), "")
        line = f"{mark}: {text}" if mark else text
        if line not in seen:
            seen.add(line)
            lines.append(line)
    return "\n".join(lines)


def _is_tag(part: Any) -> bool:
    """Pydantic names the branches of a union inside a location."""
    return isinstance(part, str) and (
        part in ("int", "float", "str", "bool", "none")
        or part.startswith("literal[")
        or part[:1].isupper()
    )


def _keys(loc: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    sections = {
        "schedule": ScheduleConfig,
        "layers": LayersConfig,
        "second_order": SecondOrderConfig,
        "tensorboard": TensorboardConfig,
    }
    if loc and loc[0] in sections:
        model = sections[loc[0]]
    return list(model.model_fields)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-3 is a number; only true and false are booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[Any, ...], str]]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FimprobeError(f"config={str(path)!r} cannot be read: {error}") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise FimprobeError(
                f"{path}:1: the file is empty; write at least one key, such as draws: 2"
            )
        where: dict[tuple[Any, ...], str] = {}
        mistakes: list[str] = []
        _mark(node, (), path, where, mistakes)
        values = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or error
        raise FimprobeError(f"{path}:{line}: not YAML: {problem}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise FimprobeError(
            f"{path}:{node.start_mark.line + 1}: the file holds {values!r}; write keys and values, "
            "such as draws: 2"
        )
    if mistakes:
        try:
            Config(**{str(k): v for k, v in values.items()})
        except ValidationError as error:
            mistakes += _explain(error, where).splitlines()
        raise FimprobeError("\n".join(mistakes))
    return values, where


def _mark(
    node: yaml.Node,
    at: tuple[Any, ...],
    path: Path,
    where: dict[tuple[Any, ...], str],
    mistakes: list[str],
) -> None:
    """Remember the line of every key, and find keys given twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*at, key.value)
            line = f"{path}:{key.start_mark.line + 1}"
            if place in where:
                mistakes.append(f"{line}: key {'.'.join(map(str, place))!r} is given twice")
            where[place] = line
            _mark(value, place, path, where, mistakes)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            place = (*at, i)
            where[place] = f"{path}:{value.start_mark.line + 1}"
            _mark(value, place, path, where, mistakes)

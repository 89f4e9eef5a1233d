"""The options of ``attach``, ``measure`` and YAML files: one model, validated in one place."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator

from fimprobe.config.error_messages import format_validation_errors
from fimprobe.config.option import Option, OptionDescription
from fimprobe.config.sections import (
    SWITCH,
    LayersConfig,
    PathText,
    ScheduleConfig,
    SecondOrderConfig,
    Section,
    TensorboardConfig,
)
from fimprobe.config.yaml_source import YamlFile, read_yaml, shorten
from fimprobe.errors import FimprobeError
from fimprobe.estimators.names import KEYS, EstimatorKey
from fimprobe.likelihoods import LIKELIHOODS, get_likelihood

MAX_MISTAKES = 50
"""Mistakes that are listed; each entry of a long list may be one."""

MAX_DRAWS = 10**6
"""Labels per input: their error falls as 1/√draws, and more are closer to a typing mistake."""

MAX_MEMORY_MB = 10**9
"""A petabyte, in MB: above the memory of any machine, and its bytes still fit an integer."""

JSONL_NAME = "fimprobe.jsonl"
"""Name of the JSONL file in the folder of a run."""


class Config(Section):
    """All options of :func:`fimprobe.attach`, each optional.

    >>> Config(draws=4).schedule.budget
    0.02
    """

    schedule: Annotated[
        ScheduleConfig,
        Option(
            must_be="a mapping with one of the keys budget, every and at",
            remedy="Use {budget: 0.02}, {every: 100} or {at: [0, 10, 100]}.",
        ),
    ] = Field(ScheduleConfig(budget=0.02), description="when to measure")
    likelihood: Annotated[
        Any,
        Option(
            must_be=", ".join(map(repr, ("auto", *sorted(LIKELIHOODS))))
            + ", a likelihood object, or a list or mapping with the family of each head",
            remedy="Use 'categorical' for a softmax over classes.",
        ),
    ] = Field("auto", description="distribution of labels; 'auto' infers it from model or loss")
    estimators: Annotated[
        list[EstimatorKey],
        Option(
            must_be=f"a list of at least one of {', '.join(map(repr, KEYS))}",
            remedy="Use ['i1', 'i2'] to measure both estimators of the paper.",
        ),
    ] = Field(
        ["i1", "i2"], min_length=1, description="estimators to measure; 'i1' is always measured"
    )
    draws: Annotated[
        Annotated[int, Field(ge=1, le=MAX_DRAWS)] | Literal["exact", "auto"],
        Option(
            must_be="a positive integer, 'exact' or 'auto'",
            remedy="Use 2 to estimate the label variance.",
        ),
    ] = Field(
        2,
        description=f"labels per input, at most {MAX_DRAWS}; 'exact' integrates over labels, "
        "'auto' up to 10 passes",
    )
    label_sampling: Annotated[
        Literal["size_biased", "model"],
        Option(
            must_be="'size_biased' or 'model'",
            remedy="Use 'size_biased' to see rare labels at any confidence of the model.",
        ),
    ] = Field(
        "size_biased",
        description="distribution that labels are drawn from: in proportion to the size of the "
        "score and weighted back, or the model",
    )
    batch: Annotated[
        int,
        Option(must_be="a positive integer", remedy="Use 32 to measure 32 inputs of each batch."),
    ] = Field(32, ge=1, description="inputs that are measured, drawn from the training batch")
    second_order: Annotated[
        SecondOrderConfig | Literal["auto", "spot_checks", "exact", "off"],
        Option(
            must_be="'auto', {probes: 2}, 'spot_checks', 'exact' or 'off'",
            remedy="Use 'auto', which works for every model.",
        ),
    ] = Field(
        "auto",
        description="how Î₂ is computed: 'auto' chooses, random probes, spot checks of its label "
        "variance, BackPACK, or not at all",
    )
    bounds: Annotated[bool, SWITCH] = Field(
        True,
        description="measure bounds, covariance norms and hidden layers; Soen & Sun (2021), "
        "eq. 17 to 22",
    )
    engine: Annotated[
        Literal["auto", "autograd", "backpack"],
        Option(
            must_be="'auto', 'autograd' or 'backpack'",
            remedy="Use 'auto', which works for every model.",
        ),
    ] = Field("auto", description="what computes the moments of Î₁; 'auto' is 'autograd'")
    memory_mb: Annotated[
        float,
        Option(
            must_be="a finite number of megabytes above 0",
            remedy="Use 512, or more where memory allows.",
        ),
    ] = Field(
        512,
        gt=0,
        le=MAX_MEMORY_MB,
        allow_inf_nan=False,
        description="ceiling of the probe's working memory; larger batches are measured in chunks",
    )
    layers: Annotated[
        LayersConfig,
        Option(
            must_be="a mapping with some of the keys include, exclude and top",
            remedy="Use {top: 12} to chart the first twelve layers.",
        ),
    ] = Field(
        LayersConfig(),
        description="layers with TensorBoard charts of their own; the JSONL file holds all",
    )
    tensorboard: Annotated[
        TensorboardConfig | Literal[False],
        Option(
            must_be="false or a mapping with some of the keys log_dir, histograms and figures",
            remedy="Leave the option out to write everything to the default folder.",
        ),
    ] = Field(TensorboardConfig(), description="what is written for TensorBoard")
    jsonl: Annotated[
        PathText | Literal[False] | None,
        Option(must_be="a path, false or null", remedy="Use null for the default file."),
    ] = Field(None, description="JSONL file; null is fimprobe.jsonl in log_dir")
    wandb: Annotated[bool, SWITCH] = Field(
        False, description="log the numbers of the model to W&B: to its active run, or a new one"
    )
    mlflow: Annotated[bool, SWITCH] = Field(
        False,
        description="log the numbers of the model to MLflow: to its active run, or a new one",
    )
    on_error: Annotated[
        Literal["warn", "raise"],
        Option(must_be="'warn' or 'raise'", remedy="Use 'warn' to let training continue."),
    ] = Field("warn", description="log errors by the logger `fimprobe`, or raise them")
    seed: Annotated[
        int,
        Option(must_be="a 64-bit integer", remedy="Use 0."),
    ] = Field(
        0,
        ge=-(2**63),
        lt=2**63,
        description="random seed of labels and probes; training's random streams are not touched",
    )

    def with_log_dir(self, log_dir: str | Path) -> Config:
        """Return the options with the folder of the files; other keys of ``tensorboard`` stay.

        Without TensorBoard the folder holds the JSONL file alone.
        """
        if self.tensorboard is False:
            jsonl = str(Path(log_dir, JSONL_NAME)) if self.jsonl is None else self.jsonl
            return load_config(self, jsonl=jsonl)
        charts = self.tensorboard.model_dump()
        return load_config(self, tensorboard={**charts, "log_dir": str(log_dir)})

    @field_validator("estimators", mode="before")
    @classmethod
    def _as_list(cls, estimators: Any) -> Any:
        """Accept a single name and every collection, such as a tuple or a set."""
        if isinstance(estimators, str):
            return [estimators]
        is_collection = isinstance(estimators, Collection) and not isinstance(estimators, Mapping)
        return list(estimators) if is_collection else estimators

    @field_validator("second_order", mode="before")
    @classmethod
    def _as_dict(cls, second_order: Any) -> Any:
        """Accept every mapping, such as the read-only default of :func:`fimprobe.measure`."""
        return dict(second_order) if isinstance(second_order, Mapping) else second_order

    @field_validator("likelihood")
    @classmethod
    def _is_known(cls, likelihood: Any) -> Any:
        if isinstance(likelihood, str) and likelihood == "auto":
            return likelihood
        try:
            get_likelihood(likelihood)
        except FimprobeError as error:
            given = likelihood.lower() if isinstance(likelihood, str) else ""
            similar = difflib.get_close_matches(given, ["auto", *LIKELIHOODS], 1)
            hint = f" Did you mean {similar[0]!r}?" if similar else ""
            raise ValueError(f"{str(error).rstrip('.')}.{hint}") from None
        return likelihood


def describe_options(
    model: type[BaseModel] = Config, prefix: str = ""
) -> dict[str, OptionDescription]:
    """Return the description of every option, sections and their keys, by dotted name.

    Error messages, ``docs/configuration.md`` and the tests read options here only.

    Args:
        model: The pydantic model whose fields are the options.
        prefix: Start of the dotted names, such as "schedule."; empty at the top.

    Returns:
        The descriptions by name; the keys of a section follow the section itself.

    >>> describe_options()["schedule.every"].must_be
    'a positive integer'
    """
    described: dict[str, OptionDescription] = {}
    for key, field in model.model_fields.items():
        name = prefix + key
        (words,) = [item for item in field.metadata if isinstance(item, Option)]
        default = field.get_default(call_default_factory=True)
        section = _section_of(field.annotation, default)
        described[name] = OptionDescription(
            name=name,
            must_be=words.must_be,
            remedy=words.remedy,
            effect=field.description or "",
            default=_without_unused_keys(default) if isinstance(default, BaseModel) else default,
        )
        if section is not None:
            described |= describe_options(section, f"{name}.")
    return described


def _section_of(annotation: Any, default: Any) -> type[BaseModel] | None:
    """The section that an option is or may be; None for other options."""
    if isinstance(default, BaseModel):
        return type(default)
    sections = [t for t in get_args(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
    return sections[0] if sections else None


def _without_unused_keys(section: BaseModel) -> dict[str, Any]:
    """A section as plain values; of a schedule only the key that is in use, as there may be one."""
    return section.model_dump(exclude_none=isinstance(section, ScheduleConfig))


def load_config(config: str | Path | Mapping[str, Any] | Config | None, **options: Any) -> Config:
    """Return the configuration from a YAML path, a mapping or keywords; keywords win.

    Args:
        config: Path of a YAML file, a mapping, a :class:`Config`, or None for the defaults.
        options: Fields of :class:`Config`.

    Raises:
        FimprobeError: With every mistake, each with file and line if it is in a file.
    """
    file = YamlFile(values={}, lines={}, duplicates=[])
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
            f"`config` must be a YAML path, a mapping or a fimprobe.Config, got {shorten(config)}. "
            "Pass 'fimprobe.yaml', or options as keywords."
        )
    values = {str(key): value for key, value in values.items()} | options
    # a keyword replaces the file's value, so that its mistakes are not on a line of the file
    lines = {place: line for place, line in file.lines.items() if place[0] not in options}
    mistakes = list(file.duplicates)
    try:
        loaded = Config(**values)
    except ValidationError as error:
        mistakes += format_validation_errors(error.errors(), options=describe_options(), lines=lines)
    if mistakes:
        mistakes.sort(key=_line_number)
        more = len(mistakes) - MAX_MISTAKES
        rest = [f"and {more} more mistakes."] if more > 0 else []
        raise FimprobeError("\n".join(mistakes[:MAX_MISTAKES] + rest))
    return loaded


def _line_number(mistake: str) -> int:
    """The number in ``file:line: ...``; mistakes without one are sorted to the end."""
    match = re.match(r"[^\n]*?:(\d+): ", mistake)
    return int(match[1]) if match else sys.maxsize

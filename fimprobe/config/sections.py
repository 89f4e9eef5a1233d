"""The sections of the options: mappings with keys of their own."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fimprobe.config.option import Option
from fimprobe.training.schedule import FREE_SECONDS, At, Budget, Every, Schedule

MAX_PROBES = 10**4
"""Random probes: each costs a pass, and their noise is below 1 % of that of a single one."""

PathText = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""A path: no file system has null characters in names."""


class Section(BaseModel):
    """A mapping of options whose keys and types are checked."""

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class ScheduleConfig(Section):
    """When to measure: exactly one of the three keys."""

    budget: Annotated[
        float | None,
        Option(
            must_be="a number above 0 and below 1",
            remedy="Use 0.02 to spend 2 % of the wall time.",
        ),
    ] = Field(
        None,
        gt=0,
        lt=1,
        description="share of the wall time that the probe may take, besides "
        f"{FREE_SECONDS:g} seconds of reports at the steps 1, 2, 5, 10, 20, 50, ...",
    )
    every: Annotated[
        int | None,
        Option(
            must_be="a positive integer",
            remedy="Use 100 to measure at every 100th optimizer step.",
        ),
    ] = Field(None, ge=1, description="measure at every n-th optimizer step")
    at: Annotated[
        list[Annotated[int, Field(ge=0)]] | None,
        Option(
            must_be="a list of at least one step, each an integer of at least 0",
            remedy="Use [0, 10, 100] to measure at these optimizer steps.",
        ),
    ] = Field(None, min_length=1, description="measure at these optimizer steps, counted from 0")

    @model_validator(mode="after")
    def _has_one_key(self) -> ScheduleConfig:
        given = [k for k in ("budget", "every", "at") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                "`schedule` must have exactly one of the keys budget, every and at, got "
                f"{' and '.join(given) or 'none'}. Use {{budget: 0.02}} for 2 % of the wall time."
            )
        return self

    def build(self) -> Schedule:
        """Return a new schedule."""
        if self.every is not None:
            return Every(self.every)
        if self.at is not None:
            return At(self.at)
        assert self.budget is not None
        return Budget(self.budget)


_PATTERNS = Option(
    must_be="a list of shell patterns",
    remedy="Use ['encoder.*'] for all layers below `encoder`.",
)


class LayersConfig(Section):
    """Selection of the layers that TensorBoard shows; the JSONL file holds all layers."""

    include: Annotated[list[str], _PATTERNS] = Field(
        ["*"], description="names of layers that may have charts"
    )
    exclude: Annotated[list[str], _PATTERNS] = Field([], description="names of layers that have none")
    top: Annotated[
        int,
        Option(must_be="an integer of at least 0", remedy="Use 12 to chart the first twelve layers."),
    ] = Field(
        0,
        ge=0,
        description="number of layers with charts of their own, those that need most pairs first; "
        "pictures and histograms show all",
    )


class SecondOrderConfig(Section):
    """Random probes for the second derivatives of Î₂."""

    probes: Annotated[
        int,
        Option(
            must_be="an integer of at least 2",
            remedy="Use 2 probes or more: the square of a single probe is biased.",
        ),
    ] = Field(
        2,
        ge=2,
        le=MAX_PROBES,
        description=f"number of random probes, at most {MAX_PROBES}; their noise falls as 1/√probes",
    )


SWITCH = Option(must_be="true or false", remedy="Use one of the two.")
"""The words of an option that is on or off."""


class TensorboardConfig(Section):
    """The content and the folder of the files for TensorBoard."""

    log_dir: Annotated[
        PathText | None,
        Option(must_be="a path or null", remedy="Use 'runs/mine', or null for the default folder."),
    ] = Field(None, description="folder of the run; null is runs/fimprobe/TIME_HOST")
    histograms: Annotated[bool, SWITCH] = Field(
        True, description="errors and sizes over all parameters"
    )
    figures: Annotated[bool, SWITCH] = Field(
        True, description="figures at reports 4, 8, 16, ..., with the extra `plots`"
    )

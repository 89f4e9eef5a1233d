"""Where a run's numbers come from: what was measured, with which settings, by what, on what."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import torch
from torch import nn

from fimprobe._version import __version__
from fimprobe.config.config import Config
from fimprobe.likelihoods.base import Likelihood
from fimprobe.model.twin import trainable, unwrap

OUTPUT_OPTIONS = ("tensorboard", "jsonl", "layers", "on_error")
"""Options that change no number."""


def collect_run_info(
    model: nn.Module,
    config: Config,
    *,
    likelihood: Likelihood | None,
    decision: str,
    processes: int = 1,
) -> dict[str, Any]:
    """Plain values (JSON) that a run's record starts with; ``config`` is whole, defaults included."""
    inner = unwrap(model)
    first = next(iter(trainable(model).values()))
    device = str(first.device)
    if first.is_cuda:
        device += f" ({torch.cuda.get_device_name(first.device)})"
    return {
        "fimprobe": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "began": datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": type(inner).__name__,
        "parameters": sum(p.numel() for p in inner.parameters()),
        "trainable": sum(p.numel() for p in trainable(model).values()),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": device,
        "processes": processes,
        "likelihood": re.sub(r"(, )?name='\w*'|\(name='\w*'\)", "", str(likelihood)),
        "decision": decision,
        "config": config.model_dump(mode="json", fallback=str),
    }


def format_run_info(run: Mapping[str, Any]) -> dict[str, str]:
    """The same in words, by what it is about; empty of a record that holds none (an old file)."""
    if not run:
        return {}
    processes = f", {run['processes']} processes" if run["processes"] > 1 else ""
    frozen = run["parameters"] - run["trainable"]
    found = {
        "Model": f"{run['model']}, {run['trainable']:,} trainable parameters ({run['dtype']})"
        + (f", {frozen:,} frozen" if frozen else ""),
        "Likelihood": f"{run['likelihood']} ({run['decision']})",
        "Settings": format_settings(run["config"]),
        "Measured by": f"fimprobe {run['fimprobe']}, torch {run['torch']}, Python {run['python']}",
        "On": f"{run['device']}{processes}, from {run['began']}",
    }
    return {name: text for name, text in found.items() if text}


def format_settings(config: Mapping[str, Any]) -> str:
    """What was set otherwise than by default, of the options that change a number."""
    default = Config().model_dump(mode="json", fallback=str)
    found = [
        f"{name} {_plain(value)}"
        for name, value in config.items()
        if name not in OUTPUT_OPTIONS and name != "likelihood" and value != default.get(name)
    ]
    return ", ".join(found) or "the defaults"


def differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """How two runs' records differ: model, settings, versions, device; nothing of old files."""
    if not a or not b:
        return []
    found = []
    names = {"model": "model", "dtype": "numbers", "device": "device", "processes": "processes"}
    names |= {"fimprobe": "fimprobe", "torch": "torch", "decision": "likelihood decided by"}
    for name, what in names.items():
        if a[name] != b[name]:
            found.append(f"{what}: A {a[name]}, B {b[name]}")
    one, other = a["config"], b["config"]
    for name in dict.fromkeys([*one, *other]):
        if name not in OUTPUT_OPTIONS and one.get(name) != other.get(name):
            found.append(f"{name}: A {_plain(one.get(name))}, B {_plain(other.get(name))}")
    return found


def _plain(value: Any) -> str:
    """A setting as one line of YAML; keys that are not set are left out."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k}: {_plain(v)}" for k, v in value.items() if v is not None)
        return f"{{{inner}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)

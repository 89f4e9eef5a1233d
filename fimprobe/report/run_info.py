"""The origin of a run's numbers: model, settings, versions and device."""

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

OUTPUT_OPTIONS = ("tensorboard", "jsonl", "wandb", "mlflow", "layers", "on_error")
"""Options that do not change a number."""


def collect_run_info(
    model: nn.Module,
    config: Config,
    *,
    likelihood: Likelihood | None,
    decision: str,
    processes: int = 1,
) -> dict[str, Any]:
    """Return the information on a run as plain values, which JSON can hold.

    Args:
        model: The model in training.
        config: The configuration, with its defaults.
        likelihood: The likelihood.
        decision: How the likelihood was decided.
        processes: Number of processes that measure together.
    """
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
    """Return the information on a run in words, by subject; empty for an old file without it."""
    if not run:
        return {}
    processes = f", {run['processes']} processes" if run["processes"] > 1 else ""
    frozen = run["parameters"] - run["trainable"]
    texts = {
        "Model": f"{run['model']}, {run['trainable']:,} trainable parameters ({run['dtype']})"
        + (f", {frozen:,} frozen" if frozen else ""),
        "Likelihood": f"{run['likelihood']} ({run['decision']})",
        "Settings": format_settings(run["config"]),
        "Measured by": f"fimprobe {run['fimprobe']}, torch {run['torch']}, Python {run['python']}",
        "On": f"{run['device']}{processes}, from {run['began']}",
    }
    return {name: text for name, text in texts.items() if text}


def format_settings(config: Mapping[str, Any]) -> str:
    """Return the settings that differ from the defaults, of the options that change a number."""
    default = Config().model_dump(mode="json", fallback=str)
    settings = [
        f"{name} {_plain(value)}"
        for name, value in config.items()
        if name not in OUTPUT_OPTIONS and name != "likelihood" and value != default.get(name)
    ]
    return ", ".join(settings) or "the defaults"


def differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return how the information on two runs differs: model, settings, versions, device.

    Args:
        a: The information on run A; empty for an old file.
        b: The information on run B.

    Returns:
        A line for each difference; empty where one of the runs has no information.
    """
    if not a or not b:
        return []
    lines = []
    names = {"model": "model", "dtype": "numbers", "device": "device", "processes": "processes"}
    names |= {"fimprobe": "fimprobe", "torch": "torch", "decision": "likelihood decided by"}
    for name, subject in names.items():
        if a[name] != b[name]:
            lines.append(f"{subject}: A {a[name]}, B {b[name]}")
    config_a, config_b = a["config"], b["config"]
    for name in dict.fromkeys([*config_a, *config_b]):
        value_a, value_b = config_a.get(name), config_b.get(name)
        if name not in OUTPUT_OPTIONS and value_a != value_b:
            lines.append(f"{name}: A {_plain(value_a)}, B {_plain(value_b)}")
    return lines


def _plain(value: Any) -> str:
    """Return a setting as one line of YAML without the keys that are not set."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k}: {_plain(v)}" for k, v in value.items() if v is not None)
        return f"{{{inner}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)

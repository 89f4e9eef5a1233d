"""Mutated configurations and records, and wrong calls: one sentence for each, and nothing raw."""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fimprobe
from fimprobe.cli.commands import main
from fimprobe.sinks.jsonl import JsonlSink
from tests.faults.outcome import Outcome
from tests.faults.training import Training, messages, mlp

YAML = """\
schedule: {every: 50}
likelihood: auto
draws: 2
estimators: [i1, i2]
second_order: {probes: 2}
layers:
  top: 8
  include: ["*"]
tensorboard:
  log_dir: runs/mine
memory_mb: 512
seed: 3
"""

PIECES = ["{", "}", "[", "]", ":", " :", "&a ", "*a", "!!python/object ", "!!binary ", "|", ">", "\t", "\x00", "-1", "1e400",
          ".nan", "~", "true", "\n", "\n\n  ", "'", '"', "%", "@", "`", "é", "\ufeff", "9" * 400, "2001-01-01", "<<: ", "? "]  # fmt: skip


def mutate(text: str, source: random.Random) -> str:
    """The text with one to four places changed."""
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(text) + 1)
        cut = source.choice([0, 1, 1, 3, 20])
        text = text[:place] + source.choice([*PIECES, ""]) + text[place + cut :]
    return text


VALUES = [None, True, 0, -1, 3, 2**70, 1e300, -0.5, float("nan"), float("inf"), "", "text", "[red]", "1e400", [], {}, [1, "x"],
          {"a": {}}, [[[]]], "\x1b[2J", "\ud800"]  # fmt: skip


def mutate_values(text: str, source: random.Random) -> str:
    """The lines with one to four values replaced, dropped or moved to another name."""
    records = [json.loads(line) for line in text.splitlines()]
    for _ in range(source.randint(1, 4)):
        parent: Any = records
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            key = source.choice(keys)
            child = parent[key]
            if not (isinstance(child, (dict, list)) and child and source.random() < 0.8):
                break
            parent = child
        change = source.choice(["replace", "replace", "drop", "move"])
        value = parent.pop(key) if change != "replace" and len(parent) > 1 else None
        if change == "move" and isinstance(parent, dict):
            parent[source.choice(["", "step", "total", "i1", "layers", "x" * 300])] = value
        elif change == "replace":
            parent[key] = source.choice(VALUES)
    return "".join(json.dumps(record) + "\n" for record in records)


def mutated_yaml(times: int = 300) -> Outcome:
    """Mutated YAML files: a configuration, or one sentence that names the file."""
    outcome, source = Outcome("mutated YAML file"), random.Random(4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.yaml"
        for number in range(times):
            path.write_bytes(mutate(YAML, source).encode("utf-8", "surrogatepass"))
            faults, told = [], True
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    fimprobe.load_config(path)
            except fimprobe.FimprobeError as error:
                told = "f.yaml" in str(error)
                if not told:
                    faults.append(f"the file is not named: {error}")
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")
            outcome.count(f"file {number}", faults, told=told and not faults)
    return outcome


def mutated_records(times: int = 300) -> Outcome:
    """Mutated JSONL files: read, shown, compared, resumed; a value or one sentence of each.

    Every tenth is drawn as a page, which takes 50 times as long as the rest.
    """
    outcome, source = Outcome("mutated record"), random.Random(5)
    with tempfile.TemporaryDirectory() as name, messages():
        good, path = Path(name) / "good", Path(name) / "mutated" / "fimprobe.jsonl"
        training = Training(mlp)
        training.attach(good)
        training.train()
        training.probe.detach()
        text = (good / "fimprobe.jsonl").read_text()
        path.parent.mkdir()
        page = ["--html", f"{name}/page.html"]
        ways: dict[str, Callable[[], object]] = {
            "read": lambda: list(fimprobe.read(path)),
            "show": lambda: main(["show", str(path)]),
            "show two": lambda: main(["show", str(good), str(path.parent)]),
            "show --html": lambda: main(["show", str(path), *page]),
            "resume": lambda: JsonlSink(path, purge_step=2).close(),
        }
        for number in range(times):
            change = mutate_values if number % 2 else mutate
            path.write_bytes(change(text, source).encode("utf-8", "surrogatepass"))
            chosen = {w: do for w, do in ways.items() if number % 10 == 0 or w != "show --html"}
            faults = [f"{way}: {fault}" for way, do in chosen.items() for fault in _faults_of(do)]
            outcome.count(f"record {number}", faults, told=not faults)
    return outcome


def _faults_of(action: Callable[[], object]) -> list[str]:
    """What reaches the user, other than a value or one sentence."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        try:
            action()
        except fimprobe.FimprobeError as error:
            print(error, file=errors)
        except BaseException as error:
            return [f"{type(error).__name__}: {error}"]
    return ["a traceback"] if "Traceback" in errors.getvalue() else []


WRONG: dict[str, list[Any]] = {
    "likelihood": [None, 3, "softmax", "", [], {}, object(), nn.Linear(1, 1), fimprobe.likelihoods.Categorical],
    "draws": [0, -1, 1.5, "many", None, 10**12, float("nan"), [2], True],
    "label_sampling": ["", "biased", None, 3],
    "estimators": [[], "i1", ["i3"], [None], 3, None, ["i1", ["i2"]], {"i1": 1}],
    "second_order": ["on", {"probes": 1}, {"probes": -2}, {"probes": "2"}, {"draws": 2}, 5, None, {"probes": 10**12}],
    "bounds": ["yes", 2, None, []],
    "engine": ["jax", None, 1, ""],
    "memory_mb": [0, -5, "much", None, float("nan"), [], 1e-9],
    "seed": [-1, 1.5, "one", None, 2**70, []],
    "labels": [3, "no", torch.zeros(2), torch.full((6,), 9), [0] * 6, torch.zeros(6, 2, 2)],
    "mask": [3, "no", torch.zeros(2, dtype=torch.bool), torch.zeros(6), [True] * 6],
    "output": [3, "logits", lambda out: None, lambda out: out.sum(), lambda out: 1 / 0, lambda out: out[:2]],
    "step": [-1, 1.5, "first", None],
    "diagonals": ["yes", 3, None],
    "plan": [3, "plan", {}],
    "ranks": [3, "two", []],
    "inputs": [None, 3, "text", [], {}, torch.zeros(0, 4), torch.zeros(6, 5), torch.zeros(6), torch.tensor(1.0),
               torch.full((6, 4), float("nan")), torch.zeros(6, 4, dtype=torch.long), torch.zeros(6, 4).to_sparse(),
               torch.zeros(6, 4, device="meta"), (torch.zeros(6, 4), torch.zeros(5, 4)), {"x": torch.zeros(6, 4)}],
    "model": [None, 3, "net", nn.Linear, lambda x: x, nn.Sequential(), nn.ReLU(), mlp().requires_grad_(False),
              nn.LazyLinear(3), nn.Linear(4, 3, device="meta")],
}  # fmt: skip

WRONG_OF_ATTACH: dict[str, list[Any]] = {
    "schedule": [3, "daily", {"every": 0}, {"every": -1}, {"every": "2"}, {"at": [-1]}, {"at": "1"}, {"budget": 2},
                 {"budget": 0}, {"every": 1, "budget": 0.1}, {"never": 1}, []],
    "likelihood": [3, "softmax", [], object()],
    "batch": [0, -1, "all", 1.5],
    "layers": [3, {"top": -1}, {"include": 3}, {"exclude": [1]}, {"bottom": 2}],
    "tensorboard": [3, "runs", {"figures": "no"}, {"log_dir": 3}, {"dir": "x"}],
    "jsonl": [3, [], {}],
    "on_error": ["ignore", 3, None],
    "optimizer": [3, "sgd", torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)],
    "mask": [3, "mask", torch.zeros(3)],
    "output": [3, "logits"],
    "sinks": [3, "jsonl", [3], [object()]],
    "first_step": [-1, "one", 1.5],
    "config": [3, "missing.yaml", [], {"drawz": 2}],
    "drawz": [2],
}  # fmt: skip


def wrong_calls() -> Outcome:
    """Wrong calls of ``measure`` and ``attach``: a FimprobeError that names the argument."""
    outcome = Outcome("wrong call")
    right = {"model": mlp(), "inputs": torch.randn(6, 4), "likelihood": "categorical"}

    def measure(**arguments: Any) -> None:
        fimprobe.measure(arguments.pop("model"), arguments.pop("inputs"), **arguments)

    def attach(**arguments: Any) -> None:
        probe = fimprobe.attach(mlp(), **{"tensorboard": False, **arguments})
        probe.detach()

    for call, wrong, base in ((measure, WRONG, right), (attach, WRONG_OF_ATTACH, {})):
        for name, values in wrong.items():
            for value in values:
                given = repr(value).replace("\n", " ")[:60]
                arguments = {**base, name: value}
                if name == "labels":
                    arguments["estimators"] = ["i1", "empirical"]
                _count_call(outcome, call, f"{call.__name__}({name}={given})", arguments)
    return outcome


def _count_call(
    outcome: Outcome, call: Callable[..., None], name: str, arguments: dict[str, Any]
) -> None:
    faults = []
    try:
        with warnings.catch_warnings(), messages():
            warnings.simplefilter("ignore")
            call(**arguments)
    except fimprobe.FimprobeError as error:
        if "\n" in str(error) and "Traceback" in str(error):
            faults.append("a traceback in the message")
    except Exception as error:
        faults.append(f"{type(error).__name__}: {str(error).splitlines()[:1]}")
    # a value without a meaning of its own may be taken, as None for a default
    outcome.count(name, faults, told=not faults)

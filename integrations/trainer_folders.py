"""Where the files of a Trainer's run are, and how a training that resumes finds them."""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime
from pathlib import Path

from fimprobe.torchvision_compat import hide_broken_torchvision

hide_broken_torchvision()  # before transformers imports torchvision

from transformers import Trainer, TrainerState, TrainingArguments  # noqa: E402
from transformers.integrations import TensorBoardCallback  # noqa: E402

CHECKPOINT_NOTE = "fimprobe.json"
"""File in a checkpoint with the folder of the reports, for a training that resumes from it."""


def choose_folder(
    args: TrainingArguments,
    state: TrainerState,
    trainer: Trainer | None,
    checkpoint: str | None,
    configured: str | Path | None,
) -> Path:
    """Return the folder of this training's files, which holds no reports of another training.

    Args:
        args: Arguments of the Trainer.
        state: State of the Trainer; its step is 0 for a new training.
        trainer: The Trainer, if it was found.
        checkpoint: The checkpoint from which the training resumes, if it was named.
        configured: The folder that the user asked for; None to follow the Trainer.
    """
    resumed = state.global_step > 0
    if configured:
        folder = Path(configured)
    else:
        source = Path(checkpoint) if checkpoint else checkpoint_folder(args, state)
        noted = _noted_folder(source) if resumed else None
        folder = noted or _tensorboard_run(args, trainer) / "fimprobe"
    if resumed:
        return folder
    empty, number = folder, 1
    while any(empty.glob("*tfevents*")):
        number += 1
        empty = folder.with_name(f"{folder.name}-{number}")
    return empty


def note_folder(checkpoint: Path, log_dir: Path) -> None:
    """Write the folder of the reports into a checkpoint, relative to it."""
    note = json.dumps({"log_dir": os.path.relpath(log_dir, checkpoint)})
    (checkpoint / CHECKPOINT_NOTE).write_text(note + "\n")


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint that the Trainer writes at its present step."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _tensorboard_run(args: TrainingArguments, trainer: Trainer | None) -> Path:
    """Return the folder of the Trainer's TensorBoard run, or its default if there is none."""
    for callback in trainer.callback_handler.callbacks if trainer is not None else ():
        if isinstance(callback, TensorBoardCallback):
            writer = callback.tb_writer  # torch's has a log_dir, tensorboardX's a logdir
            folder = getattr(writer, "log_dir", None) or getattr(writer, "logdir", None)
            folder = folder or callback.logging_dir
            if folder:
                return Path(folder)
    assert args.output_dir is not None
    default = Path(args.output_dir, "runs", f"{datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}")
    return Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or default).expanduser()


def _noted_folder(checkpoint: Path) -> Path | None:
    """Return the folder of the training that wrote a checkpoint, if it still exists."""
    try:
        note = json.loads((checkpoint / CHECKPOINT_NOTE).read_text())
        folder = (checkpoint / note["log_dir"]).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if folder.is_dir() else None

"""A byte-level GPT-2 trained with Hugging Face's Trainer on Python's own source, and probed.

Run: python examples/gpt2_on_source.py --steps 200
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

from fimprobe.integrations.huggingface import FimProbeCallback

import torch  # isort: skip
from torch.utils.data import Dataset  # isort: skip
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments  # isort: skip

CONFIG = Path(__file__).parent / "fimprobe.yaml"


class Source(Dataset):
    """Windows of bytes of the standard library: each byte is predicted from those before it."""

    def __init__(self, length: int, files: int = 100) -> None:
        paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]
        text = b"".join(path.read_bytes() for path in paths)
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.windows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a window; the model shifts the labels itself."""
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def make_gpt2(*, layers: int, width: int, length: int) -> GPT2LMHeadModel:
    """Return a GPT-2 over 256 bytes."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=length,
            n_layer=layers,
            n_embd=width,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLM",
        )
    )


def run(
    steps: int, out: Path, *, layers: int = 4, width: int = 128, length: int = 128, files: int = 100
) -> tuple[Trainer, FimProbeCallback]:
    """Train with the callback, which is all that the probe needs."""
    torch.manual_seed(0)
    probing = FimProbeCallback(CONFIG)
    trainer = Trainer(
        model=make_gpt2(layers=layers, width=width, length=length),
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            warmup_steps=min(20, steps // 10),
            logging_steps=max(1, steps // 20),
            report_to="tensorboard",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Source(length, files),
        callbacks=[probing],
    )
    trainer.train()
    return trainer, probing


def main(arguments: list[str] | None = None) -> None:
    """Train, and print the last report and the commands that show more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--length", type=int, default=128, help="bytes in a window")
    parser.add_argument("--files", type=int, default=100, help="files of the standard library")
    parser.add_argument("--out", type=Path, default=Path("runs/gpt2_on_source"))
    options = parser.parse_args(arguments)
    sizes = {name: getattr(options, name) for name in ("layers", "width", "length", "files")}
    trainer, probing = run(options.steps, options.out, **sizes)
    probe = probing.probe
    if probe is None or probe.last is None:
        raise SystemExit("nothing was probed")
    print(probe.last)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"\nloss {losses[0]:.2f} -> {losses[-1]:.2f} nats a byte; {len(probe.history)} reports")
    print(f"Look at it: tensorboard --logdir {options.out} (tabs Time series, Images and Text)")
    print(f"or: fimprobe show {probe.log_dir}")


if __name__ == "__main__":
    main()

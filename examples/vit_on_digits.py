"""A vision transformer trained with Hugging Face's Trainer on scikit-learn's digits, and probed.

Run: python examples/vit_on_digits.py --steps 300
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fimprobe.integrations.huggingface import FimProbeCallback

import torch  # isort: skip
from sklearn.datasets import load_digits  # isort: skip
from torch.utils.data import Dataset, random_split  # isort: skip
from transformers import (  # isort: skip
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)


class Digits(Dataset):
    """1,797 digits [1, 8, 8] in 0 to 1."""

    def __init__(self) -> None:
        images, self.labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16

    def __len__(self) -> int:
        """Return the number of digits."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a digit and its label."""
        return {"pixel_values": self.images[index], "labels": torch.tensor(self.labels[index])}


def make_vit(*, layers: int, width: int) -> ViTForImageClassification:
    """Return a vision transformer with patches of 2×2 pixels."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
    )
    return ViTForImageClassification(config)


def compute_accuracy(prediction: tuple) -> dict[str, float]:
    """Return the accuracy on the held-out digits."""
    logits, labels = prediction
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def run(steps: int, out: Path, *, layers: int = 3, width: int = 64) -> tuple[float, FimProbeCallback]:
    """Train, and return the accuracy and the callback, which is all that the probe needs."""
    torch.manual_seed(0)
    train, held_out = random_split(Digits(), [1437, 360])
    # exact: the expectation over all ten labels instead of drawn ones
    probing = FimProbeCallback(schedule={"every": max(1, steps // 6)}, draws="exact", batch=16)
    trainer = Trainer(
        model=make_vit(layers=layers, width=width),
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            logging_steps=max(1, steps // 10),
            report_to="tensorboard",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=compute_accuracy,
        callbacks=[probing],
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"], probing


def main(arguments: list[str] | None = None) -> None:
    """Train, and print the last report and the commands that show more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/vit_on_digits"))
    options = parser.parse_args(arguments)
    accuracy, probing = run(options.steps, options.out, layers=options.layers, width=options.width)
    probe = probing.probe
    if probe is None or probe.last is None:
        raise SystemExit("nothing was probed")
    print(probe.last)
    print(f"\naccuracy {100 * accuracy:.1f} % of held-out digits; {len(probe.history)} reports")
    print(f"Look at it: tensorboard --logdir {options.out}    or: fimprobe show {probe.log_dir}")


if __name__ == "__main__":
    main()

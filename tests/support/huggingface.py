"""A Trainer of a tiny GPT-2 on random tokens."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

TOKENS, LENGTH = 11, 6


def gpt2(**options):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=1, n_embd=8, n_head=2, vocab_size=TOKENS, n_positions=LENGTH,
            bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM", **options,
        )
    )  # fmt: skip


def text(size=40):
    rows = torch.randint(TOKENS, (size, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, kind=TrainingArguments, **options):
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "learning_rate": 1e-2,
        "save_strategy": "no", "report_to": "tensorboard", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return kind(output_dir=str(folder), **{**defaults, **options})


def trainer_of(folder, *callbacks, model=None, data=None, kind=Trainer, given=None, **options):
    return kind(
        model=gpt2() if model is None else model,
        args=arguments(folder, **options),
        train_dataset=text() if data is None else data,
        callbacks=list(callbacks),
        **(given or {}),
    )

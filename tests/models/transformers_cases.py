"""Tiny models of the families transformers ships, each with a batch; weights of size one half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 7
CLASSES = 3
SIZE = 3
LENGTH = 4


class Sample(NamedTuple):
    """A model and its keyword inputs."""

    model: nn.Module
    inputs: dict[str, Tensor]


def tokens(length: int = LENGTH, start: int = 2) -> Tensor:
    """Token ids that are no padding."""
    return torch.randint(start, VOCABULARY, (SIZE, length))


def padded(left: bool = False) -> dict[str, Tensor]:
    """Tokens of lengths 4, 3 and 2, with the attention mask that says so."""
    ids, keep = tokens(), torch.ones(SIZE, LENGTH, dtype=torch.long)
    for row in range(SIZE):
        (keep[row, :row] if left else keep[row, LENGTH - row :]).zero_()
    return {"input_ids": ids.masked_fill(keep == 0, 1), "attention_mask": keep}


def images(side: int = 4) -> dict[str, Tensor]:
    """Pixels."""
    return {"pixel_values": torch.randn(SIZE, 3, side, side)}


def lively(model: nn.Module) -> nn.Module:
    """Weights of size one half: no derivative is small; gains of norms near one; no dropout."""
    for name, p in model.named_parameters():
        if p.dim() == 1 and name.endswith("weight"):
            nn.init.uniform_(p, 0.5, 1.5)
        else:
            nn.init.normal_(p, std=0.5)
    return model.eval()


_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "pad_token_id": 1,
    "num_labels": CLASSES,
}


def gpt2(head: str = "GPT2LMHeadModel", **options: Any) -> nn.Module:
    """GPT-2, tied as it comes."""
    config = transformers.GPT2Config(
        n_embd=4,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=8,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        **{"num_labels": CLASSES, "n_layer": 2} | options,
    )
    return getattr(transformers, head)(config)


def decoder(family: str, head: str = "ForCausalLM", **options: Any) -> nn.Module:
    """Llama and what came after it: RMS norms, rotary positions, gated MLPs, grouped queries."""
    config = getattr(transformers, family + "Config")(**_DECODER | options)
    return getattr(transformers, family + head)(config)


def encoder(family: str, head: str, **options: Any) -> nn.Module:
    """BERT and its kin."""
    config = getattr(transformers, family + "Config")(**_ENCODER | options)
    return getattr(transformers, family + head)(config)


def distilbert(head: str, **options: Any) -> nn.Module:
    """DistilBERT names its sizes otherwise."""
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=4,
        hidden_dim=6,
        n_layers=1,
        n_heads=2,
        max_position_embeddings=8,
        pad_token_id=1,
        **{"num_labels": CLASSES} | options,
    )
    return getattr(transformers, "DistilBert" + head)(config)


def vit(**options: Any) -> nn.Module:
    """Four patches and a class token."""
    config = transformers.ViTConfig(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=2,
        **{"image_size": 4, "num_labels": CLASSES} | options,
    )
    return transformers.ViTForImageClassification(config)


def resnet() -> nn.Module:
    """Basic blocks with running statistics of a few batches."""
    config = transformers.ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 4],
        depths=[1, 1],
        layer_type="basic",
        num_labels=CLASSES,
    )
    model = transformers.ResNetForImageClassification(config).train()
    with torch.no_grad():
        for _ in range(3):
            model(pixel_values=torch.randn(8, 3, 8, 8))
    return model


def convnext() -> nn.Module:
    """Depthwise convolutions, channels-first norms and layer scale."""
    config = transformers.ConvNextConfig(
        num_stages=2,
        patch_size=2,
        hidden_sizes=[4, 4],
        depths=[1, 1],
        num_labels=CLASSES,
    )
    return transformers.ConvNextForImageClassification(config)


def t5(**options: Any) -> nn.Module:
    """Relative positions, tied embeddings, two stacks."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=4,
        d_kv=2,
        d_ff=6,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=8,
        pad_token_id=1,
        decoder_start_token_id=1,
        eos_token_id=0,
        **options,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart(head: str = "BartForConditionalGeneration") -> nn.Module:
    """Learned positions with an offset."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=4,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=6,
        decoder_ffn_dim=6,
        max_position_embeddings=8,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        num_labels=CLASSES,
    )
    return getattr(transformers, head)(config)


def mamba() -> nn.Module:
    """The slow path in torch, with the cache that it keeps by default."""
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        state_size=2,
        num_hidden_layers=1,
        conv_kernel=2,
        expand=2,
        time_step_rank=2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.MambaForCausalLM(config)


def mamba2() -> nn.Module:
    """Its mixer is handed a cache that the first pass has filled, unless there is none."""
    config = transformers.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=4,
        state_size=2,
        num_hidden_layers=1,
        conv_kernel=2,
        expand=2,
        num_heads=2,
        head_dim=4,
        n_groups=1,
        chunk_size=4,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.Mamba2ForCausalLM(config)


def pairs() -> dict[str, Tensor]:
    """A source and a target."""
    return {**padded(), "decoder_input_ids": tokens(2)}


EAGER, SDPA = {"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}
_EXPERTS = {"experts_implementation": "eager"}  # the grouped kernel takes no float64
_MOE = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 1, **_EXPERTS}
_QWEN_MOE = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "shared_expert_intermediate_size": 5,
    "num_hidden_layers": 1,
    "decoder_sparse_step": 1,
    **_EXPERTS,
}

MODELS: dict[str, Callable[[], Sample]] = {
    "GPT-2 eager": lambda: Sample(gpt2(**EAGER), padded()),
    "GPT-2 sdpa": lambda: Sample(gpt2(**SDPA), padded(left=True)),
    "GPT-2 untied": lambda: Sample(gpt2(tie_word_embeddings=False), {"input_ids": tokens()}),
    "Llama eager": lambda: Sample(decoder("Llama", **EAGER), padded()),
    "Llama sdpa": lambda: Sample(decoder("Llama", **SDPA, tie_word_embeddings=True), padded()),
    "Qwen2": lambda: Sample(decoder("Qwen2"), padded()),
    "Qwen3": lambda: Sample(decoder("Qwen3", num_hidden_layers=1), padded()),
    "Mistral": lambda: Sample(decoder("Mistral", sliding_window=2), padded()),
    "BERT eager": lambda: Sample(encoder("Bert", "ForSequenceClassification", **EAGER), padded()),
    "BERT sdpa": lambda: Sample(encoder("Bert", "ForSequenceClassification", **SDPA), padded()),
    "BERT masked LM": lambda: Sample(encoder("Bert", "ForMaskedLM"), padded()),
    "BERT choices": lambda: Sample(
        encoder("Bert", "ForMultipleChoice", num_hidden_layers=1),
        {"input_ids": torch.stack([tokens(), tokens()], 1)},
    ),
    "RoBERTa": lambda: Sample(encoder("Roberta", "ForTokenClassification"), padded()),
    "DistilBERT": lambda: Sample(distilbert("ForSequenceClassification"), padded()),
    "ViT": lambda: Sample(vit(), images()),
    "ResNet": lambda: Sample(resnet(), images(8)),
    "ConvNeXt": lambda: Sample(convnext(), images(8)),
    "T5": lambda: Sample(t5(), pairs()),
    "BART": lambda: Sample(bart(), pairs()),
    "Mamba": lambda: Sample(mamba(), {"input_ids": tokens()}),
    "Mamba-2": lambda: Sample(mamba2(), {"input_ids": tokens()}),
    "Mixtral": lambda: Sample(decoder("Mixtral", **_MOE), padded()),
    "Qwen2 MoE": lambda: Sample(decoder("Qwen2Moe", **_QWEN_MOE), padded()),
}

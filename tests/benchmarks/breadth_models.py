"""Small members of 100 families of models that nobody here wrote, each with a batch of inputs.

torchvision, timm, transformers, PyTorch Geometric, diffusers, x-transformers, MONAI, Segmentation Models:
``pip install --no-deps timm torch_geometric xxhash diffusers x-transformers einops einx
torch_einops_utils loguru frozendict monai segmentation-models-pytorch``. A family whose package is
missing is named and left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

B, T, CLASSES, WORDS = 4, 8, 3, 11
Inputs = tuple[Any, ...] | dict[str, Any]
Built = tuple[nn.Module, Inputs]


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: Package and class.
        build: Makes a model and its inputs.
        output: From what the model returns to real outputs [B, ...]; None for the usual places.
        classes: Whether the last dimension of the outputs, or the second of pictures, is a class.
        rounding: Relative error that rounding explains: more where a float64 model computes in float32.
    """

    name: str
    build: Callable[[], Built]
    output: Callable[[Any], Tensor] | None = None
    classes: bool = True
    rounding: float = 1e-9


def import_torchvision() -> None:
    """Import the torchvision of PyPI next to a torch without CUDA, by naming its missing operators."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.submodule_search_locations is None:
        return
    code = (Path(found.submodule_search_locations[0]) / "_meta_registrations.py").read_text()
    names = re.findall(r"torchvision::(\w+)", code) + re.findall(r'register_meta\("(\w+)"\)', code)
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in sorted(set(names)):
            library.define(f"{name}(Tensor x) -> Tensor")
        _LIBRARIES.append(library)
        importlib.import_module("torchvision")


_LIBRARIES: list[Any] = []


def pictures(side: int = 32, channels: int = 3, frames: int | None = None) -> Tensor:
    return torch.randn(B, channels, *(() if frames is None else (frames,)), side, side)


def words(length: int = T) -> Tensor:
    return torch.randint(3, WORDS, (B, length))


# torchvision, timm: their classes, mostly with fewer and narrower layers

NARROW: dict[str, Any] = {"channels": (16, 24, 32, 48), "layers": [1, 1, 1, 1]}
SMALL_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL_MLP = {
    "num_classes": CLASSES,
    "img_size": 32,
    "patch_size": 16,
    "num_blocks": 2,
    "embed_dim": 24,
}
SMALL_SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 12,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": [4, 4],
    "num_classes": CLASSES,
}
DEPTHS, DIMS = (1, 1, 1, 1), (8, 16, 24, 32)


def torchvision_model(name: str, side: int, **options: Any) -> Family:
    def build() -> Built:
        models = importlib.import_module("torchvision.models")
        model = models.get_model(name, weights=None, num_classes=CLASSES, **options)
        return model, (pictures(side),)

    return Family(f"torchvision {name}", build)


def narrow_classifier(model: nn.Module) -> nn.Module:
    """64 hidden units in place of 4,096."""
    classifier: Any = model.classifier
    for key, layer in classifier.named_children():
        if isinstance(layer, nn.Linear):
            widths = [64 if n == 4096 else n for n in (layer.in_features, layer.out_features)]
            setattr(classifier, key, nn.Linear(*widths))
    return model


def small_vgg(models: Any) -> nn.Module:
    places = [16, "M", 16, "M", 32, 32, "M", 32, 32, "M", 64, 64, "M"]
    model = models.VGG(models.vgg.make_layers(places, batch_norm=True), num_classes=CLASSES)
    model.classifier[0] = nn.Linear(64 * 49, 4096)
    return narrow_classifier(model)


def torchvision_class(name: str, side: int, make: Callable[[Any], nn.Module]) -> Family:
    """``make`` gets ``torchvision.models``."""

    def build() -> Built:
        return make(importlib.import_module("torchvision.models")), (pictures(side),)

    return Family(f"torchvision {name}", build)


def timm_model(name: str, side: int = 32, **options: Any) -> Family:
    def build() -> Built:
        timm = importlib.import_module("timm")
        model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
        return model, (pictures(side),)

    return Family(f"timm {name}", build)


def timm_class(name: str, side: int, module: str, make: Callable[[Any], nn.Module]) -> Family:
    """``make`` gets the module of ``timm.models``."""

    def build() -> Built:
        return make(importlib.import_module(f"timm.models.{module}")), (pictures(side),)

    return Family(f"timm {name}", build)


def small_swin(models: Any, **options: Any) -> nn.Module:
    return models.swin_transformer.SwinTransformer(**SMALL_SWIN, **options)


def small_maxvit(models: Any) -> nn.Module:
    return models.MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=2,
        block_channels=[16, 16],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.2,
        num_classes=CLASSES,
    )


def small_nfnet(module: Any, config: Any, stem: int) -> nn.Module:
    small = replace(config, group_size=16, stem_chs=stem, num_features=64)
    return module.NormFreeNet(small, num_classes=CLASSES)


def small_poolformer(module: Any) -> nn.Module:
    return module.MetaFormer(
        depths=DEPTHS,
        dims=DIMS,
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=module.GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
        num_classes=CLASSES,
    )


def small_caformer(module: Any) -> nn.Module:
    return module.MetaFormer(
        depths=DEPTHS,
        dims=(8, 16, 32, 64),
        token_mixers=[module.SepConv] * 2 + [module.Attention] * 2,
        norm_layers=[module.LayerNorm2dNoBias] * 2 + [module.LayerNormNoBias] * 2,
        num_classes=CLASSES,
    )


def small_gmlp(module: Any) -> nn.Module:
    return module.MlpMixer(
        **SMALL_MLP, mlp_ratio=6, block_layer=module.SpatialGatingBlock, mlp_layer=module.GatedMlp
    )


def small_byobnet(module: Any, blocks: Any, stem: str) -> nn.Module:
    config = module.ByoModelCfg(blocks=blocks(d=DEPTHS, wf=(0.25,) * 4), stem_type=stem, stem_chs=16)
    return module.ByobNet(config, num_classes=CLASSES)


PICTURES = [
    torchvision_class(
        "alexnet", 64, lambda models: narrow_classifier(models.AlexNet(num_classes=CLASSES))
    ),
    torchvision_class("vgg11_bn", 32, small_vgg),
    torchvision_class(
        "resnet18",
        32,
        lambda models: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES),
    ),
    torchvision_class(
        "resnext50_32x4d",
        32,
        lambda models: models.ResNet(
            models.resnet.Bottleneck,
            [1, 1, 1, 1],
            groups=32,
            width_per_group=1,
            num_classes=CLASSES,
        ),
    ),
    torchvision_class(
        "densenet121",
        32,
        lambda models: models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES),
    ),
    torchvision_model("squeezenet1_1", 32),
    torchvision_model("googlenet", 64, init_weights=True, aux_logits=False),
    torchvision_model("mobilenet_v2", 32),
    torchvision_model("mobilenet_v3_small", 32),
    torchvision_model("shufflenet_v2_x0_5", 32),
    torchvision_model("mnasnet0_5", 32),
    torchvision_model("efficientnet_b0", 32),
    torchvision_model("regnet_y_400mf", 32),
    torchvision_class("swin_t", 32, small_swin),
    torchvision_class(
        "swin_v2_t",
        32,
        lambda models: small_swin(
            models,
            block=models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=models.swin_transformer.PatchMergingV2,
        ),
    ),
    torchvision_class("maxvit_t", 64, small_maxvit),
    timm_model("resnet10t", **NARROW),
    timm_model("skresnet18", **NARROW),
    timm_model("resnest14d", **NARROW),
    timm_model("seresnet18", **NARROW),
    timm_model("res2net50_26w_4s", **NARROW),
    timm_model("convnext_atto", depths=DEPTHS, dims=DIMS),
    timm_model("convnextv2_atto", depths=DEPTHS, dims=DIMS),
    timm_model("mixnet_s"),
    timm_model("ghostnet_050"),
    timm_class(
        "mobileone_s0",
        32,
        "byobnet",
        lambda module: small_byobnet(module, module._mobileone_bcfg, "one"),
    ),
    timm_class(
        "repvgg_a0",
        32,
        "byobnet",
        lambda module: small_byobnet(module, module._rep_vgg_bcfg, "rep"),
    ),
    timm_model("hardcorenas_a"),
    timm_class(
        "nfnet_l0",
        64,
        "nfnet",
        lambda module: small_nfnet(
            module,
            module._nfnet_cfg(
                depths=DEPTHS,
                channels=(64, 64, 64, 128),
                bottle_ratio=0.25,
                attn_kwargs={"rd_ratio": 0.25, "rd_divisor": 8},
                act_layer="silu",
            ),
            32,
        ),
    ),
    timm_class(
        "dm_nfnet_f0",
        64,
        "nfnet",
        lambda module: small_nfnet(
            module, module._dm_nfnet_cfg(depths=DEPTHS, channels=(32, 32, 64, 64)), 32
        ),
    ),
    timm_model("vit_tiny_patch16_224", **SMALL_VIT),
    timm_model("deit_tiny_distilled_patch16_224", **SMALL_VIT),
    timm_model("beit_base_patch16_224", **SMALL_VIT),
    timm_model("cait_xxs24_224", **SMALL_VIT),
    timm_model("eva02_tiny_patch14_224", **SMALL_VIT),
    timm_model(
        "crossvit_tiny_240", side=240, embed_dim=[24, 48], depth=[[1, 1, 0]], num_heads=[2, 2]
    ),
    timm_class("mixer_s32_224", 32, "mlp_mixer", lambda module: module.MlpMixer(**SMALL_MLP)),
    timm_class("gmlp_s16_224", 32, "mlp_mixer", small_gmlp),
    timm_class(
        "resmlp_12_224",
        32,
        "mlp_mixer",
        lambda module: module.MlpMixer(
            **SMALL_MLP, mlp_ratio=4, block_layer=module.ResBlock, norm_layer=module.Affine
        ),
    ),
    timm_class("poolformer_s12", 32, "metaformer", small_poolformer),
    timm_class("caformer_s18", 32, "metaformer", small_caformer),
    timm_model("pvt_v2_b0", embed_dims=(16, 16, 32, 32), depths=DEPTHS, num_heads=(1, 2, 2, 4)),
    timm_model(
        "twins_pcpvt_small", embed_dims=[16, 32, 32, 64], depths=DEPTHS, num_heads=[1, 2, 2, 4]
    ),
    timm_model("coat_lite_tiny", img_size=32, embed_dims=[16, 32, 32, 64], serial_depths=DEPTHS),
    timm_model(
        "levit_128s",
        side=64,
        img_size=64,
        embed_dim=(16, 24, 32),
        key_dim=8,
        num_heads=(2, 2, 2),
        depth=(1, 1, 1),
    ),
    timm_model(
        "efficientformerv2_s0", side=64, img_size=64, depths=DEPTHS, embed_dims=(16, 16, 24, 32)
    ),
    timm_model("edgenext_xx_small", side=64),
    timm_model("mobilevit_xxs", side=64),
    timm_model("mobilevitv2_050", side=64),
    timm_model("fastvit_t8", side=64, layers=DEPTHS, embed_dims=(48, 48, 48, 48)),
    timm_model("repvit_m0_9", side=64, embed_dim=(16, 16, 24, 32), depth=DEPTHS),
    timm_model("inception_next_atto", side=64, depths=DEPTHS, dims=(16, 16, 24, 32)),
    timm_class(
        "focalnet_tiny_srf",
        64,
        "focalnet",
        lambda module: module.FocalNet(depths=DEPTHS, embed_dim=16, num_classes=CLASSES),
    ),
    timm_model(
        "davit_tiny", side=64, depths=DEPTHS, embed_dims=(16, 16, 32, 32), num_heads=(1, 2, 2, 2)
    ),
    timm_model("xcit_nano_12_p16_224", side=32, embed_dim=24, depth=2, num_heads=2),
    timm_model("visformer_tiny", side=64, img_size=64, embed_dim=32, depth=(1, 1, 1), num_heads=2),
    timm_class(
        "volo_d1_224",
        64,
        "volo",
        lambda module: module.VOLO(
            layers=DEPTHS,
            img_size=64,
            embed_dims=(16, 32, 32, 32),
            num_heads=(1, 2, 2, 2),
            num_classes=CLASSES,
        ),
    ),
]

# transformers

DECODER = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": CLASSES,
}


def transformers_model(
    family: str, head: str, options: dict[str, Any], inputs: Callable[[], dict[str, Any]], **more: Any
) -> Family:
    output = more.pop("output", None)
    classes = more.pop("classes", True)
    rounding = more.pop("rounding", 1e-9)

    def build() -> Built:
        transformers = importlib.import_module("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, family + "Config")(**options | more)
        if "experts_implementation" in more:
            config._experts_implementation = more["experts_implementation"]
        return getattr(transformers, family + head)(config), inputs()

    return Family(f"transformers {family}{head}", build, output, classes, rounding)


def ids(length: int = T) -> dict[str, Any]:
    return {"input_ids": words(length)}


def padded() -> dict[str, Any]:
    mask = (torch.arange(T)[None] < torch.tensor([T, 5, 7, 3])[:, None]).long()
    return {"input_ids": words() * mask, "attention_mask": mask}


def pixels(side: int = 32) -> dict[str, Any]:
    return {"pixel_values": pictures(side)}


def decoder(family: str, **more: Any) -> Family:
    return transformers_model(family, "ForCausalLM", DECODER, ids, **more)


def classifier(family: str, **more: Any) -> Family:
    return transformers_model(family, "ForSequenceClassification", ENCODER, padded, **more)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "num_labels": CLASSES,
}
JAMBA = {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
JAMBA |= {"num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False}
EXPERTS = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2}
SPEECH = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "num_labels": CLASSES,
}


def sound() -> dict[str, Any]:
    return {"input_values": torch.randn(B, 400)}


def seq2seq() -> dict[str, Any]:
    return {"input_ids": words(), "decoder_input_ids": words(5)}


def start_and_end(out: Any) -> Tensor:
    return torch.stack([out.start_logits, out.end_logits], 1)


def choices() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, WORDS, (B, 3, T))}


T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BART = {"vocab_size": WORDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16}
BART |= {"decoder_ffn_dim": 16, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1}
BART |= {"eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None}

TEXT = [
    transformers_model(
        "GPT2",
        "LMHeadModel",
        {},
        ids,
        n_embd=16,
        n_layer=2,
        n_head=2,
        vocab_size=WORDS,
        n_positions=32,
    ),
    decoder("Llama"),
    decoder("Mistral", sliding_window=4),
    decoder("Qwen2"),
    decoder("Qwen3"),
    decoder("Gemma"),
    decoder("Gemma2"),
    decoder("Phi"),
    decoder("Phi3"),
    decoder("Olmo2"),
    decoder("Cohere"),
    decoder("Granite"),
    decoder("StableLm"),
    decoder("Starcoder2"),
    decoder("Mixtral", experts_implementation="eager", **EXPERTS),
    decoder("GPTNeoX"),
    transformers_model(
        "Falcon", "ForCausalLM", {k: v for k, v in DECODER.items() if k != "head_dim"}, ids
    ),
    decoder("OPT", ffn_dim=16, word_embed_proj_dim=16),
    decoder("Bloom", n_layer=2, n_head=2),
    decoder("GPTBigCode", n_embd=16, n_layer=2, n_head=2, n_inner=16, n_positions=32),
    decoder("Mamba", state_size=4, time_step_rank=4, rounding=1e-6),
    decoder("Jamba", experts_implementation="eager", **JAMBA, rounding=1e-6),
    transformers_model(
        "Rwkv",
        "ForCausalLM",
        {},
        ids,
        vocab_size=WORDS,
        hidden_size=8,
        attention_hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        context_length=16,
        use_cache=False,
    ),  # fmt: skip
    transformers_model(
        "xLSTM",
        "ForCausalLM",
        {},
        ids,
        vocab_size=WORDS,
        hidden_size=32,
        num_heads=2,
        num_hidden_layers=2,
        chunk_size=8,
        use_cache=False,
        rounding=1e-6,
    ),  # fmt: skip
    transformers_model(
        "XLNet", "LMHeadModel", {}, ids, vocab_size=WORDS, d_model=16, n_layer=2, n_head=2, d_inner=16
    ),
    classifier("Bert"),
    classifier("Roberta"),
    classifier("Electra", embedding_size=8),
    classifier("Albert", embedding_size=8),
    classifier("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    classifier("ModernBert", global_attn_every_n_layers=2),
    classifier("MPNet"),
    classifier("Longformer", attention_window=4),
    classifier("RoFormer"),
    transformers_model(
        "Nystromformer",
        "ForSequenceClassification",
        ENCODER,
        ids,
        num_landmarks=4,
        segment_means_seq_len=8,
        # an iteration starts from the largest value of the batch: samples couple a bit, which shows
        # in queries and keys, whose gradients are 1e-7 of the largest
        rounding=1e-4,
    ),
    classifier("FNet"),
    classifier("SqueezeBert", embedding_size=16),
    classifier("MobileBert", embedding_size=8, intra_bottleneck_size=8),
    transformers_model("Bert", "ForMaskedLM", ENCODER, padded),
    transformers_model("Bert", "ForMultipleChoice", ENCODER, choices),
    transformers_model(
        "Bert", "ForQuestionAnswering", ENCODER, ids, output=start_and_end, num_labels=2
    ),
    transformers_model("T5", "ForConditionalGeneration", T5, seq2seq),
    transformers_model("MT5", "ForConditionalGeneration", T5, seq2seq),
    transformers_model(
        "SwitchTransformers", "ForConditionalGeneration", T5, seq2seq, num_experts=2, rounding=1e-5
    ),
    transformers_model("Bart", "ForConditionalGeneration", BART, seq2seq),
    transformers_model("Marian", "MTModel", BART, seq2seq),
    transformers_model(
        "Whisper",
        "ForConditionalGeneration",
        BART,
        lambda: {"input_features": torch.randn(B, 8, 40), "decoder_input_ids": words(5)},
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
    ),
    transformers_model("Wav2Vec2", "ForSequenceClassification", SPEECH, sound),
    transformers_model("Hubert", "ForSequenceClassification", SPEECH, sound),
    transformers_model("ViT", "ForImageClassification", VISION, pixels),
    transformers_model("DeiT", "ForImageClassification", VISION, pixels),
    transformers_model("Dinov2", "ForImageClassification", VISION, pixels),
    transformers_model(
        "Swin",
        "ForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
        pixels,
        window_size=4,
        num_labels=CLASSES,
    ),
    transformers_model(
        "ConvNext",
        "ForImageClassification",
        {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_labels": CLASSES},
        pixels,
    ),
    transformers_model(
        "Segformer",
        "ForImageClassification",
        {"num_labels": CLASSES, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        lambda: pixels(64),
        num_attention_heads=[1, 1, 2, 2],
    ),
    transformers_model(
        "VideoMAE",
        "ForVideoClassification",
        VISION,
        lambda: {"pixel_values": torch.randn(B, 4, 3, 32, 32)},
        num_frames=4,
    ),
    transformers_model(
        "PatchTST",
        "ForClassification",
        {"num_input_channels": 2, "num_targets": CLASSES, "context_length": 16, "patch_length": 4},
        lambda: {"past_values": torch.randn(B, 16, 2)},
        patch_stride=4,
        d_model=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        ffn_dim=16,
        output=lambda out: out.prediction_logits,
    ),
]

# the rest


def x_transformers(**options: Any) -> Built:
    package = importlib.import_module("x_transformers")
    layers = package.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, **options)
    model = package.TransformerWrapper(num_tokens=WORDS, max_seq_len=16, attn_layers=layers)
    return model, (words(),)


def diffusers_unet() -> Built:
    model = importlib.import_module("diffusers").UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model, (pictures(16), torch.tensor([1, 5, 9, 20]))


def diffusers_transformer() -> Built:
    model = importlib.import_module("diffusers").DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    inputs = {
        "hidden_states": pictures(8),
        "timestep": torch.tensor([1, 5, 7, 9]),
        "class_labels": torch.tensor([0, 1, 2, 0]),
    }
    return model, inputs


def segmentation(name: str) -> Built:
    package = importlib.import_module("segmentation_models_pytorch")
    model = getattr(package, name)("mobilenet_v2", encoder_weights=None, classes=CLASSES)
    return model, (pictures(64),)


def monai_unet() -> Built:
    nets = importlib.import_module("monai.networks.nets")
    model = nets.UNet(
        spatial_dims=3, in_channels=1, out_channels=CLASSES, channels=(4, 8), strides=(2,)
    )
    return model, (pictures(8, 1, 8),)


def monai_swin() -> Built:
    nets = importlib.import_module("monai.networks.nets")
    return nets.SwinUNETR(
        in_channels=1, out_channels=CLASSES, feature_size=12, spatial_dims=2, depths=(1, 1, 1, 1)
    ), (pictures(64, 1),)


class PointCloud(nn.Module):
    """PyTorch Geometric's PointNet convolution on one graph for each sample: a fixed neighbourhood."""

    def __init__(self) -> None:
        super().__init__()
        layers = importlib.import_module("torch_geometric.nn")
        self.a, self.b = layers.DenseGCNConv(4, 8), layers.DenseSAGEConv(8, 8)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        y = self.b(self.a(x, adjacency).relu(), adjacency).relu()
        return self.out(y.mean(1))


def dense_graphs() -> Built:
    adjacency = (torch.rand(B, 6, 6) < 0.5).to(torch.get_default_dtype())
    return PointCloud(), (torch.randn(B, 6, 4), adjacency)


def sample(out: Any) -> Tensor:
    return out.sample


REST = [
    Family("x-transformers rotary", lambda: x_transformers(rotary_pos_emb=True)),
    Family("x-transformers alibi, swiglu", lambda: x_transformers(alibi_pos_bias=True, ff_glu=True)),
    Family("x-transformers macaron", lambda: x_transformers(macaron=True, use_rmsnorm=True)),
    Family("diffusers UNet2DModel", diffusers_unet, sample, classes=False),
    Family("diffusers DiTTransformer2DModel", diffusers_transformer, sample, classes=False),
    Family("Segmentation Models Unet", lambda: segmentation("Unet")),
    Family("Segmentation Models FPN", lambda: segmentation("FPN")),
    Family("Segmentation Models DeepLabV3Plus", lambda: segmentation("DeepLabV3Plus")),
    Family("MONAI UNet", monai_unet),
    Family("MONAI SwinUNETR", monai_swin),
    Family("PyTorch Geometric dense convolutions", dense_graphs),
]

FAMILIES = [*PICTURES, *TEXT, *REST]

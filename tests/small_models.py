"""Small models with random weights, saved as a user's model would be."""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertTokenizer,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaTokenizer,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    ViTImageProcessorPil,
)

from examples.pretrain_small_clip import make_tokenizer


def save_small_clip(directory: Path, seed: int = 0, num_layers: int = 2, hidden_size: int = 32) -> None:
    """32 px, patch 8."""
    tokenizer = make_tokenizer(["a photo of the number zero."], vocab_size=600)
    tower = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
    }
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        text_config=tower | ids | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        projection_dim=24,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    draw_large(model)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3
    )
    model.save_pretrained(directory)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(directory)


def draw_large(model: torch.nn.Module) -> None:
    """Draws weights larger than a model's own start, so that images and texts differ without training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 / parameter[0].numel() ** 0.5)


def save_scaled(directory: Path, other: Path, name: str, largest: float) -> None:
    """The model of ``directory`` with finite weights, and a projection ``name`` so large that embeddings overflow."""
    shutil.copytree(directory, other)
    tensors = load_file(other / "model.safetensors")
    weight = tensors[f"{name}.weight"]
    tensors[f"{name}.weight"] = weight / weight.abs().max() * largest
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})


def small_encoder(directory: Path, compute_dtype: torch.dtype = torch.float32):
    """The image encoder of a saved model."""
    from utils.models.encoders import make_encoder
    from utils.models.published import load_model

    return make_encoder(*load_model(str(directory)), compute_dtype)


def photos(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures in [0,1] that touch both ends of the range: (count, 3, size, size), float32."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (1.4 * smooth - 0.2).clamp(0, 1)


BERT_KINDS = ("dinov2_bert", "vit_roberta", "siglip_bert")  # dual encoders whose text tower is a BERT
TEXT_KINDS = ("clip", "siglip", "siglip2", "convnext", *BERT_KINDS)
KINDS = (*TEXT_KINDS, "clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_head")


def save_small_model(directory: Path, kind: str, num_classes: int = 10) -> None:
    """A model of any supported kind with random weights for 32 px, and its processor, as a user's model would be saved.

    ``convnext`` and ``BERT_KINDS`` are vision-text-dual-encoders, ``convnext`` is CLIP ConvNeXt; ``dinov2_head`` is
    DINOv2 with a head of ``num_classes``, made for 64 px. SigLIP's tower has a probe that attends. DINOv2's layer scale
    is 1, so all layers matter.
    """
    if kind == "clip":
        return save_small_clip(directory)
    clip_image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3
    )
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tower | {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    dinov2 = tower | {"mlp_ratio": 2, "image_size": 64, "patch_size": 8}
    dinov2_processor = BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    torch.manual_seed(0)
    if kind in ("siglip", "siglip2"):
        tokenizer = siglip_tokenizer() if kind == "siglip" else siglip2_tokenizer()
        text = tower | {"intermediate_size": 64, "vocab_size": len(tokenizer), "projection_size": 32}
        text |= {"max_position_embeddings": 24, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 1}
        if kind == "siglip":
            model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
            image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
            processor = SiglipProcessor(image_processor, tokenizer)
        else:
            # 9 positions a side of 4: they have to be resized.
            vision = tower | {"intermediate_size": 64, "patch_size": 8, "num_patches": 81}
            model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
            processor = Siglip2Processor(Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16), tokenizer)
    elif kind == "convnext":
        tokenizer = make_tokenizer(["a photo of the number zero."], vocab_size=600)
        sizes = [16, 24, 32, 40]
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            ConvNextConfig(
                hidden_sizes=sizes, depths=[1, 1, 2, 1], hidden_size=sizes[-1], image_size=32,
                layer_scale_init_value=1.0, layer_norm_eps=1e-6,
            ),
            CLIPTextConfig(
                **tower, intermediate_size=64, hidden_act="gelu", vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            projection_dim=24,
        )  # fmt: skip
        model = VisionTextDualEncoderModel(config)
        processor = VisionTextDualEncoderProcessor(image_processor=clip_image_processor, tokenizer=tokenizer)
    elif kind in BERT_KINDS:
        image_processor, tokenizer = SiglipImageProcessorPil(size={"height": 32, "width": 32}), bert_tokenizer()
        vision_config: PreTrainedConfig = SiglipVisionConfig(**vision)
        if kind == "dinov2_bert":
            vision_config, image_processor = Dinov2Config(**dinov2), dinov2_processor
        if kind == "vit_roberta":
            vision_config, tokenizer = ViTConfig(**vision, hidden_dropout_prob=0.1), roberta_tokenizer()
            image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            vision_config, bert_config(tokenizer), projection_dim=24
        )
        model = VisionTextDualEncoderModel(config)
        processor = VisionTextDualEncoderProcessor(image_processor=image_processor, tokenizer=tokenizer)
    elif kind == "clip_vision_model":
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=24))
        processor = clip_image_processor
    elif kind == "siglip_vision_model":
        model = SiglipVisionModel(SiglipVisionConfig(**vision))
        processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    elif kind in ("dinov2", "dinov2_head"):
        config = Dinov2Config(**dinov2, num_labels=num_classes)
        model = (Dinov2ForImageClassification if kind == "dinov2_head" else Dinov2Model)(config)
        processor = dinov2_processor
    else:
        raise ValueError(f"{kind}: no small model is made of this kind")
    draw_large(model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def siglip_tokenizer() -> SiglipTokenizer:
    """SigLIP's own kind, learnt by sentencepiece from a few words."""
    import sentencepiece

    letters = " ".join("abcdefghijklmnopqrstuvwxyz")
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a photo of the number zero", letters] * 20), model_prefix=f"{folder}/spiece",
            vocab_size=45, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
        return SiglipTokenizer(f"{folder}/spiece.model", model_max_length=24)


def siglip2_tokenizer() -> Siglip2Tokenizer:
    """SigLIP 2's own kind, of letters."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz."]
    return Siglip2Tokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], padding_side="right")


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def bert_config(tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """A text tower for texts of 40 tokens, with dropout as BERT and RoBERTa have it."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if isinstance(tokenizer, RobertaTokenizer):  # its positions begin behind the padding's number
        return RobertaConfig(**size, **ids, max_position_embeddings=40 + ids["pad_token_id"] + 1)
    return BertConfig(**size, **ids, max_position_embeddings=40)


def bert_tokenizer() -> BertTokenizer:
    """BERT's own kind: some words, and pieces of a letter."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "a", "photo", "of", "the", "number", "zero"]
    pieces += [*LETTERS[1:], *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, model_max_length=40)


def roberta_tokenizer() -> RobertaTokenizer:
    """RoBERTa's own kind, of bytes. Its padding has id 1, as in the published ones."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return RobertaTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, model_max_length=40)

"""Small CLIP models with random weights, saved as a user's model would be."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from examples.pretrain_small_clip import make_tokenizer


def save_small_clip(directory: Path, seed: int = 0, num_layers: int = 2, hidden_size: int = 32) -> None:
    """32 px, patch 8. Weights are drawn larger than CLIP's own start, so that images differ without training."""
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
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 / parameter[0].numel() ** 0.5)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3
    )
    model.save_pretrained(directory)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(directory)


def small_encoder(directory: Path, compute_dtype: torch.dtype = torch.float32):
    """The image encoder of a saved model."""
    from utils.encoders import load_clip, make_encoder

    return make_encoder(*load_clip(str(directory)), compute_dtype)


def photos(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures in [0,1] that touch both ends of the range: (count, 3, size, size), float32."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (1.4 * smooth - 0.2).clamp(0, 1)

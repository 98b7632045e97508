r"""Pretrains a small CLIPModel on labelled images, to start from without published weights: in tests, on a laptop.

    python examples/pretrain_small_clip.py --train_data data/cifar10 --image_size 32 --patch_size 8 \
      --hidden_size 128 --num_layers 4 --epochs 8 --output_dir runs/small-clip

The captions are the class names in the set's templates. Each step draws some templates, and for each one it classifies
the image embeddings by the text embeddings of the classes. This is the image-to-text half of CLIP's loss, except that
images of one class are not each other's negatives. Several sets are merged into one with all their classes. All images
are decoded once and kept in memory as uint8. --output_dir becomes a complete Hugging Face directory, for
CLIPModel.from_pretrained and CLIPProcessor.from_pretrained. One process, one GPU if there is one, float32.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, parse_settings, required, run
from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset, eval_loader
from utils.data.skipped import SkipCounter
from utils.data.sources import has_shards
from utils.errors import UserError
from utils.model_card import versions, write_card
from utils.models.encoders import ImageEncoder, make_encoder
from utils.models.hub import find_config, load
from utils.models.published import BASE_MODEL_HELP, PROCESSOR_HELP, model_name, quiet_transformers
from utils.models.zeroshot import class_embeddings, to_pixel_values
from utils.processes.launch import launched_command
from utils.processes.progress import RunProgress
from utils.redaction import printable
from utils.sets.labelled import LabelledSet, open_set, read_templates
from utils.sets.typographic import KINDS, PLACES, Draws, WordStyle, word_style, write_word
from utils.text_files import holds_controls, read_text_file, text_lines
from utils.training.checkpoint import refuse_unwritable, take_output_dir
from utils.training.metrics import MetricsFile
from utils.training.optimization import cosine_learning_rate, set_learning_rate

MAX_TEXT_LENGTH = 77  # tokens, as in published CLIPs
MAX_SET_BYTES = 8 * 2**30
DECODE_BATCH = 256
MAX_LOGIT_SCALE = 4.6052  # ln 100


@dataclass
class Settings:
    train_data: list[str] = required(
        "set directories: classnames.txt, train/*.tar and, for the accuracy, test/*.tar; several are learnt as one",
        group="data",
        path=True,
    )
    image_size: int = flag(32, "side of the images, in pixels", group="data", minimum=8)
    classnames: str | None = flag(
        None, "class names, one per line; default classnames.txt of the set", group="data", path=True
    )
    templates: str | None = flag(
        None,
        "templates, one per line, {c} the class name; default the set's, else 'a photo of a {c}.'",
        group="data",
        path=True,
    )
    train_num_samples: int | None = flag(
        None, "use the first N training images of each set; default all", group="data", minimum=1
    )
    num_workers: int = flag(0, "processes that decode images, once, at the start", group="data", minimum=0)
    max_bad_fraction: float = flag(
        0.01, "share of unusable samples at which the run stops", group="data", minimum=0, maximum=1
    )
    cache_dir: str | None = flag(
        None, "where indexes of shards are kept; default the user's cache", group="data", path=True
    )

    start_from: str | None = flag(
        None, "go on from this CLIP, its sizes and its tokenizer; default random weights", group="model", path=True
    )
    base_model: str | None = flag(None, BASE_MODEL_HELP, group="model", path=True)
    processor: str | None = flag(None, PROCESSOR_HELP, group="model", path=True)
    patch_size: int = flag(8, "side of the patches, in pixels", group="model", minimum=1)
    hidden_size: int = flag(128, "width of the image tower", group="model", minimum=1)
    num_layers: int = flag(4, "layers of the image tower", group="model", minimum=1)
    num_heads: int = flag(4, "attention heads of the image tower", group="model", minimum=1)
    text_hidden_size: int = flag(64, "width of the text tower", group="model", minimum=1)
    text_num_layers: int = flag(2, "layers of the text tower", group="model", minimum=1)
    text_num_heads: int = flag(2, "attention heads of the text tower", group="model", minimum=1)
    projection_dim: int = flag(128, "dimension of the shared embedding space", group="model", minimum=1)
    vocab_size: int = flag(2048, "tokens at most; 514 are single bytes and marks", group="model", minimum=514)

    epochs: int = flag(8, "passes over the training images", group="training", minimum=1)
    batch_size: int = flag(128, "images per step", group="training", minimum=1)
    captions_per_step: int = flag(
        256,
        "captions per step, at least one template of each class present; then more classes, then more templates",
        group="training",
        minimum=2,
    )
    learning_rate: float = flag(1e-3, "peak of AdamW's learning rate, then cosine to 0", group="training", above=0)
    warmup_fraction: float = flag(0.1, "share of the steps for linear warm-up", group="training", minimum=0, maximum=1)
    weight_decay: float = flag(0.05, "AdamW's, on matrices only", group="training", minimum=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", group="training", above=0)
    crop_padding: int | None = flag(
        None, "random crops from images padded by this many pixels; default image_size / 8", group="training", minimum=0
    )
    with_words: bool = flag(False, "also learn to read: pictures of printed class names join every step", group="words")
    words: str | None = flag(
        None,
        "file with the word to print for each class, an empty line for none; default the class names",
        group="words",
        path=True,
    )
    words_per_step: int = flag(64, "pictures of words per step", group="words", minimum=1)
    words_on_images: float = flag(
        0.0,
        "share of them printed on training images instead of plain colours; half of these are captioned by the image",
        group="words",
        minimum=0,
        maximum=1,
    )
    fonts: list[str] = flag(
        ["DejaVuSans", "DejaVuSerif", "DejaVuSansMono"],
        "fonts of matplotlib, Aileron, or .ttf files",
        group="words",
        path=True,
    )
    word_size_min: float = flag(40.0, "smallest letters, in pixels at an image side of 224", group="words", above=0)
    word_size_max: float = flag(60.0, "largest letters, in the same unit", group="words", above=0)
    word_kind: str = flag("label", "look of the words", group="words", choices=KINDS)
    word_place: str = flag("anywhere", "where words stand", group="words", choices=PLACES)

    flip: bool = flag(True, "mirror images at random; false for digits and letters", group="training")
    seed: int = flag(0, "of weights, order, crops and templates", group="training", minimum=0)

    output_dir: str = required("where the model goes", group="output", path=True)
    overwrite: bool = flag(False, "write into a non-empty output_dir", group="output")
    eval_epochs: int = flag(5, "test accuracy after every N epochs, and at the end", group="output", minimum=1)
    logging_steps: int = flag(50, "a row in metrics.jsonl every N steps", group="output", minimum=1)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    check(settings)
    if settings.start_from is not None:
        start_from = model_name(settings.start_from, settings.base_model, settings.processor)
        find_config(start_from, "--start_from", ("clip",))
    train = open_split(settings, "train")
    classnames = list(dict.fromkeys(name for one in train for name in one.classnames))
    templates = list(dict.fromkeys(template for one in train for template in one.templates))
    if settings.templates is not None:
        templates = read_templates(settings.templates)
    words = read_words(settings.words, classnames)
    style = word_style(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, if installed, warns when the model is saved
    torch.manual_seed(settings.seed)

    train_images, train_labels = decode(train, classnames, settings, settings.train_num_samples, "decoding train")
    has_test = all(has_shards(Path(root) / "test") for root in settings.train_data)
    if has_test:
        test_images, test_labels = decode(open_split(settings, "test"), classnames, settings, None, "decoding test")

    if settings.start_from is None:
        processor = make_processor(classnames, templates, settings)
        clip = make_clip(len(processor.tokenizer), settings).to(device)
    else:
        clip, processor = load(start_from, "--start_from", ("clip",))
        clip.to(device)
        if (size := clip.config.vision_config.image_size) != settings.image_size:
            raise UserError(f"--image_size {settings.image_size}: --start_from {settings.start_from} sees {size} px")
    encoder = make_encoder(clip, processor)
    caption_ids = tokenize_captions(processor, classnames, templates).to(device)
    if settings.start_from is None:
        spread_captions(clip, caption_ids)

    steps_per_epoch = max(1, len(train_images) // settings.batch_size)
    total_steps = settings.epochs * steps_per_epoch
    warmup_steps = int(settings.warmup_fraction * total_steps)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in clip.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in clip.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )

    output_dir = Path(settings.output_dir)
    take_output_dir(output_dir)
    refuse_unwritable(output_dir)
    metrics = MetricsFile(output_dir / "metrics.jsonl")
    metrics.path.unlink(missing_ok=True)
    # On the CPU, so that order, crops and templates are the same for every device.
    generator = torch.Generator().manual_seed(settings.seed)
    step = 0
    accuracy = None
    started = time.perf_counter()
    with RunProgress("pretraining", total_steps) as progress:
        for epoch in range(1, settings.epochs + 1):
            order = torch.randperm(len(train_images), generator=generator)
            for first in range(0, steps_per_epoch * settings.batch_size, settings.batch_size):
                index = order[first : first + settings.batch_size]
                images, labels = augment(train_images[index], settings, generator), train_labels[index]
                if settings.with_words:
                    printed, printed_labels = print_words(words, train_images, train_labels, style, settings, step)
                    images, labels = torch.cat([images, printed]), torch.cat([labels, printed_labels])
                pixel_values, labels = to_pixel_values(images, device), labels.to(device)
                classes, targets = draw_classes(labels, len(classnames), settings.captions_per_step, generator)
                num_templates = min(len(templates), max(1, settings.captions_per_step // len(classes)))
                drawn = torch.randperm(len(templates), generator=generator)[:num_templates]

                learning_rate = cosine_learning_rate(step, settings.learning_rate, total_steps, warmup_steps)
                set_learning_rate(optimizer, learning_rate)
                image_embeds = F.normalize(encoder(pixel_values), dim=-1)
                text_embeds = F.normalize(embed_captions(clip, caption_ids[classes][:, drawn]), dim=-1)
                # One classification per template. Between texts of different templates an untrained text tower sees
                # the templates, not the classes, and the loss would stay flat for hundreds of steps.
                logits_per_image = clip.logit_scale.exp() * torch.einsum("nd,ctd->nct", image_embeds, text_embeds)
                loss = F.cross_entropy(logits_per_image, targets[:, None].expand(-1, num_templates))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                grad_norm = torch.nn.utils.clip_grad_norm_(clip.parameters(), settings.max_grad_norm)
                optimizer.step()
                with torch.no_grad():
                    clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
                step += 1

                if step % settings.logging_steps == 0 or step == total_steps:
                    row = {
                        "step": step,
                        "epoch": epoch,
                        "samples": step * settings.batch_size,
                        "loss": loss.item(),  # this synchronises with the device
                        "grad_norm": grad_norm.item(),
                        "logit_scale": clip.logit_scale.exp().item(),
                        "learning_rate": learning_rate,
                        "images_per_second": step * settings.batch_size / (time.perf_counter() - started),
                    }
                    shown = {key: row[key] for key in ("epoch", "loss", "learning_rate", "images_per_second")}
                    if settings.with_words:  # words are new in every step, so on plain colours this is a fair measure
                        right = logits_per_image[-settings.words_per_step :].mean(dim=-1).argmax(dim=-1)
                        row["words_read"] = (right == targets[-settings.words_per_step :]).float().mean().item()
                        shown["words_read"] = row["words_read"]
                    stop_unless_finite(row)
                    metrics.write(row)
                    progress.update(step, shown, report=True)
                else:
                    progress.update(step)

            if has_test and (epoch % settings.eval_epochs == 0 or epoch == settings.epochs):
                accuracy, norm = evaluate(clip, encoder, processor, classnames, templates, test_images, test_labels)
                metrics.write(
                    {"step": step, "epoch": epoch, "eval_accuracy_clean": accuracy, "image_embeds_norm": norm}
                )
                progress.note(f"epoch {epoch}: test accuracy {accuracy:.4f}, norm of the image embeddings {norm:.2f}")

    save(output_dir, clip, processor, settings, accuracy, time.perf_counter() - started)
    print(f"{output_dir}: saved; load it with CLIPModel.from_pretrained and CLIPProcessor.from_pretrained")


def check(settings: Settings) -> None:
    """Checks the settings before anything is read."""
    word_style(settings)
    if settings.image_size % settings.patch_size:
        raise UserError(
            f"--patch_size {settings.patch_size}: does not divide --image_size {settings.image_size}; give a divisor"
        )
    towers = (
        ("", settings.hidden_size, settings.num_heads),
        ("text_", settings.text_hidden_size, settings.text_num_heads),
    )
    for tower, hidden_size, num_heads in towers:
        if hidden_size % num_heads:
            raise UserError(
                f"--{tower}num_heads {num_heads}: does not divide --{tower}hidden_size {hidden_size}; give a divisor"
            )
    output_dir = Path(settings.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; give a directory")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not settings.overwrite:
        raise UserError(f"--output_dir {output_dir}: not empty; give another directory, or add --overwrite")
    for root in map(Path, settings.train_data):
        if not root.is_dir():
            raise UserError(
                f"--train_data {root}: no such directory; expected a set with classnames.txt and train/*.tar"
            )
        if not has_shards(root / "train"):
            raise UserError(
                f"--train_data {root}: no .tar files in {root / 'train'}; expected the shards of the set there"
            )
    if settings.classnames is not None and len(settings.train_data) > 1:
        raise UserError("--classnames: names the classes of one set; leave it out with several of --train_data")
    for name in ("classnames", "templates", "words"):
        path = getattr(settings, name)
        if path is not None and not Path(path).is_file():
            raise UserError(f"--{name} {path}: no such file; expected a text file, one entry per line")


def open_split(settings: Settings, split: str) -> list[LabelledSet]:
    return [
        open_set(
            [f"{root}/{split}"],
            flag="--train_data",
            with_classes=True,
            classnames=settings.classnames,
            cache_dir=settings.cache_dir,
        )
        for root in settings.train_data
    ]


def decode(
    sets: list[LabelledSet], classnames: list[str], settings: Settings, limit: int | None, progress_title: str
) -> tuple[Tensor, Tensor]:
    """All (or the first ``limit``) images of each set in order, uint8 (n, 3, S, S), and their classes, int64 (n,)."""
    size = settings.image_size
    counts = [min(limit or one.index.num_samples, one.index.num_samples) for one in sets]
    if (num_bytes := sum(counts) * 3 * size * size) > MAX_SET_BYTES:
        raise UserError(
            f"--train_data {' '.join(settings.train_data)}: {sum(counts)} images of {size} px take "
            f"{num_bytes / 2**30:.1f} GiB of memory, more than the {MAX_SET_BYTES / 2**30:.0f} allowed; "
            "lower --train_num_samples or --image_size"
        )
    images = torch.empty((sum(counts), 3, size, size), dtype=torch.uint8)
    labels = torch.empty(sum(counts), dtype=torch.int64)
    filled = 0
    for one, num_samples in zip(sets, counts):
        dataset = ShardDataset(
            one.index,
            ImageTransform(size, (size, size)),
            order="sequential",
            with_labels=True,
            num_classes=len(one.classnames),
        )
        loader = eval_loader(
            dataset,
            num_samples=num_samples,
            batch_size=DECODE_BATCH,
            rank=0,
            world_size=1,
            num_workers=settings.num_workers,
        )
        label_of = torch.tensor([classnames.index(name) for name in one.classnames])
        with RunProgress(progress_title, num_samples) as progress:
            skipped = SkipCounter(one.index, settings.max_bad_fraction, report=progress.note)
            for batch in loader:
                here = slice(filled, filled + len(batch["labels"]))
                images[here], labels[here] = batch["images"], label_of[batch["labels"]]
                filled = here.stop
                skipped.add(batch["skipped"])
                skipped.seen = min(skipped.seen + DECODE_BATCH, num_samples)
                skipped.check()
                progress.update(skipped.seen, report=skipped.seen == num_samples)
            if skipped.summary():
                progress.note(skipped.summary())
    return images[:filled], labels[:filled]


def make_processor(classnames: list[str], templates: list[str], settings: Settings) -> CLIPProcessor:
    """CLIP's image preparation at this image size, and a tokenizer learnt from the captions."""
    size = settings.image_size
    captions = [template.replace("{c}", name) for name in classnames for template in templates]
    with quiet_transformers():
        from transformers import CLIPImageProcessor  # the import itself warns if torchvision is missing

        image_processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        return CLIPProcessor(image_processor, make_tokenizer(captions, settings.vocab_size))


def make_tokenizer(captions: list[str], vocab_size: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learnt from ``captions``: it encodes any text, and captions in few tokens.

    The ids are ordered as in the published vocabulary: 256 bytes, the same at the end of a word, merges, start of text,
    end of text. The end of text has the highest id, so both rules of CLIPTextModel for the pooled token find it.
    """
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = CLIPTokenizer(vocab={start: 0, end: 1}, merges=[]).backend_tokenizer
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            initial_alphabet=byte_symbols,
            # Number the word-end symbols here, in order. The trainer would number them in hash order, which breaks ties
            # between equally frequent merges differently in every process, so that no two runs would be equal.
            special_tokens=[symbol + "</w>" for symbol in byte_symbols],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*byte_symbols, *(symbol + "</w>" for symbol in byte_symbols), *("".join(merge) for merge in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, start, end]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TEXT_LENGTH)


def make_clip(vocab_size: int, settings: Settings) -> CLIPModel:
    """A CLIPModel with random weights.

    CLIP's initial weights are scaled for dozens of layers, and its position embeddings are small beside the patch
    embeddings. With few layers the image tower learns faster from Xavier's weights and larger position embeddings.
    """
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": settings.text_hidden_size,
        "intermediate_size": 4 * settings.text_hidden_size,
        "num_hidden_layers": settings.text_num_layers,
        "num_attention_heads": settings.text_num_heads,
        "max_position_embeddings": MAX_TEXT_LENGTH,
        "projection_dim": settings.projection_dim,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }
    vision_config = {
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "hidden_size": settings.hidden_size,
        "intermediate_size": 4 * settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "projection_dim": settings.projection_dim,
    }
    config = CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=settings.projection_dim)
    clip = CLIPModel(config)
    for module in clip.vision_model.encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=0.2)
    return clip


@torch.no_grad()
def spread_captions(clip: CLIPModel, caption_ids: Tensor) -> None:
    """Removes the mean over all captions from the untrained text embeddings.

    Captions share most of their words. Without this, two classes have a cosine of 0.97 at the start, and images would
    be classified by the small rest.
    """
    sample = caption_ids.flatten(0, -2)[:: max(1, caption_ids[..., 0].numel() // 1024)]
    clip.text_model.final_layer_norm.bias.sub_(clip.text_model(input_ids=sample).pooler_output.mean(dim=0))


def tokenize_captions(processor: CLIPProcessor, classnames: list[str], templates: list[str]) -> Tensor:
    """Tokenizes every class in every template: input_ids (classes, templates, length) int64."""
    captions = [template.replace("{c}", name) for name in classnames for template in templates]
    tokens = processor.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    return tokens["input_ids"].view(len(classnames), len(templates), -1)


def read_words(path: str | None, classnames: list[str]) -> list[tuple[int, str]]:
    """(class, word) for every class that has a word: its name, or its line in the file."""
    if path is None:
        return list(enumerate(classnames))
    text = read_text_file(path, f"--words {path}")
    lines = [line.strip() for line in text_lines(text, f"--words {path}")]
    if text.endswith("\n"):
        lines.append("")  # the last class may have no word
    if len(lines) < len(classnames) or any(lines[len(classnames) :]):
        raise UserError(
            f"--words {path}: {len(lines)} lines for {len(classnames)} classes; expected one line per class"
        )
    words = [(label, word) for label, word in enumerate(lines) if word]
    odd = next((label for label, word in words if holds_controls(word)), None)
    if odd is not None:
        raise UserError(f"--words {path}: line {odd + 1} holds control characters: {lines[odd][:40]!r}; take them out")
    if not words:
        raise UserError(f"--words {path}: holds no words; expected one line per class, empty where none is printed")
    return words


def print_words(
    words: list[tuple[int, str]], images: Tensor, image_labels: Tensor, style: WordStyle, settings: Settings, step: int
) -> tuple[Tensor, Tensor]:
    """Pictures of printed words: uint8 (n, 3, S, S), and a class for each (n,).

    Words are printed on plain colours, or some of them on ``images`` (N, 3, S, S) of classes ``image_labels`` (N,). On
    a plain colour the class is that of the word. On an image it is that of the word or of the image, each with
    probability 1/2, as in captions on the web. So the CLIP learns to follow written words and still sees the image.
    """
    pictures, labels = [], []
    for number in range(settings.words_per_step):
        draws = Draws("printed words", settings.seed, step, number)
        label, word = words[draws.below(len(words))]
        if draws.between(0, 1) < settings.words_on_images:
            image = draws.below(len(images))
            background = images[image]
            if draws.below(2):
                label = int(image_labels[image])
        else:
            colour = torch.tensor([draws.below(256) for _ in range(3)], dtype=torch.uint8)
            background = colour[:, None, None].expand(3, settings.image_size, settings.image_size).contiguous()
        pictures.append(write_word(background, word, style, draws))
        labels.append(label)
    return torch.stack(pictures), torch.tensor(labels)


def draw_classes(labels: Tensor, num_classes: int, captions: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The classes whose captions are encoded in this step, and the place of each label among them.

    These are all classes if there are at most ``captions``; else those of ``labels`` (n,), filled up with random ones.
    """
    if num_classes <= captions:
        return torch.arange(num_classes, device=labels.device), labels
    present, targets = labels.unique(return_inverse=True)
    others = torch.randperm(num_classes, generator=generator).to(labels.device)
    others = others[~torch.isin(others, present)][: max(0, captions - len(present))]
    return torch.cat([present, others]), targets


def embed_captions(clip: CLIPModel, caption_ids: Tensor) -> Tensor:
    """input_ids (..., length) -> text embeddings (..., D), not normalised.

    No attention mask is needed: attention is causal, and padding comes after the end of text, where the text is pooled.
    """
    pooled = clip.text_model(input_ids=caption_ids.flatten(0, -2)).pooler_output
    return clip.text_projection(pooled).unflatten(0, caption_ids.shape[:-1])


def augment(images: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """uint8 (n, 3, S, S) -> the same: a random crop of each padded image, mirrored with probability 1/2."""
    n, _, _, size = images.shape
    padding = size // 8 if settings.crop_padding is None else settings.crop_padding
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    rows = top + torch.arange(size)
    columns = left + torch.arange(size)
    if settings.flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    # With advanced indices around a slice, the sliced dimension becomes the last: (n, S, S, 3).
    crops = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def evaluate(
    clip: CLIPModel,
    encoder: ImageEncoder,
    processor: CLIPProcessor,
    classnames: list[str],
    templates: list[str],
    images: Tensor,
    labels: Tensor,
) -> tuple[float, float]:
    """Zero-shot accuracy in [0,1], and the mean norm of the image embeddings before normalisation."""
    device = clip.logit_scale.device
    class_embeds = class_embeddings(clip, processor, classnames, templates, device=device)
    right, norms = 0, 0.0
    for first in range(0, len(images), 512):
        image_embeds = encoder(to_pixel_values(images[first : first + 512], device))
        predicted = (image_embeds @ class_embeds.T).argmax(dim=-1).cpu()
        right += int((predicted == labels[first : first + 512]).sum())
        norms += float(image_embeds.norm(dim=-1).sum())
    return right / len(images), norms / len(images)


def stop_unless_finite(row: dict[str, float]) -> None:
    for key in ("loss", "grad_norm"):
        if not torch.isfinite(torch.tensor(row[key])):
            raise UserError(f"step {row['step']}: {key} is {row[key]}; nothing was saved, try a lower --learning_rate")


def save(
    output_dir: Path,
    clip: CLIPModel,
    processor: CLIPProcessor,
    settings: Settings,
    accuracy: float | None,
    seconds: float,
) -> None:
    """Writes the Hugging Face directory, with the command and the result in README.md."""
    disable_progress_bar()  # that of "Writing model shards"
    with quiet_transformers():
        clip.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
    result = "not measured (the set has no test split)" if accuracy is None else f"{accuracy:.4f}"
    lines = [
        "# A small CLIP",
        "",
        f"Pretrained from class names in templates, {seconds:.0f} s. Zero-shot test accuracy: {result}.",
        "",
        "```",
        launched_command(),
        "```",
        "",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(settings).items()) + ".",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()) + ".",
    ]
    write_card(output_dir, lambda: "\n".join(map(printable, lines)) + "\n")


if __name__ == "__main__":
    run(main)

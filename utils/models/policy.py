"""The policy of preference optimisation: the trained parts of a contrastive model, its logits and its choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.methods.head import Head
from utils.methods.preferences import BatchLogits, PreferenceBatch, candidate_logits, retention_kl
from utils.models.encoders import ImageEncoder, TextEncoder
from utils.models.published import text_embed_dim
from utils.models.tokens import Tokens, fill_in, fill_up, read_prompts
from utils.models.zeroshot import ensemble, prompt_embeddings, refuse_non_finite_rows, to_pixel_values

TRAINABLE = ("head", "image", "all")

Embed = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]


class Policy(nn.Module):
    """Maps pictures and texts to embeddings by the trained parts; the frozen parts' embeddings are its inputs."""

    def __init__(
        self, image_encoder: ImageEncoder | None, text_encoder: TextEncoder | None = None, head: Head | None = None
    ) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder, self.head = image_encoder, text_encoder, head

    def forward(self, images: Tensor, texts: Tensor | Tokens) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in [0,1] or (N, D); tokens (T, P, L) or (T, P, D) -> (N, D), unit (T, D), float32."""
        image_embeds = self.embed_images(images)
        prompt_embeds: Any = texts if self.text_encoder is None else self.text_encoder(*texts)
        return image_embeds, ensemble(prompt_embeds if self.head is None else self.head(prompt_embeds))  # as folded

    def embed_images(self, images: Tensor) -> Tensor:
        """image_embeds (N, D), float32, not of unit length, for a constraint on distances."""
        image_embeds = images if self.image_encoder is None else self.image_encoder(images)
        return (image_embeds if self.head is None else self.head(image_embeds)).float()


class TextTable:
    """Embeddings of texts by the frozen text tower, (T, P, D). Each text is encoded once, when it first appears.

    ``per_prompt`` keeps the P prompts of a text apart, for a head that acts before the mean; else P = 1, the mean.
    """

    def __init__(
        self, clip: PreTrainedModel, processor: Any, templates: Sequence[str], device: torch.device, *, per_prompt: bool
    ) -> None:
        self.processor, self.templates, self.device = processor, list(templates), device
        self._clip, self._per_prompt = clip, per_prompt
        self._places: dict[str, int] = {}
        self._embeds = torch.empty(0, len(templates) if per_prompt else 1, text_embed_dim(clip), device=device)
        self._last: tuple[list[str], Tensor] = ([], self._embeds)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if list(texts) == self._last[0]:  # a typographic run asks for the same classes in every step
            return self._last[1]
        new = [text for text in dict.fromkeys(texts) if text not in self._places]
        if new:
            found = prompt_embeddings(self._clip, self.processor, new, self.templates, self.device)
            self._embeds = torch.cat([self._embeds, found if self._per_prompt else ensemble(found)[:, None]])
            self._places.update({text: len(self._places) + place for place, text in enumerate(new)})
        self._last = (list(texts), self._embeds[[self._places[text] for text in texts]])
        return self._last[1]

    def tokens(self, texts: Sequence[str], templates: Sequence[str]) -> Tokens:
        """Token ids (T, P, L) of T texts in P templates, for a text tower that is trained."""
        config = self._clip.config
        rows = read_prompts(self.processor, config, fill_in(templates, texts))
        ids, mask = fill_up(rows, self.processor, config, self.device)
        sizes = (len(texts), len(templates))
        return Tokens(ids.unflatten(0, sizes), None if mask is None else mask.unflatten(0, sizes))


@dataclass
class Views:
    """Inputs and embeddings for the policy and its frozen reference; ``trainable`` is one of TRAINABLE."""

    reference: nn.Module  # pictures to embeddings (N, D)
    text_table: TextTable
    reference_text_table: TextTable
    logit_scale: float
    trainable: str

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 pixels (N, 3, H, W) to [0,1], or for a head to embeddings (N, D). Embeddings stay as they are."""
        if images.dtype != torch.uint8:
            return images.to(self.text_table.device)
        pixel_values = to_pixel_values(images, self.text_table.device)
        with torch.no_grad():
            return self.reference(pixel_values) if self.trainable == "head" else pixel_values

    def texts(self, texts: Sequence[str], template: int | None = None) -> Tensor | Tokens:
        """The policy's text inputs, in one template or in all: embeddings, or tokens for a trained text tower."""
        if self.trainable != "all":
            return self.text_table(texts)
        templates = self.text_table.templates
        return self.text_table.tokens(texts, templates if template is None else templates[template : template + 1])

    def by_policy(
        self, policy: nn.Module, inputs: Tensor, texts: Sequence[str], template: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """image_embeds (N, D), un-normalised, and unit text_embeds (T, D)."""
        return policy(inputs, self.texts(texts, template))

    @torch.no_grad()
    def by_reference(self, inputs: Tensor, texts: Sequence[str], template: int | None = None) -> tuple[Tensor, Tensor]:
        image_embeds = inputs if self.trainable == "head" else self.reference(inputs)
        prompt_embeds = self.reference_text_table(texts)
        if self.trainable == "all" and template is not None:
            prompt_embeds = prompt_embeds[:, template : template + 1]
        return image_embeds, ensemble(prompt_embeds)

    def logits(self, embeds: tuple[Tensor, Tensor], batch: dict[str, Any]) -> BatchLogits:
        return batch_logits(*unit_images(embeds), self.logit_scale, batch)

    def batch(self, loaded: dict[str, Any], template: int) -> PreferenceBatch:
        """A loader's batch on the device, with the reference's embeddings and logits."""
        inputs, device = self.inputs(loaded["images"]), self.text_table.device
        chosen, rejected = loaded["chosen"].to(device), loaded["rejected"].to(device)
        embeds = self.by_reference(inputs, loaded["texts"], template)
        return PreferenceBatch(inputs, chosen, rejected, embeds[0], self.logits(embeds, loaded))


def unit_images(embeds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return F.normalize(embeds[0], dim=-1), embeds[1]


def batch_logits(image_embeds: Tensor, text_embeds: Tensor, logit_scale: float, batch: dict[str, Any]) -> BatchLogits:
    """s * cos(I, T) for all rows of a batch, the regulariser's first, from unit embeddings (N, D) and (T, D)."""
    logits, num_reg = logit_scale * image_embeds @ text_embeds.T, len(batch["reg_chosen"])
    masks = (
        None if mask is None else mask.to(logits.device) for mask in (batch["reg_candidates"], batch["candidates"])
    )
    return BatchLogits(*map(candidate_logits, (logits[:num_reg], logits[num_reg:]), masks))


@torch.no_grad()
def choices(logits: BatchLogits, ref_logits: BatchLogits | None, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The policy's choices, on the CPU: clean and kl for the regulariser's rows, the others for the preferences.

    clean: the right text is the likeliest (rows without a right text are left out); chosen: the chosen text is the
    likeliest candidate; rejected: a rejected text is the likeliest; pair: the chosen text beats every rejected one.
    """
    device = logits.pairs.device
    reg_chosen, chosen, rejected = (batch[name].to(device) for name in ("reg_chosen", "chosen", "rejected"))
    labelled = reg_chosen >= 0
    likeliest = logits.pairs.argmax(dim=-1, keepdim=True) if logits.pairs.numel() else chosen[:, None]
    rejected_logits = logits.pairs.gather(1, rejected.clamp_min(0)).masked_fill(rejected < 0, float("-inf"))
    found = {
        "clean": (logits.reg.argmax(dim=-1) == reg_chosen)[labelled] if len(reg_chosen) else labelled,
        "chosen": likeliest[:, 0] == chosen,
        "rejected": (likeliest == rejected).any(dim=-1),
        "pair": logits.pairs.gather(1, chosen[:, None])[:, 0] > rejected_logits.max(dim=-1).values,
    }
    if ref_logits is not None:
        found["kl"] = retention_kl(ref_logits.reg, logits.reg)
    return {name: values.cpu() for name, values in found.items()}


def row_names(batch: dict[str, Any]) -> list[str]:
    """The sample key of every row of an evaluation batch, the regulariser's rows first."""
    keys = dict(zip(batch["sample_positions"], batch["keys"]))
    return [keys[position] for position in (*batch["reg_positions"].tolist(), *batch["positions"].tolist())]


@torch.no_grad()
def judge(
    batches: Iterable[dict[str, Any]], embed: Embed, ref_embed: Embed | None, logit_scale: float
) -> dict[str, list[tuple[int, Any]]]:
    """``choices`` over an evaluation loader's batches: name -> [(position, value), ...] of this process's rows.

    ``embed`` maps (images from the loader, texts) to unit embeddings; ``ref_embed`` is the reference's, or None.
    """

    def logits_of(batch: dict[str, Any], embed: Embed, what: str) -> BatchLogits:
        image_embeds, text_embeds = embed(batch["images"], batch["texts"])
        # Normalising a vector whose length overflows float32 gives zeros: make them NaN.
        lengths = image_embeds.norm(dim=-1, keepdim=True)
        refuse_non_finite_rows(image_embeds / lengths, row_names(batch), what)
        return batch_logits(image_embeds, text_embeds, logit_scale, batch)

    rows: dict[str, list[tuple[int, Any]]] = {}
    for batch in batches:
        images = batch["images"]
        if not len(images):  # a process without images embeds a black one: under ZeRO-3 all must encode equally often
            for function in filter(None, (embed, ref_embed)):
                function(images.new_zeros(1, *images.shape[1:]), batch["texts"] or [""])
            continue
        logits = logits_of(batch, embed, "embeddings")
        ref_logits = None if ref_embed is None else logits_of(batch, ref_embed, "embeddings by the reference")
        labelled = batch["reg_positions"][batch["reg_chosen"] >= 0]
        for name, values in choices(logits, ref_logits, batch).items():
            positions = {"clean": labelled, "kl": batch["reg_positions"]}.get(name, batch["positions"])
            rows.setdefault(name, []).extend(zip(positions.tolist(), values.tolist()))
    return rows

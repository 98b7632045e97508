"""Texts to the token ids that a text tower reads: cut, ended and padded as in the tower's training.

A tokenizer's files may ask for padding on the left, or set no maximal length. Here the tower decides: texts are cut to
its number of positions and keep their end token; padding is on the right. The tokenizer itself is not changed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from utils.errors import UserError

logger = logging.getLogger(__name__)

SIGLIP2_LENGTH = 64  # fixed in transformers' processor, whatever the tokenizer says
WORDS = 20  # of the vocabulary, to check that the tokenizer finds them
OWN_FILES = "put the model's own tokenizer files beside config.json"
SHORTEST = 3  # one token between a start and an end
ARGMAX_EOS = 2  # eos_token_id in CLIP configs before 2023: the tower pools the token with the highest id
CLIP = "clip_text_model"
# Towers that pool their first token, by a pooler, and see all others: padding has to be masked.
BERTS = ("albert", "bert", "camembert", "mpnet", "roberta", "xlm-roberta")
LATE_POSITIONS = ("camembert", "mpnet", "roberta", "xlm-roberta")  # the first is the one after pad_token_id
# Pairs of words in several scripts, equal in letters and bytes. A tokenizer that tells a pair apart knows the script.
PROBES = (("cat", "dog"), ("猫", "犬"), ("кот", "пёс"), ("قط", "بط"))

_said: set[str] = set()  # notes already printed by this process: each one only once


class Tokens(NamedTuple):
    input_ids: Tensor  # (..., L) int64
    attention_mask: Tensor | None = None  # (..., L) int64, 0 for padding; None if the tower needs no mask


def fill_in(templates: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The T * P prompts of T texts in P templates, text by text."""
    return [template.replace("{c}", text) for text in texts for template in templates]


def read_prompts(processor: Any, config: PreTrainedConfig, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of every prompt, cut to the tower's length with a note. Raises ``UserError`` for ids that it lacks."""
    tokenizer, size = processor.tokenizer, config.text_config.vocab_size
    length = text_length(tokenizer, config)
    rows = token_ids(tokenizer, prompts)
    long = [place for place, ids in enumerate(rows) if len(ids) > length]
    if long:
        line = f"{len(long)} of {len(prompts)} texts are longer than the {length} tokens that the text tower takes"
        end = f"the longest has {max(map(len, rows))}; their ends are left out, the first is {prompts[long[0]][:80]!r}"
        _say_once("long", f"{line}, {end} (said once)")
        rows = _cut(rows, length, tokenizer)
    for prompt, ids in zip(prompts, rows):
        if max(ids, default=0) >= size:
            fault = f"{prompt[:80]!r}: token {max(ids)} of a text tower of {size} (vocab_size)"
            raise UserError(f"{fault}; the tokenizer is another model's, {OWN_FILES}")
        if config.text_config.model_type == CLIP and _end(ids, config) in ids[:-1]:
            _say_once("end", f"{prompt[:80]!r}: holds the token that ends a text, and is read up to there (said once)")
    return rows


def fill_up(rows: Sequence[list[int]], processor: Any, config: PreTrainedConfig, device: torch.device | str) -> Tokens:
    """Ids (n, L) with padding on the right, on ``device``.

    CLIP's towers pool the end of text and do not look ahead: pad to the longest. SigLIP pools the last position: pad to
    the full length, visible as in its training, unless the tokenizer's file asks for masks. ``BERTS`` get a mask.
    """
    tokenizer, width = processor.tokenizer, max(map(len, rows), default=1)
    if _is_siglip(config):
        padding, width = tokenizer.pad_token_id, text_length(tokenizer, config)
        masked = "attention_mask" in tokenizer.init_kwargs.get("model_input_names", ())
    elif is_bert(config):
        padding, masked = 0, True  # any id: the mask hides it
    else:
        # Pad with the end token: the tower pools its first occurrence, or for ``ARGMAX_EOS`` the highest id.
        padding, masked = max((_end(ids, config) for ids in rows), default=0), False
    input_ids = torch.full((len(rows), width), padding, dtype=torch.int64)
    for row, ids in zip(input_ids, rows):
        row[: len(ids)] = torch.tensor(ids)
    mask = None
    if masked:
        lengths = torch.tensor([len(ids) for ids in rows], dtype=torch.int64)
        mask = (torch.arange(width) < lengths[:, None]).long().to(device)
    return Tokens(input_ids.to(device), mask)


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of every prompt, with start and end, neither cut nor padded. The tokenizer's settings do not change."""
    if tokenizer.init_kwargs.get("do_lower_case"):  # transformers ignores this for SigLIP 2's tokenizer
        small, large = _plain_ids(tokenizer, [PROBES[0][0], PROBES[0][0].upper()])
        prompts = prompts if small == large else [prompt.lower() for prompt in prompts]
    return _plain_ids(tokenizer, prompts)


def _plain_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    if not prompts:
        return []
    backend: Any = getattr(tokenizer, "_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    try:
        return tokenizer(list(prompts), padding=False, truncation=False, verbose=False)["input_ids"]
    finally:  # the settings are saved with the model
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def text_length(tokenizer: Any, config: PreTrainedConfig) -> int:
    """How many tokens of a text the tower reads: its positions, or fewer if the tokenizer's file says so."""
    text = config.text_config
    positions = text.max_position_embeddings
    if text.model_type == "siglip2_text_model":
        return min(positions, SIGLIP2_LENGTH)
    if text.model_type in LATE_POSITIONS:
        positions -= 1 + (1 if text.model_type == "mpnet" else text.pad_token_id)  # an MPNet does not ask its config
    return int(min(positions, tokenizer.model_max_length))  # 1e30 if the file says nothing


def check_tokenizer(tokenizer: Any, config: PreTrainedConfig) -> None:
    """Raises ``ValueError`` if a tokenizer cannot belong to the model's text tower."""
    text, length, known = config.text_config, text_length(tokenizer, config), len(tokenizer)
    if length < SHORTEST:
        cut = f"cuts texts at {length} tokens (model_max_length)"
        raise ValueError(f"its tokenizer {cut}; correct tokenizer_config.json")
    vocabulary = tokenizer.get_vocab()
    special = {*getattr(tokenizer, "added_tokens_decoder", ()), *tokenizer.all_special_ids}
    ordinary = max(set(vocabulary.values()) - special, default=0)
    probes = [_cut(token_ids(tokenizer, pair), length, tokenizer) for pair in PROBES]
    if all(first == second for first, second in probes):
        fault = f"gives different texts the same tokens {PROBES[0]}, it knows {known} tokens"
        raise ValueError(f"its tokenizer {fault}; files are missing, damaged or another model's: {OWN_FILES}")
    texts = [ids for pair in probes for ids in pair]
    largest = max(ordinary, *(max(ids, default=0) for ids in texts))
    if largest >= text.vocab_size or known < text.vocab_size / 2:
        fault = f"its tokenizer knows {known} tokens, the largest id is {largest}, its text tower {text.vocab_size}"
        raise ValueError(f"{fault} (vocab_size); it is another model's: {OWN_FILES}")
    # CLIP's vocabulary marks the ends of words, which shows the whole words in it.
    words = [word for word in vocabulary if re.fullmatch("[a-z]{3,}</w>", word)][:WORDS]
    spelt = token_ids(tokenizer, [word.removesuffix("</w>") for word in words])
    if words and not any(vocabulary[word] in ids for word, ids in zip(words, spelt)):
        fault = f"a {type(tokenizer).__name__}, spells words that its vocabulary has, such as {words[0][:-4]!r}"
        raise ValueError(f"its tokenizer, {fault}; its class or its merges are another model's: {OWN_FILES}")
    if _is_siglip(config):
        if tokenizer.pad_token_id is None or not 0 <= tokenizer.pad_token_id < text.vocab_size:
            fault = f"has no pad_token among the {text.vocab_size} tokens of its text tower, which sees its padding"
            raise ValueError(f"its tokenizer {fault}; name the one of its training in tokenizer_config.json")
        return
    if is_bert(config):
        start = tokenizer.cls_token_id
        if start is None or any(ids[:1] != [start] for ids in texts):
            begun = f"its tokenizer begins {PROBES[0][0]!r} with ids {texts[0][:1]}, its cls_token is {start}"
            raise ValueError(f"its text tower pools the first token, and {begun}; {OWN_FILES}")
        return
    old = text.eos_token_id == ARGMAX_EOS
    for ids in texts:
        wanted, last = max([ordinary, *ids]) if old else text.eos_token_id, ids[-1] if ids else None
        if last != wanted:
            pooled = f"id {wanted} (eos_token_id {text.eos_token_id} in config.json)"
            fault = f"its text tower pools the end of text, {pooled}, and its tokenizer ends texts with id {last}"
            raise ValueError(f"{fault}; {OWN_FILES}, or correct eos_token_id")
    # Old configs also name a wrong start token. No tower uses it, so this is only a note.
    start, first = tokenizer.bos_token_id if old else text.bos_token_id, texts[0][0]
    if isinstance(start, int) and start < text.vocab_size and first != start:
        line = f"the tokenizer begins texts with id {first}, the model's start is {start} (bos_token_id)"
        _say_once("start", f"{line}; unless it was trained so, the tokenizer's files are not its own")


def refuse_equal_texts(processor: Any, config: PreTrainedConfig, texts: Sequence[str], template: str) -> None:
    """Raises ``UserError`` for names that are equal when cut, or in unknown letters. Equal tokens are noted once."""
    tokenizer, length = processor.tokenizer, text_length(processor.tokenizer, config)
    names = list(dict.fromkeys(texts))
    found = token_ids(tokenizer, fill_in([template], names))
    seen: dict[tuple[int, ...], int] = {}
    places = [seen.setdefault(tuple(ids), place) for place, ids in enumerate(_cut(found, length, tokenizer))]
    equal = [(first, place) for place, first in enumerate(places) if first != place]
    if not equal:
        return
    first, second = next((pair for pair in equal if found[pair[0]] != found[pair[1]]), equal[0])
    shown = f"the classes {names[first][:80]!r} and {names[second][:80]!r} are the same"
    more = f" ({len(equal)} such names)" if len(equal) > 1 else ""
    if found[first] != found[second]:
        raise UserError(f"{shown} text to the model, which reads {length} tokens{more}; shorten names or templates")
    end = -1 if config.text_config.model_type == CLIP else None  # CLIP's unknown token is its end token
    alone = token_ids(tokenizer, [names[first], names[second]])
    unknown = any(tokenizer.unk_token_id in ids[:end] for ids in alone)
    if unknown or len(seen) == 1:
        why = "whose tokenizer does not know their letters" if unknown else "and so are all others"
        raise UserError(f"{shown} tokens to the model, {why}{more}; give names in a language of the model")
    _say_once(shown, f"{shown} tokens to the model{more}: it cannot tell them apart")


def _cut(rows: Sequence[list[int]], length: int, tokenizer: Any) -> list[list[int]]:
    """At most ``length`` ids of each row; the end token, if the tokenizer adds one, stays last."""
    empty, probe = token_ids(tokenizer, ["", PROBES[0][0]])
    end = empty[-1:] if empty[-1:] == probe[-1:] else []
    return [ids if len(ids) <= length else [*ids[: length - len(end)], *end] for ids in rows]


def is_bert(config: PreTrainedConfig) -> bool:
    """Whether the text tower is one of ``BERTS``."""
    return config.text_config.model_type in BERTS


def _is_siglip(config: PreTrainedConfig) -> bool:
    return config.text_config.model_type.startswith("siglip")


def _end(ids: list[int], config: PreTrainedConfig) -> int:
    """The id whose first occurrence CLIP's tower pools."""
    end = config.text_config.eos_token_id
    return max(ids) if end == ARGMAX_EOS else end


def _say_once(kind: str, line: str) -> None:
    if kind not in _said:
        _said.add(kind)
        logger.warning(line)

"""open_clip's layout: names and bits both ways, configs both ways, embeddings as from a forward written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, PreTrainedConfig

from tests.published_layouts import RandomWeights, text_forward, vit_forward
from tests.small_models import photos
from utils.models.open_clip import (
    CONVNEXTS,
    HARMLESS,
    State,
    holds_text,
    in_open_clip_names,
    is_of_openai,
    is_true,
    model_class,
    openai_model,
    text_prefix,
    tidy_names,
    to_config,
    to_model,
    to_open_clip,
    to_transformers,
)

VOCABULARY = 529
KINDS = ("vit", "convnext")
TINY_CONVNEXT = "convnext_of_the_tests"
TEXT = {"context_length": 77, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "embed_dim": 20,
        "quick_gelu": True,
        "vision_cfg": {
            **{"image_size": 32, "layers": 3, "width": 48, "head_width": 24, "patch_size": 8},
            "mlp_ratio": 100.5 / 48,
        },
        "text_cfg": TEXT,
    },
    "convnext": {
        "embed_dim": 20,
        "vision_cfg": {"timm_model_name": TINY_CONVNEXT, "timm_pool": "", "timm_proj": "linear", "image_size": 64},
        "text_cfg": TEXT,
    },
}


@pytest.fixture(autouse=True)
def tiny_convnext(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ConvNeXt of few weights among timm's."""
    monkeypatch.setitem(CONVNEXTS, TINY_CONVNEXT, ((1, 2, 1, 1), (8, 12, 16, 24)))
    monkeypatch.setitem(HARMLESS["vision_cfg"], "timm_model_name", tuple(CONVNEXTS))


def random_state(kind: str, prefix: str = "", seed: int = 0) -> State:
    """Random weights of ``MODELS[kind]`` under open_clip's names."""
    weights = RandomWeights(seed)
    if kind == "vit":
        weights.vit(width=48, depth=3, hidden=100, image_size=32, patch_size=8, embed_dim=20)
    else:
        draw_convnext(weights)
    weights.text(prefix, vocab_size=VOCABULARY, width=32, depth=2, hidden=128, embed_dim=20)
    weights.state["logit_scale"] = torch.tensor(3.21)
    return weights.state


def draw_convnext(weights: RandomWeights) -> None:
    depths, sizes = CONVNEXTS[TINY_CONVNEXT]
    weights.linear("visual.trunk.stem.0", sizes[0], 3, 4, 4)
    weights.norm("visual.trunk.stem.1", sizes[0])
    for stage, (size, depth) in enumerate(zip(sizes, depths)):
        if stage:
            weights.norm(f"visual.trunk.stages.{stage}.downsample.0", sizes[stage - 1])
            weights.linear(f"visual.trunk.stages.{stage}.downsample.1", size, sizes[stage - 1], 2, 2)
        for number in range(depth):
            block = f"visual.trunk.stages.{stage}.blocks.{number}"
            weights.draw(f"{block}.gamma", size, scale=0.3, mean=0.5)
            weights.linear(f"{block}.conv_dw", size, 1, 7, 7)
            weights.norm(f"{block}.norm", size)
            weights.linear(f"{block}.mlp.fc1", 4 * size, size)
            weights.linear(f"{block}.mlp.fc2", size, 4 * size)
    weights.norm("visual.trunk.head.norm", sizes[-1])
    weights.draw("visual.head.proj.weight", 20, sizes[-1])


def convnext_forward(state: State, images: Tensor) -> Tensor:
    """open_clip's ConvNeXt tower, from its state dict and torch alone."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = F.layer_norm(x.movedim(1, -1), x.shape[1:2], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)
        return x.movedim(-1, 1)

    def both(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    trunk = "visual.trunk"
    x = norm(F.conv2d(images, *both(f"{trunk}.stem.0"), stride=4), f"{trunk}.stem.1")
    for stage, depth in enumerate(CONVNEXTS[TINY_CONVNEXT][0]):
        if stage:
            x = norm(x, f"{trunk}.stages.{stage}.downsample.0")
            x = F.conv2d(x, *both(f"{trunk}.stages.{stage}.downsample.1"), stride=2)
        for number in range(depth):
            block = f"{trunk}.stages.{stage}.blocks.{number}"
            y = F.conv2d(x, *both(f"{block}.conv_dw"), padding=3, groups=x.shape[1])
            y = norm(y, f"{block}.norm").movedim(1, -1)
            y = F.linear(F.gelu(F.linear(y, *both(f"{block}.mlp.fc1"))), *both(f"{block}.mlp.fc2"))
            x = x + (state[f"{block}.gamma"] * y).movedim(-1, 1)
    return F.linear(norm(x.mean(dim=(2, 3)), f"{trunk}.head.norm"), state["visual.head.proj.weight"])


def token_ids() -> Tensor:
    """Four texts of different length in open_clip's manner: start, words, end of text, then zeros."""
    ids = torch.zeros(4, 77, dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)
    for row, length in enumerate((1, 5, 30, 75)):
        ids[row, 1 : 1 + length] = torch.randint(1, VOCABULARY - 2, (length,), generator=generator)
        ids[row, 0], ids[row, 1 + length] = VOCABULARY - 2, VOCABULARY - 1
    return ids


def build(config: PreTrainedConfig, state: State) -> Any:
    model = model_class(config)(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def same(one: State, other: State) -> bool:
    """Whether two state dicts are equal in names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mapping_and_its_inverse_keep_every_bit(kind: str, prefix: str) -> None:
    state, config = random_state(kind, prefix), to_config(MODELS[kind])
    assert text_prefix(state) == prefix
    converted = to_transformers(state, config, "here")
    assert sorted(converted) == sorted(build(config, converted).state_dict())
    back = to_open_clip(converted, config, prefix=prefix)
    assert same(back, state)
    assert same(to_transformers(back, config, "here"), converted)
    assert all(tensor.is_contiguous() for tensor in (*converted.values(), *back.values()))


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_embeds_as_open_clip_does(kind: str, prefix: str) -> None:
    state, config, fields = random_state(kind, prefix), to_config(MODELS[kind]), MODELS[kind]
    activation = "quick_gelu" if fields.get("quick_gelu") else "gelu"
    model = build(config, to_transformers(state, config, "here"))
    images = 2 * photos(3, fields["vision_cfg"]["image_size"]) - 1
    with torch.no_grad():
        image_embeds = model.get_image_features(images).pooler_output
        text_embeds = model.get_text_features(token_ids()).pooler_output
    expected = vit_forward(state, images, 2, activation) if kind == "vit" else convnext_forward(state, images)
    expected_text = text_forward(state, token_ids(), 4, activation, prefix)
    assert (image_embeds - expected).norm() < 1e-5 * expected.norm()
    assert (text_embeds - expected_text).norm() < 1e-5 * expected_text.norm()
    assert model.logit_scale.item() == state["logit_scale"].item()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_kept_and_buffers_are_left_out(kind: str) -> None:
    state, config = {name: value.half() for name, value in random_state(kind).items()}, to_config(MODELS[kind])
    buffers = {"attn_mask": torch.zeros(77, 77), "text.attn_mask": torch.zeros(77, 77)}
    buffers |= {name: torch.tensor(32) for name in ("input_resolution", "context_length", "vocab_size")}
    tidy = tidy_names(state | buffers)
    assert same(tidy, state)
    converted = to_transformers(tidy, config, "here")
    assert {tensor.dtype for tensor in converted.values()} == {torch.float16}
    assert same(to_open_clip(converted, config), state)


@pytest.mark.parametrize("prefixes", ["module.", "model.", "module.model.", "module.visual.", "model.visual.", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_tower_is_known_under_each_of_its_names(kind: str, prefixes: str) -> None:
    state = {name: value for name, value in random_state(kind).items() if name.startswith("visual.")}
    alone = {prefixes + name.removeprefix("visual."): value for name, value in state.items()}
    tidy = tidy_names(alone)
    assert same(tidy, state)
    assert in_open_clip_names(tidy)
    assert not holds_text(tidy)
    config = to_config(MODELS[kind])
    converted = to_transformers(tidy, config, "here")
    assert {name.split(".")[0] for name in converted} == {"vision_model", "visual_projection"}
    whole = to_transformers(random_state(kind), config, "here")
    assert same(converted, {name: whole[name] for name in converted})


@pytest.mark.parametrize("prefix", ["", "text."])
def test_a_form_gives_names_dtypes_and_shapes(prefix: str) -> None:
    """As the file had them that the model was loaded from, with a scale of another shape and some halves."""
    config, state = to_config(MODELS["vit"]), random_state("vit", prefix)
    halves = {name for name in state if "resblocks.1" in name}
    file = {name: value.half() if name in halves else value for name, value in state.items()}
    file["logit_scale"] = file["logit_scale"].reshape(1)
    loaded = {name: value.float() for name, value in to_transformers(file, config, "here").items()}
    form = {name: value.to("meta") for name, value in file.items()}
    assert same(to_open_clip(loaded, config, form), file)
    # An image tower's form says nothing of the texts, which are written as they are.
    of_tower = {name: value for name, value in form.items() if name.startswith("visual.")}
    plain = to_open_clip(loaded, config)
    expected = {name: file[prefix * (name not in state) + name] for name in plain}
    expected = {name: value if name.startswith("visual.") else plain[name] for name, value in expected.items()}
    assert same(to_open_clip(loaded, config, of_tower), expected)
    # Other names for the text tower leave all else of the form.
    named = {name if name in random_state("vit", "text.") else f"text.{name}": value for name, value in file.items()}
    assert same(to_open_clip(loaded, config, form, "text."), named)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("vit", {"visual.ln_pre.bias": None}, "lacks visual.ln_pre.bias, which a CLIP with a ViT of its config has"),
        ("vit", {"visual.transformer.resblocks.1.ln_2.weight": None, "logit_scale": None},
         "lacks logit_scale and 1 more"),
        ("vit", {"visual.transformer.resblocks.0.ls_1.gamma": (48,)},
         "holds visual.transformer.resblocks.0.ls_1.gamma, which is not in a CLIP with a ViT of its config"),
        ("vit", {"logit_bias": ()}, "holds logit_bias"),
        ("vit", {"visual.transformer.resblocks.2.attn.out_proj.weight": (48, 47)},
         "visual.transformer.resblocks.2.attn.out_proj.weight is (48, 47), (48, 48) in a CLIP"),
        ("vit", {"visual.transformer.resblocks.2.attn.in_proj_weight": (143, 48)},
         "visual.transformer.resblocks.2.attn.in_proj_weight is (143, 48), (144, 48)"),
        ("vit", {"visual.positional_embedding": (16, 48)}, "visual.positional_embedding is (16, 48), (17, 48)"),
        ("vit", {"visual.proj": (20, 48)}, "visual.proj is (20, 48), (48, 20)"),
        ("vit", {"logit_scale": (2,)}, "logit_scale is (2,), ()"),
        ("convnext", {"visual.head.proj.weight": None, "visual.head.mlp.fc1.weight": (9, 9)},
         "holds visual.head.mlp.fc1.weight, which is not in a CLIP with a ConvNeXt of its config"),
        ("convnext", {"visual.trunk.stages.1.blocks.1.gamma": None}, "lacks visual.trunk.stages.1.blocks.1.gamma"),
        ("convnext", {"visual.trunk.stem.0.weight": (8, 3, 2, 2)}, "is (8, 3, 2, 2), (8, 3, 4, 4)"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:60],
)  # fmt: skip
def test_what_is_not_converted_is_named_by_its_key(kind: str, change: dict[str, Any], words: str) -> None:
    state = random_state(kind)
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.zeros(shape)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        to_transformers(state, to_config(MODELS[kind]), "its config")
    assert words in str(caught.value)


def test_a_model_of_other_names_has_no_way_back() -> None:
    config = to_config(MODELS["vit"])
    converted = to_transformers(random_state("vit"), config, "here")
    with pytest.raises(ValueError, match=r"holds head\.weight, which is not in a model of its config\.json"):
        to_open_clip(converted | {"head.weight": torch.zeros(1)}, config)
    del converted["text_projection.weight"]
    with pytest.raises(ValueError, match=r"lacks text_projection\.weight"):
        to_open_clip(converted, config)


# -------------------------------------------------------------------------------------------------------------- configs


def clip_config(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> CLIPConfig:
    """Sizes as of OpenAI's ViT-L/14 with the changes; made as this project makes it of open_clip's fields."""
    of_l14 = {
        "embed_dim": 768,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14} | (vision or {}),
        "text_cfg": {"context_length": 77, "width": 768, "heads": 12, "layers": 12} | (text or {}),
    }
    return to_config(of_l14)


@pytest.mark.parametrize(
    "config",
    [
        lambda: to_config(MODELS["vit"]),
        lambda: to_config(MODELS["convnext"]),
        lambda: to_config(MODELS["convnext"] | {"quick_gelu": True}),
        clip_config,
        lambda: clip_config({"width": 1664, "head_width": 104, "mlp_ratio": 4.9231}, {"width": 1280, "heads": 20}),
        lambda: clip_config({"image_size": 336}, {"pool_type": "eos", "eos_id": 7, "vocab_size": 1000}),
        lambda: clip_config({"head_width": 80, "width": 1280}, {"mlp_ratio": 3.0}),
        *(lambda name=name: to_config(MODELS["convnext"] | {"vision_cfg": {"timm_model_name": name}})
          for name in CONVNEXTS),
    ],
    ids=["vit", "convnext", "convnext quick_gelu", "L/14", "bigG", "eos", "H", *CONVNEXTS],
)  # fmt: skip
def test_a_config_goes_there_and_back(config: Any) -> None:
    config = config()
    assert to_config(to_model(config)).to_dict() == config.to_dict()


def test_the_width_of_an_mlp_is_not_rounded_away() -> None:
    """480 / 352 * 352 is 479.99...: open_clip, which computes this, would make it 479."""
    assert int(352 * (480 / 352)) == 479
    config = clip_config({"width": 352, "head_width": 88}, {"width": 352, "heads": 4})
    config.vision_config.intermediate_size = config.text_config.intermediate_size = 480
    fields = to_model(config)
    assert [int(352 * fields[tower]["mlp_ratio"]) for tower in ("vision_cfg", "text_cfg")] == [480, 480]
    assert to_config(fields).to_dict() == config.to_dict()


def test_sizes_are_taken_from_the_fields() -> None:
    config = to_config(MODELS["vit"])
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (32, 8, 48, 3)
    assert (vision.num_attention_heads, vision.intermediate_size, config.projection_dim) == (2, 100, 20)
    assert (text.vocab_size, text.eos_token_id, text.num_hidden_layers, text.num_attention_heads) == (529, 528, 2, 4)
    assert {vision.hidden_act, text.hidden_act} == {"quick_gelu"}
    defaults = clip_config()
    assert (defaults.vision_config.num_attention_heads, defaults.vision_config.intermediate_size) == (16, 4096)
    assert (defaults.text_config.vocab_size, defaults.text_config.eos_token_id) == (49408, 49407)


@pytest.mark.parametrize(
    ("value", "activation"),
    [("TRUE", "quick_gelu"), ("true", "quick_gelu"), (True, "quick_gelu"), ("FALSE", "gelu"), ("False", "gelu"),
     (False, "gelu"), (None, "gelu"), ("", "gelu")],
)  # fmt: skip
def test_quick_gelu_is_true_or_false_in_any_writing(value: Any, activation: str) -> None:
    config = to_config(MODELS["vit"] | {"quick_gelu": value})
    assert {config.vision_config.hidden_act, config.text_config.hidden_act} == {activation}


def test_without_quick_gelu_the_activation_is_gelu_and_a_convnexts_is_in_any_case() -> None:
    fields = {name: value for name, value in MODELS["vit"].items() if name != "quick_gelu"}
    assert to_config(fields).vision_config.hidden_act == "gelu"
    dual = to_config(MODELS["convnext"] | {"quick_gelu": True})
    assert (dual.vision_config.hidden_act, dual.text_config.hidden_act) == ("gelu", "quick_gelu")


@pytest.mark.parametrize("value", [3, 1, 0, "yes", "1", [], {}])
def test_what_is_neither_true_nor_false_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"quick_gelu is .*; expected true or false"):
        is_true(value)


@pytest.mark.parametrize(
    ("kind", "place", "fields", "words"),
    [
        ("vit", "", {"init_logit_bias": -10}, "init_logit_bias is -10, which no CLIPModel does"),
        ("vit", "", {"multimodal_cfg": {"layers": 12}}, "multimodal_cfg is {'layers': 12}"),
        ("vit", "", {"quick_gelu": 3}, "quick_gelu is 3"),
        ("vit", "vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool is True"),
        ("vit", "vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type is 'avg'"),
        ("vit", "vision_cfg", {"ls_init_value": 1e-5}, "vision_cfg.ls_init_value is 1e-05"),
        ("vit", "vision_cfg", {"final_ln_after_pool": True}, "vision_cfg.final_ln_after_pool"),
        ("vit", "vision_cfg", {"no_ln_pre": True}, "vision_cfg.no_ln_pre"),
        ("vit", "vision_cfg", {"act_kwargs": {"approximate": "tanh"}}, "vision_cfg.act_kwargs"),
        ("vit", "vision_cfg", {"layers": [3, 4, 6, 3]}, "vision_cfg.layers is [3, 4, 6, 3], of a ResNet"),
        ("vit", "vision_cfg", {"image_size": [224, 336]}, "vision_cfg.image_size is [224, 336]"),
        ("vit", "vision_cfg", {"patch_size": 40}, "vision_cfg.patch_size does not divide"),
        ("vit", "vision_cfg", {"head_width": 9}, "vision_cfg.head_width does not divide the tower's 48"),
        ("vit", "text_cfg", {"pool_type": "last"}, "text_cfg.pool_type is 'last'"),
        ("vit", "text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask is True"),
        ("vit", "text_cfg", {"embed_cls": True}, "text_cfg.embed_cls is True"),
        ("vit", "text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name is 'roberta-base'"),
        ("vit", "text_cfg", {"proj_bias": True}, "text_cfg.proj_bias"),
        ("vit", "text_cfg", {"heads": 5}, "text_cfg.heads does not divide the tower's 32"),
        ("vit", "text_cfg", {"pool_type": "eos"}, "pooled at id 2"),
        ("convnext", "vision_cfg", {"timm_model_name": "convnext_xxlarge"}, "vision_cfg.timm_model_name"),
        ("convnext", "vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_224"}, "vision_cfg.timm_model_name"),
        ("convnext", "vision_cfg", {"timm_proj": "mlp"}, "vision_cfg.timm_proj is 'mlp'"),
        ("convnext", "vision_cfg", {"timm_pool": "map"}, "vision_cfg.timm_pool is 'map'"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_field_that_no_model_here_obeys_is_refused_by_its_name(
    kind: str, place: str, fields: dict[str, Any], words: str
) -> None:
    model = MODELS[kind] | ({place: MODELS[kind][place] | fields} if place else fields)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        to_config(model)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place, fields in HARMLESS.items() for name in fields if "timm" not in name]
)
def test_a_field_without_an_effect_is_read_over(place: str, name: str) -> None:
    for value in HARMLESS[place][name] or ("anything", 3):
        fields = {name: value}
        model = MODELS["vit"] | ({place: MODELS["vit"][place] | fields} if place else fields)
        assert to_config(model).to_dict() == to_config(MODELS["vit"]).to_dict()


@pytest.mark.parametrize(
    ("place", "name", "value", "words"),
    [
        ("vision_config", "layer_norm_eps", 1e-6, "the image tower's layer_norm_eps is 1e-06, open_clip's is 1e-05"),
        ("text_config", "layer_norm_eps", 1e-6, "the text tower's layer_norm_eps is 1e-06"),
        ("vision_config", "hidden_act", "gelu", "the image tower's hidden_act is gelu, open_clip's is quick_gelu"),
    ],
)
def test_a_model_that_open_clip_does_not_have_is_refused(place: str, name: str, value: Any, words: str) -> None:
    config = clip_config()
    setattr(getattr(config, place), name, value)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        to_model(config)
    assert words in str(caught.value)


def test_other_towers_have_no_way_back() -> None:
    config = clip_config()
    config.vision_config.hidden_act = config.text_config.hidden_act = "gelu_pytorch_tanh"
    with pytest.raises(ValueError, match="hidden_act is gelu_pytorch_tanh, open_clip's is gelu or quick_gelu"):
        to_model(config)
    config = to_config(MODELS["convnext"])
    config.vision_config.depths = [1, 2, 1, 2]
    with pytest.raises(ValueError, match=r"depths \(1, 2, 1, 2\) and widths \(8, 12, 16, 24\), of which timm has none"):
        to_model(config)


# --------------------------------------------------------------------------------------------------------- OpenAI's own


def openai_state() -> State:
    """The precisions and the widths of heads of OpenAI's: halves, but layer norms, positions and the scale."""
    weights = RandomWeights(0)
    weights.vit(width=128, depth=3, hidden=512, image_size=48, patch_size=16, embed_dim=40)
    weights.text("", vocab_size=600, width=64, depth=2, hidden=256, embed_dim=40)
    weights.state["logit_scale"] = torch.tensor(4.6)
    full = ("ln_", "positional_embedding", "token_embedding", "class_embedding", "logit_scale")
    state = weights.state
    return {name: value if any(part in name for part in full) else value.half() for name, value in state.items()}


def test_openais_sizes_are_read_from_the_shapes() -> None:
    state = openai_state()
    assert is_of_openai(state)
    config = to_config(openai_model(state))
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers) == (48, 16, 3)
    assert (vision.num_attention_heads, vision.intermediate_size, text.intermediate_size) == (2, 512, 256)
    assert (text.vocab_size, text.max_position_embeddings, text.num_hidden_layers) == (600, 77, 2)
    assert (text.num_attention_heads, config.projection_dim, vision.hidden_act) == (1, 40, "quick_gelu")
    assert len(to_transformers(state, config, "here")) > 90


def test_another_precision_is_not_openais() -> None:
    state = openai_state()
    assert not is_of_openai({name: value.float() for name, value in state.items()})
    assert not is_of_openai({name: value.half() for name, value in state.items()})
    assert not is_of_openai(state | {"visual.proj": state["visual.proj"].float()})
    assert not is_of_openai({})


def test_shapes_that_are_none_of_openais_are_named() -> None:
    state = openai_state()
    with pytest.raises(ValueError, match="has 8 patches; expected a square of patches"):
        openai_model(state | {"visual.positional_embedding": torch.zeros(9, 128)})
    with pytest.raises(ValueError, match="the image tower is 100 wide, which heads of 64 do not share evenly"):
        openai_model(state | {"visual.conv1.weight": torch.zeros(100, 3, 16, 16)})
    with pytest.raises(KeyError):
        openai_model({"visual.conv1.weight": state["visual.conv1.weight"]})

"""Layers that take transformers' place: the same values and gradients, and less kept for the backward pass."""

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.activations import QuickGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.small_models import photos
from utils.models.encoders import (
    Float32PatchEmbedding,
    ImageEncoder,
    QuickGELU,
    RoundedLayerNorm,
    attention,
    use_lean_layers,
)
from utils.training.memory import LiveBytes

CONFIG = CLIPVisionConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
    projection_dim=24, hidden_act="quick_gelu",
)  # fmt: skip


def with_class(module: nn.Module, new: type) -> nn.Module:
    """A copy of the module in another class, as ``use_lean_layers`` changes it."""
    lean = copy.deepcopy(module)
    lean.__class__ = new
    return lean


def gradients(module: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the inputs and of the parameters of a weighted sum of the outputs."""
    inputs = inputs.clone().requires_grad_()
    output = module(inputs)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    found = torch.autograd.grad((weights * output.float()).sum(), [inputs, *module.parameters()])
    return [output, *found]


@pytest.mark.parametrize("size", [(32, 32), (35, 45)])
@pytest.mark.parametrize("options", [{"stride": 8}, {"stride": 8, "bias": False}])
def test_a_patch_embedding_is_the_convolution(size, options):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 16, 8, **options)
    images = torch.randn(2, 3, *size)
    lean = with_class(plain, Float32PatchEmbedding)
    for expected, found in zip(gradients(plain, images), gradients(lean, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lean(images), plain(images).float(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lean(images), lean(images.clone()), rtol=0, atol=0)
        assert lean(images).dtype == torch.float32


@pytest.mark.parametrize("options", [{"stride": 4}, {"stride": 8, "padding": 2}])
def test_other_convolutions_stay_as_they_are(options):
    convolution = nn.Conv2d(3, 16, 8, **options)
    use_lean_layers(convolution)
    assert type(convolution) is nn.Conv2d


def test_quick_gelu_is_quick_gelu():
    values = torch.linspace(-30, 30, 10001)
    for expected, found in zip(gradients(QuickGELUActivation(), values), gradients(QuickGELU(), values), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    kept = []
    for activation in (QuickGELUActivation(), QuickGELU()):
        leaf = values.clone().requires_grad_()
        with LiveBytes() as tensors:
            output = activation(2 * leaf)
        kept.append(tensors.live - output.nbytes)
    assert kept == [2 * values.nbytes, values.nbytes]


def test_a_layer_norm_is_rounded_once_to_what_autocast_would_round_it_to():
    torch.manual_seed(0)
    plain = nn.LayerNorm(64)
    nn.init.normal_(plain.weight)
    lean = with_class(plain, RoundedLayerNorm)
    hidden = torch.randn(5, 64)
    torch.testing.assert_close(lean(hidden), plain(hidden), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lean(hidden), plain(hidden).bfloat16(), rtol=0, atol=0)


def test_attention_in_bfloat16_is_as_exact_as_torchs():
    torch.manual_seed(0)
    exact = [torch.randn(2, 4, 17, 32, dtype=torch.float64) for _ in range(3)]
    weights = torch.randn(2, 17, 4, 32, dtype=torch.float64)

    def run(function, dtype):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in exact]
        output, _ = function(nn.Module(), *inputs, None, scaling=0.2, is_causal=False)
        return [output, *torch.autograd.grad((weights * output).sum(), inputs)]

    expected = run(sdpa_attention_forward, torch.float64)
    theirs, ours = (run(function, torch.bfloat16) for function in (sdpa_attention_forward, attention))
    for true, other, found in zip(expected, theirs, ours, strict=True):
        error, other_error = ((tensor.double() - true).norm() for tensor in (found, other))
        assert error < 1.5 * other_error  # the scores are rounded before the softmax, as transformers' "eager" does
        assert error < 0.02 * true.norm()
    for found, same in zip(run(attention, torch.float32), run(sdpa_attention_forward, torch.float32), strict=True):
        torch.testing.assert_close(found, same, rtol=0, atol=0)


def test_attention_without_a_scaling_takes_torchs():
    query, key, value = (torch.randn(1, 2, 5, 16).bfloat16() for _ in range(3))
    found, _ = attention(nn.Module(), query, key, value, None)
    expected, _ = attention(nn.Module(), query, key, value, None, scaling=0.25)
    assert torch.equal(found, expected)


def test_a_lean_tower_has_the_same_parameters_values_and_gradients():
    torch.manual_seed(0)
    plain = CLIPVisionModelWithProjection(CONFIG)
    lean = copy.deepcopy(plain)
    names = list(lean.state_dict())
    encoder = ImageEncoder(lean.vision_model, lean.visual_projection, 32, [0.0] * 3, [1.0] * 3)
    assert list(lean.state_dict()) == names
    kinds = [type(module) for module in encoder.modules()]
    assert [kinds.count(kind) for kind in (Float32PatchEmbedding, QuickGELU, RoundedLayerNorm)] == [1, 3, 6]
    assert kinds.count(nn.LayerNorm) == 2  # before and after the blocks
    images = photos(4)
    expected, found = plain(images).image_embeds, encoder(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    scale = max(parameter.grad.abs().max().item() for parameter in plain.parameters())
    for (name, one), other in zip(plain.named_parameters(), lean.parameters(), strict=True):
        assert (other.grad - one.grad).abs().max() < 1e-5 * scale, name


def test_the_saved_config_does_not_know(tmp_path):
    model = CLIPVisionModelWithProjection(CONFIG)
    model.save_pretrained(tmp_path / "before")
    use_lean_layers(model)
    ImageEncoder(model.vision_model, model.visual_projection, 32, [0.0] * 3, [1.0] * 3)
    model.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "config.json").read_text() for name in ("before", "after"))
    assert after == before


def test_a_forward_keeps_less_for_its_backward_pass():
    """Per image, beside transformers' layers under the same autocast: quick_gelu's and the norms' copies are gone."""
    slopes = []
    for lean in (False, True):
        model = CLIPVisionModelWithProjection(CONFIG)
        encoder = torch.autocast("cpu", torch.bfloat16)(model)
        if lean:
            encoder = ImageEncoder(
                model.vision_model, model.visual_projection, 32, [0.0] * 3, [1.0] * 3, torch.bfloat16
            )
        kept = []
        for count in (8, 16):
            images = photos(count)
            with LiveBytes() as tensors:
                output = encoder(images)
                kept.append(tensors.live)
            del output
        slopes.append((kept[1] - kept[0]) / 8)
    assert slopes[1] < 0.85 * slopes[0]

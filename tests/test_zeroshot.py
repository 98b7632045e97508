import pytest
import torch
from PIL import Image

from tests.small_models import photos, small_encoder
from utils.cli import UserError
from utils.encoders import load_clip
from utils.losses import class_logits
from utils.zeroshot import class_embeddings, find_classes, predictions, read_classnames, read_templates

NAMES = ["cat", "dog", "fire truck"]


def test_one_template_gives_clips_own_logits(small_clip):
    clip, processor = load_clip(str(small_clip))
    images = (photos(4) * 255).round().byte()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    prompts = [f"a photo of a {name}." for name in NAMES]
    inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = clip(**inputs).logits_per_image
        embeds = class_embeddings(clip, processor, NAMES, ["a photo of a {c}."])
        found = class_logits(small_encoder(small_clip)(images.float() / 255), embeds, float(clip.logit_scale.exp()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_class_embedding_is_the_unit_mean_over_templates(small_clip):
    clip, processor = load_clip(str(small_clip))
    templates = ["a photo of a {c}.", "a drawing of the {c}", "{c}"]
    single = [class_embeddings(clip, processor, NAMES, [template]) for template in templates]
    mean = torch.stack(single).mean(0)
    found = class_embeddings(clip, processor, NAMES, templates, batch_size=2)
    torch.testing.assert_close(found, mean / mean.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))


def test_predictions_do_not_depend_on_the_batch_size_and_attacks_lower_them(small_clip):
    clip, processor = load_clip(str(small_clip))
    encoder, embeds = small_encoder(small_clip), class_embeddings(clip, processor, NAMES, ["{c}"])
    images = (photos(24) * 255).round().byte()
    with torch.no_grad():
        labels = class_logits(encoder(images.float() / 255), embeds, 1.0).argmax(-1)
    labels[0] = (labels[0] + 1) % 3  # one that is wrong from the start

    def batches(size):
        for first in range(0, 24, size):
            positions = torch.arange(first, min(24, first + size))
            yield {"images": images[positions], "labels": labels[positions], "positions": positions}

    device = torch.device("cpu")
    positions, correct = predictions(encoder, batches(24), embeds, 10.0, device=device)
    assert positions.tolist() == list(range(24))
    assert correct.tolist() == [False] + [True] * 23
    attacked = [predictions(encoder, batches(size), embeds, 10.0, device=device, eps=8 / 255) for size in (24, 7, 1)]
    empty = {"images": images[:0], "labels": labels[:0], "positions": torch.arange(0)}
    positions, correct = predictions(encoder, [empty, *batches(24), empty], embeds, 10.0, device=device, eps=8 / 255)
    assert positions.tolist() == list(range(24))
    assert correct.equal(attacked[0][1])
    assert attacked[0][1].sum() < 23
    assert all(attacked[0][1].equal(other) for _, other in attacked[1:])


def test_class_files_are_found_beside_the_shards_or_above(tmp_path):
    shard = str(tmp_path / "set" / "test" / "0.tar")
    (tmp_path / "set" / "test").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--eval_shards: no classnames.txt beside .*0.tar or one folder up"):
        find_classes([shard], None, "--eval_shards")
    (tmp_path / "set" / "classnames.txt").write_text("cat\ndog\n\n")
    assert find_classes([shard], None, "--eval_shards") == (["cat", "dog"], ["a photo of a {c}."])
    (tmp_path / "set" / "zeroshot_classification_templates.txt").write_text("one {c}\n\ntwo {c}\n")
    assert find_classes([shard], None, "--eval_shards") == (["cat", "dog"], ["one {c}", "two {c}"])
    (tmp_path / "set" / "test" / "classnames.txt").write_text("bird\n")
    assert find_classes([shard], None, "--eval_shards") == (["bird"], ["a photo of a {c}."])
    other = tmp_path / "other.txt"
    other.write_text("fish\n")
    assert find_classes([shard], str(other), "--eval_shards")[0] == ["fish"]


def test_odd_class_files_are_refused(tmp_path):
    file = tmp_path / "names.txt"
    with pytest.raises(UserError, match="no such file"):
        read_classnames(file)
    file.write_text("\n\n")
    with pytest.raises(UserError, match="holds no class names"):
        read_classnames(file)
    file.write_text("cat\n\ndog\n")
    with pytest.raises(UserError, match="line 2 is empty"):
        read_classnames(file)
    file.write_text("a photo of a cat\n")
    with pytest.raises(UserError, match=r"has no \{c\}"):
        read_templates(file)

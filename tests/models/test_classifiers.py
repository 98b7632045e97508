import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from utils.errors import UserError
from utils.methods.losses import class_logits
from utils.models.classifiers import (
    PROBE_BLOCK,
    KnnClassifier,
    LinearClassifier,
    fit_linear_probe,
    read_linear_head,
    save_linear_head,
)


@pytest.fixture(scope="module")
def digit_features():
    """scikit-learn's digits as (features, labels) of 500 training and 200 test images, D = 64."""
    images, labels = load_digits(return_X_y=True)
    features, labels = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    return features[:500], labels[:500], features[500:700], labels[500:700]


def test_zero_shot_values_are_those_of_class_logits():
    torch.manual_seed(0)
    embeds, texts = torch.randn(5, 24), torch.nn.functional.normalize(torch.randn(7, 24), dim=-1)
    classifier = LinearClassifier(texts, scale=14.3, normalise=True)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = classifier(embeds.to(dtype))
        assert found.dtype == torch.float32
        assert found.equal(class_logits(embeds.to(dtype), texts, 14.3))
    assert len(classifier.weight) == 7


def test_linear_head_is_the_plain_formula():
    torch.manual_seed(0)
    embeds, weight, bias = torch.randn(5, 24), torch.randn(7, 24), torch.randn(7)
    torch.testing.assert_close(LinearClassifier(weight, bias)(embeds), torch.nn.functional.linear(embeds, weight, bias))
    scaled = LinearClassifier(weight.double(), bias.double(), scale=3.0)(embeds)
    torch.testing.assert_close(scaled, 3 * embeds @ weight.T + bias)


@pytest.mark.parametrize("normalise", [False, True])
def test_saved_head_gives_the_same_logits(tmp_path, normalise):
    torch.manual_seed(0)
    embeds = torch.randn(5, 24)
    classifier = LinearClassifier(torch.randn(7, 24), torch.randn(7), scale=2.5, normalise=normalise)
    save_linear_head(tmp_path / "folder" / "head.safetensors", classifier)
    found = read_linear_head(tmp_path / "folder" / "head.safetensors", 24, 7)
    assert found.normalise == normalise
    torch.testing.assert_close(found(embeds), classifier(embeds))


def test_head_without_metadata_and_bias_is_plain(tmp_path):
    save_file({"weight": torch.ones(3, 4, dtype=torch.bfloat16)}, tmp_path / "head.safetensors")
    head = read_linear_head(tmp_path / "head.safetensors", 4, 3)
    assert (head.bias, head.normalise, head.scale, head.weight.dtype) == (None, False, 1.0, torch.float32)


def test_a_head_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "probes").write_text("a file")
    with pytest.raises(UserError, match=r"probes/head.safetensors: cannot be written \(.*\); mend that and start"):
        save_linear_head(tmp_path / "probes/head.safetensors", LinearClassifier(torch.ones(2, 3)))


def test_odd_heads_are_refused(tmp_path):
    path = tmp_path / "head.safetensors"

    def refused(match, tensors=None, metadata=None):
        if tensors is not None:
            save_file(tensors, path, metadata=metadata)
        with pytest.raises(UserError, match=match) as caught:
            read_linear_head(path, 4, 3)
        assert str(caught.value).startswith(f"--linear_head {path}: ")
        assert "\n" not in str(caught.value)

    weight = torch.ones(3, 4)
    refused("no such file")
    path.write_bytes(b"not tensors at all")
    refused("not a safetensors file")
    refused("holds no weight, but bias, kernel", {"kernel": weight, "bias": torch.ones(3)})
    refused(r"weight is \(3, 5\); .* weight \(3, 4\)", {"weight": torch.ones(3, 5)})
    refused(r"weight is \(12,\)", {"weight": torch.ones(12)})
    refused(r"weight is \(2, 4\); .* weight \(3, 4\)", {"weight": torch.ones(2, 4)})
    refused(r"bias is \(4,\); .* bias \(3,\)", {"weight": weight, "bias": torch.ones(4)})
    refused("bias is not finite", {"weight": weight, "bias": torch.tensor([0.0, torch.inf, 0.0])})
    refused("weight is not finite", {"weight": weight * torch.nan})
    refused("normalise is 'yes'", {"weight": weight}, {"normalise": "yes"})


def sklearns(train, labels, inverse_l2=0.316, **options):
    """scikit-learn's scaler and fit of the same problem."""
    scaler = StandardScaler().fit(train.double().numpy())
    fit = LogisticRegression(C=inverse_l2, max_iter=20_000, **options)
    return scaler, fit.fit(scaler.transform(train.double().numpy()), labels.numpy())


@pytest.mark.parametrize("inverse_l2", [0.316, 0.01])
def test_probe_is_scikit_learns_logistic_regression(digit_features, inverse_l2):
    train, labels, test, _ = digit_features  # a few pixels are always 0: dimensions that do not vary
    probe = fit_linear_probe(train, labels, 10, l2=1 / inverse_l2, tolerance=1e-8)
    scaler, reference = sklearns(train, labels, inverse_l2, tol=1e-9)
    expected = reference.predict_proba(scaler.transform(test.double().numpy()))
    np.testing.assert_allclose(probe(test).softmax(dim=-1).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(probe.weight.numpy(), reference.coef_ / scaler.scale_, atol=2e-5)
    assert probe.weight.dtype == probe.bias.dtype == torch.float32


def test_the_usual_rule_is_near_enough_to_the_optimum():
    """Embeddings are not digits: noise whose directions differ in size a hundredfold, more classes than are easy."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(20, (3000,), generator=random)
    axes = torch.linalg.qr(torch.randn(100, 100, generator=random)).Q / torch.arange(1, 101)[:, None]
    signal = 0.25 * torch.randn(20, 100, generator=random)[labels]
    features = (signal + torch.randn(3000, 100, generator=random)) @ axes
    train, test = features[:2000], features[2000:]
    scaler, reference = sklearns(train, labels[:2000], tol=1e-9)
    expected = torch.tensor(reference.predict(scaler.transform(test.double().numpy())))
    steps = []
    found = fit_linear_probe(train, labels[:2000], 20, on_iteration=steps.append)(test).argmax(-1)
    assert 0.4 < (expected == labels[2000:]).float().mean() < 0.8
    assert (found != expected).float().mean() < 0.01
    assert len(steps) < 30
    # The same rule in the features' own axes: hundreds of iterations.
    assert sklearns(train, labels[:2000], tol=1e-3 * 0.05)[1].n_iter_[0] > 2 * len(steps)


def test_progress_of_a_probe_is_told(digit_features):
    train, labels, *_ = digit_features
    steps = []
    fit_linear_probe(train, labels, 10, on_iteration=steps.append)
    assert [step.iteration for step in steps] == list(range(1, len(steps) + 1))
    assert all(step.evaluations >= step.iteration for step in steps)
    assert steps[-1].evaluations < 1.5 * len(steps)
    losses = [step.loss for step in steps]
    assert math.log(10) > losses[0]
    assert losses == sorted(losses, reverse=True)
    assert steps[-1].gradient <= 1e-3 < min(step.gradient for step in steps[:-1])


def test_a_probe_that_does_not_meet_its_rule_warns(digit_features, caplog):
    train, labels, test, test_labels = digit_features
    probe = fit_linear_probe(train, labels, 10, max_iterations=4)
    (record,) = caplog.records
    assert re.fullmatch(
        r"linear probe: stopped after 4 iterations, the gradient's largest entry is 0\.\d+ of its value at zero, "
        r"expected at most 0\.001 \(.*ITERATIONS.*\); the head is not the optimum, its accuracy may be too low",
        record.message,
    )
    assert (probe(test).argmax(-1) == test_labels).float().mean() > 0.8  # it is the best so far
    caplog.clear()
    fit_linear_probe(train, labels, 10)
    assert not caplog.records


def test_dimensions_that_do_not_vary_get_no_weight(digit_features):
    train, labels, *_ = digit_features
    constant = torch.full((len(train), 2), 3.0)
    constant[::2, 1] += 1e-6  # rounding
    probe = fit_linear_probe(torch.cat([train, constant], dim=1), labels, 10)
    assert probe.weight[:, -2:].abs().max() == 0
    torch.testing.assert_close(probe.weight[:, :-2], fit_linear_probe(train, labels, 10).weight, atol=1e-4, rtol=1e-3)
    same = fit_linear_probe(torch.ones(6, 3), torch.tensor([0, 0, 0, 1, 1, 2]), 3, tolerance=1e-6)
    torch.testing.assert_close(same(torch.ones(1, 3)).softmax(-1), torch.tensor([[3, 2, 1]]) / 6, atol=1e-4, rtol=0)
    balanced = fit_linear_probe(torch.ones(6, 3), torch.arange(6) % 3, 3)  # the start is the optimum
    assert balanced(torch.ones(1, 3)).abs().max() == 0


def test_probe_is_repeatable_and_does_not_see_the_scale_of_features(digit_features):
    train, labels, test, test_labels = digit_features
    probe = fit_linear_probe(train, labels, 10)
    again = fit_linear_probe(train, labels, 10)
    assert probe.weight.equal(again.weight)
    assert probe.bias.equal(again.bias)
    moved = fit_linear_probe(0.01 * train + 3, labels, 10)
    torch.testing.assert_close(moved(0.01 * test + 3), probe(test), atol=1e-3, rtol=1e-3)
    assert (probe(test).argmax(-1) == test_labels).float().mean() > 0.8


def test_more_images_than_a_block_are_all_learnt_from(digit_features):
    train, labels, *_ = digit_features
    many = fit_linear_probe(train.repeat(5, 1), labels.repeat(5), 10, l2=5.0, tolerance=1e-8)
    once = fit_linear_probe(train, labels, 10, l2=1.0, tolerance=1e-8)
    assert len(train) * 5 > PROBE_BLOCK > len(train)
    torch.testing.assert_close(many.weight, once.weight, atol=1e-5, rtol=1e-4)


def test_probe_never_answers_with_a_class_without_images(digit_features):
    train, labels, test, _ = digit_features
    probe = fit_linear_probe(train[labels != 3][:200], labels[labels != 3][:200], 12)
    assert len(probe.weight) == 12
    assert not {3, 10, 11} & set(probe(test).argmax(-1).tolist())


def test_neighbours_are_those_of_a_plain_loop(digit_features):
    train, labels, test, _ = digit_features
    unit = train.double().numpy() / np.linalg.norm(train.double().numpy(), axis=1, keepdims=True)
    expected = np.zeros((len(test), 10))
    for row, image in enumerate(test.double().numpy()):
        cosines = unit @ image / np.linalg.norm(image)
        for place in np.argsort(-cosines)[:20]:
            expected[row, labels[place]] += np.exp(cosines[place] / 0.07)
    logits = KnnClassifier(train, labels, 10)(test)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    shares = expected / expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(logits.softmax(dim=-1).numpy(), shares, atol=1e-4)
    voted = expected > 0
    np.testing.assert_allclose(logits.numpy()[voted], np.log(expected[voted]), atol=1e-4)


def test_equal_votes_are_scikit_learns(digit_features):
    train, labels, test, test_labels = digit_features
    reference = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(train.numpy(), labels.numpy())
    nearest = KnnClassifier(train, labels, 10, k=1)(test).argmax(-1)
    assert nearest.tolist() == reference.predict(test.numpy()).tolist()
    flat = KnnClassifier(train, labels, 10, k=5, temperature=1e4)(test).softmax(dim=-1)  # votes of almost equal weight
    reference = KNeighborsClassifier(n_neighbors=5, metric="cosine").fit(train.numpy(), labels.numpy())
    np.testing.assert_allclose(flat.numpy(), reference.predict_proba(test.numpy()), atol=1e-3)
    assert (nearest == test_labels).float().mean() > 0.8


def test_logits_do_not_depend_on_the_batch_size(digit_features):
    train, labels, test, _ = digit_features
    train, labels = torch.cat([train, train]), torch.cat([labels, (labels + 1) % 10])  # every image twice: ties
    for classifier in (KnnClassifier(train, labels, 10, k=5), fit_linear_probe(train, labels, 10)):
        whole = classifier(test)
        for size in (1, 7, 64, 100):
            parts = torch.cat([classifier(batch) for batch in test.split(size)])
            assert parts.argmax(-1).equal(whole.argmax(-1))
            if isinstance(classifier, KnnClassifier):
                assert parts.equal(whole)
    assert KnnClassifier(train, labels, 10)(test[:0]).shape == (0, 10)


def test_an_attack_sees_through_the_votes(digit_features):
    train, labels, test, test_labels = digit_features
    classifier = KnnClassifier(train, labels, 10)
    free = test.clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(classifier(free), test_labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, free)
    assert gradient.isfinite().all()
    with torch.no_grad():
        higher = torch.nn.functional.cross_entropy(
            classifier(free + 0.2 * gradient.sign()), test_labels, reduction="sum"
        )
    assert higher > loss


def test_odd_training_sets_are_refused():
    features, labels = torch.ones(4, 3), torch.tensor([0, 1, 2, 3])
    for make in (fit_linear_probe, lambda *args: KnnClassifier(*args, k=2)):
        with pytest.raises(UserError, match="label 3 among the training images, of 3 classes"):
            make(features, labels, 3)
        with pytest.raises(UserError, match="label -1 among"):
            make(features, labels - 1, 3)
        with pytest.raises(UserError, match="1 of 4 training images have embeddings that are not finite"):
            make(features.index_fill(0, torch.tensor([2]), torch.nan), labels, 4)
        with pytest.raises(UserError, match="no training image"):
            make(features[:0], labels[:0], 4)
    with pytest.raises(UserError, match="k = 20 nearest neighbours of 4 training images; k may be 1 to 4"):
        KnnClassifier(features, labels, 4)

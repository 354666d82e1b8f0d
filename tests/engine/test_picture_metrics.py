"""Metrics of pictures against closed forms and second ways of computing them; the networks that judge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import datasets_lib
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.eval_networks import classifier_problem, features_problem
from trainers.engine.validation.feature_networks import load_classifier, load_features
from trainers.engine.validation.metrics import (
    Described,
    accuracy_by_class,
    class_accuracy,
    describe,
    feature_metrics,
    measure,
    memorisation,
    nearest,
    pictures_of,
    spread,
    train_classifier,
    within_classes,
)

CPU = torch.device("cpu")


def test_frechet_distance_of_gaussians():
    """Independent features: sum over them of (difference of means)^2 + (difference of standard deviations)^2."""
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 0.5, 2.0])
    other_mean, other_std = torch.tensor([0.5, 1.0, -1.0]), torch.tensor([2.0, 0.5, 1.0])
    drawn = mean + std * torch.randn(200_000, 3, generator=generator)
    real = other_mean + other_std * torch.randn(200_000, 3, generator=generator)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    expected = ((mean - other_mean) ** 2 + (std - other_std) ** 2).sum().item()
    statistics = [fid_features_to_statistics(rows.double()) for rows in (drawn, real)]
    found = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(expected, rel=0.01)


def test_all_feature_metrics_a_second_way():
    generator = torch.Generator().manual_seed(1)
    drawn, real = torch.randn(40, 6, generator=generator), 0.5 + torch.randn(30, 6, generator=generator)
    found = feature_metrics(drawn, real)
    x, y = drawn.double().numpy(), real.double().numpy()
    import scipy.linalg

    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert found["fid"] == pytest.approx(expected, rel=1e-6)
    assert found["precision"] == inside_balls(x, y)  # drawn pictures within the real ones' balls
    assert found["recall"] == inside_balls(y, x)
    same = feature_metrics(drawn, drawn.clone())
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
    assert same["fid"] == pytest.approx(0, abs=1e-5)
    far = feature_metrics(drawn, real + 100)
    assert (far["precision"], far["recall"]) == (0.0, 0.0)


def inside_balls(points, centres, neighbourhood=3):
    """The part of points within the distance of some centre to its third neighbour, arXiv 1904.06991, equation 1."""
    own = np.sort(np.linalg.norm(centres[:, None] - centres[None], axis=2), axis=1)[:, neighbourhood]
    return pytest.approx((np.linalg.norm(points[:, None] - centres[None], axis=2) <= own).any(1).mean())


def test_kernel_distance_a_second_way():
    """The unbiased estimate with the kernel (x y / d + 1)^3, where the subsets are everything."""
    generator = torch.Generator().manual_seed(2)
    drawn, real = torch.randn(50, 4, generator=generator), 1 + torch.randn(50, 4, generator=generator)
    x, y = drawn.double(), real.double()

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - k.diagonal().sum()) / (50 * 49)

    expected = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert feature_metrics(drawn, real)["kid"] == pytest.approx(expected.item(), rel=1e-6)


def test_too_few_pictures():
    with pytest.raises(ValueError, match="4 drawn and 9 real pictures: metrics need at least 5 of each"):
        feature_metrics(torch.zeros(4, 2), torch.zeros(9, 2))


def test_accuracy_over_all_and_of_the_worst_class():
    labels, predicted = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 1, 0])
    assert class_accuracy(predicted, labels) == {"class_accuracy": 4 / 6, "worst_class_accuracy": 0.5}
    assert accuracy_by_class(predicted, labels) == {0: 0.5, 1: 0.75}


def test_memorisation():
    generator = torch.Generator().manual_seed(3)
    real, held_out = torch.randn(300, 5, generator=generator), torch.randn(200, 5, generator=generator)
    drawn = real[:100] + 1e-4
    distances, indices = nearest(drawn, real)
    assert torch.equal(indices, torch.arange(100))
    assert distances == pytest.approx(torch.full((100,), 1e-4 * math.sqrt(5)), rel=0.01)
    own = nearest(held_out, real)[0]
    expected = (held_out[:, None] - real[None]).norm(dim=2).min(1).values  # a second way
    torch.testing.assert_close(own, expected)
    found = memorisation(distances, own)
    assert found["copies"] == 1.0
    assert found["nearest_distance"] == pytest.approx(1e-4 * math.sqrt(5), rel=0.01)
    assert found["nearest_distance_held_out_5th_percentile"] == pytest.approx(np.percentile(expected, 5))
    assert memorisation(own, own)["copies"] == pytest.approx(0.05)
    assert set(memorisation(distances, None)) == {"nearest_distance"}
    twins = torch.zeros(100)  # where real held-out pictures are in the training set as well, copies are still seen
    assert memorisation(torch.zeros(50), twins)["copies"] == 1.0


def test_what_cannot_be_computed_is_not_a_number():
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(12, 1, 8, 8, generator=generator)
    broken = images.clone()
    broken[3, 0, 2, 2] = math.nan
    labels = torch.arange(12) % 2
    drawn, real = describe([(broken, labels)], CPU), describe([(images, labels)], CPU)
    found = measure(drawn, real, None, train_classifier(real))
    assert found["not_finite"] == 1 / 12
    assert found["class_accuracy"] > 0.5
    same = describe([(images[:1].repeat(12, 1, 1, 1), labels)], CPU)
    assert math.isnan(measure(drawn, same)["class_diversity"])
    assert all(math.isnan(value) for value in feature_metrics(torch.full((9, 2), math.nan), torch.rand(9, 2)).values())
    one_class = describe([(images, torch.zeros(12, dtype=torch.int64))], CPU)
    with pytest.raises(ValueError, match="all of one class; class accuracy needs at least two"):
        train_classifier(one_class)


def digits(split):
    base = BaseConfig(dataset="digits", resolution=16, channels=1, validation_split=0.1, num_epochs=1)
    dataset = datasets_lib.build(base, split)
    return describe(pictures_of(dataset, list(range(len(dataset))), 500), CPU)


def test_real_digits_measured_against_real_digits():
    """Held-out digits as if they had been drawn: recognised, as different from each other, no copies."""
    real, held_out = digits("train"), digits("validation")
    found = measure(held_out, real, nearest(held_out.vectors, real.vectors)[0], train_classifier(real))
    assert found["class_accuracy"] >= 0.97
    assert found["class_diversity"] == pytest.approx(1, abs=0.1)
    assert found["copies"] == pytest.approx(0.05, abs=0.01)
    one_each = Described(*(None if rows is None else rows[:1].repeat_interleave(50, 0) for rows in real))
    assert within_classes(one_each) == 0


def test_without_labels_diversity_is_over_all():
    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    drawn, real = describe([(images, None)], CPU), describe([(images, None)], CPU)
    assert measure(drawn, real) == {"diversity": 1.0, "nearest_distance": 0.0}


def test_large_pictures_are_compared_as_thumbnails():
    images = torch.rand(2, 3, 64, 64)
    described = describe([(images, None)], CPU)
    torch.testing.assert_close(described.thumbnails, nn.functional.avg_pool2d(images, 2))
    assert described.vectors.shape == (2, 3 * 32 * 32)


def test_evenly_spread_numbers():
    assert spread(5, 10) == [0, 1, 2, 3, 4]
    assert spread(100, 3) == [0, 49, 99]


class Mean(nn.Module):
    """A feature network that can be scripted: the means of the channels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


class WithSwitch(nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean((2, 3)) if return_features else images[:, 0, 0, :1].float()


def test_a_torchscript_file_judges(tmp_path):
    for name, network in (("mean.pt", Mean()), ("switch.pt", WithSwitch())):
        torch.jit.script(network).save(tmp_path / name)
        assert features_problem(str(tmp_path / name)) is None
        features = load_features(str(tmp_path / name), CPU)
        found = features(torch.full((2, 1, 4, 4), 0.5))
        assert found.tolist() == [[128.0] * 3] * 2  # uint8, grey in three channels
    logits = load_classifier(str(tmp_path / "mean.pt"), CPU)(torch.full((1, 3, 4, 4), 0.25))
    assert logits.tolist() == [[-0.5] * 3]  # in [-1, 1]
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no.pt: not a TorchScript file .*; make one with torch.jit.save"):
        load_features(str(tmp_path / "no.pt"), CPU)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_network_of_torchvision_judges(tmp_path, suffix):
    from safetensors.torch import save_file
    from torchvision.models import resnet18
    from torchvision.transforms.functional import normalize, resize

    network, path = resnet18().eval(), tmp_path / f"weights.{suffix}"
    save_file(network.state_dict(), path) if suffix == "safetensors" else torch.save(network.state_dict(), path)
    spec = f"resnet18:{path}"
    assert features_problem(spec) is None
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        found = load_features(spec, CPU)(images)
        network.fc = nn.Identity()
        large = resize(images.expand(-1, 3, -1, -1), [224, 224], antialias=True)
        expected = network(normalize(large, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert found.shape == (2, 512)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="these are not the weights of resnet34"):
        load_features(f"resnet34:{path}", CPU)


def test_a_network_without_a_linear_layer(tmp_path):
    from torchvision.models import squeezenet1_1

    torch.save(squeezenet1_1().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="squeezenet1_1 ends in no linear layer; take one such as resnet50"):
        load_features(f"squeezenet1_1:{tmp_path / 'weights.pth'}", CPU)


def test_a_pickle_is_not_run(tmp_path):
    """A file of weights that would run a command when unpickled is refused."""

    class Attack:
        def __reduce__(self):
            return (eval, (f"open({str(tmp_path / 'attacked')!r}, 'w')",))

    torch.save(Attack(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="these are not the weights of resnet18"):
        load_features(f"resnet18:{tmp_path / 'weights.pth'}", CPU)
    assert not (tmp_path / "attacked").exists()


def test_inception_that_cannot_be_downloaded(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"eval_features = inception: its weights cannot be downloaded \(no route"):
        load_features("inception", CPU)


def test_inception_takes_grey_pictures(monkeypatch):
    """The library's network with random weights in place of the download."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **o: {})
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    with torch.no_grad():
        assert load_features("inception", CPU)(torch.rand(2, 1, 16, 16)).shape == (2, 2048)


def test_no_features():
    assert load_features("none", CPU) is None
    assert features_problem("none") is None


def test_what_is_wrong_with_judges(tmp_path):
    assert "no such file; allowed: inception (downloaded), none" in features_problem("nowhere.pt")
    assert "resnot18 is not a network of torchvision" in features_problem("resnot18:weights.pth")
    assert "deeplabv3_resnet50 is not a network of torchvision" in features_problem("deeplabv3_resnet50:w.pth")
    assert "no file weights.pth; give resnet18's weights" in features_problem("resnet18:weights.pth")
    assert "must be a finished noisy_classifier run, or a TorchScript file" in classifier_problem(str(tmp_path))

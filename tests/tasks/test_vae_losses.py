"""The parts of an autoencoder's loss against closed forms, distributions and second ways of computing them."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import get_model
from torchvision.models.vgg import cfgs, make_layers

from scripts.benchmarks.compare_autoencoders import research_loss
from trainers.common.autoencoder import adversarial
from trainers.common.autoencoder.discriminator import LogitAverages, PatchDiscriminator
from trainers.common.autoencoder.loss import AutoencoderLoss, quality
from trainers.common.autoencoder.options import perceptual_problem, smallest_picture
from trainers.common.autoencoder.perceptual import load_perceptual
from trainers.vae import VAEConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def loss_of(**options):
    return AutoencoderLoss(VAEConfig(**options), 16, CPU)


def pictures(count=3, channels=3, size=16):
    return torch.rand(count, channels, size, size) * 2 - 1


# --- reconstruction, KL, metrics


def test_kl_against_torch_distributions():
    moments = torch.randn(3, 8, 4, 4)
    mean, logvar = moments.chunk(2, dim=1)
    posterior, prior = Normal(mean, (logvar / 2).exp()), Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(loss_of().kl(moments), kl_divergence(posterior, prior).sum((1, 2, 3)))


def test_log_variances_are_clamped():
    moments = torch.zeros(1, 2, 1, 1)
    moments[:, 1] = 50
    assert loss_of().kl(moments).item() == pytest.approx((torch.tensor(20.0).exp().item() - 1 - 20) / 2)
    moments[:, 1] = -50
    assert loss_of().kl(moments).item() == pytest.approx((0 - 1 + 30) / 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"reconstruction_loss": "l1"}, lambda e: e.abs()),
        ({"reconstruction_loss": "l2"}, lambda e: e.square()),
        (
            {"reconstruction_loss": "huber", "huber_delta": 0.3},
            lambda e: torch.where(e.abs() < 0.3, e.square() / 2, 0.3 * (e.abs() - 0.15)),
        ),
    ],
)
def test_reconstruction_losses_against_their_definitions(options, expected):
    images, others = pictures(), pictures()
    found = loss_of(**options).distances(images, others)
    assert set(found) == {"reconstruction"}
    torch.testing.assert_close(found["reconstruction"], expected(others - images).mean((1, 2, 3)))


def test_the_weight_of_the_kl_rises():
    loss = loss_of(kl_weight=0.5, kl_warmup_steps=10)
    assert [loss.kl_weight(step) for step in (0, 5, 10, 20)] == [0.0, 0.25, 0.5, 0.5]
    assert loss_of(kl_weight=0.5).kl_weight(0) == 0.5


def test_quality_against_its_definitions():
    images, others = pictures(), pictures() * 1.5  # beyond the range, as a network may be
    found = quality(images, others)
    error = ((others.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
    torch.testing.assert_close(found["psnr"], -10 * error.log10())
    one_by_one = [quality(images[i : i + 1], others[i : i + 1])["ssim"] for i in range(3)]
    torch.testing.assert_close(found["ssim"], torch.cat(one_by_one))
    assert set(quality(pictures(size=8), pictures(size=8))) == {"psnr"}


# --- perceptual distances


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory):
    """Random weights of VGG16's convolutions, as a local file would hold them."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "vgg16.safetensors"
    save_file({f"features.{key}": value for key, value in make_layers(cfgs["D"]).state_dict().items()}, path)
    return str(path)


def test_lpips_against_its_definition(vgg16_file):
    from safetensors.torch import load_file
    from torchmetrics.functional.image import lpips as source

    heads = torch.load(
        source.__file__.replace("lpips.py", "lpips_models/vgg.pth"), map_location="cpu", weights_only=True
    )
    features = make_layers(cfgs["D"])
    features.load_state_dict({k.removeprefix("features."): v for k, v in load_file(vgg16_file).items()})
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def activations(images):
        images, found = (images - shift[:, None, None]) / scale[:, None, None], []
        for number, layer in enumerate(features):
            images = layer(images)
            if number in (3, 8, 15, 22, 29):
                found.append(functional.normalize(images, dim=1))
        return found

    images, others = pictures(2, 3, 32), pictures(2, 3, 32)
    expected = 0
    for level, (a, b) in enumerate(zip(activations(images), activations(others), strict=True)):
        expected = expected + ((a - b).square() * heads[f"lin{level}.model.1.weight"][0]).sum(1).mean((1, 2))
    distance = load_perceptual(f"lpips:{vgg16_file}", 32)
    torch.testing.assert_close(distance(images, others), expected, rtol=1e-4, atol=1e-6)
    grey = pictures(2, 1, 32)
    torch.testing.assert_close(distance(grey, others), distance(grey.repeat(1, 3, 1, 1), others))


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(get_model("resnet18", weights=None).state_dict(), path)
    return str(path)


def test_features_of_a_torchvision_network_against_their_definition(resnet_file):
    network = get_model("resnet18", weights=None).eval()
    network.load_state_dict(torch.load(resnet_file, weights_only=True))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def activations(images):
        images = (images / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]
        found = [network.relu(network.bn1(network.conv1(images)))]
        rows = network.maxpool(found[0])
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            rows = layer(rows)
            found.append(rows)
        return [functional.normalize(rows, dim=1, eps=0) for rows in found]

    images, others = pictures(2, 3, 64), pictures(2, 3, 64)
    pairs = zip(activations(images), activations(others), strict=True)
    expected = sum((a - b).square().sum(1).mean((1, 2)) for a, b in pairs)
    distance = load_perceptual(f"resnet18:{resnet_file}", 64)
    torch.testing.assert_close(distance(images, others), expected, rtol=1e-4, atol=1e-6)

    weights = torch.load(resnet_file, weights_only=True)  # older files, as torchvision's own, lack these counts
    torch.save({k: v for k, v in weights.items() if "num_batches" not in k}, resnet_file.replace(".pth", "_old.pth"))
    old = load_perceptual(f"resnet18:{resnet_file.replace('.pth', '_old.pth')}", 64)
    assert torch.equal(old(images, others), distance(images, others))


def test_ms_ssim_where_one_scale_fits_is_ssim():
    images, others = pictures(), pictures()
    similarity = structural_similarity_index_measure(
        images / 2 + 0.5, others / 2 + 0.5, data_range=1.0, reduction="none"
    )
    torch.testing.assert_close(load_perceptual("ms_ssim", 16)(images, others), (1 - similarity) / 2)
    found = {resolution: load_perceptual("ms_ssim", resolution) for resolution in (12, 42, 64, 81, 96, 161, 176, 512)}
    assert [len(distance.weights) for distance in found.values()] == [1, 2, 3, 3, 3, 4, 5, 5]
    for resolution, distance in found.items():
        assert sum(distance.weights) == pytest.approx(1)
        assert 0 < distance(pictures(1, 1, resolution), pictures(1, 1, resolution)).item() < 1


@pytest.mark.parametrize("kind", ["lpips", "resnet18", "ms_ssim"])
def test_a_perceptual_term_changes_the_gradient(kind, vgg16_file, resnet_file):
    """And keeps its own weights; pictures that are opposites have a finite gradient, too."""
    file = {"lpips": f":{vgg16_file}", "resnet18": f":{resnet_file}", "ms_ssim": ""}[kind]
    loss = AutoencoderLoss(VAEConfig(perceptual_loss=kind + file), 32, CPU)
    assert not any(parameter.requires_grad for parameter in loss.perceptual.parameters())
    images = pictures(2, 3, 32)
    for reconstruction in (pictures(2, 3, 32), -images):
        reconstruction.requires_grad_()
        terms = loss.distances(images, reconstruction)
        [plain] = torch.autograd.grad(terms["reconstruction"].sum(), reconstruction, retain_graph=True)
        [both] = torch.autograd.grad(loss.weighted(terms).sum(), reconstruction)
        assert both.isfinite().all()
        assert (both - plain).norm() > 1e-2 * plain.norm()
    assert loss.perceptual(images, images).abs().max() < 1e-6


def test_lpips_that_cannot_be_downloaded(monkeypatch):
    from torchmetrics.functional.image import lpips as source

    def offline(*arguments):
        raise OSError("no network here")

    monkeypatch.setattr(source, "_get_tv_model_features", offline)
    message = r"VGG16's weights cannot be downloaded \(no network here\); fetch vgg16-397923af.pth .* lpips:FILE"
    with pytest.raises(ValueError, match=message):
        load_perceptual("lpips", 32)


def test_files_that_hold_something_else(tmp_path, vgg16_file, resnet_file):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"perceptual_loss = lpips:.*broken.pth: no file of weights"):
        load_perceptual(f"lpips:{broken}", 32)
    with pytest.raises(ValueError, match=r"not the weights of torchvision's resnet18: conv1.weight is missing, expec"):
        load_perceptual(f"resnet18:{vgg16_file}", 32)
    with pytest.raises(ValueError, match=r"not the weights of torchvision's vgg16: features.0.weight is missing"):
        load_perceptual(f"lpips:{resnet_file}", 32)
    torch.save([1, 2], broken)
    with pytest.raises(ValueError, match=r"broken.pth: holds a list"):
        load_perceptual(f"lpips:{broken}", 32)


@pytest.mark.parametrize(
    ("spec", "channels", "resolution", "message"),
    [
        ("lpips", 3, 32, None),
        ("lpips", 1, 32, None),
        ("ms_ssim", 4, 12, None),
        ("ms_ssim", 3, 11, "ms_ssim needs a base.resolution of more than 11"),
        ("lpips", 4, 32, "lpips sees grey or coloured pictures, and base.channels is 4; take ms_ssim"),
        ("resnet18", 3, 32, "must be one of: lpips (VGG16"),
        ("lpips:none.pth", 3, 32, "no file none.pth; give the weights as .pth or .safetensors; allowed: lpips (VGG16"),
        ("resnet:README.md", 3, 32, "resnet is no convolutional network of torchvision; allowed: lpips (VGG16"),
        ("swin_t:README.md", 3, 32, "swin_t is no convolutional network of torchvision; allowed: lpips (VGG16"),
        ("resnet18:README.md", 3, 32, None),
    ],
)
def test_what_is_wrong_with_a_perceptual_loss(spec, channels, resolution, message):
    found = perceptual_problem(spec, channels, resolution)
    assert found.startswith(message) if message else found is None


# --- the adversarial game


def test_losses_of_logits_against_their_definitions():
    real, fake = torch.randn(2, 1, 3, 3) * 2, torch.randn(2, 1, 3, 3) * 2
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    entropy = functional.binary_cross_entropy_with_logits
    vanilla = (entropy(real, ones) + entropy(fake, zeros)) / 2
    torch.testing.assert_close(adversarial.discriminator_loss("vanilla", real, fake), vanilla)
    torch.testing.assert_close(adversarial.generator_loss("vanilla", fake), entropy(fake, ones))
    hinge = (torch.maximum(zeros, 1 - real).mean() + torch.maximum(zeros, 1 + fake).mean()) / 2
    torch.testing.assert_close(adversarial.discriminator_loss("hinge", real, fake), hinge)
    torch.testing.assert_close(adversarial.generator_loss("hinge", fake), -fake.mean())


def test_adaptive_weight_against_its_definition():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, against = (3 * layer[0] + 4 * layer[1]), layer[0] * layer[1]  # gradients (3, 4) and (2, 1)
    weight = adversarial.adaptive_weight(reconstruction, against, layer)
    assert weight.item() == pytest.approx(5 / (5**0.5 + 1e-4))
    assert not weight.requires_grad
    assert adversarial.adaptive_weight(1e6 * reconstruction, 1e-6 * against, layer).item() == 1e4


def test_gradient_penalty_against_a_closed_form():
    """Of a linear discriminator it is the squared length of its weights."""
    weights = torch.randn(3, 4, 4)
    real = pictures(5, 3, 4).requires_grad_()
    logits = (real * weights).sum((1, 2, 3)).reshape(-1, 1, 1, 1)
    assert adversarial.gradient_penalty(logits, real).item() == pytest.approx(weights.square().sum().item(), rel=1e-5)


def test_lecam_against_its_definition():
    real, fake, averages = torch.randn(4), torch.randn(4), (torch.tensor(0.7), torch.tensor(-0.4))
    expected = ((real + 0.4) ** 2).mean() + ((fake - 0.7) ** 2).mean()
    torch.testing.assert_close(adversarial.lecam(real, fake, averages), expected)


def test_moving_averages_of_logits_are_those_of_the_steps_before():
    """With the start's bias taken out; two micro-batches of a step count as one, what is not finite is left out."""
    averages, split = LogitAverages(), LogitAverages()
    reals, fakes = torch.randn(6, 8), torch.randn(6, 8)
    fakes[3] = torch.inf
    total, weight = torch.zeros(2), 0.0
    for step in range(6):
        expected = total / weight if weight else torch.zeros(2)
        torch.testing.assert_close(torch.stack(averages(step, reals[step], fakes[step])), expected)
        for half in (slice(0, 4), slice(4, 8)):
            found = torch.stack(split(step, reals[step][half], fakes[step][half]))
            torch.testing.assert_close(found, expected)
        if step != 3:
            total = 0.99 * total + 0.01 * torch.stack([reals[step].mean(), fakes[step].mean()])
            weight = 0.99 * weight + 0.01


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_picture_of_a_discriminator(layers):
    size = smallest_picture(layers)
    network = PatchDiscriminator(3, layers, 8)
    assert network(pictures(2, 3, size)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(pictures(2, 3, size - 2**layers))
    assert not list(network.blocks.buffers())  # nothing that mixes the examples of a batch


def game(config, decoder, discriminator, images, latents, step=0):
    """The sum of both losses, and the reconstruction's alone, of a one-layer decoder."""
    reconstruction = decoder(latents)
    distance = (reconstruction - images).abs().mean()
    made = adversarial.Reconstruction(images, reconstruction, distance, decoder.weight)
    loss, values = adversarial.adversarial_losses(config, discriminator, discriminator.averages, made, step)
    return distance + loss, values


def networks():
    return nn.Conv2d(2, 3, 3, padding=1), PatchDiscriminator(3, 1, 8)


FULL = {"adversarial_loss": "hinge", "r1_weight": 0.3, "lecam_weight": 0.1}


@pytest.mark.parametrize("options", [FULL, {"adversarial_loss": "vanilla", "adaptive_weight": False}])
def test_one_optimizer_takes_exactly_the_steps_of_two(options):
    """One backward of both losses and one AdamW of two groups, against one of each for the autoencoder first."""
    config = VAEConfig(**options)
    ours, theirs = networks(), None
    theirs = copy.deepcopy(ours)
    rates = (1e-3, 3e-4)
    one = torch.optim.AdamW([{"params": n.parameters(), "lr": r} for n, r in zip(ours, rates, strict=True)])
    two = [torch.optim.AdamW(n.parameters(), r) for n, r in zip(theirs, rates, strict=True)]
    for step in range(4):
        images, latents = pictures(4), torch.randn(4, 2, 16, 16)
        loss, _ = game(config, *ours, images, latents, step)
        loss.backward()
        one.step()
        one.zero_grad()

        decoder, discriminator = theirs
        reconstruction = decoder(latents)
        distance = (reconstruction - images).abs().mean()
        against = adversarial.generator_loss(config.adversarial_loss, discriminator(reconstruction))
        weight = config.adversarial_weight
        if config.adaptive_weight:
            weight = weight * adversarial.adaptive_weight(distance, against, decoder.weight)
        (distance + weight * against).backward()
        discriminator.zero_grad()  # what the autoencoder's loss left there
        real = images.requires_grad_(config.r1_weight > 0)
        logits = discriminator(real), discriminator(reconstruction.detach())
        second = adversarial.discriminator_loss(config.adversarial_loss, *logits)
        if config.r1_weight:
            second = second + config.r1_weight / 2 * adversarial.gradient_penalty(logits[0], real)
            averages = discriminator.averages(step, *logits)
            second = second + config.lecam_weight * adversarial.lecam(*logits, averages)
        second.backward()
        for optimizer in two:
            optimizer.step()
            optimizer.zero_grad()
    for own, other in zip(ours, theirs, strict=True):
        for (name, value), expected in zip(own.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(value, expected), name


def test_neither_loss_moves_the_others_network():
    config = VAEConfig(**FULL)
    decoder, discriminator = networks()
    images, latents = pictures(4), torch.randn(4, 2, 16, 16)
    with adversarial.frozen(discriminator):
        logits = discriminator(decoder(latents))
    adversarial.generator_loss("hinge", logits).backward()
    assert decoder.weight.grad.norm() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(parameter.requires_grad for parameter in discriminator.parameters())

    def gradients(**options):
        decoder.zero_grad(), discriminator.zero_grad()
        game(VAEConfig(**vars(config) | options), decoder, discriminator, images, latents)[0].backward()
        own = [parameter.grad.clone() for parameter in decoder.parameters()]
        return own, [parameter.grad.clone() for parameter in discriminator.parameters()]

    # the discriminator's terms leave the decoder's gradient alone, the adversarial weight the discriminator's
    base, other, weak = gradients(), gradients(r1_weight=5.0, lecam_weight=3.0), gradients(adversarial_weight=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(base[0], other[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(base[1], other[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(base[0], weak[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(base[1], weak[1], strict=True))


def test_frozen_parameters_stay_frozen_and_come_back_after_an_error():
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)

    def fail():
        assert not network.weight.requires_grad
        raise ArithmeticError

    with pytest.raises(ArithmeticError), adversarial.frozen(network):
        fail()
    assert network.weight.requires_grad
    assert not network.bias.requires_grad


# --- diffusers' research script


def test_the_perceptual_term_of_the_research_script_has_no_gradient():
    """What scripts/benchmarks/compare_autoencoders.py trains with: its gradient is the one without that term, ours is not."""
    distance = load_perceptual("ms_ssim", 16)
    images, reconstruction = pictures(), pictures().requires_grad_()
    assert distance(reconstruction, images).requires_grad

    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = types.SimpleNamespace(conv_out=nn.Conv2d(3, 3, 1))
            self.weight = nn.Parameter(torch.tensor(0.5))

        def forward(self, pixels, noise):
            return self.weight * pixels, torch.zeros(len(pixels), 2, 1, 1)

    vae = Identity()
    with_term = research_loss(vae, None, distance, images, None, 0, 10)
    without = research_loss(vae, None, lambda a, b: torch.zeros(len(a)), images, None, 0, 10)
    assert with_term > without
    gradients = [torch.autograd.grad(loss, vae.weight)[0] for loss in (with_term, without)]
    assert torch.equal(*gradients)
    assert research_loss(vae, None, distance, images, None, 11, 10) is None  # every other step moves nothing

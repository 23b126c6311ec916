"""Codec `flux`: the FLUX autoencoder, under the tensor names of its published file `ae.safetensors`.

A convolutional autoencoder with one attention block in the middle of each half (docs/bagel.md#vae). Both halves are
plain sequences of named parts, nested as the tensor names are, so that the published file loads without renaming.

Shape letters: docs/notation.md. Level i has width * width_multipliers[i] channels.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from megabagel.config.schema import VaeConfig
from megabagel.errors import UserError
from megabagel.model.noise import normal


def _sequence(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    """Residual block: two times GroupNorm, SiLU, 3x3 convolution; the skip is a 1x1 convolution if widths differ."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv(outputs, outputs)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, kernel_size=1) if inputs != outputs else nn.Identity()

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Map [B, inputs, h, w] to [B, outputs, h, w]."""
        h = self.conv1(F.silu(self.norm1(x_BChw)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x_BChw) + h


class Attention(nn.Module):
    """Single-head self-attention over all cells, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, kernel_size=1) for _ in range(4))

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Attend over the h * w cells of [B, C, h, w]; returns the same shape."""
        h = self.norm(x_BChw)
        q_B1XC, k_B1XC, v_B1XC = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        mixed_B1XC = F.scaled_dot_product_attention(q_B1XC, k_B1XC, v_B1XC)
        return x_BChw + self.proj_out(mixed_B1XC[:, 0].transpose(1, 2).reshape(x_BChw.shape))


def _blocks(inputs: int, outputs: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(inputs if i == 0 else outputs, outputs) for i in range(count)))


def _middle(channels: int) -> nn.Sequential:
    return _sequence(
        block_1=ResBlock(channels, channels), attn_1=Attention(channels), block_2=ResBlock(channels, channels)
    )


def _downsample(channels: int) -> nn.Sequential:
    # The published weights expect padding at the right and bottom edges only.
    return _sequence(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, kernel_size=3, stride=2))


def _upsample(channels: int) -> nn.Sequential:
    return _sequence(repeat=nn.Upsample(scale_factor=2), conv=_conv(channels, channels))


def _encoder(config: VaeConfig) -> nn.Sequential:
    """Build the encoder: pixels [B, 3, h, w] to posterior moments [B, 2 C, h / 8, w / 8], means before log variances.

    The factor 8 is that of four levels.
    """
    widths = [config.width * multiplier for multiplier in config.width_multipliers]
    down = nn.Sequential()
    for level, (inputs, outputs) in enumerate(zip([config.width, *widths[:-1]], widths, strict=True)):
        part = _sequence(block=_blocks(inputs, outputs, config.res_blocks))
        if level < len(widths) - 1:
            part.add_module("downsample", _downsample(outputs))
        down.add_module(str(level), part)
    return _sequence(
        conv_in=_conv(3, config.width),
        down=down,
        mid=_middle(widths[-1]),
        norm_out=_norm(widths[-1]),
        swish=nn.SiLU(),
        conv_out=_conv(widths[-1], 2 * config.channels),
    )


def _decoder(config: VaeConfig) -> nn.Sequential:
    """Build the decoder: latents [B, C, h, w] to pixels [B, 3, 8 h, 8 w] for four levels."""
    widths = [config.width * multiplier for multiplier in config.width_multipliers]
    # Levels run from the coarsest to the finest but keep the published numbering, in which the finest is 0.
    up = nn.Sequential()
    for level, (inputs, outputs) in reversed(list(enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)))):
        part = _sequence(block=_blocks(inputs, outputs, config.res_blocks + 1))
        if level > 0:
            part.add_module("upsample", _upsample(outputs))
        up.add_module(str(level), part)
    return _sequence(
        conv_in=_conv(config.channels, widths[-1]),
        mid=_middle(widths[-1]),
        up=up,
        norm_out=_norm(widths[0]),
        swish=nn.SiLU(),
        conv_out=_conv(widths[0], 3),
    )


class Autoencoder(nn.Module):
    """Encoder and decoder, frozen and in eval mode."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = _encoder(config), _decoder(config)
        self.requires_grad_(False).eval()


def load_autoencoder(config: VaeConfig, device: torch.device | str = "cpu") -> Autoencoder:
    """Load the autoencoder with the weights of `config.path`, in float32 on `device`.

    Raises:
        UserError: the file cannot be read, or its tensor names and shapes are not those of the autoencoder.
    """
    # On the meta device no memory is allocated and no random numbers are drawn for weights that the file replaces.
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
    try:
        tensors = load_file(str(config.path))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.vae.path={config.path} cannot be read ({error}); expected a complete ae.safetensors: check the "
            "path and that the file was copied whole."
        ) from error
    _check_shapes(Path(str(config.path)), autoencoder, tensors)
    autoencoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return autoencoder.to(device)


def _check_shapes(path: Path, autoencoder: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise UserError unless the file has exactly the autoencoder's tensors, with their shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in autoencoder.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"model.vae.path={path} does not fit the autoencoder of model.vae: tensor {name} is "
            f"{found.get(name, 'absent')}, expected {expected.get(name, 'absent')} ({len(wrong)} such tensors in all). "
            "Check channels, width, width_multipliers and res_blocks of model.vae, or give the file that they describe."
        )


class FluxCodec:
    """FLUX codec: x_0 = scale * (z - shift) with z drawn from the posterior (docs/bagel.md#vae)."""

    def __init__(self, config: VaeConfig, autoencoder: Autoencoder) -> None:
        self.channels, self.downsample = config.channels, config.downsample
        self.moment_channels = 2 * config.channels
        self._scale, self._shift = config.scale, config.shift
        self._encoder, self._decoder = autoencoder.encoder, autoencoder.decoder

    @torch.no_grad()
    def moments(self, pixels_B3hw: Tensor) -> Tensor:
        """Return means and log variances of the posterior, [B, 2 C, h, w]."""
        return self._encoder(pixels_B3hw)

    def sample(self, moments: Tensor, noise_BChw: Tensor) -> Tensor:
        """Return x_0 [B, C, h, w] from the posterior's moments and standard normal noise of that shape."""
        mean_BChw, log_variance_BChw = moments.chunk(2, dim=1)
        z_BChw = mean_BChw + torch.exp(0.5 * log_variance_BChw) * noise_BChw
        return self._scale * (z_BChw - self._shift)

    def draw(self, moments_BChw: Tensor, generator_seeds: Sequence[int]) -> Tensor:
        """Return x_0, float32 [B, C, h, w], with keyed posterior noise; one seed per image."""
        shape = (self.channels, *moments_BChw.shape[2:])
        noise_BChw = torch.stack([normal(seed, *shape) for seed in generator_seeds])
        assert len(noise_BChw) == len(moments_BChw), "one seed per image"
        return self.sample(moments_BChw, noise_BChw.to(moments_BChw.device))

    def encode(self, pixels_B3hw: Tensor, generator_seeds: Sequence[int]) -> Tensor:
        """Return latents, float32 [B, C, h / downsample, w / downsample]; one seed per image."""
        return self.draw(self.moments(pixels_B3hw), generator_seeds)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Return pixels, float32 [B, 3, h, w]."""
        return self._decoder(latents_BChw / self._scale + self._shift)

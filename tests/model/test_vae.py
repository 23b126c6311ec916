"""Both image codecs: exactness of `blocks`, architecture and strict loading of `flux`, and the choice between them."""

import logging
import math
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from megabagel.config.schema import VaeConfig
from megabagel.errors import UserError
from megabagel.model import vae_blocks
from megabagel.model.noise import normal
from megabagel.model.vae import build_codec
from megabagel.model.vae_blocks import BlockCodec, dct_matrix, zigzag
from megabagel.model.vae_flux import Autoencoder, FluxCodec, load_autoencoder
from tests.support.parity_files import needs

TINY = VaeConfig(codec="flux", channels=3, downsample=4, width=32, width_multipliers=(1, 2, 2), res_blocks=1)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


# blocks


def test_block_transform_is_orthonormal_and_its_order_that_of_jpeg():
    dct = dct_matrix(8)
    torch.testing.assert_close(dct @ dct.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-14)
    assert zigzag(8)[:10] == [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]
    assert sorted(zigzag(8)) == [(u, v) for u in range(8) for v in range(8)]


def test_block_latents_follow_the_plain_definition():
    pixels_B3hw = normal(3, 2, 3, 16, 24).clamp(-1, 1)
    latents = BlockCodec().encode(pixels_B3hw, [0, 0])
    assert latents.shape == (2, 16, 2, 3) and latents.dtype == torch.float32
    red, green, blue = pixels_B3hw.double().unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = [luma, (blue - luma) / 1.772, (red - luma) / 1.402]
    kept = [(plane, uv) for plane, count in ((0, 10), (1, 3), (2, 3)) for uv in zigzag(8)[:count]]
    for b, y, x in ((0, 0, 0), (1, 1, 2)):
        for channel, (plane, (u, v)) in enumerate(kept):
            block = planes[plane][b, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            norm = (math.sqrt(0.5) if u == 0 else 1) * (math.sqrt(0.5) if v == 0 else 1) / 4
            coefficient = norm * sum(
                float(block[i, j]) * math.cos(math.pi * u * (i + 0.5) / 8) * math.cos(math.pi * v * (j + 0.5) / 8)
                for i in range(8)
                for j in range(8)
            )
            expected = (coefficient - vae_blocks.MEAN[channel]) / vae_blocks.STD[channel]
            assert float(latents[b, channel, y, x]) == pytest.approx(expected, abs=1e-5)


def test_block_decoding_loses_nothing_and_encoding_only_what_is_not_kept():
    codec, latents = BlockCodec(), normal(4, 3, 16, 2, 5)
    pixels = codec.decode(latents)
    assert pixels.shape == (3, 3, 16, 40) and pixels.dtype == torch.float32
    torch.testing.assert_close(codec.encode(pixels, [0] * 3), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(codec.encode(pixels, [0] * 3)), pixels, rtol=0, atol=1e-5)
    detail = torch.ones(1, 3, 8, 8)
    detail[..., 1::2] = -1  # a frequency that is not kept
    rounded = codec.decode(codec.encode(detail, [0]))
    assert 0.5 < float((rounded - detail).square().mean()) < 1
    flat = torch.tensor([0.9, -0.2, 0.4])[None, :, None, None].expand(1, 3, 8, 16)
    torch.testing.assert_close(codec.decode(codec.encode(flat, [0])), flat.clone(), rtol=0, atol=1e-6)


def test_block_latents_of_simple_pictures_are_of_order_one():
    """White ground, coloured squares: the constants must bring each channel near its scale."""
    pixels = torch.ones(40, 3, 64, 64)
    for i, place in enumerate(normal(5, 40, 2).mul(8).add(20).int().tolist()):
        top, left = (max(0, p) for p in place)
        pixels[i, :, top : top + 27, left : left + 21] = normal(i, 3)[:, None, None].clamp(-1, 1)
    spread = BlockCodec().encode(pixels, [0] * 40).square().mean(dim=(0, 2, 3)).sqrt()
    assert (spread > 0.2).all() and (spread < 3).all()


# flux


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights that keep activations near one, but for a faint start: the eps of the norms must show."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Autoencoder(TINY).state_dict().items()}

    def weight(seed: int, name: str, shape: torch.Size) -> torch.Tensor:
        if ".norm" in name and name.endswith("weight"):
            return 1 + 0.3 * normal(seed, *shape)
        scale = 0.01 if "conv_in" in name else 1.0
        return scale * normal(seed, *shape) / math.sqrt(math.prod(shape[1:]))

    return {name: weight(i, name, shape) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def weight_file(weights, tmp_path):
    save_file(weights, tmp_path / "ae.safetensors")
    return str(tmp_path / "ae.safetensors")


class Plain:
    """The FLUX autoencoder written as a reading of its tensor names, in float64."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.w = {name: tensor.double() for name, tensor in weights.items()}

    def conv(self, x, name, **options):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def norm(self, x, name):
        groups = x.reshape(len(x), 32, -1)
        spread = (groups.var(dim=2, unbiased=False, keepdim=True) + 1e-6).sqrt()
        flat = ((groups - groups.mean(dim=2, keepdim=True)) / spread).reshape(x.shape)
        return flat * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def swish_conv(self, x, norm, conv):
        h = self.norm(x, norm)
        return self.conv(h * torch.sigmoid(h), conv, padding=1)

    def block(self, x, name):
        h = self.swish_conv(x, f"{name}.norm1", f"{name}.conv1")
        h = self.swish_conv(h, f"{name}.norm2", f"{name}.conv2")
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.w else x)

    def middle(self, x, name):
        x = self.block(x, f"{name}.block_1")
        h = self.norm(x, f"{name}.attn_1.norm")
        q, k, v = (self.conv(h, f"{name}.attn_1.{part}").flatten(2) for part in "qkv")
        seen = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=2)
        x = x + self.conv((v @ seen.transpose(1, 2)).reshape(x.shape), f"{name}.attn_1.proj_out")
        return self.block(x, f"{name}.block_2")

    def moments(self, pixels):
        x = self.conv(pixels.double(), "encoder.conv_in", padding=1)
        for level in range(3):
            x = self.block(x, f"encoder.down.{level}.block.0")
            if level < 2:
                padded = torch.zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1, dtype=x.dtype)
                padded[..., :-1, :-1] = x
                x = self.conv(padded, f"encoder.down.{level}.downsample.conv", stride=2)
        return self.swish_conv(self.middle(x, "encoder.mid"), "encoder.norm_out", "encoder.conv_out")

    def pixels(self, z):
        x = self.middle(self.conv(z.double(), "decoder.conv_in", padding=1), "decoder.mid")
        for level in (2, 1, 0):
            x = self.block(self.block(x, f"decoder.up.{level}.block.0"), f"decoder.up.{level}.block.1")
            if level > 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(x, f"decoder.up.{level}.upsample.conv", padding=1)
        return self.swish_conv(x, "decoder.norm_out", "decoder.conv_out")


def test_flux_follows_the_plain_definition(weights, weight_file):
    codec, plain = FluxCodec(TINY, load_autoencoder(replace(TINY, path=weight_file))), Plain(weights)
    pixels, seeds = normal(1, 2, 3, 24, 20), [17, -(2**63)]
    mean, log_variance = plain.moments(pixels).chunk(2, dim=1)
    z = mean + (log_variance / 2).exp() * torch.stack([normal(seed, 3, 6, 5) for seed in seeds])
    latents = codec.encode(pixels, seeds)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    assert relative(latents, 0.3611 * (z - 0.1159)) < 1e-5
    assert relative(codec.decode(latents), plain.pixels(latents / 0.3611 + 0.1159)) < 1e-5


def test_flux_noise_belongs_to_the_image_not_to_its_place_in_the_batch(weight_file):
    codec = build_codec(replace(TINY, path=weight_file))
    pixels = normal(2, 3, 3, 16, 16)
    batch = codec.encode(pixels, [5, 6, 6 + 2**40])
    alone = codec.encode(pixels[[2, 1]], [6 + 2**40, 6])
    torch.testing.assert_close(alone, batch[[2, 1]], rtol=0, atol=1e-5)
    same = pixels[:1].expand(2, -1, -1, -1)
    assert relative(*codec.encode(same, [6, 6 + 2**40])) > 0.01


def test_flux_at_full_size_has_the_published_tensors():
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Autoencoder(VaeConfig(codec="flux")).state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 83_819_683
    assert len(shapes) == 244
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["decoder.up.3.block.2.conv2.weight"] == (512, 512, 3, 3)
    assert "encoder.down.3.downsample.conv.weight" not in shapes and "decoder.up.0.upsample.conv.weight" not in shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.conv_in.bias"), r"tensor decoder\.conv_in\.bias is absent, expected \(64,\)"),
        (lambda w: w.update({"encoder.x": torch.ones(2)}), r"tensor encoder\.x is \(2,\), expected absent"),
        (
            lambda w: w.update({"encoder.conv_in.weight": torch.ones(32, 4, 3, 3)}),
            r"tensor encoder\.conv_in\.weight is \(32, 4, 3, 3\), expected \(32, 3, 3, 3\) \(1 such",
        ),
    ],
)
def test_flux_weights_must_fit_exactly(weights, tmp_path, change, message):
    changed, path = dict(weights), tmp_path / "other.safetensors"
    change(changed)
    save_file(changed, path)
    with pytest.raises(UserError, match=message) as caught:
        build_codec(replace(TINY, path=str(path)))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["absent", "empty", "truncated", "text", "folder"])
def test_unreadable_flux_weights_are_one_clear_message(weight_file, tmp_path, damage):
    path, whole = tmp_path / "damaged.safetensors", (tmp_path / "ae.safetensors").read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        path.write_bytes({"empty": b"", "truncated": whole[:-100], "text": b"<html>not found</html>"}[damage])
    with pytest.raises(UserError, match=r"model\.vae\.path=.*damaged\.safetensors cannot be read"):
        build_codec(replace(TINY, path=str(path)))


@needs("prim_02_tiny_vae")
def test_official_numbers(golden, tmp_path):
    tensors, about = golden("prim_02_tiny_vae")
    shape = about["vae"]
    config = VaeConfig(
        codec="flux",
        path=str(tmp_path / "ae.safetensors"),
        channels=shape["z_channels"],
        downsample=shape["downsample"],
        width=shape["ch"],
        width_multipliers=tuple(shape["ch_mult"]),
        res_blocks=shape["num_res_blocks"],
    )
    save_file({name: t for name, t in tensors.items() if not name.startswith("vae/")}, config.path)
    codec = build_codec(config)
    assert isinstance(codec, FluxCodec)
    moments = codec.moments(tensors["vae/x"])
    assert relative(moments, tensors["vae/expect_moments"]) < 1e-5
    latents = codec.sample(moments, tensors["vae/eps"])
    assert relative(latents, tensors["vae/expect_z"]) < 1e-5
    assert relative(codec.decode(latents), tensors["vae/expect_decoded"]) < 1e-5


# the choice


def test_the_log_names_the_codec(caplog, weight_file):
    with caplog.at_level(logging.INFO):
        build_codec(VaeConfig())
        build_codec(replace(TINY, path=weight_file))
    first, second = caplog.messages
    assert "blocks" in first and "flux" in second and weight_file in second


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VaeConfig(codec="flux"), r"model\.vae\.path is not set"),
        (VaeConfig(channels=4), r"channels=4 .* which makes 16 channels at 1/8"),
        (replace(TINY, downsample=8, path="ae.safetensors"), r"downsample=8 .* makes 3 channels at 1/4"),
    ],
)
def test_a_codec_that_cannot_be_built_is_one_clear_message(config, message):
    with pytest.raises(UserError, match=message):
        build_codec(config)


# the tool that measures the constants of `blocks`


def test_measuring_weighs_sources_equally_and_counts_what_it_cannot_read(tmp_path):
    folder, shard = tmp_path / "folder", tmp_path / "shard.tar"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 24), "white").save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    Image.new("RGBA", (9, 9), (0, 0, 0, 255)).save(tmp_path / "black.png")
    with tarfile.open(shard, "w") as tar:
        tar.add(tmp_path / "black.png", "black.png")
    command = [sys.executable, "-m", "tools.measure_blocks", folder, shard]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert "3 images, 18 blocks, 1 skipped" in ran.stderr and "1 images, 1 blocks, 0 skipped" in ran.stderr
    # white is +1, black -1 in 64 pixels: luma DC of +8 and -8, each half of the mix
    zeros = ", ".join(["0.0000"] * 15)
    assert ran.stdout.replace("-0.0000", "0.0000").split("\n")[:2] == [
        f"MEAN = (0.0000, {zeros})",
        f"STD = (8.0000, {zeros})",
    ]

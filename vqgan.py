"""The image tokenizer: a VQGAN turns pixels into a grid of discrete codes and back.

    pixels --Encoder--> z --Quantizer--> codes        an image becomes h * w integers in 0..K-1
    codes  --codebook--> z_q --Decoder--> pixels      and comes back as an image

The network is that of taming-transformers (Esser et al. 2021, arXiv 2012.09841), which Chameleon and Liquid
use; parameter names are theirs. Two options suit small machines: a patch stem (pixel-unshuffle), and
L2-normalised codes of few dimensions (ViT-VQGAN, arXiv 2110.04627), which keep the whole codebook in use.

B batch   C channels   H, W pixels   h, w code grid (h = H / f)   K codes   e dims of a code   N = B * h * w
"""

import hashlib
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class VQGANConfig:
    """The defaults are Chameleon's tokenizer: 512x512 pixels become 32x32 of 8192 codes."""
    ch: int = 128                               # channels of the first level
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level / ch; all but the last halve h, w
    num_res_blocks: int = 2                     # in a level of the encoder; the decoder has one more
    attn_levels: tuple[int, ...] = ()           # levels with attention, besides the middle
    z_channels: int = 256                       # the encoder's output, before quant_conv
    n_embed: int = 8192                         # K
    embed_dim: int = 256                        # e
    l2_norm: bool = False                       # compare directions instead of positions
    patch: int = 1                              # pixel-unshuffle factor of the stem
    beta: float = 0.25                          # weight of the commitment loss

    def __post_init__(self):
        self.ch_mult, self.attn_levels = tuple(self.ch_mult), tuple(self.attn_levels)  # a file has lists
        if self.ch % 32:
            raise ValueError(f"ch is {self.ch}: group norm needs a multiple of 32")

    @property
    def f(self) -> int:
        """How many pixels a code is wide."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


# ---- Blocks -----------------------------------------------------------------------------------------------

def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):                                           # (B, c_in, h, w)
        h = self.conv1(F.silu(self.norm1(x)))                       # (B, c_out, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """One head of attention over all places of the grid."""
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):                                           # (B, C, h, w)
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).mT for layer in (self.q, self.k, self.v))  # (B, h*w, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.mT.reshape(x.shape))


def downsample(c):                                                  # (B, C, h, w) -> (B, C, h/2, w/2)
    pad = nn.ZeroPad2d((0, 1, 0, 1))                                # right and below, as in taming
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2)))


def upsample(c):                                                    # (B, C, h, w) -> (B, C, 2h, 2w)
    resize = nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.Sequential(OrderedDict(resize=resize, conv=nn.Conv2d(c, c, 3, padding=1)))


def middle(c):                                                      # (B, C, h, w) -> (B, C, h, w)
    first, attention, second = ResnetBlock(c, c), AttnBlock(c), ResnetBlock(c, c)
    return nn.Sequential(OrderedDict(block_1=first, attn_1=attention, block_2=second))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention behind each if asked for."""
    def __init__(self, c_in, c_out, blocks, attention, down=None, up=None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) if attention else nn.Identity() for _ in range(blocks))
        self.downsample, self.upsample = down or nn.Identity(), up or nn.Identity()

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch ** 2, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([config.ch, *widths], widths)):
            down, attention = downsample(c_out) if i < len(widths) - 1 else None, i in config.attn_levels
            self.down.append(Level(c_in, c_out, config.num_res_blocks, attention, down=down))
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, pixels):                                      # (B, 3, H, W)
        x = self.conv_in(F.pixel_unshuffle(pixels, self.patch))     # (B, ch, H/patch, W/patch)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))    # (B, z_channels, h, w)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()                                   # numbered as in the encoder
        for i, (c_in, c_out) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            up, attention = upsample(c_out) if i > 0 else None, i in config.attn_levels
            self.up.append(Level(c_in, c_out, config.num_res_blocks + 1, attention, up=up))
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch ** 2, 3, padding=1)

    def forward(self, z):                                           # (B, z_channels, h, w)
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))                 # (B, 3 * patch^2, H/patch, W/patch)
        return F.pixel_shuffle(x, self.patch)                       # (B, 3, H, W)


# ---- The quantizer ----------------------------------------------------------------------------------------

@torch.autocast("cuda", enabled=False)      # in bf16, near codes would be one
def nearest(vectors, centres):
    """Vectors (N, e), centres (k, e) -> the nearest centre's number (N,)."""
    norms, parts = centres.pow(2).sum(1), vectors.split(2 ** 14)    # 8192 centres: 0.5 GB of distances a part
    return torch.cat([torch.addmm(norms, part, centres.T, alpha=-2).argmin(1) for part in parts])


class Quantizer(nn.Module):
    """Replaces each vector by the nearest row of a codebook (van den Oord et al. 2017, arXiv 1711.00937)."""
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.n_embed, config.embed_dim)
        self.l2_norm, self.beta = config.l2_norm, config.beta
        nn.init.uniform_(self.embedding.weight, -1.0 / config.n_embed, 1.0 / config.n_embed)

    def project(self, x):
        """x (n, e, ...) -> with l2_norm the points on the unit sphere, else x."""
        return F.normalize(x, dim=1) if self.l2_norm else x

    def codebook(self):
        """The rows that the decoder sees -> (K, e)."""
        return self.project(self.embedding.weight)

    def vectors(self, z):
        """(B, e, h, w) -> (N, e)"""
        return self.project(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]))

    @torch.no_grad()
    def assign(self, z):
        """(B, e, h, w) -> codes (B, h, w)"""
        return nearest(self.vectors(z), self.codebook()).view(z.shape[0], *z.shape[2:])

    def lookup(self, codes):
        """(B, h, w) -> (B, e, h, w)"""
        return F.embedding(codes, self.codebook()).permute(0, 3, 1, 2)

    def forward(self, z):                                           # (B, e, h, w)
        z = self.project(z)
        codes = self.assign(z)                                      # (B, h, w)
        z_q = self.lookup(codes)
        # The codebook follows the encoder; the encoder learns, beta times slower, to stay near its code.
        loss = F.mse_loss(z_q, z.detach()) + self.beta * F.mse_loss(z, z_q.detach())
        if self.l2_norm:
            loss = loss * z.shape[1]                                # else the mean would shrink with e
        return z + (z_q - z).detach(), codes, loss                  # straight through: z gets z_q's gradient

    @torch.no_grad()
    def replace(self, rows, vectors):
        """Put vectors (n, e) of the encoder at rows (n,) of the codebook."""
        self.embedding.weight[rows] = vectors.to(self.embedding.weight)


def sample_far(vectors, centres, n, generator):
    """n of the vectors (N, e), in proportion to squared distance: plain background gets few codes."""
    weights = (vectors - centres[nearest(vectors, centres)]).pow(2).sum(1).cpu().double() + 1e-12
    chosen = torch.multinomial(weights, n, replacement=n > len(weights), generator=generator)
    return vectors[chosen.to(vectors.device)]


# ---- The whole --------------------------------------------------------------------------------------------

class Output(NamedTuple):
    pixels: torch.Tensor            # (B, 3, H, W), the reconstruction
    codes: torch.Tensor | None      # (B, h, w); None while vectors pass unquantized
    loss: torch.Tensor              # codebook and commitment loss, a scalar


class VQGAN(nn.Module):
    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def latents(self, pixels):
        """pixels (B, 3, H, W) -> z (B, e, h, w), before quantization."""
        (h, w), f = pixels.shape[-2:], self.config.f
        if h % f or w % f:
            raise ValueError(f"a picture of {w}x{h} pixels cannot be cut into codes of {f}x{f} pixels: "
                             f"choose an image size that {f} divides")
        return self.quant_conv(self.encoder(pixels))

    def forward(self, pixels, quantize=True) -> Output:
        """With quantize=False vectors pass as they are."""
        z = self.latents(pixels).float()
        if quantize:
            z_q, codes, loss = self.quantize(z)
        else:
            z_q, codes, loss = self.quantize.project(z), None, z.new_zeros(())
        return Output(self.decoder(self.post_quant_conv(z_q)).float(), codes, loss)

    @torch.no_grad()
    def encode(self, pixels):
        """pixels (B, 3, H, W) in [-1, 1] -> codes (B, h, w), int64 in 0..K-1."""
        return self.quantize.assign(self.latents(pixels))

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, h, w) -> pixels (B, 3, H, W) in [-1, 1]."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(codes))).clamp(-1, 1)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any weight: codes belong to one network."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @staticmethod
    def load(path, device="cpu") -> "VQGAN":
        """Read our vqgan.pt, or a .ckpt of taming-transformers or Chameleon, whose tensors tell its shape.

        ValueError, naming the file, if it is anything else.
        """
        checkpoint = read_checkpoint(path)
        try:
            if "config" in checkpoint:
                config, state = VQGANConfig(**checkpoint["config"]), checkpoint["model"]
            else:               # it holds losses, too
                every = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
                state = {m[1]: every[name] for name in every if (m := NAMES.fullmatch(name))}
                for names, family in OTHERS.items():
                    if re.search(names, " ".join(state)):
                        raise ValueError(f"weights of {family}")
                config = infer_config(state)
                if config.l2_norm:
                    print(f"{path}: all codes have length 1: compared as directions", file=sys.stderr)
            with torch.device("meta"):
                model = VQGAN(config)
            model.load_state_dict(state, strict=True, assign=True)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"{path}: not a VQGAN checkpoint ({reason})") from None
        return model.float().to(device).eval()


# ---- The adversary, which makes large pictures sharp ------------------------------------------------------

class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): a logit for each patch, higher for real ones."""
    def __init__(self, ch=64, layers=3):
        super().__init__()
        widths = [ch * min(2 ** i, 8) for i in range(layers + 1)]
        main = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            main += [nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=False),
                     nn.BatchNorm2d(widths[i]), nn.LeakyReLU(0.2, True)]
        self.main = nn.Sequential(*main, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, pixels):                                      # (B, 3, H, W)
        return self.main(pixels)                                    # (B, 1, about H/8, about W/8)


def discriminator_loss(discriminator, real, fake):
    """Hinge loss: logits above 1 for real patches, below -1 for fake ones."""
    return 0.5 * (F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake.detach())).mean())


def generator_loss(discriminator, fake):
    """Raise the logits of fake patches."""
    return -discriminator(fake).mean()


def adaptive_weight(reconstruction, adversarial, last_layer, ceiling=1e4):
    """The weight that makes both losses pull equally on the last layer (Esser et al. 2021, equation 7)."""
    g_rec, = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    g_adv, = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (g_rec.norm() / (g_adv.norm() + 1e-4)).clamp(0, ceiling).detach()


# ---- Checkpoint files -------------------------------------------------------------------------------------

NAMES = re.compile(r"(?:module\.|model\.|_orig_mod\.|first_stage_model\.)*"     # of wrappers
                   r"((?:encoder|decoder|quantize|quant_conv|post_quant_conv)\..*)")
OTHERS = {r"encoder\.down_blocks\.": "diffusers' VQModel", r"encoder\.conv_blocks\.": "LlamaGen",
          r"quantize\.(embed|proj)\.": "a Gumbel VQGAN", r"^encoder(?!.* quantize\.)": "a KL autoencoder",
          r"^encoder(?!.* decoder\.)": "ChameleonVQVAE, which has no decoder"}


class LightningStub:
    """Stands in for a class of PyTorch Lightning, a key in taming's .ckpt files."""


def read_checkpoint(path, mmap=False) -> dict:
    """The dict in a file of torch.save, none of its code run; ValueError, naming the file, for all else."""
    lightning = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    try:
        with torch.serialization.safe_globals([(LightningStub, lightning)]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception:                   # the unpickler and the zip reader have many
        raise ValueError(f"{path}: damaged, or not a checkpoint of plain tensors") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: not a checkpoint, it holds a {type(checkpoint).__name__}")
    return checkpoint


def infer_config(state) -> VQGANConfig:
    """A configuration from names and shapes of tensors."""
    def count(pattern):
        return len({m[1] for name in state if (m := re.match(pattern, name))})
    conv_in, conv_out = state["encoder.conv_in.weight"].shape, state["encoder.conv_out.weight"].shape
    n_embed, embed_dim = state["quantize.embedding.weight"].shape
    levels = count(r"encoder\.down\.(\d+)\.")
    lengths = state["quantize.embedding.weight"].float().norm(dim=1)
    widths = [len(state[f"encoder.down.{i}.block.0.conv1.bias"]) for i in range(levels)]
    return VQGANConfig(
        ch=conv_in[0], ch_mult=[w // conv_in[0] for w in widths],
        num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
        attn_levels=[i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state],
        z_channels=conv_out[0], n_embed=n_embed, embed_dim=embed_dim, patch=round((conv_in[1] / 3) ** 0.5),
        l2_norm=bool((lengths - 1).abs().max() < 2e-3))      # as when codes are directions

"""The image tokenizer: a VQGAN turns pixels into a grid of discrete codes and back.

    pixels --Encoder--> z --Quantizer--> codes        an image becomes h * w integers in 0..K-1
    codes  --codebook--> z_q --Decoder--> pixels      and comes back as an image

The network is the one of taming-transformers (Esser et al. 2021, arXiv 2012.09841), which Chameleon and Liquid use with
8192 codes; parameter names are theirs, so that their checkpoints load as they are. For small machines there are two
options: a patch stem (pixel-unshuffle before the first convolution) and L2-normalised codes of few dimensions
(ViT-VQGAN, arXiv 2110.04627), which keep the whole codebook in use.

B batch   C channels   H, W pixels   h, w code grid (h = H / f)   K codes   e dimensions of a code   N = B * h * w
"""

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class VQGANConfig:
    """The defaults are Chameleon's tokenizer: 512x512 pixels become 32x32 of 8192 codes."""
    ch: int = 128                               # channels of the first level
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level, in units of ch; all but the last halve h and w
    num_res_blocks: int = 2                     # in a level of the encoder; the decoder has one more
    attn_levels: tuple[int, ...] = ()           # levels with attention, besides the middle
    z_channels: int = 256                       # the encoder's output, before quant_conv
    n_embed: int = 8192                         # K
    embed_dim: int = 256                        # e
    l2_norm: bool = False                       # compare directions instead of positions
    patch: int = 1                              # pixel-unshuffle factor of the stem; 1 is taming's network
    beta: float = 0.25                          # weight of the commitment loss

    def __post_init__(self):
        self.ch_mult, self.attn_levels = tuple(self.ch_mult), tuple(self.attn_levels)   # lists, if read from a file
        if self.ch % 32:
            raise ValueError(f"ch is {self.ch}: group norm needs a multiple of 32")

    @property
    def f(self) -> int:
        """How many pixels a code is wide."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks

def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()   # taming's name

    def forward(self, x):                                           # (B, c_in, h, w)
        h = self.conv1(F.silu(self.norm1(x)))                       # (B, c_out, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """One head of attention in which every place of the grid sees every other."""
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


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):                                           # (B, C, h, w)
        return self.conv(F.pad(x, (0, 1, 0, 1)))                    # (B, C, h/2, w/2); taming pads right and below only


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):                                           # (B, C, h, w)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2h, 2w)


class Level(nn.Module):
    """Residual blocks at one resolution, each with attention behind it if asked for, then a change of resolution."""
    def __init__(self, c_in, c_out, blocks, attention, downsample=None, upsample=None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        self.downsample, self.upsample = downsample or nn.Identity(), upsample or nn.Identity()

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1 = ResnetBlock(c, c)
        self.attn_1 = AttnBlock(c)
        self.block_2 = ResnetBlock(c, c)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch ** 2, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([config.ch, *widths], widths)):
            down = Downsample(c_out) if i < len(widths) - 1 else None
            self.down.append(Level(c_in, c_out, config.num_res_blocks, i in config.attn_levels, downsample=down))
        self.mid = Middle(widths[-1])
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
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()                                   # numbered as in the encoder, run from last to first
        for i, (c_in, c_out) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            up = Upsample(c_out) if i > 0 else None
            self.up.append(Level(c_in, c_out, config.num_res_blocks + 1, i in config.attn_levels, upsample=up))
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch ** 2, 3, padding=1)

    def forward(self, z):                                           # (B, z_channels, h, w)
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))                 # (B, 3 * patch^2, H/patch, W/patch)
        return F.pixel_shuffle(x, self.patch)                       # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# The quantizer

def nearest(vectors, centres):
    """(N, e), (k, e) -> (N,) centres with the least squared distance; |v|^2, the same for all, is left out."""
    norms, parts = centres.pow(2).sum(1), vectors.split(2 ** 14)    # half a gigabyte of distances to 8192 centres
    return torch.cat([torch.addmm(norms, part, centres.T, alpha=-2).argmin(1) for part in parts])


class Quantizer(nn.Module):
    """Replaces each vector by the nearest row of a codebook (van den Oord et al. 2017, arXiv 1711.00937).

    With l2_norm, vectors and rows are compared as directions on the unit sphere, and the sphere's point is passed on.
    """
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.n_embed, config.embed_dim)
        self.l2_norm, self.beta = config.l2_norm, config.beta
        nn.init.uniform_(self.embedding.weight, -1.0 / config.n_embed, 1.0 / config.n_embed)

    def project(self, x, dim=1):
        """With l2_norm the point on the unit sphere, else x as it is."""
        return F.normalize(x, dim=dim) if self.l2_norm else x

    def codebook(self):
        """The rows that the decoder sees -> (K, e)."""
        return self.project(self.embedding.weight, -1)

    def vectors(self, z):
        """(B, e, h, w) -> (N, e), on the sphere with l2_norm."""
        return self.project(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), -1)

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
        # The codebook learns to follow the encoder; the encoder learns, beta times slower, to stay with its code.
        loss = F.mse_loss(z_q, z.detach()) + self.beta * F.mse_loss(z, z_q.detach())
        if self.l2_norm:
            loss = loss * z.shape[1]                                # a mean over e of unit vectors would shrink with e
        return z + (z_q - z).detach(), codes, loss                  # the gradient of z_q passes straight through to z

    @torch.no_grad()
    def replace(self, rows, vectors):
        """Put vectors (n, e) of the encoder at rows (n,) of the codebook: how it starts, how dead codes come back."""
        self.embedding.weight[rows] = vectors.to(self.embedding.weight)


def usage(counts):
    """counts (K,) of each code -> (codes used, perplexity: how many equally used codes have this entropy)."""
    counts = counts.cpu().double()                                  # MPS has no float64
    p = counts / counts.sum().clamp(min=1)
    return int((counts > 0).sum()), float(torch.special.entr(p).sum().exp())


def perturb(codebook, noise, codes, generator):
    """codes (h, w) -> codes that look alike: the nearest to their rows of the codebook (K, e) under Gaussian noise.

    noise: in standard deviations of the codebook. (RQ-Transformer, arXiv 2203.01941, samples its training codes, too.)
    """
    vectors = codebook[codes.flatten().long()]                      # (h * w, e)
    vectors = vectors + noise * codebook.std(0) * torch.randn(vectors.shape, generator=generator)
    return nearest(vectors, codebook).view(codes.shape)


def draw_far(vectors, centres, n, generator):
    """n of the vectors (N, e), drawn in proportion to the squared distance to the nearest centre (k, e)."""
    weights = (vectors - centres[nearest(vectors, centres)]).pow(2).sum(1).cpu().double() + 1e-12
    chosen = torch.multinomial(weights, n, replacement=n > len(weights), generator=generator)
    return vectors[chosen.to(vectors.device)]


def kmeans(vectors, k, steps=10, generator=None):
    """vectors (N, e) -> (k, e) centres: k-means++ seeding (Arthur and Vassilvitskii 2007), then Lloyd's algorithm.

    Seeds in proportion to squared distance keep a plain background, half of all vectors, from taking half of the codes.
    """
    centres = vectors[:1]
    while len(centres) < k:                 # a quarter more each time: one by one would take k passes
        n = min(max(1, len(centres) // 4), k - len(centres))
        centres = torch.cat([centres, draw_far(vectors, centres, n, generator)])
    for _ in range(steps):
        chosen = nearest(vectors, centres)
        sums = torch.zeros_like(centres).index_add_(0, chosen, vectors)
        counts = chosen.bincount(minlength=k).unsqueeze(1)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


# ---------------------------------------------------------------------------------------------------------------------
# The whole

class Inert:
    """Stands in for the class of PyTorch Lightning that is a dictionary key in taming's .ckpt files."""


def read_checkpoint(path, mmap=False) -> dict:
    """The dict that torch.save wrote to a file; ValueError, naming the file, for all else. No code in it is run."""
    lightning = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    try:
        with torch.serialization.safe_globals([(Inert, lightning)]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:          # torch raises whatever its unpickler or zip reader stumbles over
        raise ValueError(f"{path}: damaged, or not a checkpoint of plain tensors ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: not a checkpoint, it holds a {type(checkpoint).__name__}")
    return checkpoint


def infer_config(state) -> VQGANConfig:
    """A VQGANConfig from the names and shapes of taming's tensors."""
    def count(pattern):
        return len({m[1] for name in state if (m := re.match(pattern, name))})
    try:
        conv_in, conv_out = state["encoder.conv_in.weight"].shape, state["encoder.conv_out.weight"].shape
        n_embed, embed_dim = state["quantize.embedding.weight"].shape
        levels = count(r"encoder\.down\.(\d+)\.")
        widths = [len(state[f"encoder.down.{i}.block.0.conv1.bias"]) for i in range(levels)]
    except KeyError as missing:
        raise ValueError(f"{missing} is missing") from None
    return VQGANConfig(
        ch=conv_in[0], ch_mult=[w // conv_in[0] for w in widths],
        num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
        attn_levels=[i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state],
        z_channels=conv_out[0], n_embed=n_embed, embed_dim=embed_dim, patch=round((conv_in[1] / 3) ** 0.5))


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
        """With quantize=False, the vectors pass unquantized: how training begins, before there is a codebook."""
        z = self.latents(pixels)
        if quantize:
            z_q, codes, loss = self.quantize(z)
        else:
            z_q, codes, loss = self.quantize.project(z), None, z.new_zeros(())
        return Output(self.decoder(self.post_quant_conv(z_q)), codes, loss)

    @torch.no_grad()
    def encode(self, pixels):
        """pixels (B, 3, H, W) in [-1, 1] -> codes (B, h, w), int64 in 0..K-1."""
        return self.quantize.assign(self.latents(pixels))

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, h, w) -> pixels (B, 3, H, W) in [-1, 1]."""
        z_q = self.quantize.lookup(codes)
        return self.decoder(self.post_quant_conv(z_q)).clamp(-1, 1)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any weight does: codes belong to the network that made them."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @staticmethod
    def load(path, device="cpu") -> "VQGAN":
        """Read our own vqgan.pt, or a .ckpt of taming-transformers or Chameleon, whose shape is read off its tensors.

        Raises ValueError, naming the file, when it is missing, damaged, holds more than tensors, or is another network.
        """
        checkpoint = read_checkpoint(path)
        try:
            if isinstance(checkpoint.get("config"), dict) and isinstance(checkpoint.get("model"), dict):
                config, state = VQGANConfig(**checkpoint["config"]), checkpoint["model"]
            else:
                ours = re.compile(r"(encoder|decoder|quantize|quant_conv|post_quant_conv)\.")
                state = {k: v for k, v in checkpoint.get("state_dict", checkpoint).items() if ours.match(k)}
                config = infer_config(state)
            with torch.device("meta"):
                model = VQGAN(config)
            model.load_state_dict(state, strict=True, assign=True)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a VQGAN checkpoint: {' '.join(str(error).split())[:300]}") from None
        return model.float().to(device).eval()


# ---------------------------------------------------------------------------------------------------------------------
# The adversary and the losses: off in the small preset, and what makes large pictures sharp

class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): a logit for each patch of the picture, higher for real ones; names are taming's."""
    def __init__(self, ch=64, layers=3):
        super().__init__()
        widths = [ch * min(2 ** i, 8) for i in range(layers + 1)]
        main = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for i in range(1, layers + 1):
            main += [nn.Conv2d(widths[i - 1], widths[i], 4, stride=2 if i < layers else 1, padding=1, bias=False),
                     nn.BatchNorm2d(widths[i]), nn.LeakyReLU(0.2, True)]
        self.main = nn.Sequential(*main, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, pixels):                                      # (B, 3, H, W)
        return self.main(pixels)                                    # (B, 1, about H/8, about W/8)


def discriminator_loss(discriminator, real, fake):
    """Hinge loss: real patches above 1, drawn ones below -1. fake is detached: the generator never sees this loss."""
    return 0.5 * (F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake.detach())).mean())


def generator_loss(discriminator, fake):
    """Raise the discriminator's logits of what was drawn; the caller zeroes the discriminator's gradients after it."""
    return -discriminator(fake).mean()


def adaptive_weight(reconstruction, adversarial, last_layer, ceiling=1e4):
    """The weight that makes both losses pull equally on the decoder's last layer (Esser et al. 2021, equation 7)."""
    g_rec, = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    g_adv, = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (g_rec.norm() / (g_adv.norm() + 1e-4)).clamp(0, ceiling).detach()


def blurred_pool(kernel):
    """Max pooling in steps of one, then a blur (C, 1, 3, 3) in steps of two, so that a shift changes little."""
    blur = nn.Conv2d(len(kernel), len(kernel), 3, stride=2, groups=len(kernel), bias=False)
    blur.weight.data = kernel.float()
    return [nn.MaxPool2d(2, stride=1), nn.ReflectionPad2d(2), blur]


class Perceptual(nn.Module):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924): distance of two pictures in the features of VGG16.

    weights: a file with the 13 convolutions of VGG16's trunk and 5 linear heads, such as vgg_shift_tolerant.pth in
    PyPI's stlpips-pytorch (the file in PyPI's lpips lacks the trunk). Blur filters in it are put behind the pooling
    (shift-tolerant LPIPS, Ghildyal and Liu 2022, arXiv 2207.13686).
    """
    WIDTHS = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)

    def __init__(self, weights):
        super().__init__()
        state = {k: v for k, v in read_checkpoint(weights).items() if isinstance(v, torch.Tensor)}
        # Packages number the layers differently: order and shapes tell what is what.
        kernels = [v for k, v in state.items() if v.ndim == 4 and v.shape[1] > 1 and v.shape[2:] == (3, 3)]
        biases = [v for k, v in state.items() if v.ndim == 1 and k.endswith("bias")]
        heads = [v for k, v in state.items() if k.startswith("lin") and v.shape[:1] + v.shape[2:] == (1, 1, 1)]
        blurs = [v for k, v in state.items() if k.endswith(".filt")]
        widths = [c for stage in self.WIDTHS for c in stage]
        shapes = [(c, c_in, 3, 3) for c_in, c in zip([3] + widths, widths)]
        if ([k.shape for k in kernels] != shapes or [len(b) for b in biases] != widths
                or [h.shape[1] for h in heads[:5]] != [s[-1] for s in self.WIDTHS] or len(blurs) not in (0, 4)):
            raise ValueError(f"{weights}: not the trunk of VGG16 with 5 linear heads")
        layers = iter(zip(kernels, biases))
        self.stages = nn.ModuleList()
        for i, stage in enumerate(self.WIDTHS):
            block = [] if i == 0 else blurred_pool(blurs[i - 1]) if blurs else [nn.MaxPool2d(2)]
            for c in stage:
                kernel, bias = next(layers)
                conv = nn.Conv2d(kernel.shape[1], c, 3, padding=1)
                conv.weight.data, conv.bias.data = kernel.float(), bias.float()
                block += [conv, nn.ReLU()]
            self.stages.append(nn.Sequential(*block))
        self.heads = nn.ParameterList(nn.Parameter(head.float()) for head in heads[:5])
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))  # lpips' scaling layer
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def features(self, pixels):                                     # (B, 3, H, W)
        x = (pixels - self.mean) / self.std
        for stage in self.stages:
            x = stage(x)
            yield F.normalize(x, dim=1, eps=1e-10)                  # (B, C, h, w)

    def forward(self, a, b):
        """Pictures (B, 3, H, W) in [-1, 1] -> a scalar. Each goes through VGG16 alone: a target needs no backward."""
        return sum(F.conv2d((fa - fb).pow(2), head).mean()
                   for fa, fb, head in zip(self.features(a), self.features(b), self.heads))

"""A small critic of footage that asks for crisp pictures: what a pointwise loss leaves blurred looks wrong to it.

Source: PatchGAN (Isola et al. 2017, arXiv 1611.07004) with the hinge loss and spectral normalisation (Miyato et al. 2018,
arXiv 1802.05957), as usual for autoencoders of diffusion models (Esser et al. 2021, arXiv 2012.09841). Differs: it sees pairs of
neighbouring frames, so that edges must also move as real ones do; it sees only what a small blur takes away, so that it cannot shift
the colours of large areas (its pull is small but even: without that it cost 5 dB in 80 steps); and the share of its gradient is set on
the decoded pixels, not on the decoder's last layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

BLUR = 7  # pixels
GAIN = 8.0  # of the detail: flat pictures have little of it, and spectral norms let no layer make up for that


class PatchDiscriminator(nn.Module):
    """Scores every patch of every pair of neighbouring frames: above 0 is real, below is decoded.

    The patches are about 30 pixels wide, one every 4 pixels.

    Args:
        width: channels of the first layer; the later ones have twice as many.
    """

    def __init__(self, width: int = 48, image_channels: int = 3):
        super().__init__()
        pixels = 2 * image_channels * 4  # two frames, 2x2 pixels folded into channels
        sizes = [(pixels, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 1, 1)]
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 3, stride, padding=1)) for before, after, stride in sizes
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, video: Tensor) -> Tensor:
        """video [B,3,T,H,W] in [-1, 1], T >= 2, H and W even -> scores [B*(T-1),1,H/4,W/4]."""
        detail = video - functional.avg_pool3d(video, (1, BLUR, BLUR), 1, (0, BLUR // 2, BLUR // 2), count_include_pad=False)
        frames = functional.pixel_unshuffle(GAIN * detail.transpose(1, 2), 2)
        x = torch.cat([frames[:, :-1], frames[:, 1:]], 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for layer in self.layers[:-1]:
            x = functional.leaky_relu(layer(x), 0.2)
        return self.layers[-1](x)


def hinge_loss(real: Tensor, decoded: Tensor) -> Tensor:
    """What the discriminator minimises, from its scores of real and of decoded footage."""
    return (functional.relu(1 - real).mean() + functional.relu(1 + decoded).mean()) / 2


def adversarial_term(discriminator: nn.Module, decoded: Tensor, other: Tensor, share: float) -> Tensor:
    """A term to add to the loss `other` of `decoded` [B,3,T,H,W], with the discriminator's wish for higher scores as its gradient.

    share: length of that gradient, as a share of the length of the gradient of `other`, both on the decoded pixels. The value
    of the term means nothing.
    """
    pixels = decoded.detach().requires_grad_()
    (wish,) = torch.autograd.grad(-discriminator(pixels).mean(), pixels)
    (given,) = torch.autograd.grad(other, decoded, retain_graph=True)
    scale = share * given.norm() / wish.norm().clamp(min=1e-12)
    return (decoded * (scale * wish)).sum()

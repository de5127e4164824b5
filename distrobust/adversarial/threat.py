"""Norm balls around an image: what an attack may reach, how it moves, where it starts.

With delta = x' - x, per image, Linf | L2 (Madry et al. 2018, section 2.1) | L1 (ascent: SLIDE, Tramer and Boneh 2019):

    project         clip(x + clip(delta, -eps, eps), 0, 1)  |  clip(x + delta min(1, eps / ||delta||), 0, 1)
    ascend          x' + alpha sign(g)                      |  x' + alpha g / ||g||
    random_start    x + U(-eps, eps), clipped               |  x + a uniform point of the ball, clipped

    L1: project     the nearest point of ball and [0, 1] together (Croce and Hein 2021)
        ascend      x' + alpha sign(g) / m on the m = 1 % of entries with the largest |g| that have room to move
        random      x + a uniform point of the ball, clipped

Clipping to [0, 1] after the projection never leaves the ball, because x is in [0, 1] itself; for L2 the result is then
near, not nearest. Everything is per image, so no result depends on the other images of the batch, except that random
numbers are drawn in batch order.

Points that are no images, such as a text's embedding, have no [0, 1] to stay in: OpenThreat is the ball alone.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from distrobust.errors import ConfigError

Norm = Literal["linf", "l2", "l1"]
L1_SHARE = 0.01  # of the entries that an L1 step moves


@dataclass(frozen=True)
class Threat:
    """A ball of radius eps, in units of images in [0, 1]; valid by construction, or ConfigError.

    eps = 0 is the identity. Linf needs eps <= 1; L2 and L1 have no upper bound.
    """

    norm: Norm
    eps: float
    has_box: ClassVar[bool] = True  #: points are in [0, 1] and stay there

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            closest = difflib.get_close_matches(str(self.norm).lower(), get_args(Norm), n=1, cutoff=0.1)
            hint = f"did you mean {closest[0]!r}? " if closest else ""
            raise ConfigError(f"threat.norm: {self.norm!r}; {hint}valid: {', '.join(get_args(Norm))}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ConfigError(f"threat.eps: {self.eps}; must be a finite number of at least 0")
        if self.has_box and self.norm == "linf" and self.eps > 1:
            raise ConfigError(
                f"threat.eps: {self.eps} for linf, but images are in [0, 1]; if you mean {self.eps:g} of 255 "
                f"grey levels, write {self.eps:g}/255 = {self.eps / 255:.5f}"
            )

    @property
    def where(self) -> Tensor | None:
        """1 where an example may be moved, 0 where not, to be multiplied with its points; None: everywhere."""
        return None

    def clip(self, x: Tensor) -> Tensor:
        """x in the box, if there is one."""
        return x.clamp(0.0, 1.0) if self.has_box else x

    def describe(self) -> str:
        """'Linf 8/255', 'L2 0.5': in grey levels where that is a whole number and the decimal is not short."""
        levels = self.eps * 255
        short = abs(self.eps - round(self.eps, 2)) < 1e-9  # 0.2 is 0.2 and not 51/255
        whole = self.norm == "linf" and not short and abs(levels - round(levels)) < 1e-6
        return f"{self.norm.capitalize()} " + (f"{round(levels)}/255" if whole else f"{self.eps:.4g}")


@dataclass(frozen=True)
class OpenThreat(Threat):
    """A ball of points without bounds, (B, L, D) of a text, say: L2 over all their L D entries together.

    where: (B, L, 1) float, say; see Threat.where. Linf or L2; with L1, ConfigError.
    """

    where: Tensor | None = field(default=None, repr=False, compare=False)
    has_box: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "l1":
            raise ConfigError("threat.norm: 'l1' is for images in [0, 1]; valid here: linf, l2")

    def describe(self) -> str:
        """'L2 0.5 of the embedding'."""
        return f"{self.norm.capitalize()} {self.eps:.4g} of the embedding"


def project(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """A point of the ball around x and of [0, 1], near x_adv: see the module. x_adv, x: (B, ...) float, x in [0, 1]."""
    delta = x_adv - x
    if threat.where is not None:
        delta = delta * threat.where
    if threat.norm == "linf":
        delta = delta.clamp(-threat.eps, threat.eps)
    elif threat.norm == "l1":
        delta = _to_l1_ball(delta, x, threat.eps)
    else:
        norm = torch.linalg.vector_norm(at_least_float32(delta), dim=_image_dims(x), keepdim=True)
        delta = delta * (threat.eps / norm.clamp_min(_TINY)).clamp_max(1.0).to(delta.dtype)
    return threat.clip(x + delta)


def ascend(x: Tensor, gradient: Tensor, step_size: float, threat: Threat) -> Tensor:
    """x, the current point, moved by step_size along the steepest ascent of the norm; not projected.

    Where the gradient is zero nothing moves; non-finite entries count as zero, so one overflow does not
    spoil an image.
    """
    if threat.norm == "linf":
        return x + step_size * gradient.sign()  # the sign of NaN is 0 in torch
    g = at_least_float32(gradient).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if threat.norm == "l1":
        return x.add((step_size * _sparse_sign(g, x)).to(x.dtype))
    # Scaled by the largest entry first: the squares of a confident model's gradients (1e-25) underflow.
    g = g / torch.linalg.vector_norm(g, ord=math.inf, dim=_image_dims(g), keepdim=True).clamp_min(_TINY)
    g = g / torch.linalg.vector_norm(g, dim=_image_dims(g), keepdim=True).clamp_min(_TINY)
    return x.add((step_size * g).to(x.dtype))


def random_start(x: Tensor, threat: Threat, generator: torch.Generator | None) -> Tensor:
    """A uniform point of the ball around each image, clipped to [0, 1]. x: (B, ...) float; generator: on
    x's device."""
    return threat.clip(x + noise(x, threat.norm, threat.eps, generator, threat.where))


def noise(
    x: Tensor, norm: Norm, radius: float, generator: torch.Generator | None, where: Tensor | None = None
) -> Tensor:
    """Uniform in the ball of any radius around 0; x's shape, dtype, device and memory format.

    Drawn as float32 in logical order, so that it does not depend on the memory format or dtype of x.
    L2: a normal direction times radius * U^(1/d), d entries per image. L1: random signs times radius * E / (sum of E),
    E d + 1 exponential numbers. where: see Threat.where; not for L1.
    """
    drawn = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if norm == "linf":
        drawn.uniform_(-radius, radius, generator=generator)
        if where is not None:
            drawn *= where
    elif norm == "l1":
        drawn.exponential_(generator=generator)
        rest = torch.empty(_per_image(x), device=x.device).exponential_(generator=generator)
        drawn *= radius / (drawn.sum(dim=_image_dims(x), keepdim=True) + rest)
        drawn *= torch.empty_like(drawn).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    else:
        dims = _image_dims(x)
        drawn.normal_(generator=generator)
        num: float | Tensor = max(1, x[:1].numel())  # entries that may move
        if where is not None:
            drawn *= where
            num = where.expand_as(x).sum(dim=dims, keepdim=True).clamp_min(1.0)
        u = torch.rand(_per_image(x), generator=generator, device=x.device).pow(1.0 / num)
        drawn *= radius * u / torch.linalg.vector_norm(drawn, dim=dims, keepdim=True).clamp_min(_TINY)
    return torch.empty_like(x).copy_(drawn)


def at_least_float32(x: Tensor) -> Tensor:
    """x as float32, or as it is in float64: norms and losses are never computed in a half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


_TINY = torch.finfo(torch.float32).tiny


def _image_dims(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _per_image(x: Tensor) -> tuple[int, ...]:
    """(B, 1, ...): the shape of one number an image."""
    return (x.shape[0],) + (1,) * (x.ndim - 1)


def _to_l1_ball(delta: Tensor, x: Tensor, eps: float) -> Tensor:
    """The nearest d with ||d||_1 <= eps and x + d in [0, 1]: sign(delta) min(max(|delta| - t, 0), room), t least.

    The sum over an image is piecewise linear in t, with a knot where an entry leaves zero (|delta|) and one where it
    reaches its room (|delta| - room): sorted from the largest t down, slopes and sums are running sums.
    """
    size = at_least_float32(delta.abs()).flatten(1).double()
    room = torch.where(delta > 0, 1.0 - x, x).flatten(1).to(size)
    knots, order = torch.cat([size, size - room], dim=1).sort(dim=1, descending=True)
    slopes = torch.where(order < size.shape[1], 1.0, -1.0).to(size).cumsum(dim=1)
    gaps = -knots.diff(dim=1)
    sums = torch.nn.functional.pad((slopes[:, :-1] * gaps).cumsum(dim=1), (1, 0))
    last = (sums < eps).sum(dim=1, keepdim=True).sub_(1).clamp_(min=0)  # the last knot at which the sum is below eps
    t = knots.gather(1, last) - (eps - sums.gather(1, last)) / slopes.gather(1, last).clamp_min(1.0)
    kept = (size - t.clamp_min(0.0)).clamp_min(0.0).minimum(room).to(delta.dtype).view_as(delta)
    return kept.copysign(delta)


def _sparse_sign(g: Tensor, x: Tensor) -> Tensor:
    """sign(g) / m on the m entries of each image with the largest |g| among those that can move, else 0."""
    size = torch.where((g > 0) & (x >= 1.0) | (g < 0) & (x <= 0.0), 0.0, g.abs()).flatten(1)
    m = max(1, math.ceil(L1_SHARE * size.shape[1]))
    largest, places = size.topk(m, dim=1)
    share = torch.where(largest > 0, largest.new_tensor(1.0 / m), 0.0)
    return torch.zeros_like(size).scatter_(1, places, share).view_as(g).copysign(g)

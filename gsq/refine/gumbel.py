"""One target under relaxation: its logits, its scales, and how both move.

Nothing is drawn into the starting logits, so the hard result before the first step is the init
exactly. They say how close each choice was: a level that the rest of the matrix would almost have
preferred starts almost level with the initial one, and is the first to be tried. Scales move in
the logarithm of their size: Lion's step is absolute, and groups differ by orders of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lion_pytorch import Lion
from torch import Tensor

from gsq.codebook import QuantizedTensor
from gsq.kernels import relaxation

FULL = 8  # codebooks up to this size are relaxed over all levels
WINDOW = 5  # larger ones over the neighbours of the initial level
MARGIN = 0.01  # of the gap: the least lead of the initial code
FLOOR = 4.0  # gaps: the greatest lead of the initial code


@dataclass(frozen=True)
class Temperature:
    """Where a step stands on the schedules: softmax temperature, logit gain, and the share of the learning rates."""

    tau: float
    kappa: float
    lr: float
    scale_lr: float


class Relaxation:
    """Logits `[K, N]`, log-scales and, where the codebook has them, offsets of one target `[..., out, columns]`.

    All in the basis of its codebook.

    `wanted` `[..., out, columns]` is the value that each weight would take were it free and all others
    fixed (`gsq.init.polish.free_values`); a level one step away from it starts `gap` below it.
    `noise` is the amplitude of the Gumbel noise; `seed` and `stream` name it, and `stream` must
    differ between targets.
    """

    def __init__(
        self,
        start: QuantizedTensor,
        wanted: Tensor,
        gap: float,
        weight_decay: float,
        betas: tuple[float, float],
        seed: int,
        stream: int,
        noise: float,
    ):
        self.codebook, self.shape = start.codebook, start.codes.shape
        self.device = start.codes.device
        self.levels = self.codebook.level_table(self.device) - self.codebook.center
        self.weight_decay, self.betas = weight_decay, betas
        self.seed, self.stream, self.noise = seed, stream, noise
        codes = start.codes.reshape(-1).int()
        count = len(self.levels) if len(self.levels) <= FULL else WINDOW
        self.window = None
        if count < len(self.levels):
            self.window = (codes - WINDOW // 2).clamp(0, len(self.levels) - WINDOW).to(torch.uint8)
            codes = codes - self.window.int()
        self.logits = self._starting_logits(start, codes, count, gap, wanted)
        self.momentum = torch.zeros_like(self.logits)
        self.start_scales = start.scales.float().reshape(-1)
        self.log_scales = torch.zeros_like(self.start_scales).requires_grad_()
        moving = [self.log_scales]
        if self.codebook.offset:  # a step moves a group as far as the same step of its scale moves its last level
            self.start_offsets = start.offsets.float().reshape(-1)
            self.start_centers = start.centers().reshape(-1)
            self.reach = self.start_scales.abs() * self.levels[-1]
            self.shifts = torch.zeros_like(self.start_scales).requires_grad_()
            moving.append(self.shifts)
        self.optimizer = Lion(moving, lr=1.0, betas=betas, weight_decay=0.0)
        self._slope: Tensor | None = None
        self._soft: Tensor | None = None

    def _starting_logits(self, start: QuantizedTensor, codes: Tensor, count: int, gap: float, wanted: Tensor) -> Tensor:
        """`-gap ((wanted / scale - level) / step)^2`, with the initial code on top by a hair at least.

        `step` is the mean distance of neighbouring levels.
        """
        step = (self.levels[-1] - self.levels[0]) / (len(self.levels) - 1)
        scale = self.codebook.expand(start.scales.float()).reshape(-1)
        beyond = 2 * FLOOR * step + self.levels.abs().max()  # every level has reached the floor; keeps the sums exact
        wanted = wanted.float() - self.codebook.expand(start.centers()) if self.codebook.offset else wanted.float()
        u = (wanted.reshape(-1) / torch.where(scale == 0, torch.inf, scale)).clamp_(-beyond, beyond)
        index = torch.arange(count, device=self.device)[:, None]
        level = self.levels[index if self.window is None else self.window.long()[None] + index]
        logits = (u - level).div_(step).square_().mul_(-gap)
        chosen = codes[None].long()
        others = logits.scatter(0, chosen, -torch.inf).amax(0, keepdim=True)
        logits.scatter_(0, chosen, torch.maximum(logits.gather(0, chosen), others + MARGIN * gap))
        return logits.sub_(logits.amax(0)).clamp_min_(-FLOOR * gap)

    def soft(self, step: int, at: Temperature) -> Tensor:
        """Soft weights `[..., out, in]`, float32, of one draw of the noise, as the module takes them."""
        group = self.codebook.group_size
        self._soft, self._slope = relaxation.soften(
            self.logits, self.levels, self.window, self._scales(), group, at.tau, at.kappa,
            (self.seed, self.stream, step), self.noise,
        )  # fmt: skip
        soft = self._soft
        if self.codebook.offset:
            soft = (soft.view(-1, group) + self._centers()[:, None]).view(-1)
        return self.codebook.unrotate(soft.view(self.shape))

    def update(self, gradient: Tensor, at: Temperature) -> None:
        """One Lion step, given dL/dw `[..., out, in]` at the weights that `soft` returned."""
        gradient, group, scales = self.codebook.rotate(gradient).float(), self.codebook.group_size, self._scales()
        gradient = gradient.reshape(-1)
        self.log_scales.grad = (gradient * self._soft).view(-1, group).sum(1)  # dw / dlog(scale) = w - center
        if self.codebook.offset:
            self.shifts.grad = gradient.view(-1, group).sum(1) * self.reach
        relaxation.lion_step(
            self.logits, self.momentum, self._slope, gradient, scales, group,
            at.kappa / at.tau, at.lr, self.weight_decay, self.betas,
        )  # fmt: skip
        self.optimizer.param_groups[0]["lr"] = at.scale_lr
        self.optimizer.step()
        self._soft = self._slope = None

    def hard(self) -> QuantizedTensor:
        """The quantized tensor that the logits now stand for, scales rounded to their stored dtype."""
        codes = relaxation.likeliest(self.logits)
        if self.window is not None:
            codes += self.window
        scales = self._scales().to(self.codebook.scale_dtype)
        hard = QuantizedTensor(codes.view(self.shape), scales.view(*self.shape[:-1], -1), self.codebook)
        if self.codebook.offset:
            moved = self.reach * self.shifts.detach() + (self.start_scales - scales.float()) * self.codebook.center
            hard.offsets = (self.start_offsets + moved).to(scales.dtype).view_as(hard.scales)
        return hard

    def _scales(self) -> Tensor:
        return self.start_scales * self.log_scales.detach().exp()

    def _centers(self) -> Tensor:
        return self.start_centers + self.reach * self.shifts.detach()

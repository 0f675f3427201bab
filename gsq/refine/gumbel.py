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
from gsq.memory import Memory

FULL = relaxation.MOST  # codebooks up to this size are relaxed over all levels
WINDOW = 5  # larger ones over the neighbours of the initial level
MARGIN = 0.01  # of the gap: the least lead of the initial code
FLOOR = 4.0  # gaps: the greatest lead of the initial code
MOMENTUM = {"cpu": torch.float32}  # a CPU would only lose time with conversions,
ELSEWHERE = torch.bfloat16  # elsewhere fewer bytes are moved; results are as good


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
    `noise` is the amplitude of the Gumbel noise; `seed` and `stream` name all that is drawn, and `stream`
    must differ between targets, or `first`, the number of the first weight, between parts of one.
    `dtype` of the logits is float32 or bfloat16. Logits and momentum are held in `memory`.
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
        first: int = 0,
        dtype: torch.dtype = torch.float32,
        memory: Memory | None = None,
    ):
        self.codebook, self.shape = start.codebook, start.codes.shape
        self.device = start.codes.device
        memory = memory or Memory(self.device)
        self.levels = self.codebook.level_table(self.device) - self.codebook.center
        self.weight_decay, self.betas = weight_decay, betas
        self.seed, self.stream, self.noise, self.first = seed, stream, noise, first
        codes, table = start.codes.reshape(-1), len(self.levels)
        self.window = None
        if table > FULL:  # in bytes throughout: the least code is raised before it is lowered
            half = WINDOW // 2
            self.window = codes.clamp(half, table - WINDOW + half).sub_(half)
        self.start_scales = start.scales.float().reshape(-1)
        moving = [torch.zeros_like(self.start_scales).requires_grad_() for _ in range(1 + self.codebook.offset)]
        self.log_scales = moving[0]
        if self.codebook.offset:  # a step moves a group as far as the same step of its scale moves its last level
            self.start_centers = start.centers().reshape(-1)
            self.start_offsets = start.offsets.float().reshape(-1)
            self.reach = self.start_scales.abs() * self.levels[-1]
            self.shifts = moving[1]
        count = len(self.levels) if self.window is None else WINDOW
        self.logits = memory.empty((count, len(codes)), dtype, near=True)
        self._start_logits(codes, wanted.reshape(-1), gap)
        self.momentum = memory.zeros(self.logits.shape, MOMENTUM.get(self.device.type, ELSEWHERE), near=True)
        self.optimizer = Lion(moving, lr=1.0, betas=betas, weight_decay=0.0)
        self._draw: relaxation.Draw | None = None
        self._tape: relaxation.Tape | None = None

    def _start_logits(self, codes: Tensor, wanted: Tensor, gap: float) -> None:
        """Fill the logits `[K, N]` for `codes` and `wanted` `[N]`, part by part."""
        group = self.codebook.group_size
        for part in relaxation.parts(len(codes), self.device, multiple=group):
            groups = slice(part.start // group, part.stop // group)
            values = wanted[part].float().view(-1, group)
            if self.codebook.offset:
                values = values - self.start_centers[groups, None]
            scales = self.start_scales[groups, None]
            units = (values / torch.where(scales == 0, torch.inf, scales)).view(-1)
            lowest = torch.zeros_like(codes[part]) if self.window is None else self.window[part]
            self.logits[:, part] = starting_logits(units, codes[part], lowest, self.levels, len(self.logits), gap)

    def soft(self, step: int, at: Temperature, dtype: torch.dtype = torch.float32) -> Tensor:
        """Soft weights `[..., out, in]` in `dtype`, of one draw of the noise, as the module takes them."""
        codebook = self.codebook
        self._draw = relaxation.Draw(
            self.levels, self.window, self._scales(), codebook.group_size, at.tau, at.kappa,
            self.noise, (self.seed, self.stream, step), self.first,
        )  # fmt: skip
        final = codebook.rotation is None and not codebook.offset
        soft, self._tape = relaxation.soften(self.logits, self._draw, dtype if final else torch.float32)
        if codebook.offset:
            soft = (soft.view(-1, codebook.group_size) + self._centers()[:, None]).view(-1)
        return codebook.unrotate(soft.view(self.shape)).to(dtype)

    def update(self, gradient: Tensor, at: Temperature) -> None:
        """One Lion step, given dL/dw `[..., out, in]` at the weights that `soft` returned."""
        by_scale, by_offset = relaxation.lion_step(
            self.logits, self.momentum, self.codebook.rotate(gradient).reshape(-1), self._draw, self._tape,
            at.lr, self.weight_decay, self.betas,
        )  # fmt: skip
        self.log_scales.grad = by_scale  # dw / dlog(scale) = w - center
        if self.codebook.offset:
            self.shifts.grad = by_offset * self.reach
        self.optimizer.param_groups[0]["lr"] = at.scale_lr
        self.optimizer.step()
        self._draw = self._tape = None

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


def starting_logits(units: Tensor, codes: Tensor, lowest: Tensor, levels: Tensor, count: int, gap: float) -> Tensor:
    """`-gap ((units - level) / step)^2` `[count, n]`, with the code on top by a hair at least.

    `units` `[n]` is where the weights would like to be, in units of their scales; `codes` and `lowest`
    uint8 `[n]` are the level where they are, and that of the first logit. `step` is the mean distance of
    neighbouring levels.
    """
    step = (levels[-1] - levels[0]) / (len(levels) - 1)
    beyond = 2 * FLOOR * step + levels.abs().max()  # every level has reached the floor; keeps the sums exact
    level = levels[lowest.int()[None] + torch.arange(count, dtype=torch.int32, device=levels.device)[:, None]]
    logits = (units.clamp(-beyond, beyond) - level).div_(step).square_().mul_(-gap)
    chosen = (codes - lowest)[None].long()
    others = logits.scatter(0, chosen, -torch.inf).amax(0, keepdim=True)
    logits.scatter_(0, chosen, torch.maximum(logits.gather(0, chosen), others + MARGIN * gap))
    return logits.sub_(logits.amax(0)).clamp_min_(-FLOOR * gap)

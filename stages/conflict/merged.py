"""A merged direction without a group, from the languages that the group changes and those that it does not. Suffixes as in `leave_out.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LOST = 1e-13
"""A squared length below this share of the one it is the difference of is rounding (float64)."""


@dataclass(frozen=True)
class Left:
    """What groups leave of their languages' directions, k being the language of leaver j where a suffix has a J.

    first_gJ: the first leaver of its language; parts_gJJ[i, j]: what leaver i has in R_k; coefficient_gJ1: the same in its own
    language; keep_gJ = 1 - Omega_k; solid_gJS: something is left; length_gJS = |G_k - R_k|^2, 0 where nothing is; at_...: <x, G_k>;
    removed_gmJS = <g_i, R_k>. solid_SL, length_SL: of the languages that a group does not change. own_gm: a leaver of the pair's language.
    """

    language_gJ: Tensor
    first_gJ: Tensor
    parts_gJJ: Tensor
    coefficient_gJ1: Tensor
    keep_gJ: Tensor
    solid_gJS: Tensor
    length_gJS: Tensor
    a_gJSL: Tensor
    at_gJJS: Tensor
    inner_gJJS: Tensor
    solid_SL: Tensor
    length_SL: Tensor
    own_gm: Tensor
    a_gmSL: Tensor
    at_gmJS: Tensor
    inner_gmJS: Tensor
    removed_gmJS: Tensor
    rounding: float

    @property
    def factor_gJS(self) -> Tensor:
        """1 / (1 - Omega_k), 0 where nothing is left."""
        return torch.where(self.solid_gJS, 1.0 / self.keep_gJ[..., None], 0.0)

    def spread(self, x_SL: Tensor, value_gJS: Tensor) -> Tensor:
        """x of every language [g, S, L], with a group's own values in the columns of its languages. x_SL: [S, L] or [g, S, L]."""
        wide_gSL = x_SL.expand(len(value_gJS), *self.length_SL.shape).clone(memory_format=torch.contiguous_format)
        index_gSJ = self.language_gJ[:, None].expand(-1, wide_gSL.shape[1], -1)
        return wide_gSL.scatter_(-1, index_gSJ, value_gJS.mT)

    def cosines(self, norm_gm: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of the pairs with their own language's direction [g, m] and with every language's [g, m, L] (float32); NaN where there is none."""
        size_gmJ = norm_gm[..., None] * self.length_gJS.sum(dim=-1).sqrt()[:, None]
        along_gmJ = ((self.at_gmJS - self.removed_gmJS) * self.solid_gJS[:, None]).sum(dim=-1)
        cosine_gmJ = torch.where(size_gmJ > 0, along_gmJ / size_gmJ, torch.nan).clamp_(-1.0, 1.0)
        inverse_L, inverse_gm = self.length_SL.sum(dim=0).rsqrt(), 1.0 / norm_gm
        inverse_L, inverse_gm = (x.masked_fill(x.isinf(), torch.nan) for x in (inverse_L, inverse_gm))
        along_gmL = self.a_gmSL[:, :, 0] * self.solid_SL[0]
        for s in range(1, len(self.solid_SL)):
            along_gmL.addcmul_(self.a_gmSL[:, :, s], self.solid_SL[s].to(torch.float64))
        cosine_gmL = along_gmL.mul_(inverse_L).mul_(inverse_gm[..., None]).clamp_(-1.0, 1.0).to(torch.float32)
        index_gmJ = self.language_gJ[:, None].expand(cosine_gmJ.shape)
        cosine_gmL.scatter_(-1, index_gmJ, cosine_gmJ.to(torch.float32))
        return cosine_gmJ.gather(-1, self.own_gm[..., None])[..., 0], cosine_gmL

    def there(self, own_gm: Tensor) -> tuple[Tensor, Tensor]:
        """(whether something is left of the pairs' own languages [g, m], of how many languages [g])."""
        there_gJ, there_L = self.solid_gJS.any(dim=-1), self.solid_SL.any(dim=0)
        change_gJ = (there_gJ.long() - there_L[self.language_gJ].long()) * self.first_gJ
        return there_gJ.gather(-1, own_gm), int(there_L.sum()) + change_gJ.sum(dim=-1)


class Merged:
    """The merged direction u = sum_k v_k (G_k - R_k) of g groups and the pairs' products with it.

    v = weight_gSL / (1 - Omega), zero where a direction is nothing. The languages that a group does not change are summed apart from those it
    does, so that nothing is a difference of what has been left out.
    """

    def __init__(self, gram_SLL: Tensor, left: Left, weight_gSL: Tensor, norm_gm: Tensor) -> None:
        self._left, self._norm_gm = left, norm_gm
        index_gSJ = left.language_gJ[:, None].expand(-1, weight_gSL.shape[1], -1)
        v_gJS = weight_gSL.gather(-1, index_gSJ).mT * left.factor_gJS
        once_gJS = v_gJS * left.first_gJ[..., None]  # a language once
        still_gSL = left.spread(weight_gSL * left.solid_SL, torch.zeros_like(v_gJS))

        def along_whole(a_gnSL: Tensor, at_gnJS: Tensor) -> Tensor:
            """<x, sum_k v_k G_k> [g, n, S]."""
            still_gnS = torch.einsum("gnsl,gsl->gns", a_gnSL, still_gSL)
            return still_gnS + torch.einsum("gnjs,gjs->gns", at_gnJS, once_gJS)

        out_gJS = v_gJS * left.coefficient_gJ1  # sum_k v_k R_k = sum_j out_j r_j
        same = left.inner_gmJS is left.inner_gJJS
        whole_gJS = along_whole(left.a_gJSL, left.at_gJJS)
        along_gJS = whole_gJS - torch.einsum("gijs,gjs->gis", left.inner_gJJS, out_gJS)
        if same:
            along_gmS = along_gJS
        else:
            whole_gmS = along_whole(left.a_gmSL, left.at_gmJS)
            along_gmS = whole_gmS - torch.einsum("gmjs,gjs->gms", left.inner_gmJS, out_gJS)

        y_gSL = (still_gSL.transpose(0, 1) @ gram_SLL).transpose(0, 1)
        gram_gJJS = gram_SLL.permute(1, 2, 0)[left.language_gJ[:, :, None], left.language_gJ[:, None, :]]
        among_gJS = torch.einsum("gijs,gjs->gis", gram_gJJS, once_gJS)
        y_gJS = y_gSL.gather(-1, index_gSJ).mT
        square_gS = (still_gSL * y_gSL).sum(dim=-1) + (once_gJS * (2 * y_gJS + among_gJS)).sum(dim=1)
        square_gS = square_gS - (out_gJS * (whole_gJS + along_gJS)).sum(dim=1)
        # <G_k - R_k, u>
        from_whole_gJS = y_gJS + among_gJS - torch.einsum("gijs,gis->gjs", left.at_gJJS, out_gJS)
        self._y_gJS = from_whole_gJS - torch.einsum("gij,gis->gjs", left.parts_gJJ, along_gJS)
        self._v_gJS, self._along_gm, self._square_g = v_gJS, along_gmS.sum(dim=-1), square_gS.sum(dim=-1)
        self._size_gJ = (v_gJS.abs() * left.length_gJS.sqrt()).sum(dim=-1)
        size_xSL = weight_gSL[: 1 if weight_gSL.stride(0) == 0 else None].abs() * left.length_SL.sqrt()
        size_gSL = size_xSL.expand(len(v_gJS), -1, -1)
        changed_gJ = size_gSL.gather(-1, index_gSJ).sum(dim=1)
        size_g = size_gSL.sum(dim=(-1, -2)) - (changed_gJ * left.first_gJ).sum(dim=-1)
        self._size_g = size_g.clamp_min(0.0) + (self._size_gJ * left.first_gJ).sum(dim=-1)

    def cosine(self) -> tuple[Tensor, Tensor]:
        """(cosine [g, m], defined); undefined where the pair or u has no length.

        A squared length that is rounding error beside the lengths it was summed from (directions that cancel) counts as zero.
        """
        shape = self._along_gm.shape
        return self._value(self._along_gm, self._square_g[:, None].expand(shape), self._size_g[:, None].expand(shape))

    def cosine_without(self) -> tuple[Tensor, Tensor]:
        """The same with u without the own language of each pair."""
        left, (g, m) = self._left, self._along_gm.shape

        def own(x_gJS: Tensor) -> Tensor:
            return x_gJS.gather(1, left.own_gm[..., None].expand(g, m, x_gJS.shape[-1]))

        at_gm1S = left.own_gm[..., None, None].expand(g, m, 1, left.at_gmJS.shape[-1])
        a_gmS = (left.at_gmJS.gather(2, at_gm1S) - left.removed_gmJS.gather(2, at_gm1S))[:, :, 0]
        v_gmS = own(self._v_gJS)
        along_gm = self._along_gm - (v_gmS * a_gmS).sum(dim=-1)
        change_gmS = v_gmS * (v_gmS * own(left.length_gJS) - 2 * own(self._y_gJS))
        square_gm = self._square_g[:, None] + change_gmS.sum(dim=-1)
        size_gm = self._size_g[:, None] - self._size_gJ.gather(1, left.own_gm)
        value_gm, valid_gm = self._value(along_gm, square_gm, size_gm)
        valid_gm = valid_gm & (square_gm > _LOST * self._size_g[:, None].square())
        return value_gm.where(valid_gm, 0.0), valid_gm

    def _value(self, along_gm: Tensor, square_gm: Tensor, size_gm: Tensor) -> tuple[Tensor, Tensor]:
        valid_gm = (self._norm_gm > 0) & (square_gm > self._left.rounding * size_gm.square())
        scale_gm = torch.where(valid_gm, self._norm_gm * square_gm.clamp_min(0.0).sqrt(), 1.0)
        return torch.where(valid_gm, along_gm / scale_gm, 0.0).clamp(-1.0, 1.0), valid_gm

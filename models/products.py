"""Products of all pixels' features with one matrix: what a 1x1 convolution is once channels come last."""

import torch
from torch import Tensor, nn

from models import native


class Product(nn.Module):
    """`x @ matrix`, or `start + x @ matrix`; x is N x C_in."""

    matrix: Tensor
    """C_in x C_out; empty once `packed` is there."""
    packed: Tensor | None
    """In the processor's own form, instead of `matrix`, once `pack` was called where that is faster."""

    def __init__(self, matrix: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.to(dtype).contiguous())
        self.register_buffer("packed", None)

    def pack(self, *, exact: bool) -> None:
        """Has float32 products computed by `models.native`, where it is faster; features then have to be on the CPU.

        Unless they are to be `exact`, they may be off by 1e-5 of their terms.
        """
        if self.matrix.dtype is torch.float32:
            self.packed = native.packed(self.matrix, exact=exact)
        if self.packed is not None:
            self.matrix = self.matrix.new_empty(0)

    def forward(self, x: Tensor, out: Tensor, *, start: Tensor | None = None) -> None:
        """Writes to `out`, N x C_out; any stride over N, for `start` too."""
        if self.packed is not None:
            native.product(x, self.packed, out, start)
        elif start is None:
            torch.mm(x, self.matrix, out=out)
        else:
            torch.addmm(start, x, self.matrix, out=out)

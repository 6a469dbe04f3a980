"""rank: x @ D.T as two small products, (x @ right.T) @ left.T. The FLOPs of all deltas are r / in + r / out of the base's."""

from collections.abc import Sequence

from ders_kernels.cpu_ops import short
from torch import Tensor

from .forms import Form, Pieces, product


class LowRank(Form):
    """`left` [out, r], `right` [r, in]; both train (DeRS-LM, arXiv 2503.01359, 3.4)."""

    trainable = frozenset({"left", "right"})

    def runs(self, projection, x: Tensor, gradient: bool) -> bool:
        return True

    def product(self, projection, x: Tensor, member: int, pieces: Pieces | None) -> Tensor:
        pieces = pieces or projection.piece(member)
        # parts may be stored wider than the base: fp32 once they were trained in it
        return product(product(x, pieces["right"].to(x.dtype)), pieces["left"].to(x.dtype))

    def products(self, projection, x: Tensor, members: Sequence[int], counts: Sequence[int]) -> Tensor:
        if x.device.type != "cpu":
            return super().products(projection, x, members, counts)
        parts = projection.delta.tensors()
        return short.low_rank(x, parts["left"], parts["right"], members, counts)

    def delta(self, projection, member: int, pieces: Pieces) -> Tensor:
        return pieces["left"].float() @ pieces["right"].float()

    def gradients(self, projection, member: int, pieces: Pieces, g: Tensor) -> dict[str, Tensor]:
        return {"left": g @ pieces["right"].float().T, "right": pieces["left"].float().T @ g}

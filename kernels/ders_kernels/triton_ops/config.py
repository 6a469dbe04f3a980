"""Tile sizes of a launch, and what the compiler is asked for ahead of time."""

from dataclasses import dataclass
from typing import Any

from .settings import AMD


@dataclass(frozen=True)
class Config:
    """A program's tile: `tokens` columns of Y.T, `rows` of W, `columns` of W at each step of the loop.

    With `splits`, W's columns are divided among as many programs, each with sums of its own: few tokens alone give a GPU
    too few programs to hide its memory behind.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    splits: int = 1

    def launch(self) -> dict[str, int]:
        """The arguments of every kernel that are the compiler's."""
        return {"num_warps": self.warps, "num_stages": self.pipelined(AMD)}

    def pipelined(self, amd: bool) -> int:
        """Steps of the loop in flight; AMD's compiler keeps them in registers and takes two."""
        return min(self.stages, 2) if amd else self.stages


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched: every configuration of every kernel has at least one (docs/kernels.md's table).

    `pointers`: dtype of each pointer argument in Triton's spelling ("bf16", "u8", "i64"); arguments that are neither here
    nor in `constants` are i32. `dots`: it multiplies matrices, so matrix instructions are expected.
    """

    name: str
    kernel: Any
    config: Config
    pointers: dict[str, str]
    constants: dict[str, Any]
    dots: bool = True


def fitting(configs: tuple[Config, ...], tokens: float) -> Config:
    """The first one with room for the mean number of tokens of an expert; else the last one, which is the largest."""
    return next((c for c in configs if tokens <= c.tokens), configs[-1])


# of the arguments that every product has
BLOCK_POINTERS = {name: "i32" for name in ("pairs", "block_expert", "block_first", "block_end")}

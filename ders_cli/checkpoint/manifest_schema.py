"""The shape of ders.json (docs/format.md, section 6), checked as hostile input: types, ranges, file names."""

from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import CheckpointError
from .reader import is_weight_file
from .tensor import BITS

Natural = Annotated[int, Field(ge=0, lt=2**62)]
Positive = Annotated[int, Field(ge=1, lt=2**62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Member(_Part):
    label: str
    tensor: str
    offset: Natural
    strides: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    source_hash: Digest
    restored_hash: Digest
    error: dict[str, Annotated[float, Field(allow_inf_nan=True)] | None]  # null: infinite, of an expert of zeros


class Group(_Part):
    name: str
    layer: int
    projection: Literal["gate", "up", "down"]
    shape: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    dtype: Literal["BF16", "F16", "F32"]
    codec: dict[str, Any]
    members: Annotated[list[Member], Field(min_length=1)]

    @field_validator("members")
    @classmethod
    def _labels(cls, members: list[Member]) -> list[Member]:
        return _once(members, "label")


class File(_Part):
    tensors: list[Annotated[list[Any], Field(min_length=3, max_length=3)]]
    metadata: dict[str, str]
    header: str = ""  # if there is one

    @field_validator("tensors")
    @classmethod
    def _rows(cls, rows: list[list[Any]]) -> list[list[Any]]:
        for name, dtype, shape in rows:
            naturals = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**62 for n in shape)
            if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in BITS or not naturals:
                raise ValueError(f"expected [name, dtype, shape], found {[name, dtype, shape]!r:.80}")
        if len({name for name, _, _ in rows}) != len(rows):
            raise ValueError("a tensor stands twice")
        return rows


class Index(_Part):
    metadata: dict[str, Any]
    text: str = ""  # if there is one


class SourceForm(_Part):
    layout: str
    activation: str
    aliases: dict[str, str]
    config: str
    files: dict[str, File]
    index: Index | None

    @field_validator("files")
    @classmethod
    def _names(cls, files: dict[str, File]) -> dict[str, File]:
        for name in files:
            if not is_weight_file(name):
                raise ValueError(f"{name!r:.80} is not the name of a weight file in a folder")
        return files


class RecipeInEffect(_Part):
    base: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]  # as in a recipe
    shared: bool


Named = TypeVar("Named", Member, Group)


def _once(parts: list[Named], key: str) -> list[Named]:
    """The parts, if no two have the same name."""
    seen: set[str] = set()
    for part in parts:
        if (name := getattr(part, key)) in seen:
            raise ValueError(f"{key} {name!r:.80} stands twice")
        seen.add(name)
    return parts


class Manifest(_Part):
    tool: str
    recipe: RecipeInEffect
    source: SourceForm
    groups: list[Group]
    guards: list[str]
    tensors: dict[str, Annotated[list[Digest], Field(min_length=1)]]
    files: dict[str, Digest]
    bytes: dict[str, float]
    aligned: list[str] = []

    @field_validator("files")
    @classmethod
    def _file_names(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            plain = PurePath(name).name == name and "\0" not in name and len(name.encode()) < 256
            if not name or not plain or name.startswith("."):
                raise ValueError(
                    f"{name!r:.80} is not the name of a file that goes along, in this folder and not hidden"
                )
        return files

    @field_validator("groups")
    @classmethod
    def _group_names(cls, groups: list[Group]) -> list[Group]:
        return _once(groups, "name")


def check_manifest(where: str, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError naming the first field that is not as the format says."""
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{where}: {place:.200}: {first['msg']}, found {first.get('input')!r:.60}") from None

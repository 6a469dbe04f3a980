"""The two kinds of report, as `--json` prints them and files keep them: an analysis and a conversion.

These classes are the definition: docs/report-schema.json is made from them (`json_schema`), and a report that somebody hands us
is checked by them before anything of it is drawn or compared. E is the number of experts of a group; lists of E are in the order
of its `experts`. Numbers are finite or null; null: not defined, such as statistics of a matrix with a NaN.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..checkpoint.files import read_small
from ..checkpoint.json_text import parse_json, refuse_depth
from ..checkpoint.reader import MAX_JSON_BYTES
from ..errors import CheckpointError, UsageError

SCHEMA = 1
KINDS = ("analysis", "conversion")
DIALECT = "https://json-schema.org/draft/2020-12/schema"

Number = Annotated[float, Field(allow_inf_nan=False)] | None
Numbers = list[Number]
Natural = Annotated[int, Field(ge=0, lt=2**62)]
Side = Annotated[int, Field(ge=1, lt=2**62)]
Projection = Literal["gate", "up", "down"]
Dtype = Literal["BF16", "F16", "F32"]
Kind = Literal["copies", "noisy copies", "siblings", "relatives", "permuted", "native"]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SizeBefore(_Part):
    source: Natural = Field(description="Bytes of the whole source folder's weights.")
    experts: Natural = Field(description="Bytes of all experts' matrices in it.")


class States(_Part):
    kind: Literal["random", "text", "activations"] = Field(description="Where the experts' inputs came from.")
    tokens: Natural = Field(description="Hidden states per layer.")
    seed: Natural = Field(description="Seed of every random choice.")


class Cosine(_Part):
    """Cosines of the angles between experts, seen as vectors of their weights; 1: the same direction."""

    least: Number = Field(description="Of any two experts.")
    mean: Number = Field(description="Over all pairs of different experts.")
    most: Number = Field(description="Of any two experts.")
    pairs: list[Numbers] | None = Field(description="[E, E], symmetric; null where E > 64.")


class Delta(_Part):
    """What sets each expert W apart from the base B: D = W - B. Lists of E."""

    relative_norm: Numbers = Field(description="|D| / |W|, Frobenius norms.")
    cosine_to_base: Numbers = Field(description="Cosine of W and B.")
    equal: Numbers = Field(description="Share of weights whose stored bits are the base's.")
    entropy: Numbers = Field(description="Bits per weight of D in steps of the dtype, given the base's exponent.")
    kurtosis: Numbers = Field(description="Of D's entries; 3 for a Gaussian.")
    outlier: Numbers = Field(description="Most over columns of max|W| / mean|W| of a column.")
    std: Numbers = Field(description="Standard deviation of D's entries.")


class RankEnergy(_Part):
    """Share of |D|^2 in the largest singular values of one expert's delta."""

    expert: str
    ranks: list[Side]
    energy: Numbers = Field(description="Share of |D|^2 in the first r singular values, for each r of `ranks`.")
    error: Numbers = Field(description="Standard error of `energy`.")
    rank90: Natural | None = Field(description="Least rank with 90 % of |D|^2; null: not known.")
    rank99: Natural | None = Field(description="Least rank with 99 % of |D|^2; null: not known.")

    @model_validator(mode="after")
    def _lengths(self) -> "RankEnergy":
        return _as_long(self, len(self.ranks), "energy", "error")


class DensityEnergy(_Part):
    """Share of |D|^2 in the largest entries of D by magnitude, mean over the experts."""

    densities: Numbers = Field(description="Shares of the entries.")
    energy: Numbers = Field(description="Share of |D|^2 in them.")

    @model_validator(mode="after")
    def _lengths(self) -> "DensityEnergy":
        return _as_long(self, len(self.densities), "energy")


class GroupCodec(_Part):
    """What one codec would make of a group: errors are root mean squares over its experts."""

    bytes: Natural | None = Field(description="Of the deltas of all experts; null: not counted.")
    weight_error: Number = Field(description="|W' - W| / |W|.")
    delta_error: Number = Field(description="|W' - W| / |D|.")
    kept: Number = Field(description="<D', D> / |D|^2; 1: all of the delta's size.")
    output_error: Number = Field(description="|y' - y| / |y|: the FFN's outputs when only this matrix is coded.")
    output_delta_error: Number = Field(description="|y' - y| / |y - y_base|.")


class AnalysisGroup(_Part):
    """The experts' matrices of one layer and one projection."""

    name: str
    layer: int
    projection: Projection
    shape: Annotated[list[Side], Field(min_length=2, max_length=2)] = Field(description="[out, in] of one expert.")
    dtype: Dtype
    experts: Annotated[list[str], Field(min_length=1)] = Field(description="Labels of the E experts.")
    verdict: Kind | None
    cosine: Cosine
    delta: Delta
    rank_energy: RankEnergy | None
    density_energy: DensityEnergy | None
    plan: list[str] = Field(description="The codec that the recommended recipe gives each expert.")
    codecs: dict[str, GroupCodec] = Field(description="By the codec's term, as --delta takes it.")

    @model_validator(mode="after")
    def _lengths(self) -> "AnalysisGroup":
        experts = len(self.experts)
        _as_long(self.delta, experts, *Delta.model_fields)
        _square(self.cosine.pairs, experts)
        return _as_long(self, experts, "plan")


class Router(_Part):
    """How alike the rows of a layer's router are, one row an expert."""

    layer: int
    name: str
    cosine: Cosine

    @model_validator(mode="after")
    def _lengths(self) -> "Router":
        _square(self.cosine.pairs, len(self.cosine.pairs or []))
        return self


class BaseChoice(_Part):
    base: str = Field(description="mean, expert:0, or dense:NAME.")
    relative_norm: Number = Field(description="Root mean square of |D| / |W| over all matrices with this base.")
    exact_bytes: Natural | None = Field(description="Bytes of the exact deltas with this base; null: not counted.")


class AlignedLayer(_Part):
    name: str
    experts: list[str] = Field(description="Labels of the experts whose neurons stand in another order.")
    matched: Number = Field(description="Share of neurons whose partner is clear.")


class Alignment(_Part):
    permuted: bool = Field(description="Whether some experts are permutations of others.")
    layers: list[AlignedLayer]


class Codec(_Part):
    """What one codec would make of the whole model."""

    delta_bytes: Natural | None = Field(description="Of all deltas; null: not counted.")
    folder_bytes: Natural | None = Field(description="Of the whole output folder; null: not counted.")
    bits_per_delta_weight: Number = Field(description="8 * delta_bytes / weights.")
    output_error: Number = Field(description="|y' - y| / |y| of an expert's FFN, root mean square over all experts.")
    worst_output_error: Number = Field(description="The same of the worst expert.")
    worst: str | None = Field(description="Which that is: group and expert.")


class Noise(_Part):
    std: Number = Field(description="Standard deviation of the noise.")
    of_weights: Number = Field(description="That, relative to the weights' own.")


class Verdict(_Part):
    kind: Kind
    says: str
    reasons: list[str] = Field(description="Sentences with the numbers that led to it.")
    noise: Noise | None


class Recommended(_Part):
    recipe: dict[str, Any] | None = Field(description="Keys and values of a recipe file; null: keep the original.")
    says: str


class Analysis(_Part):
    """What `ders analyze --json` prints: how a model's experts relate, and what each codec would make of them."""

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["analysis"]
    command: Literal["analyze"]
    tool: str = Field(description="Such as ders-cli 0.1.0.")
    model: str = Field(description="Folder or address.")
    architecture: str
    layers: Natural = Field(description="Layers with experts.")
    experts: Natural = Field(description="Most experts in a layer.")
    dtype: str
    bytes: SizeBefore
    weights: Natural = Field(description="Elements of all experts' matrices.")
    base: str
    states: States
    groups: list[AnalysisGroup]
    routers: list[Router]
    bases: list[BaseChoice]
    alignment: Alignment | None
    codecs: dict[str, Codec] = Field(description="By the codec's term, as --delta takes it.")
    verdict: Verdict
    recommended: Recommended


class SizeAfter(_Part):
    experts: Natural = Field(description="Bytes of the experts in the source.")
    base: Natural = Field(description="Bytes of the bases.")
    delta: Natural = Field(description="Bytes of all parts of the deltas.")
    weights: Natural = Field(description="Bytes of all weight files.")
    bits_per_delta_weight: Number = Field(description="8 * delta / elements of all experts.")


class Errors(_Part):
    """What the conversion noted of each expert: W' stands for W, D' for D = W - B. Lists of E."""

    weight: Numbers = Field(description="|W' - W| / |W|.")
    delta: Numbers = Field(description="|W' - W| / |D|.")
    kept: Numbers = Field(description="<D', D> / |D|^2; 1: all of the delta's size.")
    max_abs: Numbers = Field(description="Largest |W' - W|.")
    cosine: Numbers = Field(description="Of W' and W.")


class ConversionGroup(_Part):
    """The experts' matrices of one layer and one projection, as they are stored."""

    name: str
    layer: int
    projection: Projection
    shape: Annotated[list[Side], Field(min_length=2, max_length=2)] = Field(description="[out, in] of one expert.")
    dtype: Dtype
    experts: Annotated[list[str], Field(min_length=1)] = Field(description="Labels of the E experts.")
    plan: list[str] = Field(description="Each expert's codec.")
    bytes: Natural = Field(description="Of all parts of the deltas.")
    error: Errors

    @model_validator(mode="after")
    def _lengths(self) -> "ConversionGroup":
        _as_long(self.error, len(self.experts), *Errors.model_fields)
        return _as_long(self, len(self.experts), "plan")


class Conversion(_Part):
    """What a DeRS folder says of itself: its codecs, its bytes and the errors that were noted when it was made."""

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["conversion"]
    command: str
    tool: str = Field(description="The ders that made the folder.")
    model: str = Field(description="Folder or address.")
    architecture: str
    dtype: str
    base: str
    bytes: SizeAfter
    recipe: dict[str, Any]
    groups: list[ConversionGroup]


MODELS: dict[str, type[_Part]] = {"analysis": Analysis, "conversion": Conversion}


def _as_long(part: Any, length: int, *fields: str) -> Any:
    """The part, if its lists have the length. Raises ValueError."""
    for field in fields:
        if len(getattr(part, field)) != length:
            raise ValueError(f"{field}: expected {length} items, found {len(getattr(part, field))}")
    return part


def _square(rows: Sequence[Numbers] | None, side: int) -> None:
    if rows is not None and any(len(row) != side for row in (rows, *rows)):
        raise ValueError(f"pairs: expected {side} rows of {side}")


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of both kinds; docs/report-schema.json is this."""
    from pydantic.json_schema import GenerateJsonSchema, models_json_schema

    class Untitled(GenerateJsonSchema):
        """Without a title that repeats each field's name."""

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    models = [(model, "validation") for model in MODELS.values()]
    _, schema = models_json_schema(models, by_alias=True, schema_generator=Untitled)
    kinds = [{"$ref": f"#/$defs/{model.__name__}"} for model in MODELS.values()]
    return {"$schema": DIALECT, "title": "A report of ders: an analysis or a conversion", "oneOf": kinds} | schema


def check_report(where: str, document: dict[str, Any]) -> dict[str, Any]:
    """The document, if it is a report that this ders knows. Raises UsageError naming the first field that is off."""
    kind = document.get("kind")
    if kind not in KINDS:
        of = f"the JSON of `ders {document['command']}`" if isinstance(document.get("command"), str) else "other JSON"
        raise UsageError(f"{where}: expected a report, as `ders analyze --json` prints one, found {of:.60}")
    if document.get("schema") != SCHEMA:
        raise UsageError(f"{where}: schema {document.get('schema')!r:.20}; this ders reads reports of schema {SCHEMA}")
    try:
        MODELS[kind].model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {place:.200}: {first['msg']}, found {first.get('input')!r:.60}") from None
    return document


def read_report(path: Path) -> dict[str, Any]:
    """A report from a file. Raises UsageError for anything else."""
    try:
        document = parse_json(read_small(path, MAX_JSON_BYTES, "a report")[0])
        refuse_depth(document)
    except CheckpointError as error:
        raise UsageError(str(error).removesuffix(" Is the checkpoint complete?")) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: expected a report as JSON: {error}") from None
    return check_report(str(path), document)

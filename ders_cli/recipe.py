"""A recipe: which base, which codec for which matrices, which seed. Flags and a YAML file make the same object.

base: mean            # mean | expert:N | a folder with the dense model
delta: int4           # the codec where no rule says otherwise
group_size: 128
seed: 0
shared: false         # true: a shared expert joins the group
rules:                # the first that matches a matrix decides
  - layers: 0-3,31    # all | even | odd | numbers and ranges
    projections: [down]
    experts: [0, 4-7, shared]  # or as text: 0,4-7,shared
    delta: int8
"""

import difflib
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer
from pydantic_core import PydanticCustomError

from .checkpoint.files import read_small
from .codecs import DeltaCodec, parse_codec
from .errors import CheckpointError, UsageError
from .layouts import ExpertGroup

MAX_RECIPE_BYTES = 1_000_000
MAX_DEPTH, MAX_SCALAR = 16, 1000  # of lists and maps within each other; characters of a word, a number or a text
EXPERTS = "expected experts' numbers, ranges such as 4-7, or shared"


class Rule(BaseModel):
    """A codec for some layers, projections and experts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    delta: str
    layers: str | int = "all"
    projections: tuple[Literal["gate", "up", "down"], ...] = Field(("gate", "up", "down"), strict=False)
    experts: tuple[str, ...] | None = None  # numbers, ranges and "shared"; None: all
    group_size: int | None = None

    @field_validator("experts", mode="before")
    @classmethod
    def _terms(cls, value: Any) -> Any:
        """A list, a text or a number as texts, one a number, a range or the word shared."""
        if value is None:
            return None
        listed = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        terms = tuple(str(term).strip() for term in listed)
        if not terms or not all(_is_expert_term(term) for term in terms):
            raise PydanticCustomError("experts", EXPERTS)
        return terms

    @model_serializer(mode="wrap")
    def _json(self, dump: Callable[["Rule"], dict[str, Any]]) -> dict[str, Any]:
        """Without `experts` where it says nothing: a recipe without it is written as ever."""
        return {key: value for key, value in dump(self).items() if key != "experts" or value is not None}

    def matches(self, group: ExpertGroup) -> bool:
        """Whether it speaks of this layer and projection; of which of its experts, `covers` says."""
        return group.projection in self.projections and layer_test(str(self.layers))(group.layer)

    def covers(self, label: str) -> bool:
        """Whether it speaks of an expert by this label."""
        return self.experts is None or any(_covers(term, label) for term in self.experts)


class Recipe(BaseModel):
    """What a conversion does; see the module's text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    delta: str
    base: str = "mean"
    group_size: int = 128
    seed: int = Field(0, ge=0, lt=2**63)
    shared: bool = False
    rules: tuple[Rule, ...] = Field((), strict=False)

    def codecs(self, group: ExpertGroup) -> tuple[DeltaCodec, ...]:
        """The codec of each member of a group. Raises UsageError on a term that is no codec."""
        rules = [(rule, parse_codec(rule.delta, self._group_size(rule))) for rule in self.rules if rule.matches(group)]
        otherwise = parse_codec(self.delta, self.group_size)
        labels = [label for label, _ in group.members]
        return tuple(next((codec for rule, codec in rules if rule.covers(label)), otherwise) for label in labels)

    def check_experts(self, groups: Iterable[ExpertGroup]) -> None:
        """Raise UsageError where a rule names an expert that none of its groups has."""
        named = [(number, rule) for number, rule in enumerate(self.rules) if rule.experts is not None]
        if not named:
            return
        groups = list(groups)
        for number, rule in named:
            labels = {label for group in groups if rule.matches(group) for label, _ in group.members}
            for term in rule.experts:
                if not any(_covers(term, label) for label in labels):
                    raise UsageError(_no_expert(f"rules[{number}].experts", term, labels, self.shared))

    def check(self) -> None:
        """Raise UsageError for anything that would only show on the way."""
        parse_codec(self.delta, self.group_size)
        for rule in self.rules:
            parse_codec(rule.delta, self._group_size(rule))
            layer_test(str(rule.layers))
        if self.base.startswith("expert:") and not (self.base[7:].isdecimal() and len(self.base) < 16):
            raise UsageError(f"base {self.base!r:.80}: expected expert:N with a number, such as expert:0")

    def _group_size(self, rule: Rule) -> int:
        return self.group_size if rule.group_size is None else rule.group_size


@lru_cache
def layer_test(text: str) -> Callable[[int], bool]:
    """Whether a layer is one of `all`, `even`, `odd` or of the numbers that ranges such as 0-3,31 name. Raises UsageError."""
    tests = {"all": lambda n: True, "even": lambda n: n % 2 == 0, "odd": lambda n: n % 2 == 1}
    if text in tests:
        return tests[text]
    ranges = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        ends = (first, last or first)
        if not all(end.isdecimal() and len(end) <= 5 and int(end) <= 10_000 for end in ends):
            raise UsageError(f"layers {text!r:.80}: expected all, even, odd or numbers and ranges such as 0-3,31")
        ranges.append((int(ends[0]), int(ends[1])))
    return lambda n: any(first <= n <= last for first, last in ranges)


def _is_expert_term(term: str) -> bool:
    first, dash, last = term.partition("-")
    if term == "shared":
        return True
    numbers = [first, last] if dash else [first]
    return all(number.isdecimal() and number.isascii() and len(number) <= 6 for number in numbers)


def _covers(term: str, label: str) -> bool:
    """Whether a number, a range or "shared" means the expert `label`."""
    if term == "shared" or not label.isdecimal():
        return term == label
    first, _, last = term.partition("-")
    return int(first) <= int(label) <= int(last or first)


def _no_expert(where: str, term: str, labels: set[str], shared: bool) -> str:
    if not labels:
        return f"{where}: no group is of the layers and projections of this rule"
    numbers = sorted(int(label) for label in labels if label.isdecimal())
    has = f"experts {numbers[0]} ... {numbers[-1]}" if numbers else "no numbered expert"
    hint = "; shared: true (--shared) puts the shared expert into its group" if term == "shared" and not shared else ""
    return f"{where}: no group of its layers and projections has an expert {term}; they have {has}{hint}"


def shipped_recipes() -> dict[str, Path]:
    """The published recipes by name: beside the package when installed, at the top of a checkout otherwise."""
    for folder in (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def load_recipe(name: str, overrides: dict[str, Any]) -> Recipe:
    """A recipe file, or a published recipe's name, with the flags that were given put on top."""
    path = Path(name)
    if not path.suffix and name in (shipped := shipped_recipes()):
        path = shipped[name]
    if not os.path.lexists(path) or path.is_dir():
        known = ", ".join(shipped_recipes())
        raise UsageError(f"recipe {name}: no such file, and no published recipe of this name ({known})")
    try:
        text = read_small(path, MAX_RECIPE_BYTES, "a recipe")[0].decode()
        _check_form(name, text)
        fields = _Loader(text).get_single_data()
    except CheckpointError as error:  # no regular file, or too large a one
        raise UsageError(f"recipe {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {name}: not YAML: {' '.join(str(error).split())}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # what PyYAML raises where a scalar is not what its form or its tag says, such as 2001-99-99 or `!!int x`
        raise UsageError(f"recipe {name}: a date, a number or a !!tag that YAML cannot read: {error!r:.80}") from None
    if not isinstance(fields, dict):
        raise UsageError(f"recipe {name}: expected keys and values, found {type(fields).__name__}")
    return make_recipe(fields | overrides, f"recipe {name}")


class _Loader(yaml.SafeLoader):
    """PyYAML's, which would take the last of several equal keys and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r:.40} stands twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _check_form(name: str, text: str) -> None:
    """Raise UsageError for YAML that takes more than reading: aliases, which multiply, and depth, of which a character costs 1 ms."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise UsageError(f"recipe {name}: YAML aliases (*name) are not taken; write the value out")
        if depth > MAX_DEPTH or len(getattr(event, "value", None) or "") > MAX_SCALAR:
            line = event.start_mark.line + 1
            found = f"expected at most {MAX_DEPTH} levels and {MAX_SCALAR} characters a value, found more"
            raise UsageError(f"recipe {name}, line {line}: {found}; is it a recipe?")


def make_recipe(fields: dict[str, Any], where: str = "options") -> Recipe:
    """Check the fields; errors name the place, and suggest the key that was meant."""
    try:
        recipe = Recipe(**fields)
    except (ValidationError, TypeError) as error:
        if isinstance(error, TypeError):
            raise UsageError(f"{where}: keys must be words") from None
        raise UsageError(f"{where}, {_first_error(error)}") from None
    try:
        recipe.check()
    except UsageError as error:
        raise UsageError(f"{where}: {error}") if where != "options" else error from None
    return recipe


def _first_error(error: ValidationError) -> str:
    found = error.errors()
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])  # a misspelt key is also a missing one
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        key, fields = str(first["loc"][-1]), (Rule if "rules" in first["loc"] else Recipe).model_fields
        near = difflib.get_close_matches(key, fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(fields)}"
        return f"{place.removesuffix(key).rstrip('.') or 'top level'}: unknown key {key!r}; {hint}"
    number = type(first.get("input")) is int and first["loc"][-1:] == ("delta",)
    hint = "; YAML takes N:M for a number, so put it in quotes: '2:4'" if number else ""
    return f"{place}: {first['msg'].lower()}, found {first.get('input')!r:.60}{hint}"

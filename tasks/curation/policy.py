"""Policies: which samples to keep, in named SQL conditions, duplicate rules and an order of preference.

A policy is a YAML file for people and a pydantic model everywhere else, also as a flow's parameter.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import duckdb
import pyarrow as pa
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from storage.schema import SAMPLES
from tasks.curation.conditions import Expression, PolicyError, Value, check_expression, locked_connection, suggest
from tasks.curation.policy_file import SHORT_FORM, describe_faults, named_list, read_mapping

SAMPLE_COLUMNS = pa.schema([SAMPLES.field(name) for name in ("key", "caption", "url", "metadata")])
"""Columns of the samples themselves that a policy may use beside the signals'."""

SPLIT_CONFLICT = "split_conflict"
"""Reason that publishing adds to `failed`; no condition may have this name."""


def _value(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("give a number or text")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("give a finite number")
    return value


def _as_declared(value: Value, declared: Value) -> Value:
    """A number as the declared one is written, if it can be: forms and numpy give 3.0 for 3, and 3 for 3.0."""
    if isinstance(value, str):
        return value
    if isinstance(declared, int):
        return int(value) if float(value).is_integer() else float(value)
    return float(value)


def _amount(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"\$[a-z][a-z0-9_]*", value):
        raise ValueError(f"{value!r} is neither a number nor a $parameter")
    return _value(value)


Method = Literal["greedy", "official", "components"]
"""What goes where pairs make chains; `DuplicateRule` says how they differ."""

SEMANTIC = "semantic"
"""The kind of pairs whose distance is 1 - cosine of image embeddings."""

PREFERENCES = {"hard": "centroid_distance desc", "easy": "centroid_distance asc", "random": "md5(key) asc"}
"""SemDeDup's words for who survives: the least or the most typical of a cluster of embeddings, or whoever."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
ParameterValue = Annotated[int | float | str, BeforeValidator(_value)]
Amount = Annotated[int | float | str, BeforeValidator(_amount)]
"""A number, or the name of a parameter after a `$`."""


class _Choice(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Condition(_Choice):
    """A named SQL expression that is true for samples to keep; NULL fails, as from an unreadable image or 1 / 0."""

    name: Name = Field(description="the reason given for samples that fail it")
    sql: str = Field(description="SQL over the columns of one row and $parameters, true to pass", min_length=1)


class TopFraction(_Choice):
    """A condition on rank: the best share of the whole pool by a number, ties kept, NULL never.

    The rule is DataComp's `clip_score` filter: of N samples the value at place int(N·fraction), counted from 0 in
    descending order, is the threshold, and all samples at or above it pass.
    """

    name: Name = Field(description="the reason given for samples that fail it")
    top_fraction: Amount = Field(description="share of all samples in the pool, above 0 and up to 1")
    of: str = Field(description="SQL number to rank by, larger is better", min_length=1)


class DuplicateRule(_Choice):
    """Samples that count as the same: those that pairs of some kinds join within a distance.

    `rule` says what goes where a is near b and b near c, but not a near c, in the order of preference a, b, c: greedy
    keeps a and c, as neither has a neighbour that stays; official, SemDeDup's code, keeps a, as b removes c although it
    goes itself; components keeps one of all that hang together. The distance of semantic pairs is 1 - cosine, so there
    `max_distance` is SemDeDup's ε (up to and with it; the code's own comparison leaves out ε itself).
    `confirm` takes a look at the embeddings: pairs count only if semantic pairs join the two within that 1 - cosine.
    That is for perceptual hashes more than 4 bits apart, among which there are strangers.
    """

    name: Name = Field(description="the rule's name in the decisions")
    pairs: tuple[Name, ...] = Field(description="kinds of pairs: bytes, pixels, perceptual or semantic", min_length=1)
    max_distance: Amount = Field(default=0, description="largest distance that counts, 0 for equal only")
    rule: Method = Field(
        default="greedy", description="what goes where pairs make chains: greedy, official, components"
    )
    confirm: Amount | None = Field(default=None, description="1 - cosine that embeddings must be within, too")

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of pairs that the rule looks at, each once, in the policy's order: decisions are named by it."""
        return tuple(dict.fromkeys([*self.pairs, *([SEMANTIC] if self.confirm is not None else [])]))

    @model_validator(mode="after")
    def _measure_alike(self) -> Self:
        if SEMANTIC in self.pairs and "perceptual" in self.pairs:
            raise ValueError("semantic distances are 1 - cosine and perceptual ones are bits; make it two rules")
        if SEMANTIC in self.pairs and self.confirm is not None:
            raise ValueError("semantic pairs can't confirm themselves; give max_distance alone")
        return self


class Decontamination(_Choice):
    """A condition: the sample is no copy of one in an evaluation set, by pairs of some kinds within a distance."""

    name: Name = Field(description="the reason given for copies")
    against: tuple[str, ...] = Field(description="pools that hold the evaluation sets", min_length=1)
    pairs: tuple[Name, ...] = Field(description="kinds of pairs: bytes, pixels, perceptual or semantic", min_length=1)
    max_distance: Amount = Field(default=0, description="largest distance that makes a copy, 0 for equal only")

    @model_validator(mode="after")
    def _measure_alike(self) -> Self:
        if SEMANTIC in self.pairs and "perceptual" in self.pairs:
            raise ValueError("semantic distances are 1 - cosine and perceptual ones are bits; make it two conditions")
        return self


class CapPer(_Choice):
    """A limit: of the samples left, at most so many of each value of an expression, those the policy prefers."""

    name: Name = Field(description="the reason given for samples it leaves out")
    cap_per: str = Field(
        description="SQL whose values make the groups, such as a url's host; NULL is a group", min_length=1
    )
    at_most: Amount = Field(description="samples that stay of each group, at least 1")

    @property
    def grouping(self) -> str:
        """SQL of the groups."""
        return self.cap_per


class Balance(_Choice):
    """A limit: draw the samples left so that concepts mentioned more often than `at_most` come down to about that.

    MetaCLIP's balancing over the signal `concepts`; see `limits.draw_balanced`.
    """

    name: Name = Field(description="the reason given for samples it leaves out")
    balance: Literal["concepts"] = Field(description="the signal that says which concepts a sample mentions")
    at_most: Amount = Field(description="count up to which every mention of a concept stays; MetaCLIP's t")
    per: str | None = Field(default=None, description="SQL whose values are balanced apart, such as language")
    tail_of: str | None = Field(
        default=None, description="value of `per` that at_most is for; the others get its share of rare concepts"
    )
    seed: int = Field(default=0, description="another seed draws other samples")
    keep_unmatched: bool = Field(default=False, description="keep samples that mention no concept; MetaCLIP drops them")

    @property
    def grouping(self) -> str | None:
        """SQL of the groups, if any."""
        return self.per

    @model_validator(mode="after")
    def _need_groups_for_a_tail(self) -> Self:
        if self.tail_of is not None and self.per is None:
            raise ValueError("tail_of names a value of per; give per, such as language")
        return self


class Splits(_Choice):
    """How much of the dataset is held out. A sample that was published once stays in its split, whatever this says."""

    validation: float = Field(default=0.1, ge=0, lt=1, description="share of duplicate groups for validation")
    test: float = Field(default=0.1, ge=0, lt=1, description="share of duplicate groups for test")
    seed: int = Field(default=0, description="another seed draws other groups")

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave nothing to train on")
        return self


def _form(entry: Any) -> str:
    return "top_fraction" if "top_fraction" in _given(entry) else "sql"


def _limit_form(entry: Any) -> str:
    return "balance" if "balance" in _given(entry) else "cap_per"


def _given(entry: Any) -> Mapping[str, Any]:
    return entry if isinstance(entry, Mapping) else vars(entry) if isinstance(entry, BaseModel) else {}


AnyCondition = Annotated[
    Annotated[Condition, Tag("sql")] | Annotated[TopFraction, Tag("top_fraction")], Discriminator(_form)
]

AnyLimit = Annotated[Annotated[CapPer, Tag("cap_per")] | Annotated[Balance, Tag("balance")], Discriminator(_limit_form)]


class Policy(_Choice):
    """What to keep and why. Conditions, duplicate rules and limits are ordered; YAML may map their names to them."""

    name: Name = Field(description="name of the policy")
    description: str = Field(default="", description="what it is for")
    parameters: dict[Name, ParameterValue] = Field(
        default_factory=dict, description="thresholds that conditions refer to as $name"
    )
    conditions: tuple[AnyCondition, ...] = Field(default=(), description="all must pass", max_length=56)
    decontaminate: tuple[Decontamination, ...] = Field(
        default=(), description="evaluation sets that no sample may be a copy of", max_length=8
    )
    duplicates: tuple[DuplicateRule, ...] = Field(default=(), description="of samples that match, one survives")
    prefer: tuple[str, ...] = Field(
        default=(),
        description="who survives: SQL with asc or desc, or hard, easy or random; the first that differs decides, "
        "NULL loses",
    )
    limits: tuple[AnyLimit, ...] = Field(default=(), description="what is left out last, in order", max_length=64)
    splits: Splits = Field(default_factory=Splits, description="what is held out")
    _origin: str | None = PrivateAttr(default=None)

    @property
    def origin(self) -> str:
        """What messages call the policy: the file it was read from, else its name."""
        return self._origin or f"policy {self.name}"

    def reach(self) -> dict[str, float]:
        """Return how far each kind of pairs must be looked for: the largest distance that anything asks for."""
        reach: dict[str, float] = {}
        for rule in self.duplicates:
            for kind in rule.kinds:
                amount, what = (rule.max_distance, "max_distance") if kind in rule.pairs else (rule.confirm, "confirm")
                distance = self.number(amount or 0, f'duplicate rule "{rule.name}", {what}')
                reach[kind] = max(reach.get(kind, 0), distance)
        for copies in self.decontaminate:
            distance = self.number(copies.max_distance, f'decontaminate "{copies.name}", max_distance')
            reach |= {kind: max(reach.get(kind, 0), distance) for kind in copies.pairs}
        return reach

    @property
    def evaluation_pools(self) -> tuple[str, ...]:
        """Names of all pools that hold evaluation sets."""
        return tuple(sorted({name for copies in self.decontaminate for name in copies.against}))

    @field_validator("conditions", "decontaminate", "duplicates", "limits", mode="before")
    @classmethod
    def _name_entries(cls, value: Any, info: ValidationInfo) -> Any:
        return named_list(value, SHORT_FORM[str(info.field_name)])

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        reasons = (*self.conditions, *self.decontaminate, *self.limits)
        for what, entries in (
            ("condition", self.conditions),
            ("condition or limit", reasons),
            ("duplicate rule", self.duplicates),
        ):
            names = [entry.name for entry in entries]
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{what} {', '.join(sorted(twice))} is there twice; names are the reasons given")
        if any(entry.name == SPLIT_CONFLICT for entry in reasons):
            raise ValueError(f"condition {SPLIT_CONFLICT}: publishing uses this name itself; choose another")
        return self

    def with_parameters(self, values: Mapping[str, Value]) -> "Policy":
        """Return the policy with other values for some of its parameters.

        Raises `PolicyError` for a name that the policy does not declare, and for text in a number's place or the
        reverse.
        """
        for name, value in values.items():
            if name not in self.parameters:
                raise PolicyError(
                    f'{self.origin} has no parameter "{name}".{suggest(name, self.parameters)} '
                    f"Parameters: {', '.join(sorted(self.parameters)) or 'none'}."
                )
            if isinstance(value, bool) or isinstance(value, str) != isinstance(self.parameters[name], str):
                raise PolicyError(
                    f"{self.origin}: parameter {name} is {self.parameters[name]!r} and can't become {value!r}. "
                    "Give a number for a number, text for text."
                )
        numbers = {name: _as_declared(value, self.parameters[name]) for name, value in values.items()}
        content = self.model_dump() | {"parameters": {**self.parameters, **numbers}}
        return _validated(content, self.origin, self._origin)

    def number(self, value: float | str, what: str) -> float:
        """Return a number given outright or as `$name`; `what` begins the message if there is none."""
        if not isinstance(value, str):
            return value
        found = self.parameters.get(value.removeprefix("$"))
        if found is None or isinstance(found, str):
            raise PolicyError(
                f"{self.origin}: {what} is {value}, which is not a number among the policy's parameters."
                f"{suggest(value.removeprefix('$'), self.parameters)}"
            )
        return found

    def check(self, columns: pa.Schema) -> "CheckedPolicy":
        """Return the policy as checked against the columns of the signals at hand.

        Raises `PolicyError`, naming the condition, for columns that do not exist, types that do not fit, a condition
        that is not true or false, reaches beyond its row or is not reproducible, and parameters that are missing or
        used by nothing. Columns that hold lists, such as embeddings, are not offered.
        """
        offered = pa.schema([field for field in columns if not pa.types.is_nested(field.type)] + list(SAMPLE_COLUMNS))
        with locked_connection() as connection:
            return _checked(self, offered, connection)


@dataclass(frozen=True)
class CheckedPolicy:
    """A policy whose every part was found to work, with what it takes to evaluate it.

    `conditions` and `prefer` hold one expression for each of the policy's, in order; for a top fraction it is the
    number to rank by, and `fractions` has the share by the condition's place. `distances` are the duplicate rules', and
    `confirmations` the distances of embeddings that confirm, or None. `groups` has the expression of a limit's groups,
    if it has any, by the limit's place, and `at_most` each limit's number.
    """

    policy: Policy
    conditions: tuple[Expression, ...]
    fractions: Mapping[int, float]
    prefer: tuple[Expression, ...]
    descending: tuple[bool, ...]
    distances: tuple[float, ...]
    confirmations: tuple[float | None, ...]
    groups: Mapping[int, Expression]
    at_most: tuple[int, ...]

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """All expressions: the conditions', then the preferences', then those of the limits' groups."""
        return self.conditions + self.prefer + tuple(self.groups.values())

    @property
    def columns(self) -> frozenset[str]:
        """Columns that any expression reads."""
        return frozenset().union(*(expression.columns for expression in self.expressions))


def _checked(policy: Policy, columns: pa.Schema, connection: duckdb.DuckDBPyConnection) -> CheckedPolicy:
    def check(sql: str, what: str) -> Expression:
        return check_expression(connection, sql, what=what, columns=columns, parameters=policy.parameters)

    conditions, fractions = [], {}
    for at, condition in enumerate(policy.conditions):
        what = f'{policy.origin}: condition "{condition.name}"'
        if isinstance(condition, TopFraction):
            expression = check(condition.of, what)
            _require(expression.is_number, f"{what} ranks by {expression.kind.lower()}. Rank by a number.")
            fractions[at] = policy.number(condition.top_fraction, f'condition "{condition.name}", top_fraction')
            _require(0 < fractions[at] <= 1, f"{what} keeps the top {fractions[at]}. Use a share above 0 and up to 1.")
        else:
            expression = check(condition.sql, what)
            is_boolean = expression.kind == "BOOLEAN"
            _require(
                is_boolean, f"{what} gives {expression.kind.lower()}, not true or false. Compare it with something."
            )
        conditions.append(expression)
    prefer, descending = [], []
    for text in policy.prefer:
        what = f'{policy.origin}: preference "{text}"'
        sql, _, direction = PREFERENCES.get(text.strip(), text.strip()).rpartition(" ")
        is_directed = direction.lower() in ("asc", "desc")
        _require(is_directed, f'{what} has no direction. Write "{text} desc" if more is better, else "{text} asc".')
        prefer.append(check(sql, what))
        descending.append(direction.lower() == "desc")
    groups, at_most = {}, []
    for at, limit in enumerate(policy.limits):
        what = f'{policy.origin}: limit "{limit.name}"'
        if limit.grouping is not None:
            groups[at] = check(f"({limit.grouping})::VARCHAR", what)
        number = policy.number(limit.at_most, f'limit "{limit.name}", at_most')
        _require(number >= 1 and number == int(number), f"{what} leaves {number:g}. Use a whole number of at least 1.")
        at_most.append(int(number))
    _refuse_unused(policy, [*conditions, *prefer, *groups.values()])
    rules = policy.duplicates
    return CheckedPolicy(
        policy,
        tuple(conditions),
        fractions,
        tuple(prefer),
        descending=tuple(descending),
        distances=tuple(policy.number(r.max_distance, f'duplicate rule "{r.name}", max_distance') for r in rules),
        confirmations=tuple(
            None if r.confirm is None else policy.number(r.confirm, f'duplicate rule "{r.name}", confirm')
            for r in rules
        ),
        groups=groups,
        at_most=tuple(at_most),
    )


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise PolicyError(message)


def _refuse_unused(policy: Policy, expressions: list[Expression]) -> None:
    used = {name for expression in expressions for name in expression.parameters}
    amounts = [condition.top_fraction for condition in policy.conditions if isinstance(condition, TopFraction)]
    amounts += [rule.max_distance for rule in policy.duplicates]
    amounts += [limit.at_most for limit in policy.limits]
    amounts += [copies.max_distance for copies in policy.decontaminate]
    amounts += [rule.confirm for rule in policy.duplicates if rule.confirm is not None]
    used |= {amount.removeprefix("$") for amount in amounts if isinstance(amount, str)}
    unused = sorted(set(policy.parameters) - used)
    _require(
        not unused,
        f"{policy.origin}: nothing uses the parameter {', '.join(unused)}. Write $name where it belongs, or remove it.",
    )


def load_policy(path: str | Path) -> Policy:
    """Read a policy from a YAML file.

    Raises `PolicyError` naming the file if it is missing, is not YAML, says something twice or holds unknown fields.
    """
    path = Path(path)
    return _validated(read_mapping(path), path.name, path.name)


def _validated(content: Mapping[str, Any], origin: str, file: str | None) -> Policy:
    try:
        policy = Policy.model_validate(content)
    except ValidationError as error:
        known = ", ".join(Policy.model_fields)
        raise PolicyError(f"{origin}: {describe_faults(content, error)}. A policy's fields: {known}.") from None
    policy._origin = file
    return policy

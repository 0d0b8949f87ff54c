"""Document policies: conditions on images, on texts and on documents, and which order segments are published in.

A YAML file for people, as policies of samples are. The images' part is such a policy itself, with duplicates and all.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from storage.schema import DOCUMENTS
from tasks.curation.conditions import Expression, PolicyError, Value, check_expression, locked_connection
from tasks.curation.interleaved.document_columns import COUNTS
from tasks.curation.policy import (
    Amount,
    AnyCondition,
    CheckedPolicy,
    Condition,
    DuplicateRule,
    Name,
    ParameterValue,
    Policy,
    Splits,
)
from tasks.curation.policy_file import describe_faults, named_list, read_mapping

MISSING, UNMATCHED = "missing", "unmatched"
"""Reasons that no condition may be called: an image that is not there, and one that no text is assigned to."""

TEXT = pa.field("text", pa.string())
"""A column of text conditions beside the text signals'."""

DOCUMENT_COLUMNS = pa.schema([*COUNTS, *(DOCUMENTS.field(name) for name in ("key", "text_digest", "metadata"))])
"""Columns of document conditions beside the text signals' for what stays of the text."""


class _Choice(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageRules(_Choice):
    """What images stay in their documents, in the words of a policy of samples."""

    conditions: tuple[AnyCondition, ...] = Field(default=(), description="all must pass", max_length=64)
    duplicates: tuple[DuplicateRule, ...] = Field(default=(), description="of images that match, one survives")
    prefer: tuple[str, ...] = Field(default=(), description="who survives, as in a policy of samples")

    @field_validator("conditions", mode="before")
    @classmethod
    def _name_conditions(cls, value: Any) -> Any:
        return named_list(value, "sql")

    @field_validator("duplicates", mode="before")
    @classmethod
    def _name_rules(cls, value: Any) -> Any:
        return named_list(value, "pairs")


class DocumentPolicy(_Choice):
    """What to keep of interleaved documents and why.

    Images and texts that fail are left out of their documents; then documents are judged by what is left of them. With
    `order: matched` images that stay are assigned to texts that stay, one to one by CLIP similarity, and stand before
    their text; with `dom` all stand in the source's order.
    """

    name: Name = Field(description="name of the policy")
    description: str = Field(default="", description="what it is for")
    parameters: dict[Name, ParameterValue] = Field(
        default_factory=dict, description="thresholds that conditions refer to as $name"
    )
    images: ImageRules = Field(default_factory=ImageRules, description="which images stay")
    texts: tuple[Condition, ...] = Field(default=(), description="which texts stay: all must pass", max_length=64)
    order: Literal["dom", "matched"] = Field(default="dom", description="the order of what is published")
    similarity_min: Amount | None = Field(
        default=None, description="least cosine of an image and its assigned text, for order matched"
    )
    documents: tuple[Condition, ...] = Field(
        default=(), description="which documents stay: all must pass", max_length=64
    )
    one_per: tuple[Literal["key", "text_digest"], ...] = Field(
        default=(), description="columns in which no two documents may be equal"
    )
    prefer: tuple[str, ...] = Field(
        default=(),
        description="which of equal documents survives: SQL with asc or desc; the first that differs decides",
    )
    splits: Splits = Field(default_factory=Splits, description="what is held out")
    _origin: str | None = PrivateAttr(default=None)

    @property
    def origin(self) -> str:
        """What messages call the policy: the file it was read from, else its name."""
        return self._origin or f"policy {self.name}"

    @field_validator("texts", "documents", mode="before")
    @classmethod
    def _name_conditions(cls, value: Any) -> Any:
        return named_list(value, "sql")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for what, entries in (("texts", self.texts), ("documents", self.documents)):
            names = [entry.name for entry in entries]
            if len(set(names)) < len(names):
                raise ValueError(f"a condition of {what} is there twice; names are the reasons given")
        if any(condition.name in (MISSING, UNMATCHED) for condition in self.images.conditions):
            raise ValueError(f"{MISSING} and {UNMATCHED} are reasons of their own; choose other names for conditions")
        if self.similarity_min is not None and self.order == "dom":
            raise ValueError("similarity_min is for order matched; write best_similarity in a condition of images")
        return self

    @property
    def image_policy(self) -> Policy:
        """The images' part as a policy of samples, with the parameters that it uses."""
        rules = self.images.model_dump(mode="json")
        used = set(re.findall(r"\$([a-z][a-z0-9_]*)", json.dumps(rules)))
        parameters = {name: value for name, value in self.parameters.items() if name in used}
        return Policy.model_validate({"name": self.name, "parameters": parameters, **rules})

    @property
    def needs_similarity(self) -> bool:
        """Whether it can't be decided without comparing images and texts."""
        return self.order == "matched" or "similarity" in json.dumps(self.images.model_dump(mode="json"))

    @property
    def least_similarity(self) -> float | None:
        """The number that `similarity_min` stands for."""
        if self.similarity_min is None:
            return None
        return self._as_policy().number(self.similarity_min, "similarity_min")

    def with_parameters(self, values: Mapping[str, Value]) -> "DocumentPolicy":
        """Return the policy with other values for some of its parameters; see `Policy.with_parameters`."""
        parameters = self._as_policy().with_parameters(values).parameters
        return _validated(self.model_dump() | {"parameters": parameters}, self.origin, self._origin)

    def with_order(self, order: Literal["dom", "matched"] | None) -> "DocumentPolicy":
        """Return the policy with another order, or itself for None."""
        return _validated(self.model_dump() | {"order": order or self.order}, self.origin, self._origin)

    def check(self, images: pa.Schema, texts: pa.Schema) -> "CheckedDocumentPolicy":
        """Return the policy as checked against the columns of the images' and the texts' signals.

        Raises `PolicyError`, naming the condition, as `Policy.check` does.
        """
        of_images = self.image_policy.check(images)
        offered = [column for column in texts if not pa.types.is_nested(column.type)]
        of_texts = pa.schema([*offered, TEXT])
        of_documents = pa.schema([*offered, *DOCUMENT_COLUMNS])
        with locked_connection() as connection:

            def checked(what: str, sql: str, columns: pa.Schema) -> Expression:
                return check_expression(
                    connection, sql, what=f"{self.origin}: {what}", columns=columns, parameters=self.parameters
                )

            def conditions(part: str, entries: tuple[Condition, ...], columns: pa.Schema) -> tuple[Expression, ...]:
                found = [checked(f'condition "{entry.name}" of {part}', entry.sql, columns) for entry in entries]
                for entry, expression in zip(entries, found, strict=True):
                    if expression.kind != "BOOLEAN":
                        raise PolicyError(
                            f'{self.origin}: condition "{entry.name}" of {part} gives {expression.kind.lower()}, not '
                            "true or false. Compare it with something."
                        )
                return tuple(found)

            return self._used(
                CheckedDocumentPolicy(
                    self,
                    of_images,
                    conditions("texts", self.texts, of_texts),
                    conditions("documents", self.documents, of_documents),
                    tuple(
                        checked(f'preference "{text}"', _directed(text, self.origin)[0], of_documents)
                        for text in self.prefer
                    ),
                    tuple(_directed(text, self.origin)[1] for text in self.prefer),
                )
            )

    def _used(self, checked: "CheckedDocumentPolicy") -> "CheckedDocumentPolicy":
        own = (*checked.texts, *checked.documents, *checked.prefer)
        used = {name for expression in own for name in expression.parameters} | set(self.image_policy.parameters)
        used |= {str(self.similarity_min).removeprefix("$")}
        if unused := sorted(set(self.parameters) - used):
            raise PolicyError(f"{self.origin}: nothing uses the parameter {', '.join(unused)}. Use or remove it.")
        return checked

    def _as_policy(self) -> Policy:
        return Policy(name=self.name, parameters=self.parameters)


@dataclass(frozen=True)
class CheckedDocumentPolicy:
    """A document policy whose every part was found to work; expressions are in the policy's order."""

    policy: DocumentPolicy
    images: CheckedPolicy
    texts: tuple[Expression, ...]
    documents: tuple[Expression, ...]
    prefer: tuple[Expression, ...]
    descending: tuple[bool, ...]


def load_document_policy(path: str | Path) -> DocumentPolicy:
    """Read a document policy from a YAML file. Raises `PolicyError` as `load_policy` does."""
    path = Path(path)
    return _validated(read_mapping(path), path.name, path.name)


def _validated(content: Mapping[str, Any], origin: str, file: str | None) -> DocumentPolicy:
    try:
        policy = DocumentPolicy.model_validate(content)
    except ValidationError as error:
        known = ", ".join(DocumentPolicy.model_fields)
        raise PolicyError(
            f"{origin}: {describe_faults(content, error)}. A document policy's fields: {known}."
        ) from None
    policy._origin = file
    return policy


def _directed(text: str, origin: str) -> tuple[str, bool]:
    sql, _, direction = text.strip().rpartition(" ")
    if direction.lower() not in ("asc", "desc"):
        raise PolicyError(f'{origin}: preference "{text}" has no direction. Write asc or desc behind it.')
    return sql, direction.lower() == "desc"

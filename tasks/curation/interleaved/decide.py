"""Deciding on documents: which segments and documents stay, all reasons, and what is published in which order.

Images were decided on as samples; texts and similarities are in their tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from storage.fingerprint import fingerprint
from storage.record import Record, read_record, write_record
from storage.refs import (
    DecisionsRef,
    DocumentDecisionsRef,
    DocumentShardRef,
    DocumentsRef,
    Outcome,
    ShardRef,
    SignalRef,
)
from storage.schema import DOCUMENT_DECISIONS, NODE_DECISIONS
from storage.warehouse import Warehouse
from tasks.curation.columns import EvidenceError, find_columns
from tasks.curation.conditions import Expression, evaluate, locked_connection, refused_value
from tasks.curation.funnel import Funnel, count_funnel, with_values
from tasks.curation.interleaved.document_columns import document_columns
from tasks.curation.interleaved.nodes import Node, Placement, judge_segments
from tasks.curation.interleaved.policy import CheckedDocumentPolicy, DocumentPolicy
from tasks.curation.interleaved.texts import measure_whole, read_texts, text_columns, text_refs
from tasks.curation.judge import failed_names
from tasks.curation.signals.contract import Signal

VERSION = 2


def decide_documents(
    documents: DocumentsRef,
    policy: DocumentPolicy,
    images: DecisionsRef,
    signals: Sequence[SignalRef],
    texts: Sequence[Signal],
    *,
    warehouse: Warehouse,
) -> Outcome[DocumentDecisionsRef]:
    """Apply `policy` to every document, and write decisions on segments and on documents, one table each a shard.

    `images` are the decisions of `policy.image_policy` on the images, made from `signals`; `texts` the text signals,
    measured of every segment. Documents are judged by what stays of them: of its text the signals are measured here,
    unless they were before, and stand beside the decisions. The record holds the funnels.

    Raises `PolicyError` if the policy does not fit the signals, and `EvidenceError` if something was not measured.
    """
    ref = document_decisions_ref(documents, policy, images, signals, texts)
    if read_record(warehouse, ref.record) is not None:
        return Outcome(ref, cached=True)
    measured = find_columns(documents.images, signals, warehouse=warehouse).schema
    checked = policy.check(measured, text_columns(texts))
    similarity = _similarity(signals) if policy.order == "matched" else None
    judge = _Judge(checked, images, texts, similarity, warehouse)
    parts, text_bits = [], []
    with locked_connection() as connection:
        for shard in documents.shards:
            judged = judge.shard(shard, connection)
            warehouse.write_table(ref.nodes(shard), judged.nodes)
            parts.append(judged.documents)
            text_bits.append(judged.text_bits)
    funnel = _write_documents(ref, documents, checked, parts, texts, warehouse)
    of_texts = count_funnel(
        f"{policy.name}: texts",
        conditions=[(condition.name, with_values(condition.sql, policy.parameters)) for condition in policy.texts],
        rules=[],
        failed=(bits := np.concatenate(text_bits)),
        taken_by=np.full(len(bits), -1),
    )
    config, inputs = _depends_on(documents, policy, images, signals, texts)
    result = {"documents": funnel.as_dict(), "texts": of_texts.as_dict()}
    write_record(
        warehouse, ref.record, Record("decide documents", ref.fingerprint, config, inputs, funnel.counts, result)
    )
    return Outcome(ref, cached=False)


def document_decisions_ref(
    documents: DocumentsRef,
    policy: DocumentPolicy,
    images: DecisionsRef,
    signals: Sequence[SignalRef],
    texts: Sequence[Signal],
) -> DocumentDecisionsRef:
    """Return where the decisions on these inputs lie, whether they were made yet or not."""
    identity = fingerprint(_depends_on(documents, policy, images, signals, texts))
    return DocumentDecisionsRef(identity, f"decisions/documents-{identity}")


def _depends_on(
    documents: DocumentsRef,
    policy: DocumentPolicy,
    images: DecisionsRef,
    signals: Sequence[SignalRef],
    texts: Sequence[Signal],
) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {"version": VERSION, "policy": policy.model_dump(mode="json")}
    inputs = {
        "documents": documents.fingerprint,
        "images": images.fingerprint,
        "signals": [[signal.signal, signal.fingerprint] for signal in signals],
        "texts": [[signal.signal, signal.fingerprint] for signal in text_refs(texts)],
    }
    return config, inputs


def _similarity(signals: Sequence[SignalRef]) -> SignalRef:
    for signal in signals:
        if signal.signal == "text_similarity":
            return signal
    raise EvidenceError("order matched needs the similarity of images and texts. Measure clip and text_similarity.")


# -- one shard ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judged:
    """A shard's decisions on segments, what is known of its documents, and the texts' failed conditions as bits.

    `documents` has what goes into the decisions, `failed` as bits, and what the policy prefers by (`by0`, …).
    """

    nodes: pa.Table
    documents: pa.Table
    text_bits: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class _Judge:
    checked: CheckedDocumentPolicy
    images: DecisionsRef
    texts: Sequence[Signal]
    similarity: SignalRef | None
    warehouse: Warehouse

    def shard(self, shard: DocumentShardRef, connection: duckdb.DuckDBPyConnection) -> _Judged:
        """Judge the segments and documents of one shard."""
        policy = self.checked.policy
        documents = self.warehouse.read_table(shard.path)
        rows = documents.to_pylist()
        segments = read_texts(shard, self.texts, warehouse=self.warehouse)
        bits = self._failed(connection, self.checked.texts, segments)
        failed = iter(failed_names(bits, [condition.name for condition in policy.texts]).to_pylist())
        images = self._images(shard)
        placement = Placement(policy.order == "matched", policy.least_similarity)
        nodes: list[Node] = []
        for row in rows:
            own = [next(failed) for segment in row["segments"] if segment["kind"] == "text"]
            nodes += judge_segments(row, images, own, placement)
        decided = pa.Table.from_pylist(nodes, NODE_DECISIONS)
        whole = measure_whole(shard, decided, self.texts, warehouse=self.warehouse)
        known = document_columns(documents, decided, whole)
        verdict = pa.array(self._failed(connection, self.checked.documents, known))
        preferred = self._evaluate(connection, self.checked.prefer, known)
        known = known.drop_columns("metadata")
        for at in range(len(self.checked.prefer)):
            known = known.append_column(f"by{at}", preferred.column(at))
        return _Judged(decided, known.append_column("failed", verdict), bits)

    def _images(self, shard: DocumentShardRef) -> dict[str, dict[str, Any]]:
        """The decisions on the shard's images by sample, with their similarity to texts where they are matched."""
        samples = ShardRef(shard.pool, shard.name, 0)
        if not self.warehouse.exists(self.images.table(samples)):
            return {}
        table = self.warehouse.read_table(self.images.table(samples))
        if self.similarity is not None:
            similar = self.warehouse.read_table(self.similarity.table(samples), ["text_similarity"])
            table = table.append_column("text_similarity", similar["text_similarity"])
        return {row["sample_id"]: row for row in table.to_pylist()}

    def _failed(
        self, connection: duckdb.DuckDBPyConnection, conditions: tuple[Expression, ...], rows: pa.Table
    ) -> npt.NDArray[np.uint64]:
        """One bit for each condition that a row fails, the first condition lowest; NULL fails."""
        bits = np.zeros(len(rows), np.uint64)
        for at, column in enumerate(self._evaluate(connection, conditions, rows).columns):
            bits |= ~np.asarray(pc.fill_null(column, False)) * np.uint64(1 << at)
        return bits

    def _evaluate(
        self, connection: duckdb.DuckDBPyConnection, expressions: tuple[Expression, ...], rows: pa.Table
    ) -> pa.Table:
        if not expressions:
            return pa.table({})
        policy = self.checked.policy
        read = sorted(set().union(*(expression.columns for expression in expressions)) or {rows.column_names[0]})
        try:
            return evaluate(connection, expressions, rows.select(read), parameters=policy.parameters)
        except duckdb.Error as error:
            raise refused_value(policy.origin, "a condition", error) from None


# -- all documents --------------------------------------------------------------------------------------------


def _write_documents(
    ref: DocumentDecisionsRef,
    documents: DocumentsRef,
    checked: CheckedDocumentPolicy,
    parts: Sequence[pa.Table],
    texts: Sequence[Signal],
    warehouse: Warehouse,
) -> Funnel:
    """Let equal documents choose one among them, write the decisions on documents, and return their funnel."""
    policy = checked.policy
    names = [condition.name for condition in policy.documents]
    every = pa.concat_tables(parts)
    survivors, rules = _one_per(every, checked)
    failed = np.asarray(every["failed"])
    begin = 0
    for shard, part in zip(documents.shards, parts, strict=True):
        rows = slice(begin, begin := begin + len(part))
        columns = {
            **{name: part[name] for name in part.column_names},
            "kept": pa.array([bits == 0 and s is None for bits, s in zip(failed[rows], survivors[rows], strict=True)]),
            "failed": failed_names(failed[rows], names),
            "duplicate_of": pa.array(survivors[rows], pa.string()),
            "duplicate_rule": pa.array(rules[rows], pa.string()),
        }
        schema = pa.schema([*DOCUMENT_DECISIONS, *text_columns(texts)])
        table = pa.table([columns[name] for name in schema.names], schema=schema)
        warehouse.write_table(ref.documents(shard), table)
    return count_funnel(
        policy.name,
        conditions=[(condition.name, with_values(condition.sql, policy.parameters)) for condition in policy.documents],
        rules=[(rule, f"one per {rule}") for rule in policy.one_per],
        failed=failed,
        taken_by=np.array([-1 if rule is None else policy.one_per.index(rule) for rule in rules], np.int64),
    )


def _one_per(every: pa.Table, checked: CheckedDocumentPolicy) -> tuple[list[str | None], list[str | None]]:
    """For each document the one that stands in its place and the column they are equal in, or None.

    Column by column, the best of equal documents that pass and have not been taken takes the others.
    """
    ids: list[str] = every["document_id"].to_pylist()
    survivor: dict[str, str] = {}
    named_by: dict[str, str] = {}
    order = [f"by{at} {'DESC' if down else 'ASC'} NULLS LAST" for at, down in enumerate(checked.descending)]
    with locked_connection() as connection:
        for column in checked.policy.one_per:
            is_free = pc.invert(pc.is_in(every["document_id"], value_set=pa.array(list(survivor), pa.string())))
            connection.register("candidates", every.filter(pc.and_(pc.equal(every["failed"], 0), is_free)))
            found = connection.execute(
                f"SELECT document_id, first_value(document_id) OVER (PARTITION BY {column} "
                f"ORDER BY {', '.join([*order, 'document_id'])}) AS best FROM candidates"
            ).fetchall()
            connection.unregister("candidates")
            taken = {name: best for name, best in found if name != best}
            survivor |= taken
            named_by |= dict.fromkeys(taken, column)

    def last(name: str) -> str | None:
        stands = survivor.get(name)
        while stands in survivor:
            stands = survivor[stands]
        return stands

    return [last(name) for name in ids], [named_by.get(name) for name in ids]

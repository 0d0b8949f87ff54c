"""`decide` and `compare` as a whole against the rules written out in plain Python, on drawn pools, policies and pairs.

NULL is None and logic has three values; numbers are multiples of 1/8, so that none is rounded anywhere.
"""

import hashlib
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.record import read_record
from storage.refs import PairsRef, PoolRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation.decide import decide
from tasks.curation.funnel import Funnel
from tasks.curation.policy import DuplicateRule, Policy
from tasks.curation.whatif import compare
from tests.tasks.curation.handmade import write_pairs, write_pool, write_signals

Row = Mapping[str, Any]
Verdict = tuple[bool, list[str], str | None, str | None, float | None]
"""Kept, failed, duplicate_of, duplicate_rule, duplicate_distance."""

SIGNALS = ("size", "language", "clip")
STEP = 1 / 64
REACH = 4 * STEP
"""How far semantic pairs are stored."""


def least(bound: float) -> Callable[[Row], bool | None]:
    return lambda row: None if row["clip_score"] is None else row["clip_score"] >= bound


def either(row: Row) -> bool | None:
    """SQL's OR: true wins over NULL, and NULL over false."""
    parts = [None if row["width"] is None else row["width"] > 200, row["language"] and row["language"] == "en"]
    return True if True in parts else None if None in parts else False


CONDITIONS: dict[str, Callable[[Row], bool | None]] = {
    "language = 'en'": lambda row: row["language"] and row["language"] == "en",
    "clip_score >= 0.25": least(0.25),
    "not (clip_score < $least)": least(0.5),
    "width > 200 or language = 'en'": either,
    "width is not null": lambda row: row["width"] is not None,
    "coalesce(width, 999) between 100 and 300": lambda row: 100 <= (row["width"] or 999) <= 300,
    "case when language = 'de' then false end": lambda row: False if row["language"] == "de" else None,
}

PREFERENCES: dict[str, Callable[[str, Row], tuple[bool, Any]]] = {
    "clip_score desc": lambda _, row: (row["clip_score"] is None, -(row["clip_score"] or 0)),
    "width asc": lambda _, row: (row["width"] is None, row["width"] or 0),
    "random": lambda sample, _: (False, hashlib.md5(f"key-{sample}".encode()).hexdigest()),
}
"""Keys to sort by, best first; NULL last whatever the direction."""


@dataclass(frozen=True)
class Case:
    """Samples by id, where each shard ends, and the policy. `bytes` and `place` are what pairs are made of."""

    rows: dict[str, Row]
    ends: list[int]
    conditions: list[str | float]
    rules: list[DuplicateRule]
    prefer: list[str]

    @property
    def policy(self) -> Policy:
        conditions: dict[str, Any] = {
            f"c{at}": {"top_fraction": asked, "of": "clip_score"} if isinstance(asked, float) else asked
            for at, asked in enumerate(self.conditions)
        }
        parameters = {"least": 0.5} if any("$least" in str(asked) for asked in self.conditions) else {}
        return Policy(name="p", parameters=parameters, conditions=conditions, duplicates=self.rules, prefer=self.prefer)  # type: ignore[arg-type]

    def distance(self, rule: DuplicateRule, one: str, other: str) -> float | None:
        """How far two samples are apart by a rule; None if it does not join them."""
        a, b = self.rows[one], self.rows[other]
        found = []
        if "bytes" in rule.pairs and a["bytes"] == b["bytes"]:
            found.append(0.0)
        if "semantic" in rule.pairs and None not in (a["place"], b["place"]):
            found.append(abs(a["place"] - b["place"]) * STEP)
        within = [distance for distance in found if distance <= rule.max_distance]  # type: ignore[operator]
        return min(within) if within and one != other else None


def scores(least_value: int, most: int) -> st.SearchStrategy[float | None]:
    return st.one_of(st.none(), st.integers(least_value, most).map(lambda eighths: eighths / 8))


row = st.fixed_dictionaries(
    {
        "clip_score": st.one_of(scores(0, 6), st.just(math.nan)),
        "width": st.sampled_from([None, 50, 100, 250, 300, 400]),
        "language": st.sampled_from([None, "en", "en", "de"]),
        "bytes": st.integers(0, 5),
        "place": st.one_of(st.none(), st.integers(0, 30)),
    }
)
joining = st.sampled_from(
    [
        ("bytes", ["bytes"], 0.0),
        *(("near", ["semantic"], s * STEP) for s in (0, 1, 3)),
        ("any", ["semantic", "bytes"], STEP),
    ]
)


def rule(given: tuple[str, list[str], float], method: str) -> DuplicateRule:
    name, kinds, distance = given
    return DuplicateRule(name=name, pairs=tuple(kinds), max_distance=distance, rule=method)  # type: ignore[arg-type]


rules = st.one_of(
    st.lists(st.builds(rule, joining, st.sampled_from(["greedy", "official"])), max_size=2, unique_by=lambda r: r.name),
    st.builds(rule, joining, st.just("components")).map(lambda only: [only]),
)
cases = st.builds(
    Case,
    st.lists(row, min_size=1, max_size=12).map(lambda rows: {f"{at:032x}": row for at, row in enumerate(rows)}),
    st.lists(st.integers(0, 12), max_size=2).map(sorted),
    st.lists(st.one_of(st.sampled_from(sorted(CONDITIONS)), st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0])), max_size=4),
    rules,
    st.lists(st.sampled_from(sorted(PREFERENCES)), max_size=2, unique=True),
)


def expected(case: Case) -> dict[str, Verdict]:
    """The verdicts by the rules, written out."""
    rows = {
        s: {**r, "clip_score": None if r["clip_score"] != r["clip_score"] else r["clip_score"]}
        for s, r in case.rows.items()
    }
    failed: dict[str, list[str]] = {sample: [] for sample in rows}
    for at, asked in enumerate(case.conditions):
        passing = top(rows, asked) if isinstance(asked, float) else {s for s, r in rows.items() if CONDITIONS[asked](r)}
        for sample in rows.keys() - passing:
            failed[sample].append(f"c{at}")
    candidates = [sample for sample in rows if not failed[sample]]
    candidates.sort(key=lambda sample: [*(PREFERENCES[by](sample, rows[sample]) for by in case.prefer), sample])
    taken = (
        components(case, candidates) if [r.rule for r in case.rules] == ["components"] else one_by_one(case, candidates)
    )
    return {
        sample: (not failed[sample] and sample not in taken, failed[sample], *taken.get(sample, (None, None, None)))
        for sample in rows
    }


def top(rows: Mapping[str, Row], fraction: float) -> set[str]:
    """DataComp's rule: the value at place int(N·fraction) of all N, NULL last, and all that are no worse."""
    valid = sorted((r["clip_score"] for r in rows.values() if r["clip_score"] is not None), reverse=True)
    place = int(len(rows) * fraction)
    threshold = valid[place] if place < len(valid) else -math.inf
    return {s for s, r in rows.items() if r["clip_score"] is not None and r["clip_score"] >= threshold}


Taken = dict[str, tuple[str, str, float]]
"""Survivor, rule and distance of each sample that stands back."""


def one_by_one(case: Case, candidates: Sequence[str]) -> Taken:
    """Best first; who was not taken survives and takes its neighbours; by `official` who was taken takes on as well."""
    taken: Taken = {}
    survivors: set[str] = set()
    for sample in candidates:
        stands = taken[sample][0] if sample in taken else sample
        survivors |= {stands}
        for rule in case.rules:
            if sample in taken and rule.rule != "official":
                continue
            for other in case.rows:
                distance = case.distance(rule, sample, other)
                if distance is not None and other not in taken and other not in survivors:
                    taken[other] = (stands, rule.name, distance)
    return taken


def components(case: Case, candidates: Sequence[str]) -> Taken:
    """The best of all candidates that hang together survives; a sample that fails goes to what is nearest to it."""
    (rule,) = case.rules
    best: dict[str, str] = {}
    for sample in candidates:
        reached = [] if sample in best else [sample]
        for one in reached:
            best[one] = sample
            reached += [c for c in candidates if c not in reached and case.distance(rule, one, c) is not None]
    taken: Taken = {}
    for sample in case.rows:
        near = {c: d for c in candidates if (d := case.distance(rule, sample, c)) is not None}
        if near and best.get(sample) != sample:
            nearest = min(near, key=lambda c: near[c])
            taken[sample] = (best.get(sample, best[nearest]), rule.name, near[nearest])
    return taken


Written = tuple[Warehouse, PoolRef, list[SignalRef], list[PairsRef]]


@contextmanager
def written(case: Case) -> Iterator[Written]:
    """The case's samples, signals and pairs in a warehouse."""
    with tempfile.TemporaryDirectory() as folder:
        warehouse = Warehouse(folder)
        bounds = [0, *(min(end, len(case.rows)) for end in case.ends), len(case.rows)]
        ids = list(case.rows)
        shards = [{s: {} for s in ids[a:b]} for a, b in itertools.pairwise(bounds) if b > a]
        pool = write_pool(warehouse, *shards)
        measured = {s: {k: v for k, v in r.items() if k not in ("bytes", "place")} for s, r in case.rows.items()}
        signals = write_signals(warehouse, pool, measured, signals=SIGNALS)
        both = [(a, b) for a in ids for b in ids if a < b]
        far = {
            (a, b): case.rows[a]["place"] - case.rows[b]["place"]
            for a, b in both
            if None not in (case.rows[a]["place"], case.rows[b]["place"])
        }
        pairs = [
            write_pairs(
                warehouse, "bytes", [(a, b, 0) for a, b in both if case.rows[a]["bytes"] == case.rows[b]["bytes"]]
            ),
            write_pairs(
                warehouse, "semantic", [(a, b, abs(d) * STEP) for (a, b), d in far.items() if abs(d) * STEP <= REACH]
            ),
        ]
        yield warehouse, pool, signals, pairs


def found(case: Case) -> tuple[dict[str, Verdict], Funnel]:
    with written(case) as (warehouse, pool, signals, pairs):
        ref = decide(pool, case.policy, signals, pairs, warehouse=warehouse).ref
        table = pa.concat_tables(warehouse.read_table(ref.table(shard)) for shard in pool.shards)
        record = read_record(warehouse, ref.record)
        assert record is not None
        verdicts = {row["sample_id"]: tuple(row.values())[1:6] for row in table.to_pylist()}
        return verdicts, Funnel.from_dict(record.result)  # type: ignore[return-value]


@settings(max_examples=40, deadline=None)
@given(cases)
def test_every_verdict_is_that_of_the_rules_written_out(case: Case) -> None:
    verdicts, funnel = found(case)
    rules = expected(case)
    if [rule.rule for rule in case.rules] == ["components"]:  # which of several nearest a failing one names is open
        for sample, (kept, failed, survivor, *_) in rules.items():
            if failed and survivor:
                assert verdicts[sample][2] in {s for s, verdict in verdicts.items() if verdict[0]}
                rules[sample] = (kept, failed, verdicts[sample][2], *rules[sample][3:])
    assert verdicts == rules
    assert (funnel.samples, funnel.kept) == (len(rules), sum(verdict[0] for verdict in rules.values()))
    assert [stage.fails for stage in funnel.conditions] == [
        sum(f"c{at}" in verdict[1] for verdict in rules.values()) for at in range(len(case.conditions))
    ]
    assert [stage.fails for stage in funnel.duplicates] == [
        sum(not verdict[1] and verdict[3] == rule.name for verdict in rules.values()) for rule in case.rules
    ]


@settings(max_examples=40, deadline=None)
@given(cases, cases)
def test_a_comparison_counts_what_the_rules_say_of_either_policy(case: Case, drawn: Case) -> None:
    other = replace(case, conditions=drawn.conditions, rules=drawn.rules, prefer=drawn.prefer)
    a, b = expected(case), expected(other)
    with written(case) as (warehouse, pool, signals, pairs):
        compared = compare(pool, case.policy, other.policy, signals, pairs, warehouse=warehouse, by="language")
    assert compared.both == sum(a[sample][0] and b[sample][0] for sample in case.rows)
    assert (compared.only_a, compared.only_b) == (reasons(b, a), reasons(a, b))
    assert (compared.overlap_a, compared.overlap_b) == (overlap(a), overlap(b))
    languages = Counter(row["language"] for row in case.rows.values())
    kept = [Counter(row["language"] for sample, row in case.rows.items() if said[sample][0]) for said in (a, b)]
    assert set(compared.groups) == {(name, n, kept[0][name], kept[1][name]) for name, n in languages.items()}


def reasons(rejecting: Mapping[str, Verdict], keeping: Mapping[str, Verdict]) -> dict[tuple[str, ...], int]:
    """Why one policy rejects what the other keeps."""
    return Counter(
        tuple(failed) or (f"duplicate: {rule}",)
        for sample, (kept, failed, _, rule, _) in rejecting.items()
        if keeping[sample][0] and not kept
    )


def overlap(verdicts: Mapping[str, Verdict]) -> dict[tuple[str, str], int]:
    """Samples that fail both of two conditions, or one alone."""
    found = [failed for _, failed, *_ in verdicts.values()]
    names = {name for failed in found for name in failed}
    counts = {(x, y): sum({x, y} <= set(failed) for failed in found) for x in names for y in names if x != y}
    counts |= {(x, x): sum(failed == [x] for failed in found) for x in names}
    return {pair: count for pair, count in counts.items() if count}

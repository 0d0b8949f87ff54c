"""Expressions over a pool: each once, with its own values."""

from pathlib import Path

import pyarrow as pa
import pytest

from storage.warehouse import Warehouse
from tasks.curation import evaluations
from tasks.curation.columns import find_columns
from tasks.curation.decontaminate import read_ids
from tasks.curation.evaluations import bind, evaluate_pool
from tasks.curation.policy import Policy
from tests.tasks.curation.handmade import write_pool, write_signals

POLICY = Policy.model_validate(
    {"name": "p", "parameters": {"least": 2}, "conditions": {"ratio": "width // $least = 1", "wide": "width > 2"}}
)


def test_what_policies_share_is_evaluated_once_and_what_differs_by_a_value_apart(tmp_path: Path, monkeypatch):
    warehouse = Warehouse(str(tmp_path))
    rows = {name: {"width": width} for name, width in zip("abc", [2, 3, 5], strict=True)}
    pool = write_pool(warehouse, {"a": rows["a"]}, {"b": rows["b"], "c": rows["c"]})
    columns = find_columns(pool, write_signals(warehouse, pool, rows), warehouse=warehouse)
    checked = [POLICY.with_parameters({"least": least}).check(columns.schema) for least in (2, 5, 2)]
    bounds = [bound for policy in checked for bound in bind(policy, policy.conditions)]
    evaluated = []
    real = evaluations.evaluate
    monkeypatch.setattr(
        evaluations, "evaluate", lambda c, ones, *a, **k: evaluated.extend(ones) or real(c, ones, *a, **k)
    )
    ids, values = evaluate_pool(pool, columns, bounds, warehouse=warehouse)
    assert sorted(one.sql for one in evaluated) == ["width // $least = 1"] * 2 + ["width > 2"]
    found = [dict(zip(ids.to_pylist(), values[bound].to_pylist(), strict=True)) for bound in bounds]
    assert found == [
        {"a": True, "b": True, "c": False},
        {"a": False, "b": True, "c": True},
        {"a": False, "b": False, "c": True},
        {"a": False, "b": True, "c": True},
        *found[:2],
    ]


def test_one_and_one_point_nought_are_two_values():
    schema = pa.schema([("width", pa.int32())])
    policies = [POLICY.model_copy(update={"parameters": {"least": value}}) for value in (1, 1.0)]
    whole, decimal = (policy.check(schema) for policy in policies)
    assert bind(whole, whole.conditions)[0] != bind(decimal, decimal.conditions)[0]
    assert bind(whole, whole.conditions)[1] == bind(decimal, decimal.conditions)[1]


@pytest.mark.parametrize("count", [1, 20])
def test_shards_are_put_together_in_order_whatever_the_size_of_a_block(tmp_path: Path, monkeypatch, count):
    monkeypatch.setattr(evaluations, "BLOCK_ROWS", count)
    warehouse = Warehouse(str(tmp_path))
    rows = {f"{at:02}": {"width": at} for at in range(30)}
    ids = list(rows)
    pool = write_pool(warehouse, *({name: rows[name] for name in ids[at : at + 3]} for at in range(0, 30, 3)))
    columns = find_columns(pool, write_signals(warehouse, pool, rows), warehouse=warehouse)
    checked = POLICY.check(columns.schema)
    found, values = evaluate_pool(pool, columns, bind(checked, checked.conditions), warehouse=warehouse)
    assert found.to_pylist() == read_ids([pool], warehouse).to_pylist()
    assert values[bind(checked, checked.conditions)[1]].to_pylist() == [int(name) > 2 for name in found.to_pylist()]

"""Where a policy draws its lines: what its conditions compare with numbers, and which, for drawing both."""

import json
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import duckdb

from tasks.curation.conditions import Value

ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
"""What a threshold may be made of, as in `1 - $special_max`."""

_BEFORE = "SELECT (\n"


def thresholds(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Mapping[str, Value]
) -> dict[str, set[float]]:
    """Return the numbers by the measure that a checked condition compares with them, a column or an expression.

    `least(width, height) >= 200` gives `{"least(width, height)": {200}}`; BETWEEN gives two numbers, and a
    `$parameter` counts as its value. Comparisons with text, or of two columns, draw no line and are left out.
    """
    statement = f"{_BEFORE}{sql}\n)"
    tree = json.loads(connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [statement]).fetchall()[0][0])
    found: dict[str, set[float]] = {}
    for node, number in _compared(tree, parameters):
        begin = node["query_location"]
        measure = statement[begin : begin + node["query_location_length"]]
        found.setdefault(measure, set()).add(number)
    return found


def _compared(tree: Any, parameters: Mapping[str, Value]) -> Iterator[tuple[dict[str, Any], float]]:
    """Every (node, number) that a comparison anywhere in the tree sets side by side."""
    if isinstance(tree, list):
        for part in tree:
            yield from _compared(part, parameters)
    elif isinstance(tree, dict):
        sides = []
        if tree.get("class") == "COMPARISON":
            sides = [(tree["left"], tree["right"]), (tree["right"], tree["left"])]
        elif tree.get("class") == "BETWEEN":
            sides = [(tree["input"], tree["lower"]), (tree["input"], tree["upper"])]
        for one, other in sides:
            number = _number(other, parameters)
            if number is not None and one["class"] in ("COLUMN_REF", "FUNCTION"):
                yield one, number
        for part in tree.values():
            yield from _compared(part, parameters)


def _number(node: Mapping[str, Any], parameters: Mapping[str, Value]) -> float | None:
    if node["class"] == "FUNCTION" and node["function_name"] in ARITHMETIC and len(node["arguments"]) == 2:
        sides = [argument["expression"] for argument in node["arguments"]]
        left, right = (_number(child, parameters) for child in sides)
        if left is None or right is None or (node["function_name"] == "/" and right == 0):
            return None
        return ARITHMETIC[node["function_name"]](left, right)
    if node["class"] == "PARAMETER":
        value = parameters.get(node["identifier"])
        return None if value is None or isinstance(value, str) else float(value)
    if node["class"] == "CONSTANT" and node["literal"]["kind"] in ("INTEGER", "NUMERIC"):
        return float(node["literal"]["text"])
    return None

"""SQL conditions: checked by their parse tree before anything runs, then evaluated by a DuckDB that is locked up.

A condition may depend on the columns of its own row and on the policy's parameters, on nothing else, so that the same
policy over the same signals decides the same way on any machine and any day.
"""

import difflib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

Value = int | float | str


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


NODES = _words("BETWEEN CASE CAST COLUMN_REF COMPARISON CONJUNCTION CONSTANT FUNCTION OPERATOR PARAMETER TYPE")
"""Kinds of node an expression may be built of; a kind that DuckDB adds later is refused until it is listed."""

REFUSED_NODES = {
    "SUBQUERY": "contains a query of its own",
    "WINDOW": "uses a window function",
    "STAR": "uses *",
    "LAMBDA": "uses a lambda or ->, which for JSON is ->> or json_extract(…)",
    "COLLATE": "uses a collation",
    "POSITIONAL_REFERENCE": "uses a column's position",
}

OPERATORS = _words(
    "ARRAY_EXTRACT ARRAY_SLICE COMPARE_IN COMPARE_NOT_IN OPERATOR_COALESCE OPERATOR_IS_NOT_NULL OPERATOR_IS_NULL",
    "OPERATOR_NOT OPERATOR_NULLIF OPERATOR_TRY",
)

FUNCTIONS = _words(
    "+ - * / // % ^ ** || & | << >> ~~ !~~ ~~* !~~* ~~~ ^@ ->>",
    "like_escape not_like_escape ilike_escape not_ilike_escape",
    "abs bit_count ceil ceiling exp floor fmod greatest isfinite isinf isnan least ln log log10 log2 mod pow power",
    "round sign sqrt trunc xor",
    "concat concat_ws contains damerau_levenshtein ends_with instr jaccard jaro_similarity jaro_winkler_similarity",
    "left length levenshtein lower ltrim nfc_normalize position prefix regexp_extract regexp_extract_all",
    "regexp_full_match regexp_matches regexp_replace replace reverse right rtrim split_part starts_with string_split",
    "string_split_regex strip_accents strlen strpos substr substring suffix trim unicode upper",
    "len list_contains list_distinct list_has_all list_has_any list_unique list_value",
    "json_array_length json_contains json_exists json_extract json_extract_string json_keys json_type json_valid",
    "json_value",
    "date_diff date_part date_trunc day month strptime try_strptime year",
    "md5 md5_number_lower md5_number_upper sha256",
    "if nullif",
)
"""All that an expression may call: operators, numbers, text, lists, JSON, dates, hashes and choices.

Listed by hand, because DuckDB's own labels do not answer the question: it calls `age`, `current_localtime` and
`version` consistent, and `hash` differs from one version to the next.
"""

TYPES = _words(
    "bigint bool boolean date decimal double float float4 float8 hugeint int int1 int2 int4 int8 integer json list",
    "numeric real smallint string text timestamp tinyint ubigint uinteger usmallint utinyint varchar",
)
"""Types an expression may cast to. Times with a zone are left out: they depend on the machine's zone."""

NUMBERS = _words("TINYINT SMALLINT INTEGER BIGINT HUGEINT UTINYINT USMALLINT UINTEGER UBIGINT FLOAT DOUBLE")


class PolicyError(ValueError):
    """A policy can't be used; the message names its file, the part at fault and what would work."""


@contextmanager
def locked_connection() -> Iterator[duckdb.DuckDBPyConnection]:
    """Give an in-memory DuckDB that reaches no file, extension or Python variable and whose settings are fixed.

    Its time zone is UTC on every machine. Dividing by zero gives NULL, and what has no value, such as the root of a
    negative number, is an error: DuckDB's own NaN would pass `>= 0.5`, as the largest of all numbers.
    """
    config: dict[str, str | bool | int | float | list[str]] = {
        "enable_external_access": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "python_enable_replacements": False,
        "ieee_floating_point_ops": False,
        "error_on_division_by_zero": False,
    }
    with duckdb.connect(":memory:", config=config) as connection:
        connection.execute("SET GLOBAL TimeZone = 'UTC'")
        connection.execute("SET lock_configuration = true")
        yield connection


@dataclass(frozen=True)
class Expression:
    """A checked SQL expression: the columns and parameters it reads, as declared, and its DuckDB type."""

    sql: str
    columns: frozenset[str]
    parameters: frozenset[str]
    kind: str

    @property
    def is_number(self) -> bool:
        """Whether its values are integers, floats or decimals."""
        return self.kind in NUMBERS or self.kind.startswith("DECIMAL")


def check_expression(
    connection: duckdb.DuckDBPyConnection, sql: str, *, what: str, columns: pa.Schema, parameters: Mapping[str, Value]
) -> Expression:
    """Return `sql`, an expression over `columns` and `$parameters`, as a checked one.

    Raises `PolicyError`, beginning with `what`, unless it is one expression that stays within its row, calls only
    `FUNCTIONS`, names existing columns and parameters, and works on an ordinary row of these columns' types.
    """
    nodes = _nodes(connection, sql, what)
    read, bound = _check_names(nodes, what, columns=columns.names, parameters=parameters)
    try:
        connection.register("probe", _probe(columns))
        result = connection.execute(f"SELECT (\n{sql}\n) FROM probe", _bind(bound, parameters))
        kind = str(result.description[0][1])
        result.fetchall()
    except duckdb.Error as error:
        types = ", ".join(f"{field.name} ({field.type})" for field in columns if field.name in read)
        raise PolicyError(
            f"{what} can't be evaluated: {_first_line(error)}. It reads {types or 'no column'}. Compare like with "
            "like; where a value may not fit, try_cast(… as …) and try(…) give NULL, which fails the condition."
        ) from None
    finally:
        connection.unregister("probe")
    return Expression(sql, frozenset(read), frozenset(bound), kind)


def refused_value(origin: str, what: str, error: duckdb.Error) -> PolicyError:
    """Return the error to raise when `what`, of the policy `origin`, met a value that it can't handle."""
    reason = str(error).splitlines()[0].rstrip(".")
    return PolicyError(
        f"{origin}: {what} met a value it can't handle: {reason}. "
        "Use try_cast(… as …) or try(…), which give NULL instead; a condition that is NULL fails."
    )


def evaluate(
    connection: duckdb.DuckDBPyConnection,
    expressions: Sequence[Expression],
    rows: pa.Table,
    *,
    parameters: Mapping[str, Value],
) -> pa.Table:
    """Return one column for each expression, in order, over the rows in order. NaN counts as NULL.

    Raises `duckdb.Error` if a row's value does not fit, such as text that can't be cast.
    """
    bound = frozenset().union(*(expression.parameters for expression in expressions))
    columns = ", ".join(f"(\n{expression.sql}\n) AS c{i}" for i, expression in enumerate(expressions))
    connection.register("rows", _without_nan(rows))
    try:
        found = connection.sql(f"SELECT {columns} FROM rows", params=_bind(bound, parameters)).to_arrow_table()
        return _without_nan(found)
    finally:
        connection.unregister("rows")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "…"?` for the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""


def _nodes(connection: duckdb.DuckDBPyConnection, sql: str, what: str) -> list[dict[str, Any]]:
    """All nodes of the expression's tree; refuses what is not a single expression in brackets."""
    query = _parse(connection, f"SELECT (\n{sql}\n)") if sql.strip() else "there is nothing"
    if isinstance(query, str):
        raise PolicyError(f"{what} is not one SQL expression: {query}. It reads: {sql.strip()!r}.")
    alone = _parse(connection, "SELECT (true)")
    assert isinstance(alone, dict)
    selected = query.pop("select_list", [])
    alone.pop("select_list")
    if len(selected) != 1 or query != alone:  # brackets closed early and a FROM, WHERE, UNION … added
        raise PolicyError(f"{what} is more than one SQL expression: {sql.strip()!r}. Leave only what is true or false.")
    return list(_walk(selected))


def _parse(connection: duckdb.DuckDBPyConnection, statement: str) -> dict[str, Any] | str:
    """The tree of a SELECT, or why there is none."""
    text = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [statement]).fetchall()[0][0]
    tree = json.loads(text)
    if tree["error"]:
        return str(tree["error_message"])
    if len(tree["statements"]) != 1:
        return f"{len(tree['statements'])} statements"
    return dict(tree["statements"][0]["node"])


def _walk(tree: Any) -> Iterator[dict[str, Any]]:
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if "class" in part:
                yield part
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)


def _check_names(
    nodes: list[dict[str, Any]], what: str, *, columns: Collection[str], parameters: Mapping[str, Value]
) -> tuple[set[str], set[str]]:
    """The columns and parameters that the nodes name; refuses every node that could reach beyond its row."""
    declared = {name.lower(): name for name in columns}
    read, bound = set(), set()
    for node in nodes:
        kind, detail = node["class"], node["type"]
        if kind not in NODES or (kind == "OPERATOR" and detail not in OPERATORS):
            reason = REFUSED_NODES.get(kind, f"uses {detail.lower()}")
            raise PolicyError(f"{what} {reason}. A condition may only read the columns of its own row.")
        if kind == "FUNCTION":
            _check_function(node, what)
        elif kind == "TYPE" and node["type_name"].lower() not in TYPES:
            raise PolicyError(
                f"{what} casts to {node['type_name']}. Types that can be used: {', '.join(sorted(TYPES))}."
            )
        elif kind == "COLUMN_REF":
            name = ".".join(node["column_names"])
            if name.lower() not in declared:
                raise PolicyError(
                    f'{what} uses "{name}", which no signal measures.{suggest(name, columns)} '
                    f"Columns of what is measured: {', '.join(sorted(columns))}."
                )
            read.add(declared[name.lower()])
        elif kind == "PARAMETER":
            name = node["identifier"]
            if name not in parameters:
                raise PolicyError(
                    f"{what} uses ${name}, which is not among the policy's parameters.{suggest(name, parameters)} "
                    f"Parameters: {', '.join(sorted(parameters)) or 'none'}."
                )
            bound.add(name)
    return read, bound


def _check_function(node: dict[str, Any], what: str) -> None:
    name = node["function_name"].lower()
    if name not in FUNCTIONS or node["schema"] or node["catalog"]:
        known = sorted(name for name in FUNCTIONS if name[0].isalpha())
        raise PolicyError(
            f"{what} calls {name}(), which a policy can't: a decision depends on its own row only and comes out the "
            f"same every time.{suggest(name, known)} Functions: {', '.join(known)}."
        )


def _probe(columns: pa.Schema) -> pa.Table:
    """An ordinary row and one of nulls: DuckDB finds some misfits of types only when it meets a value."""
    values: dict[str, pa.Array] = {}
    for field in columns:
        text = "{}" if field.name == "metadata" else "text"
        ordinary = text if pa.types.is_string(field.type) else 1
        values[field.name] = pa.array([ordinary, None], pa.string() if ordinary == text else pa.int8()).cast(field.type)
    return pa.table(values)


def _bind(names: Iterable[str], parameters: Mapping[str, Value]) -> dict[str, Value | Decimal]:
    """Values that DuckDB treats like the same number written into the SQL: `0.7` is a decimal there, not a double.

    It matters at the edge, where a column is 32 bits wide: a stored 0.7 is at least the decimal, not the double.
    """
    return {name: _as_literal(parameters[name]) for name in names}


def _as_literal(value: Value) -> Value | Decimal:
    is_plain = isinstance(value, float) and "e" not in repr(value) and len(repr(value)) <= 18
    return Decimal(repr(value)) if is_plain else value


def _without_nan(rows: pa.Table) -> pa.Table:
    for at, field in enumerate(rows.schema):
        if pa.types.is_floating(field.type):
            column = rows.column(at)
            missing = pa.scalar(None, field.type)
            rows = rows.set_column(at, field, pc.if_else(pc.is_nan(column), missing, column))
    return rows


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")

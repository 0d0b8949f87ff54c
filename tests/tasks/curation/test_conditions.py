"""What a condition may say, and what it is refused for."""

import os
import subprocess
import sys
import textwrap

import duckdb
import pyarrow as pa
import pytest

from tasks.curation.conditions import FUNCTIONS, PolicyError, check_expression, evaluate, locked_connection

COLUMNS = pa.schema(
    [
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("blur", pa.float32()),
        ("language", pa.string()),
        ("phash", pa.uint64()),
        ("is_url", pa.bool_()),
        ("caption", pa.string()),
        ("metadata", pa.string()),
    ]
)


@pytest.fixture(scope="module")
def connection():
    with locked_connection() as connection:
        yield connection


def check(connection, sql: str, **parameters):
    return check_expression(connection, sql, what='p.yaml: condition "c"', columns=COLUMNS, parameters=parameters)


@pytest.mark.parametrize(
    "sql",
    [
        "width > 5",
        "least(width, height) >= 200 and not is_url",
        "language in ('en', 'de') or language is null",
        "case when width > 5 then blur > 0.1 else is_url end",
        "width between 1 and 5 -- a comment",
        "caption not like '%;%' and caption !~ 'select'",
        "(metadata->>'$.width')::int > width",
        "try_cast(caption as double) is null",
        "len(list_distinct(string_split(lower(caption), ' '))) > 3",
        "md5_number_lower(caption) % 10 < 3",
        "WIDTH > 5",
        '"width" > 5',
        "bit_count(phash) > 3 and phash != 0",
        "coalesce(blur, 0) > 0.5",
        "if(is_url, false, true)",
        "language is distinct from 'en'",
        "try_strptime(metadata->>'date', '%Y') >= date '2020-01-01'",
        "is_url is not true",
        "width / height > 3",
        "true",
    ],
)
def test_expressions_over_one_row_are_accepted(connection, sql):
    assert check(connection, sql).kind == "BOOLEAN"


def test_a_checked_expression_says_what_it_reads(connection):
    expression = check(connection, "WIDTH > $least and blur < height", least=5, other=3)
    assert expression.columns == {"width", "blur", "height"}
    assert expression.parameters == {"least"}


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        # other statements, and more than one expression
        ("width > 5; drop table rows", "not one SQL expression"),
        ("width > 5;", "not one SQL expression"),
        ("drop table rows", "not one SQL expression"),
        ("set threads = 1", "not one SQL expression"),
        ("true) from range(5", "more than one SQL expression"),
        ("true) where (true", "more than one SQL expression"),
        ("true) limit (1", "more than one SQL expression"),
        ("true) union select (true", "more than one SQL expression|not one SQL"),
        ("true), (false", "more than one SQL expression"),
        ("true) as (x", "not one SQL expression|more than one"),
        ("true) order by (1", "more than one SQL expression"),
        ("true) qualify (true", "more than one SQL expression"),
        ("true) group by all having (true", "more than one SQL expression"),
        ("true) using sample (10", "not one SQL expression|more than one"),
        ("width > 5 as x", "not one SQL expression"),
        ("", "not one SQL expression"),
        ("width >", "not one SQL expression"),
        ("/* width > 5", "not one SQL expression"),
        # beyond the row
        ("width > (select max(width) from rows)", "contains a query of its own"),
        ("exists (from rows)", "contains a query of its own"),
        ("select true", "contains a query of its own"),
        ("width = any([1, 2])", "contains a query of its own"),
        ("width > avg(width) over ()", "uses a window function"),
        ("row_number() over () < 10", "uses a window function"),
        ("width > avg(width)", r"calls avg\(\)"),
        ("count(*) > 1", r"calls count_star\(\)"),
        ("unnest([true])", r"calls unnest\(\)"),
        ("*", r"uses \*"),
        ("columns('w.*') > 3", r"uses \*"),
        ("#1", "uses a column's position"),
        ("list_contains(list_filter([1], lambda x: x > width), 1)", "uses a lambda or ->|calls list_filter"),
        ("grouping(width) = 1", "uses grouping_function"),
        ("rows.width > 5", '"rows.width", which no signal measures'),
        ("rowid < 10", '"rowid", which no signal measures'),
        # files, settings, the environment
        ("read_text('/etc/passwd') is not null", r"calls read_text\(\)"),
        ("width in (from 'x.csv')", "contains a query of its own"),
        ("glob('*') is not null", r"calls glob\(\)"),
        ("getenv('HOME') = 'x'", r"calls getenv\(\)"),
        ("current_setting('threads') > 1", r"calls current_setting\(\)"),
        ("version() like 'v1%'", r"calls version\(\)"),
        ("json_serialize_sql('select 1') is not null", r"calls json_serialize_sql\(\)"),
        # not the same every time
        ("random() < 0.5", r"calls random\(\)"),
        ("uuid() > 'a'", r"calls uuid\(\)"),
        ("now() > timestamp '2020-01-01'", r"calls now\(\)"),
        ("today() > date '2020-01-01'", r"calls today\(\)"),
        ("current_date > date '2020-01-01'", '"current_date", which no signal measures'),
        ("current_localtimestamp() > timestamp '2020-01-01'", r"calls current_localtimestamp\(\)"),
        ("age(timestamp '2020-01-01') > '1 year'", r"calls age\(\)"),
        ("nextval('s') > 1", r"calls nextval\(\)"),
        ("hash(caption) % 2 = 0", r"calls hash\(\)"),
        ("caption::timestamptz > '2020-01-01'", "casts to timestamptz"),
        ("system.main.abs(width) > 3", r"calls abs\(\)"),
        # names and types
        ("blurr > 3", 'uses "blurr", which no signal measures. Did you mean "blur"?'),
        ("width > $least", r"uses \$least, which is not among the policy's parameters"),
        ("width > ?", r"uses \$1, which is not among the policy's parameters"),
        ("language > 5", r"can't be evaluated: .* It reads language \(string\)"),
        ("language = 5", r"can't be evaluated: .* It reads language \(string\)"),
        ("width > 1000 and language = 5", r"can't be evaluated: .*try_cast"),
        ("width = 'wide'", r"can't be evaluated: .* It reads width \(int32\)"),
        ("abs(language) > 1", r"can't be evaluated: .*abs\(VARCHAR\)"),
        ("caption::int > 3", r"can't be evaluated: .*try_cast"),
    ],
)
def test_what_reaches_beyond_its_row_or_does_not_fit_is_refused(connection, sql, reason):
    with pytest.raises(PolicyError, match=f'^p.yaml: condition "c" .*({reason.replace("?", chr(92) + "?")})'):
        check(connection, sql)


def test_a_refusal_lists_the_columns_that_exist(connection):
    with pytest.raises(
        PolicyError,
        match=r"Columns of what is measured: blur, caption, height, is_url, language, metadata, phash, width.$",
    ):
        check(connection, "sharpness > 1")


def test_every_function_offered_exists_and_duckdb_does_not_call_it_volatile(connection):
    kinds: dict[str, set[tuple[str, str | None]]] = {}
    for name, kind, stability in connection.execute(
        "SELECT function_name, function_type, stability FROM duckdb_functions()"
    ).fetchall():
        kinds.setdefault(name, set()).add((kind, stability))
    assert FUNCTIONS - kinds.keys() == set()
    allowed = {("scalar", "CONSISTENT"), ("macro", None)}
    assert {name: kinds[name] for name in FUNCTIONS if not kinds[name] <= allowed} == {}


@pytest.mark.parametrize(
    "statement",
    [
        "SET threads = 1",
        "SET enable_external_access = true",
        "SELECT * FROM read_csv('/etc/passwd')",
        "COPY (SELECT 1) TO 'out.csv'",
        "ATTACH 'other.db'",
        "INSTALL httpfs",
        "SELECT * FROM some_python_variable",
    ],
)
def test_the_connection_is_locked_even_if_a_check_were_missing(connection, statement):
    some_python_variable = pa.table({"a": [1]})
    with pytest.raises(duckdb.Error):
        connection.execute(statement)
    assert some_python_variable.num_rows == 1


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_a_time_is_the_same_wherever_the_machine_stands(zone):
    code = """
        import pyarrow as pa
        from tasks.curation.conditions import check_expression, evaluate, locked_connection
        rows = pa.table({"taken": ["2024-01-01 23:30:00 +0000"]})
        at = "try_strptime(taken, '%Y-%m-%d %H:%M:%S %z')"
        with locked_connection() as connection:
            sql = f"day({at}) || concat({at})"
            wanted = check_expression(connection, sql, what="c", columns=rows.schema, parameters={})
            print(evaluate(connection, [wanted], rows, parameters={})["c0"][0])
    """
    environment = {**os.environ, "TZ": zone}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert said.stdout == "12024-01-01 23:30:00+00\n"


def test_evaluation_keeps_the_order_of_rows_and_makes_nan_null(connection):
    rows = pa.table({"blur": pa.array([0.5, float("nan"), None] * 50_000, pa.float32())})
    expressions = [check(connection, "blur >= $least", least=0.5), check(connection, "pow(0.1 - blur, 0.5)")]
    found = evaluate(connection, expressions, rows, parameters={"least": 0.5})
    assert found.column(0).to_pylist() == [True, None, None] * 50_000
    assert found.column(1).null_count == 150_000

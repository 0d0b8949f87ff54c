"""What runs, in what order, with which retries, caching and limits."""

import atexit
import gc


@atexit.register
def _release_errors() -> None:
    """Let go of what failed flows held: Prefect keeps their errors, and duckdb would report a page of leaks at exit."""
    for held in gc.get_objects():
        if issubclass(type(held), BaseException):
            held.__traceback__ = None

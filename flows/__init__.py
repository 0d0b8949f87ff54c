"""What runs, in what order, with which retries, caching and limits."""

import atexit
import gc
import sys


@atexit.register
def _let_go_of_duckdb() -> None:
    """Free what duckdb would report as leaked, a page of it below the message that a user should read.

    Prefect keeps the errors of failed runs, and threads of its own, beyond the interpreter's end, and with them frames
    and modules.
    """
    for held in gc.get_objects():
        if issubclass(type(held), BaseException):
            held.__traceback__ = None
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("duckdb", "_duckdb"):
            vars(module).clear()

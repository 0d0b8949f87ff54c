"""Policies, recipes and sample models that ship beside the code: their relative paths hold in whatever folder you are.

A file of the current folder comes first, so that a project of your own can have policies at the same place.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The folder that holds `deployments`, `flows` and `tasks`."""


def find_path(path: str | Path) -> Path:
    """Return the path as given, or beneath `ROOT` if it is relative and only there."""
    given = Path(path).expanduser()
    shipped = ROOT / given  # an absolute path stays what it is
    return shipped if not given.exists() and shipped.exists() else given

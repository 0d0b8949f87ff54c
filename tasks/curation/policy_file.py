"""Reading what people type: YAML without silent losses, and pydantic's complaints in a user's words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tasks.curation.conditions import PolicyError
from tasks.shipped import find_path

SHORT_FORM = {"conditions": "sql", "decontaminate": "against", "duplicates": "pairs", "limits": "cap_per"}
"""The field that an entry's value stands for when it is not a mapping, as in `side: width >= 200`."""


def read_mapping(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping. Raises `PolicyError` if it is missing, not YAML or says a key twice."""
    try:
        content = yaml.load(find_path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise PolicyError(
            f"{path.absolute()}: there is no such policy file. Shipped ones lie in deployments/policies."
        ) from None
    except OSError as error:
        raise PolicyError(f"{path}: can't be read: {error.strerror}. Give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path.name}: not a YAML file: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise PolicyError(f"{path.name}: holds {type(content).__name__}, not a policy. Begin with `name:`.")
    return content


def named_list(entries: Any, short_form: str) -> Any:
    """Return a mapping by name as the list of its entries, which keeps its order in any JSON store."""
    if not isinstance(entries, Mapping):
        return entries
    return [
        {"name": name, **(entry if isinstance(entry, Mapping) else {short_form: entry})}
        for name, entry in entries.items()
    ]


def describe_faults(content: Mapping[str, Any], error: ValidationError) -> str:
    """Return what is wrong and where, entries by their names."""
    return "; ".join(_place(content, fault["loc"]) + _reason(fault["msg"]) for fault in error.errors())


def _place(content: Mapping[str, Any], location: tuple[int | str, ...]) -> str:
    parts = [str(part) for part in location]
    if len(location) > 1 and parts[0] in SHORT_FORM:
        entry = named_list(content[parts[0]], SHORT_FORM[parts[0]])[location[1]]
        name = entry.get("name") if isinstance(entry, Mapping) else None
        tag_end = 3 if parts[0] in ("conditions", "limits") else 2  # after the kind of condition that pydantic chose
        parts = [parts[0], str(name or location[1]), *parts[tag_end:]]
    return ".".join(parts) + ": " if parts else ""


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Extra inputs are not permitted", "there is no such field")


class _StrictLoader(yaml.SafeLoader):
    """YAML, except that a key said twice is an error: the second condition of a name would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for at, key in enumerate(keys):
            if key in keys[:at]:
                mark = node.value[at][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", mark)
        return super().construct_mapping(node, deep)

"""Finds the files a source is made of, and their formats, from a path, glob pattern, URL or dataset name."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import fsspec

from storage.fingerprint import fingerprint
from tasks.curation.sources.contract import Format, Layout, SourceError, SourceFile
from tasks.curation.sources.files import file_exists, is_local, open_binary
from tasks.curation.sources.grouping import role

SUFFIXES: dict[str, Format] = {
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
}
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def find_source_files(
    source: str,
    *,
    format: Format | Literal["auto"] = "auto",
    image_column: str | None = None,
    caption_column: str | None = None,
    key_column: str | None = None,
    image_folder: str | None = None,
) -> list[SourceFile]:
    """Return the files to ingest from `source`, sorted by name.

    `source` is a local path or fsspec URL of a file or folder, or a glob pattern of them; with format
    `huggingface` also a dataset's name. A folder is searched to the bottom for archives, Parquet and JSONL files
    (hidden ones, and Parquet tables that img2dataset writes beside its archives, are passed over); a folder
    without any is read as images with captions beside them. The columns and `image_folder` are as in `Layout`.

    Raises `SourceError` if there is nothing to read, naming what would be.
    """
    layout = Layout(image_column, caption_column, key_column, image_folder and _absolute(image_folder))
    if format == "huggingface" and not file_exists(source):
        from tasks.curation.sources.huggingface import find_named_dataset  # datasets takes a second to import

        return find_named_dataset(source, layout)
    filesystem, path = fsspec.core.url_to_fs(_absolute(source))
    filesystem.invalidate_cache()  # remote listings are remembered for as long as the process lives
    found = [path] if filesystem.exists(path) else sorted(filesystem.glob(path))
    if not found:
        raise SourceError(
            f"{source}: there is no such file or folder. Give a path, a URL or a glob pattern; for a Hugging Face "
            "dataset by name, give format huggingface in source_settings."
        )
    files = [file for entry in found for file in _files_of(filesystem, str(entry), format, layout)]
    if not files:
        raise SourceError(
            f"{source}: found nothing to read{'' if format == 'auto' else f' as {format}'}. Expected "
            f"{', '.join(SUFFIXES)}, a dataset saved to disk, or images with .txt or .json files beside them."
        )
    return files


def folder_listing(uri: str) -> list[tuple[str, int, str]]:
    """Return name relative to the folder, size and version of every file of a folder source, sorted."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    return [(n, s, v) for n, s, v in _listing(filesystem, path) if role(n)]


def _absolute(source: str) -> str:
    if not is_local(source):
        return source.removeprefix("file://").rstrip("/")
    path = Path(source).expanduser().absolute()
    ups = [at for at, part in enumerate(path.parts, start=1) if part == ".."]
    return str(Path(*path.parts[: ups[-1]]).resolve().joinpath(*path.parts[ups[-1] :]) if ups else path)


def _files_of(filesystem: Any, path: str, format: str, layout: Layout) -> Iterator[SourceFile]:
    """Yield the source files at one existing path."""
    uri = path if "file" in filesystem.protocol else str(filesystem.unstrip_protocol(path))
    if not filesystem.isdir(path):
        detected = _format_of(path) if format == "auto" else format
        if detected is None:
            raise SourceError(f"{uri}: the name does not tell its format. Expected {', '.join(SUFFIXES)}.")
        info = filesystem.info(path)
        yield SourceFile(uri, cast(Format, detected), info["size"], _version(info), layout)
    elif format in ("auto", "huggingface") and (splits := _saved_splits(uri)):
        for split in splits:
            listing = _listing(filesystem, fsspec.core.url_to_fs(split)[1])
            yield SourceFile(split, "huggingface", sum(size for _, size, _ in listing), fingerprint(listing), layout)
    else:
        yield from _files_below(filesystem, path, uri, format, layout)


def _files_below(filesystem: Any, path: str, uri: str, format: str, layout: Layout) -> Iterator[SourceFile]:
    listing = _listing(filesystem, path)
    names = {name for name, _, _ in listing}
    with_images = {str(PurePosixPath(name).parent) for name in names if role(name) == "image"}
    is_file_source = False
    for name, size, version in listing:
        detected = _format_of(name)
        stem = name.removesuffix(".parquet")
        beside_images = detected == "parquet" and (stem in with_images or {f"{stem}.tar", f"{stem}.tar.gz"} & names)
        if detected and (detected == format or (format == "auto" and not beside_images)):
            is_file_source = True
            yield SourceFile(f"{uri}/{name}", detected, size, version, layout)
    if not is_file_source and format in ("auto", "folder"):
        images = [entry for entry in listing if role(entry[0])]
        if any(role(name) == "image" for name, _, _ in images):
            yield SourceFile(uri, "folder", sum(size for _, size, _ in images), fingerprint(images), layout)


def _listing(filesystem: Any, path: str) -> list[tuple[str, int, str]]:
    below = filesystem.find(path, detail=True)
    names = {name: str(name).removeprefix(f"{path}/") for name in below}
    return sorted(
        (relative, below[name]["size"] or 0, _version(below[name]))
        for name, relative in names.items()
        if not any(part.startswith(".") for part in relative.split("/"))
    )


def _version(info: dict[str, Any]) -> str:
    if "ino" in info and Path(info["name"]).exists():  # a local file, and no dangling link
        return str(Path(info["name"]).stat().st_mtime_ns)
    known = (info.get(name) for name in ("ETag", "etag", "LastModified", "last_modified", "mtime", "created"))
    version = next((value for value in known if value), "")
    return str(version.timestamp() if isinstance(version, datetime) else version)


def _format_of(name: str) -> Format | None:
    return next((format for suffix, format in SUFFIXES.items() if name.lower().endswith(suffix)), None)


def _saved_splits(folder: str) -> list[str]:
    """Return the folders of the splits that `datasets` saved at `folder`: itself if one, none if it is no dataset."""
    if file_exists(f"{folder}/{_SPLITS}"):
        with open_binary(f"{folder}/{_SPLITS}") as file:
            return [f"{folder}/{split}" for split in json.load(file)["splits"]]
    return [folder] if file_exists(f"{folder}/{_STATE}") else []

"""Files that measurements depend on and that no package ships, each named together with its sha256."""

import importlib
import os
import shutil
import tempfile
import urllib.request
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from storage.fingerprint import file_digest
from tasks.curation.signals.contract import MissingWeights

HUB = "hf://"
TIMEOUT_SECONDS = 60


class PinnedFile(BaseModel):
    """A file on this disk, at a URL or in a Hugging Face repository, that is refused unless it has this checksum."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(description="path, https://… URL, or hf://owner/name/path of a file in a Hugging Face repository")
    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="sha256 of the file as sha256sum prints it: 64 hex digits"
    )

    def path(self) -> Path:
        """Return the file on this disk, downloaded into the user's cache if need be.

        Raises `MissingWeights` if it can't be had or is another one.
        """
        if self.file.startswith(HUB):
            return self._checked(self._from_hub())
        if self.file.startswith(("https://", "http://")):
            return self._from_url()
        return self._checked(Path(self.file).expanduser())

    def _from_hub(self) -> Path:
        parts = self.file.removeprefix(HUB).split("/", 2)
        if len(parts) != 3 or not all(parts):
            raise ValueError(f"{self.file}: name a file of a repository as {HUB}owner/name/path.")
        try:
            hub = importlib.import_module("huggingface_hub")  # takes half a second
            return Path(hub.hf_hub_download("/".join(parts[:2]), parts[2]))
        except Exception as error:  # what the network's libraries raise has no ancestor in common
            raise self._unreachable(error) from error

    def _from_url(self) -> Path:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tamis", "files")
        target = folder / self.sha256
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as part:
                try:
                    with urllib.request.urlopen(self.file, timeout=TIMEOUT_SECONDS) as response:
                        shutil.copyfileobj(response, part)
                    part.flush()
                    self._checked(Path(part.name))
                    Path(part.name).replace(target)  # whole or not at all, whoever else does the same
                except OSError as error:
                    Path(part.name).unlink(missing_ok=True)
                    raise error if isinstance(error, MissingWeights) else self._unreachable(error) from error
        return self._checked(target)

    def _unreachable(self, error: Exception) -> MissingWeights:
        return MissingWeights(
            f"{self.file}: can't be downloaded: {error}. Fetch it where there is a network and give the file's path "
            "in place of the address; the sha256 stays."
        )

    def _checked(self, path: Path) -> Path:
        if not path.is_file():
            raise MissingWeights(f"{self.file}: there is no file {path.absolute()}.")
        found = _digest(path, path.stat().st_mtime_ns)
        if found != self.sha256:
            raise MissingWeights(
                f"{self.file}: its sha256 is {found}, not {self.sha256}. It is damaged or another file; if it is the "
                "one you mean, give its own sha256."
            )
        return path


@cache
def _digest(path: Path, modified: int) -> str:
    """Hash a file once a process, unless it is modified meanwhile."""
    return file_digest(path)

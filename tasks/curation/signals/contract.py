"""What a signal is: a named, versioned and threshold-free measurement of samples, one class a file.

Adding one is adding a file and a line in `build_signals`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa

from storage.fingerprint import fingerprint
from storage.refs import SignalRef
from tasks.curation import decode
from tasks.curation.batch import Batch, Needs
from tasks.curation.decode import Pixels


class MissingWeights(FileNotFoundError):  # noqa: N818 - says what is wrong better with no "Error" behind it
    """A model's weights can't be found; the message says which, where they were looked for and how to give them."""


class Signal(ABC):
    """A measurement of samples.

    Instances hold plain settings, are hashable, and load models at first use, so that they are cheap to make and to
    send to another process.
    """

    name: ClassVar[str]
    """What the signal is called in policies' messages, paths and the catalog."""

    version: ClassVar[int]
    """Raised when the same sample would be measured differently."""

    needs: ClassVar[Needs]

    @property
    def source(self) -> "Signal | None":
        """Another signal whose stored columns this one is measured from, such as CLIP's embeddings; None for most.

        Such a signal needs nothing of the sample itself, so adding one reads no image again.
        """
        return None

    @property
    @abstractmethod
    def columns(self) -> pa.Schema:
        """The columns measured, each described with its unit."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """All else that a measurement depends on: settings, preprocessing, the hash of the model's weights.

        Raises `MissingWeights` if a model can't be found.
        """
        return {}

    @abstractmethod
    def measure(self, batch: Batch) -> pa.RecordBatch:
        """Return the columns for a batch, one row a sample, in order; null where there is nothing to measure."""

    def view(self, pixels: Pixels) -> Any:
        """Return what `measure` needs of one image's pixels, small and copied; called in the decoding threads."""
        raise NotImplementedError(f"{type(self).__name__} needs {self.needs.name} and has no view of pixels")

    @cached_property
    def config(self) -> dict[str, Any]:
        """All that the fingerprint covers."""
        parameters = dict(self.parameters)
        if self.needs >= Needs.HEADER:
            parameters["decoding"] = decode.VERSION
        if self.source is not None:
            parameters["source"] = [self.source.name, self.source.ref.fingerprint]
        columns = {column.name: str(column.type) for column in self.columns}
        return {"name": self.name, "version": self.version, "parameters": parameters, "columns": columns}

    @property
    def ref(self) -> SignalRef:
        """Where the signal's tables are. Raises `MissingWeights` if a model can't be found."""
        return SignalRef(self.name, fingerprint(self.config))

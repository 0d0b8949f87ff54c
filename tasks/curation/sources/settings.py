"""What a user may say about a source that can't be told from the source itself; a form in the UI."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.curation.sources.contract import Format, SourceFile
from tasks.curation.sources.find import find_source_files


class SourceSettings(BaseModel):
    """How a source is read where its own names do not tell; all may stay empty."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["auto", Format] = Field(
        default="auto", description="Told by the files' names if auto; huggingface also takes a dataset's name."
    )
    image_column: str | None = Field(
        default=None, description="Column with the images or their paths, if several could be meant."
    )
    caption_column: str | None = Field(default=None, description="Column with the captions, if several could be meant.")
    key_column: str | None = Field(default=None, description="Column with the samples' names.")
    image_folder: str | None = Field(
        default=None, description="Folder that image paths are relative to; the source file's own if empty."
    )

    def find(self, source: str) -> list[SourceFile]:
        """Return the files of a source; see `find_source_files`, which says what is raised."""
        return find_source_files(source, **self.model_dump())

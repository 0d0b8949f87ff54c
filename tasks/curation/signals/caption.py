"""Counts and kinds of captions, by Arrow's vectorised text functions.

Compiling the patterns costs more than matching a thousand captions, so batches should be large.
"""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.signals.contract import Signal

_FILE_TYPES = r"avif|bmp|cr2|dng|eps|gif|heic|heif|ico|jfif|jpe?g|mov|mp4|nef|pdf|png|psd|raw|svgz?|tga|tiff?|webm|webp"

_URL = "|".join(
    (
        r"^<?(?:(?:https?|ftp)://|www\.)\S+$",  # https://example.com/a, www.example.com
        r"^[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:br|cn|co|com|de|edu|es|fr|gov|info|io|it|jp|net|nl|org|pl|ru|uk)(?:[/:?#]\S*)?$",
    )
)

_FILE_NAME = "|".join(
    (
        rf"^[^\r\n]{{0,255}}\.(?:{_FILE_TYPES})$",  # red-car.jpg, uploads/2019/07/a b.png
        r"^(?:[a-z]:[\\/]|\\\\|~/|\.{1,2}/|/)[^\s/\\]+[\\/]\S*$",  # C:\Users\me\x, /home/x/y
        # IMG_0371, DSC_0012 (2), PXL_20210101_123456
        r"^_?(?:cimg|dcim|dji|dsc[fn]?|gopr|imag|img|mvi|pano|pict|pxl|sam|vid|wp)[ _-]?\d{3,}\S*(?: ?\(\d+\))?$",
        r"^(?:image|photo|picture|scan|unnamed|untitled)[ _-]?\(?\d+\)?(?:[_-]\w+)*$",  # photo-1, image (3)
        r"^screen ?shot[ _-]+\d{4}.*$",  # Screenshot 2020-01-31 at 10.11.12
        r"^p\d{7}$|^\d{8}[_-]\d{4,}\w*$",  # P1010371, 20190712_141502
        r"^[0-9a-f]{16,}$|^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$",  # hashes and UUIDs
    )
)

_FURNITURE = "|".join(
    (
        r"click (?:here|(?:on )?(?:the )?(?:image|photo|picture|thumbnail)|for (?:a )?(?:bigger|full|larger))",
        r"(?:click|tap) to (?:enlarge|expand|see|view|zoom)|view (?:full[- ]size|larger)",
        r"(?:buy|order|shop) now|add to (?:basket|cart|wish ?list)|free shipping",
        r"(?:find out|learn|read) more|sign up (?:for|to)|subscribe (?:now|to)|log ?in to",
        r"follow us|share (?:on|this)|pin it|embedded image permalink|profile (?:image|photo|picture)",
        r"no (?:alt text|caption|description|image|photo|picture|preview)(?: \w+)? (?:available|provided|yet)",
        r"(?:image|photo|picture|preview|thumbnail) (?:is )?(?:not (?:available|found)|unavailable|missing)",
        r"(?:image|photo|picture)s? (?:coming soon|may contain)|page not found|all rights reserved",
    )
)
"""Text of the page, not of the image: a caption that begins or ends with it describes nothing."""

_LABEL = "|".join(
    (
        r"(?:royalty[- ]free )?stock (?:footage|illustrations?|images?|photo(?:graph)?s?|pictures?|vectors?)",
        r"royalty[- ]free|getty images|shutterstock|alamy|istock(?:photo)?|dreamstime|123rf|adobe stock",
        r"(?:©|\(c\)|copyright)(?: \d{4})?|default|icon|image|img|logo|n/a|no title|none|null",
        r"photo|pic|picture|placeholder|test|thumbnail|undefined|untitled",
    )
)
"""What may stand before or after a good caption; taken off, it must leave more than two words."""

_IS_FURNITURE = rf"^(?:{_FURNITURE})\b|\b(?:{_FURNITURE})[\s.!>»…]*$"
_EDGE_LABELS = rf"^\W*(?:(?:{_LABEL})\b\W*)+|\W*(?:\b(?:{_LABEL})\W*)+$"


@dataclass(frozen=True)
class CaptionStatistics(Signal):
    """Counts that caption rules are written in, and three kinds of captions that describe no image.

    Words and characters: DataComp `basic_filter`, where a word is what Python's `split` gives. Special characters:
    OBELICS and Data-Juicer. Boilerplate: Conceptual Captions (Sharma et al. 2018, section 3), which crops labels such
    as "stock photo" from either end and drops texts that begin or end like "embedded image permalink".
    """

    name = "caption"
    version = 1
    needs = Needs.NOTHING
    columns = pa.schema(
        [
            column("caption_words", pa.int32(), "words separated by white space"),
            column("caption_chars", pa.int32(), "Unicode code points, white space included"),
            column(
                "special_ratio",
                pa.float32(),
                "share of characters that are neither letters (with their marks), numbers nor white space, 0-1",
            ),
            column("caption_is_url", pa.bool_(), "the whole caption is a URL or a domain name"),
            column("caption_is_filename", pa.bool_(), "the whole caption is a path or a file's, camera's or hash name"),
            column("caption_is_boilerplate", pa.bool_(), "page furniture at either end, or labels and under 3 words"),
        ]
    )

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`. A missing caption gives nulls, an empty one zeros."""
        captions = batch.captions
        trimmed = pc.utf8_trim_whitespace(captions)
        chars = pc.utf8_length(captions)
        special = pc.count_substring_regex(captions, r"[^\p{L}\p{M}\p{N}\p{Z}\s\x{0b}\x{1c}-\x{1f}\x{85}]")
        is_url = _matches(trimmed, _URL)
        is_filename = pc.and_not(_matches(trimmed, _FILE_NAME), is_url)
        return pa.record_batch(
            [
                _words(trimmed),
                chars,
                pc.divide(special.cast(pa.float64()), pc.max_element_wise(chars, 1, skip_nulls=False)).cast(
                    pa.float32()
                ),
                is_url,
                is_filename,
                pc.and_not(_is_boilerplate(trimmed), pc.or_(is_url, is_filename)),
            ],
            schema=self.columns,
        )


def _matches(captions: pa.StringArray, pattern: str) -> pa.BooleanArray:
    return pc.match_substring_regex(captions, pattern, ignore_case=True)


def _words(trimmed: pa.StringArray) -> pa.Int32Array:
    parts = pc.list_value_length(pc.utf8_split_whitespace(trimmed))
    return pc.if_else(pc.equal(pc.utf8_length(trimmed), 0), pa.scalar(0, pa.int32()), parts)


def _is_boilerplate(trimmed: pa.StringArray) -> pa.BooleanArray:
    labelled = _matches(trimmed, _EDGE_LABELS)
    rest = pc.replace_substring_regex(trimmed, rf"(?i){_EDGE_LABELS}", "")
    is_label = pc.and_(labelled, pc.less(_words(pc.utf8_trim_whitespace(rest)), 3))
    return pc.or_(_matches(trimmed, _IS_FURNITURE), is_label)

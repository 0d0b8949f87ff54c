import sys
import unicodedata

import pyarrow as pa
import pytest

from tasks.curation.batch import Batch
from tasks.curation.signals.caption import CaptionStatistics

EVERY_CHARACTER = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]


def statistics(*captions: str | None) -> list[dict[str, object]]:
    return CaptionStatistics().measure(Batch(pa.array(captions, pa.string()))).to_pylist()


def kind(caption: str) -> str | None:
    (row,) = statistics(caption)
    kinds = [name for name in ("url", "filename", "boilerplate") if row[f"caption_is_{name}"]]
    assert len(kinds) <= 1
    return kinds[0] if kinds else None


def test_words_and_characters_are_those_of_python_as_in_datacomp() -> None:
    captions = ["a red car", "  two\twords\n", "", " ", "日本語のテキスト", "e\u0301te\u0301 🎉"]
    rows = statistics(*captions)
    assert [row["caption_words"] for row in rows] == [len(caption.split()) for caption in captions]
    assert [row["caption_chars"] for row in rows] == [len(caption) for caption in captions]


def test_white_space_is_what_python_splits_at() -> None:
    rows = statistics(*(f"a{character}b" for character in EVERY_CHARACTER))
    assert [row["caption_words"] for row in rows] == [len(f"a{c}b".split()) for c in EVERY_CHARACTER]


def test_special_characters_are_neither_letters_marks_numbers_nor_space() -> None:
    known = [c for c in EVERY_CHARACTER if unicodedata.category(c) not in ("Cn", "Co")]  # assigned, in this Python
    rows = statistics(*known)
    assert [row["special_ratio"] == 1 for row in rows] == [
        unicodedata.category(c)[0] not in "LMN" and not c.isspace() for c in known
    ]


def test_special_ratio_counts_all_characters() -> None:
    assert [row["special_ratio"] for row in statistics("ab!?", "", "!!")] == [0.5, 0, 1]


def test_a_missing_caption_gives_nulls() -> None:
    (row,) = statistics(None)
    assert set(row.values()) == {None}


@pytest.mark.parametrize(
    "caption",
    [
        "https://example.com/gallery/1",
        "http://www.example.org/item?id=1&size=large",
        "www.example.net/shop",
        "example.com",
        " HTTPS://EXAMPLE.COM/A.JPG ",
        "ftp://example.org/pub",
    ],
)
def test_a_url_is_told(caption: str) -> None:
    assert kind(caption) == "url"


@pytest.mark.parametrize(
    "caption",
    [
        "IMG_0371.jpg",
        "IMG_0371",
        "DSC_0012",
        "DSC0123 (2)",
        "_DSC4711",
        "P1010371",
        "photo-1.webp",
        "photo-1",
        "image (3)",
        "/home/x/y.png",
        "/home/x/y",
        r"C:\Users\me\Pictures\scan1.png",
        "uploads/2019/07/IMG_20190712_141234.jpg",
        "Screenshot_2021-03-04-10-1234.png",
        "Screenshot 2020-01-31 at 10.11.12",
        "Screen Shot 2019-05-01 at 3.45.12 PM",
        "PXL_20210101_123456789",
        "20190712_141502",
        "IMG-20190101-WA0001",
        "9f86d081884c7d659a2feaa0c55ad015",
        "0b7e2b5a-3c59-4f0e-9d53-0f3a5f0c9e11",
        "my holiday photo.jpeg",
    ],
)
def test_a_file_name_or_path_is_told(caption: str) -> None:
    assert kind(caption) == "filename"


@pytest.mark.parametrize(
    "caption",
    [
        "Click here",
        "Click here to see more pictures like this one",
        "Click to enlarge this image in a new window",
        "Click on the image to view the full size version",
        "Some text and then click here!",
        "Image not available",
        "No description available for this photo",
        "Image may contain text and other objects",
        "Sign up for our newsletter to get the latest news",
        "Add to cart and get free shipping on your order",
        "All rights reserved, do not copy without permission",
        "Buy now",
        "Untitled",
        "stock photo",
        "Royalty free stock photo - image",
        "Embedded image permalink",
        "Red car | Getty Images",
    ],
)
def test_boilerplate_is_told(caption: str) -> None:
    assert kind(caption) == "boilerplate"


@pytest.mark.parametrize(
    "caption",
    [
        "A red car parked beside a white fence",
        "Old red car in the rain, stock photo",
        "Photo of an old red car",
        "A logo of a coffee shop",
        "An image of two dogs in the snow",
        "photo 2020 of my dog in the garden",
        "A man reads www.example.com on a large screen",
        "He said: click here, and pointed at the map",
        "Version 2.0 of the example.com logo on a wall",
        "/r/pics is where this came from",
        "testing a new camera in the garden",
        "Two and/or three apples",
        "C: a programming language's reference manual",
        "A deadbeef label on a brown bottle",
    ],
)
def test_a_caption_that_describes_is_none_of_these(caption: str) -> None:
    assert kind(caption) is None

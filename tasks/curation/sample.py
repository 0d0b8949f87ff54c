"""The offline sample pool: image–caption pairs with planted, labelled faults, as img2dataset writes them.

The same arguments give the same bytes on every machine with the same Pillow, so that the sample need not be shipped.
"""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.curation import sample_captions, sample_images
from tasks.curation.sample_alterations import encode_altered
from tasks.curation.sample_images import ImageFile
from tasks.curation.sample_truth import FILTERS, PlantedSample, SampleTruth
from tasks.curation.scene import Scene, describe, draw_scene, draw_unlike, render
from tasks.curation.scene_languages import LANGUAGES, describe_in

SAMPLES_PER_SHARD = 250

_PER_THOUSAND = {
    "byte_copy": 20,
    "reencoded_copy": 20,
    "resized_copy": 20,
    "semantic_copy": 20,
    "mismatched_caption": 25,
    "filename_caption": 12,
    "url_caption": 12,
    "boilerplate_caption": 12,
    "long_caption": 10,
    "short_caption": 12,
    "foreign_caption": 5 * len(LANGUAGES),
    "small_image": 14,
    "extreme_aspect": 14,
    "truncated_file": 14,
    "bogus_file": 10,
    "empty_file": 10,
    "caption_not_utf8": 10,
    "decompression_bomb": 10,
    "cmyk": 12,
    "exif_rotated": 15,
    "palette": 12,
    "animated": 12,
    "grayscale": 12,
}
_COPIES = frozenset({"byte_copy", "reencoded_copy", "resized_copy", "semantic_copy"})


@dataclass(frozen=True)
class _Plan:
    """What one sample is to be; `number` seeds it, `group` is the number of the original among copies."""

    number: int
    oddity: str | None = None
    group: int | None = None
    language: str | None = None


@dataclass(frozen=True)
class _Drawn:
    scene: Scene
    image: ImageFile
    caption: bytes


def write_sample(folder: Path, *, samples: int = 1000, seed: int = 0) -> SampleTruth:
    """Write a pool of `samples` to `folder`: `00000.tar`, `00001.tar`, … and `truth.jsonl`.

    About one sample in three carries one planted oddity of `sample_truth.FILTERS`, at least one of each kind. Replaces
    the pool that is there. Raises `ValueError` for fewer samples than 100, too few to hold every kind.
    """
    if samples < 100:
        raise ValueError(f"a sample pool needs at least 100 samples to hold every fault, not {samples}")
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("*.tar"):
        left_over.unlink()
    plans = _plan(samples, seed)
    shards = [plans[start : start + SAMPLES_PER_SHARD] for start in range(0, samples, SAMPLES_PER_SHARD)]
    planted = [sample for shard, part in enumerate(shards) for sample in _write_shard(folder, shard, part, seed)]
    return _record(folder, planted)


def write_extra(folder: Path, *, samples: int = 50, seed: int = 1) -> SampleTruth:
    """Add one more tar of everyday `samples` to the pool in `folder`, leaving the other tars as they are.

    Returns the truth about the whole pool. Raises `FileNotFoundError` where `write_sample` wrote none.
    """
    present = SampleTruth.read(folder)
    shard = len({sample.shard for sample in present.samples})
    plans = [_Plan(number) for number in range(samples)]
    added = _write_shard(folder, shard, plans, f"extra {seed}")
    return _record(folder, [*present.samples, *added])


def _record(folder: Path, planted: Sequence[PlantedSample]) -> SampleTruth:
    truth = SampleTruth(folder, tuple(planted))
    truth.write()
    return truth


def _plan(samples: int, seed: int) -> list[_Plan]:
    """Decide which sample carries which oddity; copies are of everyday samples, each of another."""
    rng = random.Random(f"plan {seed}")
    counts = {oddity: max(1, round(_PER_THOUSAND[oddity] * samples / 1000)) for oddity in FILTERS}
    oddities: list[str | None] = [oddity for oddity, count in counts.items() for _ in range(count)]
    oddities += [None] * (samples - len(oddities))
    rng.shuffle(oddities)
    everyday = [number for number, oddity in enumerate(oddities) if oddity is None]
    copies = [number for number, oddity in enumerate(oddities) if oddity in _COPIES]
    foreign = [number for number, oddity in enumerate(oddities) if oddity == "foreign_caption"]
    originals = rng.sample(everyday, len(copies))
    groups = dict(zip(originals + copies, originals * 2, strict=True))
    languages = {number: LANGUAGES[i % len(LANGUAGES)] for i, number in enumerate(foreign)}
    return [
        _Plan(number, oddity, group=groups.get(number), language=languages.get(number))
        for number, oddity in enumerate(oddities)
    ]


def _draw(plan: _Plan, seed: int | str) -> _Drawn:
    """Draw one sample; a copy draws its original again, which costs less than keeping every original."""
    rng = random.Random(f"sample {seed} {plan.number}")
    if plan.oddity in _COPIES and plan.group is not None:
        return _copy(_draw(_Plan(plan.group), seed), plan.oddity, rng)
    scene = draw_scene(rng)
    while plan.oddity == "grayscale" and not sample_images.is_achromatic(scene):
        scene = draw_scene(rng)
    caption = _caption(plan, scene, rng)
    return _Drawn(scene, _image(plan.oddity, scene, rng), caption if isinstance(caption, bytes) else caption.encode())


def _copy(original: _Drawn, kind: str, rng: random.Random) -> _Drawn:
    if kind == "byte_copy":
        return original
    image = _image_copy(original.image, kind, rng)
    return _Drawn(original.scene, image, describe(original.scene, rng).encode())


def _image_copy(original: ImageFile, kind: str, rng: random.Random) -> ImageFile:
    if kind == "semantic_copy":
        return encode_altered(original.data, rng=rng)
    scale = 1.0
    if kind == "resized_copy":
        smallest = 205 / min(original.width, original.height)  # stays clear of the size condition
        scale = rng.uniform(max(smallest, 0.6), 0.9) if smallest < 0.85 else rng.uniform(1.15, 1.5)
    return sample_images.encode_copy(original.data, scale=scale, rng=rng)


def _caption(plan: _Plan, scene: Scene, rng: random.Random) -> str | bytes:
    match plan.oddity:
        case "mismatched_caption":
            return describe(draw_unlike(scene, rng), rng)
        case "filename_caption":
            return sample_captions.file_name_caption(rng)
        case "url_caption":
            return sample_captions.url_caption(rng)
        case "boilerplate_caption":
            return sample_captions.boilerplate_caption(rng)
        case "long_caption":
            return sample_captions.long_caption(scene, rng)
        case "short_caption":
            return sample_captions.short_caption(scene, rng)
        case "foreign_caption" if plan.language is not None:
            return describe_in(plan.language, scene, rng)
        case "caption_not_utf8":
            return sample_captions.undecodable_caption(scene, rng)
        case _:
            return describe(scene, rng)


def _image(oddity: str | None, scene: Scene, rng: random.Random) -> ImageFile:
    match oddity:
        case "bogus_file":
            return sample_images.bogus_file(rng)
        case "empty_file":
            return ImageFile(b"", "jpg", 0, 0)
        case "decompression_bomb":
            return sample_images.bomb(rng)
        case "animated":
            return sample_images.encode_animation(scene, size=sample_images.draw_size(rng), rng=rng)
        case "small_image":
            size = sample_images.draw_small_size(rng)
        case "extreme_aspect":
            size = sample_images.draw_extreme_size(rng)
        case _:
            size = sample_images.draw_size(rng)
    picture = render(scene, size=size, seed=rng.getrandbits(64))
    is_odd_format = oddity in sample_images.ODD_FORMATS
    file_format = oddity if is_odd_format and oddity else sample_images.draw_everyday_format(rng)
    file = sample_images.encode(picture, file_format=file_format, rng=rng)
    return sample_images.truncate(file, rng) if oddity == "truncated_file" else file


def _write_shard(folder: Path, shard: int, plans: Sequence[_Plan], seed: int | str) -> list[PlantedSample]:
    """Write one tar, under a temporary name until it is whole."""
    name = f"{shard:05d}.tar"
    part = folder / f"{name}.part"
    planted = []
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, plan in enumerate(plans):
            drawn = _draw(plan, seed)
            key = f"{shard:05d}{index:04d}"
            members = {
                drawn.image.extension: drawn.image.data,
                "json": json.dumps(_metadata(key, drawn), indent=4).encode(),
                "txt": drawn.caption,
            }
            for extension, data in sorted(members.items()):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            group = None if plan.group is None else _key_of(plan.group)
            planted.append(PlantedSample(key, name, plan.oddity, group, drawn.scene.answer))
    part.replace(folder / name)
    return planted


def _key_of(number: int) -> str:
    return f"{number // SAMPLES_PER_SHARD:05d}{number % SAMPLES_PER_SHARD:04d}"


def _metadata(key: str, drawn: _Drawn) -> dict[str, Any]:
    """The fields of img2dataset's JSON member, and what the scene shows."""
    image = drawn.image
    return {
        "caption": drawn.caption.decode(errors="replace"),
        "url": f"https://example.com/scenes/{key}.{image.extension}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": image.width,
        "height": image.height,
        "original_width": image.width,
        "original_height": image.height,
        "exif": "{}",
        "sha256": hashlib.sha256(image.data).hexdigest(),
        "answer": drawn.scene.answer,
        "scene": drawn.scene.to_metadata(),
    }

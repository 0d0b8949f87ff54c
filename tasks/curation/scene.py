"""Scenes of coloured shapes: what the offline sample pool's images show and its captions say.

Drawing, rendering and describing use explicit random generators only, so every process gets the same bytes.
"""

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 32, 38),
    "orange": (247, 138, 20),
    "yellow": (250, 220, 30),
    "green": (30, 148, 62),
    "blue": (34, 78, 206),
    "purple": (134, 42, 168),
    "black": (18, 18, 20),
    "white": (248, 248, 246),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (232, 232, 232),
    "grey": (132, 132, 132),
    "black": (34, 34, 34),
    "beige": (222, 204, 168),
    "pink": (240, 176, 196),
    "light blue": (156, 204, 236),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("large", "small")
MAX_COUNT = 4

# Fractions of the image (left, top, right, bottom) that each position word stands for.
POSITIONS: dict[str, tuple[float, float, float, float]] = {
    "centre": (0.22, 0.22, 0.78, 0.78),
    "left": (0.03, 0.08, 0.47, 0.92),
    "right": (0.53, 0.08, 0.97, 0.92),
    "top": (0.08, 0.03, 0.92, 0.47),
    "bottom": (0.08, 0.53, 0.92, 0.97),
    "top left": (0.03, 0.03, 0.48, 0.48),
    "top right": (0.52, 0.03, 0.97, 0.48),
    "bottom left": (0.03, 0.52, 0.48, 0.97),
    "bottom right": (0.52, 0.52, 0.97, 0.97),
}
_OPPOSITES = {
    "left": "right",
    "right": "left",
    "top": "bottom",
    "bottom": "top",
    "top left": "bottom right",
    "bottom right": "top left",
    "top right": "bottom left",
    "bottom left": "top right",
}
# Pairs that even a person would confuse at thumbnail size.
_INVISIBLE = {
    ("white", "white"),
    ("yellow", "white"),
    ("white", "beige"),
    ("yellow", "beige"),
    ("black", "black"),
}

_SUPERSAMPLE = 4
_CLOUD_CELLS = 6
_CLOUD_AMPLITUDE = 30.0
_GRAIN_AMPLITUDE = 8.0


@dataclass(frozen=True)
class Group:
    """One to four equal shapes in one part of the image, in the words of `COLOURS`, `SHAPES` and so on."""

    count: int
    colour: str
    shape: str
    size: str
    position: str

    @property
    def label(self) -> str:
        """Colour and shape, singular: `red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and one or two groups.

    Of two groups the first has the larger shapes, and they differ in colour, shape and position.
    """

    background: str
    groups: tuple[Group, ...]

    @property
    def answer(self) -> str:
        """The label of the group with the largest shapes, such as `red circle`."""
        return self.groups[0].label

    def to_metadata(self) -> dict[str, Any]:
        """The scene as JSON-able values: `{"background": …, "groups": [{"count": …, "colour": …, …}]}`."""
        return {"background": self.background, "groups": [asdict(group) for group in self.groups]}


def draw_scene(rng: random.Random) -> Scene:
    """Draw a scene: three in five have two groups, in opposite parts of the image."""
    background = rng.choice(list(BACKGROUNDS))
    visible = [colour for colour in COLOURS if (colour, background) not in _INVISIBLE]
    colours = rng.sample(visible, 2)
    shapes = rng.sample(SHAPES, 2)
    if rng.random() < 0.4:
        position = rng.choice(list(POSITIONS))
        group = Group(rng.randint(1, MAX_COUNT), colours[0], shapes[0], rng.choice(SIZES), position)
        return Scene(background, (group,))
    position = rng.choice(list(_OPPOSITES))
    first = Group(rng.randint(1, MAX_COUNT), colours[0], shapes[0], "large", position)
    second = Group(rng.randint(1, MAX_COUNT), colours[1], shapes[1], "small", _OPPOSITES[position])
    return Scene(background, (first, second))


def draw_unlike(scene: Scene, rng: random.Random) -> Scene:
    """Draw a scene that shares no colour and no shape with `scene`: its caption is wrong about both."""
    colours = {group.colour for group in scene.groups}
    shapes = {group.shape for group in scene.groups}
    while True:
        other = draw_scene(rng)
        if all(group.colour not in colours and group.shape not in shapes for group in other.groups):
            return other


def render(scene: Scene, *, size: tuple[int, int], seed: int | str) -> Image.Image:
    """Render `scene` as an antialiased RGB image of `size` (width, height) pixels, softly clouded.

    `seed` moves the shapes within their part of the image and draws the texture: another seed gives another
    picture of the same scene, the same seed gives the same pixels.
    """
    rng = random.Random(f"render {seed}")
    image = _background(BACKGROUNDS[scene.background], size, rng)
    # Both groups take their scale from the tighter one, so that "large" is larger than "small" everywhere.
    reach = min(_reach(group, size) for group in scene.groups)
    for group in scene.groups:
        share = rng.uniform(0.84, 0.95) if group.size == "large" else rng.uniform(0.50, 0.57)
        _paste_group(image, group, radius=max(3.0, reach * share), rng=rng)
    return image


def _background(colour: RGB, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """`colour` with low-frequency clouds, which keep different images perceptually apart, and fine grain."""
    cells = _CLOUD_CELLS
    clouds = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells)).resize(size, Image.Resampling.BICUBIC)
    grain = Image.frombytes("L", size, rng.randbytes(size[0] * size[1]))
    amplitude = _CLOUD_AMPLITUDE + _GRAIN_AMPLITUDE
    texture = Image.blend(clouds, grain, _GRAIN_AMPLITUDE / amplitude)
    return Image.merge("RGB", [texture.point(_tone_curve(value, amplitude)) for value in colour])


@cache
def _tone_curve(value: int, amplitude: float) -> list[int]:
    """Texture level (0 to 255) to band level, `amplitude` either side of `value`."""
    return [min(255, max(0, round(value + (level - 127.5) / 127.5 * amplitude))) for level in range(256)]


def _grid(group: Group, size: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows that give the group's shapes the most room in its box."""
    left, top, right, bottom = POSITIONS[group.position]
    width, height = (right - left) * size[0], (bottom - top) * size[1]
    grids = [(columns, math.ceil(group.count / columns)) for columns in range(1, group.count + 1)]
    return max(grids, key=lambda grid: min(width / grid[0], height / grid[1]))


def _reach(group: Group, size: tuple[int, int]) -> float:
    """Half the shorter side of a grid cell, in pixels, capped so that one shape does not fill the image."""
    left, top, right, bottom = POSITIONS[group.position]
    columns, rows = _grid(group, size)
    cell = min((right - left) * size[0] / columns, (bottom - top) * size[1] / rows)
    return min(cell / 2, 0.19 * min(size))


def _paste_group(image: Image.Image, group: Group, *, radius: float, rng: random.Random) -> None:
    left, top, right, bottom = POSITIONS[group.position]
    columns, rows = _grid(group, image.size)
    cell_width = (right - left) * image.width / columns
    cell_height = (bottom - top) * image.height / rows
    cells = rng.sample([(column, row) for row in range(rows) for column in range(columns)], group.count)
    slack_x, slack_y = max(0.0, cell_width / 2 - radius), max(0.0, cell_height / 2 - radius)
    for column, row in cells:
        x = left * image.width + (column + 0.5) * cell_width + rng.uniform(-slack_x, slack_x)
        y = top * image.height + (row + 0.5) * cell_height + rng.uniform(-slack_y, slack_y)
        tint = tuple(min(255, max(0, value + rng.randint(-6, 6))) for value in COLOURS[group.colour])
        mask = _mask(group.shape, radius, math.radians(rng.uniform(-12, 12)))
        image.paste(tint, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)


def _mask(shape: str, radius: float, angle: float) -> Image.Image:
    """An antialiased mask of `shape` with circumradius `radius` pixels, turned by `angle` radians."""
    side = 2 * math.ceil(radius) + 2
    canvas = Image.new("L", (side * _SUPERSAMPLE, side * _SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    middle, scale = side * _SUPERSAMPLE / 2, radius * _SUPERSAMPLE
    if shape in ("circle", "ring"):
        draw.ellipse((middle - scale, middle - scale, middle + scale, middle + scale), fill=255)
        if shape == "ring":
            hole = 0.55 * scale
            draw.ellipse((middle - hole, middle - hole, middle + hole, middle + hole), fill=0)
    else:
        corners = [(middle + scale * x, middle + scale * y) for x, y in _turned(_OUTLINES[shape], angle)]
        draw.polygon(corners, fill=255)
    return canvas.reduce(_SUPERSAMPLE)


def _turned(points: list[tuple[float, float]], angle: float) -> list[tuple[float, float]]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return [(x * cosine - y * sine, x * sine + y * cosine) for x, y in points]


def _spokes(radii: list[float]) -> list[tuple[float, float]]:
    """Corners at equal angles, clockwise from the top, at the given distances from the middle."""
    step = 2 * math.pi / len(radii)
    return [(radius * math.sin(i * step), -radius * math.cos(i * step)) for i, radius in enumerate(radii)]


_ARM = 0.3  # half the width of a cross's arm
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)],
    "triangle": _spokes([1.0, 1.0, 1.0]),
    "star": _spokes([1.0, 0.42] * 5),
    "cross": [
        *[(-_ARM, -0.95), (_ARM, -0.95), (_ARM, -_ARM), (0.95, -_ARM), (0.95, _ARM), (_ARM, _ARM)],
        *[(_ARM, 0.95), (-_ARM, 0.95), (-_ARM, _ARM), (-0.95, _ARM), (-0.95, -_ARM), (-_ARM, -_ARM)],
    ],
}

_NUMBERS = ("", "one", "two", "three", "four")
_PLACES: dict[str, tuple[str, ...]] = {
    "centre": ("in the middle", "in the centre"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "in the upper half"),
    "bottom": ("at the bottom", "in the lower half"),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}

# Each phrasing takes the groups ("a red ring on the left and two blue stars on the right") and the background.
_PHRASINGS: tuple[Callable[[str, str], str], ...] = (
    lambda groups, background: f"A picture of {groups} with a {background} background",
    lambda groups, background: f"This image shows {groups}, and the background is {background}.",
    lambda groups, background: f"On a {background} background you can see {groups}.",
    lambda groups, background: f"There you can see {groups}, drawn on a {background} background.",
    lambda groups, background: f"A drawing with {groups}, against a plain {background} background.",
    lambda groups, background: f"{groups} on a {background} background",
    lambda groups, background: f"The picture has a {background} background and shows {groups}.",
    lambda groups, background: f"Photo of a {background} wall with {groups}.",
)


def describe(scene: Scene, rng: random.Random) -> str:
    """An English caption of 6 to 30 words naming background, counts, colours, shapes and places."""
    parts = [_group_words(group, rng) for group in scene.groups]
    rng.shuffle(parts)
    caption = rng.choice(_PHRASINGS)(rng.choice((" and ", ", with ", " together with ")).join(parts), scene.background)
    return caption[0].upper() + caption[1:]


def _group_words(group: Group, rng: random.Random) -> str:
    adjectives = f"{group.size} {group.colour}" if rng.random() < 0.6 else group.colour
    place = rng.choice(_PLACES[group.position])
    if group.count > 1:
        plural = "crosses" if group.shape == "cross" else f"{group.shape}s"
        return f"{_NUMBERS[group.count]} {adjectives} {plural} {place}"
    article = "an" if adjectives.startswith("o") else "a"
    return f"{rng.choice((article, 'one'))} {adjectives} {group.shape} {place}"

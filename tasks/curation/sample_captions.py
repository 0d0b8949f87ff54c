"""The sample pool's faulty captions: file names, URLs, boilerplate, and captions that are too long or too short.

Each function takes its random generator, so that the same seed gives the same caption.
"""

import random

from tasks.curation.scene import Scene, describe

_FILE_NAMES = (
    "IMG_{n}.jpg",
    "DSC_{n}.JPG",
    "DSC0{n}.jpeg",
    "uploads/2019/07/IMG_20190712_14{n}.jpg",
    "C:\\Users\\me\\Pictures\\scan{n}.png",
    "image-{n}-1024x768.webp",
    "Screenshot_2021-03-04-10-{n}.png",
)
_URLS = (
    "https://example.com/gallery/{n}",
    "http://www.example.org/photos/item?id={n}&size=large",
    "www.example.net/shop/product-{n}.html",
    "https://cdn.example.com/assets/{n}/full.jpg",
)
_BOILERPLATE = (
    "Click here to see more pictures like this one",
    "Click to enlarge this image in a new window",
    "Click on the image to view the full size version",
    "Sign up for our newsletter to get the latest news",
    "Image may contain text and other objects, no description available",
    "No description available for this photo",
    "All rights reserved, do not copy without permission",
    "Add to cart and get free shipping on your order",
)
_FILLER = (
    "It was made to show how simple shapes look when they are put next to each other.",
    "Nothing else can be found anywhere in the picture, however long you look at it.",
    "The shapes are filled with one colour each and do not touch one another at all.",
    "Pictures like this one are often used to teach children how to count and to compare.",
    "The light in the background changes a little from place to place, as it would on a wall.",
)
_MORE_WORDS_THAN = 210


def file_name_caption(rng: random.Random) -> str:
    """A file name or path, as cameras and content systems write them."""
    return rng.choice(_FILE_NAMES).format(n=rng.randint(1000, 9999))


def url_caption(rng: random.Random) -> str:
    """A bare URL."""
    return rng.choice(_URLS).format(n=rng.randint(1000, 99999))


def boilerplate_caption(rng: random.Random) -> str:
    """Page furniture that was scraped instead of a caption; 5 words or more, in English."""
    return rng.choice(_BOILERPLATE)


def long_caption(scene: Scene, rng: random.Random) -> str:
    """More than 200 English words on `scene`."""
    sentences = [describe(scene, rng).rstrip(".") + "."]
    while sum(len(sentence.split()) for sentence in sentences) <= _MORE_WORDS_THAN:
        sentences.append(rng.choice(_FILLER))
    return " ".join(sentences)


def short_caption(scene: Scene, rng: random.Random) -> str:
    """Two to four true words on `scene`."""
    return rng.choice(("{}", "A {}", "Just a {}", "Picture of {}")).format(scene.answer)


def undecodable_caption(scene: Scene, rng: random.Random) -> bytes:
    """A caption in an encoding that is not UTF-8."""
    caption = f"{describe(scene, rng)} – café"
    return caption.encode(rng.choice(("cp1252", "utf-16")))

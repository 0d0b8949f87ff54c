import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.stats import entropy

from storage.warehouse import Warehouse
from tasks.curation.signals.sharpness import LONGER_SIDE, Sharpness
from tests.tasks.curation.images import encoded, measured, photograph


def laplacian_variance(grey: np.ndarray) -> float:
    """The rule written out: four neighbours less four times the pixel, the image mirrored at its edges."""
    padded = np.pad(grey.astype(int), 1, mode="reflect")
    total = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * padded[1:-1, 1:-1]
    return float(total.var())


def sharpness(warehouse: Warehouse, *images: Image.Image) -> list[dict[str, float]]:
    return measured(Sharpness(), warehouse, [encoded(image, "PNG") for image in images])


def test_values_are_those_of_the_definitions(warehouse: Warehouse) -> None:
    image = photograph().convert("L")
    (row,) = sharpness(warehouse, image)
    grey = np.asarray(image)
    assert row["laplacian_variance"] == pytest.approx(laplacian_variance(grey), rel=1e-6)
    assert row["entropy"] == pytest.approx(entropy(np.bincount(grey.ravel(), minlength=256), base=2), rel=1e-6)


def test_colours_count_by_their_luma(warehouse: Warehouse) -> None:
    image = photograph()
    colour, grey = sharpness(warehouse, image, image.convert("L"))
    assert colour["laplacian_variance"] == pytest.approx(grey["laplacian_variance"], rel=0.01)
    assert colour["entropy"] == pytest.approx(grey["entropy"], rel=0.01)


def test_a_larger_image_is_measured_at_the_fixed_size(warehouse: Warehouse) -> None:
    small = photograph(LONGER_SIDE, 300).convert("L")
    double = small.resize((2 * LONGER_SIDE, 600), Image.Resampling.NEAREST)  # averaged back, the same pixels again
    assert sharpness(warehouse, small)[0] == sharpness(warehouse, double)[0]


def test_blur_lowers_the_variance_and_blank_images_have_nothing(warehouse: Warehouse) -> None:
    image = photograph(200, 150)
    sharp, blurred, blank = sharpness(
        warehouse, image, image.filter(ImageFilter.GaussianBlur(3)), Image.new("RGB", (200, 150), (12, 34, 56))
    )
    assert sharp["laplacian_variance"] > 20 * blurred["laplacian_variance"] > 0
    assert blank == {"laplacian_variance": 0, "entropy": 0}


def test_half_black_half_white_is_one_bit(warehouse: Warehouse) -> None:
    image = Image.new("L", (64, 64))
    image.paste(255, (0, 0, 32, 64))
    assert sharpness(warehouse, image)[0]["entropy"] == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 2)])
def test_images_of_any_shape_are_measured(warehouse: Warehouse, size: tuple[int, int]) -> None:
    (row,) = sharpness(warehouse, photograph(*size))
    assert row["laplacian_variance"] >= 0 and 0 <= row["entropy"] <= 8


def test_an_undecodable_image_has_nulls(warehouse: Warehouse) -> None:
    assert measured(Sharpness(), warehouse, [b"no image"]) == [{"laplacian_variance": None, "entropy": None}]

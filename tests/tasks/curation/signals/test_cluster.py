import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage.fingerprint import file_digest
from tasks.curation.batch import Batch
from tasks.curation.signals import cluster
from tasks.curation.signals.clip import Clip
from tasks.curation.signals.cluster import Cluster
from tasks.curation.signals.contract import MissingWeights
from tasks.curation.signals.pinned_file import PinnedFile
from tests.tasks.curation.signals.test_clip import SHIPPED

CLIP = Clip(f"local-dir:{SHIPPED}")
SIZE = CLIP.checkpoint.embedding_size
RNG = np.random.default_rng(0)


def clusters(folder: Path, centroids: np.ndarray, wanted: np.ndarray) -> Cluster:
    files = []
    for name, values in (("centroids.npy", centroids), ("wanted.npy", wanted)):
        np.save(folder / name, values)
        files.append(PinnedFile(file=str(folder / name), sha256=file_digest(folder / name)))
    return Cluster(CLIP, *files)


def measured(signal: Cluster, embeddings: list[np.ndarray | None]) -> list[dict]:
    kind = CLIP.columns.field("image_embedding").type
    column = pa.array([None if one is None else one.astype(np.float16) for one in embeddings], kind)
    batch = Batch(pa.nulls(len(column), pa.string()), measured=pa.record_batch([column], ["image_embedding"]))
    return signal.measure(batch).to_pylist()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_the_nearest_is_that_of_largest_inner_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.setattr(cluster, "_BLOCK_BYTES", 4 * 37 * 5)  # five rows at a time
    centroids = (RNG.normal(size=(37, SIZE)) * RNG.uniform(0.5, 2, (37, 1))).astype(kind)
    embeddings = [None if at % 9 == 4 else RNG.normal(size=SIZE).astype(np.float16) for at in range(23)]
    wanted = np.array([3, 5, 8, 13, 21, 34])
    rows = measured(clusters(tmp_path, centroids, wanted), embeddings)
    for row, embedding in zip(rows, embeddings, strict=True):
        if embedding is None:
            assert row == {"cluster": None, "cluster_wanted": None}
            continue
        products = [sum(float(a) * float(b) for a, b in zip(embedding, one, strict=True)) for one in centroids]
        assert row == {"cluster": products.index(max(products)), "cluster_wanted": row["cluster"] in wanted.tolist()}


def test_the_first_of_equal_centroids_is_the_nearest(tmp_path: Path) -> None:
    centroids = np.zeros((4, SIZE), np.float32)
    centroids[1:3, 0] = 1
    embedding = np.zeros(SIZE, np.float16)
    embedding[0] = 1
    signal = clusters(tmp_path, centroids, np.array([1]))
    assert measured(signal, [embedding, -embedding]) == [
        {"cluster": 1, "cluster_wanted": True},
        {"cluster": 0, "cluster_wanted": False},
    ]


def test_a_batch_without_any_image_has_nulls(tmp_path: Path) -> None:
    signal = clusters(tmp_path, np.ones((2, SIZE), np.float32), np.array([0]))
    assert measured(signal, [None, None]) == [{"cluster": None, "cluster_wanted": None}] * 2


@pytest.mark.parametrize(
    ("centroids", "wanted", "message"),
    [
        (np.ones((2, SIZE + 1), np.float32), np.array([0]), rf"gives embeddings of {SIZE} numbers"),
        (np.ones((2, SIZE), np.int32), np.array([0]), "holds int32 of shape"),
        (np.ones(SIZE, np.float32), np.array([0]), r"shape \(clusters, "),
        (np.ones((2, SIZE), np.float32), np.array([2]), "whole numbers from 0 to 1"),
        (np.ones((2, SIZE), np.float32), np.array([-1]), "whole numbers from 0 to 1"),
        (np.ones((2, SIZE), np.float32), np.array([0.5]), "holds float64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, centroids: np.ndarray, wanted: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        clusters(tmp_path, centroids, wanted).ref  # noqa: B018


def test_a_file_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    signal = clusters(tmp_path, np.array([{}], object), np.array([0]))
    with pytest.raises(ValueError, match=r"centroids\.npy is not a \.npy file of numbers"):
        signal.ref  # noqa: B018


def test_another_file_of_the_same_name_is_refused(tmp_path: Path) -> None:
    signal = clusters(tmp_path, np.ones((2, SIZE), np.float32), np.array([0]))
    np.save(tmp_path / "wanted.npy", np.array([1]))
    with pytest.raises(MissingWeights, match="its sha256 is"):
        signal.ref  # noqa: B018


def test_the_fingerprint_follows_both_files(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
    centroids = np.eye(2, SIZE, dtype=np.float32)
    signals = [
        clusters(folders[0], centroids, np.array([0])),
        clusters(folders[1], centroids, np.array([1])),
        clusters(folders[2], -centroids, np.array([0])),
    ]
    assert all(one.ref != other.ref for one, other in itertools.combinations(signals, 2))

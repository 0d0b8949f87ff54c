"""Judging the segments of one document: which stay, which text each image goes to, and in which order they stand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.curation.interleaved.assignment import assign
from tasks.curation.interleaved.policy import MISSING, UNMATCHED

Node = dict[str, Any]
"""A row of `NODE_DECISIONS`."""


@dataclass(frozen=True)
class Placement:
    """How images are placed: in the source's order, or before the text they are assigned to, if similar enough."""

    is_matched: bool
    similarity_min: float | None


def judge_segments(
    document: Mapping[str, Any],
    images: Mapping[str, Mapping[str, Any]],
    texts: Sequence[Sequence[str]],
    placement: Placement,
) -> list[Node]:
    """Return a row of `NODE_DECISIONS` for each segment, in order.

    `images` are the decisions on the document's images by sample, with `text_similarity` where images are matched;
    `texts` the names of failed conditions of each text, in order.
    """
    of_texts = iter(texts)
    nodes: list[Node] = []
    for position, segment in enumerate(document["segments"]):
        node: Node = {"document_id": document["document_id"], "position": position, "kind": segment["kind"]}
        if segment["kind"] == "text":
            failed = list(next(of_texts))
            node |= {"kept": not failed, "failed": failed}
        elif segment["sample_id"] is None:
            node |= {"kept": False, "failed": [MISSING]}
        else:
            decision = images[segment["sample_id"]]
            node |= {name: decision[name] for name in ("sample_id", "kept", "duplicate_of", "duplicate_rule")}
            node["failed"] = list(decision["failed"])
        nodes.append(node)
    if placement.is_matched:
        _match(nodes, images, placement.similarity_min)
    _place(nodes, is_matched=placement.is_matched)
    return nodes


def _match(nodes: list[Node], images: Mapping[str, Mapping[str, Any]], similarity_min: float | None) -> None:
    """Assign the images that stay to the texts that stay; those that get none, or a stranger, go."""
    all_texts = [node for node in nodes if node["kind"] == "text"]
    kept = np.array([node["kept"] for node in all_texts], np.bool_)
    texts = [node for node in all_texts if node["kept"]]
    staying = [node for node in nodes if node["kind"] == "image" and node["kept"]]
    measured = [node for node in staying if images[node["sample_id"]]["text_similarity"] is not None]
    rows = [np.array(images[node["sample_id"]]["text_similarity"], np.float32)[kept] for node in measured]
    for node, row, text in zip(measured, rows, assign(np.reshape(rows, (len(rows), len(texts)))).tolist(), strict=True):
        if text >= 0:
            node |= {"text_position": texts[text]["position"], "similarity": float(row[text])}
    for node in staying:
        similarity = node.get("similarity")
        if similarity is None or (similarity_min is not None and np.float32(similarity) < np.float32(similarity_min)):
            node |= {"kept": False, "failed": [*node["failed"], UNMATCHED]}


def _place(nodes: list[Node], *, is_matched: bool) -> None:
    """Number the segments that stay: as they stood, or each text after the images assigned to it."""
    staying = [node for node in nodes if node["kept"]]
    if is_matched:
        staying.sort(key=lambda n: (n.get("text_position", n["position"]), n["kind"] == "text", n["position"]))
    for place, node in enumerate(staying):
        node["place"] = place

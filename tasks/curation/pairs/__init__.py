"""Duplicate pairs: samples with the same bytes, the same pixels or perceptual hashes a few bits apart.

Pairs are evidence, not decisions: measured once, kept in the warehouse, and extended when samples arrive.
"""

from tasks.curation.pairs.compact import expand_pairs, read_pairs
from tasks.curation.pairs.exact import find_exact_pairs
from tasks.curation.pairs.hamming import hamming_pairs
from tasks.curation.pairs.perceptual import find_perceptual_pairs

__all__ = ["expand_pairs", "find_exact_pairs", "find_perceptual_pairs", "hamming_pairs", "read_pairs"]

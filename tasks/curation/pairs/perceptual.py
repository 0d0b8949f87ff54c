"""Perceptual pairs: samples whose perceptual hashes differ in a few of their 64 bits.

Scaled and recompressed copies mostly stay within 4 bits; crops, rotations and flips do not, nor do unrelated images.
"""

from collections.abc import Sequence

import pyarrow as pa

from storage.refs import Outcome, PairsRef, PoolRef, ShardRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation.pairs.coverage import extend
from tasks.curation.pairs.hamming import hamming_pairs
from tasks.curation.pairs.members import Members

VERSION = 1


def find_perceptual_pairs(
    pool: PoolRef, signal: SignalRef, *, max_distance: int = 4, warehouse: Warehouse
) -> Outcome[PairsRef]:
    """Find the samples of `pool` whose `phash` differs in at most `max_distance` bits: all of them, and no others.

    Compares only shards that were not compared before (new × all); cached if there are none. Samples without a hash
    are in no pair, nor are `flat` images, whose hash is noise. Distances are in bits; a policy may ask for less than
    was looked for. Pairs are stored as `compact` says: read them with `read_pairs`.
    Raises `PairsError` if `signal` has not measured a shard, or is not the perceptual signal.
    """

    def join(new: Sequence[ShardRef], old: Sequence[ShardRef]) -> pa.Table:
        usable = "phash is not null and not flat"
        columns = ["phash", "flat"]
        with Members.loaded(signal, columns, usable=usable, new=new, old=old, warehouse=warehouse) as members:
            codes, known = members.codes()
            return members.stored((codes, hamming_pairs(codes, max_distance=max_distance, new_from=known)))

    config = {"version": VERSION, "signal": signal.fingerprint, "max_distance": max_distance}
    return extend("perceptual", config, pool, join, warehouse=warehouse)

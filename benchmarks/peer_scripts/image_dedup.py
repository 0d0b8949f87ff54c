"""Part of the chain in imagededup: its pHash of every image and the copies it would remove, in a process a core.

Run by the Python of the peers' own environment: `python image_dedup.py SETTINGS RESULT`, both JSON files.
"""

import json
import sys
import time
from pathlib import Path


def main(settings: dict, result: Path) -> None:
    """Find the copies; write the keys that are left, and the seconds."""
    from imagededup.methods import PHash

    images = Path(settings["sources"][0]).parent / "images"
    began = time.perf_counter()
    hasher = PHash(verbose=False)
    hashes = hasher.encode_images(str(images))
    removed = set(hasher.find_duplicates_to_remove(encoding_map=hashes, max_distance_threshold=0))
    seconds = time.perf_counter() - began
    kept = sorted(Path(name).stem for name in hashes if name not in removed)
    result.write_text(json.dumps({"seconds": seconds, "kept": kept}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

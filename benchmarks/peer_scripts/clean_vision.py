"""CleanVision's own checks of a folder of images, all that it makes by default, in a process a core.

Run by the Python of an environment of its own (CleanVision is AGPL): `python clean_vision.py SETTINGS RESULT`.
"""

import json
import os
import sys
import time
from pathlib import Path


def main(settings: dict, result: Path) -> None:
    """Find all issues; write the keys in none of exact copies, and the seconds."""
    from cleanvision import Imagelab

    images = Path(settings["sources"][0]).parent / "images"
    began = time.perf_counter()
    lab = Imagelab(data_path=str(images))
    lab.find_issues(n_jobs=len(os.sched_getaffinity(0)), verbose=False)
    seconds = time.perf_counter() - began
    extra = {Path(name).stem for group in lab.info["exact_duplicates"]["sets"] for name in sorted(group)[1:]}
    kept = sorted(key for path in images.iterdir() if (key := path.stem) not in extra)
    result.write_text(json.dumps({"seconds": seconds, "kept": kept}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

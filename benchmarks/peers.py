"""One chain of filters in Tamis, Data-Juicer and a script of one's own; imagededup and CleanVision on their part of it.

    python -m benchmarks.peers --environments FOLDER

The pool is JPEGs 640 pixels wide with captions; a known part of it is too small, too long, too tersely captioned, full
of symbols, or copied byte for byte. Every tool runs in a process of its own, on files that are in memory already, and
must keep exactly the samples that it should. Each round is the whole chain from nothing, the chain with another size
limit, and the chain with 1 % more samples, all of which a tool may do with what it kept from before; figures are
medians over the rounds. The peers are installed from PyPI into environments of their own, in FOLDER, which are used
again if they are there.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks.record import record
from benchmarks.scoring import photograph

ENVIRONMENTS = {
    # Data-Juicer needs the last two and does not ask for them
    "peers": ["py-data-juicer", "imagededup", "imagehash", "aiohttp", "ray"],
    "cleanvision": ["cleanvision"],  # AGPL: run here, never imported by ours
}
SCRIPTS = Path(__file__).parent / "peer_scripts"
THRESHOLDS = {"words_min": 4, "special_max": 0.3, "side_min": 200, "aspect_max": 3}
OTHER_SIDE = 100
"""The changed threshold: it lets the small images in."""

SHARES = {"good": 67, "small": 5, "long": 5, "terse": 8, "symbols": 5, "copy": 10}
"""Percent of the pool by what is wrong with a sample."""

WORDS = ("a", "an", "the", "old", "red", "small", "river", "bridge", "garden", "tower", "people", "walking", "light")

PHASES = ("chain", "rethreshold", "one_percent")
INSTALL_SECONDS = 900
QUIET_LOAD = 1.0
NOT_COMPARABLE = {
    "special characters": "Data-Juicer counts white space and digits among them, Tamis and the script do not; captions "
    "here are far from the limit by either count, so that the survivors are the same",
    "perceptual hash": "three definitions of pHash; equal ones are removed, and the only equal images are copies. "
    "Tamis takes its own from JPEGs decoded at a quarter of their size (phash_decode: scaled), the others at full size",
    "imports": "what a tool imports before it begins is in the time of its whole process only",
    "output": "Tamis copies images into its pool and its snapshot and keeps all measurements and pairs to 4 bits; the "
    "others write the rows that are left, which name image files",
    "imagededup, CleanVision": "no captions and no filters: they see all images and find copies only; CleanVision "
    "makes its seven other checks as well",
    "another threshold, 1 % more": "Data-Juicer has its cache of results on; the script starts again",
}


@dataclass
class Tool:
    """What runs a script, and what its runs took: seconds by phase, of its work and of the whole process."""

    script: str
    python: str
    phases: tuple[str, ...]
    work: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    process: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    steps: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(self, phase: str, settings: dict[str, Any], folder: Path) -> list[str]:
        """Run a phase and return the keys kept."""
        files = folder / "settings.json", folder / "result.json"
        files[0].write_text(json.dumps(settings))
        module = ["-m", f"benchmarks.peer_scripts.{self.script}"]
        command = module if self.python == sys.executable else [str(SCRIPTS / f"{self.script}.py")]
        caches = {"HF_HOME": f"{folder}/hf", "DATA_JUICER_CACHE_HOME": f"{folder}/dj", "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **caches, "VIRTUAL_ENV": str(Path(self.python).parents[1])}
        began = time.perf_counter()
        done = subprocess.run(
            [self.python, *command, *map(str, files)], env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"{self.script} failed in {phase}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        result = json.loads(files[1].read_text())
        self.work[phase].append(result["seconds"])
        self.process[phase].append(seconds)
        self.steps[phase] = {name: round(value, 2) for name, value in result.get("steps", {}).items()}
        return list(result["kept"])


def main() -> None:
    """Make the pool, run all tools, print a table and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="where the peers are installed; a temporary folder if empty")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=240, help="seconds to wait for a quiet machine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        environments = arguments.environments or Path(temporary, "environments")
        pythons, left_out = install(environments)
        pool = Pool(Path(temporary, "pool"), arguments.images)
        tools = available(pythons)
        loads = [wait_until_quiet(arguments.patience)]
        for number in range(arguments.rounds):
            for name, tool in tools.items():
                if "chain" not in tool.phases and number:
                    continue  # part of the chain only, once
                run_round(name, tool, pool, Path(temporary, f"{name}-{number}".replace(" ", "-")))
            loads.append(os.getloadavg()[0])
            report(tools, pool, left_out, versions(pythons), loads)


def available(pythons: dict[str, str]) -> dict[str, Tool]:
    """The tools whose environment there is."""
    tools = {"tamis": Tool("tamis", sys.executable, PHASES)}
    if "peers" in pythons:
        tools["data-juicer"] = Tool("juicer", pythons["peers"], PHASES)
        tools["script"] = Tool("rows", pythons["peers"], PHASES)
        tools["imagededup"] = Tool("image_dedup", pythons["peers"], ("copies",))
    if "cleanvision" in pythons:
        tools["cleanvision"] = Tool("clean_vision", pythons["cleanvision"], ("copies",))
    return tools


def run_round(name: str, tool: Tool, pool: "Pool", folder: Path) -> None:
    """Run a tool's phases one after the other, on what it kept from the one before, and check the survivors."""
    folder.mkdir()
    own = {"warehouse": str(folder / "warehouse"), "folder": str(folder / "data-juicer"), "thresholds": THRESHOLDS}
    settings = {
        "chain": own | {"sources": [pool.first]},
        "copies": own | {"sources": [pool.first]},
        "rethreshold": own | {"sources": [pool.first], "thresholds": {**THRESHOLDS, "side_min": OTHER_SIDE}},
        "one_percent": own | {"sources": [pool.first, pool.more]},
    }
    for phase in tool.phases:
        kept = tool.run(phase, settings[phase], folder)
        expected = pool.expected(phase)
        if phase == "copies":  # which of several copies is left is each tool's own choice
            kept = [pool.original.get(key, key) for key in kept]
        print(
            f"{name:20} {phase:12} {tool.work[phase][-1]:7.2f} s, process {tool.process[phase][-1]:7.2f} s", flush=True
        )
        if sorted(kept) != sorted(expected):
            wrong = f"{sorted({*kept} - expected)[:9]} are too many, {sorted(expected - {*kept})[:9]} missing"
            raise RuntimeError(f"{name}, {phase}: keeps {len(kept)} of {len(expected)} samples to keep: {wrong}")


class Pool:
    """Samples as JPEG files and JSON lines, with what is wrong with each; `more` has a hundredth of `first`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.faults: dict[str, dict[str, str]] = {"first": {}, "more": {}}
        choose, pictures = random.Random(0), distinct_pictures()
        self.original: dict[str, str] = {}
        good: list[Path] = []
        for number in range(count + count // 100):
            part = "first" if number < count else "more"
            key, images = f"{number:06d}", folder / part / "images"
            images.mkdir(parents=True, exist_ok=True)
            fault = choose.choices(list(SHARES), list(SHARES.values()))[0]
            if fault == "copy" and good:
                original = choose.choice(good)
                (images / f"{key}.jpg").write_bytes(original.read_bytes())
                self.original[key] = original.stem
            else:
                save(next(pictures), fault, images / f"{key}.jpg")
            good += [images / f"{key}.jpg"] if fault == "good" else []
            self.faults[part][key] = fault
            row = {"key": key, "image_path": f"images/{key}.jpg", "caption": caption(fault, choose)}
            with (folder / part / "rows.jsonl").open("a") as lines:
                lines.write(json.dumps(row) + "\n")
        self.first, self.more = (str(folder / part / "rows.jsonl") for part in ("first", "more"))

    def expected(self, phase: str) -> set[str]:
        """The keys that must be left, by how the samples were made."""
        faults = self.faults["first"] | (self.faults["more"] if phase == "one_percent" else {})
        if phase == "copies":
            return {key for key, fault in faults.items() if fault != "copy"}
        return {key for key, fault in faults.items() if fault == "good" or (phase, fault) == ("rethreshold", "small")}


def distinct_pictures() -> Iterator[Image.Image]:
    """Photograph-like noise, each also mirrored, flipped and inverted, which no perceptual hash takes for the same."""
    rng = np.random.default_rng(0)
    while True:
        picture = photograph(rng)
        for is_mirrored, is_flipped, is_inverted in product((False, True), repeat=3):
            one = ImageOps.mirror(picture) if is_mirrored else picture
            one = ImageOps.flip(one) if is_flipped else one
            yield ImageOps.invert(one) if is_inverted else one


def save(picture: Image.Image, fault: str, target: Path) -> None:
    """Write the picture as JPEG, in the size that its fault asks for."""
    size = {"small": (160, 120), "long": (640, 204)}.get(fault, picture.size)
    picture.resize(size).save(target, "JPEG", quality=85)


def caption(fault: str, choose: random.Random) -> str:
    """Return a caption of a sentence, or one at fault."""
    if fault == "symbols":
        return "### ~~~ $$$ %%% @@@ buy now !!!!! >>>>> <<<<< ***"
    return " ".join(choose.choices(WORDS, k=2 if fault == "terse" else choose.randint(6, 24)))


def install(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Install the peers where they are not yet; returns their Pythons, and those left out with the reason."""
    pythons, left_out = {}, {}
    for name, packages in ENVIRONMENTS.items():
        python = folder / name / "bin" / "python"
        if not python.exists():
            venv.create(folder / name, with_pip=True)
            command = [str(python), "-m", "pip", "install", "--quiet", *packages]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_SECONDS, text=True)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                left_out[name] = f"{', '.join(packages)} could not be installed: {error}"
                continue
        pythons[name] = str(python)
    return pythons, left_out


def versions(pythons: dict[str, str]) -> dict[str, str]:
    """The peers' versions, as their environments have them."""
    found = {}
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    for name, python in pythons.items():
        command = [python, "-c", code, *ENVIRONMENTS[name]]
        found |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def wait_until_quiet(seconds: float) -> float:
    """Wait for what else the machine does to finish, so long at most; returns the load then."""
    deadline = time.monotonic() + seconds
    while os.getloadavg()[0] > QUIET_LOAD and time.monotonic() < deadline:
        time.sleep(5)
    return os.getloadavg()[0]


def report(
    tools: dict[str, Tool], pool: Pool, left_out: dict[str, str], peers: dict[str, str], loads: list[float]
) -> None:
    """Print the ratios and record everything."""
    work = {name: {phase: statistics.median(s) for phase, s in tool.work.items()} for name, tool in tools.items()}
    process = {name: {phase: statistics.median(s) for phase, s in tool.process.items()} for name, tool in tools.items()}
    juicers = [name for name in tools if name == "data-juicer"]
    others = [name for name in tools if "chain" in tools[name].phases and name != "tamis"]
    figures: dict[str, float | int | str] = {}
    if juicers:
        figures |= {f"ratio_{phase}": _ratio(work, juicers, phase) for phase in PHASES}
        figures |= {f"ratio_{phase}_whole_process": _ratio(process, juicers, phase) for phase in PHASES}
        figures |= {f"ratio_{phase}_to_fastest": _ratio(work, others, phase) for phase in PHASES}
    figures |= {f"tamis_{phase}_seconds": round(work["tamis"][phase], 2) for phase in PHASES}
    for name, value in figures.items():
        print(f"{name:36} {value:8.2f}")
    record(
        "peers",
        figures,
        images=len(pool.faults["first"]),
        survivors="the same for all, and those the pool was made for",
        seconds={name: {phase: round(value, 2) for phase, value in found.items()} for name, found in work.items()},
        whole_process_seconds={
            name: {phase: round(value, 2) for phase, value in found.items()} for name, found in process.items()
        },
        tamis_steps=tools["tamis"].steps,
        peers=peers,
        left_out=left_out or "none",
        not_comparable=NOT_COMPARABLE,
        rounds=len(loads) - 1,
        load=[round(load, 2) for load in loads],
    )


def _ratio(seconds: dict[str, dict[str, float]], tools: Sequence[str], phase: str) -> float:
    """How many times as long as Tamis the fastest of some tools takes."""
    return round(min(seconds[name][phase] for name in tools) / seconds["tamis"][phase], 2)


if __name__ == "__main__":
    main()

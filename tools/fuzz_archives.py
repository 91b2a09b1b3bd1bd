"""Damage saved models in random ways and load them: a typed error, or the model that was saved, and nothing else.

    python tools/fuzz_archives.py --cases 5000 --seed 0

Four kinds of damage in turn: bits flipped anywhere, the file cut off or made longer, the JSON document edited with its
checksums made right again, and tensors exchanged. What leaks another error than `ArchiveError`, takes more than five
seconds, or loads and computes something else is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / each) for each in (".", "tests/support", "tests/support/networks", "tests")]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 0.5, 1e308, "", "x", "stem.weight", "aten.relu.default",
    "aten.save.default", "\u0000", "\ud800", "__class__", [], [[]], {}, {"node": "image"}, {"node": "relu"},
    {"dtype": "float16"}, {"tuple": [1, 2]}, {"slice": [0, 1]}, {"float": "nan"}, {"device": "cuda:7"}, [1] * 1000,
)  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything in a JSON document."""
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def edit(document: Any, rng: random.Random) -> str:
    """Change one place; says how."""
    path = rng.choice(places(document))
    *way, last = path
    owner = document
    for step in way:
        owner = owner[step]
    kind = rng.choice(["drop", "value", "value", "copy", "twice", "rename"])
    if kind == "drop":
        del owner[last]
    elif kind == "value":
        owner[last] = rng.choice(VALUES)
    elif kind == "copy":
        source: Any = document
        for step in rng.choice(places(document)):
            source = source[step]
        owner[last] = json.loads(json.dumps(source))
    elif isinstance(owner, list):
        owner.insert(last, owner[last])
    else:
        name = f"{last}_" if kind == "rename" else rng.choice(list(owner))
        owner[name] = owner.pop(last)
    return f"{kind} {'.'.join(map(str, path))}"


def damaged(good: Path, target: Path, number: int, rng: random.Random) -> str:
    """Write a damaged copy; says how."""
    import safetensors
    from safetensors.torch import load_file, save_file

    from graphzip.export.archive import sealed

    data = bytearray(good.read_bytes())
    kind = number % 4
    if kind == 0:
        spots = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 1, 2, 8, 64]))]
        for spot in spots:
            data[spot] ^= 1 << rng.randrange(8)
        target.write_bytes(data)
        return f"flipped bits in bytes {spots[:8]}"
    if kind == 1:
        length = rng.randrange(len(data))
        cut = rng.choice(
            [data[:length], data + bytes(rng.randrange(64)), data[length:], data[:length] + data[length + 1 :]]
        )
        target.write_bytes(cut)
        return f"{len(cut)} of {len(data)} bytes"
    with safetensors.safe_open(good, framework="pt") as file:
        metadata = file.metadata()
    tensors, done = load_file(good), ""
    if kind == 2:
        document = json.loads(metadata["document"])
        done = "; ".join(edit(document, rng) for _ in range(rng.choice([1, 1, 1, 2, 3])))
        metadata["document"] = json.dumps(document)
    else:
        one, other = rng.sample(list(tensors), 2)
        change = rng.choice(["exchange", "drop", "dtype", "shape"])
        if change == "exchange":
            tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
        elif change == "drop":
            del tensors[one]
        elif change == "dtype":
            tensors[one] = tensors[one].half()
        else:
            tensors[one] = tensors[one].reshape(-1).clone()
        done = f"{change} {one} {other}"
    save_file(tensors, target, metadata=sealed(metadata))
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import torch
    from archived_net import archived_inputs, compiled_net

    import graphzip as gz

    torch.set_num_threads(1)
    came, bad, slowest, start = Counter[str](), 0, 0.0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        good, target = Path(folder) / "good", Path(folder) / "damaged"
        made = compiled_net()
        made.save(good)
        expected = made.module(*archived_inputs(3))
        for number in range(options.cases):
            rng = random.Random(options.seed * 1_000_003 + number)
            how = damaged(good, target, number, rng)
            began, result = time.perf_counter(), "ArchiveError"
            try:
                module = gz.load(target).module
                result = "loaded"
            except gz.ArchiveError:
                pass
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            seconds = time.perf_counter() - began
            slowest = max(slowest, seconds)
            if result == "loaded" and number % 4 != 2:  # an edited document may well describe another model
                same = all(torch.equal(module(*archived_inputs(3))[name], value) for name, value in expected.items())
                result = "loaded, the same" if same else "loaded, another model"
            came[result.partition(":")[0]] += 1
            if result not in {"ArchiveError", "loaded", "loaded, the same"} or seconds > 5:
                bad += 1
                print(f"case {number} (seed {options.seed}): {how}\n    {result[:300]} ({seconds:.1f} s)", flush=True)
    print(f"{options.cases} cases in {time.perf_counter() - start:.0f} s, slowest {slowest:.2f} s: {dict(came)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

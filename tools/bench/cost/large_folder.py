"""Halve the MLPs of a Llama-shaped folder of random bfloat16 weights without holding it in memory.

    python tools/bench/cost/large_folder.py --billions 1 --folder /tmp/llama
    python tools/bench/cost/large_folder.py --billions 0.2 --folder /tmp/llama --way fitted

`--way` is what is done: `dropped` by magnitude, the same and `fitted` on 8 sequences of 64 random tokens, layers as
`thin` ones at a quarter of their rank, in one file, or the folder `zipped` with another one of its shapes, into one
file, on 8 sequences of 64 tokens or by the weights alone (`zipped-by-weights`).

Writes the folder (once), compiles it in a child process with `graphzip.compile_folder`, and prints the seconds of each,
the peak of the child's resident memory, and whether `transformers` builds the result from its config, with a tensor of
every layer compared with what `PruneChannels` on that layer's own weights keeps.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PLAN = {"keep": {"*mlp*": 0.5}, "criterion": "l1"}
SHAPES = {
    0.2: {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16},
    1: {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    7: {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def config_of(billions: float) -> Any:
    import transformers

    return transformers.LlamaConfig(vocab_size=32000, dtype="bfloat16", **SHAPES[billions])


def write(folder: Path, billions: float, seed: int) -> None:
    """A folder with weights that are drawn tensor by tensor."""
    import transformers

    from graphzip.formats.shards import write_shards

    folder.mkdir(parents=True)
    config = config_of(billions)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in model.state_dict().items()}

    def drawn(name: str) -> torch.Tensor:
        return (torch.randn(shapes[name], generator=generator, dtype=torch.float32) * 0.02).to(torch.bfloat16)

    write_shards(folder, shapes, drawn)


def other(folder: Path) -> Path:
    """The folder that one is zipped with."""
    return folder.with_name(f"{folder.name}-other")


def compiled(folder: Path, target: Path, way: str) -> dict[str, float]:
    """Seconds, and the peak of resident memory in GiB, of this process."""
    import graphzip as gz

    started = time.perf_counter()
    options: Any = gz.PruneChannels(**PLAN)  # type: ignore[arg-type]
    data: Any = None
    source: Any = folder
    if way == "fitted":
        options = options.model_copy(update={"compensate": "data"})
        data = [torch.randint(0, 32000, (8, 64), generator=torch.Generator().manual_seed(0))]
    elif way == "thin":
        options = gz.LowRank(rank=0.25, exclude=["lm_head"])
    elif way == "zipped":
        options, source = gz.Zip(), {"a": folder, "b": other(folder)}
        data = {
            name: [torch.randint(0, 32000, (8, 64), generator=torch.Generator().manual_seed(seed))]
            for seed, name in enumerate(source)
        }
    elif way == "zipped-by-weights":
        options, source = gz.Zip(metric="euclidean"), {"a": folder, "b": other(folder)}
    outputs = "logits" if isinstance(source, dict) else None
    report = gz.compile_folder(
        source, gz.Plan([options]), target, calibration=data, outputs=outputs, spill=target.parent
    )
    return {
        "seconds": time.perf_counter() - started,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "before": report.before.params,
        "after": report.after.params,
    }


def checked(folder: Path, target: Path) -> int:
    """How many layers were compared."""
    import transformers

    from graphzip.formats.shards import Shards

    old, new = Shards(folder), Shards(target)
    config = transformers.AutoConfig.from_pretrained(str(target))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert {name: tuple(new(name).shape) for name in model.state_dict()} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    for layer in range(config.num_hidden_layers):
        gate, up, down = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        rows = {name: old(name).double() for name in (gate, up)} | {down: old(down).double().T}
        score = rows[gate].abs().sum(1) + rows[up].abs().sum(1)
        stay = score.argsort(descending=True)[: len(score) // 2].sort().values
        assert torch.equal(new(up), old(up)[stay]), layer
        assert torch.equal(new(down), old(down)[:, stay]), layer
    return int(config.num_hidden_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, choices=sorted(SHAPES), default=1)
    parser.add_argument("--folder", type=Path, required=True, help="where the folders are written")
    ways = ("dropped", "fitted", "thin", "zipped", "zipped-by-weights")
    parser.add_argument("--way", choices=ways, default="dropped")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    source = args.folder / f"llama-{args.billions:g}b"
    one_file = args.way == "thin" or args.way.startswith("zipped")
    target = args.folder / (f"{source.name}-{args.way}" + (".graphzip" if one_file else ""))
    if args.child:
        print(json.dumps(compiled(source, target, args.way)))
        return
    for seed, folder in enumerate((source, other(source)) if args.way.startswith("zipped") else (source,)):
        if not folder.exists():
            started = time.perf_counter()
            write(folder, args.billions, seed)
            print(f"{folder} written in {time.perf_counter() - started:.0f} s", flush=True)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    command = [sys.executable, __file__, "--billions", f"{args.billions:g}", "--folder", str(args.folder), "--child"]
    command += ["--way", args.way]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"{size / 2**30:.1f} GiB, {found['before'] / 1e9:.2f} -> {found['after'] / 1e9:.2f} billion parameters in "
        f"{found['seconds']:.0f} s, peak of resident memory {found['peak_gib']:.2f} GiB"
    )
    if args.way == "dropped":
        print(f"{checked(source, target)} layers hold what was to stay")


if __name__ == "__main__":
    main()

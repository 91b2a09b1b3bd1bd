"""The process of the memory test of zipping: prints the memory that zipping takes as a multiple of one network."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graphzip as gz

WIDTH, LAYERS = 1024, 24


def network() -> nn.Module:
    inner = (nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    return nn.Sequential(nn.Linear(16, WIDTH), *inner, nn.Linear(WIDTH, 10)).eval()


def mapped(seed: int, file: Path) -> nn.Module:
    """A network whose weights lie in a file."""
    torch.manual_seed(seed)
    save_file(network().state_dict(), file)
    with torch.device("meta"):
        net = network()
    net.load_state_dict(load_file(file), assign=True)
    return net


def anonymous() -> int:
    """Bytes of memory that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def zipped(nets: dict[str, nn.Module]) -> gz.Compiled:
    x = torch.randn(64, 16)
    inputs = dict.fromkeys(nets, (x[:2],))
    return gz.compile(nets, gz.Plan([gz.Zip()]), inputs, calibration={key: [x] for key in nets})


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    zipped({name: nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2)).eval() for name in "ab"})
    nets = {name: mapped(seed, folder / f"{name}.safetensors") for seed, name in enumerate("ab")}
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    zipped(nets)
    done.set()
    thread.join()
    one = sum(4 * parameter.numel() for parameter in nets["a"].parameters())
    print((most[0] - before) / one)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

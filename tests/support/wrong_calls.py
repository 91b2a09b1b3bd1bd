"""Command lines that ask for what does not exist or cannot be, the files that they name, and what is said of each."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

__all__ = ["BROKEN", "WRONG", "write_files"]

NETWORK = """
import sys
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Takes(nn.Module):
    def __init__(self, width):
        super().__init__()


class Undecided(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Leaves(nn.Module):
    def forward(self, x):
        sys.exit(7)


class Grumbles(nn.Module):
    def forward(self, x):
        raise ValueError("not \\U0001f600 today")


def net():
    return Net()


def nothing():
    return None


def a_class():
    return Net


def raises():
    raise RuntimeError("no such layer")


def leaves():
    sys.exit(3)


def deep():
    return deep()


def says_nothing():
    raise ValueError


number = 3
"""
PLANS = {
    "plan.yaml": "version: 1\ninputs: [[2, 3, 8, 8]]\npasses:\n  - cluster_merge: {keep: 0.5}\n",
    "empty.yaml": "",
    "text.yaml": "just text",
    "list.yaml": "- 1\n- 2\n",
    "no_version.yaml": "passes: []\n",
    "version_2.yaml": "version: 2\npasses: []\n",
    "version_text.yaml": "version: '1'\npasses: []\n",
    "version_true.yaml": "version: true\npasses: []\n",
    "no_passes.yaml": "version: 1\n",
    "passes_text.yaml": "version: 1\npasses: cluster_merge\n",
    "unknown.yaml": "version: 1\npasses: [prune]\n",
    "misspelt.yaml": "version: 1\npasses: [cluster_merge: {kep: 0.5}]\n",
    "two.yaml": "version: 1\npasses: [{cluster_merge: {}, zip: {}}]\n",
    "twice.yaml": "version: 1\nversion: 1\npasses: []\n",
    "tab.yaml": "version: 1\npasses:\n\t- zip\n",
    "open.yaml": "version: 1\npasses: [\n",
    "tag.yaml": "version: 1\npasses: [!!python/object/apply:os.system ['true']]\n",
    "keep.yaml": "version: 1\npasses: [cluster_merge: {keep: 1.5}]\n",
    "keep_nan.yaml": "version: 1\npasses: [cluster_merge: {keep: .nan}]\n",
    "keep_text.yaml": "version: 1\npasses: [cluster_merge: {keep: half}]\n",
    "keep_huge.yaml": f"version: 1\npasses: [cluster_merge: {{keep: {'9' * 400}}}]\n",
    "keep_time.yaml": "version: 1\npasses: [cluster_merge: {keep: 1:30}]\n",
    "glob.yaml": "version: 1\npasses: [cluster_merge: {keep: {bodi.0: 0.5}}]\n",
    "zip.yaml": "version: 1\ninputs: [[2, 3, 8, 8]]\npasses: [zip]\n",
    "order.yaml": "version: 1\npasses: [atom_factorize, fold_batch_norm]\n",
    "data.yaml": "version: 1\ninputs: [[2, 3, 8, 8]]\npasses: [cluster_merge: {clustering: reconstruction}]\n",
    "shape.yaml": "version: 1\ninputs: [[2, 3, 0, 8]]\npasses: [cluster_merge]\n",
    "shapes_text.yaml": "version: 1\ninputs: 2x3x8x8\npasses: [cluster_merge]\n",
    "huge_input.yaml": "version: 1\ninputs: [[2, 3, 100000, 100000]]\npasses: [cluster_merge]\n",
    "other_input.yaml": "version: 1\ninputs: [[2, 4, 8, 8]]\npasses: [cluster_merge]\n",
}
SOURCES = {
    "network.py": NETWORK,
    "syntax.py": "def net(:\n",
    "raises.py": "raise KeyError('on import')\n",
    "leaves.py": "import sys\nsys.exit(0)\n",
    "reads_argv.py": "import argparse\nargparse.ArgumentParser().parse_args(['--nothing'])\n",
    "needs.py": "import no_such_package_anywhere\n",
    "null.py": "x = 1\0\n",
    "empty.py": "",
    "text.txt": "nothing of use\n",
}


def write_files(folder: Path) -> None:
    """Everything that the command lines below name: plans, models, weights and calibration data, whole and damaged."""
    for name, text in {**PLANS, **SOURCES}.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.yaml").write_bytes(b"version: 1\npasses: [\xe4]\n")
    (folder / "latin.py").write_bytes(b"name = '\xe4'\n")
    for name in ("folder", "folder.py", "folder.yaml", "folder.pt", "folder.npz", "folder.onnx", "folder.svg"):
        (folder / name).mkdir()
    (folder / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(folder / "pipe")
    _write_weights(folder)
    _write_data(folder)


def _write_weights(folder: Path) -> None:
    space: dict[str, object] = {}
    exec(NETWORK, space)
    good = space["Net"]().state_dict()  # type: ignore[operator]
    torch.save(good, folder / "good.pt")
    torch.save({"model": good, "ema": good}, folder / "two.pt")
    torch.save({"epoch": 3}, folder / "none.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({}, folder / "nothing.pt")
    torch.save({**good, "more": torch.zeros(1)}, folder / "more.pt")
    torch.save({**good, "head.bias": torch.zeros(7)}, folder / "shape.pt")
    torch.save({**good, "head.bias": torch.full((5,), float("nan"))}, folder / "nan.pt")
    torch.save({**good, "head.bias": torch.zeros(5, dtype=torch.complex64)}, folder / "complex.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "pickled.pt")
    content = (folder / "good.pt").read_bytes()
    (folder / "cut.pt").write_bytes(content[: len(content) // 2])
    (folder / "zero.pt").write_bytes(b"")
    (folder / "cut.safetensors").write_bytes(b"\xff" * 40)


def _write_data(folder: Path) -> None:
    random = np.random.default_rng(0)
    good = random.standard_normal((6, 3, 8, 8), np.float32)
    np.savez(folder / "good.npz", x=good)
    np.savez(folder / "wide.npz", x=random.standard_normal((6, 4, 8, 8), np.float32))
    np.savez(folder / "flat.npz", x=np.float32(3.0))
    np.savez(folder / "counts.npz", x=good, y=np.zeros(3))
    np.savez(folder / "no_sample.npz", x=good[:0])
    np.savez(folder / "text.npz", x=np.array(["a", "b"]))
    np.savez(folder / "object.npz", x=np.array([{}, {}], dtype=object))
    np.savez(folder / "whole.npz", x=np.zeros((6, 3, 8, 8), np.int64))
    np.savez(folder / "double.npz", x=good.astype(np.float64))
    np.savez(folder / "complex.npz", x=good.astype(np.complex64))
    np.savez(folder / "nan.npz", x=np.full((6, 3, 8, 8), np.nan, np.float32))
    np.savez(folder / "nothing.npz")
    np.savez(folder / "record.npz", x=np.zeros(3, dtype=[("a", "f4"), ("b", "i8")]))
    np.savez(folder / "swapped.npz", x=good.astype(">f4"))
    np.save(folder / "wide.npy", random.standard_normal((6, 4, 8, 8), np.float32))
    content = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(content[: len(content) // 2])
    (folder / "bits.npz").write_bytes(
        bytes([*content[:200], *(each ^ 0x5A for each in content[200:400]), *content[400:]])
    )
    (folder / "zero.npz").write_bytes(b"")
    np.save(folder / "good.npy", good)
    content = (folder / "good.npy").read_bytes()
    (folder / "cut.npy").write_bytes(content[:200])
    (folder / "header.npy").write_bytes(content.replace(b"(6, 3, 8, 8)", b"(6, 3, 8, 9)"))
    _claims(folder / "claims.npz", "(99999999999999, 3, 8, 8)")
    _claims(folder / "code.npz", "__import__('os').getcwd()")
    with zipfile.ZipFile(folder / "no_arrays.npz", "w") as archive:
        archive.writestr("readme.txt", "nothing")


def _claims(path: Path, shape: str) -> None:
    """An archive with an array whose head says that it has this shape, and that holds nothing."""
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (63 - (10 + len(head)) % 64) + b"\n"
    stream = io.BytesIO()
    stream.write(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", stream.getvalue())


# A model and the inputs that it takes; a place to write to; a budget.
M = "{d}/network.py:net"
MI = f"{M} --input 2x3x8x8"
OUT = "-o {d}/out.onnx"
P = "-o {d}/out.yaml"
B = "--macs 0.5"
PLAN = "--plan {d}/plan.yaml"

WRONG: list[tuple[str, str]] = [
    # what is not there
    ("prune", "No such command 'prune'"),
    ("--no-such-flag", "No such option: --no-such-flag"),
    ("inspect", "Missing argument 'MODEL'"),
    ("plan", "Missing argument 'MODEL'"),
    ("compile", "Missing argument 'MODEL'"),
    (f"inspect {MI} more", "unexpected extra argument"),
    (f"inspect {MI} --nothing", "No such option: --nothing"),
    (f"inspect {MI} --sed 3", "No such option: --sed"),
    (f"inspect {MI} --macs 0.5", "No such option: --macs"),
    (f"plan {MI} {B}", "Missing option '--output'"),
    (f"compile {MI} {B}", "Missing option '--output'"),
    (f"compile {MI} {B} -o", "requires an argument"),
    (f"inspect {M} --input", "requires an argument"),
    ("demo more", "unexpected extra argument"),
    ("demo --macs 0.5", "No such option: --macs"),
    # models
    ("inspect ''", "'' is not a model; write torchvision:NAME"),
    ("inspect resnet18", "'resnet18' is not a model"),
    ("inspect :", "':' is not a model"),
    ("inspect torchvision:", "'torchvision:' is not a model"),
    ("inspect :resnet18", "':resnet18' is not a model"),
    ("inspect keras:net", "'keras' is not torchvision, timm or a .py file"),
    ("inspect torchvision:resnet19", "torchvision has no model 'resnet19'; did you mean 'resnet18'"),
    ("inspect torchvision:ResNet18", "torchvision has no model 'ResNet18'"),
    ("inspect torchvision:../resnet18", "torchvision has no model"),
    ("inspect 'torchvision:resnet18 '", "torchvision has no model"),
    ("inspect timm:no_such_net", "timm has no model 'no_such_net'"),
    ("inspect timm:hf_hub:a/b", "is not a model"),
    ("inspect {d}/no.py:net", "no.py does not exist or is not a file"),
    ("inspect {d}/folder.py:net", "folder.py does not exist or is not a file"),
    ("inspect {d}/network.py", "is not a model"),
    ("inspect {d}/network.py:", "is not a model"),
    ("inspect {d}/text.txt:net", "is not torchvision, timm or a .py file"),
    ("inspect {long}.py:net", "does not exist or is not a file"),
    ("inspect {d}/network.py:nets", "network.py has no function 'nets'; it has Net, Takes"),
    ("inspect {d}/network.py:number", "network.py has no function 'number'"),
    ("inspect {d}/network.py:Net.forward", "network.py has no function 'Net.forward'"),
    ("inspect {d}/empty.py:net", "empty.py has no function 'net'; it has none at all"),
    ("inspect {d}/syntax.py:net", "syntax.py cannot be imported: SyntaxError"),
    ("inspect {d}/raises.py:net", "raises.py cannot be imported: KeyError"),
    ("inspect {d}/leaves.py:net", "leaves.py cannot be imported: SystemExit"),
    ("inspect {d}/reads_argv.py:net", "reads_argv.py cannot be imported: SystemExit"),
    ("inspect {d}/needs.py:net", "needs.py cannot be imported: ModuleNotFoundError: No module named"),
    ("inspect {d}/null.py:net", "null.py cannot be imported: "),
    ("inspect {d}/latin.py:net", "latin.py cannot be imported: "),
    # inputs
    (f"inspect {M}", "what net takes is not known; give the shape of every input: --input"),
    (f"inspect {M} --input ''", "'' is not an input shape"),
    (f"inspect {M} --input x", "--input: 'x' is not an input shape; write 1x3x224x224"),
    (f"inspect {M} --input 1,3,8,8", "'1,3,8,8' is not an input shape"),
    (f"inspect {M} --input 1x3x8x", "'1x3x8x' is not an input shape"),
    (f"inspect {M} --input -1x3x8x8", "'-1x3x8x8' is not an input shape"),
    (f"inspect {M} --input 1x3x8.5x8", "is not an input shape"),
    (f"inspect {M} --input '1x3x8x8 '", "is not an input shape"),
    (f"inspect {M} --input 1X3X8X8", "is not an input shape"),
    (f"inspect {M} --input \u0661x\u0663", "is not an input shape"),
    (f"inspect {M} --input 0x3x8x8", "has an empty dimension"),
    (f"inspect {M} --input 1x3x8x8:float", "is not an input shape"),
    (f"inspect {M} --input 1x3x8x8:", "is not an input shape"),
    (f"inspect {M} --input 1x3x8x8:complex64", "is not an input shape"),
    (f"inspect {M} --input 1x3x8x8:int64", "--input"),
    (f"inspect {M} --input 1x3x8x8:bool", "--input"),
    (f"inspect {M} --input 1x3x99999999999999999999x8", "--input"),
    (f"inspect {M} --input 1x3x{'9' * 5000}", "--input"),
    (f"inspect {M} --input 1x3x100000x100000", "--input"),
    (f"inspect {M} --input 65536x65536", "--input"),
    (f"inspect {M} --input 1{'x1' * 2000}", "--input"),
    (f"inspect {M} {' '.join(['--input 1x3x4096x4096'] * 40)}", "--input"),
    (f"inspect {M} {'--input 1x3x8x8 ' * 200}", "Net"),
    ("inspect {d}/network.py:Grumbles --input 2x3", "--input: Grumbles itself fails on the example inputs"),
    (f"inspect {M} --input 1x3x2x2", "Net itself fails on the example inputs"),
    (f"inspect {M} --input 1x7x8x8", "Net itself fails on the example inputs"),
    (f"inspect {M} --input 1x3", "Net itself fails on the example inputs"),
    (f"inspect {M} --input 3", "Net itself fails on the example inputs"),
    # weights
    (f"inspect {MI} --weights {{d}}/no.pt", "no.pt does not exist or is not a file"),
    (f"inspect {MI} --weights ''", "does not exist or is not a file"),
    (f"inspect {MI} --weights {{d}}/folder.pt", "folder.pt does not exist or is not a file"),
    (f"inspect {MI} --weights {{long}}.pt", "does not exist or is not a file"),
    (f"inspect {MI} --weights {{d}}/plan.yaml", "plan.yaml is not a weights file"),
    (f"inspect {MI} --weights {{d}}/cut.pt", "cut.pt cannot be read as weights"),
    (f"inspect {MI} --weights {{d}}/zero.pt", "zero.pt cannot be read as weights"),
    (f"inspect {MI} --weights {{d}}/pickled.pt", "pickled.pt cannot be read as weights"),
    (f"inspect {MI} --weights {{d}}/cut.safetensors", "cut.safetensors cannot be read as weights"),
    (f"inspect {MI} --weights {{d}}/none.pt", "none.pt holds no state dict"),
    (f"inspect {MI} --weights {{d}}/list.pt", "list.pt holds no state dict"),
    (f"inspect {MI} --weights {{d}}/nothing.pt", "nothing.pt holds no state dict"),
    (f"inspect {MI} --weights {{d}}/two.pt", "holds several state dicts"),
    (f"inspect {MI} --weights {{d}}/two.pt --weights-key mine", "nothing under the key 'mine' (--weights-key)"),
    (f"inspect {MI} --weights {{d}}/good.pt --weights-key ''", "--weights-key"),
    (f"inspect {MI} --weights {{d}}/good.pt --weights-key head.bias", "--weights-key"),
    (f"inspect {MI} --weights {{d}}/good.pt --strip-prefix module.", "do not begin with 'module.' (--strip-prefix)"),
    (f"inspect {MI} --weights-key ema", "--weights-key and --strip-prefix say how to read --weights"),
    (f"inspect {MI} --strip-prefix a.", "--weights-key and --strip-prefix say how to read --weights"),
    (f"inspect {MI} --weights {{d}}/more.pt", "unexpected (1): more"),
    (f"inspect {MI} --weights {{d}}/shape.pt", "head.bias: 7 in the file, 5 in the model"),
    (f"inspect {MI} --weights {{d}}/nan.pt", "not finite (1): head.bias"),
    (f"inspect {MI} --weights {{d}}/complex.pt", "other kinds of numbers (1): head.bias"),
    # scope, explain, graph
    (f"inspect {MI} --scope bodi", "--scope"),
    (f"inspect {MI} --scope ''", "--scope"),
    (f"inspect {MI} --scope body.99", "--scope"),
    (f"inspect {MI} --scope '*'", "--scope"),
    (f"inspect {MI} --explain bodi.0", "--explain: there is no channel group 'bodi.0'; did you mean 'body.0'"),
    (f"inspect {MI} --explain ''", "--explain: there is no channel group ''"),
    (f"inspect {MI} --explain {'x' * 5000}", "--explain: there is no channel group"),
    (f"inspect {MI} --graph {{d}}/groups.txt", "--graph: "),
    (f"inspect {MI} --graph {{d}}/groups", "--graph: "),
    (f"inspect {MI} --graph {{d}}/no/groups.svg", "--graph: "),
    (f"inspect {MI} --graph {{d}}/folder.svg", "--graph: "),
    (f"inspect {MI} --graph ''", "--graph: "),
    (f"inspect {MI} --graph {{d}}/pipe", "--graph: "),
    (f"inspect {MI} --mode training", "--mode"),
    (f"inspect {MI} --mode ''", "--mode"),
    # seeds
    *(
        (f"{command} --seed {seed}", "--seed")
        for seed in (-1, 2**32, 10**30, "1.5", "x", "nan", "''", "9" * 5000, "1e3")
        for command in (f"plan {MI} {B} {P}", f"compile {MI} {B} {OUT}", "demo")
    ),
    # budgets
    *(
        (f"{command} --{what} {amount}", f"--{what}")
        for what, amounts in {
            "macs": ("inf", "-inf", "nan", "0", "-0.5", "1e400", "x", "''", "0.5x", "50%", "1e-300", "1.5", "0x10"),
            "params": ("inf", "nan", "0", "-3", "1e-9", "2"),
            "bytes": ("inf", "nan", "-1", "1e-9", "7"),
            "latency": ("inf", "nan", "0", "-1"),
        }.items()
        for amount in amounts
        for command in (f"plan {MI} {P}",)
    ),
    (f"compile {MI} {OUT} --macs inf", "--macs"),
    (f"compile {MI} {OUT} --bytes nan", "--bytes"),
    (f"compile {MI} {OUT} --params 1e-9", "--params"),
    (f"plan {MI} {P}", "give a budget, --macs, --params, --bytes or --latency; got none"),
    (f"compile {MI} {OUT}", "give a budget, --macs, --params, --bytes or --latency; got none"),
    (f"plan {MI} {P} --macs 0.5 --params 9", "--params: 9 params is out of reach"),
    (
        f"plan {MI} {P} --macs 0.5 --latency 1 --bytes 3",
        "--latency is met by measuring, alone; leave it out, or leave out --macs and --bytes",
    ),
    (f"compile {MI} {OUT} {PLAN} {B}", "--plan and a budget are both given"),
    *(
        (f"{command} {options}", said)
        for command in (f"compile {MI} {OUT} {B}", f"plan {MI} {P} {B}")
        for options, said in {
            "--scope bodi": "--scope: ",
            "--outputs logits": "--outputs: the model returns nothing that 'logits' names; it returns output",
            "--outputs 1": "--outputs: the model returns nothing that 1 names",
            "--outputs 0,": "--outputs: a name is empty",
            "--dynamic heigth": "--dynamic: 'heigth' is no size; write batch, length",
            "--dynamic height,length": "--dynamic: no input has 'length'",
            "--dynamic 7": "--dynamic: no input has 7; they are 2x3x8x8",
        }.items()
    ),
    (f"inspect {MI} --outputs logits", "--outputs: the model returns nothing that 'logits' names"),
    # calibration data
    *(
        (f"{command} --calibration {file}", text)
        for file, text in {
            "{d}/no.npz": "--calibration: ",
            "{d}/folder.npz": "--calibration: ",
            "''": "--calibration: ",
            "{long}.npz": "--calibration: ",
            "{d}/zero.npz": "zero.npz cannot be read as calibration data",
            "{d}/cut.npz": "cut.npz cannot be read as calibration data",
            "{d}/bits.npz": "bits.npz cannot be read as calibration data",
            "{d}/claims.npz": "claims.npz cannot be read as calibration data",
            "{d}/code.npz": "code.npz cannot be read as calibration data",
            "{d}/no_arrays.npz": "--calibration: ",
            "{d}/nothing.npz": "--calibration: ",
            "{d}/cut.npy": "cut.npy cannot be read as calibration data",
            "{d}/header.npy": "header.npy cannot be read as calibration data",
            "{d}/plan.yaml": "plan.yaml cannot be read as calibration data",
            "{d}/good.pt": "--calibration: ",
            "{d}/flat.npz": "--calibration: ",
            "{d}/counts.npz": "holds arrays of [3, 6] samples",
            "{d}/no_sample.npz": "--calibration: ",
            "{d}/text.npz": "--calibration: ",
            "{d}/object.npz": "object.npz cannot be read as calibration data",
            "{d}/record.npz": "--calibration: ",
            "{d}/wide.npz": "--calibration: ",
            "{d}/wide.npy": "--calibration: ",
            "{d}/whole.npz": "--calibration: ",
            "{d}/complex.npz": "--calibration: ",
        }.items()
        for command in (f"plan {MI} {B} {P}", f"compile {MI} {PLAN} {OUT}")
    ),
    (f"plan {MI} {B} {P} --calibration {{d}}/nan.npz", "--calibration: "),
    # plan files
    *(
        (f"compile {MI} {OUT} --plan {{d}}/{file}", f"{file}: {text}")
        for file, text in {
            "no.yaml": "cannot be read: No such file",
            "folder.yaml": "cannot be read: Is a directory",
            "loop.yaml": "cannot be read: ",
            "network.py": "",
            "good.pt": "not UTF-8",
            "latin.yaml": "not UTF-8 text",
            "empty.yaml": "a plan is a mapping",
            "text.yaml": "a plan is a mapping",
            "list.yaml": "a plan is a mapping",
            "no_version.yaml": "version: missing",
            "version_2.yaml": "version: 2 is unknown",
            "version_text.yaml": "version: '1' is unknown",
            "version_true.yaml": "version: True is unknown",
            "no_passes.yaml": "passes: missing",
            "passes_text.yaml": "passes: 'cluster_merge' is not a list",
            "unknown.yaml": "passes[0].prune: unknown pass",
            "misspelt.yaml": "passes[0].cluster_merge.kep: unknown option",
            "two.yaml": "passes[0]: one item names one pass",
            "twice.yaml": "not valid YAML: line 2",
            "tab.yaml": "not valid YAML: line 3",
            "open.yaml": "not valid YAML: line 3",
            "tag.yaml": "not valid YAML: line 2",
            "keep.yaml": "passes[0].cluster_merge.keep: 1.5",
            "keep_nan.yaml": "passes[0].cluster_merge.keep: nan",
            "keep_text.yaml": "passes[0].cluster_merge.keep: 'half'",
            "keep_huge.yaml": "",
            "keep_time.yaml": "",
            "order.yaml": "passes[1].fold_batch_norm: stands behind",
            "shape.yaml": "inputs[0][2]: 0 is not a size",
            "shapes_text.yaml": "inputs: '2x3x8x8' is not a list of shapes",
        }.items()
    ),
    (f"compile {MI} {OUT} --plan {{long}}.yaml", "cannot be read: "),
    (f"compile {MI} {OUT} --plan ''", ""),
    (f"compile {MI} {OUT} --plan {{d}}/glob.yaml", "body.0"),
    (f"compile {MI} {OUT} --plan {{d}}/zip.yaml", "zip"),
    (f"compile {MI} {OUT} --plan {{d}}/data.yaml", "--calibration"),
    (f"compile {M} {OUT} --plan {{d}}/huge_input.yaml", "inputs"),
    (f"compile {M} {OUT} --plan {{d}}/other_input.yaml", "Net itself fails on the example inputs"),
    (f"compile {MI} {OUT} {PLAN} --scope nowhere", "--scope"),
    # places to write to
    *(
        (f"{command} {flag} {place}", f"--{name}: ")
        for command, flag, name in (
            (f"compile {MI} {PLAN}", "-o", "output"),
            (f"plan {MI} {B}", "-o", "output"),
            (f"compile {MI} {PLAN} {OUT}", "--save", "save"),
            (f"plan {MI} {B} {P}", "--cache", "cache"),
            (f"plan {MI} {B} {P}", "--plot", "plot"),
        )
        for place in ("{d}/no/file.svg", "{d}/folder.svg", "{d}/text.txt/file.svg", "{d}/pipe", "''", "{long}.svg")
    ),
    (f"plan {MI} {B} {P} --plot {{d}}/x.zzz", "--plot: "),
    (f"plan {MI} {B} {P} --plot {{d}}/x", "--plot: "),
    (f"plan {MI} {B} {P} --plot {{d}}/out.yaml", "--plot"),
    (f"plan {MI} {B} {P} --cache {{d}}/out.yaml", "--output and --cache both name"),
    (f"plan {MI} {B} {P} --cache {{d}}/plan.yaml", "is not a file of measurements"),
    (f"plan {MI} {B} {P} --cache {{d}}/good.pt", "is not a file of measurements"),
    (f"plan {MI} {B} -o {{d}}/network.py", "--output"),
    (f"plan {MI} {B} -o {{d}}/good.npz --calibration {{d}}/good.npz", "--output and --calibration both name"),
    (f"compile {MI} {PLAN} -o {{d}}/plan.yaml", "--output and --plan both name"),
    (f"compile {MI} {PLAN} -o {{d}}/folder/../plan.yaml", "--output and --plan both name"),
    (f"compile {MI} {PLAN} {OUT} --save {{d}}/out.onnx", "--output and --save both name"),
    (f"compile {MI} {PLAN} {OUT} --weights {{d}}/good.pt --save {{d}}/good.pt", "--save and --weights both name"),
    ("demo --out {d}/text.txt", "--out: "),
    ("demo --out {d}/no/folder", "--out: "),
    ("demo --out {long}", "--out: "),
    # opsets
    *(
        (f"compile {MI} {PLAN} {OUT} --opset {opset}", "--opset")
        for opset in (0, -1, 1, 999, 10**20, "x", "18.5", "''")
    ),
]

BROKEN: list[tuple[str, str]] = [
    ("inspect timm:resnet18.no_such_tag", "timm:resnet18.no_such_tag could not be built: RuntimeError"),
    ("inspect {d}/network.py:Takes --input 1x3", "network.py:Takes could not be built: TypeError"),
    ("inspect {d}/network.py:nothing --input 1x3", "network.py:nothing returned NoneType"),
    ("inspect {d}/network.py:a_class --input 1x3", "network.py:a_class returned type"),
    ("inspect {d}/network.py:raises --input 1x3", "could not be built: RuntimeError: no such layer"),
    ("inspect {d}/network.py:leaves --input 1x3", "could not be built: SystemExit: 3"),
    ("inspect {d}/network.py:deep --input 1x3", "could not be built: RecursionError"),
    ("inspect {d}/network.py:says_nothing --input 1x3", "could not be built: ValueError"),
    ("inspect {d}/network.py:Undecided --input 2x3", "network.py:"),
    ("inspect {d}/network.py:Leaves --input 2x3", "SystemExit"),
]

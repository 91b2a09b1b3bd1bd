"""Small models on which random cases found something wrong: what is done with each must come out right."""

from __future__ import annotations

import pytest

from fuzz.case import Case, check
from fuzz.program import Input, Program

FOUND: dict[str, tuple[str, int, str, tuple[Input, ...]]] = {}
"""Name -> the job, its seed, the forward and layers as text, the inputs."""


def found(name: str, job: str, seed: int, layers: dict[str, str], forward: str, *inputs: Input) -> None:
    """Register a model; `forward` is its body."""
    state = [f"self.{key} = {made}" for key, made in layers.items()]
    head = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    body = ["", f"    def forward(self, {', '.join(each.name for each in inputs)}):"]
    lines = [f"        {line}" for line in forward.strip().split("\n")]
    text = "\n".join([*head, *(f"        {line}" for line in state), *body, *lines]) + "\n"
    FOUND[name] = job, seed, text, inputs


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    job, seed, text, inputs = FOUND[name]
    outcome = check(Case(seed, job, Program.given(text, *inputs)))
    assert outcome.status == "ok", f"{outcome.stage}: {outcome.kind}: {outcome.detail}"


found(
    "a size minus one is divided by, and may be one",
    "merge_again",
    70225,
    {"a1": "nn.Linear(6, 16)", "a6": "nn.Linear(16, 3)", "a8": "nn.Linear(6, 3)"},
    """
y = x[:, 1:]
z = F.tanhshrink(y)
return self.a6(self.a1(x)), self.a8(z.mul(y).sub(z))
""",
    Input("x", (3, 6), dynamic=(1,)),
)

found(
    "a size of one that was to be open is told to be fixed",
    "nothing",
    70101,
    {"a1": "nn.Linear(8, 12)"},
    "return self.a1(x).chunk(3, -1)[0]",
    Input("x", (1, 8), dynamic=(1,)),
)

found(
    "zip: the second input is read by later layers only",
    "zip_models",
    32,
    {"a1": "nn.Linear(6, 4)", "a3": "nn.Linear(6, 16)", "a9": "nn.Linear(16, 8)", "a14": "nn.Linear(4, 3)"},
    "return [self.a14(self.a1(x).tanh()), self.a9(self.a3(z).tanh())]",
    Input("x", (6,)),
    Input("z", (6,)),
)

found(
    "zip: a third model after one whose heads met no shared input",
    "zip_models",
    30004,
    {"a1": "nn.Linear(4, 6)", "a8": "nn.Linear(6, 27)", "a9": "nn.Linear(9, 6)", "a4": "nn.Linear(6, 4)"},
    """
y = F.gelu(self.a1(x).relu())
q, k, v = (v.unflatten(-1, (-1, 3)).transpose(1, 2) for v in self.a8(y).chunk(3, -1))
z = self.a9(F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).reshape(x.shape[0], -1, 9)) + y
return self.a4(z).mean(2), y
""",
    Input("x", (4, 4)),
)

found(
    "channels that groups of a convolution read unequally often keep equal counts alone",
    "merge",
    300426,
    {
        "a6": "nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1, output_padding=1, groups=3)",
        "p9": "nn.Parameter(torch.randn(4, 3, 3, 3) * 0.3)",
        "p10": "nn.Parameter(torch.randn(4) * 0.5)",
    },
    "return F.conv2d(self.a6(x), self.p9, self.p10, padding=1, groups=2)",
    Input("x", (3, 5, 7)),
)

found(
    "what a norm over one channel gives is pooled and read by a layer that is fitted",
    "lossy",
    300418,
    {
        "a1": "nn.Conv1d(2, 8, 2, stride=2)",
        "p9": "nn.Parameter(torch.randn(4, 4, 3) * 0.3)",
        "p10": "nn.Parameter(torch.randn(4, 4, 3) * 0.3)",
        "a12": "nn.GroupNorm(2, 4)",
        "a14": "nn.Linear(4, 4)",
        "a15": "nn.Linear(4, 4)",
        "a18": "nn.Conv1d(4, 3, 1)",
    },
    """
y = self.a12(F.conv1d(self.a1(x).relu(), torch.cat([self.p9, self.p10], 1), padding=1))
s = self.a15(self.a14(y.flatten(2).mean(2)).relu()).sigmoid()
return [self.a18(y * s[:, :, None])]
""",
    Input("x", (2, 8)),
)

"""Writes in place: the graph computes what the model does, with its dtypes and its gradients, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from in_place_programs import Program, check
from torch import Tensor, nn

import graphzip as gz
from graphzip.tracing.trace import trace

EXACT = {
    # the dtype of what is written
    "narrow += wide": "h = v0.to(torch.float32); h += self.q",
    "narrow.mul_(wide)": "h = v0.detach().to(torch.bfloat16); h.mul_(self.q.detach()); h = h * v0",
    "narrow[...] = wide": "h = v0.to(torch.float32); h[:, 1:] = v0[:, 1:]",
    "copy_ to another dtype": "h = torch.zeros_like(v0, dtype=torch.float32); h.copy_(v0)",
    "copy_ to integers": "h = torch.zeros_like(v0, dtype=torch.long); h.copy_(v0 * 5)",
    "copy_ of a row": "h = torch.zeros_like(v0); h.copy_(self.q)",
    "integers *= integers": "h = (v0 * 3).long(); h *= 2; h //= 3",
    "comparison in place": "h = v0 * 1; h.gt_(0)",
    "logic in place": "h = v0 * 1; h.logical_and_(v0 > 0); h = h * v0",
    "bool |=": "h = v0 > 0; h |= v0 < -0.5; h &= v0 > -1; h ^= v0 > 0.3",
    "bool -> float in place": "h = v0 * 1; h.logical_not_()",
    "integers <<=": "h = (v0 * 3).long(); h <<= 1; h >>= 2",
    "floor_divide_": "h = v0 * 1; h.floor_divide_(0.3); h //= 0.7",
    # names of one memory that no schema tells
    "einsum": "h = torch.einsum('abc->cab', v0); h.mul_(2); h = v0",
    "no-op to": "h = v0.to(torch.float64); h += 1; h = v0",
    "to makes a copy": "h = v0.to(torch.float32); h += 1; h = v0",
    "reshape of contiguous": "h = v0.reshape(-1, 6); h += 1; h = v0",
    "reshape that copies": "h = v0.mT.reshape(v0.shape[0], 24); h += 1; h = v0",
    "contiguous": "h = v0.contiguous(); h += 1; h = v0",
    "contiguous that copies": "h = v0.mT.contiguous(); h += 1; h = v0",
    "flatten": "h = v0.flatten(1); h[:, 1:3] = 5; h = v0",
    "view_as, reshape_as": "h = v0.view_as(v0); h += 1; k = v0.reshape_as(h); k *= 2; h = v0",
    "broadcast_tensors": "h = torch.broadcast_tensors(v0, self.q)[0]; h += 1; h = v0",
    "real": "h = v0.real; h += 1; h = v0",
    "atleast_3d, ravel": "h = torch.atleast_3d(v0).ravel(); h += 1; h = v0",
    "chunk of complex": "z = torch.view_as_complex(v0.reshape(-1, 4, 3, 2)); z.mul_(2); h = torch.view_as_real(z)",
    "view_as_real": "z = torch.complex(v0, v0); torch.view_as_real(z)[..., 0].mul_(3); h = torch.view_as_real(z * 1)",
    "real and imag": "z = torch.complex(v0, v0 * 2); z.real.mul_(3); z.imag += 1; h = torch.view_as_real(z * 1)",
    "tuple of topk": "a, b = v0.topk(2); a /= a.sum(-1, keepdim=True); b += 1; h = a * b",
    "max and sort": "a = v0.max(1)[0]; a *= 2; b = v0.sort(1)[0]; b[:, 0] = 1; h = a.sum() + b",
    "var_mean": "a, b = torch.var_mean(v0, 1); a += 1; b[..., 0] *= 2; h = a + b",
    # writes through views
    "permute": "h = v0.permute(2, 0, 1); h += 1; h[0] = 2; h = v0",
    "squeeze": "a = v0[:, :1]; a.squeeze(1).mul_(2); a.squeeze(-2).add_(1); h = v0",
    "squeeze of several": "a = v0[:, :1, :1]; a.squeeze((1, 2)).mul_(2); h = v0",
    "unsqueeze": "v0.unsqueeze(1).mul_(2); v0[:, None, 1].add_(1); h = v0",
    "narrow": "v0.narrow(1, 1, 2).mul_(2); v0.narrow(-1, -2, 2).add_(1); h = v0",
    "movedim": "v0.movedim(1, 0)[1] = 3; v0.movedim((1, 2), (0, 1)).mul_(2); h = v0",
    "swapaxes, T, mT": "v0.swapaxes(1, 2)[:, 0] *= 2; v0.mT[:, 1] += 1; h = v0",
    "diagonal": "v0.diagonal(0, 1, 2).mul_(2); v0.diagonal(-1, 2, 1).fill_(3); h = v0",
    "unfold": "v0.unfold(2, 2, 2)[:, :, 1] *= 2; h = v0",
    "windows of unfold": "w = v0.unfold(2, 3, 2); w[:, :, 0, 1] = 7; h = v0 + w.sum()",
    "expand": "e = v0.expand(2, -1, -1, -1); e[1, :, 0] = 3; h = v0 + e[0]",
    "split": "a = v0.detach().clone(); a.split([1, 3], 1)[1].mul_(2); h = a * v0",
    "parts of split": "a = v0.detach().clone(); b, c = a.chunk(2, 1); b += c; c *= b; h = a * v0",
    "unbind": "a = v0.detach().clone(); a.unbind(1)[2].mul_(2); a.unbind()[0].zero_(); h = a * v0",
    "view and unflatten": "v0.view(-1, 2, 2, 6)[:, 1, 0] = 2; v0.unflatten(2, (3, 2))[..., 1] *= 3; h = v0",
    "as_strided": "a = v0 * 1; a.as_strided((4, 6), (6, 1)).mul_(2); h = a",
    "one position": "v0[:, 0] *= 2; h = v0",
    "one row": "v0[0].mul_(3); v0[-1] += 1; h = v0",
    "every second": "v0[..., 1::2] += v0[..., ::2]; h = v0",
    "deep": "v0[:, 1:][:, :2].transpose(1, 2)[..., 0].mul_(2); h = v0",
    # stale views
    "views read afterwards": "a, b = v0[:, 0], v0[:, 1:]; v0.mul_(2); h = a.sum() + b",
    "sibling written": "a, b = v0[:, :2], v0[:, 1:]; a.mul_(2); b.add_(1); a.sub_(3); h = a.sum() + b",
    "what was read before": "a = v0 * 1; r.append(v0[:, 0] * 1); v0.relu_(); h = a + v0",
    "chain of writes": "h = v0.mul_(2).add_(1).relu_(); h[:, 0].neg_().sub_(1); h = h + v0",
    # other operators
    "mask": "v0[v0 > 0.2] = 1; h = v0",
    "mask of rows": "v0[v0.sum((1, 2)) > 0] = 0; h = v0",
    "list of indices": "v0[:, [0, 2]] += 1; v0[:, :, torch.tensor([1, 3])] = v0[:, :, [0, 2]] * 2; h = v0",
    "masked_fill_": "v0.masked_fill_(v0 > 0.2, 0.5); h = v0",
    "scatter_": "v0.scatter_(1, torch.zeros_like(v0[:, :1], dtype=torch.long), 2.0); h = v0",
    "scatter_add_": "v0.scatter_add_(1, torch.ones_like(v0, dtype=torch.long), v0 * 2); h = v0",
    "index_add_": "v0.index_add_(1, torch.tensor([0, 2]), v0[:, :2] * 1); h = v0",
    "index_copy_": "v0.index_copy_(2, torch.tensor([0, 2]), v0[..., :2] * 2); h = v0",
    "index_fill_": "v0.index_fill_(1, torch.tensor([3]), 2.0); h = v0",
    "addcmul_, lerp_": "v0.addcmul_(self.p, self.q, value=2).lerp_(self.p * 2, 0.3); h = v0",
    "clamp_, fill_, zero_": "v0.clamp_(-1, 1); v0[:, 0].fill_(2); v0[:, 1].zero_(); h = v0",
    "fill_diagonal_": "a = v0[0] @ v0[0].mT; a.fill_diagonal_(0.5); h = a + v0[0].sum()",
    "fill_diagonal_ of the batch": "a = v0.flatten(1); a = a @ a.T; a.fill_diagonal_(-1); h = a * 2",
    "transpose_ and the like": "a = v0 * 1; b = a[:, 0]; a.transpose_(1, 2); b *= 2; h = a",
    "t_": "a = v0[:, 0] * 1; a.t_(); a[0] = 3; h = a * 2",
    "dropout_": "F.dropout(v0, 0.5, False, inplace=True); v0.add_(1); h = v0",
    "cumsum_, tril_": "v0.cumsum_(1).tril_(); h = v0",
    "out=": "a, b = v0.detach().clone(), torch.zeros_like(v0); torch.add(a, 1, out=a[:, 0:4]); "
    "torch.mul(a, 2, out=b); h = a + b + v0",
    "out= of two": "d = v0.detach(); a, b = d.max(1); torch.min(d, 1, out=(a, b)); h = a + b + v0.sum()",
    "out= sums up in its dtype": "a = torch.zeros(4, 6); d = v0.detach().float(); torch.sum(d, 0, out=a); h = a + v0",
    "out= an empty tensor": "a = torch.empty(0, dtype=v0.dtype); torch.add(v0.detach(), 1, out=a); h = a + v0",
    "constant": "a = torch.tensor([1.0, 2.0, 3.0]); a[0] = 5; a *= 2; h = v0[..., :3] * a",
    "zeros": "a = torch.zeros_like(v0); a[:, 1:3] = v0[:, 1:3]; a[:, 0, 0] += self.q[0]; h = a",
    # gradients
    "detach": "v0.detach().mul_(2); h = v0 * v0",
    "part of detach": "v0[:, :2].detach()[..., 0].add_(self.q[0]); h = v0",
    "detach reads": "d = v0.detach(); v0.mul_(2); h = d * v0",
    "detach gets a gradient": "d = v0.detach() * 1; e = d.detach(); e.add_(self.q); h = v0 + d + e",
    "data": "v0.data.mul_(2); v0[:, 0].data[:, 1:] = 1; h = v0 * v0",
    "data read later": "d = v0.data; v0.mul_(2); h = d * v0 + F.linear(v0, self.p.data)[:, :, :1]",
    "infinite": "v0.masked_fill_(v0 > 0.5, float('inf')); v0.detach().mul_(2); h = v0.clamp(-3, 3)",
    "no_grad": "h = v0\nwith torch.no_grad():\n    h.mul_(2)\n    h[:, 0] = 1\n    h[:, 1:][:, 0] *= 3",
    "no_grad view": "with torch.no_grad():\n    a = v0[:, 1]\n    b = a * 2\n    a.add_(b)\nh = v0 + b.sum()",
    "no_grad reads": "a = v0[:, 0]\nwith torch.no_grad():\n    v0.add_(self.q)\n    b = a.sum()\nh = v0 + a.sum() + b",
    "no_grad to a constant": "a = torch.zeros(4, 6)\nwith torch.no_grad():\n    a.add_(self.q)\nh = a * v0",
    "no_grad in place and out": "with torch.no_grad():\n    h = v0.relu_()\nh = h * v0",
}


@pytest.mark.parametrize("name", EXACT)
def test_the_graph_computes_what_the_model_does(name: str) -> None:
    program = Program(tuple(EXACT[name].split("; ")) if "\n" not in EXACT[name] else (EXACT[name],), ("h", "v0"))
    kind, text = check(program.double().eval())
    assert kind == "exact", f"{kind}: {text}"


class Outside(nn.Module):
    """A forward that does one thing that is seen outside of it, or that cannot be said without memory."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("cache", torch.zeros(8, 6))
        self.__dict__["body"] = Program((line,), ("h",)).body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x, [])


INPUT = r"writes into its input 'x' in place; a compiled model has no side effects: .*clone first"
BUFFER = r"writes into the parameter or buffer 'cache' in place; a compiled model has no side effects"
REFUSED = {
    "input": ("v0 += 1; h = self.layer(v0)", INPUT),
    "view of the input": ("v0[:, 0].mul_(2); h = self.layer(v0)", INPUT),
    "another name of the input": ("v0.to(v0.dtype).reshape(-1).relu_(); h = self.layer(v0)", INPUT),
    "input that is not read again": ("h = self.layer(v0); v0.zero_()", INPUT),
    "buffer": ("self.cache[:, 0] = 1; h = self.layer(v0)", BUFFER),
    "cache": ("self.cache[2:3] = self.layer(v0).detach()[:1]; h = v0 @ self.cache.T", BUFFER),
    "overlapping": (
        "h = self.layer(v0).detach(); h.unfold(1, 2, 1).add_(1)",
        r"add_\S* .*writes several values to one place of the memory, made by aten.unfold.default",
    ),
    "part of several places": (
        "h = self.layer(v0).expand(3, -1, -1); h.diagonal(0, 0, 1).mul_(2)",
        r"mul_\S* .*writes into a view made by aten.diagonal.default; graphzip cannot carry that write back to",
    ),
    "assignment to data": (
        "h = self.layer(v0); h.data = h.data * 2",
        r"assignment to .data gives a tensor other memory",
    ),
    "other memory": (
        "h = self.layer(v0).detach(); h.set_(v0)",
        r"set_\S* .*writes in place and has no functional form",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_with_a_reason(name: str) -> None:
    line, reason = REFUSED[name]
    model, x = Outside(line.replace("; ", "\n")).eval(), torch.randn(4, 6)
    with pytest.raises(gz.TraceError, match=reason):
        trace(model, (x,))
    assert not model.cache.any()


def test_a_write_that_nobody_reads_needs_no_way_back() -> None:
    model = Outside("a = self.layer(v0).expand(3, -1, -1)\nb = a.diagonal(0, 0, 1).mul_(2)\nh = b + 1").eval()
    traced, x = trace(model, (torch.randn(4, 6),)), torch.randn(3, 6)
    torch.testing.assert_close(traced.module(x), model(x))


def test_memory_that_is_shared_by_a_batch_of_one_alone() -> None:
    """`y.T.reshape(-1)` is a copy, and a view of `y` where that has one row."""
    model = Outside("y = self.layer(v0)\ny.T.reshape(-1).mul_(2)\nh = y * 1").eval()
    compiled = gz.compile(model, gz.Plan([]), (torch.randn(4, 6),))
    x = torch.randn(3, 6)
    torch.testing.assert_close(compiled.module(x), model(x))
    assert any("x.shape[0] != 1" in note for note in compiled.report.notes)
    with pytest.raises(gz.InputShapeError, match=r"x.shape\[0\] != 1"):
        compiled.module(torch.randn(1, 6))


def test_a_dropout_that_gives_its_input_in_eval_mode_alone_is_noted() -> None:
    told = Outside("y = self.layer(v0)\nd = F.dropout(y, 0.5, self.training)\nd += 1\nh = y * 2").eval()
    traced, x = trace(told, (torch.randn(4, 6),)), torch.randn(3, 6)
    torch.testing.assert_close(traced.module(x), told(x))
    assert any("of which a dropout makes a copy in training mode" in note for note in traced.notes)
    usual = Outside("y = self.layer(v0)\nd = F.dropout(y, 0.5, self.training)\nd += 1\nh = d * 2").eval()
    assert not any("dropout" in note for note in trace(usual, (torch.randn(4, 6),)).notes)


def test_what_a_dropout_is_given_stays_apart_from_what_it_gives() -> None:
    """In eval mode both are one tensor; in training mode the residual must not be dropped."""
    model = Outside("y = self.layer(v0)\nh = y + 2 * F.dropout(y, 0.5, self.training)").eval()
    module, x = gz.compile(model, gz.Plan([]), (torch.randn(4, 6),)).module, torch.randn(50, 6)
    torch.testing.assert_close(module(x), model(x))
    ratio = module.train()(x)["h"] / model.layer(x)
    assert {round(value, 3) for value in ratio.flatten().tolist()} == {1.0, 5.0}

"""Growing, and what tells beforehand how far a network can be stored as factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factor_cases import IMAGE, block, layers, prepared, small
from planting import relative
from scipy.fft import idctn
from torch import nn

import graphzip as gz
from graphzip.analysis.coefficient_rank import effective_rank

pytestmark = pytest.mark.usefixtures("seeded")


def trained(model: gz.Prepared) -> gz.Prepared:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 4, 9, 9)).square().mean().backward()
        optimizer.step()
    return model.eval()


# ---------------------------------------------------------------------------------------------------- growing


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize(("share", "atoms"), [("block", None), ("block", 12), ("layer", 9), (None, 8), ("net", 20)])
def test_growing_keeps_the_function(size: int | None, share: str | None, atoms: int | None) -> None:
    model, x = trained(prepared(small(), group_size=size)), torch.randn(3, 4, 9, 9)
    with torch.no_grad():
        expected = model(x)
        grown = gz.expand(model, share=share, atoms=atoms)
        assert relative(expected, grown(x)) < 1e-6
        assert torch.equal(model(x), expected)
    for layer in layers(grown.model).values():
        assert layer.atoms.shape[1] == (atoms or 8)
    assert grown.plan.passes[0].share == share


def moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Tensor:
    return optimizer.state[parameter]["exp_avg"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("share", "atoms"), [("net", 12), ("block", 8), (None, 10)])
def test_an_optimizer_goes_on_with_what_it_knows(share: str | None, atoms: int) -> None:
    model, x = prepared(small(), atom_drop=0.0).train(), torch.randn(4, 4, 9, 9)
    rest = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": [rest], "lr": 1.0}], lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def step(net: Any) -> None:
        optimizer.zero_grad()
        (net(x).square().mean() + rest.square().sum()).backward()
        optimizer.step()
        schedule.step()

    step(model)
    step(model)
    before = {name: optimizer.state[each]["exp_avg"].clone() for name, each in model.model.named_parameters()}
    held = {name: each.shape for name, each in model.model.named_parameters()}
    grown = gz.expand(model, share=share, atoms=atoms, optimizer=optimizer)
    own = dict(grown.model.named_parameters())
    assert {id(each) for each in optimizer.param_groups[0]["params"]} == {id(each) for each in own.values()}
    assert optimizer.param_groups[1]["params"] == [rest]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)
    old = layers(model.model)
    for name, layer in layers(grown.model).items():
        rows, columns, count = layer.out_channels, layer.in_channels, old[name].atoms.shape[1]
        found = moments(optimizer, layer.coefficients)
        assert found.shape == layer.coefficients.shape
        shared = next(key for key, each in model.model.named_parameters() if each is old[name].coefficients)
        assert torch.equal(found[:rows, :columns, :count], before[shared][:rows, :columns])
        assert not found[:rows, :columns, count:].any()
        assert torch.equal(moments(optimizer, layer.atoms)[:, :count], before[f"{name}.atoms"])
        assert not moments(optimizer, layer.atoms)[:, count:].any()
    for name, parameter in own.items():
        if name in held and parameter.shape == held[name] and not name.endswith("coefficients"):
            assert torch.equal(moments(optimizer, parameter), before[name])
        assert float(optimizer.state[parameter]["step"]) == 2.0
    step(grown.train())
    assert float(optimizer.state[rest]["step"]) == 3.0


def test_an_optimizer_without_state_goes_on() -> None:
    model, x = prepared(small(), atom_drop=0.0).train(), torch.randn(4, 4, 9, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    grown = gz.expand(model, atoms=10, optimizer=optimizer).train()
    before = [each.detach().clone() for each in grown.parameters()]
    grown(x).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(one, other) for one, other in zip(before, grown.parameters(), strict=True))


def test_an_optimizer_that_trains_something_else() -> None:
    model = prepared(small())
    with pytest.raises(gz.GraphZipError, match="optimizer: it has no parameter of the prepared model"):
        gz.expand(model, atoms=10, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(gz.GraphZipError, match=r"optimizer: float is none; pass a torch.optim.Optimizer"):
        gz.expand(model, atoms=10, optimizer=0.1)  # type: ignore[arg-type]


# --- what torch does with modules ---


def test_vmap_and_functional_calls_over_factored_modules() -> None:
    """Gradients of every sample, and several models at once, through layers whose kernels are computed."""
    model, x = prepared(small(), atom_drop=0.0).convert().module.eval(), torch.randn(3, 4, 9, 9)
    state = {name: each.detach() for name, each in model.named_parameters()}
    fixed = dict(model.named_buffers())

    def loss(weights: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, (weights, fixed), (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    for number, sample in enumerate(x):
        alone = torch.func.grad(loss)(state, sample)
        for name, gradient in alone.items():
            torch.testing.assert_close(each[name][number], gradient, rtol=1e-4, atol=1e-5)
    several = {name: torch.stack([value, 2.0 * value]) for name, value in state.items()}
    both = torch.func.vmap(loss, in_dims=(0, None))(several, x[0])
    twice = {name: 2.0 * value for name, value in state.items()}
    torch.testing.assert_close(both, torch.stack([loss(state, x[0]), loss(twice, x[0])]), rtol=1e-4, atol=1e-5)


def test_from_net_to_block_to_more_atoms() -> None:
    """Appendix E: net m8, block m8, block m12, training in between; what is new is trained, too."""
    x = torch.randn(3, 4, 9, 9)
    model = trained(prepared(small(), atom_drop=0.0))
    sizes = [sum(parameter.numel() for parameter in model.parameters())]
    for options in ({"share": "block"}, {"atoms": 12}):
        grown = gz.expand(model, **options)
        with torch.no_grad():
            assert relative(model(x), grown(x)) < 1e-6
        model = trained(grown)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes == sorted(set(sizes))
    for layer in layers(model.model).values():
        assert (layer.atoms[:, 8:] != 0).all()
    with torch.no_grad():
        assert relative(model(x), model.convert().module.eval()(x)) < 1e-6


def test_growing_after_a_merge_in_another_precision() -> None:
    plan = gz.Plan([gz.ClusterMerge(keep=0.5), gz.AtomFactorize(force=True)])
    ready = gz.prepare(small(), plan, IMAGE)
    next(steps := ready.steps())
    assert next(steps) == "atom_factorize"
    ready = trained(ready).double()
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        assert relative(ready(x), gz.expand(ready, share=None, atoms=9)(x)) < 1e-12


def test_what_cannot_grow() -> None:
    ready = prepared(small(), share="block")
    with pytest.raises(gz.PlanError, match="share: 'net' is coarser than 'block'; a model grows towards finer sharing"):
        gz.expand(ready, share="net")
    with pytest.raises(gz.PlanError, match="atoms: 4 is fewer than 8; a model grows by more atoms"):
        gz.expand(ready, atoms=4)
    with pytest.raises(gz.PlanError, match="share: 'all' is not one of"):
        gz.expand(ready, share="all")
    ready.convert()
    with pytest.raises(gz.GraphZipError, match=r"at an atom_factorize pass can grow; expand it before convert\(\)"):
        gz.expand(ready, share=None)


# ---------------------------------------------------------------------------------------------------- code sizes


def dct_net(places: int) -> nn.Sequential:
    """Kernels whose slices use this many DCT coefficients, of equal energy."""
    model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 16, 1))
    spectrum = torch.zeros(16 * 16 * 9)
    spectrum[torch.randperm(len(spectrum))[:places]] = 1.0
    piece = torch.from_numpy(idctn(spectrum.reshape(16, 16, 3, 3).numpy(), type=2, norm="ortho"))
    with torch.no_grad():
        model[1].weight.copy_(piece.repeat(2, 2, 1, 1))
    return model


def test_the_code_size_counts_dct_coefficients() -> None:
    model = dct_net(40)
    assert gz.suggest_code_size(model, energy=1.0 - 1e-6) == 40
    assert gz.suggest_code_size(model, energy=0.5) == 20
    assert gz.suggest_code_size(dct_net(7), (16, 16, 3, 3), energy=0.999) == 7


def test_smooth_kernels_need_short_codes() -> None:
    noise = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Conv2d(32, 32, 3))
    smooth = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Conv2d(32, 32, 3))
    with torch.no_grad():
        ramp = torch.linspace(1, 2, 32)
        smooth[1].weight.copy_((ramp[:, None] * ramp)[:, :, None, None].expand(32, 32, 3, 3))
    assert gz.suggest_code_size(smooth) < 5 < 500 < gz.suggest_code_size(noise)


def test_code_sizes_that_cannot_be_said() -> None:
    with pytest.raises(gz.GraphZipError, match=r"no kernel of Sequential holds a slice of \[64, 64, 3, 3\]"):
        gz.suggest_code_size(small(), (64, 64, 3, 3))
    with pytest.raises(gz.GraphZipError, match=r"energy is 0\.0; pass a share above 0 and at most 1"):
        gz.suggest_code_size(small(), energy=0.0)


# ---------------------------------------------------------------------------------------------------- ranks


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(4, 4)) == pytest.approx(1)


def deep() -> nn.Sequential:
    return nn.Sequential(block(4, 6), *[block(6, 6) for _ in range(3)])


def test_coefficients_of_equal_layers_have_one_rank() -> None:
    """Two layers that read the same and have the same kernel share everything; the rank of both is that of one."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
            self.two.load_state_dict(self.one.state_dict())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.one(x) + self.two(x)
            return out

    (pair,) = gz.coefficient_rank(Twins(), [torch.randn(16, 4, 9, 9)]).pairs
    assert pair.layers == ("one", "two")
    assert pair.alone == pytest.approx((6, 6), abs=1e-3)
    assert pair.joint == pytest.approx(6, abs=1e-3)


def test_coefficients_of_all_pairs_of_layers() -> None:
    model = deep().train()
    data = [(torch.randn(16, 4, 9, 9), torch.zeros(16)) for _ in range(2)]
    found = gz.coefficient_rank(model, data)
    assert [pair.layers for pair in found.pairs] == [("1.0", "2.0"), ("1.0", "3.0"), ("2.0", "3.0")]
    assert found.alone == pytest.approx(6, abs=0.01)
    assert 6 < found.joint <= 12
    assert model.training
    assert str(found).endswith(f"mean: {found.alone:.2f} alone, {found.joint:.2f} together")
    assert found.to_dict()["joint"] == found.joint


def test_layers_that_cannot_be_compared() -> None:
    data: Any = [torch.randn(2, 4, 9, 9)]
    with pytest.raises(gz.GraphZipError, match="no two convolutions with equal kernels and feature sizes"):
        gz.coefficient_rank(nn.Sequential(block(4, 6), block(6, 8)), data)

"""The module that people get: `torch.nn` layers again, which train like those of the original model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from planting import tensors
from torch import Tensor, nn

import graphzip as gz
from graphzip.graph.restore_modules import BatchNormCall
from graphzip.tracing.trace import trace

pytestmark = pytest.mark.usefixtures("seeded")

NOTHING = gz.Plan([])
IMAGE = (2, 4, 8, 8)


def restored(model: nn.Module, *inputs: Any) -> nn.Module:
    module: nn.Module = gz.compile(model, NOTHING, inputs).module
    return module


def net(run: Callable[..., Any], **parts: Any) -> nn.Module:
    """A model with a convolution `a`, 4 -> 6 channels, and what else is given."""
    return Net(run, **{"a": nn.Conv2d(4, 6, 3), **parts})


def calls(module: Any) -> list[str]:
    """The modules that a compiled module calls, in order."""
    return [str(node.target) for node in module.graph.nodes if node.op == "call_module"]


# --- layers ----------------------------------------------------------------------------------------------------------

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 1), (2, 1), "valid", groups=2, bias=False), IMAGE),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2), IMAGE),
    (nn.Conv3d(4, 2, 3, padding=(1, 0, 1)), (2, 4, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=(1, 0), groups=2, dilation=2), IMAGE),
    (nn.ConvTranspose3d(4, 2, 2, bias=False), (2, 4, 3, 3, 3)),
    (nn.Linear(8, 3), IMAGE),
    (nn.Linear(8, 3, bias=False), (2, 8)),
    (nn.BatchNorm1d(4, eps=1e-3, momentum=0.3), (2, 4)),
    (nn.BatchNorm2d(4, affine=False), IMAGE),
    (nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    (nn.BatchNorm2d(4, momentum=None), IMAGE),
    (nn.BatchNorm3d(4, momentum=0.0), (2, 4, 3, 3, 3)),
    (nn.InstanceNorm2d(4, affine=True), IMAGE),
    (nn.InstanceNorm1d(4, track_running_stats=True, momentum=0.2), (2, 4, 5)),
    (nn.LayerNorm([8, 8], eps=1e-3), IMAGE),
    (nn.LayerNorm(8, bias=False), IMAGE),
    (nn.GroupNorm(2, 4), IMAGE),
    (nn.PReLU(4), IMAGE),
    (nn.PReLU(), (2, 3)),
    (nn.Dropout(0.3), IMAGE),
    (nn.Dropout1d(0.3), (2, 4, 5)),
    (nn.Dropout2d(0.3), IMAGE),
    (nn.Dropout3d(0.3), (2, 4, 3, 3, 3)),
    (nn.AlphaDropout(0.3), IMAGE),
    (nn.FeatureAlphaDropout(0.3), IMAGE),
    (nn.RReLU(0.1, 0.4), IMAGE),
]


def name_of(layer: Any) -> str:
    return repr(layer) if isinstance(layer, nn.Module) else "x".join(map(str, layer))


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=name_of)
def test_layers_are_torch_nn_modules_again(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Identity(), copy.deepcopy(layer))
    module = restored(model, torch.randn(shape))
    found = module.get_submodule("1")
    assert type(found) is type(layer)
    assert repr(found) == repr(layer)
    assert found.state_dict().keys() == layer.state_dict().keys()
    assert calls(module) == ["1"]
    assert_trains_alike(model, (torch.randn(shape),))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d])
def test_norms_with_a_weight_and_no_bias(kind: Any) -> None:
    layer = nn.GroupNorm(2, 4) if kind is nn.GroupNorm else kind(4, affine=True)
    layer.bias = None
    module = assert_trains_alike(nn.Sequential(layer), (torch.randn(IMAGE),))
    assert type(module.get_submodule("0")) is kind
    assert not any(parameter.is_meta for parameter in module.parameters())


def test_embeddings_keep_their_options() -> None:
    for options in ({}, {"padding_idx": 0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        model = nn.Sequential(nn.Embedding(7, 3, **options), nn.Linear(3, 2))
        tokens = torch.tensor([[0, 1, 1], [2, 0, 3]])
        module = restored(model, tokens)
        found = module.get_submodule("0")
        assert isinstance(found, nn.Embedding)
        assert repr(found) == repr(model[0])
        assert found.scale_grad_by_freq == model[0].scale_grad_by_freq
        for one in (model, module):
            one(tokens).square().sum().backward()
        left, right = model[0].weight.grad, found.weight.grad
        assert left is not None
        assert right is not None
        assert left.is_sparse == right.is_sparse
        assert torch.equal(left.to_dense(), right.to_dense())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    assert_trains_alike(nn.Sequential(nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode=mode)), (torch.randn(IMAGE),))


def test_synchronised_batch_norm_keeps_its_class() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6))
    module = restored(model.eval(), torch.randn(IMAGE))
    assert type(module.get_submodule("1")) is nn.SyncBatchNorm
    assert torch.equal(model(torch.ones(IMAGE)), module(torch.ones(IMAGE)))


def test_a_derived_batch_norm_becomes_the_one_it_derives_from() -> None:
    class NormAct(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, 0.3, self.training)
            return F.dropout(super().forward(x).relu(), 0.5, self.training)

    model = nn.Sequential(nn.Conv2d(4, 6, 3), NormAct(6, momentum=None))
    module = restored(model, torch.randn(IMAGE))
    assert type(module.get_submodule("1")) is nn.BatchNorm2d
    assert calls(module) == ["0", "1.dropout", "1", "1.dropout_1"]
    assert_trains_alike(model, (torch.randn(IMAGE),))


# --- one training step is the original's ------------------------------------------------------------------------------


def assert_trains_alike(model: nn.Module, inputs: tuple[Any, ...], steps: int = 3) -> nn.Module:
    """Outputs, gradients and buffers are the original's, bit by bit in float64, in both modes and for several steps."""
    model = copy.deepcopy(model).double()
    inputs = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    module = restored(model, *inputs)
    assert {name for name, _ in module.named_parameters()} <= {name for name, _ in model.named_parameters()}
    optimizers = [torch.optim.SGD([*one.parameters(), torch.zeros(1)], lr=0.01) for one in (model, module)]
    for step in range(2 * steps):
        model.train(step % 2 == 0)
        module.train(step % 2 == 0)
        results = []
        for one, optimizer in zip((model, module), optimizers, strict=True):
            torch.manual_seed(step)
            output = one(*inputs)
            optimizer.zero_grad()
            if output.requires_grad:
                output.square().sum().backward()
            results.append((output, {name: p.grad for name, p in one.named_parameters()}))
            optimizer.step()
        assert torch.equal(results[0][0], results[1][0]), f"outputs of step {step}"
        for name, gradient in results[1][1].items():
            expected = results[0][1][name]
            assert (gradient is None) == (expected is None), name
            assert gradient is None or torch.equal(gradient, expected), name
    expected_buffers = dict(model.named_buffers())
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, expected_buffers[name]), name
    return module


def test_a_training_step_of_a_network() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None)
            self.norm, self.drop = nn.GroupNorm(2, 4), nn.Dropout2d(0.2)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(self.bn1(self.conv1(x)).relu_())
            y = self.norm(self.bn2(self.conv2(y)) + x)
            out: Tensor = self.head(F.dropout(y.mean((2, 3)), 0.5, self.training))
            return out

    module = assert_trains_alike(Block(), (torch.randn(IMAGE),))
    assert int(module.bn1.num_batches_tracked) == 3


def test_functional_layers_follow_the_mode() -> None:
    def run(m: Any, x: Tensor) -> Any:
        x = F.batch_norm(m.a(x), m.mean, m.var, m.gain, m.shift, m.training, momentum=0.2)
        return F.alpha_dropout(F.dropout2d(F.dropout(x, 0.4, m.training), 0.3, m.training), 0.1, m.training)

    parts = {"mean": torch.randn(6), "var": torch.rand(6) + 0.5}
    parameters = {"gain": nn.Parameter(torch.rand(6)), "shift": nn.Parameter(torch.randn(6))}
    module = assert_trains_alike(net(run, **parts, **parameters), (torch.randn(IMAGE),))
    kinds = [type(inner) for inner in module.modules()]
    assert kinds.count(BatchNormCall) == 1
    assert {nn.Dropout, nn.Dropout2d, nn.AlphaDropout} <= set(kinds)


@pytest.mark.parametrize("training", [True, False])
def test_functional_layers_that_ignore_the_mode_still_do(training: bool) -> None:
    def run(m: Any, x: Tensor) -> Any:
        x = F.batch_norm(m.a(x), m.mean, m.var, training=training)
        return F.dropout(F.dropout2d(x, 0.3, training), 0.4, training)

    module = assert_trains_alike(net(run, mean=torch.randn(6), var=torch.rand(6) + 0.5), (torch.randn(IMAGE),))
    assert not any(isinstance(inner, nn.Dropout | nn.Dropout2d | BatchNormCall) for inner in module.modules())


def test_batch_statistics_without_running_ones() -> None:
    assert_trains_alike(net(lambda m, x: F.batch_norm(m.a(x), None, None, training=True)), (torch.randn(IMAGE),))


def test_a_frozen_batch_norm_of_a_derived_class_stays_frozen() -> None:
    class Frozen(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)

    model = nn.Sequential(nn.Conv2d(4, 6, 3), Frozen(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    module = assert_trains_alike(model, (torch.randn(IMAGE),))
    assert int(module.get_submodule("1").num_batches_tracked) == 0
    assert int(module.get_submodule("3").num_batches_tracked) == 3


def test_parts_that_an_overridden_train_keeps_in_eval_mode_stay_there() -> None:
    class Backbone(nn.Sequential):
        def train(self, mode: bool = True) -> Backbone:
            super().train(mode)
            for inner in self[:4]:
                inner.eval()
            return self

    model = Backbone(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.RReLU(), nn.BatchNorm2d(6))
    module = assert_trains_alike(model, (torch.randn(IMAGE),))
    assert int(module.get_submodule("1").num_batches_tracked) == 0
    assert int(module.get_submodule("4").num_batches_tracked) == 3


def test_frozen_statistics_survive_saving(tmp_path: Any) -> None:
    model = net(lambda m, x: F.batch_norm(m.a(x), m.mean, m.var), mean=torch.randn(6), var=torch.rand(6) + 0.5)
    x = torch.randn(IMAGE)
    gz.compile(model, NOTHING, (x,)).save(tmp_path / "model")
    loaded = gz.load(tmp_path / "model").module.train()
    assert torch.equal(loaded(x), model.train()(x))


def test_dropout_really_drops_in_training() -> None:
    module = restored(nn.Sequential(nn.Linear(4, 1000), nn.Dropout(0.5)), torch.randn(2, 4))
    x = torch.randn(2, 4)
    share = (module.train()(x) == 0).double().mean()
    assert 0.4 < share < 0.6
    assert not (module.eval()(x) == 0).any()


def test_modes_can_be_set_part_by_part() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.BatchNorm2d(6))
    module = restored(model, torch.randn(IMAGE)).train()
    module.get_submodule("1").eval()
    module(torch.randn(IMAGE))
    assert int(module.get_submodule("1").num_batches_tracked) == 0
    assert int(module.get_submodule("3").num_batches_tracked) == 1


def test_functional_layers_share_the_mode_of_the_module_that_runs_them() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("var", torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(F.batch_norm(x, self.mean, self.var, training=self.training), 0.5, self.training)

    model = nn.Sequential(nn.Conv2d(4, 6, 3), Part())
    model.train()
    model[1].eval()
    x = torch.randn(IMAGE)
    module = restored(model, x)
    assert module.training
    assert not module.get_submodule("1.dropout").training
    assert torch.equal(model(x), module(x))
    assert_trains_alike(model, (x,))


# --- shared, tied and misleading state --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_shared_module_stays_one_module(bias: bool) -> None:
    a, b = nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4, affine=bias)
    model = Net(lambda m, x: m.b(m.a(m.b(m.a(x)))), a=a, b=b)
    module = assert_trains_alike(model, (torch.randn(IMAGE),))
    assert calls(module) == ["a", "b", "a", "b"]
    assert int(module.b.num_batches_tracked) == 6


def test_a_module_with_two_names() -> None:
    a = nn.Conv2d(4, 4, 3, padding=1)
    model = Net(lambda m, x: m.b(m.a(x)) + m.c(x), a=a, b=nn.BatchNorm2d(4), c=a)
    module = assert_trains_alike(model, (torch.randn(IMAGE),))
    assert list(module.state_dict()) == list(model.state_dict())


def test_other_operators_on_the_weight_of_a_layer() -> None:
    """A weight says which layer it belongs to; the operator decides what is computed."""
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    transposed = nn.ConvTranspose2d(4, 4, 3, padding=1, bias=False)
    x = torch.randn(IMAGE)
    module = assert_trains_alike(Net(lambda m, x: F.conv_transpose2d(m.a(x), m.a.weight, padding=1), a=conv), (x,))
    assert type(module.a) is nn.Conv2d
    module = assert_trains_alike(Net(lambda m, x: F.conv2d(m.a(x), m.a.weight, padding=1), a=transposed), (x,))
    assert type(module.a) is nn.ConvTranspose2d
    assert_trains_alike(Net(lambda m, x: F.conv2d(m.a(x), m.a.weight, stride=2), a=conv), (x,))
    assert_trains_alike(Net(lambda m, x: F.conv2d(x, m.a.weight), a=transposed), (x,))
    linear = Net(lambda m, x: F.linear(x, m.a.weight) + m.a(x), a=nn.Linear(8, 3))
    assert calls(assert_trains_alike(linear, (x,))) == ["a"]


def test_an_embedding_whose_weight_is_the_output_layer() -> None:
    tokens = torch.randint(0, 9, (2, 5))
    after = assert_trains_alike(Net(lambda m, t: F.linear(m.e(t), m.e.weight), e=nn.Embedding(9, 4)), (tokens,))
    assert type(after.e) is nn.Embedding
    model = Net(lambda m, x: m.e(F.linear(m.a(x), m.e.weight).argmax(-1)), a=nn.Linear(3, 4), e=nn.Embedding(9, 4))
    before = assert_trains_alike(model, (torch.randn(2, 3),))
    assert type(before.e) is nn.Embedding


def test_names_of_made_modules_take_no_others() -> None:
    def run(m: Any, x: Tensor) -> Any:
        x = m.dropout(F.dropout(F.dropout(m.a(x), 0.4, m.training), 0.2, m.training))
        return F.batch_norm(x, m.mean, m.var, training=m.training) + m.batch_norm

    parts = {"mean": torch.zeros(6), "var": torch.ones(6), "dropout": nn.Dropout(0.9)}
    module = assert_trains_alike(net(run, **parts, batch_norm=nn.Parameter(torch.ones(1))), (torch.randn(IMAGE),))
    assert sorted(inner.p for inner in module.modules() if isinstance(inner, nn.Dropout)) == [0.2, 0.4, 0.9]
    assert module.dropout.p == 0.9


def test_what_training_does_beyond_the_graph_is_said() -> None:
    class Path(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 4, 2, dropout=0.25, batch_first=True)
            self.norm = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
            self.extra = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            y: Tensor = self.norm(self.gru(x)[0])
            return (y, self.extra(y)) if self.training else y

    report = gz.compile(Path(), NOTHING, (torch.randn(2, 3, 4),)).report
    notes = "\n".join(report.notes)
    assert "'extra' (Linear) is not part of the eval graph; its parameters are left out" in notes
    assert "'gru' (GRU) drops out 0.25 only in training and that is left out" in notes
    assert "(spectral norm) updates its vectors only in training" in notes
    assert notes in str(report)


# --- an ordinary module ----------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.0), nn.Flatten(1), nn.Linear(384, 3)
    )


@pytest.fixture
def result() -> nn.Module:
    module: nn.Module = gz.compile(small(), gz.Plan([gz.ClusterMerge(keep=0.5)]), (torch.randn(IMAGE),)).module
    return module


def test_names_class_and_text(result: nn.Module) -> None:
    assert type(result).__name__ == "Sequential"
    assert [name for name, _ in result.named_parameters()] == [name for name, _ in small().named_parameters()]
    assert "Conv2d(4, 3, kernel_size=(3, 3)" in repr(result)
    assert "Linear(in_features=192, out_features=3" in repr(result)


def test_deep_copies_are_alone(result: nn.Module) -> None:
    twin, x = copy.deepcopy(result).eval(), torch.randn(IMAGE)
    expected = result.eval()(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(result(x), expected)


def test_state_goes_out_to_bytes_and_in_again(result: nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(result.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(result)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    x = torch.randn(IMAGE)
    assert torch.equal(twin.eval()(x), result.eval()(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        twin.load_state_dict(small().state_dict())


def test_an_unmerged_result_takes_the_original_state() -> None:
    model = small()
    restored(model, torch.randn(IMAGE)).load_state_dict(small().state_dict(), strict=True)


def test_other_dtypes_and_devices(result: nn.Module) -> None:
    assert copy.deepcopy(result).half()(torch.randn(IMAGE).half()).dtype == torch.float16
    assert copy.deepcopy(result).double()(torch.randn(IMAGE).double()).dtype == torch.float64
    meta = copy.deepcopy(result).to("meta")
    assert meta(torch.empty(IMAGE, device="meta")).shape == (2, 3)


def test_torch_compile(result: nn.Module) -> None:
    x = torch.randn(IMAGE)
    for mode in (True, False):
        result.train(mode)
        quick = torch.compile(copy.deepcopy(result), backend="eager", fullgraph=True)
        torch.testing.assert_close(quick(x), copy.deepcopy(result)(x))
    even = Net(lambda m, x: m.a(x) * 2 if x.shape[0] % 2 == 0 else m.a(x), a=nn.Linear(4, 4))
    quick = torch.compile(restored(even, torch.randn(4, 4)), backend="eager", fullgraph=True)
    x = torch.randn(6, 4)
    assert torch.equal(quick(x), even(x))


def test_hooks_on_restored_modules_run(result: nn.Module) -> None:
    seen: list[tuple[int, ...]] = []
    result.get_submodule("0").register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    result(torch.randn(IMAGE))
    assert seen == [(2, 3, 8, 8)]


def test_optimizers_see_every_parameter_once(result: nn.Module) -> None:
    x, target = torch.randn(16, 4, 8, 8), torch.randint(0, 3, (16,))
    optimizer = torch.optim.SGD(result.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(result(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_results_share_nothing_with_the_traced_graph() -> None:
    model, x = small(), torch.randn(IMAGE)
    module = restored(model, x)
    held = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not held & {tensor.data_ptr() for tensor in module.state_dict().values()}
    traced = trace(model, (x,))
    assert {p.data_ptr() for p in traced.module.parameters()} <= held
    assert len(tensors(module(x))) == 1

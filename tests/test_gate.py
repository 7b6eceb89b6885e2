"""The gate compared with the paper's construction, and the rules that pruning relies on."""

from __future__ import annotations

import copy
import io
import math

import pytest
import timm
import torch
from torch import nn

from timm_eps import EpsilonGate
from timm_eps.gate import epsilon_gate, max_response
from timm_eps.surgery.branches import gates

LARGE = 1e6


def paper_gate(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """S(F) built from four ReLUs, as in section 3.1 of the paper and in the authors' code."""
    relu = torch.relu
    s = (relu(x - epsilon) + relu(-x - epsilon)).max()
    return relu(1 - LARGE * relu(1 - LARGE * s)) * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("ratio", [0.5, 0.999, 1.001, 2.0])
def test_agrees_with_the_four_relu_form(dtype, scale, ratio):
    """For ε below and above the response, at several scales: S is equal wherever the paper's form is 0 or 1."""
    x = scale * torch.randn(3, 4, 5, 5, dtype=dtype)
    epsilon = ratio * max_response(x).item()
    if abs(max_response(x).item() - epsilon) < 2 / LARGE:
        pytest.skip("inside the band of width 1e-6 in which the paper's form is neither 0 nor 1")
    expected = paper_gate(x.double(), epsilon).to(dtype)
    assert torch.equal(epsilon_gate(x, epsilon), expected)
    assert bool(expected.any()) == (ratio < 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    x = torch.randn(2, 8, 4, 4).to(dtype)
    largest = max_response(x).item()
    assert torch.equal(epsilon_gate(x, largest * 0.99), x)
    assert not epsilon_gate(x, largest * 1.01).any()
    assert epsilon_gate(x, 1.0).dtype == dtype


def test_open_at_the_threshold():
    """S is zero only if every |F_i| is strictly below ε."""
    x = torch.tensor([[-2.5, 1.0]])
    assert torch.equal(epsilon_gate(x, 2.5), x)
    assert torch.equal(epsilon_gate(x, math.nextafter(2.5, 0)), x)
    assert not epsilon_gate(x, torch.nextafter(torch.tensor(2.5), torch.tensor(3.0))).any()


def test_zero_never_closes():
    x = torch.zeros(2, 3)
    x.requires_grad_()
    epsilon_gate(x, 0.0).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3)), "a zero branch must still learn under ε = 0"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_stay_visible(bad):
    x = torch.tensor([0.1, bad])
    y = epsilon_gate(x, 1e9 if math.isnan(bad) else 2.5)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(), x.nan_to_num())


def test_one_decision_for_the_batch():
    x = torch.tensor([[0.1], [5.0]])
    assert torch.equal(epsilon_gate(x, 1.0), x), "one large element keeps the whole batch"


def test_closed_gate_sends_zeros_not_none():
    """With a gradient of None the optimizer would skip weight decay, and the branch would never become empty."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    epsilon_gate(conv(torch.ones(1, 1, 2, 2)), 1e6).sum().backward()
    assert torch.equal(conv.weight.grad, torch.zeros_like(conv.weight))
    before = conv.weight.item()
    torch.optim.SGD(conv.parameters(), lr=0.1, weight_decay=0.5).step()
    assert conv.weight.item() == pytest.approx(before * 0.95)


def test_module_follows_the_function_in_training():
    gate = EpsilonGate(1.0).train()
    small, large = 0.5 * torch.ones(2, 3), 2.0 * torch.ones(2, 3)
    assert not gate(small).any()
    assert torch.equal(gate(large), large)
    assert torch.equal(gate(-large), -large)
    assert gate.response.item() == 2.0, "the largest since the last reset"
    gate.reset_response()
    assert gate.response.item() == -1.0, "nothing seen yet"


def test_response_keeps_nan():
    gate = EpsilonGate(1.0).train()
    gate(torch.tensor([math.nan]))
    gate(torch.ones(1))
    assert gate.response.isnan()


def test_evaluation_does_not_look_at_the_batch():
    gate = EpsilonGate(1e9).eval()
    x = torch.randn(2, 3)
    assert gate(x) is x, "an open gate costs nothing"
    assert gate.response.item() == -1.0
    gate.closed = True
    assert torch.equal(gate(1e12 * x), torch.zeros_like(x))
    assert torch.equal(gate(torch.full((2, 3), math.nan)), torch.zeros(2, 3))


def test_drop_path_runs_after_the_gate():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    gate = EpsilonGate(5.0, drop_path=Twice()).train()
    assert not gate(3.0 * torch.ones(1)).any(), "3 is below 5, though twice 3 is not"
    assert gate.eval()(torch.ones(1)).item() == 2.0


def test_no_parameters_and_no_state():
    gate = EpsilonGate(1.0)
    assert not list(gate.parameters())
    assert not gate.state_dict()


@pytest.mark.parametrize("value", [-1.0, -1e-9, math.nan, math.inf, 3.5e38, "2.5", True, None])
def test_bad_epsilon(value):
    with pytest.raises(ValueError, match="epsilon must be a number of at least 0"):
        EpsilonGate(value)
    gate = EpsilonGate(1.0)
    with pytest.raises(ValueError, match="epsilon must be"):
        gate.epsilon = value
    assert gate.epsilon == 1.0
    assert gate.threshold.item() == 1.0


def test_buffers_come_back_from_the_meta_device():
    with torch.device("meta"):
        gate = EpsilonGate(2.5)
    gate.to_empty(device="cpu")
    gate.threshold.fill_(-5e16)
    gate.response.fill_(-5e16)
    gate.init_non_persistent_buffers()
    assert (gate.threshold.item(), gate.response.item()) == (2.5, -1.0)


def test_repr_names_epsilon():
    assert "epsilon=2.5, closed=False" in repr(EpsilonGate(2.5))


def test_script_and_compile_agree_with_eager():
    x = torch.randn(2, 3, 4, 4)
    gate = EpsilonGate(1.5).train()
    expected = gate(x)
    assert torch.equal(torch.jit.script(EpsilonGate(1.5).train())(x), expected)
    compiled = torch.compile(EpsilonGate(1.5).train(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)


def test_new_epsilon_does_not_recompile():
    """A ramp changes ε every epoch. A graph compiled for one ε would hit the recompile limit."""
    gate = EpsilonGate(0.5).train()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(gate, fullgraph=True, backend=counter)
    for epsilon in (0.5, 1.0, 2.0, 4.0, 8.0):
        gate.epsilon = epsilon
        assert bool(compiled(torch.ones(2, 2)).any()) == (epsilon <= 1)
    assert counter.frame_count == 1


def test_importance_is_what_the_loss_would_change_without_the_branch():
    """To first order, squared, and summed over the batches until the reset."""
    gate = EpsilonGate().train()
    gate.measure_importance()
    expected = 0.0
    for _ in range(3):
        x, slope = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
        (gate(x) * slope).sum().backward()
        assert torch.equal(x.grad, slope), "the gain of one changes no gradient"
        expected += (x * slope).sum().item() ** 2
    assert gate.importance.item() == pytest.approx(expected, rel=1e-5)
    gate.reset_response()
    assert gate.importance.item() == 0
    gate.measure_importance(False)
    gate(torch.ones(1, requires_grad=True)).backward()
    assert gate.importance.item() == 0


def test_measuring_importance_changes_no_bit():
    gate, measuring = EpsilonGate(1.0).train(), EpsilonGate(1.0).train()
    measuring.measure_importance()
    for dtype in (torch.float32, torch.bfloat16):
        for scale in (0.01, 1.0):
            x = (scale * torch.randn(2, 3, 4, 4)).to(dtype)
            answer = measuring(x)
            assert answer.dtype == dtype
            assert torch.equal(answer, gate(x))
    assert not list(measuring.parameters())
    assert not measuring.state_dict()


def test_a_closed_gate_has_no_importance():
    gate = EpsilonGate(5.0).train()
    gate.measure_importance()
    gate(torch.ones(2, requires_grad=True)).sum().backward()
    assert gate.importance.item() == 0
    gate(9 * torch.ones(2, requires_grad=True)).sum().backward()
    assert gate.importance.item() == 18**2


@pytest.mark.parametrize("overflow", [torch.inf, torch.nan])
def test_a_gradient_that_overflowed_does_not_count(overflow):
    """GradScaler skips such a step and continues."""
    gate = EpsilonGate().train()
    gate.measure_importance()
    for slope in (1.0, overflow, 1.0):
        gate(torch.ones(2, requires_grad=True)).backward(torch.full((2,), slope))
    assert gate.importance.item() == 2 * 2.0**2


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_importance_holds_no_graph():
    gate = EpsilonGate().train()
    gate.measure_importance()
    (gate(torch.ones(2, requires_grad=True)) ** 2).sum().backward(create_graph=True)
    assert gate.importance > 0
    assert not gate.importance.requires_grad


def test_a_copy_measures_importance_too():
    """torch copies no hooks. A copy with shared hooks would update the importance of the first gate."""
    gate = EpsilonGate().train()
    gate.measure_importance()
    stored = io.BytesIO()
    torch.save(gate, stored)
    stored.seek(0)
    for other in (copy.deepcopy(gate), torch.load(stored, weights_only=False)):
        other(torch.ones(2, requires_grad=True)).sum().backward()
        assert other.importance.item() == 2.0**2
    assert gate.importance.item() == 0
    assert copy.deepcopy(EpsilonGate()).gain is None


@pytest.mark.parametrize("how", ["script", "compile", "checkpoint"])
def test_importance_however_the_gate_is_run(how):
    def measured(run) -> float:
        gate = EpsilonGate().train()
        gate.measure_importance()
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (run(gate, x) ** 2).sum().backward()
        return gate.importance.item()

    runs = {
        "script": lambda gate, x: torch.jit.script(gate)(x),
        "compile": lambda gate, x: torch.compile(gate, fullgraph=True, backend="aot_eager")(x),
        "checkpoint": lambda gate, x: torch.utils.checkpoint.checkpoint(gate, x, use_reentrant=False),
    }
    assert measured(runs[how]) == pytest.approx(measured(lambda gate, x: gate(x))) != 0


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "to"])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-3, 2.5])
def test_the_threshold_stays_a_float32(convert, epsilon):
    """In half precision 1e-8 is 0, and no gate closes at a threshold of 0."""
    gate = EpsilonGate(epsilon).train()
    gate.measure_importance()
    model = nn.Sequential(gate)
    model.to(torch.float16) if convert == "to" else getattr(model, convert)()
    found = {name: getattr(gate, name) for name in ("threshold", "response", "importance", "gain")}
    assert {name: number.dtype for name, number in found.items()} == dict.fromkeys(found, torch.float32)
    assert gate.threshold.item() == torch.tensor(epsilon).item()
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "to": torch.float16}[convert]
    empty = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    answer = gate(empty)
    assert answer.dtype == dtype
    answer.sum().backward()
    assert not empty.grad.any(), "an empty branch is below every threshold"
    assert gate(torch.full((2, 3), 2 * epsilon, dtype=dtype)).all() == (2 * torch.tensor(epsilon, dtype=dtype) > 0)


def test_the_threshold_is_a_float32_whatever_the_default_is():
    """transformers builds a half-precision model under a half-precision default dtype."""
    torch.set_default_dtype(torch.float16)
    try:
        gate = EpsilonGate(1e-8)
        closed = epsilon_gate(torch.zeros(3, requires_grad=True), 1e-8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (gate.threshold.dtype, gate.response.dtype, gate.importance.dtype) == (torch.float32,) * 3
    closed.sum().backward()
    assert gate.threshold.item() == pytest.approx(1e-8)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0), (0,)])
@pytest.mark.parametrize("how", ["eager", "script", "compile"])
def test_an_empty_batch_says_nothing(shape, how):
    gate = EpsilonGate(0.5).train()
    gate.measure_importance()
    run = {
        "eager": lambda x: gate(x),
        "script": torch.jit.script(gate),
        "compile": torch.compile(gate, fullgraph=True, backend="eager"),
    }[how]
    gate(torch.ones(2, 3, requires_grad=True)).sum().backward()
    seen = gate.response.item(), gate.importance.item()
    x = torch.zeros(shape, requires_grad=True)
    y = run(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert (gate.response.item(), gate.importance.item()) == seen == (1.0, 36.0)
    gate.reset_response()
    run(x)
    assert gate.response.item() == -1.0, "nothing was seen"
    assert epsilon_gate(x, 1.0).shape == shape
    assert max_response(x).item() == -1.0


def test_a_graph_of_fx_gates_and_follows():
    """The graph calls the gate as a module. It updates the gate's response, and it follows a gate that closes later."""
    model = nn.Sequential(nn.Linear(2, 2), EpsilonGate(1.0))
    for mode in (True, False):
        model.train(mode)
        gate = model[1]
        gate.closed = False
        graph = torch.fx.symbolic_trace(model)
        assert graph.get_submodule("1") is gate
        graph.train()
        gate.reset_response()
        with torch.no_grad():
            model[0].weight.fill_(0.1)
            model[0].bias.zero_()
        assert not graph(torch.ones(1, 2)).any()
        assert gate.response.item() == pytest.approx(0.2)
        assert graph(10 * torch.ones(1, 2)).all()
        assert gate.response.item() == pytest.approx(2.0)
        graph.eval()
        assert graph(torch.ones(1, 2)).all()
        gate.closed = True
        assert not graph(torch.ones(1, 2)).any()
        assert "1.threshold" not in graph.state_dict()
        assert graph.state_dict().keys() == model.state_dict().keys()


def test_a_gate_that_is_traced_alone():
    gate = EpsilonGate(1.0).eval()
    x = torch.ones(2)
    assert torch.equal(torch.fx.symbolic_trace(gate)(x), x)
    gate.closed = True
    assert not torch.fx.symbolic_trace(gate)(x).any()


@pytest.mark.parametrize("name", ["eps_resnet20", "eps_test_vit"])
def test_data_parallel_replicas_are_refused_in_training(name):
    """``nn.DataParallel`` calls this method of each module when it copies a model to several devices."""
    model = timm.create_model(name, num_classes=5)
    for gate in gates(model).values():
        with pytest.raises(ValueError, match="torchrun"):
            gate._replicate_for_data_parallel()
        assert gate.eval()._replicate_for_data_parallel() is not gate


def test_a_gate_that_cannot_close_and_is_not_measured_is_the_identity():
    gate, x = EpsilonGate().train(), torch.randn(2, 3, requires_grad=True)
    assert gate(x) is x
    assert gate.response.item() == -1.0
    gate.measures_response = True
    assert gate(x) is x, "on the CPU an open gate reads the branch, and passes it on"
    assert gate.response == x.abs().max()
    gate.measures_response = False
    gate.measure_importance()
    assert gate(x) is not x, "the gain takes part in the backward pass"


class Operations:
    """A backend of ``torch.compile`` that counts the calls of each compiled graph and runs them as they are."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        self.counts.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph


def test_compiled_graphs_follow_the_gates():
    """No operation for a gate that is the identity, and a new graph when this changes, but not when ε does."""
    net = nn.Sequential(nn.Linear(3, 3), EpsilonGate(), nn.Linear(3, 3), EpsilonGate()).train()
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).train()
    operations, of_plain = Operations(), Operations()
    compiled, x = torch.compile(net, backend=operations, fullgraph=True), torch.randn(2, 3)
    torch.compile(plain, backend=of_plain)(x)
    assert torch.equal(compiled(x), net(x))
    assert operations.counts == of_plain.counts
    for epsilon in (1e-6, 1e-5, 1e9):
        net[1].epsilon = epsilon
        torch.testing.assert_close(compiled(x), net(x))
    assert len(operations.counts) == 2
    assert operations.counts[1] > operations.counts[0]
    net[1].epsilon = 0.0
    compiled(x)
    assert len(operations.counts) == 2, "the first graph is used again"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_response_in_any_memory_format(memory_format):
    x = torch.randn(2, 8, 5, 5).to(memory_format=memory_format)
    assert max_response(x) == x.abs().max()
    assert max_response(x[:, ::2, 1:]) == x[:, ::2, 1:].abs().max()

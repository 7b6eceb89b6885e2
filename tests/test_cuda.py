"""Tests that need an NVIDIA GPU: ``pytest -m cuda``. Other tests see no GPU, because they compare bytes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import SLOTS, close, tiny_net
from test_cuda_graphs import make
from test_train_hf import ROOT, SHORT
from test_trainer import make_trainer
from transformers import AutoModelForImageClassification

import timm_eps
import train_hf
from timm_eps.surgery.branches import gates
from timm_eps.training.inputs import ImageData

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

EQUAL = "timm equal, AutoModelForImageClassification equal, pipeline equal."


def launch(out, *arguments: str, mixed_precision: str = "no") -> tuple[dict, str]:
    """Run the script as a user does. Returns its results and its output."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--mixed_precision", mixed_precision, str(ROOT / "train_hf.py"), *SHORT, "--output_dir", str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "all_results.json").read_text()), done.stdout


@pytest.fixture
def exact():
    """Switch TensorFloat-32 off, which rounds factors to ten bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def test_gates_decide_as_on_the_cpu(images, exact):
    """Half of the branches respond below ε. The same branches are zero, and the gradients equal the CPU's."""
    net, found = tiny_net(), {}
    for device in ("cpu", "cuda"):
        model, batch = copy.deepcopy(net).to(device).train(), images.to(device)
        for number, gate in enumerate(gates(model).values()):
            gate.epsilon = 1e3 if number % 2 else 0.0
            gate.measure_importance()
        model(batch).square().mean().backward()
        measured = [
            [getattr(gate, name).item() for gate in gates(model).values()] for name in ("response", "importance")
        ]
        found[device] = measured, {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    for ours, theirs in zip(found["cuda"][0], found["cpu"][0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-7)
    for name, theirs in found["cpu"][1].items():
        torch.testing.assert_close(found["cuda"][1][name], theirs, rtol=1e-2, atol=1e-4)
    shut = SLOTS[1].rpartition(".")[0]
    in_shut = [gradients for name, gradients in found["cuda"][1].items() if name.startswith(f"{shut}.")]
    assert in_shut
    assert not any(gradients.any() for gradients in in_shut), "exactly zero, and not None: weight decay acts on them"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_removal_changes_no_logit(images, memory_format):
    model = tiny_net().cuda().to(memory_format=memory_format)
    batch = images.cuda().contiguous(memory_format=memory_format)
    close(model, *SLOTS[1:8:2])
    with torch.no_grad():
        expected = model(batch)
        assert timm_eps.remove_closed(model) == SLOTS[1:8:2]
        assert torch.equal(model(batch), expected)


def test_no_step_waits_for_the_gpu(tmp_path):
    """Augmentation, gates, importance, optimizer and schedule only queue work."""
    arguments = [*SHORT, "--keep", "3", "--criterion", "importance", "--epsilon_warmup_epochs", "0"]
    args = train_hf.parse_arguments([*arguments, "--channels_last", "--flip", "--output_dir", str(tmp_path)])
    accelerator = train_hf.start_accelerator(args)
    training = train_hf.prepare(args, accelerator, ImageData.load(args, accelerator))
    training.network.train()
    for number, (images, labels, _) in enumerate(training.batches.epoch(0)):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first step allocates buffers
        try:
            training.loss += train_hf.forward_backward(training, *training.read(images, labels))
            train_hf.take_step(training)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert number > 0
    assert training.progress.step == number + 1


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_trained_saved_and_loaded(tmp_path, mixed_precision):
    results, printed = launch(tmp_path / "out", "--keep", "3", "--channels_last", mixed_precision=mixed_precision)
    assert results["hardware"] == torch.cuda.get_device_name()
    assert results["blocks_kept"] == 3
    assert EQUAL in printed


def test_taken_up_from_a_checkpoint(tmp_path):
    """GPU kernels add in any order, so bytes differ, but the structure and the schedule are the same."""
    out = tmp_path / "out"
    whole, _ = launch(out, "--keep", "3", "--checkpointing_steps", "epoch")
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    last.rename(tmp_path / "last")
    again, printed = launch(out, "--keep", "3", "--checkpointing_steps", "epoch", "--resume_from_checkpoint")
    assert "Resuming from" in printed
    assert again["removed"] == whole["removed"]


def test_one_graph_trains_as_kernel_by_kernel(tmp_path):
    """Across removals, which force a new recording, and a smaller last batch, which runs without a graph."""
    arguments = ["--keep", "3", "--criterion", "importance", "--max_train_samples", "840", "--channels_last"]
    results = {}
    for flags in ((), ("--cuda_graphs",)):
        results[flags], printed = launch(tmp_path / f"out{len(flags)}", *arguments, *flags, mixed_precision="bf16")
        assert EQUAL in printed
    plain, graphed = results.values()
    assert graphed["train_loss_by_epoch"] == pytest.approx(plain["train_loss_by_epoch"], rel=0.05)
    assert graphed["blocks_kept"] == plain["blocks_kept"] == 3


def test_graphs_record_again_what_changed():
    """The gradients belong to the current network, also after a layer was removed."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).cuda()

    graphs = make(net)
    for _ in range(2):
        for size in (*[8] * 6, 3):
            batch = torch.randn(size, 4, device="cuda")
            with graphs.queue(net):
                loss = graphs(batch).clone()
            found = [parameter.grad.clone() for parameter in net.parameters()]
            net.zero_grad()
            torch.testing.assert_close(loss, graphs.passes(batch))
            torch.testing.assert_close(found, [parameter.grad for parameter in net.parameters()])
            net.zero_grad()
            with torch.no_grad():
                net[0].weight += 0.1
        assert graphs.graph is not None
        del net[1:]


def test_blocks_go_while_trainer_trains(tmp_path, images):
    trainer = make_trainer(tmp_path, use_cpu=False, bf16=True, save_strategy="epoch")
    trainer.train()
    # Without the autocast around its forward.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    assert next(model.parameters()).is_cuda
    assert len(gates(model)) < 9
    with torch.no_grad():
        expected = model(images.cuda()).logits
    timm_eps.save_pretrained(model, tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").cuda()
    with torch.no_grad():
        assert torch.equal(loaded(images.cuda()).logits, expected)
    again = make_trainer(tmp_path, use_cpu=False, bf16=True, save_strategy="epoch")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert len(gates(again.model)) < 9


@pytest.mark.slow
def test_compiled(tmp_path):
    results, printed = launch(tmp_path / "out", "--keep", "3", "--compile", "--channels_last", mixed_precision="bf16")
    assert results["blocks_kept"] == 3
    assert EQUAL in printed


def test_loaded_where_it_is_wanted(tmp_path, images):
    model = timm_eps.EpsResNetForImageClassification.from_timm(tiny_net())
    close(model, SLOTS[4])
    timm_eps.remove_closed(model)
    timm_eps.save_pretrained(model, tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, device_map="cuda")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(images.cuda()).logits.cpu(), model.eval()(images).logits, rtol=1e-2, atol=1e-2
        )

"""Parameters sharded by FSDP2 over two processes on CPUs: the same branches close as under DDP, and saving gathers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from shard_two_processes import BUDGET, IMAGES, network
from transformers import AutoModelForImageClassification

import timm_eps
from timm_eps.surgery.sharding import is_sharded, plain_copy

HERE = Path(__file__).parent
SAVED = ("saved", "by transformers", "by state dict")


def start(out: Path, *names: str) -> list[dict]:
    """What both processes found."""
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "shard_two_processes.py")]
    run = subprocess.run(
        [sys.executable, "-m", *command, str(out), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("sharded")
    found = start(out)
    return {"out": out, 0: found[0], 1: found[1]}


def test_the_same_branches_close_in_the_same_epochs_as_under_ddp(both):
    """Under DDP they are removed, here they are held; the others learn the same from then on."""
    for rank in (0, 1):
        found = both[rank]
        assert found["same"] == {"settled": True, "closed": True, "discarded": True}
        assert found["removed live"] == []
        assert len(found["settled"][-1]) == 9 - BUDGET["keep"]
        assert not found["settled"][0]
        assert found["weights"] < 1e-4, "the processes add gradients in another order"
    assert both[0]["settled"] == both[1]["settled"]


def test_it_is_said_once_that_nothing_is_removed(both):
    for rank in (0, 1):
        [said] = [message for message in both[rank]["warnings"] if "sharded" in message]
        assert "are removed when the model is saved" in said


def test_what_is_saved_equals_the_live_model_bit_for_bit(both):
    for rank in (0, 1):
        assert both[rank]["saving"] == {**dict.fromkeys(SAVED, True), "live is as before": True}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_lacks_the_held_branches_and_loads_everywhere(both, name):
    live = torch.load(both["out"] / "logits_0.pt")
    by_timm = timm.create_model(f"local-dir:{both['out'] / name}", pretrained=True).eval()
    by_auto = AutoModelForImageClassification.from_pretrained(both["out"] / name).eval()
    with torch.no_grad():
        assert torch.equal(by_timm(IMAGES), live)
        assert torch.equal(by_auto(IMAGES).logits, live)
    for loaded in (by_timm, by_auto):
        assert sorted(timm_eps.removed_slots(loaded)) == both[0]["settled"][-1]


def test_a_gathered_copy_is_a_plain_network(both):
    expected = dict.fromkeys(("classes", "side", "plain", "slots"), True)
    assert both[0]["gathering"] == {**expected, "on main": True}
    assert both[1]["gathering"] == {**expected, "on main": False}


def test_a_network_in_a_sharded_module_is_sharded_also_after_an_evaluation(both):
    for rank in (0, 1):
        assert both[rank]["inside"] == {"removed": [], "held": 8, "equal": True, "changed": True, "taught": True}


@pytest.mark.parametrize("what", ["remove_closed", "export_timm", "analyze"])
def test_what_needs_a_whole_network_names_the_remedy(both, what):
    for rank in (0, 1):
        assert "while the parameters are sharded" in both[rank]["refusals"][what]
        assert "timm_eps.gathered(model)" in both[rank]["refusals"][what]


def test_other_kinds_of_sharding_are_refused_by_name(both):
    for rank in (0, 1):
        refusals = both[rank]["refusals"]
        for name in ("FSDP1 wrapper", "FSDP1 inside"):
            assert "--fsdp_version 2" in refusals[name]
        assert "created before fully_shard" in refusals["optimizer before sharding"]


def test_deepspeed_is_refused_by_name():
    engine = type("DeepSpeedEngine", (torch.nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    with pytest.raises(ValueError, match="never tested"):
        timm_eps.gates(engine())
    model = network()
    next(model.parameters()).ds_id = 0  # the mark of ZeRO 3
    with pytest.raises(ValueError, match="DeepSpeed is not supported"):
        timm_eps.EpsilonPruner(model, **BUDGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": True, "deepspeed": None, "fsdp_plugin_args": {"fsdp_version": 1}}, "--fsdp_version 2"),
        ({"fsdp": None, "deepspeed": "config.json"}, "DeepSpeed is not supported"),
    ],
)
def test_trainer_is_refused_with_other_kinds(options, message):
    with pytest.raises(ValueError, match=message):
        timm_eps.EpsilonCallback(keep=4).on_init_end(SimpleNamespace(**options), None, None, model=network())


def test_a_whole_model_is_gathered_already():
    model = network()
    assert not is_sharded(model)
    assert timm_eps.gathered(model) is timm_eps.gathered(model, on_main=True) is model


def test_a_plain_copy_of_a_whole_model_keeps_what_needs_no_gradient():
    model = network()
    for parameter in model.timm_model.stages[0].parameters():
        parameter.requires_grad_(False)
    copied = plain_copy(model, torch.clone)
    for one, other in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one is not other
        assert one.requires_grad == other.requires_grad


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> dict:
    """What takes longer, in one more start."""
    out = tmp_path_factory.mktemp("sharded")
    found = start(out, "resumed", "criterion", "trainer", "script")
    return {"out": out, 0: found[0], 1: found[1]}


@pytest.mark.slow
def test_a_resumed_training_holds_the_same_branches_and_ends_with_the_same_weights(more):
    for rank in (0, 1):
        found = more[rank]["resumed"]
        assert found["held"]
        assert found["held again"] == found["held"]
        assert found["same weights"]
        assert found["same history"]
        assert 0.1 < found["share"] <= 0.5, "the budget counts held branches as removed"


@pytest.mark.slow
def test_a_measured_criterion_closes_the_same_in_both(more):
    assert more[0]["criterion"] == more[1]["criterion"]
    assert len(more[0]["criterion"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("form", "files"), [("FULL_STATE_DICT", 2), ("SHARDED_STATE_DICT", 1)])
def test_trainer_resumes_bit_for_bit_and_saves_what_it_trained(more, form, files):
    """With sharded checkpoints Trainer's own save_model writes no model."""
    for rank in (0, 1):
        whole, resumed = (more[rank]["trainer"][f"{form}, {kind}"] for kind in ("whole", "resumed"))
        assert len(whole["held"]) == 5
        assert whole["equal"] == [True] * files
        assert resumed == whole


@pytest.mark.slow
def test_the_script_trains_as_under_ddp_and_resumes_bit_for_bit(more):
    weights = {}
    for name in ("ddp", "fsdp", "resumed"):
        assert more[0]["script"][name] == more[1]["script"][name]
        weights[name] = AutoModelForImageClassification.from_pretrained(more["out"] / name).state_dict()
        assert weights[name].keys() == weights["ddp"].keys(), "the same branches are removed"
        loss = more[0]["script"][name]["train_loss_by_epoch"]
        assert loss == pytest.approx(more[0]["script"]["ddp"]["train_loss_by_epoch"], abs=1e-4)
    assert all(torch.equal(value, weights["resumed"][key]) for key, value in weights["fsdp"].items())
    assert (more["out"] / "fsdp/checkpoint-20/pytorch_model_fsdp_0/.metadata").exists()
    assert (more["out"] / "dense first/model.safetensors").exists(), "with a teacher, which is whole, and in bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("on a CPU", "Launch without --use_fsdp"),
        ("fsdp1", "--fsdp_version 2"),
        *((option, f"{option} does not work with sharded parameters") for option in ("--model_ema", "--compile")),
        ("--channels_last", "--channels_last does not work with sharded parameters"),
    ],
)
def test_the_script_names_what_does_not_work(more, name, message):
    for rank in (0, 1):
        assert more[rank]["script"][name].startswith("ValueError")
        assert message in more[rank]["script"][name]

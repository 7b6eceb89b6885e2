"""The comparison in benchmarks/: data, methods, job runner, and results page."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import pytest
import timm
import torch
from conftest import mostly_slow
from timm.utils import reparameterize_model
from torch import nn

import timm_eps
from benchmarks import __main__ as main
from benchmarks import channels, curves, glyphs, jobs, latency, methods, plan, results
from benchmarks.comparisons import COMPARISONS, FEW
from timm_eps import report
from timm_eps.surgery.branches import gates

ROOT = Path(__file__).parent.parent

# matplotlib ships its fonts, so every test machine has them.
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def fonts():
    return glyphs.read_fonts(FONTS)


def test_only_legible_fonts_are_taken(fonts):
    """matplotlib also ships fonts that hold only symbols."""
    families = {font.family for font in fonts}
    assert {"DejaVu Sans", "DejaVu Serif", "STIXGeneral"} <= families
    assert not families & {"cmex10", "STIXSizeOneSym"}
    assert all(font.masks.shape == (34, 64, 64) and font.masks.dtype == np.uint8 for font in fonts)


def test_no_family_is_in_both_splits(fonts):
    train, test = glyphs.divide(fonts, seed=0)
    assert len(train) + len(test) == len(fonts)
    assert not {font.family for font in train} & {font.family for font in test}
    assert glyphs.divide(fonts, seed=1)[1] != test
    with pytest.raises(ValueError, match="of one family"):
        glyphs.divide([font for font in fonts if font.family == "DejaVu Sans"], seed=0)


def test_a_directory_without_fonts(tmp_path):
    (tmp_path / "no.ttf").write_bytes(b"not a font")
    with pytest.raises(ValueError, match="holds no font"):
        glyphs.read_fonts(tmp_path)


def test_the_same_seed_draws_the_same_images(fonts):
    first, again, other = (list(glyphs.images(fonts, 68, seed, batch=40)) for seed in (0, 0, 1))
    for (images, labels), (same, same_labels), (others, _) in zip(first, again, other, strict=True):
        assert images.shape[1:] == (3, 32, 32)
        assert images.dtype == torch.uint8
        assert labels == same_labels
        assert torch.equal(images, same)
        assert not torch.equal(images, others)
    assert sorted(label for _, labels in first for label in labels) == sorted([*range(34), *range(34)])


def test_images_show_their_characters(fonts):
    """The mean images of two classes differ."""
    mean = torch.zeros(34, 3 * 32 * 32)
    for images, labels in glyphs.images(fonts, 34 * 60, 0):
        edges = images.float() - images.float().mean((2, 3), keepdim=True)
        mean.index_add_(0, torch.tensor(labels), edges.abs().flatten(1))
    correlation = torch.corrcoef(mean)
    assert correlation[~torch.eye(34, dtype=torch.bool)].max() < 0.99


def test_the_data_set_is_one_that_datasets_reads(fonts, tmp_path):
    glyphs.write(tmp_path / "glyphs", fonts, train=70, test=36, seed=0)
    loaded = datasets.load_dataset(str(tmp_path / "glyphs"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 70, "test": 36}
    assert loaded["train"].features["label"].names == list(glyphs.CLASSES)
    assert loaded["test"][0]["image"].size == (32, 32)
    assert "DejaVu" in (tmp_path / "glyphs" / "README.md").read_text()


@pytest.mark.parametrize("keep", [1, 3, 14, 27, 54])
def test_evenly_spread(keep):
    slots = [str(index) for index in range(54)]
    removed = methods.evenly(slots, keep)
    kept = [index for index in range(54) if str(index) not in removed]
    assert len(kept) == keep
    if keep > 1:
        distances = np.diff(kept)
        assert distances.max() - distances.min() <= 1
    assert abs((kept[0] + kept[-1]) / 2 - 26.5) <= 1


def test_shortcuts_as_convolutions_compute_the_same():
    body = timm.create_model("eps_resnet20").eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(channels.plain(body)(images), body(images))
    assert not any(isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) for module in body.modules())
    assert not gates(reparameterize_model(body))
    assert gates(body)


@pytest.fixture
def classifier():
    config = timm_eps.EpsResNetConfig(architecture="eps_resnet20", side_loss_weight=0.1, num_labels=10)
    return timm_eps.EpsResNetForImageClassification(config)


def test_channels_go_until_it_is_enough_and_no_further(classifier):
    images, target = torch.randn(2, 3, 16, 16), 50_000
    found = channels.prune(classifier, images, lambda net: report.count_parameters(net) <= target)
    assert found["reached"]
    assert 0.9 * target < report.count_parameters(classifier.timm_model) <= target
    loss = classifier.train()(images, labels=torch.tensor([1, 2])).loss
    loss.backward()
    assert classifier.timm_model.stem.conv.weight.grad is not None


def test_what_channels_cannot_reach_is_said(classifier):
    found = channels.prune(classifier, torch.randn(2, 3, 16, 16), lambda net: False)
    assert found == {"ratio": channels.LARGEST, "reached": False}
    assert classifier.timm_model.stem.conv.out_channels == 1


def test_the_native_network_is_the_pruned_one_without_what_is_left_of_gates():
    body = timm.create_model("eps_resnet20", removed=["stages.0.blocks.0.drop_path", "stages.2.blocks.1.drop_path"])
    images = torch.randn(2, 3, 16, 16)
    native = latency.native(body.eval())
    assert torch.equal(native(images), body(images))
    assert [len(stage.blocks) for stage in native.stages] == [2, 3, 2]
    assert not any(isinstance(module, timm_eps.EpsilonGate) for module in native.modules())
    kinds = [[type(module) for module in net.modules()] for net in (native, reparameterize_model(body))]
    assert kinds[0] == kinds[1]


def test_a_network_whose_structure_is_not_that_of_the_run_is_not_measured():
    found = {"removed": ["stages.0.blocks.0.drop_path"], "params": 1}
    with pytest.raises(RuntimeError, match="the network of the run 1"):
        latency.build("eps_resnet20", 10, found)


@pytest.mark.parametrize("name", mostly_slow(latency.WAYS["cpu"], 0))
def test_each_way_computes_the_same(name, monkeypatch):
    # The machine may lack a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    outputs = {}

    def seconds(nets, batch, repeats):
        with torch.no_grad():
            outputs.update({net: body(batch) for net, body in nets.items()})
        return dict.fromkeys(nets, 1.0)

    monkeypatch.setattr(latency.report, "paired_latency", seconds)
    body, images = timm.create_model("eps_resnet20", num_classes=5).eval(), torch.randn(3, 3, 16, 16)
    nets = {"dense": body, latency.WHOLE: reparameterize_model(body), latency.REPARAMETERIZED: body, latency.REST: body}
    way = latency.WAYS["cpu"][name]
    measured = latency.latency_by(way, nets, images, repeats=1)
    assert ("dense" in measured) == (way.runtime is None)
    assert measured.keys() == outputs.keys()
    for output in outputs.values():
        torch.testing.assert_close(output, body(images), rtol=1e-3, atol=1e-4)


def test_multiply_adds_of_blocks():
    body = timm.create_model("eps_resnet20")
    # Three blocks of two convolutions in the first stage; the blocks of the other stages cost as much.
    whole = 3 * 2 * 9 * 16 * 16 * 32 * 32
    less = (9 * 16 * 16 - 9 * 16 * 32 / 4) * 32 * 32  # the first convolution of a stage reads half the channels
    rest = latency.without_blocks("eps_resnet20", body.num_classes)
    macs = [report.count_macs(net, torch.randn(1, 3, 32, 32)) for net in (body, rest)]
    assert macs[0] - macs[1] == 3 * whole - 2 * less


def test_latency_of_copies_is_their_median(monkeypatch):
    def seconds(nets, batch, repeats):
        return {name: float(name[-1]) if name[-1].isdigit() else 9.0 for name in nets}

    monkeypatch.setattr(latency.report, "paired_latency", seconds)
    copies = [{"budget": torch.nn.Identity()} for _ in range(4)]
    nets = {"dense": torch.nn.Identity(), "budget": torch.nn.Identity()}
    assert latency.latency_over_copies(nets, copies, torch.zeros(1), 1) == {"dense": 9.0, "budget": 1.5}


def test_jobs_have_names_of_their_own():
    everything = [job for data in COMPARISONS for job in plan.table(data)]
    everything += [job for data in COMPARISONS for job in plan.swept(data)]
    unique = set(everything)
    assert len({job.name for job in unique}) == len(unique)
    table = set(plan.table("digits"))
    for name, default in {"keep": "0.25", "weight_decay": "5e-3", "patience": "3", "ramp_epochs": "8"}.items():
        assert set(plan.sweep(plan.SWEEPS[name])[default]) <= table, "what the table has is not run again"


def test_the_other_criterion_is_the_one_that_the_recipe_has_not():
    for compared in COMPARISONS.values():
        if compared.rows is None:
            flag, value = compared.changed["other_criterion"]
            assert flag == "--criterion"
            assert {value, compared.recipe().pruning.criterion} == {"response", "importance"}


@pytest.mark.parametrize("data", list(COMPARISONS))
def test_the_recipe_can_train_the_dense_network_too(data):
    """A budget given as a flag would exclude --no_gates."""
    compared = COMPARISONS[data]
    assert compared.recipe("--no_gates").model.name == compared.recipe().model.name


@pytest.mark.parametrize("data", list(COMPARISONS))
def test_a_table_has_the_rows_that_its_rows_build_on(data):
    table = plan.table(data)
    assert {need for job in table for need in job.needs} <= set(table)
    assert {results.OURS, COMPARISONS[data].early, *COMPARISONS[data].changed} <= {job.method for job in table}


def test_the_small_table_is_a_part_of_the_whole():
    small = plan.small_table()
    assert set(small) < set(plan.table("digits", FEW))
    assert {job.method for job in small} == methods.METHODS.keys() - set(plan.SLOW)
    assert all(need.method not in plan.SLOW for job in small for need in job.needs)


def test_sweeps_change_the_recipe():
    """A setting counts as changed exactly if it differs from the default recipe."""
    recipe = COMPARISONS["digits"].recipe
    default = recipe()
    for values in plan.SWEEPS.values():
        for flags in values.values():
            args = recipe(*flags)
            side = args.paper.side_loss_weight
            same = args.flat() == default.flat() | {"side_loss_weight": side} and side in (0.1, None)
            assert same == (plan.setting(flags, 0, 0).flags == ()), flags
    assert plan.SWEEPS["side_loss_weight"]["0.1"] == ()
    assert timm_eps.EpsResNetConfig(architecture="eps_resnet110").side_loss_weight == 0.1


def test_a_value_that_is_the_recipes_is_a_run_of_the_table():
    for name, value in {"keep": "0.25", "weight_decay": "0.005", "patience": "3"}.items():
        assert plan.setting((f"--{name}", value), 0, 0) == jobs.Job("digits", "budget", 0)
    assert plan.setting(("--keep", "0.3"), 0, 0).flags == ("--keep", "0.3")
    assert plan.setting(("--epsilon", "3"), 0, 0).method == "fixed"


@cache
def slots_of_the_digits() -> tuple[str, ...]:
    return tuple(gates(timm.create_model("eps_resnet110")))


def fake_result(job: jobs.Job, accuracy: float) -> dict:
    kept = {"budget": 14, "scratch": 14}.get(job.method, 54)
    return {
        "accuracy": accuracy, "blocks": kept, "epochs": 60, "macs": 10**5 * kept, "params": 10**4 * kept,
        "removed": list(slots_of_the_digits())[kept:], "train_seconds": float(kept),
        "saved": {"timm": True, "transformers": job.method != "torch_pruning_to_size", "bytes": 2**20},
        "train_bytes": 2**20,
        "hardware": "a machine", "versions": {"timm": "1"}, "commit": "abc",
    }  # fmt: skip


@pytest.fixture
def workers(monkeypatch):
    """Processes that finish at once. Returns the names of the started jobs in order."""
    begun = []

    def run(command, **options):
        if "benchmarks.worker" not in command:
            return subprocess.CompletedProcess(command, 0, stdout="abc")
        task = json.loads(command[-1])
        place = Path(task["directory"])
        for needed in task["earlier"].values():
            assert (Path(needed) / "result.json").exists(), "needed runs are done before"
        begun.append(place.name)
        if task["method"] == "fixed":
            options["stdout"].write("it broke")
            return subprocess.CompletedProcess(command, 1)
        job = jobs.Job("digits", task["method"], 0)
        (place / "result.json").write_text(json.dumps(fake_result(job, 0.9)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(jobs.subprocess, "run", run)
    return begun


def test_jobs_run_once_and_after_what_they_need(workers, tmp_path):
    store = jobs.Store(tmp_path / "results.json")

    def runner() -> jobs.Runner:
        return jobs.Runner(jobs.Store(store.path), tmp_path, at_once=2, threads=1)

    wanted = [jobs.Job("digits", "random_blocks", 0), jobs.Job("digits", "scratch", 0)]
    runner().run(wanted)
    assert sorted(workers) == sorted(
        f"digits-{name}-seed0-fold0" for name in ("dense", "budget", "random_blocks", "scratch")
    )
    runner().run(wanted)
    assert len(workers) == 4, "nothing is run again"
    assert set(wanted) <= jobs.Store(store.path).results.keys()
    (tmp_path / "digits-dense-seed0-fold0" / "result.json").unlink()
    runner().run([*wanted, jobs.Job("digits", "torch_pruning_to_size", 0)])
    assert workers[4:] == ["digits-dense-seed0-fold0", "digits-torch_pruning_to_size-seed0-fold0"]


def test_who_measures_speed_runs_alone(monkeypatch, tmp_path):
    """A latency job runs after the others, with all threads, in a process that stays alive. No other job runs then."""
    assert not any(methods.METHODS[need].alone for method in methods.METHODS.values() for need in method.needs)
    running, most, seen = set(), {}, {}

    def run(command, env=None, **options):
        if "benchmarks.worker" not in command:
            return subprocess.CompletedProcess(command, 0, stdout="abc")
        task = json.loads(command[-1])
        method = task["method"]
        running.add(method)
        time.sleep(0.05)
        most[method], seen[method] = set(running), (task["flags"], env)
        running.remove(method)
        (Path(task["directory"]) / "result.json").write_text(
            json.dumps(fake_result(jobs.Job("digits", method, 0), 0.9))
        )
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(jobs.subprocess, "run", run)
    runner = jobs.Runner(jobs.Store(tmp_path / "results.json"), tmp_path, at_once=2, threads=3)
    names = "torch_pruning_to_latency", "scratch", "shallow", "finetuned"
    runner.run(jobs.Job("digits", name, 0) for name in names)
    assert most["torch_pruning_to_latency"] == {"torch_pruning_to_latency"}
    assert list(seen)[-1] == "torch_pruning_to_latency"
    for method, (flags, environment) in seen.items():
        threads = 6 if methods.METHODS[method].alone else 3
        assert flags[flags.index("--num_threads") + 1] == environment["OMP_NUM_THREADS"] == str(threads)
        assert (jobs.KEEPS_MEMORY.items() <= environment.items()) == methods.METHODS[method].alone


def test_a_failed_job_shows_its_log(workers, tmp_path):
    runner = jobs.Runner(jobs.Store(tmp_path / "results.json"), tmp_path, at_once=2, threads=1)
    with pytest.raises(RuntimeError, match=r"digits-fixed-epsilon_2\.0-seed0-fold0 failed:\nit broke"):
        runner.run([jobs.Job("digits", "fixed", 0, 0, ("--epsilon", "2.0"))])


@pytest.fixture
def store(tmp_path):
    """A store with the results of the table and of one sweep."""
    store = jobs.Store(tmp_path / "results.json")
    for job in plan.table("digits"):
        base = {"budget": 0.99, "dense": 0.98, "scratch": 0.995}.get(job.method, 0.99)
        store.results[job] = fake_result(job, base + 0.001 * ((job.fold + len(job.method) * job.seed) % 3))
    for group in plan.sweep(plan.SWEEPS["keep"]).values():
        for job in group:
            store.results.setdefault(job, fake_result(job, 0.97))
    for pair in FEW:
        seconds = {
            method: 2.0 if method == "dense" else 1.0
            for method in [*methods.METHODS, latency.NATIVE, latency.REPARAMETERIZED]
        }
        seconds |= {latency.WHOLE: 1.8, latency.REST: 0.5}
        found = {"seconds at 1": seconds}
        for side in (8, 32):
            found |= {
                f"seconds at 128, {side}x{side}": seconds,
                f"seconds at 128, {side}x{side}, channels_last": seconds,
                f"seconds at 128, {side}x{side}, in ONNX Runtime": {
                    latency.WHOLE: 3.0,
                    latency.REPARAMETERIZED: 1.0,
                    latency.REST: 0.5,
                },
                f"block macs, {side}x{side}": {"dense": 4, "budget": 1},
            }
        store.results[jobs.Job("digits", "latency", *pair)] = found
    return store


def test_the_store_comes_back(store):
    job, result = next(iter(store.results.items()))
    store.add(job, result)
    assert jobs.Store(store.path).results == store.results


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_dirty_by_its_code_not_by_the_results(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "benchmarks").mkdir()
    code, stored = tmp_path / "code.py", tmp_path / "benchmarks" / "results.json"
    for path in (code, stored):
        path.write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    stored.write_text("after")
    assert jobs.conditions()["commit"] == git("rev-parse", "--short", "HEAD")
    code.write_text("after")
    assert jobs.conditions()["commit"] == git("rev-parse", "--short", "HEAD") + "-dirty"


def test_the_page_says_who_is_ahead(store):
    page = results.page(store)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines()}
    assert "ahead" in rows["dense"]
    assert "**behind**" in rows[methods.METHODS["scratch"].name]
    assert "not significant" in rows[methods.METHODS["shallow"].name]
    assert rows[methods.METHODS["torch_pruning_to_size"].name].endswith("| yes | **no** |")
    assert (
        "| 8x8 | 128 | 1.000 ± 0.000 | 1.000 ± 0.000 | 2.00 ± 0.00× | 1.80 ± 0.00× | 4.00 ± 0.00× | 0.45 ± 0.00 "
        "| 0.65 ± 0.00 |"
    ) in page
    in_runtime = (
        "| {0}x{0}, in ONNX Runtime | 128 |  |  |  | 3.00 ± 0.00× | 4.00 ± 0.00× | 0.75 ± 0.00 | 1.25 ± 0.00 |\n"
    )
    assert in_runtime.format(8) in page
    assert "| 32x32, channels_last | 128 | 1.000 ± 0.000 |" in page
    assert "compiled" not in page, "where nothing was measured there is no row"
    assert "| 0.05 | 97.00 ± 0.00 | 14.0 ± 0.0 |" in page
    for size in (8, 32):  # one measurement lacks ONNX Runtime
        del store.results[plan.latency_jobs("digits")[0]][f"seconds at 128, {size}x{size}, in ONNX Runtime"]
    assert results.page(store) == page
    for job in plan.latency_jobs("digits"):  # all measurements lack it
        store.results[job].pop("seconds at 128, 8x8, in ONNX Runtime", None)
    assert results.page(store) == page.replace(in_runtime.format(8), "")


def test_latency_is_measured_once_and_with_memory_that_stays(store, monkeypatch):
    started = []

    def run(command, **options):
        started.append((json.loads(command[-1]), options["env"]))
        return subprocess.CompletedProcess(command, 0, stdout='{"seconds at 1": {"dense": 1.0}}')

    monkeypatch.setattr(main.subprocess, "run", run)
    (job, *_) = plan.latency_jobs("digits")
    del store.results[job]
    for _ in range(2):
        main.measure_latency(store, job, threads=2)
    assert store.results[job] == {"seconds at 1": {"dense": 1.0}}
    ((task, environment),) = started
    assert task["found"].keys() == methods.METHODS.keys()
    assert task["sides"] == [8, 32]
    assert main.KEEPS_MEMORY.items() <= environment.items()
    assert "PATH" in environment


def test_training_times_of_another_machine_do_not_count(store):
    before = results.page(store)
    assert " 0.26× " in before
    for job in plan.table("digits"):
        if job.method == "budget" and job.seed:
            store.results[job] |= {"train_seconds": 1e6, "hardware": "another"}
    after = results.page(store)
    assert after.partition("## Hardware")[0] == before.partition("## Hardware")[0]
    assert "| another | " in after


def test_the_page_says_whether_depth_helps(tmp_path):
    store = jobs.Store(tmp_path / "results.json")
    for name, group in plan.depths().items():
        for job in group:
            result = fake_result(job, 0.8 if name == "ResNet-20" else 0.9)
            store.results[job] = result | {"epochs": 150 if "times" in name else 15}
    page = results.page(store)
    assert "| ResNet-20 | 15 | 3 | 80.00 ± 0.00 | 540 |" in page
    assert "| ResNet-20, ten times as long | 150 | 3 | 90.00 ± 0.00 | 540 |" in page


def test_the_pictures(store, tmp_path):
    curves.draw_curves(store, tmp_path / "curves.png")
    curves.draw_blocks(store, "digits", tmp_path / "blocks.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("curves.png", "blocks.png"))


def test_what_a_needed_job_needs_is_run_before_it(workers, tmp_path):
    runner = jobs.Runner(jobs.Store(tmp_path / "results.json"), tmp_path, at_once=1, threads=1)
    runner.run([jobs.Job("digits", "shallow_with_dense_compute", 0)])
    assert workers.index(jobs.Job("digits", "budget", 0).name) < workers.index(jobs.Job("digits", "shallow", 0).name)
    assert workers[-1] == jobs.Job("digits", "shallow_with_dense_compute", 0).name
    assert len(workers) == 4


def test_what_differs_from_the_stored_figures(store, tmp_path):
    fresh = jobs.Store(tmp_path / "fresh.json")
    wanted = [job for job in plan.table("digits", FEW) if job.method in ("dense", "budget")]
    for job in wanted:
        fresh.results[job] = dict(store.results[job])
    assert "differs" not in results.compared(fresh, store, wanted)
    for job in wanted:
        if job.method == "budget":
            fresh.results[job]["accuracy"] -= 0.02
    text = results.compared(fresh, store, wanted)
    assert text.count("| **differs** |") == 1
    assert text.endswith("within the spread: 7 figures, **differs**: 1 figures")
    assert "nothing stored" in results.compared(fresh, jobs.Store(tmp_path / "none.json"), wanted)


def found_by(names: Iterable[str], tmp_path: Path) -> dict[str, dict]:
    """Networks that the methods find in a few steps, by method."""
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {"architecture": "eps_resnet20", "num_train_epochs": 3, "epsilon_warmup_epochs": 1, "ramp_epochs": 1,
             "patience": 1, "keep": 3, "max_train_samples": 128, "max_eval_samples": 100, "num_threads": 1}
        )
    )  # fmt: skip
    found = {}
    for name in names:
        method, place = methods.METHODS[name], tmp_path / name
        place.mkdir()
        bench = methods.Bench(["--config", str(config)], place, {need: tmp_path / need for need in method.needs})
        found[name] = methods.measured(bench, method.make(bench))
        (place / "result.json").write_text(json.dumps(found[name]))
    return found


def test_a_method_trains_and_says_what_it_cost(tmp_path):
    """Check the resulting network, and that the cost includes the cost of the starting network."""
    found = found_by(("dense", "budget", "scratch", "torch_pruning_to_size"), tmp_path)
    assert [result["epochs"] for result in found.values()] == [3, 3, 3, 6]
    assert found["scratch"]["removed"] == found["budget"]["removed"]
    assert found["torch_pruning_to_size"]["params"] <= found["budget"]["params"] < found["dense"]["params"]


@pytest.mark.slow
def test_every_method_trains_and_says_what_it_cost(tmp_path):
    found = found_by(methods.METHODS, tmp_path)
    assert {name for name, result in found.items() if result["epochs"] == 6} == {
        "finetuned", "random_blocks", "stochastic_depth", "torch_pruning_to_size", "torch_pruning_to_latency",
    }  # fmt: skip
    smaller = found["dense"]["macs"] / found["budget"]["macs"]
    assert found["scratch_with_dense_compute"]["epochs"] == round(3 * smaller)
    epochs = found["budget_with_dense_compute"]["epochs"]
    assert epochs == found["dense_with_as_many_epochs"]["epochs"] == 2 + round(smaller), "two of them are dear"
    smaller = found["dense"]["macs"] / found["shallow"]["macs"]
    assert found["shallow_with_dense_compute"]["epochs"] == round(3 * smaller)
    assert found["scratch"]["removed"] == found["budget"]["removed"]
    for name in (
        "budget", "budget_with_dense_compute", "other_pace", "other_pace_with_dense_compute", "smaller_budget",
        "finetuned", "scratch", "shallow", "shallow_with_dense_compute", "random_blocks", "stochastic_depth",
    ):  # fmt: skip
        assert found[name]["blocks"] == 3, name
    bench = methods.Bench(["--config", str(tmp_path / "config.json")], tmp_path, {"dense": tmp_path / "dense"})
    heads = [bench.load("dense").side_head.state_dict() for _ in range(2)]
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0]), "what was not saved is drawn by the seed"
    for name, result in found.items():
        is_channels = name.startswith("torch_pruning")
        assert result["saved"]["timm"] == result["saved"]["transformers"] == (not is_channels), result["saved"]
        assert latency.build("eps_resnet20", 10, result)(torch.randn(1, 3, 8, 8)).shape == (1, 10)
    assert found["torch_pruning_to_size"]["params"] <= found["budget"]["params"]
    assert found["random_blocks"]["train_seconds"] > found["dense"]["train_seconds"]

"""The comparison on pretrained weights: data, structures, job runner, and tables."""

from __future__ import annotations

import gzip
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from benchmarks.pretrained import cases, images, latency, methods, plan, prepare, run, structures, tables, training
from benchmarks.pretrained.methods import Job
from timm_eps.surgery.branches import gates

CPU = torch.device("cpu")


def write_images(directory: Path, train: int = 400, test: int = 60) -> Path:
    """Noise in the format of Fashion-MNIST. Brightness encodes the class, so that training can learn."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        noise = rng.integers(0, 30, (count, 28, 28))
        arrays[f"{split}_images"] = (noise + 22 * labels[:, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    directory.mkdir(exist_ok=True)
    np.savez(directory / prepare.IMAGES, **arrays)
    return directory


def write_idx(path: Path, array: np.ndarray, kind: bytes = b"\x08") -> None:
    path.write_bytes(b"\0\0" + kind + bytes([array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes())


def test_idx_files_gzipped_or_not(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "plain", array)
    (tmp_path / "packed.gz").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    for name in ("plain", "packed.gz"):
        assert np.array_equal(prepare.read_idx(tmp_path / name), array)
    (tmp_path / "short").write_bytes((tmp_path / "plain").read_bytes()[:-1])
    write_idx(tmp_path / "floats", array, b"\x0d")
    for name, message in (("short", "its header says"), ("floats", "no IDX file")):
        with pytest.raises(ValueError, match=message):
            prepare.read_idx(tmp_path / name)


def test_images_of_debian_and_of_the_hub_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8), np.arange(6, dtype=np.uint8)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", pixels)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", labels)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=6)})
        rows = {"image": [Image.fromarray(image) for image in pixels], "label": labels.tolist()}
        table = datasets.Dataset.from_dict(rows, features)
        table.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    debian, hub = prepare.images_from_idx(tmp_path), prepare.images_from_hub(str(tmp_path / "hub"))
    assert debian.keys() == hub.keys() == {f"{s}_{w}" for s in ("train", "test") for w in ("images", "labels")}
    assert all(np.array_equal(debian[name], hub[name]) for name in debian)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"no t10k-labels-idx1-ubyte\[\.gz\]\. Install"):
        prepare.images_from_idx(tmp_path)


def test_weights_are_named_by_order():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    values = [value for name, value in model.state_dict().items() if "tracked" not in name]
    foreign = {f"their.{index}": torch.rand_like(value) for index, value in enumerate(values)}
    named = prepare.named_by_order(foreign, model)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(named.values(), foreign.values(), strict=True))
    assert list(named) == [name for name in model.state_dict() if "tracked" not in name]
    with pytest.raises(ValueError, match=r"6 tensors, .*has 7|5 tensors, .* has 6"):
        prepare.named_by_order(dict(list(foreign.items())[1:]), model)
    with pytest.raises(ValueError, match=r"'their\.0' has the shape"):
        prepare.named_by_order({**foreign, "their.0": torch.zeros(5)}, model)


def test_classes_are_numbered_anew(tmp_path):
    data = write_images(tmp_path)
    found = images.load(data, "train", (2, 4, 6), CPU)
    assert found.images.shape == (120, 1, 28, 28)
    assert found.labels.unique().tolist() == [0, 1, 2]
    brightness = [float(found.images[found.labels == label].float().mean()) for label in range(3)]
    assert brightness == sorted(brightness)


@pytest.mark.parametrize("count", [30, 31, 39])
def test_subsets_are_stratified_and_drawn_by_seed(tmp_path, count):
    whole = images.load(write_images(tmp_path), "train", tuple(range(10)), CPU)
    some, rest = images.divide(whole, count, seed=0)
    counts = torch.bincount(some.labels)
    assert len(some) == count
    assert counts.max() - counts.min() <= 1
    assert len(rest) == len(whole) - count
    together = torch.cat([some.images, rest.images]).flatten(1).double().sum(1).sort().values
    assert torch.equal(together, whole.images.flatten(1).double().sum(1).sort().values)
    assert torch.equal(images.divide(whole, count, seed=0)[0].images, some.images)
    assert not torch.equal(images.divide(whole, count, seed=1)[0].images, some.images)


def test_every_pass_sees_each_image_once(tmp_path):
    some, _ = images.divide(images.load(write_images(tmp_path), "train", tuple(range(10)), CPU), 40, 0)
    batches = list(images.training_batches(some, 10, 8, seed=0))
    assert len(batches) == 8
    for start in (0, 4):
        labels = torch.cat([labels for _, labels in batches[start : start + 4]])
        assert torch.equal(torch.bincount(labels), torch.bincount(some.labels))
    assert images.Reader(20, {"mean": (0.5,) * 3, "std": (0.5,) * 3})(batches[0][0]).shape == (10, 3, 20, 20)


def test_the_rate_rises_falls_and_ends_near_zero():
    rates = [training.share_of_rate(step, 200) for step in range(200)]
    assert max(rates) == 1
    assert rates.index(1) == 9
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_training_without_gates_keeps_the_weights():
    model = timm.create_model("eps_resnet20", num_classes=3, drop_path_rate=0.2)
    before, batch = model.state_dict(), torch.randn(2, 3, 32, 32)
    expected = model.eval()(batch)
    structures.without_gates(model)
    assert not gates(model)
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(model(batch), expected)
    assert model.stages[2].blocks[2].drop_path.drop_prob == pytest.approx(0.2)


def test_the_sibling_has_the_smaller_ones_architecture():
    large, small = (methods.slots_of(f"eps_tf_efficientnet_lite{index}") for index in (1, 0))
    rises = {slot: float(index) for index, slot in enumerate(reversed(large))}
    chosen = methods.least(rises, methods.excess_by_stage(large, small))
    assert len(chosen) == 5
    cut = timm.create_model("eps_tf_efficientnet_lite1", num_classes=10, removed=chosen)
    whole = timm.create_model("eps_tf_efficientnet_lite0", num_classes=10)
    shapes = [[tuple(parameter.shape) for parameter in model.parameters()] for model in (cut, whole)]
    assert shapes[0] == shapes[1]


def test_bisection_finds_the_least_share():
    assert methods.bisected(lambda ratio: ratio >= 0.4, steps=12) == pytest.approx(0.4, abs=1e-3)


def test_jobs_come_after_what_they_need_and_none_twice():
    jobs = [*plan.jobs("resnet56", "distilled", 600, [0, 1]), *plan.jobs("lite0", "labels", 6000, [0])]
    assert len(jobs) == len(set(jobs))
    assert jobs[0] == Job("resnet56", "pretraining", 0, 0, 0)
    for index, job in enumerate(jobs):
        assert set(job.needs()) <= set(jobs[:index])
    assert {method for group in plan.GROUPS.values() for method, _ in group} <= methods.METHODS.keys()
    assert {job.keep for job in jobs if job.method == "last"} == {12, 3}


@pytest.fixture(scope="module")
def in_this_process():
    """Run jobs in threads of this process, which saves the imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_pool", lambda at_once, threads: ThreadPoolExecutor(at_once))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, in_this_process):
    """Records of a few steps of the most different methods, from two calls in a row."""
    place = tmp_path_factory.mktemp("pretrained")
    data, output = write_images(place / "data"), place / "records.jsonl"
    keep = cases.CASES["smoke"].keeps[0]
    wanted = [
        Job("smoke", "dense", 48, 0, 0, True), Job("smoke", "leave_one_out", 48, keep, 0, True),
        Job("smoke", "ramp_importance", 48, keep, 0), Job("smoke", "channels_to_size", 48, keep, 0),
    ]  # fmt: skip
    jobs = plan.with_needs(wanted)
    settings = dict(at_once=1, threads=1, budget_seconds=float("inf"), conditions={"command": "test"})
    left = run.run(jobs[:3], data, place / "work", output, **settings)
    left += run.run(jobs, data, place / "work", output, **settings)
    return jobs, left, run.read_records(output)


def test_every_job_is_done_once(finished):
    jobs, left, records = finished
    assert not left
    assert not [record for record in records if "error" in record]
    assert sorted(map(str, map(run.job_of, records))) == sorted(map(str, jobs))
    assert {record["command"] for record in records} == {"test"}


def test_records_hold_what_rebuilds_the_network(finished):
    _, _, records = finished
    found = {(record["method"], record["distilled"]): record for record in records}
    pruned = found["leave_one_out", True]
    removed = found["dense", False]["analysis"]["removed"][str(pruned["keep"])]
    assert sorted(pruned["removed"]) == sorted(removed)
    assert "predicted_rise" in pruned
    networks = latency.networks(records, "smoke", 48, pruned["keep"], 0)
    assert networks.keys() == {"dense", "leave_one_out", "ramp_importance", "channels_to_size"}
    sizes = {method: sum(parameter.numel() for parameter in net.parameters()) for method, net in networks.items()}
    assert sizes == {record["method"]: record["params"] for record in records if record["method"] in networks}
    with pytest.raises(ValueError, match="the record of the run 7"):
        structures.rebuilt({**pruned, "params": 7})
    batch = structures.sample(cases.CASES["smoke"], 2)
    assert latency.by_way(latency.MEASURED["eager"], networks, batch, repeats=1).keys() == networks.keys()
    assert len(found["ramp_importance", False]["removed"]) == 6
    narrow = found["channels_to_size", False]
    assert 0 < narrow["ratio"] < 1
    assert narrow["params"] <= pruned["params"]
    assert found["dense", True]["macs"] == found["dense", False]["macs"] > pruned["macs"]


@pytest.mark.slow
def test_processes_of_their_own(tmp_path):
    jobs = plan.jobs("smoke", "dense", 48, [0])
    settings = dict(at_once=2, threads=1, budget_seconds=float("inf"))
    assert not run.run(jobs, write_images(tmp_path), tmp_path / "work", tmp_path / "records.jsonl", **settings)
    assert len(run.read_records(tmp_path / "records.jsonl")) == 2


def test_nothing_is_started_that_would_end_too_late(tmp_path):
    jobs = plan.jobs("smoke", "dense", 48, [0])
    left = run.run(jobs, tmp_path, tmp_path / "work", tmp_path / "r.jsonl", at_once=1, threads=1, budget_seconds=-1)
    assert left == jobs
    assert not (tmp_path / "r.jsonl").exists()


def test_a_failure_is_recorded_and_tried_again(tmp_path, in_this_process):
    jobs = plan.jobs("smoke", "dense", 48, [0])[:1]
    settings = dict(at_once=1, threads=1, budget_seconds=float("inf"))
    output = tmp_path / "records.jsonl"
    assert run.run(jobs, tmp_path / "missing", tmp_path / "work", output, **settings) == jobs
    (record,) = run.read_records(output)
    assert "FileNotFoundError" in record["error"]
    data = write_images(tmp_path / "data")
    assert not run.run(jobs, data, tmp_path / "work", output, **settings)
    assert len(tables.by_job(run.read_records(output))) == 1


def record(method: str, seed: int, accuracy: float, keep: int = 3, distilled: bool = True, **more) -> dict:
    job = dict(case="lite0", method=method, images=600, keep=keep, seed=seed, distilled=distilled)
    return {
        **job,
        "accuracy": accuracy,
        "params": 2_000_000,
        "macs": 40_000_000,
        "hardware": "a card",
        "seconds": 30.0 if distilled else 20.0,
        **more,
    }


def test_intervals_are_students_of_paired_differences():
    values = [0.4, 0.9, 0.2, 0.7, 0.5]
    half = 2.776445 * statistics.stdev(values) / 5**0.5
    low, high = statistics.mean(values) - half, statistics.mean(values) + half
    assert tables.interval(values) == f"+0.54 [{low:+.2f}, {high:+.2f}]"
    assert tables.interval([-1.0] * 3) == "−1.00 [−1.00, −1.00]"
    assert tables.interval([1.0, 2.0]) == "", "of two values it would be as wide as a barn"
    assert tables.paired({0: 0.91, 1: 0.92, 2: 0.5}, {1: 0.90, 0: 0.90}) == pytest.approx([1.0, 2.0])


def test_the_page_compares_with_dense_and_with_the_best_simple_cut(tmp_path):
    records = [record("dense", seed, 0.90, 0, False) for seed in range(3)]
    records += [record("dense", seed, 0.905, 0) for seed in range(3)]
    records += [record("last", seed, 0.90 + seed / 1000, predicted_rise=1.0) for seed in range(3)]
    records += [record("even", seed, 0.89 + seed / 1000, predicted_rise=3.0) for seed in range(3)]
    records += [record("random", seed, 0.88, predicted_rise=4.0) for seed in range(3)]
    records += [record("leave_one_out", seed, 0.91 + seed / 1000, predicted_rise=0.5) for seed in range(3)]
    records += [{**record("scratch", 0, 0.1, 0, False), "error": "none"}]
    path = tmp_path / "pretrained.json"
    tables.store(records[:5], path)
    tables.store(records, path)
    stored = json.loads(path.read_text())
    assert len(stored) == len(records) - 1
    rows = {line.split(" | ")[0]: line for line in tables.page(stored).splitlines() if line.startswith("| ")}
    assert "to the best simple cut (last branches removed)" in tables.page(stored)
    cells = rows["| leave-one-out"].split(" | ")
    assert cells[1:4] == ["yes", "3", "91.10 ± 0.10"]
    assert cells[4].startswith("+1.10 [")
    assert cells[5].startswith("+0.60 [")
    assert cells[6] == "+1.00 [+1.00, +1.00]"
    assert "−1.00 on average over 3 seeds, 12 structures" in tables.page(stored)
    assert "scratch" not in rows
    measured = [
        {**about, "way": "eager", "batch": 1, "seed": seed, "seconds": {"dense": 2.0, "leave_one_out": 1.0 + seed / 10}}
        for about in ({"case": "lite0", "images": 600, "keep": 3}, {"case": "lite0", "images": 6000, "keep": 3})
        for seed in range(2)
    ]
    lines = tables.page(stored, measured).splitlines()
    assert next(line for line in lines if line.startswith("| leave-one-out ")).endswith(" 40.00 | 2.50 | yes | 0.53 |")
    assert any(line.endswith("| eager at 1, of dense |") for line in lines)
    records += [record("channels_to_latency", seed, 0.905, ratio=0.3) for seed in range(3)]
    line = next(line for line in tables.page(records).splitlines() if line.startswith("| Torch-Pruning, as fast "))
    assert line.endswith(" 40.00 | 2.50 |  |")
    line = "random −2.50 [−2.50, −2.50]; leave-one-out +0.60 [+0.35, +0.85]."
    assert line in tables.page(records)

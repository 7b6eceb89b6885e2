"""The page: its statements are true, sections appear only if data exist, and it runs and fetches nothing."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import shutil
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import SLOTS, make_dataset, tiny_net, write_splits
from torch import nn

import timm_eps
from timm_eps import cli
from timm_eps.analysis.answers import compare_answers, paired_difference
from timm_eps.analysis.report import Analysis
from timm_eps.analysis.worth import Branch, Step
from timm_eps.cli import report as verb
from timm_eps.page import answer_sections, drawings, numbers
from timm_eps.page import writing as page
from timm_eps.report import count_parameters

VOID = {"meta", "img", "br", "link", "input", "hr"}
REMOVED = SLOTS[4:]
HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Sections, scripts and addresses of a page. Raises AssertionError if a closing tag has no opening tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.sections: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data", "xlink:href")]
        if tag == "section":
            self.sections.append(values["id"])
        assert not any(name.startswith("on") for name in values)
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, because threads of tiny layers wait for each other; and no picture of the networks."""
    monkeypatch.setattr("timm_eps.hub.saving.find_spec", lambda name: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def network_saved_once(removed, labels, options):
    directory = tempfile.TemporaryDirectory(prefix="page-")  # deleted when the process ends
    timm_eps.save_pretrained(tiny_net(removed=list(removed), **dict(options)), directory.name, label_names=labels)
    return directory


def saved(directory, results=None, removed=REMOVED, labels=None, **options):
    """Save a small network with results."""
    once = network_saved_once(tuple(removed), labels and tuple(labels), tuple(options.items()))
    shutil.copytree(once.name, directory, dirs_exist_ok=True)
    if results is not None:
        (Path(directory) / "all_results.json").write_text(json.dumps(results))


def run_results(**more):
    return {
        "architecture": "eps_resnet20", "dataset": "noise & more", "eval_accuracy": 0.8125, "eval_images": 1600,
        "dense_eval_accuracy": 0.9375, "eval_accuracy_by_class": {"a": 0.75, "b": 0.875},
        "dense_eval_accuracy_by_class": {"a": 1.0, "b": 0.875}, "latency_batch1_seconds": 0.00125,
        "dense_latency_batch1_seconds": 0.0025, "latency_batch1_speedup_quartiles": [1.75, 2.25],
        "onnx_latency_batch8_seconds": 0.003, "dense_onnx_latency_batch8_seconds": 0.0045, "removed": REMOVED,
        "hardware": "an abacus", "seed": 7, "arguments": {"keep": 4}, "versions": {"torch": "9"}, **more,
    }  # fmt: skip


def an_analysis(slots=SLOTS) -> Analysis:
    branches = [Branch(slot, (-1) ** i * 0.01 * 2**i, 1.0, 1000, 10_000, {}) for i, slot in enumerate(slots)]
    steps = [Step(slots[:i][-1:], 0.1 * i, 1 - 0.1 * i, len(slots) - i, 9000, 100_000 - 9000 * i, {}) for i in range(4)]
    return Analysis("eps_resnet20", "an abacus", 100, (3, 8, 8), branches, steps)


class Known(nn.Module):
    """A classifier that reads its answer from the first pixel of a channel."""

    def __init__(self, channel: int, classes: int = 3) -> None:
        super().__init__()
        self.channel, self.classes = channel, classes
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return nn.functional.one_hot(x[:, self.channel, 0, 0].clamp(0, self.classes - 1).long(), self.classes).float()


def known_batches(labels, before, after):
    images = torch.zeros(len(labels), 3, 4, 4)
    images[:, 0, 0, 0], images[:, 1, 0, 0] = torch.tensor(before), torch.tensor(after)
    return list(zip(images.split(2), torch.tensor(labels).split(2), strict=True))


def test_from_the_directory_alone(tmp_path):
    saved(tmp_path)
    found = read(timm_eps.write_page(tmp_path))
    assert found.sections == ["structure", "size", "load"]
    assert f"{count_parameters(tiny_net(removed=REMOVED)):,}" in found.text
    assert f"{count_parameters(tiny_net()):,}" in found.text
    assert "3 of 3 branches" in found.text
    assert "1 of 3 branches" in found.text
    assert "0 of 3 branches" in found.text
    assert "No latency was measured" in found.text


def test_nothing_runs_and_nothing_is_fetched(tmp_path):
    saved(tmp_path, run_results(), labels=[HOSTILE, *"bcdefghij"])
    batches = [(torch.randn(40, 3, 8, 8), torch.randint(10, (40,)))]
    found = read(page.write_page(tmp_path, batches=batches, dense=tiny_net(), analysis=an_analysis()))
    assert found.sections == [
        "structure", "size", "latency", "accuracy", "confusion", "examples", "costs", "load", "provenance"
    ]  # fmt: skip
    assert "script" not in found.tags
    assert HOSTILE in found.text  # as text, not as a tag
    assert all(address.startswith("data:image/") for address in found.addresses)
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "report.html").read_text())


def test_figures_are_those_of_the_results(tmp_path):
    saved(tmp_path, run_results(test_accuracy=0.5))
    found = read(page.write_page(tmp_path))
    for text in ("81.2 %", "93.8 %", "−12.5 points", "1,600", "1.25 ms", "2.50 ms", "2.00× as fast (1.75 to 2.25)",
                 "3.00 ms", "1.50× as fast", "ONNX Runtime", "−25.0", "an abacus", "noise & more", "50.0 %",
                 "--keep"):  # fmt: skip
        assert text in found.text
    assert found.sections == ["structure", "size", "latency", "accuracy", "load", "provenance"]


def test_a_dense_network_is_not_compared_with_itself(tmp_path):
    saved(tmp_path, run_results(removed=[], dense_eval_accuracy=None), removed=[])
    found = read(page.write_page(tmp_path))
    assert "no branch was removed" in found.text
    assert "as fast" not in found.text
    assert "pruned" not in found.text.lower()


def test_an_encoder_has_no_accuracy(tmp_path):
    saved(tmp_path, num_classes=0)
    found = read(page.write_page(tmp_path))
    assert found.sections == ["structure", "size", "load"]
    assert "AutoModel.from_pretrained" in found.text
    with pytest.raises(ValueError, match="no classifier"):
        page.write_page(tmp_path, batches=[(torch.randn(2, 3, 8, 8), torch.zeros(2).long())])


def test_each_branch_of_a_block_is_a_square():
    drawn = str(drawings.draw_blocks([{"a.1": True, "a.2": False}, {"b": True}], "stage <0>"))
    squares = re.findall(r'class="(\w+)" x="([\d.]+)" y="([\d.]+)".*?<title>(.*?)</title>', drawn)
    assert [(kind, title) for kind, _, _, title in squares] == [
        ("kept", "a.1: kept"), ("removed", "a.2: removed"), ("kept", "b: kept")
    ]  # fmt: skip
    assert squares[0][1] == squares[1][1] != squares[2][1]
    assert 'aria-label="stage &lt;0&gt;"' in drawn


@pytest.mark.slow
def test_a_network_with_two_branches_in_a_block(tmp_path):
    model = timm.create_model("eps_test_vit", num_classes=4, removed=["blocks.2.drop_path1"])
    timm_eps.save_pretrained(model, tmp_path)
    text = page.write_page(tmp_path).read_text()
    assert '<rect class="removed"' in text
    assert "blocks.2.drop_path1: removed" in text
    assert "blocks.2.drop_path2: kept" in text


def test_changed_answers_are_the_right_ones():
    labels, before, after = [0, 1, 2, 0, 1, 2, 0], [0, 1, 1, 1, 1, 2, 2], [0, 2, 2, 2, 1, 2, 0]
    answers = compare_answers(Known(1), known_batches(labels, before, after), 3, Known(0))
    assert [change[1:] for change in answers.lost] == [(1, 1, 2)]
    assert [change[1:] for change in answers.won] == [(2, 1, 2), (0, 2, 0)]
    assert answers.changed == 4  # one image stays wrong
    assert answers.accuracy == pytest.approx(5 / 7)
    assert answers.accuracy_before == pytest.approx(4 / 7)
    assert answers.confusion(answers.after).tolist() == [[2, 0, 1], [0, 1, 1], [0, 0, 2]]
    assert answers.confused(answers.after) == {(0, 2): 1, (1, 2): 1}
    assert answers.by_class(answers.after) == {0: pytest.approx(2 / 3), 1: 0.5, 2: 1.0}
    assert answers.lost[0].image[0, 0, 0] == 1


def test_only_so_many_images_are_kept():
    answers = compare_answers(Known(1), known_batches([0] * 9, [0] * 9, [1] * 9), 3, Known(0), most=4)
    assert len(answers.lost) == 4
    assert answers.difference.lost == 9


def test_examples_take_the_room_that_the_others_leave():
    shown = {}
    for name, (before, after) in {"lost": (0, 1), "won": (1, 0)}.items():
        count = {"lost": 30, "won": 3}[name]
        shown[name] = known_batches([0] * count, [before] * count, [after] * count)
    answers = compare_answers(Known(1), [*shown["lost"], *shown["won"]], 3, Known(0))
    cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    kinds = [example["kind"] for example in answer_sections.examples(["a", "b", "c"], answers, cfg)]
    assert kinds == ["lost"] * 21 + ["won"] * 3


def test_interval_of_a_paired_difference():
    """Agresti and Min: half an image is added to each cell of the table."""
    before = torch.tensor([True] * 10 + [False] * 2 + [True] * 88)
    after = torch.tensor([False] * 10 + [True] * 2 + [True] * 88)
    found = paired_difference(before, after)
    assert (found.value, found.lost, found.won) == (-0.08, 10, 2)
    spread = 1.959964 * math.sqrt(13 - 64 / 102) / 102
    assert (found.lower, found.upper) == (pytest.approx(-8 / 102 - spread), pytest.approx(-8 / 102 + spread))
    same = paired_difference(before, before)
    assert same.lower == -same.upper < 0 == same.value


def test_many_classes_give_pairs_instead_of_a_heat_map(tmp_path):
    classes = 40
    names = [f"kind {number}" for number in range(classes)]
    saved(tmp_path, num_classes=classes, labels=names)
    batches = [(torch.randn(60, 3, 8, 8), torch.arange(60) % classes)]
    found = read(page.write_page(tmp_path, batches=batches))
    assert "The most frequent confusions, 20 of" in found.text
    assert 'class="heat"' not in (tmp_path / "report.html").read_text()
    assert "the 20 of 40 classes" in found.text
    assert "examples" not in found.sections


def test_heat_map_has_a_cell_for_each_pair(tmp_path):
    saved(tmp_path)
    found = page.write_page(tmp_path, batches=[(torch.randn(20, 3, 8, 8), torch.arange(20) % 10)]).read_text()
    assert len(re.findall(r'<td class="(?:right|wrong)', found)) == 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eval_accuracy", 1.5), ("eval_accuracy", "high"), ("eval_images", -1), ("latency_batch1_seconds", 0),
        ("latency_batch1_speedup_quartiles", [1]), ("eval_accuracy_by_class", [1]),
        ("dense_eval_accuracy_by_class", {"a": 2}), ("removed", SLOTS[:1]), ("removed", 5), ("params", 5),
        ("architecture", "eps_resnet32"), ("dataset", 5), ("hardware", ["x"]), ("arguments", "x"), ("versions", 1),
    ],
)  # fmt: skip
def test_a_wrong_field_of_the_results_is_named(tmp_path, field, value):
    network = SimpleNamespace(
        directory=tmp_path, body=nn.Linear(2, 2), architecture="eps_resnet20", removed=list(REMOVED)
    )
    (tmp_path / "all_results.json").write_text(json.dumps(run_results(**{field: value})))
    with pytest.raises(ValueError, match=field) as caught:
        page.load_results(network)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"eval_accuracy": NaN}', "[" * 20_000, "\ud800"])
def test_results_that_are_no_json_object_are_refused(tmp_path, content):
    (tmp_path / "all_results.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"all_results\.json"):
        page.load_results(SimpleNamespace(directory=tmp_path))


def test_an_analysis_of_another_network_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"another network.*blocks\.7"):
        page.write_page(tmp_path, analysis=an_analysis([*SLOTS, "stages.0.blocks.7.drop_path"]))
    (tmp_path / "branches.json").write_text("{}")
    with pytest.raises(ValueError, match=r"branches\.json"):
        page.write_page(tmp_path)
    an_analysis().save(tmp_path / "branches.json")
    assert "costs" in read(page.write_page(tmp_path)).sections


def test_a_directory_without_a_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        page.write_page(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_dense_network_must_fit(tmp_path):
    saved(tmp_path)
    batches = [(torch.randn(2, 3, 8, 8), torch.zeros(2).long())]
    with pytest.raises(ValueError, match="10 classes"):
        page.write_page(tmp_path, batches=batches, dense=Known(0))
    with pytest.raises(ValueError, match="needs batches"):
        page.write_page(tmp_path, dense=tiny_net())
    with pytest.raises(ValueError, match="device 'abacus'"):
        page.write_page(tmp_path, device="abacus")
    other = tiny_net()
    other.pretrained_cfg = {**other.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    with pytest.raises(ValueError, match="mean"):
        page.write_page(tmp_path, batches=batches, dense=other)
    assert not (tmp_path / "report.html").exists()


def test_latency_measured_now_replaces_that_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_eps.page.timings.find_spec", lambda name: None)  # the ONNX export would take longer
    monkeypatch.setattr("timm_eps.analysis.measure._SECONDS", 0.0)
    saved(tmp_path, run_results())
    found = read(page.write_page(tmp_path, latency_batch_sizes=(2,)))
    assert "Measured when this page was written" in found.text
    assert "2 images" in found.text
    assert "ONNX Runtime" not in found.text


def test_labels_of_points_that_are_close_stay_apart():
    marks = [drawings.Mark(50, 0.1 + 1e-6 * i, f"{i}", "kept", f"<{i}>") for i in range(4)]
    drawn = str(drawings.draw_scatter(marks, "x", "y", "name"))
    labels = [(float(x), float(y)) for x, y in re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)"', drawn)]
    assert len(labels) == 4
    for (x, y), (other_x, other_y) in itertools.combinations(labels, 2):
        assert abs(x - other_x) >= 20.9 or abs(y - other_y) >= 11.9
    assert "&lt;0&gt;" in drawn


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [5.0, 5.0], [-1e-9, 1e9], [-3.0, -2.0]])
def test_drawings_of_odd_values_stay_inside(values):
    marks = [drawings.Mark(value, value, "") for value in values]
    for draw in (drawings.draw_scatter, drawings.draw_line):
        drawn = str(draw(marks, "x", "y", "name"))
        places = [float(place) for place in re.findall(r'c[xy]="([^"]+)"', drawn)]
        assert len(places) == 2 * len(values)
        assert all(0 <= place <= 440 for place in places)


def test_numbers_as_people_write_them():
    assert [numbers.short_count(value) for value in (7, 999_499, 1_234_567, 12_345_678)] == [
        "7", "999 k", "1.23 M", "12.3 M"
    ]  # fmt: skip
    assert [numbers.signed(value) for value in (-0.01, 0.0, -1.25, 2)] == ["0.0", "0.0", "−1.2", "+2.0"]
    assert [numbers.milliseconds(value) for value in (0.5, 12.34, 1234.5)] == ["0.50 ms", "12.3 ms", "1,234 ms"]


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    verb.add_arguments(parser)
    return parser.parse_args(words)


def test_the_verb_compares_on_a_data_set(tmp_path, capsys):
    data = write_splits(tmp_path / "data", train=make_dataset(12), validation=make_dataset(30))
    saved(tmp_path / "out", labels=["a", "b", "c"], num_classes=3)
    saved(tmp_path / "dense", labels=["a", "b", "c"], num_classes=3, removed=[])
    out = str(tmp_path / "page.html")
    words = [str(tmp_path / "out"), "--dataset_name", data, "--dense", str(tmp_path / "dense"), "--output", out]
    assert cli.main(["report", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": out, "bytes": Path(out).stat().st_size}
    found = read(tmp_path / "page.html")
    assert "of 30" in found.text
    assert "95 % interval" in found.text
    with pytest.raises(ValueError, match="10 classes"):
        verb.run(parse(*words[:1], "--digits"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dense", "x"], "--dense needs images"), (["--digits", "--train_dir", "x"], "excludes"),
        (["--digits", "--analyze"], "--analyze needs --dense"), (["--compile"], "--compile needs --measure"),
        (["--max_eval_samples", "3"], "needs images"),
    ],
)  # fmt: skip
def test_arguments_of_the_verb_that_do_not_go_together(words, message):
    with pytest.raises(ValueError, match=message):
        verb.run(parse("out", *words))

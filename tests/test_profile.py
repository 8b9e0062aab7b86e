"""Counts against closed forms and published figures; the whole report once, on a miniature."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import models
import profile_gpu
import train
from data import UserError

CPU = torch.device("cpu")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.aux1 = nn.Linear(5, 7)
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))
        return (self.fc(x), self.aux1(x)) if self.training else self.fc(x)


def test_the_cost_of_a_tiny_network_is_its_closed_form():
    model = Tiny().train()
    c = profile_gpu.cost(model, 16)
    assert c["parameters"] == (3 * 5 * 9 + 5) + 10 + (5 * 2 + 2)
    assert c["auxiliary_parameters"] == 5 * 7 + 7
    assert c["multiply_adds"] == 8 * 8 * 5 * 3 * 9 + 5 * 2
    assert c["depth"] == 2
    floats = c["parameters"] + c["auxiliary_parameters"] + 10  # weights, and BatchNorm's two averages
    assert c["megabytes"] == pytest.approx((4 * floats + 8) / 1e6)  # and its counter, an int64
    assert model.training


@pytest.mark.parametrize("arch, size, parameters, giga, depth", [
    ("alexnet", 224, 61_100_840, 0.714, 8),
    ("vgg16", 224, 138_357_544, 15.470, 16),
    ("resnet18", 224, 11_689_512, 1.814, 21),
    ("resnet34", 224, 21_797_672, 3.664, 37),
    ("inception_v3", 299, 23_834_568, 5.713, 95),
])  # fmt: skip
def test_counts_agree_with_torchvisions_published_ones(arch, size, parameters, giga, depth):
    with torch.device("meta"):
        model = models.bare_network(arch, aux=True)
    c = profile_gpu.cost(model, size)
    assert c["parameters"] == parameters and c["depth"] == depth
    assert c["multiply_adds"] / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("steps", [1, 12])
def test_a_timed_epoch_takes_the_steps_that_its_seconds_are_divided_by(monkeypatch, steps):
    sizes = []
    monkeypatch.setattr(train, "train_one_epoch", lambda model, batches, *args, **kwargs:
                        sizes.extend(len(y) for _, y, _ in batches))
    args = SimpleNamespace(batch_size=2, steps=steps)
    *_, epoch = profile_gpu.make_epoch("squeezenet1_1", 32, args, CPU)
    epoch()
    assert sizes == [2] * steps


def test_calls_are_timed_interleaved_and_the_warm_up_is_not_counted():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = profile_gpu.interleaved(calls, CPU, rounds=2)
    assert "".join(order) == "cba" + "abc" + "cba"
    assert all(len(spent) == 2 for spent in times.values())


def test_the_report_of_two_small_networks_holds_every_figure_that_a_cpu_can_measure(capsys):
    argv = ["resnet18", "squeezenet1_1", "--size", "32", "--batch-size", "4", "--many", "4", "--steps", "1",
            "--rounds", "1", "--device", "cpu", "--json", "cost.json"]  # fmt: skip
    profile_gpu.main(argv)
    text = capsys.readouterr().out
    report = json.loads(open("cost.json").read())
    networks, training, inference, steps = report["tables"].values()
    assert list(networks) == ["resnet18", "squeezenet1_1", "teacher / student"]
    assert report["provenance"]["torch"] and report["args"]["many"] == 4
    sizes = [row["parameters M"] for row in networks.values()]
    assert sizes[2] == sizes[0] / sizes[1] and sizes[0] == pytest.approx(11.689512)
    assert all(row["images/s"] > 0 and row["GB allocated"] is None for row in training.values())
    row = training["resnet18"]  # 5216 images, as many epochs as the recipe pneumonia gives a student
    epochs = train.RECIPES["pneumonia"]["student"]["epochs"]
    assert row["hours"] == pytest.approx(epochs * 5216 / row["images/s"] / 3600)
    asked = [row for name, row in inference.items() if "thread" in name]
    assert "resnet18, 1 thread" in inference and len(asked) == len(inference) - 1
    assert all(row["95 % ms"] >= row["median ms"] > 0 and row["images/s"] > 0 for row in asked)
    all_threads = f"{torch.get_num_threads()} thread"
    last = [row["median ms"] for name, row in inference.items() if all_threads in name]
    assert inference["teacher / student"]["median ms"] == last[0] / last[1]
    assert list(steps) == ["a bare loop", "b baseline", "c teacher's table", "d teacher asked live"]
    assert steps["a bare loop"]["ratio to a"] == steps["c teacher's table"]["ratio to c"] == 1
    assert all(row["ratio to a"] > 0 and row["seconds"] > 0 for row in steps.values()) and "n/a" in text
    for wanted in ("\nteacher / student ", "\nd teacher asked live ", "21 (19)", "11.69 (14.79)"):
        assert wanted in text, wanted


def test_a_size_that_a_network_cannot_take_is_refused_before_anything_is_measured():
    with pytest.raises(UserError, match="alexnet cannot take images of 32 x 32 pixels"):
        profile_gpu.main(["alexnet", "--size", "32"])
    with pytest.raises(SystemExit):
        profile_gpu.main(["alexnet", "--data", "phantoms"])


@pytest.mark.parametrize("flag, value", [("--size", "0"), ("--rounds", "-1"), ("--steps", "half"), ("--many", "0")])
def test_a_number_below_one_is_refused_by_name(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        profile_gpu.get_args(["alexnet", flag, value])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"argument {flag}: " in said and value in said.split(f"{flag}: ")[1]


# ---- a GPU's use, without one


def event(seconds, annotation=False):
    return SimpleNamespace(self_device_time_total=1e6 * seconds, is_user_annotation=annotation)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A profiler that has seen three kernels, and an annotation around two of them."""
    events = [event(0.25), event(0.5), event(2.0), event(0.75, annotation=True)]

    @contextmanager
    def profile(activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        yield SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    for name, value in (("empty_cache", None), ("reset_peak_memory_stats", None), ("synchronize", None),
                        ("max_memory_allocated", 3e9), ("max_memory_reserved", 4e9)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)


def test_an_annotation_spans_kernels_and_is_not_counted_beside_them(fake_gpu):
    calls = []
    used = profile_gpu.gpu_usage(lambda: calls.append(1), torch.device("cuda"))
    assert used == (3.0, 4.0, pytest.approx(2.75)) and calls == [1]


def test_without_a_gpu_its_use_is_not_known_and_nothing_is_called():
    assert profile_gpu.gpu_usage(lambda: pytest.fail("called"), CPU) == (None, None, None)

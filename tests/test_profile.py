"""Counts against closed forms and published figures; the whole report once, on a miniature."""

import json

import pytest
import torch
from torch import nn

import models
import profile_gpu
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


def test_calls_are_timed_in_turns_and_the_warm_up_is_not_counted():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = profile_gpu.in_turns(calls, CPU, rounds=2)
    assert "".join(order) == "cba" + "abc" + "cba"
    assert all(len(spent) == 2 for spent in times.values())


def test_the_report_of_two_small_networks_holds_every_figure_that_a_cpu_can_measure(capsys, kermany):
    argv = ["resnet18", "squeezenet1_1", "--size", "32", "--batch-size", "4", "--many", "4", "--steps", "1",
            "--rounds", "1", "--data", str(kermany), "--device", "cpu", "--json", "cost.json"]  # fmt: skip
    profile_gpu.main(argv)
    text = capsys.readouterr().out
    report = json.loads(open("cost.json").read())
    networks, training, inference, steps, ready = report["tables"].values()
    assert list(networks) == ["resnet18", "squeezenet1_1", "teacher / student"]
    assert report["provenance"]["torch"] and report["args"]["many"] == 4
    sizes = [row["parameters M"] for row in networks.values()]
    assert sizes[2] == sizes[0] / sizes[1] and sizes[0] == pytest.approx(11.689512)
    assert all(row["films/s"] > 0 and row["GB allocated"] is None for row in training.values())
    asked = [row for name, row in inference.items() if "thread" in name]
    assert "resnet18, 1 thread" in inference and len(asked) == len(inference) - 1
    assert all(row["95 % ms"] >= row["median ms"] > 0 and row["exported ms"] > 0 for row in asked)
    all_threads = f"{torch.get_num_threads()} thread"
    last = [row["median ms"] for name, row in inference.items() if all_threads in name]
    assert inference["teacher / student"]["median ms"] == last[0] / last[1]
    to_a = [row["ratio to a"] for row in steps.values()]
    assert len(to_a) == 5 and to_a[0] == 1 and all(ratio > 0 for ratio in to_a)
    assert all(row["films"] == 35 for row in ready.values()) and "n/a" in text
    for wanted in ("| teacher / student", "d teacher asked live", "warm start", "21 (19)", "11.69 (14.79)"):
        assert wanted in text, wanted


def test_a_size_that_a_network_cannot_take_is_refused_before_anything_is_measured():
    with pytest.raises(UserError, match="alexnet cannot read films of 32 x 32 pixels"):
        profile_gpu.main(["alexnet", "--size", "32"])
    with pytest.raises(SystemExit):
        profile_gpu.main(["alexnet", "--data", "phantoms"])

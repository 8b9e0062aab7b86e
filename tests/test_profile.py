"""Test counts against closed forms and published figures, what is timed, and the whole report on a miniature."""

import inspect
import json
from contextlib import contextmanager
from pathlib import Path
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


def test_costs_of_a_tiny_network():
    model = Tiny().train()
    c = profile_gpu.cost(model, 16)
    assert c["parameters"] == (3 * 5 * 9 + 5) + 10 + (5 * 2 + 2)
    assert c["auxiliary_parameters"] == 5 * 7 + 7
    assert c["multiply_adds"] == 8 * 8 * 5 * 3 * 9 + 5 * 2
    floats = c["parameters"] + c["auxiliary_parameters"] + 10  # weights, and BatchNorm's two averages
    assert c["megabytes"] == pytest.approx((4 * floats + 8) / 1e6)  # and its counter, an int64
    assert model.training


@pytest.mark.parametrize("arch, size, parameters, giga", [
    ("alexnet", 224, 61_100_840, 0.714),
    ("vgg16", 224, 138_357_544, 15.470),
    ("resnet18", 224, 11_689_512, 1.814),
    ("resnet34", 224, 21_797_672, 3.664),
    ("inception_v3", 299, 23_834_568, 5.713),
])
def test_costs_equal_published_ones(arch, size, parameters, giga):
    with torch.device("meta"):
        model = models.bare_network(arch, aux=True)
    c = profile_gpu.cost(model, size)
    assert c["parameters"] == parameters
    assert c["multiply_adds"] / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("steps", [1, 12])
def test_a_timed_epoch_has_args_steps_batches(monkeypatch, steps):
    sizes = []
    monkeypatch.setattr(train, "train_one_epoch", lambda model, batches, *args, **kwargs:
                        sizes.extend(len(y) for _, y, _ in batches))
    args = SimpleNamespace(batch_size=2, steps=steps)
    *_, epoch = profile_gpu.make_epoch("squeezenet1_1", 32, args, CPU)
    epoch()
    assert sizes == [2] * steps


def test_interleaved_leaves_out_the_warm_up():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = profile_gpu.interleaved(calls, CPU, rounds=2)
    assert "".join(order) == "cba" + "abc" + "cba"
    assert all(len(spent) == 2 for spent in times.values())


SMALL = ["--size", "32", "--batch-size", "4", "--many", "4", "--steps", "1", "--rounds", "1", "--device", "cpu"]


def test_a_report_of_two_networks(capsys):
    profile_gpu.main(["resnet18", "squeezenet1_1", *SMALL, "--json", "cost.json"])
    text = capsys.readouterr().out
    report = json.loads(open("cost.json").read())
    networks, training, inference, steps = report["tables"].values()
    assert list(networks) == list(training) == list(inference) == ["resnet18", "squeezenet1_1"]
    assert report["provenance"]["torch"] and report["args"]["many"] == 4
    assert networks["resnet18"]["parameters M"] == pytest.approx(11.689512)  # with 1000 classes
    for row in (*training.values(), *inference.values()):
        assert row["images/s"] > 0 and row["GB allocated"] is None
    assert all(row["median ms"] > 0 for row in inference.values())
    assert list(steps) == ["a bare loop", "b baseline", "c precomputed logits", "d teacher at every step"]
    for row in steps.values():
        assert row["ratio to a"] == pytest.approx(row["seconds"] / steps["a bare loop"]["seconds"])
    assert list(report["tables"]) == ["network", "training, all layers", "inference", "a step"]
    for wanted in ("\nd teacher at every step ", "\ntraining, all layers ", " 11.69 ", "n/a"):
        assert wanted in text, wanted


def test_a_json_that_cannot_be_written_is_one_line():
    """The tables are printed first."""
    Path("taken").mkdir()
    with pytest.raises(UserError, match=r"^taken could not be written \(.*\)$"):
        profile_gpu.main(["squeezenet1_1", *SMALL, "--json", "taken"])
    assert [*Path().rglob("*")] == [Path("taken")]


@pytest.fixture
def timed(monkeypatch):
    """The calls that a function of profile_gpu would time, by name. They are kept instead of being timed."""
    calls = {}

    def interleaved(its_calls, device, rounds):
        calls.update(its_calls)
        return {name: [1.0] for name in its_calls}

    monkeypatch.setattr(profile_gpu, "interleaved", interleaved)
    return calls


ARGS = SimpleNamespace(batch_size=4, steps=3, rounds=1, many=130)
PAIR = {"resnet18": 64, "squeezenet1_1": 32}


def test_a_teacher_at_every_step_is_run_in_eval_mode(monkeypatch, timed):
    """The other three ways never run it."""
    runs, real = [], train.teacher_logits

    def teacher_logits(model, x):
        runs.append((len(x), x.shape[-1], model.training))
        return real(model, x)

    monkeypatch.setattr(train, "teacher_logits", teacher_logits)
    profile_gpu.distillation(PAIR, ARGS, CPU)
    for name, call in timed.items():
        runs.clear()
        call()
        assert runs == ([(4, 64, False)] * 3 if name == "d teacher at every step" else []), name


def test_the_bare_loop_takes_the_steps_of_training(monkeypatch, timed):
    """It zeroes the gradients before every backward pass, as train.train_one_epoch does."""
    done = []
    for owner, name in ((torch.optim.SGD, "zero_grad"), (torch.Tensor, "backward"), (torch.optim.SGD, "step")):
        real = getattr(owner, name)

        def call(*args, name=name, real=real, **options):
            done.append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)
    profile_gpu.distillation(PAIR, ARGS, CPU)
    for name in ("a bare loop", "b baseline"):
        done.clear()
        timed[name]()
        assert done == ["zero_grad", "backward", "step"] * 3, name


def test_seconds_are_those_of_one_step(timed):
    """A round of three steps takes one second here."""
    steps = profile_gpu.distillation(PAIR, ARGS, CPU)
    assert [step["seconds"] for step in steps.values()] == pytest.approx([1 / 3] * 4)


@pytest.mark.parametrize("arch, weight", [("googlenet", 0.3), ("squeezenet1_1", 0.0)])
def test_a_timed_epoch_has_the_weight_of_auxiliary_heads(monkeypatch, arch, weight):
    signature, calls = inspect.signature(train.train_one_epoch), []
    monkeypatch.setattr(train, "train_one_epoch", lambda *args, **options: calls.append((args, options)))
    *_, epoch = profile_gpu.make_epoch(arch, 64, SimpleNamespace(batch_size=2, steps=1), CPU)
    epoch()
    [(args, options)] = calls
    assert signature.bind(*args, **options).arguments.get("aux_weight", 0.0) == weight


def test_many_images_are_one_batch_in_inference(monkeypatch, timed):
    batches, real = [], profile_gpu.from_images

    def from_images(*args):
        source = real(*args)
        return lambda rows, affines=None: (batches.append(len(rows)), source(rows, affines))[1]

    monkeypatch.setattr(profile_gpu, "from_images", from_images)
    profile_gpu.inference("squeezenet1_1", 32, ARGS, CPU)
    for name, n in (("one", 1), ("many", 130)):
        batches.clear()
        timed[name]()
        assert batches == [n], name


def test_figures_have_four_digits(capsys):
    rows = {"alexnet": {"GB allocated": 1.0, "GPU busy %": None, "size": 8, "images/s": 12345.6, "MB": 0.0}}
    profile_gpu.show("training", rows)
    assert capsys.readouterr().out.split("\n")[2].split() == "alexnet 1.000 n/a 8 12,346 0.000".split()


@pytest.mark.parametrize("wrong", ["alexnet", "no_such_network"])
def test_unknown_networks_and_sizes_are_refused_first(monkeypatch, wrong):
    monkeypatch.setattr(profile_gpu, "interleaved", lambda *args: pytest.fail("timed"))
    with pytest.raises(UserError, match=wrong):
        profile_gpu.main(["squeezenet1_1", wrong, *SMALL])


@pytest.mark.parametrize("flag, value", [("--rounds", "-1"), ("--steps", "0"), ("--many", "0"), ("--batch-size", "1")])
def test_too_small_numbers_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        profile_gpu.main(["alexnet", flag, value])
    assert end.value.code == 2 and "must be 1 or more, --batch-size 2 or more" in capsys.readouterr().err


# ---- GPU use, tested without a GPU


def event(seconds, annotation=False):
    return SimpleNamespace(self_device_time_total=1e6 * seconds, is_user_annotation=annotation)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A profiler that has recorded three kernels, and an annotation around two of them."""
    events = [event(0.25), event(0.5), event(2.0), event(0.75, annotation=True)]

    @contextmanager
    def profile(activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        yield SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    for name, value in (("reset_peak_memory_stats", None), ("synchronize", None),
                        ("max_memory_allocated", 3e9)):
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)


def test_annotations_are_not_counted_as_kernels(fake_gpu):
    calls = []
    used = profile_gpu.gpu_usage(lambda: calls.append(1), torch.device("cuda"))
    assert used == (3.0, pytest.approx(2.75)) and calls == [1]


def test_gpu_usage_is_unknown_without_a_gpu():
    assert profile_gpu.gpu_usage(lambda: pytest.fail("called"), CPU) == (None, None)

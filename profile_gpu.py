"""What networks, training steps and distillation cost: Tables I and V, measured, with a GPU or without.

    python profile_gpu.py alexnet vgg16 resnet18 resnet34 inception_v3     networks, training, inference
    python profile_gpu.py inception_v3 alexnet                             two: also teacher against student
    python profile_gpu.py resnet18 --data data/chest_xray                  also how soon films are ready

What is timed is train_one_epoch itself, fed as train.py feeds it. Times are medians after a warm-up, and
what is compared is measured in turns within one run. What this machine cannot measure is shown as n/a.
A table is {row: {column: figure}} from the measurement to the JSON.
"""

import contextlib
import gc
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image

from data import UserError, decoding, device_flag, list_films, load, origin, parser, prepare, run
from evaluate import markdown, write_json
from models import AUX_WEIGHT, architectures, bare_network, build, cost, exported, features, forward, split
from train import RECIPES, train_one_epoch, view_of

NATIVE = {"inception_v3": 299}  # the side of the films a network was made for; 224 for the others
FILMS = 5216  # in an epoch, where hours are given: the public set's training films
PAPER = {  # arXiv 2406.08837, Tables I and V: shown in brackets beside ours
    "alexnet": {"depth": 8, "parameters M": 64.90, "multiply-adds M": 750,
                "GB allocated": 1.89, "GPU busy %": 44.44, "hours": 0.10},
    "vgg16": {"depth": 24, "parameters M": 144.06, "multiply-adds M": 15938},
    "resnet18": {"depth": 19, "parameters M": 14.79, "multiply-adds M": 1875},
    "resnet34": {"depth": 35, "parameters M": 25.21, "multiply-adds M": 3750},
    "inception_v3": {"depth": 166, "parameters M": 24.79, "multiply-adds M": 5208,
                     "GB allocated": 3.54, "GPU busy %": 95.96, "hours": 0.81},
}  # fmt: skip


# ---- instruments ------------------------------------------------------------------------------------


def seconds(call, device):
    """How long one call takes, until the device has finished it."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def in_turns(calls, device, rounds):
    """{name: [seconds, ...]}: after one round to warm up, every call once a round, there and back.

    A machine that slows down for a while then slows all of them, and ratios within a round stay true.
    """
    times = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            times[name].append(seconds(calls[name], device))
    return {name: spent[1:] for name, spent in times.items()}


def gpu_usage(call, device):
    """Peak memory in GB, allocated and reserved, and the seconds that a GPU spent inside kernels, by torch's
    profiler; None without a GPU."""
    if device.type != "cuda":
        return None, None, None
    gc.collect()  # networks measured before may hang in circles of references
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # what the warm-up took is not this call's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    return torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9, busy


# ---- what is measured -------------------------------------------------------------------------------


def network(model, size):
    """Table I: what the published network is made of, with its 1000 classes."""
    c = cost(model, size)
    return {"size": size, "depth": c["depth"], "parameters M": c["parameters"] / 1e6,
            "auxiliary M": c["auxiliary_parameters"] / 1e6, "multiply-adds M": c["multiply_adds"] / 1e6,
            "MB": c["megabytes"]}


def make_epoch(arch, size, args, device):
    """A network, random films lying on the device, and epoch(): train_one_epoch over all of them."""
    model = build(arch, 2, size).to(device, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), 1e-4, 0.9, fused=True)
    n = args.batch_size * args.steps
    images = torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 2, (n,), device=device)
    parts = torch.randperm(n, device=device).split(args.batch_size)

    films = view_of(images, device)

    def epoch(learner=model, view=films, optimizer=sgd, teacher=None):
        train_one_epoch(learner, view, labels, parts, optimizer, teacher,
                        aux_weight=AUX_WEIGHT.get(arch, 0.0), amp=device.type == "cuda")

    return model, sgd, images, labels, parts, epoch


def training(arch, size, args, device):
    """Table V: speed, memory and GPU use of the project's training loop."""
    *_, epoch = make_epoch(arch, size, args, device)
    n = args.batch_size * args.steps
    wall = median(in_turns({"epoch": epoch}, device, args.rounds)["epoch"])
    allocated, reserved, busy = gpu_usage(epoch, device)
    return {"GB allocated": allocated, "GB reserved": reserved, "GPU busy %": busy and 100 * busy / wall,
            "films/s": n / wall, "GPU s per 1000 films": busy and 1000 * busy / n,
            "hours": RECIPES["pneumonia"]["student"]["epochs"] * FILMS * wall / n / 3600}


def inference(model, size, args, device):
    """Latency of one film, asked of the network and of its export, and throughput of many; from bytes to
    logits, without a GPU with one thread and with all of them."""
    model.to(device, memory_format=torch.channels_last).eval()
    many = torch.randint(0, 256, (args.many, 1, size, size), dtype=torch.uint8, device=device)
    ask = torch.inference_mode()(lambda films: forward(model, prepare(films, device)))
    calls = {"eager": lambda: ask(many[:1])}
    with contextlib.suppress(UserError):  # a network that cannot be exported
        program = torch.inference_mode()(exported(model, size).module())
        calls["exported"] = lambda: program(many[:1])
    out, threads = {}, torch.get_num_threads()
    for count in sorted({1, threads}) if device.type == "cpu" else [threads]:
        torch.set_num_threads(count)
        one = in_turns(calls, device, 4 * args.rounds + 20)
        batch = median(in_turns({"": lambda: ask(many)}, device, args.rounds)[""])
        out["GPU" if device.type == "cuda" else f"{count} thread{'s' * (count > 1)}"] = {
            "median ms": 1e3 * median(one["eager"]),
            "95 % ms": 1e3 * sorted(one["eager"])[int(0.95 * len(one["eager"]))],
            "exported ms": 1e3 * median(one["exported"]) if "exported" in one else None,
            "films/s": args.many / batch,
            "GB allocated": gpu_usage(lambda: ask(many), device)[0],
        }
    torch.set_num_threads(threads)
    return out


def distillation(teacher_arch, student_arch, sizes, args, device):
    """A step of training, five ways, and their ratios to the bare loop."""
    model, sgd, images, labels, parts, epoch = make_epoch(student_arch, sizes[student_arch], args, device)
    ready = [(prepare(images[index], device), labels[index]) for index in parts]

    def bare():  # the yardstick: nothing but forward, backward and step, over tensors that lie ready
        model.train()
        for x, y in ready:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits, _ = forward(model, x)
            sgd.zero_grad(set_to_none=True)
            F.cross_entropy(logits.float(), y).backward()
            sgd.step()

    side = sizes[teacher_arch]
    teacher = build(teacher_arch, 2, side).to(device, memory_format=torch.channels_last).eval()
    shape = (len(images), 1, side, side)
    large = view_of(torch.randint(0, 256, shape, dtype=torch.uint8, device=device), device)
    table = view_of(torch.randn(len(images), 2), device)

    fixed = build(student_arch, 2, sizes[student_arch]).to(device, memory_format=torch.channels_last)
    tail = split(fixed, "head")
    shape = features(fixed, tail, ready[0][0]).shape[1:]
    reached = view_of(torch.randn(len(images), *shape), device)
    head_sgd = torch.optim.SGD(tail.parameters(), 1e-4, 0.9, fused=True)

    times = in_turns({
        "a bare loop": bare,
        "b baseline": epoch,
        "c teacher's table": lambda: epoch(teacher=table),
        "d teacher asked live": lambda: epoch(teacher=lambda index: forward(teacher, large(index))[0]),
        "e head on features": lambda: epoch(tail, reached, head_sgd),
    }, device, args.rounds)
    base = times["a bare loop"], times["c teacher's table"]
    return {name: {"seconds": median(spent) / args.steps,
                   "ratio to a": median(s / a for s, a in zip(spent, base[0], strict=True)),
                   "ratio to c": median(s / c for s, c in zip(spent, base[1], strict=True))}
            for name, spent in times.items()}


def loading(source, size):
    """How soon the training films are ready, beside the time that decode_image alone takes on all cores."""
    films = [f for f in list_films(source)[0] if f.part == "train"]
    device, grey = torch.device("cpu"), ImageReadMode.GRAY
    block = np.empty((len(films), 1, size, size), np.uint8)

    def cold():
        with tempfile.TemporaryDirectory() as cache:
            load(source, size, cache=cache)

    with ThreadPoolExecutor(os.cpu_count()) as pool, tempfile.TemporaryDirectory() as cache:
        times = in_turns({  # the first round reads the files from the disk, and is not counted
            "decode_image alone": lambda: list(pool.map(lambda f: decode_image(f.path, grey), films)),
            "decoding of a cold start": lambda: decoding(films, size)(block, 0),
            "cold start, with listing and writing": cold,
            "warm start": lambda: load(source, size, cache=cache),
        }, device, rounds=7)
    return {name: {"films": len(films), "seconds": median(spent)} for name, spent in times.items()}


# ---- what is shown ----------------------------------------------------------------------------------


def ratios(rows):
    """The teacher's figures over the student's, of each its last row: what it saves, and what it does not."""
    rows = list(rows.values())
    teacher, student = rows[len(rows) // 2 - 1], rows[-1]
    return {column: teacher[column] / student[column] if student[column] else None for column in teacher}


def show(title, rows):
    """A table with four digits a figure, and the paper's in brackets where it has one."""

    def cell(row, column, value):
        paper = PAPER.get(row, {}).get(column)
        rounded = isinstance(value, int) or (value or 0) >= 1000
        text = "n/a" if value is None else f"{value:,.0f}" if rounded else f"{value:#.4g}"
        return text + (f" ({paper})" if paper else "")

    lines = [[row, *(cell(row, *item) for item in columns.items())] for row, columns in rows.items()]
    print("\n".join(markdown([title, *next(iter(rows.values()))], lines)))


def get_args(argv=None):
    p = parser("profile_gpu.py ARCH [ARCH ...]", __doc__)
    g = p.add_argument_group("what is measured")
    g.add_argument("networks", nargs="+", metavar="ARCH", choices=architectures(),
                   help="networks of torchvision; if two: teacher, then student")
    g.add_argument("--size", type=int, help="side of the films; left out, 224, and 299 for inception_v3")
    g.add_argument("--data", metavar="DIR", help="also how soon the films in this folder are ready")
    g = p.add_argument_group("how much of it")
    g.add_argument("--batch-size", type=int, default=32, help="films a training step")
    g.add_argument("--many", type=int, default=64, help="films at once in inference")
    g.add_argument("--steps", type=int, help="training steps timed together; left out, 2, on a GPU 20")
    g.add_argument("--rounds", type=int, default=5, help="times that each is measured")
    g = p.add_argument_group("where, and what is kept")
    device_flag(g)
    g.add_argument("--json", metavar="FILE", help="write every figure there")
    args = p.parse_args(argv)
    args.steps = (20 if args.device.startswith("cuda") else 2) if args.steps is None else args.steps
    if min(args.batch_size, args.many, args.steps + 1, args.rounds + 1) < 2:
        p.error("--batch-size and --many must be at least 2, --steps and --rounds at least 1")
    if args.data and not Path(args.data).is_dir():
        p.error(f"--data needs a folder of films to be timed, {args.data} is none")
    return args


def main(argv=None):
    args = get_args(argv)
    device, networks, trained, asked = torch.device(args.device), {}, {}, {}
    tables = {"network (the paper)": networks, "training (the paper)": trained, "inference": asked}
    sizes = {arch: NATIVE.get(arch, 224) if args.size is None else args.size for arch in args.networks}
    for arch, size in sizes.items():
        trained[arch] = training(arch, size, args, device)
        published = bare_network(arch, aux=True)  # 1000 classes
        networks[arch] = network(published, size)
        places = inference(published, size, args, device)
        asked |= {f"{arch}, {place}": figures for place, figures in places.items()}
    if len(sizes) == 2:
        for rows in tables.values():
            rows["teacher / student"] = ratios(rows)
        tables["a step"] = distillation(*sizes, sizes, args, device)
    if args.data:
        tables["films ready"] = loading(args.data, next(iter(sizes.values())))
    source = origin(device)
    print(f"\n{source['device']}, torch {source['torch']}, batches of {args.batch_size}")
    for title, rows in tables.items():
        show(title, rows)
    if device.type != "cuda":
        print("\nn/a: memory and GPU use are read from CUDA, and this was measured without.")
    if args.json:
        write_json(args.json, {"provenance": source, "args": vars(args), "tables": tables})


if __name__ == "__main__":
    run(main)

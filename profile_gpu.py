"""Measure what networks, training and distillation cost, on a GPU or a CPU.

    python profile_gpu.py alexnet vgg16 resnet18 resnet34 inception_v3     three tables
    python profile_gpu.py inception_v3 alexnet          teacher, student: a fourth, training steps

This times train.train_one_epoch on batches from train.paired_batches, and evaluate.predict. Times
are medians after a warm-up. Memory and GPU use need CUDA. In the fourth table, `a` is a bare loop,
to which the others are compared. Instruments come first, then measurements, then the tables.
"""

import argparse
import gc
import time
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

import train
from data import Help, cli, explain, prepare, progress
from evaluate import aligned, origin, predict, usable_device, write_json
from models import AUX_WEIGHT, build, cost, forward, from_images, from_tensor

NATIVE = {"inception_v3": 299}  # the size of the images a network was made for; others 224

# ---- instruments ---------------------------------------------------------------------------------
def interleaved(calls, device, rounds):
    """Return {name: [seconds, ...]}. After a warm-up, each round makes every call once, and every
    other round in reverse order. So if the machine is slow for a while, that slows all calls."""
    times = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            calls[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a call returns before the GPU has finished
            times[name].append(time.perf_counter() - start)
    return {name: spent[1:] for name, spent in times.items()}

def gpu_usage(call, device):
    """Return peak GB allocated and the GPU's seconds in kernels, or (None, None) without a GPU."""
    if device.type != "cuda":
        return None, None
    gc.collect()  # earlier networks may still be kept by reference cycles
    torch.cuda.reset_peak_memory_stats(device)  # forget the peak of the warm-up
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    busy = sum(event.self_device_time_total for event in profile.key_averages()
               if not event.is_user_annotation) / 1e6  # annotations span kernels that were counted
    return torch.cuda.max_memory_allocated(device) / 1e9, busy

# ---- what is measured ----------------------------------------------------------------------------
def network(arch, size):
    """Return the size of the published network, with its 1000 classes."""
    c = cost(build(arch, 1000, size), size)
    return {"size": size, "parameters M": c["parameters"] / 1e6,
            "auxiliary M": c["auxiliary_parameters"] / 1e6,
            "multiply-adds M": c["multiply_adds"] / 1e6, "MB": c["megabytes"]}

def random_images(n, size, device):
    return torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, device=device)

def make_epoch(arch, size, args, device):
    """Return a model, its optimizer, images, labels, and epoch(teacher), which trains on them."""
    model = build(arch, 2, size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9, fused=True)
    images = random_images(args.batch_size * args.steps, size, device)
    labels = torch.randint(0, 2, (len(images),), device=device)
    source = from_images(images, device)

    def epoch(teacher=None):
        batches = train.paired_batches(source, labels, teacher, args.batch_size,
                                       torch.Generator().manual_seed(0), args.steps)
        train.train_one_epoch(model, batches, optimizer, aux_weight=AUX_WEIGHT.get(arch, 0.0),
                              amp=device.type == "cuda")

    return model, optimizer, images, labels, epoch

def training(arch, size, args, device):
    """Return the speed, memory and GPU use of an epoch that trains all layers."""
    *_, epoch = make_epoch(arch, size, args, device)
    n = args.batch_size * args.steps
    wall = median(interleaved({"": epoch}, device, args.rounds)[""])
    allocated, busy = gpu_usage(epoch, device)
    return {"GB allocated": allocated, "GPU busy %": busy and 100 * busy / wall,
            "images/s": n / wall, "GPU s per 1000 images": busy and 1000 * busy / n}

def inference(arch, size, args, device):
    """Return latency for one image and throughput for many, from uint8 tensors to logits."""
    model = build(arch, 1000, size).to(device, memory_format=torch.channels_last)
    images = random_images(args.many, size, device)
    source = from_images(images, device)
    calls = {"one": partial(predict, model, source, 1, device),
             "many": partial(predict, model, source, args.many, device, args.many)}
    times = interleaved(calls, device, args.rounds)
    return {"median ms": 1e3 * median(times["one"]), "images/s": args.many / median(times["many"]),
            "GB allocated": gpu_usage(calls["many"], device)[0]}

def distillation(sizes, args, device):
    """Return the seconds of a training step in four ways, and their ratios to the bare loop."""
    (teacher_arch, teacher_size), (arch, size) = sizes.items()
    model, optimizer, images, labels, epoch = make_epoch(arch, size, args, device)
    ready = [(prepare(images[rows], device), labels[rows])
             for rows in torch.arange(len(images)).split(args.batch_size)]

    def bare():  # the yardstick: only forward, backward and step, on prepared tensors
        model.train()
        for x, y in ready:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits, _ = forward(model, x)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()

    teacher = build(teacher_arch, 2, teacher_size).to(device, memory_format=torch.channels_last)
    logits = partial(train.teacher_logits, teacher.eval())
    at_every_step = from_images(random_images(len(images), teacher_size, device), device, logits,
                                amp=device.type == "cuda")
    precomputed = from_tensor(torch.randn(len(images), 2, device=device), device)
    times = interleaved({"a bare loop": bare, "b baseline": epoch,
                         "c precomputed logits": lambda: epoch(precomputed),
                         "d teacher at every step": lambda: epoch(at_every_step)},
                        device, args.rounds)
    bare_times = times["a bare loop"]
    return {name: {"seconds": median(spent) / args.steps,
                   "ratio to a": median(s / a for s, a in zip(spent, bare_times, strict=True))}
            for name, spent in times.items()}

# ---- what is shown -------------------------------------------------------------------------------
def show(title, rows):
    """Print a table with four significant digits; integers and numbers from 1000 in full."""

    def cell(value):
        rounded = isinstance(value, int) or (value or 0) >= 1000
        return "n/a" if value is None else f"{value:,.0f}" if rounded else f"{value:#.4g}"

    lines = [[name, *map(cell, figures.values())] for name, figures in rows.items()]
    print("\n".join(aligned([title, *next(iter(rows.values()))], lines)))

def main(argv=None):
    p = argparse.ArgumentParser(usage="python profile_gpu.py ARCH [ARCH ...] [FLAGS]",
                                description=__doc__, formatter_class=Help, allow_abbrev=False)
    gpu = torch.cuda.is_available()
    p.add_argument("networks", nargs="+", metavar="ARCH", help="if two: teacher, then student")
    p.add_argument("--size", type=int, help="side in pixels, 299 for inception_v3 or else 224")
    p.add_argument("--batch-size", type=int, default=32, help="images per training step")
    p.add_argument("--many", type=int, default=64, help="images per batch in inference")
    p.add_argument("--steps", type=int, default=20 if gpu else 2, help="training steps per timing")
    p.add_argument("--rounds", type=int, default=5, help="how often each call is timed")
    p.add_argument("--device", type=usable_device, default="cuda" if gpu else "cpu",
                   help="cpu, cuda or cuda:N")
    p.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    args = p.parse_args(argv)
    if min(args.batch_size - 1, args.many, args.steps, args.rounds) < 1:
        p.error("--many, --steps, --rounds must be 1 or more, --batch-size 2 or more for BatchNorm")
    device, provenance = torch.device(args.device), origin(args.device)
    sizes = {arch: args.size or NATIVE.get(arch, 224) for arch in args.networks}
    # Networks come first, so that an unknown name or size is an error before anything is timed.
    tables = {"network": {arch: network(arch, size) for arch, size in sizes.items()},
              "training, all layers": {}, "inference": {}}
    for arch, size in progress(sizes.items(), "measuring"):
        tables["training, all layers"][arch] = training(arch, size, args, device)
        tables["inference"][arch] = inference(arch, size, args, device)
    if len(sizes) == 2:
        tables["a step"] = distillation(sizes, args, device)
    print(f"\n{provenance['device']}, torch {provenance['torch']}, batches of {args.batch_size}")
    for title, rows in tables.items():
        show(title, rows)
    if args.json:
        with explain(f"{args.json} could not be written"):
            write_json(args.json, {"provenance": provenance, "args": vars(args), "tables": tables})

if __name__ == "__main__":
    cli(main)

"""What networks, training steps and distillation cost: Tables I and V, with a GPU or without.

    python profile_gpu.py alexnet vgg16 resnet18 resnet34 inception_v3     three tables
    python profile_gpu.py inception_v3 alexnet          two networks: also a step of distillation

In this order: instruments; what is measured (network, training, inference, a step four ways);
tables. Timed is train.train_one_epoch fed by train.paired_batches: medians after a warm-up. Memory
and GPU use need CUDA. Hours: of inception_v3 the teacher's epochs, else the student's (pneumonia).
"""

import argparse
import gc
import time
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

import train
from data import Help, cli, prepare, progress
from evaluate import aligned, origin, predict, usable_device, write_json
from models import AUX_WEIGHT, build, cost, forward

NATIVE = {"inception_v3": 299}  # the side of the images a network was made for; others 224
IMAGES = 5216  # in an epoch, where hours are given: the public set's training images
PAPER = {  # arXiv 2406.08837, Tables I and V: shown in brackets beside ours
    "alexnet": {"depth": 8, "parameters M": 64.90, "multiply-adds M": 750,
                "GB allocated": 1.89, "GPU busy %": 44.44, "hours": 0.10},
    "vgg16": {"depth": 24, "parameters M": 144.06, "multiply-adds M": 15938},
    "resnet18": {"depth": 19, "parameters M": 14.79, "multiply-adds M": 1875},
    "resnet34": {"depth": 35, "parameters M": 25.21, "multiply-adds M": 3750},
    "inception_v3": {"depth": 166, "parameters M": 24.79, "multiply-adds M": 5208,
                     "GB allocated": 3.54, "GPU busy %": 95.96, "hours": 0.81}}

# ---- instruments ---------------------------------------------------------------------------------
def interleaved(calls, device, rounds):
    """{name: [seconds, ...]}: after one round to warm up, every call once a round, there and back.
    A machine that slows down for a while then slows all of them."""
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
    """Peak GB allocated, and the GPU's seconds in kernels; None without a GPU."""
    if device.type != "cuda":
        return None, None
    gc.collect()  # networks measured before may still hang in circles of references
    torch.cuda.reset_peak_memory_stats(device)  # what the warm-up took is not this call's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    busy = sum(event.self_device_time_total for event in profile.key_averages()
               if not event.is_user_annotation) / 1e6  # an annotation spans kernels counted already
    return torch.cuda.max_memory_allocated(device) / 1e9, busy

# ---- what is measured ----------------------------------------------------------------------------
def network(arch, size):
    """Table I: what the published network is made of, with its 1000 classes."""
    c = cost(build(arch, 1000, size), size)
    return {"size": size, "depth": c["depth"], "parameters M": c["parameters"] / 1e6,
            "auxiliary M": c["auxiliary_parameters"] / 1e6,
            "multiply-adds M": c["multiply_adds"] / 1e6, "MB": c["megabytes"]}

def random_images(n, size, device):
    return torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, device=device)

def make_epoch(arch, size, args, device):
    """A model, its optimizer, images, labels, and epoch(teachers), fed as train.py feeds it."""
    model = build(arch, 2, size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9, fused=True)
    images = random_images(args.batch_size * args.steps, size, device)
    labels = torch.randint(0, 2, (len(images),), device=device)
    flags = train.get_args(["--role", "baseline", "--batch-size", str(args.batch_size),
                            "--steps-per-epoch", str(args.steps), "--device", str(device)])

    def epoch(teachers=()):
        order = torch.Generator().manual_seed(0)
        batches = train.paired_batches(train.Table(images), labels, teachers, flags, order, device)
        train.train_one_epoch(model, batches, optimizer, aux_weight=AUX_WEIGHT.get(arch, 0.0),
                              amp=train.use_amp(flags))

    return model, optimizer, images, labels, epoch

def training(arch, size, args, device):
    """Table V: speed, memory and GPU use of an epoch in which all layers learn."""
    *_, epoch = make_epoch(arch, size, args, device)
    n = args.batch_size * args.steps
    wall = median(interleaved({"": epoch}, device, args.rounds)[""])
    allocated, busy = gpu_usage(epoch, device)
    role = "teacher" if arch == "inception_v3" else "student"
    epochs = train.RECIPES["pneumonia"][role]["epochs"]
    return {"GB allocated": allocated, "GPU busy %": busy and 100 * busy / wall,
            "images/s": n / wall, "GPU s per 1000 images": busy and 1000 * busy / n,
            "epochs": epochs, "hours": epochs * IMAGES * wall / n / 3600}

def inference(arch, size, args, device):
    """Latency of one image and throughput of many, from bytes to logits."""
    model = build(arch, 1000, size).to(device, memory_format=torch.channels_last)
    images = random_images(args.many, size, device)
    calls = {"one": partial(predict, model, images[:1], device),
             "many": partial(predict, model, images, device, args.many)}
    times = interleaved(calls, device, args.rounds)
    return {"median ms": 1e3 * median(times["one"]), "images/s": args.many / median(times["many"]),
            "GB allocated": gpu_usage(calls["many"], device)[0]}

def distillation(sizes, args, device):
    """A step of training, four ways, and their ratios to the bare loop."""
    (teacher_arch, teacher_size), (arch, size) = sizes.items()
    model, optimizer, images, labels, epoch = make_epoch(arch, size, args, device)
    ready = [(prepare(images[rows], device), labels[rows])
             for rows in torch.arange(len(images)).split(args.batch_size)]

    def bare():  # the yardstick: only forward, backward and step, over tensors that lie ready
        model.train()
        for x, y in ready:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits, _ = forward(model, x)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()

    teacher = build(teacher_arch, 2, teacher_size).to(device, memory_format=torch.channels_last)
    live = train.Table(random_images(len(images), teacher_size, device),
                       partial(train.teacher_logits, teacher.eval()))
    table = train.Table(torch.randn(len(images), 2, device=device))
    times = interleaved({"a bare loop": bare, "b baseline": epoch,
                         "c teacher's table": lambda: epoch([table]),
                         "d teacher asked live": lambda: epoch([live])}, device, args.rounds)
    bare_times = times["a bare loop"]
    return {name: {"seconds": median(spent) / args.steps,
                   "ratio to a": median(s / a for s, a in zip(spent, bare_times, strict=True))}
            for name, spent in times.items()}

# ---- what is shown -------------------------------------------------------------------------------
def show(title, rows, paper):
    """A table with four digits a figure, and the paper's in brackets where it has one."""

    def cell(row, column, value):
        theirs = paper.get(row, {}).get(column)
        rounded = isinstance(value, int) or (value or 0) >= 1000
        text = "n/a" if value is None else f"{value:,.0f}" if rounded else f"{value:#.4g}"
        return text + (f" ({theirs})" if theirs else "")

    columns = list(next(iter(rows.values())))
    lines = [[row, *(cell(row, k, figures[k]) for k in columns)] for row, figures in rows.items()]
    print("\n".join(aligned([title, *columns], lines)))

def main(argv=None):
    p = argparse.ArgumentParser(usage="python profile_gpu.py ARCH [ARCH ...] [FLAGS]",
                                description=__doc__, formatter_class=Help, allow_abbrev=False)
    gpu = torch.cuda.is_available()
    p.add_argument("networks", nargs="+", metavar="ARCH", help="if two: teacher, then student")
    p.add_argument("--size", type=int, help="side of the images; without, 224 or 299")
    p.add_argument("--batch-size", type=int, default=32, help="images a training step")
    p.add_argument("--many", type=int, default=64, help="images at once in inference")
    p.add_argument("--steps", type=int, default=20 if gpu else 2, help="steps timed together")
    p.add_argument("--rounds", type=int, default=5, help="times each is measured")
    p.add_argument("--device", type=usable_device, default="cuda" if gpu else "cpu",
                   help="cpu, cuda or cuda:N")
    p.add_argument("--json", metavar="FILE", help="write every figure there")
    args = p.parse_args(argv)
    if min(args.batch_size - 1, args.many, args.steps, args.rounds) < 1:
        p.error("--many, --steps and --rounds start at 1, --batch-size at 2: BatchNorm needs two")
    device, source = torch.device(args.device), origin(args.device)
    sizes = {arch: args.size or NATIVE.get(arch, 224) for arch in args.networks}
    # Networks first: an unknown name or an impossible size ends here, before anything is timed.
    tables = {"network (the paper)": {arch: network(arch, size) for arch, size in sizes.items()},
              "training, all layers (the paper)": {}, "inference": {}}
    for arch, size in progress(sizes.items(), "measuring"):
        tables["training, all layers (the paper)"][arch] = training(arch, size, args, device)
        tables["inference"][arch] = inference(arch, size, args, device)
    if len(sizes) == 2:
        tables["a step"] = distillation(sizes, args, device)
    print(f"\n{source['device']}, torch {source['torch']}, batches of {args.batch_size}")
    for title, rows in tables.items():
        show(title, rows, PAPER if "the paper" in title else {})
    if args.json:
        write_json(args.json, {"provenance": source, "args": vars(args), "tables": tables})

if __name__ == "__main__":
    cli(main)

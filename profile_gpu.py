"""What networks, training steps and distillation cost: Tables I and V, with a GPU or without.

    python profile_gpu.py alexnet vgg16 resnet18 resnet34 inception_v3     networks, training, use
    python profile_gpu.py inception_v3 alexnet                             two: also distillation

What is timed is train_one_epoch, fed as train.py feeds it. Times are medians after a warm-up; what
this machine cannot measure is n/a. A table is {row: {column: figure}}, also in the JSON.
"""

import argparse
import gc
import time
from statistics import median

import torch
import torch.nn.functional as F

import train
from data import Help, aligned, number, origin, prepare, run, usable_device
from evaluate import write_json
from models import AUX_WEIGHT, bare_network, build, cost, forward, known_arch

NATIVE = {"inception_v3": 299}  # the side of the images a network was made for; others 224
IMAGES = 5216  # in an epoch, where hours are given: the public set's training images
PAPER = {  # arXiv 2406.08837, Tables I and V: shown in brackets beside ours
    "alexnet": {"depth": 8, "parameters M": 64.90, "multiply-adds M": 750,
                "GB allocated": 1.89, "GPU busy %": 44.44, "hours": 0.10},
    "vgg16": {"depth": 24, "parameters M": 144.06, "multiply-adds M": 15938},
    "resnet18": {"depth": 19, "parameters M": 14.79, "multiply-adds M": 1875},
    "resnet34": {"depth": 35, "parameters M": 25.21, "multiply-adds M": 3750},
    "inception_v3": {"depth": 166, "parameters M": 24.79, "multiply-adds M": 5208,
                     "GB allocated": 3.54, "GPU busy %": 95.96, "hours": 0.81},
}


# ---- instruments ---------------------------------------------------------------------------------


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


def interleaved(calls, device, rounds):
    """{name: [seconds, ...]}: after one round to warm up, every call once a round, there and back.

    A machine that slows down for a while then slows all of them, and ratios within a round hold.
    """
    times = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            times[name].append(seconds(calls[name], device))
    return {name: spent[1:] for name, spent in times.items()}


def gpu_usage(call, device):
    """Peak GB allocated and reserved, and the GPU's seconds in kernels; None without a GPU."""
    if device.type != "cuda":
        return None, None, None
    gc.collect()  # networks measured before may still hang in circles of references
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # what the warm-up took is not this call's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    busy = sum(event.self_device_time_total for event in profile.key_averages()
               if not event.is_user_annotation) / 1e6  # an annotation spans kernels counted already
    return (torch.cuda.max_memory_allocated(device) / 1e9,
            torch.cuda.max_memory_reserved(device) / 1e9, busy)


# ---- what is measured ----------------------------------------------------------------------------


def network(model, size):
    """Table I: what the published network is made of, with its 1000 classes."""
    c = cost(model, size)
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
        batches = train.paired_batches((images, None), labels, teachers, flags, order, device)
        train.train_one_epoch(model, batches, optimizer, aux_weight=AUX_WEIGHT.get(arch, 0.0),
                              amp=train.use_amp(flags))

    return model, optimizer, images, labels, epoch


def training(arch, size, args, device):
    """Table V: speed, memory and GPU use of an epoch in which all layers learn."""
    *_, epoch = make_epoch(arch, size, args, device)
    n = args.batch_size * args.steps
    wall = median(interleaved({"": epoch}, device, args.rounds)[""])
    allocated, reserved, busy = gpu_usage(epoch, device)
    epochs = train.RECIPES["pneumonia"]["student"]["epochs"]
    return {"GB allocated": allocated, "GB reserved": reserved,
            "GPU busy %": busy and 100 * busy / wall, "images/s": n / wall,
            "GPU s per 1000 images": busy and 1000 * busy / n,
            "hours": epochs * IMAGES * wall / n / 3600}


def inference(model, size, args, device):
    """Latency of one image and throughput of many, from bytes to logits; on a CPU with one thread
    and with all."""
    model.to(device, memory_format=torch.channels_last).eval()
    many = random_images(args.many, size, device)

    @torch.inference_mode()
    def ask(images):
        return forward(model, prepare(images, device))

    out, threads = {}, torch.get_num_threads()
    for count in sorted({1, threads}) if device.type == "cpu" else [threads]:
        torch.set_num_threads(count)
        one = interleaved({"": lambda: ask(many[:1])}, device, 4 * args.rounds + 20)[""]
        batch = median(interleaved({"": lambda: ask(many)}, device, args.rounds)[""])
        out["GPU" if device.type == "cuda" else f"{count} thread{'s' * (count > 1)}"] = {
            "median ms": 1e3 * median(one), "95 % ms": 1e3 * sorted(one)[int(0.95 * len(one))],
            "images/s": args.many / batch, "GB allocated": gpu_usage(lambda: ask(many), device)[0]}
    torch.set_num_threads(threads)
    return out


def distillation(teacher_arch, student_arch, sizes, args, device):
    """A step of training, four ways, and their ratios to the bare loop."""
    student_size, size = sizes[student_arch], sizes[teacher_arch]
    model, optimizer, images, labels, epoch = make_epoch(student_arch, student_size, args, device)
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

    teacher = build(teacher_arch, 2, size).to(device, memory_format=torch.channels_last).eval()
    live = (random_images(len(images), size, device), lambda x: train.answer(teacher, x))
    table = (torch.randn(len(images), 2, device=device), None)
    ways = {"a bare loop": bare, "b baseline": epoch, "c teacher's table": lambda: epoch([table]),
            "d teacher asked live": lambda: epoch([live])}
    times = interleaved(ways, device, args.rounds)
    a, c = times["a bare loop"], times["c teacher's table"]
    return {name: {"seconds": median(spent) / args.steps,
                   "ratio to a": median(s / base for s, base in zip(spent, a, strict=True)),
                   "ratio to c": median(s / base for s, base in zip(spent, c, strict=True))}
            for name, spent in times.items()}


# ---- what is shown -------------------------------------------------------------------------------


def ratios(rows):
    """The teacher's figures over the student's, of each its last row."""
    rows = list(rows.values())
    teacher, student = rows[len(rows) // 2 - 1], rows[-1]
    return {column: teacher[column] / student[column] if student[column] else None
            for column in teacher}


def show(title, rows):
    """A table with four digits a figure, and the paper's in brackets where it has one."""

    def cell(row, column, value):
        paper = PAPER.get(row, {}).get(column)
        rounded = isinstance(value, int) or (value or 0) >= 1000
        text = "n/a" if value is None else f"{value:,.0f}" if rounded else f"{value:#.4g}"
        return text + (f" ({paper})" if paper else "")

    columns = list(next(iter(rows.values())))
    lines = [[row, *(cell(row, k, figures[k]) for k in columns)] for row, figures in rows.items()]
    print("\n".join(aligned([title, *columns], lines)))


def get_args(argv=None):
    p = argparse.ArgumentParser(usage="python profile_gpu.py ARCH [ARCH ...] [FLAGS]",
                                description=__doc__, formatter_class=Help, allow_abbrev=False)
    count, gpu = number(int, 1), torch.cuda.is_available()
    p.add_argument("networks", nargs="+", metavar="ARCH", type=known_arch,
                   help="networks of torchvision; if two: teacher, then student")
    p.add_argument("--size", type=count, help="side of the images; without, 224 or 299")
    p.add_argument("--batch-size", type=number(int, 2), default=32, help="images a training step")
    p.add_argument("--many", type=count, default=64, help="images at once in inference")
    p.add_argument("--steps", type=count, default=20 if gpu else 2, help="steps timed together")
    p.add_argument("--rounds", type=count, default=5, help="times each is measured")
    p.add_argument("--device", type=usable_device, default="cuda" if gpu else "cpu",
                   help="cpu, cuda or cuda:N")
    p.add_argument("--json", metavar="FILE", help="write every figure there")
    return p.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    device = torch.device(args.device)
    tables = {"network (the paper)": {}, "training, all layers (the paper)": {}, "inference": {}}
    networks, trained, asked = tables.values()
    sizes = {arch: args.size or NATIVE.get(arch, 224) for arch in args.networks}
    for arch, size in sizes.items():
        trained[arch] = training(arch, size, args, device)
        published = bare_network(arch, aux=True)  # 1000 classes
        networks[arch] = network(published, size)
        for place, figures in inference(published, size, args, device).items():
            asked[f"{arch}, {place}"] = figures
    if len(sizes) == 2:
        for rows in tables.values():
            rows["teacher / student"] = ratios(rows)
        tables["a step"] = distillation(*sizes, sizes, args, device)
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

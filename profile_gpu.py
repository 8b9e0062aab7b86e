"""What networks, training steps and distillation cost: Tables I and V, measured, with a GPU or without.

    python profile_gpu.py alexnet vgg16 resnet18 resnet34 inception_v3     networks, training, inference
    python profile_gpu.py inception_v3 alexnet                             two: also teacher against student
    python profile_gpu.py resnet18 --data data/chest_xray                  also how soon films are ready

What is timed is train_one_epoch itself, fed as train.py feeds it. Times are medians after a warm-up, and
what is compared is measured in turns within one run. What this machine cannot measure is shown as n/a.
"""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image

from data import UserError, decoding, device_flag, list_films, load, origin, parser, prepare, run
from evaluate import markdown, write_json
from models import AUX_WEIGHT, bare_network, build, cost, exported, features, forward, split
from train import RECIPES, train_one_epoch, view_of

NATIVE = {"inception_v3": 299}  # the side of the films a network was made for; 224 for the others
FILMS = 5216  # in an epoch, where hours are given: the public set's training films
PAPER_I = {  # arXiv 2406.08837, Table I: depth, parameters M, computation M
    "alexnet": (8, 64.90, 750),
    "vgg16": (24, 144.06, 15938),
    "resnet18": (19, 14.79, 1875),
    "resnet34": (35, 25.21, 3750),
    "inception_v3": (166, 24.79, 5208),
}
PAPER_V = {"alexnet": (1.89, 44.44, 0.10), "inception_v3": (3.54, 95.96, 0.81)}  # GB, GPU %, hours


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
            spent = seconds(calls[name], device)
            times[name] += [spent] if i else []
    return times


def gpu_usage(call, device):
    """Peak memory in GB, and the seconds a GPU spent inside kernels: torch's profiler, no other package."""
    if device.type != "cuda":
        return {"allocated_gb": None, "reserved_gb": None, "busy_seconds": None}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # what the warm-up took is not this call's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    return {
        "allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
        "busy_seconds": sum(event.self_device_time_total for event in profile.key_averages()) / 1e6,
    }


# ---- what is measured -------------------------------------------------------------------------------


def make_epoch(arch, size, args, device):
    """A network, random films lying on the device, and epoch(): train_one_epoch over all of them."""
    model = build(arch, 2, size).to(device, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), 1e-4, 0.9, fused=True)
    n = args.batch_size * args.steps
    images = torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 2, (n,), device=device)
    parts = torch.randperm(n, device=device).split(args.batch_size)

    def epoch(learner=model, view=None, optimizer=sgd, teacher=None):
        train_one_epoch(learner, view or view_of(images, device), labels, parts, optimizer, teacher,
                        aux_weight=AUX_WEIGHT.get(arch, 0.0), amp=device.type == "cuda")

    return model, sgd, images, labels, parts, epoch


def training(arch, size, args, device):
    """Table V: speed, memory and GPU use of the project's training loop."""
    *_, epoch = make_epoch(arch, size, args, device)
    n = args.batch_size * args.steps
    wall = median(in_turns({"epoch": epoch}, device, args.rounds)["epoch"])
    used = gpu_usage(epoch, device)
    busy = used.pop("busy_seconds")
    hours = RECIPES["pneumonia"]["student"]["epochs"] * FILMS * wall / n / 3600
    return {**used, "gpu_busy_percent": busy and 100 * busy / wall, "images_per_second": n / wall,
            "gpu_seconds_per_1000_images": busy and 1000 * busy / n, "hours": hours}


def inference(model, size, args, device):
    """Latency of one film, asked of the network and of its export, and throughput of many; from bytes to
    logits, without a GPU with one thread and with all of them."""
    model.to(device, memory_format=torch.channels_last).eval()
    many = torch.randint(0, 256, (args.many, 1, size, size), dtype=torch.uint8, device=device)
    ask = torch.inference_mode()(lambda films: forward(model, prepare(films, device)))
    calls = {"eager": lambda: ask(many[:1])}
    try:
        program = torch.inference_mode()(exported(model, size).module())
        calls["exported"] = lambda: program(many[:1])
    except UserError:
        pass  # shown as n/a
    out, threads = {}, torch.get_num_threads()
    for count in sorted({1, threads}) if device.type == "cpu" else [threads]:
        torch.set_num_threads(count)
        one = in_turns(calls, device, 4 * args.rounds + 20)
        batch = in_turns({"": lambda: ask(many)}, device, args.rounds)[""]
        out["GPU" if device.type == "cuda" else f"{count} thread{'s' * (count > 1)}"] = {
            "median_ms": 1e3 * median(one["eager"]),
            "p95_ms": 1e3 * sorted(one["eager"])[int(0.95 * len(one["eager"]))],
            "exported_ms": 1e3 * median(one["exported"]) if "exported" in one else None,
            "images_per_second": args.many / median(batch),
            "allocated_gb": gpu_usage(lambda: ask(many), device)["allocated_gb"],
        }
    torch.set_num_threads(threads)
    return out


def distillation(teacher_arch, student_arch, sizes, args, device):
    """Seconds of a step, five ways, and their ratios to the bare loop."""
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
    with torch.no_grad():
        reached = torch.cat([features(fixed, tail, prepare(images[index], device)) for index in parts])
    reached = view_of(reached, device)  # in another order than the labels, which costs the same
    head_sgd = torch.optim.SGD(tail.parameters(), 1e-4, 0.9, fused=True)

    times = in_turns({
        "a bare loop": bare,
        "b baseline": epoch,
        "c teacher's table": lambda: epoch(teacher=table),
        "d teacher asked live": lambda: epoch(teacher=lambda index: forward(teacher, large(index))[0]),
        "e head on features": lambda: epoch(tail, reached, head_sgd),
    }, device, args.rounds)
    return {
        name: {
            "seconds_per_step": median(spent) / args.steps,
            "ratio_to_a": median(s / a for s, a in zip(spent, times["a bare loop"], strict=True)),
            "ratio_to_c": median(s / c for s, c in zip(spent, times["c teacher's table"], strict=True)),
        }
        for name, spent in times.items()
    }


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
    return {"films": len(films), "seconds": {name: median(spent) for name, spent in times.items()}}


# ---- what is shown ----------------------------------------------------------------------------------


def show(value, digits=1, paper=None):
    text = "n/a" if value is None else f"{value:,.{digits}f}"
    return text if paper is None else f"{text} ({paper})"


def print_table(header, rows):
    print("\n".join(markdown(header, rows)))


def print_report(report):
    """The tables, the paper's figures in brackets where it has any."""
    networks, source, nothing = report["networks"], report["provenance"], ("-",) * 3
    print(f"\n{source['device']}, torch {source['torch']}, batches of {report['batch_size']}")
    one, five, three = [], [], []
    for arch, network in networks.items():
        c, p1 = network["cost"], PAPER_I.get(arch, nothing)
        t, p5 = network["training"], PAPER_V.get(arch, nothing)
        one.append([f"{arch} at {network['size']}", show(c["depth"], 0, p1[0]),
                    show(c["parameters"] / 1e6, 2, p1[1]), show(c["auxiliary_parameters"] / 1e6, 2),
                    show(c["multiply_adds"] / 1e6, 0, p1[2]), show(c["megabytes"], 0)])
        five.append([arch, show(t["allocated_gb"], 2, p5[0]), show(t["reserved_gb"], 2),
                     show(t["gpu_busy_percent"], 1, p5[1]), show(t["images_per_second"]),
                     show(t["gpu_seconds_per_1000_images"], 2), show(t["hours"], 2, p5[2])])
        three += [[arch, kind, *(show(v, 2) for v in i.values())] for kind, i in network["inference"].items()]
    print_table(["network (the paper)", "depth", "parameters M", "auxiliary M", "multiply-adds M", "MB"], one)
    print_table(["training (the paper)", "GB allocated", "GB reserved", "GPU busy %", "images/s",
                 "GPU s per 1000 images", "hours"], five)
    print_table(["inference", "on", "median ms", "95 % ms", "exported ms", "images/s", "GB allocated"], three)
    if report["distillation"]:
        lines = [[name, *(show(v, 3) for v in d.values())] for name, d in report["distillation"].items()]
        print_table(["a step", "seconds", "ratio to a", "ratio to c"], lines)
        print_table([" -> ".join(networks), "teacher / student"], list(compression(*networks.values())))
    if report["loading"]:
        n, times = report["loading"]["films"], report["loading"]["seconds"]
        print_table([f"{n} films ready", "seconds"], [[k, show(v, 2)] for k, v in times.items()])
    if networks and not torch.cuda.is_available():
        print("\nn/a: memory and GPU use are read from CUDA, and there is none here.")


def compression(teacher, student):
    """What the student saves, and what it does not."""
    for name, pick in (
        ("parameters", lambda n: n["cost"]["parameters"]),
        ("file size", lambda n: n["cost"]["megabytes"]),
        ("multiply-adds", lambda n: n["cost"]["multiply_adds"]),
        ("latency of one film", lambda n: list(n["inference"].values())[-1]["median_ms"]),
        ("time per film in training", lambda n: 1 / n["training"]["images_per_second"]),
        ("memory in training", lambda n: n["training"]["allocated_gb"]),
    ):
        yield [name, show(pick(student) and pick(teacher) / pick(student), 2)]


def get_args(argv=None):
    p = parser("profile_gpu.py ARCH [ARCH ...]", __doc__)
    g = p.add_argument_group("what is measured")
    g.add_argument("networks", nargs="+", metavar="ARCH", help="two of them: teacher, then student")
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
    args.steps = args.steps or (20 if args.device.startswith("cuda") else 2)
    if min(args.batch_size, args.many, args.steps + 1, args.rounds + 1) < 2:
        p.error("--batch-size and --many must be at least 2, --steps and --rounds at least 1")
    return args


def main(argv=None):
    args = get_args(argv)
    device = torch.device(args.device)
    sizes = {arch: args.size or NATIVE.get(arch, 224) for arch in args.networks}
    report = {"provenance": origin(), "batch_size": args.batch_size, "steps": args.steps,
              "rounds": args.rounds, "networks": {}, "distillation": None, "loading": None}
    for arch, size in sizes.items():
        published = bare_network(arch, aux=True)  # 1000 classes
        report["networks"][arch] = {"size": size, "cost": cost(published, size),
                                    "training": training(arch, size, args, device),
                                    "inference": inference(published, size, args, device)}
    if len(sizes) == 2:
        report["distillation"] = distillation(*sizes, sizes, args, device)
    if args.data:
        report["loading"] = loading(args.data, next(iter(sizes.values())))
    print_report(report)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    run(main)

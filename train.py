"""Train a teacher, a baseline, or a student distilled from a teacher: one loop for all three.

    python train.py --role teacher                 built-in phantoms, no download (recipe demo)
    python train.py --role baseline                the student's network on labels alone
    python train.py --role student --T 1           the same network, distilled from runs/demo/teacher
    python train.py --role student --T 10 --data data/chest_xray        real films (recipe pneumonia)

A run is a folder, runs/RECIPE/NAME: best.pt (best on validation), last.pt (to go on from), history.csv.
A recipe is a set of defaults, nothing more; any flag overrides it. --help shows those of the role, recipe
and data that stand beside it.
"""

import copy
import csv
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import models
from data import UserError, atomic, device_flag, load_as, origin, parser, poses, prepare, progress, run, table
from evaluate import mean, metrics, predict, refuse_foreign, stopped_at
from kd import distillation_loss, label_loss, mean_teacher
from models import forward

SAVE_SECONDS = 20  # weights are written no more often: AlexNet has 0.7 GB to save, and epochs of a second


def recipe(both, teacher, student):
    return {"teacher": {**both, **teacher}, "baseline": {**both, **student}, "student": {**both, **student}}


RECIPES = {  # RECIPES[name][role]: flag -> value
    "demo": recipe(
        dict(data="phantoms", clip=1.0, batch_size=16, lr_gamma=0.2),
        teacher=dict(arch="inception_v3", size=112, epochs=8, lr=0.02, lr_step=5),
        student=dict(arch="alexnet", size=80, per_class=10, epochs=60, lr=0.03, lr_step=40),
    ),
    # arXiv 2406.08837, the paper. It does not state batch size, epochs, momentum or alpha: ours.
    "pneumonia": recipe(
        dict(weights="imagenet", finetune="fc", epochs=20, lr_step=7, lr_gamma=0.9),
        teacher=dict(arch="inception_v3", size=299, lr=5e-3),
        student=dict(arch="alexnet", size=224, lr=2e-4),
    ),
    "scratch": recipe(  # the same films and networks for those who have no ImageNet weights at hand
        dict(epochs=20, lr_step=7, lr_gamma=0.5, clip=1.0),
        teacher=dict(arch="inception_v3", size=224, lr=0.02),
        student=dict(arch="alexnet", size=224, lr=0.02),
    ),
    # The same at a third of the size, for two CPU cores: learning rates tuned on validation films alone.
    "small": recipe(
        dict(epochs=6, lr_step=4, lr_gamma=0.1, clip=1.0),
        teacher=dict(arch="inception_v3", size=112, lr=0.03),
        student=dict(arch="alexnet", size=80, batch_size=64, lr=0.04),
    ),
    # A course report (National Tsing Hua University, 2023); --finetune head for its fixed
    # features. Epochs and learning rate are ours. Its 1000 films a class are parted 800 / 200.
    "course": recipe(
        dict(weights="imagenet", per_class=1000, val_fraction=0.2, epochs=25, lr=1e-3, lr_gamma=0.1),
        teacher=dict(arch="googlenet"), student=dict(arch="alexnet"),
    ),
    # A dissertation (MSc, 2021) after arXiv 1909.11723: 2201 + 250 films a class. T is ours.
    "mura": recipe(
        dict(weights="imagenet", per_class=2451, val_fraction=0.102, optimizer="adam", lr=1e-4, lr_gamma=1.0,
             batch_size=16, epochs=20, T=4.0),
        teacher=dict(arch="seresnet50"), student=dict(arch="resnet18"),
    ),
    # arXiv 2305.06244: several findings a film. mnasnet1_0 stands in for its EEEA-Net-C2.
    "multilabel": recipe(
        dict(weights="imagenet", epochs=10, lr_step=4, lr_gamma=0.1, clip=1.0, T=4.0),
        teacher=dict(arch="densenet161"), student=dict(arch="mnasnet1_0"),
    ),
    "findings": recipe(  # its miniature: built-in films, random weights
        dict(data="findings", size=96, epochs=10, batch_size=16, lr=0.05, lr_step=7, lr_gamma=0.2, clip=1.0),
        teacher=dict(arch="resnet18"), student=dict(arch="mnasnet1_0"),
    ),
}
LOOKS = 10  # a run that is to stop at some accuracy looks at validation so often an epoch


# ---- the loop ---------------------------------------------------------------------------------------


def batches(n, batch_size, generator, device="cpu"):
    """A shuffled pass over n films, as a list of index tensors on the device.

    A last batch of one joins the one before it: BatchNorm cannot take a variance over a single film.
    """
    parts = list(torch.randperm(n, generator=generator).to(device).split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def objective(logits, labels, teacher_logits, T, alpha, label_smoothing):
    """total, hard, soft: with a teacher the mix of both, without one the labels alone."""
    if teacher_logits is None:
        hard = label_loss(logits, labels, label_smoothing)
        return hard, hard, torch.zeros_like(hard)
    return distillation_loss(logits, teacher_logits, labels, T, alpha)  # KD


def train_one_epoch(model, view, labels, batches, optimizer, teacher=None, T=1.0, alpha=0.9,
                    label_smoothing=0.0, aux_weight=0.0, clip=0.0, amp=False):
    """One pass over `batches`, an iterable of index tensors; returns means over the films it saw.

    view(index) is what the model reads of those films, labels[index] the truth, and teacher(index) the
    teacher's logits for the same films: a row of a table, or the answer of a network asked on the spot.
    Films are addressed by index from end to end, so teacher and student cannot slip apart. Without a
    teacher this is ordinary training; the lines marked KD are all that distillation adds.

    With several processes each takes its share of every batch, and gradients are added up: the same step
    as one process would make, but for BatchNorm's statistics and dropout, which each process has of its own.
    With one, share() is the batch, and add_up() and from_first() do nothing.
    """
    model.train()  # the teacher was put in eval mode when it was loaded; nothing here owns or moves it
    sums, seen = torch.zeros(4, device=labels.device), 0
    for batch in batches:
        index, weight = share(batch)
        teacher_logits = None
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=amp):
            logits, aux = forward(model, view(index))  # (B, C)
            if teacher is not None:  # KD
                with torch.no_grad():  # KD
                    teacher_logits = teacher(index)  # KD: (B, C)
        targets = (labels[index], teacher_logits, T, alpha, label_smoothing)
        loss, hard, soft = objective(logits, *targets)
        for aux_logits in aux:  # a second opinion half-way up learns the same thing
            loss = loss + aux_weight * objective(aux_logits, *targets)[0]
        optimizer.zero_grad(set_to_none=True)
        (loss * weight).backward()
        add_up([p.grad for p in model.parameters() if p.grad is not None])
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        means = torch.stack([loss, hard, soft, accuracy(logits, labels[index])]).detach()
        sums += weight * len(batch) * means  # which stays on the device: reading it would stall a GPU
        seen += len(batch)
    add_up([sums])
    from_first(*model.buffers())  # BatchNorm's averages
    loss, hard, soft, right = (sums / seen).tolist()
    return {"loss": loss, "hard": hard, "soft": soft, "train_accuracy": right}


def processes():
    """rank, world: which one of torchrun's processes this is, 0 of 1 without it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def share(batch):
    """This process's films of a batch, and their share of it. Of a batch too short to leave everyone the two
    films that BatchNorm needs, all take the whole."""
    rank, world = processes()
    index = batch[rank::world]
    return (index, len(index) / len(batch)) if len(batch) >= 2 * world else (batch, 1 / world)


def add_up(tensors):
    """Replace each tensor by its sum over the processes, all in one message."""
    if processes() == (0, 1):
        return
    flat = torch.cat([t.flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


def from_first(*tensors):
    """Replace each tensor by the first process's."""
    for tensor in tensors if processes() != (0, 1) else []:
        torch.distributed.broadcast(tensor, 0)


@contextmanager
def first_alone():
    """What the first process decodes or asks, the others then find in the cache."""
    rank, world = processes()
    if world > 1 and rank:
        torch.distributed.barrier()
    yield
    if world > 1 and not rank:
        torch.distributed.barrier()


def accuracy(logits, labels):
    if labels.dim() == 1:
        return (logits.argmax(1) == labels).float().mean()
    known = ~labels.isnan()
    return (((logits > 0) == (labels > 0.5)) & known).sum() / known.sum().clamp(min=1)


# ---- what the loop is fed ---------------------------------------------------------------------------


def view_of(table, device):
    """view(index, theta=None): rows of a table as a network reads them. Films, which are bytes, are
    normalised, and moved by their affine matrices if there are any; features and logits stay as they are."""
    if device.type == "cuda" and table.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        table = table.to(device)  # once, if it fits: no batch waits for the bus afterwards

    def view(index, theta=None):
        rows = table[index.to(table.device)]
        if rows.dtype != torch.uint8:
            return rows.to(device).float()
        return prepare(rows, device, None if theta is None else theta[index.to(theta.device)])

    return view


def view_through(network, images, device, live, cache, name, facts, dtype="float32"):
    """The view of what a frozen network, a teacher or the student's own body, makes of films.

    Of films that stay as they are it says the same in every epoch, at every temperature and for every seed:
    it is asked once, and its answers are kept, a table like the images. Moving films it is asked about live.
    """
    films = view_of(images, device)
    ask = torch.no_grad()(lambda index, theta=None: network(films(index, theta)))
    if live:
        return ask

    def fill(block, start):
        rows = torch.from_numpy(block)
        for index in torch.arange(len(rows)).split(64):
            rows[index] = ask(start + index).to("cpu", rows.dtype)
        if not rows.isfinite().all():
            raise UserError(f"finite {name} needed, found NaN or infinity: the network behind it diverged, "
                            f"or they do not fit {dtype}; use other weights")

    shape = (len(images), *ask(torch.arange(1)).shape[1:])
    return view_of(table(cache, name, facts, shape, dtype, fill), device)


def view_of_learner(args, model, tail, split, device, live=False):
    """What the learning part reads: films, or what the frozen body in front of it makes of them."""
    if tail is model:
        return view_of(split.images, device)
    facts = [args.arch, args.size, args.finetune, models.frozen_hash(model), split.fingerprint]
    return view_through(lambda x: models.features(model, tail, x), split.images, device, live, args.cache,
                        "features", facts, "float16")  # for VGG16 has 25,088 numbers a film


def load_teacher(path, args, data, device):
    """A teacher and its own films, unless something about it would make the student's result a lie."""
    model, facts = models.load_checkpoint(path)
    refuse_foreign(path, facts, data)
    stopped = stopped_at(facts)
    print(f"taught by {path}: {facts['arch']}{stopped}, {facts['size']} px, epoch {facts['epoch']:g}, "
          f"validation accuracy {100 * mean(facts['validation']['accuracy']):.1f} %"
          + ("" if stopped else ", not stopped early"))
    split = data.train
    if facts["size"] != args.size:
        split = load_as(vars(args), facts["size"], ["train"]).train  # the same rows, at the teacher's size
    model.to(device, memory_format=torch.channels_last)
    digest = models.file_hash(models.checkpoint_file(path))
    view = view_through(lambda x: forward(model, x)[0], split.images, device, args.augment, args.cache,
                        "teacher", [digest, facts["size"], split.fingerprint])
    return {"view": view, "hash": digest, "name": facts["arch"] + stopped}


def make_teacher(teachers, T, multilabel, theta=None):
    """teacher(index): logits for the very view of a film that the student has, moved by the same matrices."""
    return lambda index: mean_teacher([t["view"](index, theta) for t in teachers], T, multilabel)


# ---- a run ------------------------------------------------------------------------------------------


def make_optimizer(args, parameters):
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    return torch.optim.SGD(parameters, args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)


def resume(args, now, model, optimizer):
    """The history so far: empty for a new run; otherwise weights and optimiser are put back as they were."""
    path = Path(args.out) / "last.pt"
    if not path.exists():
        return []
    saved, facts = models.load_checkpoint(path)
    told = [f"other {what}" for what in ("films", "teachers") if facts[what] != now[what]]
    if facts.get("processes", 1) != now["processes"]:
        told.append(f"{facts.get('processes', 1)} processes (now {now['processes']})")
    told += [f"--{flag.replace('_', '-')} {facts['args'].get(flag)} (now {value})"
             for flag, value in vars(args).items()
             if flag not in ("device", "cache", "out", "tensorboard") and value != facts["args"].get(flag)]
    if told:
        raise UserError(f"{args.out} was begun with {', '.join(told)}: repeat that command, or choose "
                        f"another --out")
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(facts["optimizer"])
    return facts["history"]


def write_history(path, history, board):
    with atomic(path) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    if board:
        for name, value in history[-1].items():
            part = "validation" if name.startswith("val_") else "training"  # two groups of curves on the page
            board.add_scalar(f"{part}/{name.removeprefix('val_')}", value, len(history))
        board.flush()


def train(args):
    device, out, rank = torch.device(args.device), Path(args.out), processes()[0]
    with first_alone():
        data = load_as(vars(args), args.size, ["train", "val"])
        teachers = [load_teacher(path, args, data, device) for path in args.teacher or []]
    n, labels = len(data.train.labels), data.train.labels.to(device)
    facts = {"args": vars(args), "classes": data.classes, "multilabel": data.multilabel,
             "train_groups": sorted(set(data.train.groups)), "provenance": origin(device),
             "films": [data.train.fingerprint, data.val.fingerprint],
             "processes": processes()[1], "teachers": [teacher["hash"] for teacher in teachers],
             "taught_by": [teacher["name"] for teacher in teachers]}
    refuse_stop_at(args, data)

    torch.manual_seed(args.seed)
    model = models.build(args.arch, len(data.classes), args.size, args.weights)
    model.facts["input"] = args.input
    model.to(device, memory_format=torch.channels_last)
    tail = models.split(model, args.finetune)  # the part that learns: all of it, or its end
    optimizer = make_optimizer(args, tail.parameters())
    history = resume(args, facts, model, optimizer)
    if history and finished(args, history[-1]):
        done = history[-1]["epoch"]
        return print(f"{args.out} is finished, {done:g} epochs: evaluate it, or choose another --out")

    sizes = [f"{sum(p.numel() for p in part.parameters()) / 1e6:.1f} M" for part in (model, tail)]
    print(f"{args.role}: {args.arch} at {args.size} px, {sizes[0]} parameters, {sizes[1]} learning; "
          f"{n} training and {len(data.val.labels)} validation films of {args.data}; to {args.out}")
    if history:
        print(f"going on after epoch {history[-1]['epoch']:g}")
    board = tensorboard(out, len(history)) if args.tensorboard and rank == 0 else None
    with first_alone():
        view = view_of_learner(args, model, tail, data.train, device, args.augment)
        val_view = view_of_learner(args, model, tail, data.val, device)

    best, saved, n_batches = None, time.perf_counter(), len(batches(n, args.batch_size, None))
    looks = min(LOOKS, n_batches) if args.stop_at else 1  # mostly one, at the end of every epoch
    while not history or not finished(args, history[-1]):
        # Every random choice of an epoch follows from seed and epoch: a run can go on from any of them.
        epoch, look = divmod(len(history), looks)
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + epoch + 1)  # order, augmentation
        torch.manual_seed(1_000_003 * args.seed + 1 + len(history) + 7919 * rank)  # dropout
        theta = poses(n, generator).to(device) if args.augment else None
        teacher = make_teacher(teachers, args.T, data.multilabel, theta) if teachers else None
        lr = args.lr * args.lr_gamma ** (epoch // args.lr_step)
        optimizer.param_groups[0]["lr"] = lr
        parts = batches(n, args.batch_size, generator, device)[look::looks]
        done = len(history) + 1 if looks == 1 else (len(history) + 1) / looks  # epochs after this: 3, or 0.3
        parts = progress(parts, f"epoch {done:>2g}/{args.epochs}")
        start = time.perf_counter()
        row = train_one_epoch(
            tail, lambda index, theta=theta: view(index, theta), labels, parts, optimizer, teacher,
            args.T, args.alpha, args.label_smoothing, models.AUX_WEIGHT.get(args.arch, 0.0), args.clip,
            device.type == "cuda" and not args.no_amp,  # on most CPUs bfloat16 is far slower than float32
        )
        seconds = time.perf_counter() - start
        if not math.isfinite(row["loss"]):
            raise UserError(f"the loss is {row['loss']} in epoch {done:g} at learning rate {lr:.2g}: lower "
                            f"--lr, or set --clip 1")
        judged, figures = validate(tail, val_view, data, device)
        row = {"epoch": done, **row, **figures, "lr": lr, "seconds": round(seconds, 2)}
        score = "val_auc" if data.multilabel else "val_accuracy"
        better = all((row[score], -row["val_loss"]) > (r[score], -r["val_loss"]) for r in history)
        history.append(row)
        facts |= {"epoch": done, "train_accuracy": row["train_accuracy"], "validation": judged}
        if rank == 0:
            write_history(out / "history.csv", history, board)
        if better:  # kept in memory until both are written: best.pt is never of an epoch yet to be repeated
            best = copy.deepcopy(model), dict(facts)
        if rank == 0 and (finished(args, row) or time.perf_counter() - saved >= SAVE_SECONDS):
            if best:
                models.save_checkpoint(out / "best.pt", best[0], **best[1])
            state = {"history": history, "optimizer": optimizer.state_dict()}
            models.save_checkpoint(out / "last.pt", model, **facts, **state)
            best, saved = None, time.perf_counter()
        print(describe(args, row) + ("  best" if better else ""), flush=True)
    print(f"{summary(history)}; {out}/best.pt")


def summary(history):
    accuracy, val_accuracy = (100 * max(r[k] for r in history) for k in ("train_accuracy", "val_accuracy"))
    loss, val_loss = (min(r[k] for r in history) for k in ("loss", "val_loss"))
    return (f"best accuracy: train {accuracy:.1f}, validation {val_accuracy:.1f}; "
            f"lowest loss: train {loss:.3f}, validation {val_loss:.3f}; "
            f"{sum(r['seconds'] for r in history):.0f} s of training")


def refuse_stop_at(args, data):
    """A defective teacher must at least know more than which class is the commonest."""
    if args.stop_at and data.multilabel:
        raise UserError("--stop-at needs films of one class each, these may have several: leave it out")
    if args.stop_at:
        floor = data.val.labels.bincount().max().item() / len(data.val.labels)
        if args.stop_at < floor:
            raise UserError(f"--stop-at must be {floor:.3f} or more, which calling every film by the "
                            f"commonest class reaches on validation, got {args.stop_at:g}")


def validate(tail, view, data, device):
    """All figures of the validation films, and those of them that go into the history."""
    logits, labels = predict(tail, view, len(data.val.labels)).to(device), data.val.labels
    from_first(logits)  # all processes must agree on when to stop
    judged = metrics(logits.cpu(), labels, data.classes)
    kept = {f"val_{k}": mean(judged[k]) for k in ("accuracy", "specificity", "sensitivity", "auc")}
    return judged, {"val_loss": label_loss(logits.cpu(), labels).item(), **kept}


def finished(args, row):
    return row["epoch"] >= args.epochs or bool(args.stop_at) and row["val_accuracy"] > args.stop_at


def tensorboard(folder, done):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package of that name, found none: pip install tensorboard, "
                        "or do without, history.csv holds the same figures") from None
    return SummaryWriter(folder, purge_step=done + 1)


def describe(args, row):
    kd = f" (hard {row['hard']:.3f}, soft {row['soft']:.3f})" if args.teacher else ""
    return (
        f"epoch {row['epoch']:>2g}/{args.epochs}  loss {row['loss']:.3f}{kd}  "
        f"val loss {row['val_loss']:.3f} acc {100 * row['val_accuracy']:.1f} "
        f"spec {100 * row['val_specificity']:.1f} sens {100 * row['val_sensitivity']:.1f}  "
        f"lr {row['lr']:.2g}  {row['seconds']:.1f} s"
    )


# ---- the command line -------------------------------------------------------------------------------

UNNAMED = ("role", "recipe", "data", "out", "T", "device", "cache", "no_amp", "tensorboard")  # not in names
FLOORS = {"T": 0, "lr": 0, "epochs": 0, "size": 0, "lr_step": 0, "lr_gamma": 0, "per_class": 1, "seed": -1,
          "batch_size": 1}


def run_name(p, args):
    """The role, and whatever differs from the recipe: student-T10-seed2, teacher-resnet18."""
    name = args.role + (f"-T{args.T:g}" if args.role == "student" else "")
    for flag, value in vars(args).items():
        if flag not in UNNAMED and value != p.get_default(flag):
            label = {"arch": "", "weights": "", "teacher": "of-"}.get(flag, flag.replace("_", ""))
            for each in value if isinstance(value, list) else [value]:
                name += f"-{label}" + ("" if each is True else Path(str(each)).name)
    return name


def check(p, args):
    """Mistakes that the command line alone gives away: exit code 2, before anything is read or written."""
    for flag, floor in FLOORS.items():
        value = getattr(args, flag)
        if value is not None and not floor < value < 1e9:
            p.error(f"--{flag.replace('_', '-')} must be a number above {floor}, got {value}")
    if not all(0 <= value < 1e9 for value in (args.momentum, args.weight_decay, args.clip)):
        p.error("--momentum, --weight-decay and --clip must be 0 or more")
    if not 0 <= args.alpha <= 1:
        p.error(f"--alpha mixes labels (0) and teacher (1), so it must lie in [0, 1], got {args.alpha}")
    if not 0 < args.val_fraction < 1 or not 0 <= args.label_smoothing < 1:
        p.error("--val-fraction must lie between 0 and 1, and --label-smoothing from 0 to below 1")
    if args.teacher and args.role != "student":
        p.error(f"--teacher belongs to --role student; a {args.role} learns from labels alone")
    if args.stop_at is not None and (args.role != "teacher" or not 0 < args.stop_at < 1):
        p.error("--stop-at makes a defective teacher: a share between 0 and 1, with --role teacher")
    if args.label_smoothing and args.role == "student":
        p.error("--label-smoothing is for --role baseline or teacher; a student has its teacher")
    partly = args.arch in models.SE_RESNETS and args.weights == "imagenet"  # a ResNet's, its SE parts random
    if args.finetune != "all" and (args.weights == "none" or partly):
        p.error(f"--finetune {args.finetune} with --weights {args.weights} would freeze random ones in "
                f"{args.arch}: give --weights imagenet or a file that holds all, or --finetune all")


def get_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = parser("train.py --role ROLE", __doc__)
    g = p.add_argument_group("what is trained")
    g.add_argument("--role", required=True, choices=["teacher", "baseline", "student"], help="what to train")
    g.add_argument("--recipe", choices=RECIPES, help="set of defaults; by itself demo, with --data pneumonia")
    g.add_argument("--arch", default="alexnet", choices=models.architectures(), metavar="ARCH",
                   help="the network, any classifier of torchvision")
    g.add_argument("--weights", default="none", help="to start from: none (random), imagenet, or a file")
    g.add_argument("--finetune", default="all", choices=["all", "fc", "head"],
                   help="what learns: all layers, the fully connected ones, the new last one")
    g.add_argument("--out", help="the run's folder (default: runs/RECIPE/NAME)")

    g = p.add_argument_group("on which films")
    g.add_argument("--data", default="phantoms", help="a folder of films; or, built in: phantoms, findings")
    g.add_argument("--size", type=int, default=224, help="the films' side in pixels")
    g.add_argument("--classes", type=int, choices=[2, 3], help="3: normal, bacterial, viral, by file name")
    g.add_argument("--per-class", type=int, help="a balanced subset, at most so many films of each class")
    g.add_argument("--val-fraction", type=float, default=0.1, help="share of train kept for validation")
    g.add_argument("--uncertain", default="ignore", choices=["ignore", "zero", "one"],
                   help="what CheXpert's uncertain labels count as")
    g.add_argument("--input", default="film", choices=["film", "residual"],
                   help="what networks read: the film, or its noise residuals")
    g.add_argument("--augment", action="store_true", help="rotate, zoom and shift a little, anew each epoch")

    g = p.add_argument_group("who teaches a student, and how")
    g.add_argument("--teacher", nargs="+", metavar="RUN", help="runs, or runs/RECIPE/teacher")
    g.add_argument("--T", type=float, default=1.0, help="temperature: 1 as it is, higher is softer")
    g.add_argument("--alpha", type=float, default=0.9, help="0 heeds labels only, 1 the teacher only")

    g = p.add_argument_group("how does it learn")
    g.add_argument("--epochs", type=int, default=20, help="passes over the films")
    g.add_argument("--batch-size", type=int, default=32, help="films a step")
    g.add_argument("--optimizer", default="sgd", choices=["sgd", "adam"], help="SGD with momentum, or Adam")
    g.add_argument("--lr", type=float, default=0.01, help="learning rate of the first epoch")
    g.add_argument("--lr-step", type=int, default=7, help="epochs between two decays of the learning rate")
    g.add_argument("--lr-gamma", type=float, default=0.9, help="what a decay multiplies it by")
    g.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    g.add_argument("--weight-decay", type=float, default=0.0, help="pull of all weights towards zero")
    g.add_argument("--clip", type=float, default=0.0, help="largest norm of the gradient, 0: any")
    g.add_argument("--label-smoothing", type=float, default=0.0, help="share of a label spread over all")
    g.add_argument("--stop-at", type=float, metavar="ACCURACY", help="end a teacher's training as soon as "
                   "validation passes it (a defective teacher); looked at ten times an epoch")

    g = p.add_argument_group("where does it run, and what is kept")
    g.add_argument("--seed", type=int, default=0, help="of weights, order, dropout and augmentation")
    device_flag(g)
    g.add_argument("--no-amp", action="store_true", help="float32 on a GPU, not bfloat16")
    g.add_argument("--tensorboard", action="store_true", help="write history.csv's curves there too")
    g.add_argument("--cache", default="cache", help="folder of decoded films and tables; may be deleted")

    # Parsed twice: once to learn role and recipe, once with their defaults (which --help then shows).
    first, _ = p.parse_known_args(["--role", "teacher", *(a for a in argv if a not in ("-h", "--help"))])
    name = first.recipe or {"phantoms": "demo", "findings": "findings"}.get(first.data, "pneumonia")
    p.set_defaults(**RECIPES[name][first.role], recipe=name)
    args = p.parse_args(argv)
    check(p, args)
    args.out = args.out or f"runs/{name}/{run_name(p, args)}"
    if args.role == "student" and not args.teacher:
        args.teacher = [f"runs/{name}/teacher"]
    out = Path(args.out).resolve()
    if {out, out / "best.pt", out / "last.pt"} & {Path(path).resolve() for path in args.teacher or []}:
        p.error(f"a student cannot be its own teacher: --out is {args.out} and so is --teacher")
    return args


def main(argv=None):
    args = get_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends like Ctrl-C
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if "cuda" in args.device else "gloo")
    if processes()[0]:  # one process tells and writes
        sys.stdout = open(os.devnull, "w")
    try:
        train(args)
        if processes()[1] > 1:
            torch.distributed.destroy_process_group()  # or a process may abort on its way out
    except KeyboardInterrupt:
        last = Path(args.out) / "last.pt"
        done = models.load_checkpoint(last)[1]["epoch"] if last.exists() else 0
        print(f"\nstopped; the same command goes on after epoch {done:g} of {args.out}", file=sys.stderr)
        raise


if __name__ == "__main__":
    run(main)

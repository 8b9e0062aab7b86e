"""Train a teacher, a baseline, or a student distilled from a teacher: one loop for all three.

    python train.py --role teacher                 built-in phantoms, no download (recipe demo)
    python train.py --role baseline                the student's network on labels alone
    python train.py --role student --T 1           the same network, taught by runs/demo/teacher
    python train.py --role student --T 10 --data data/chest_xray       real X-rays, recipe pneumonia

A run is a folder, runs/RECIPE/NAME: best.pt (the best epoch on validation), history.csv, and
last.pt (to resume from; once finished it holds the history alone). A recipe is a set of defaults,
nothing more; any flag overrides it. Add --help to a command to see its defaults.
"""

import argparse
import copy
import math
import os
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import models
from data import (Help, UserError, explain, fingerprint, load_as, mean, number, origin, prepare,
                  progress, random_affines, run, show_progress, table, usable_device, write_csv)
from evaluate import MACHINE, metrics, predict
from kd import binary_kd_loss, distillation_loss, kd_loss, label_loss, mean_teacher
from models import forward, refuse_foreign, refuse_leak, stopped_at, unfinished

SAVE_SECONDS = 20  # weights are saved no more often: AlexNet has 0.7 GB, and epochs of a second


def recipe(both, teacher, student):
    return {"teacher": {**both, **teacher}, "baseline": {**both, **student},
            "student": {**both, **student}}


RECIPES = {  # RECIPES[name][role]: flag -> value
    # Phantoms, a fifth of whose training labels are wrong, as labels read off reports are. The
    # student's network has 20 labels, and all 640 images if a teacher speaks for the others.
    "demo": recipe(
        dict(data="phantoms", wrong_labels=0.2, clip=1.0, batch_size=16, lr_gamma=0.2),
        teacher=dict(arch="inception_v3", size=112, epochs=8, lr=0.02, lr_step=5),
        student=dict(arch="alexnet", size=80, labels_per_class=10, epochs=20, steps_per_epoch=10,
                     lr=0.03, lr_step=14)),
    # arXiv 2406.08837, the paper. Sizes, decay and what the student learns are its own. Its rates
    # (5e-3, 2e-4) come without a batch size: rates, batches and epochs were chosen on validation
    # images. So was a teacher that learns in all layers: with a new last layer alone, as the paper
    # words it, it validates below its student. Without clip, T = 10 and more diverge.
    "pneumonia": recipe(
        dict(weights="imagenet", lr_step=7, lr_gamma=0.9, clip=1.0),
        teacher=dict(arch="inception_v3", size=299, epochs=6, lr=0.02),
        student=dict(arch="alexnet", size=224, finetune="fc", epochs=20, lr=0.01, batch_size=128)),
    # The same images and networks from random weights.
    "scratch": recipe(
        dict(epochs=20, lr=0.02, lr_step=7, lr_gamma=0.5, clip=1.0, size=224),
        teacher=dict(arch="inception_v3"), student=dict(arch="alexnet")),
    # The same at a third of the size, for two CPU cores; learning rates tuned on validation.
    "small": recipe(
        dict(epochs=6, lr_step=4, lr_gamma=0.1, clip=1.0),
        teacher=dict(arch="inception_v3", size=112, lr=0.03),
        student=dict(arch="alexnet", size=80, batch_size=64, lr=0.04)),
    # A course report (National Tsing Hua University, 2023); --finetune head for its fixed features.
    # Epochs and learning rate are ours. Of its 1000 images a class 800 train and 200 validate.
    "course": recipe(
        dict(weights="imagenet", per_class=1000, val_fraction=0.2, epochs=25, lr=1e-3,
             lr_gamma=0.1),
        teacher=dict(arch="googlenet"), student=dict(arch="alexnet")),
    # A dissertation (MSc, 2021) after arXiv 1909.11723: 2201 + 250 images a class. T is ours.
    "mura": recipe(
        dict(weights="imagenet", per_class=2451, val_fraction=0.102, optimizer="adam", lr=1e-4,
             lr_gamma=1.0, batch_size=16, epochs=20, T=4.0),
        teacher=dict(arch="seresnet50"), student=dict(arch="resnet18")),
    # arXiv 2305.06244: several findings an image. mnasnet1_0 stands in for its EEEA-Net-C2.
    "multilabel": recipe(
        dict(weights="imagenet", epochs=10, lr_step=4, lr_gamma=0.1, clip=1.0, T=4.0),
        teacher=dict(arch="densenet161"), student=dict(arch="mnasnet1_0")),
    # Its miniature: phantoms with three findings, random weights.
    "findings": recipe(
        dict(data="findings", size=96, epochs=10, batch_size=16, lr=0.05, lr_step=7, lr_gamma=0.2,
             clip=1.0),
        teacher=dict(arch="resnet18"), student=dict(arch="mnasnet1_0")),
}


# ---- the loop ------------------------------------------------------------------------------------


def train_one_epoch(model, batches, optimizer, T=1.0, alpha=0.9, label_smoothing=0.0,
                    aux_weight=0.0, clip=0.0, amp=False, text="", n_steps=0):
    """One pass over `batches`; returns the mean loss, its two parts, and the training accuracy.

    batches: any iterable of (x, y, teacher_logits): what the model reads, the labels, and what the
    teacher says of the same images, or None. Without a teacher this is ordinary training. The lines
    marked KD are all that distillation adds to the loop.

    The soft loss is a mean over all images of a batch, the hard loss over those with a label: in a
    batch without any it is 0. What is returned are means over all images, or all that have a label.
    """
    model.train()  # the teacher is not in here: load_checkpoint put it in eval mode
    sums, n_images, start = 0, 0, time.perf_counter()
    for step, (x, y, teacher_logits) in enumerate(batches, 1):
        # (B, 3, H, W) images or (B, ...) features; (B,) or (B, K); (B, C)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits, aux = forward(model, x)  # (B, C); auxiliary heads, mostly none
        known = y >= 0  # unknown labels are -1 or NaN
        # Several processes average their gradients, so all must divide by the same count.
        n_known = mean_over_processes(known.sum())
        loss = hard = label_loss(logits, y, label_smoothing, n_known)
        soft = torch.zeros_like(hard)
        if teacher_logits is not None:  # KD
            soft_loss = kd_loss if y.dim() == 1 else binary_kd_loss  # KD: softmax or sigmoid
            soft = soft_loss(logits, teacher_logits, T)  # KD
            loss = (1 - alpha) * hard + alpha * soft  # KD
        for aux_logits in aux:  # classifiers half-way up (InceptionV3, GoogLeNet) get the same loss
            aux_loss = label_loss(aux_logits, y, label_smoothing, n_known)
            if teacher_logits is not None:  # KD: the same loss, in one function
                aux_loss, _, _ = distillation_loss(aux_logits, teacher_logits, y, T, alpha, n_known)
            loss = loss + aux_weight * aux_loss
        optimizer.zero_grad()
        loss.backward()  # under torchrun, this also averages the gradients over the processes
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        # Sums stay on the device: reading a number after every step would stall a GPU.
        right = (logits.argmax(1) == y if y.dim() == 1 else (logits > 0) == (y > 0.5)) & known
        counted = loss * len(y), soft * len(y), hard * n_known, right.sum(), known.sum()
        sums += torch.stack(counted).detach()
        n_images += len(y)
        if n_steps and (step % 10 == 0 or x.device.type == "cpu"):
            speed = n_images / (time.perf_counter() - start)
            show_progress(text, step, n_steps, start, f"loss {loss:.2f}  {speed:.0f} images/s  ")
    show_progress(text)
    loss, soft, hard, right, known = (mean_over_processes(sums) / n_images).tolist()
    known = max(known, 1e-9)
    return {"loss": loss, "hard": hard / known, "soft": soft, "train_accuracy": right / known}


def paired_batches(inputs, labels, teachers, args, generator, device="cpu"):
    """Yield (x, y, teacher_logits) of the same rows, shuffled: image and teacher cannot slip apart.

    inputs is what the learner reads, teachers a list of what its teachers say, empty for none. Each
    is a pair (table, network), row i of the table for image i:
        (images, None)        uint8 (N, 1, H, W), normalised here
        (answers, None)       a frozen network's logits (N, C) or features (N, ...), computed before
        (images, network)     with --augment: the frozen network is asked about the moved images
    Random here are the order and, with --augment, how each image is moved: both by `generator`.
    """
    n, (rank, world) = len(labels), processes()
    affines = random_affines(n, generator).to(device) if args.augment else None
    parts = []
    while len(parts) < (args.steps_per_epoch or 1):  # one pass over the images, or several
        # On the device as a whole: to copy the rows of every batch there would make a GPU wait.
        one_pass = list(torch.randperm(n, generator=generator).to(device).split(args.batch_size))
        if len(one_pass) > 1 and len(one_pass[-1]) < 2 * world:  # BatchNorm needs two a process
            one_pass[-2:] = [torch.cat(one_pass[-2:])]
        parts += one_pass
    for part in parts[: args.steps_per_epoch]:
        # Each of several processes takes its share; what does not divide is left out this epoch.
        rows = part[rank : len(part) // world * world : world]
        moves = None if affines is None else affines[rows]  # the same for student and teachers
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=use_amp(args)):
            x = read_rows(*inputs, rows, device, moves)
            answers = [read_rows(*teacher, rows, device, moves) for teacher in teachers]  # KD
        teacher = mean_teacher(answers, args.T, labels.dim() == 2) if teachers else None  # KD
        yield x, labels[rows], teacher


def read_rows(table, network, rows, device, affines=None):
    """Rows of a table on the device: images normalised, logits and features as they are; then what
    the network makes of them, if there is one."""
    x = prepare(table[rows.to(table.device)], device, affines)
    return x if network is None else network(x)


def ask_once(network, images, path, device, dtype=torch.float32):
    """(answers, None): what a frozen network says of each image, computed once, kept in a file.

    Without augmentation its answer depends on neither epoch nor T nor seed. It is computed in
    float32, where --augment asks in bfloat16 on a GPU.
    """
    answers = table(path, len(images), answer_blocks(network, images, device, dtype))
    return on_device(answers, device), None


@torch.no_grad()
def answer_blocks(network, images, device, dtype):
    for rows in progress(torch.arange(len(images)).split(512), "asking the frozen network"):
        answers = [read_rows(images, network, batch, device).to("cpu", dtype)
                   for batch in rows.split(64)]  # 64 fit into memory, 512 are written at a time
        block = torch.cat(answers)
        if not block.isfinite().all():
            raise UserError(f"a frozen network's answers are not finite numbers in {dtype}: it "
                            f"diverged. Use another --teacher or --weights")
        yield block.numpy()


def on_device(rows, device):
    """A table is moved to a GPU once, if it fits: no batch then waits for the bus."""
    if device.type == "cuda" and rows.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return rows.to(device)
    return rows


def use_amp(args):
    """bfloat16 on a GPU; on most CPUs it is far slower than float32."""
    return torch.device(args.device).type == "cuda" and not args.no_amp


def processes():
    """rank, world: which one of torchrun's processes this is; 0 of 1 without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_processes(value):
    value = value.float()
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


# ---- a run, from the images to the last epoch ----------------------------------------------------


def train(args):
    device, (rank, world) = torch.device(args.device), processes()
    check_files(args)  # before any image is decoded
    if rank:  # the first process decodes and asks alone; the others wait and then find its tables
        dist.barrier()

    # 1. The images: a uint8 table, one row an image.
    data = load_as(vars(args), args.size, ["train", "val"], args.cache)
    labels = data.train.labels.to(device)
    if len(labels) < 2 * world:
        raise UserError("each process needs two training images at least, which BatchNorm averages")

    # 2. The network, and the part of it that learns. The seed decides its random weights.
    torch.manual_seed(args.seed)
    model = models.build(args.arch, len(data.classes), args.size, args.weights, args.input)
    refuse_leak(args.weights, model.facts["seen_groups"], data)
    model.to(device, memory_format=torch.channels_last)
    learner = models.freeze(model, args.finetune)
    optimizer = make_optimizer(args, learner.parameters())
    inputs = learner_inputs(args, model, learner, data.train, device, args.augment)
    val_inputs = learner_inputs(args, model, learner, data.val, device)[0]

    # 3. The teachers: a table of logits each, row i for image i.
    teachers, facts = load_teachers(args, data, device)
    facts |= run_facts(args, data, facts["seen_groups"] + model.facts["seen_groups"])
    if world > 1 and not rank:  # here the first process releases the others
        dist.barrier()

    # 4. Epochs. Each one reseeds from (seed, epoch), so a run can resume after any saved epoch.
    history = resume(args, facts, model, optimizer)
    describe_run(args, model, learner, data, history)
    board = open_folder(args, len(history)) if rank == 0 else None
    parallel = torch.nn.parallel.DistributedDataParallel(learner) if world > 1 else learner
    best, saved = None, time.perf_counter()
    while not history or not finished(args, history[-1]):
        epoch = len(history) + 1
        order = torch.Generator().manual_seed(seed_for(args.seed, epoch, "order, augmentation"))
        torch.manual_seed(seed_for(args.seed, epoch, "dropout", rank))
        lr = args.lr * args.lr_gamma ** ((epoch - 1) // args.lr_step)  # step decay
        optimizer.param_groups[0]["lr"] = lr
        start = time.perf_counter()
        batches = paired_batches(inputs, labels, teachers, args, order, device)
        row = train_one_epoch(parallel, batches, optimizer, args.T, args.alpha,
                              args.label_smoothing, models.AUX_WEIGHT.get(args.arch, 0.0),
                              args.clip, use_amp(args), f"epoch {epoch:>2}/{args.epochs}",
                              args.steps_per_epoch or math.ceil(len(labels) / args.batch_size))
        row = {"epoch": epoch, **row, "lr": lr, "seconds": round(time.perf_counter() - start, 2)}
        figures, validation = validate(args, learner, val_inputs, data, row)
        history.append(row | validation)
        facts |= {"epoch": epoch, "train_accuracy": row["train_accuracy"], "validation": figures}
        better = is_best(history, data.multilabel)
        if better and rank == 0:  # kept in memory until it is saved together with last.pt
            best = copy.deepcopy(model), dict(facts)
        if rank == 0:
            if finished(args, history[-1]) or time.perf_counter() - saved >= SAVE_SECONDS:
                save_run(args, model, best, facts, history, optimizer)
                best, saved = None, time.perf_counter()
            write_history(args, history, board)  # a whole history says that best.pt is the best
        print(describe_epoch(args, history[-1]) + ("  best" if better else ""), flush=True)
    describe_end(args, history)


def seed_for(*what):
    """A seed for each thing that is random: order and dropout must not draw the same numbers."""
    return int(fingerprint(*what), 16)


def check_files(args):
    """What the run starts from must be there; ImageNet weights are fetched."""
    if args.weights != "none":
        models.weights_file(args.arch, args.weights)
    for path in args.teacher or []:
        if not models.run_file(path).exists():
            runs = sorted(str(best.parent) for best in Path(path).parent.glob("*/best.pt"))
            raise UserError(f"No such file: {models.run_file(path)}. Name a teacher with --teacher "
                            f"({', '.join(runs) or 'none is there'}) or train it: --role teacher")


def run_facts(args, data, seen_groups):
    """What a checkpoint must remember beside its network: what made it, and whom it has seen."""
    return {"args": vars(args), "classes": data.classes, "multilabel": data.multilabel,
            "images": [data.train.fingerprint, data.val.fingerprint,
                       fingerprint(data.train.labels.tolist(), data.val.labels.tolist())],
            "processes": processes()[1],
            # Names of images too: PATIENT may have been changed between teacher and student.
            "seen_groups": sorted({*data.train.groups, *data.train.ids, *seen_groups}),
            "provenance": origin(args.device)}


def learner_inputs(args, model, learner, split, device, live=False):
    """(table, network): images; or, behind a frozen body, its features, a table of their own.

    live: the images move (--augment), so the body is asked about every batch anew.
    """
    if learner is model:
        return on_device(split.images, device), None
    body = partial(models.features, model, learner)  # in eval mode and without gradients
    if live:
        return on_device(split.images, device), body
    made_from = [args.arch, args.size, args.finetune, models.frozen_hash(model), split.fingerprint]
    path = Path(args.cache) / f"features-{args.arch}-{fingerprint(made_from)}.npy"
    return ask_once(body, split.images, path, device, torch.float16)  # VGG16: 25,088 an image


def load_teachers(args, data, device):
    """[(table, network), ...] of the teachers, and what a checkpoint must remember of them.

    A teacher sees the images at its own size. With --augment it is asked at every step, about the
    very views that the student sees. One that has learned from the student's validation or test
    patients is refused (refuse_foreign): its answers would carry their labels into training.
    """
    teachers, facts = [], {"teachers": [], "taught_by": [], "seen_groups": []}
    for path in args.teacher or []:
        model, known = models.load_checkpoint(path)
        with explain(f"{path} is not a checkpoint of this project"):
            refuse_foreign(path, known, data)
            stopped, accuracy = stopped_at(known), 100 * mean(known["validation"]["accuracy"])
            print(f"taught by {path}: {known['arch']}{stopped}{unfinished(path, known)}, best in "
                  f"epoch {known['epoch']}, {known['size']} px, validation accuracy "
                  f"{accuracy:.1f} %")
        split = data.train
        if known["size"] != args.size:  # the same rows, at the teacher's size
            split = load_as(vars(args), known["size"], ["train"], args.cache).train
        assert split.ids == data.train.ids
        model.to(device, memory_format=torch.channels_last)
        network = partial(answer, model)
        if args.augment:
            teachers.append((on_device(split.images, device), network))
        else:
            name = f"teacher-{known['arch']}-{fingerprint(known['sha256'], split.fingerprint)}.npy"
            teachers.append(ask_once(network, split.images, Path(args.cache) / name, device))
        facts["teachers"].append(known["sha256"])
        facts["taught_by"].append(known["arch"] + stopped + unfinished(path, known))
        facts["seen_groups"] += known["seen_groups"]
    return teachers, facts


@torch.no_grad()
def answer(model, images):
    return forward(model, images)[0]


def make_optimizer(args, parameters):
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    # v <- momentum v + gradient; w <- w - lr v
    return torch.optim.SGD(parameters, args.lr, args.momentum, weight_decay=args.weight_decay,
                           fused=True)


def validate(args, learner, inputs, data, row):
    """All figures of the validation images, and those that the history keeps."""
    if not math.isfinite(row["loss"]):
        raise UserError(f"the loss is {row['loss']} in epoch {row['epoch']} at learning rate "
                        f"{row['lr']:.2g}. Lower --lr, or set --clip 1")
    logits, labels = predict(learner, inputs, args.device), data.val.labels
    if dist.is_initialized():  # BatchNorm's averages differ: all must agree on when to stop
        logits = logits.to(args.device)
        dist.broadcast(logits, 0)
    figures = metrics(logits.cpu(), labels, data.classes)
    kept = {f"val_{name}": mean(figures[name])
            for name in ("accuracy", "specificity", "sensitivity", "auc")}
    return figures, {"val_loss": label_loss(logits.cpu(), labels).item(), **kept}


def is_best(history, multilabel):
    """Whether the last epoch has the best validation accuracy (mean AUC with findings) so far. The
    validation loss decides ties, and where there is no AUC."""
    scores = [row["val_auc" if multilabel else "val_accuracy"] for row in history]
    quality = [(0 if math.isnan(score) else score, -row["val_loss"])
               for score, row in zip(scores, history, strict=True)]
    return all(quality[-1] > earlier for earlier in quality[:-1])


def finished(args, row):
    stopped = args.stop_at is not None and row["val_accuracy"] > args.stop_at
    return row["epoch"] >= args.epochs or stopped


# ---- what a run writes and says ------------------------------------------------------------------


def save_run(args, model, best, facts, history, optimizer):
    """best.pt, then last.pt: the other way round, a kill between them could lose the best epoch.

    Of a finished run, last.pt keeps the history alone: there is nothing to go on from.
    """
    out, done = Path(args.out), finished(args, history[-1])
    if best:
        models.save_checkpoint(out / "best.pt", best[0], **best[1])
    state = {} if done else {"optimizer": optimizer.state_dict()}
    models.save_checkpoint(out / "last.pt", model, weights=not done, history=history, **facts,
                           **state)


def resume(args, facts, model, optimizer):
    """The history so far: empty for a new run. Weights and optimiser are put back as they were."""
    path = Path(args.out) / "last.pt"
    if not path.exists():
        return []
    with explain(f"{path} is not a checkpoint of this project"):
        saved = models.read_weights(path)
        known, flags = saved["facts"], saved["facts"]["args"]
        if not models.run_file(args.out).exists():
            raise UserError(f"{path} is there and best.pt is not: delete it to train anew")
        now = {**model.facts, **facts}
        changed = [f"other {k}" for k in ("images", "teachers", "first_weights")
                   if known[k] != now[k]]
        if known["processes"] != facts["processes"]:
            changed.append(f"{known['processes']} processes (now {facts['processes']})")
        changed += [f"--{flag.replace('_', '-')} {flags.get(flag)} (now {value})"
                    for flag, value in vars(args).items()
                    if flag not in (*MACHINE, "teacher") and value != flags.get(flag)]
        if changed:
            raise UserError(f"{args.out} was begun with {', '.join(changed)}. Repeat that command, "
                            f"or choose another --out")
        if not finished(args, known["history"][-1]):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(known["optimizer"])
            for p, state in optimizer.state.items():  # torch does not check, and may crash later
                for value in state.values():
                    assert value.dim() == 0 or value.shape == p.shape, "optimiser of other shapes"
        return known["history"]


def open_folder(args, done):
    """Make the run's folder, so that an error comes before the first epoch; the TensorBoard."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()
    if args.tensorboard:
        with explain("--tensorboard needs its package: pip install tensorboard; or leave it out, "
                     "history.csv holds the same"):
            from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(args.out, purge_step=done + 1)


def write_history(args, history, board):
    write_csv(Path(args.out) / "history.csv", history[0], (row.values() for row in history))
    for name, value in history[-1].items() if board else ():
        group = "validation" if name.startswith("val_") else "training"  # two groups of curves
        board.add_scalar(f"{group}/{name.removeprefix('val_')}", value, len(history))


def describe_run(args, model, learner, data, history):
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, learner)]
    n = len(data.train.labels)
    labelled = (data.train.labels >= 0).view(n, -1).any(1).sum()
    some = f", {labelled} labelled" if labelled < n else ""
    some += f", {100 * args.wrong_labels:g} % of the labels wrong" if args.wrong_labels else ""
    positive = f"; positive: {data.classes[1]}"
    if len(data.classes) > 2:
        positive = "" if data.multilabel else f"; classes: {', '.join(data.classes)}"
    print(f"{args.role}: {args.arch} at {args.size} px, {sizes[0]:.1f} M parameters, "
          f"{sizes[1]:.1f} M learning; to {args.out}\n{args.data}: {n} training images{some}; "
          f"{len(data.val.labels)} validation images{positive}", flush=True)
    if history:
        done = history[-1]["epoch"]
        print(f"{args.out} is finished, epoch {done}: evaluate it, or choose another --out"
              if finished(args, history[-1]) else f"going on after epoch {done}", flush=True)


def describe_epoch(args, row):
    kd = f" (hard {row['hard']:.3f}, soft {row['soft']:.3f})" if args.teacher else ""
    return (f"epoch {row['epoch']:>2}/{args.epochs}  loss {row['loss']:.3f}{kd}  "
            f"val loss {row['val_loss']:.3f} acc {100 * row['val_accuracy']:.1f} "
            f"spec {100 * row['val_specificity']:.1f} sens {100 * row['val_sensitivity']:.1f}  "
            f"lr {row['lr']:.2g}  {row['seconds']:.1f} s")


def describe_end(args, history):
    best = {name: max(row[name] for row in history) for name in ("train_accuracy", "val_accuracy")}
    low = {name: min(row[name] for row in history) for name in ("loss", "val_loss")}
    spent = sum(row["seconds"] for row in history)
    print(f"best accuracy: train {100 * best['train_accuracy']:.1f}, validation "
          f"{100 * best['val_accuracy']:.1f}; lowest loss: train {low['loss']:.3f}, validation "
          f"{low['val_loss']:.3f}\n{spent:.0f} s of training; {args.out}/best.pt")
    then = f"evaluate.py {args.out}"
    if args.role == "teacher":
        then = f"train.py --role student --recipe {args.recipe}"
        then += "" if args.out == f"runs/{args.recipe}/teacher" else f" --teacher {args.out}"
        then += "" if args.data in ("phantoms", "findings") else f" --data {args.data}"
    print(f"next: python {then}")


# ---- the command line ----------------------------------------------------------------------------


def run_name(p, args):
    """The role, and whatever differs from the recipe: student-T10-seed2, teacher-resnet18."""
    name = args.role + (f"-T{args.T:g}" if args.role == "student" else "")
    for flag, value in vars(args).items():
        if flag not in (*MACHINE, "role", "data", "T") and value != p.get_default(flag):
            label = {"arch": "", "weights": "", "teacher": "of-"}.get(flag, flag.replace("_", ""))
            for each in value if isinstance(value, list) else [value]:
                name += f"-{label}" + ("" if each is True else Path(str(each)).name)
    return name


def get_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    count, amount, share = number(int, 1), number(float, 0), number(float, 0, 1)
    p = argparse.ArgumentParser(usage="python train.py --role ROLE [FLAGS]", description=__doc__,
                                formatter_class=Help, allow_abbrev=False)
    g = p.add_argument_group("what is trained")
    g.add_argument("--role", required=True, choices=["teacher", "baseline", "student"],
                   help="what to train")
    g.add_argument("--recipe", choices=RECIPES,
                   help="a set of defaults; demo, or pneumonia where --data is given")
    g.add_argument("--arch", default="alexnet", type=models.known_arch,
                   help="the network, any classifier of torchvision")
    g.add_argument("--weights", default="none", help="to start from: none (random), imagenet, FILE")
    g.add_argument("--finetune", default="all", choices=["all", "fc", "head"],
                   help="what learns: all layers, the fully connected ones, the new last one")
    g.add_argument("--out", help="the run's folder, by itself runs/RECIPE/NAME")

    g = p.add_argument_group("on which images")
    g.add_argument("--data", default="phantoms", help="a folder; or built in: phantoms, findings")
    g.add_argument("--size", type=number(int, 1, 9999), default=224,
                   help="side of an image in pixels")
    g.add_argument("--classes", type=int, choices=[2, 3], help="3: normal, bacterial, viral")
    g.add_argument("--per-class", type=number(int, 2),
                   help="a balanced subset, at most so many images of each class")
    g.add_argument("--labels-per-class", type=number(int, 0),
                   help="only so many images of each class keep their label")
    g.add_argument("--val-fraction", type=share, default=0.1, help="share of train that validates")
    g.add_argument("--uncertain", default="ignore", choices=["ignore", "zero", "one"],
                   help="what CheXpert's uncertain labels count as")
    g.add_argument("--wrong-labels", type=share, default=0.0,
                   help="share of the training labels to spoil")
    g.add_argument("--input", default="image", choices=["image", "residual"],
                   help="what networks read: the image, or its noise residuals")
    g.add_argument("--augment", action="store_true", help="rotate, zoom and shift, anew each epoch")

    g = p.add_argument_group("who teaches a student, and how")
    g.add_argument("--teacher", nargs="+", metavar="RUN", help="runs; without, runs/RECIPE/teacher")
    g.add_argument("--T", type=number(float, 1e-3), default=1.0, help="temperature, high is soft")
    g.add_argument("--alpha", type=share, default=0.9, help="0 = labels only, 1 = teacher only")

    g = p.add_argument_group("how does it learn")
    g.add_argument("--epochs", type=count, default=20, help="passes over the images")
    g.add_argument("--steps-per-epoch", type=count,
                   help="make an epoch so many batches, be that less or more than all images once")
    g.add_argument("--batch-size", type=number(int, 2), default=32, help="images a step")
    g.add_argument("--optimizer", default="sgd", choices=["sgd", "adam"], help="SGD or Adam")
    g.add_argument("--lr", type=amount, default=0.01, help="first learning rate")
    g.add_argument("--lr-step", type=count, default=7, help="epochs between decays")
    g.add_argument("--lr-gamma", type=amount, default=0.9, help="the rate times this at a decay")
    g.add_argument("--momentum", type=share, default=0.9, help="of SGD")
    g.add_argument("--weight-decay", type=amount, default=0.0, help="pull towards zero")
    g.add_argument("--clip", type=amount, default=0.0, help="largest gradient norm, 0: any")
    g.add_argument("--label-smoothing", type=share, default=0.0,
                   help="share of a label that is spread over all classes")
    g.add_argument("--stop-at", type=share, metavar="ACCURACY",
                   help="a defective teacher: end after the first epoch that validates better")

    g = p.add_argument_group("where does it run, and what is kept")
    g.add_argument("--seed", type=number(int, 0), default=0,
                   help="of weights, order, dropout and augmentation, not of splits")
    g.add_argument("--device", type=usable_device, help="cpu, cuda or cuda:N",
                   default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--no-amp", action="store_true", help="float32 on a GPU, not bfloat16")
    g.add_argument("--tensorboard", action="store_true", help="write the history there too")
    g.add_argument("--cache", default="cache", help="folder of tables; may be deleted")

    # Parsed twice: first for role and recipe, then with their defaults.
    asked = [word for word in argv if word not in ("-h", "--help")]
    first, _ = p.parse_known_args(["--role", "teacher", *asked])
    built_in = {"phantoms": "demo", "findings": "findings"}
    name = first.recipe or built_in.get(first.data, "pneumonia")
    p.set_defaults(**RECIPES[name][first.role], recipe=name)
    args = p.parse_args(argv)
    taught = [f for f in ("teacher", "T", "alpha") if getattr(args, f) != p.get_default(f)]
    if taught and args.role != "student":
        p.error(f"--{taught[0]} belongs to --role student; a {args.role} learns from labels alone")
    if args.stop_at is not None and args.role != "teacher":
        p.error("--stop-at makes a defective teacher: it belongs to --role teacher")
    if args.label_smoothing and args.role == "student":
        p.error("--label-smoothing is for a baseline or a teacher; a student has its teacher")
    if args.labels_per_class == 0 and (args.role != "student" or args.alpha == 0):
        p.error("--labels-per-class 0 leaves nothing to learn from but a teacher: use it with "
                "--role student and --alpha above 0")
    partly = args.arch in models.SE_RESNETS and args.weights == "imagenet"  # SE parts are random
    if args.finetune != "all" and (args.weights == "none" or partly):
        p.error(f"--finetune {args.finetune} with --weights {args.weights} would freeze random "
                f"weights; give --weights imagenet or a file that holds all, or --finetune all")
    args.out = args.out or f"runs/{name}/{run_name(p, args)}"
    if args.role == "student" and not args.teacher:
        args.teacher = [f"runs/{name}/teacher"]
    out = Path(args.out).resolve()
    if {out, out / "best.pt", out / "last.pt"} & {Path(t).resolve() for t in args.teacher or []}:
        p.error(f"a student cannot be its own teacher: --out is {args.out} and so is --teacher")
    return args


def main(argv=None):
    args = get_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The others wait while the first decodes: 100,000 images outlast torch's 10 minutes.
        with explain("WORLD_SIZE is set, and yet torchrun did not start this: unset it"):
            dist.init_process_group("nccl" if "cuda" in args.device else "gloo",
                                    timeout=timedelta(hours=6))
    rank, world = processes()
    if args.batch_size < 2 * world:
        raise UserError(f"--batch-size {args.batch_size} leaves {world} processes less than two "
                        f"images each, which BatchNorm needs. Raise it")
    if rank:  # one process tells and writes
        sys.stdout = open(os.devnull, "w")
    train(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)

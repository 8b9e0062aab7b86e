"""Train a teacher, a baseline, or a student distilled from a teacher: one loop for all three.

    python train.py --role teacher                 built-in phantoms, no download (recipe demo)
    python train.py --role baseline                the student's network on labels alone
    python train.py --role student --T 1           the same network, taught by runs/demo/teacher
    python train.py --role student --T 10 --data data/chest_xray       real X-rays, recipe pneumonia

A run is a folder, runs/RECIPE/NAME: best.pt (the best epoch on validation), history.csv, and
last.pt (to resume from; once finished it holds the history alone). A recipe is a set of defaults,
nothing more; any flag overrides it. Add --help to a command to see its defaults.

In this order: the loop; what feeds it; train(), a run from its images to its last epoch; what made
a run, saving and resuming; recipes and the command line.
"""

import argparse
import copy
import fcntl
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import models
from data import (PHANTOM_SOURCES, Help, UserError, cached_array, cli, existing_folder,
                  explain, fingerprint, load_as, mean, prepare, progress, random_affines)
from evaluate import metrics, origin, predict, usable_device, write_csv
from kd import MAX_T, distillation_loss, mean_teacher
from models import forward

SAVE_SECONDS = 20  # weights are saved no more often: AlexNet writes 0.7 GB each time

# ---- the loop ------------------------------------------------------------------------------------
def train_one_epoch(model, batches, optimizer, T=1.0, alpha=0.9, label_smoothing=0.0,
                    aux_weight=0.0, clip=0.0, amp=False, sums=None):
    """One pass over `batches`; returns the mean loss, its two parts, and the training accuracy.

    batches: any iterable of (x, y, teacher_logits): what the model reads, the labels, and the
    teacher's logits for the same images, or None. With None this is ordinary training: all that
    distillation adds to this loop stands in kd.distillation_loss.
    sums: six zeros on the device; the epoch's sums are added to them, for a progress line to read.
    """
    model.train()  # the teacher is not in here: models.load_run put it in eval mode
    sums = torch.zeros(6, device=next(model.parameters()).device) if sums is None else sums
    for x, y, teacher_logits in batches:
        # (B, 3, H, W) images or (B, ...) features; (B,) or (B, K) labels; (B, C) or (B, K) logits
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits, aux = forward(model, x)  # (B, C); auxiliary heads, mostly none
        loss, hard, soft = distillation_loss(logits, teacher_logits, y, T, alpha, label_smoothing)
        total = loss
        for aux_logits in aux:  # classifiers half-way up (InceptionV3, GoogLeNet) get the same loss
            total = total + aux_weight * distillation_loss(
                aux_logits, teacher_logits, y, T, alpha, label_smoothing)[0]
        optimizer.zero_grad()
        total.backward()  # under torchrun, this also averages the gradients over the processes
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        # Sums stay on the device: reading a number after every step would stall a GPU.
        labelled = y >= 0  # no label: -1 or NaN
        right = (logits.argmax(1) == y if y.dim() == 1 else (logits > 0) == (y > 0.5)) & labelled
        n = len(y)
        sums += torch.stack([loss * n, hard * n, soft * n, right.sum() * n / y.numel(),
                             labelled.sum() * n / y.numel(), torch.full_like(loss, n)]).detach()
    return epoch_figures(sums)

def epoch_figures(sums):
    """Means over images; the accuracy is that of the images with a label, NaN where they are under
    half: over the few labels of a student with hidden ones it would jump from 0 to 100."""
    loss, hard, soft, right, labelled = (sums[:-1] / sums[-1]).tolist()
    accuracy = right / labelled if labelled >= 0.5 else math.nan
    return {"loss": loss, "hard": hard, "soft": soft, "train_accuracy": accuracy}

# ---- what feeds it -------------------------------------------------------------------------------
class Table(NamedTuple):
    """Row i belongs to image i. The tensor holds images, or what a frozen network made of them,
    features or logits. With --augment that network cannot be asked beforehand: then the tensor
    holds the images, and the network is asked about the rows of every batch."""
    tensor: torch.Tensor  # (N, 1, H, W) uint8, or (N, ...) floats
    network: object = None

    def rows(self, rows, device, affines=None):
        x = prepare(self.tensor[rows.to(self.tensor.device)], device, affines)
        return x if self.network is None else self.network(x)

def paired_batches(inputs, labels, teachers, args, generator, device="cpu"):
    """Yield (x, y, teacher_logits) of the same rows, shuffled: image and teacher cannot slip apart.

    inputs: the Table that the trainable part reads; teachers: a list of Tables, empty for none.
    Random here are the order and, with --augment, how each image is moved: both by `generator`."""
    n, (rank, world) = len(labels), processes()
    affines = random_affines(n, generator).to(device) if args.augment else None
    batches = []
    while len(batches) < (args.steps_per_epoch or 1):  # one pass over the images, or several
        # On the device as a whole: to copy the rows of every batch there would make a GPU wait.
        one_pass = list(torch.randperm(n, generator=generator).to(device).split(args.batch_size))
        if len(one_pass) > 1 and len(one_pass[-1]) < 2 * world:  # BatchNorm needs two a process
            one_pass[-2:] = [torch.cat(one_pass[-2:])]
        batches += one_pass
    for batch in batches[: args.steps_per_epoch]:
        # Each of several processes takes its share; what does not divide is left out this epoch.
        rows = batch[rank : len(batch) // world * world : world]
        moved = None if affines is None else affines[rows]  # the same for student and teachers
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=use_amp(args)):
            x = inputs.rows(rows, device, moved)
            logits = [teacher.rows(rows, device, moved) for teacher in teachers]
        yield x, labels[rows], mean_teacher(logits, args.T, labels.dim() == 2) if teachers else None

def input_table(args, model, trainable, split, device, live=False):
    """What the trainable part reads: images; or, behind a frozen body, the features of each image.
    An epoch of the recipe pneumonia's student takes a ninth of the time from such a table.
    live: the images move (--augment), so the body is asked about every batch anew."""
    images = on_device(split.images, device)
    if trainable is model:
        return Table(images)
    table = Table(images, partial(models.features, model, trainable))
    if live:
        return table
    # All that decides a feature: the frozen weights are those of a file, never random.
    key = fingerprint(args.arch, args.size, args.finetune, model.facts["first_weights"],
                      models.reading_key(model), split.key)
    path = Path(args.cache) / f"features-{args.arch}-{key}.npy"
    return cached_outputs(table, path, device, torch.float16)  # VGG16: 25,088 an image

def load_teachers(args, data, device):
    """A Table of each teacher's logits, and the facts of each.

    A teacher sees the images at its own size. Without --augment its logits depend on neither epoch
    nor T nor seed: it is asked once, in float32. With --augment it is asked at every step, about
    images moved as the student's are. One that has learned from the student's validation or
    test patients is refused: its logits would carry their labels into training."""
    tables, taught_by = [], []
    for path in args.teacher or []:
        teacher, facts = models.load_run(path)
        models.refuse_foreign(path, facts, data)
        facts["state"] = models.state_of(path, facts)
        same = facts["made"]["train"] == data.fingerprints["train"]
        print(f"taught by {path}: {facts['arch']}{facts['state']}, epoch {facts['epoch']}, "
              f"validation accuracy {100 * mean(facts['validation']['accuracy']):.1f} %, from "
              f"{facts['args']['data']}{'' if same else ' (other images or labels)'}")
        split = data.train
        if facts["size"] != args.size:  # the same rows, at the teacher's size
            split = load_as(vars(args), facts["size"], ["train"], args.cache).train
        assert split.ids == data.train.ids
        teacher.to(device, memory_format=torch.channels_last)
        table = Table(on_device(split.images, device), partial(teacher_logits, teacher))
        if not args.augment:
            key = fingerprint(facts["sha256"], models.reading_key(teacher), split.key)
            path = Path(args.cache) / f"teacher-{facts['arch']}-{key}.npy"
            table = cached_outputs(table, path, device)
        tables.append(table)
        taught_by.append(facts)
    return tables, taught_by

@torch.no_grad()
def teacher_logits(teacher, images):
    return forward(teacher, images)[0]

def cached_outputs(table, path, device, dtype=torch.float32):
    """A Table of what table.network makes of each image, computed once and kept in a file."""
    outputs = cached_array(path, len(table.tensor), output_blocks(table, device, dtype))
    return Table(on_device(outputs, device))

@torch.no_grad()
def output_blocks(table, device, dtype):
    """Yield the outputs in blocks: those of a large data set do not fit into memory."""
    for rows in progress(torch.arange(len(table.tensor)).split(64), "asking the frozen network"):
        block = table.rows(rows, device).to("cpu", dtype)
        if not block.isfinite().all():
            raise UserError(f"a frozen network's outputs are not finite numbers in {dtype}: it "
                            f"diverged, or they are too large. Use another --teacher or --weights")
        yield block.numpy()

def on_device(tensor, device):
    """Moved to a GPU once, if it fits there: no batch then waits for the bus."""
    if device.type == "cuda" and tensor.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return tensor.to(device)
    return tensor

def use_amp(args):  # bfloat16 on a GPU; on most CPUs it is far slower than float32
    return torch.device(args.device).type == "cuda" and not args.no_amp

def processes():
    """rank, world: which one of torchrun's processes this is; 0 of 1 without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

# ---- a run, from its images to its last epoch ----------------------------------------------------
def train(args):
    device, (rank, world) = torch.device(args.device), processes()
    if rank:  # the first process decodes and asks the teachers; the others then find its tables
        dist.barrier()
    check_sources(args)  # before any image is decoded

    # 1. The images: a uint8 table, one row an image.
    data = load_as(vars(args), args.size, ["train", "val"], args.cache)
    labels = data.train.labels.to(device)

    # 2. The network, and the part of it whose weights change.
    model, trainable = make_network(args, data, device)
    optimizer = make_optimizer(args, trainable.parameters())
    inputs = input_table(args, model, trainable, data.train, device, live=args.augment)
    val_inputs = input_table(args, model, trainable, data.val, device).tensor

    # 3. The teachers: a table of logits each, row i for image i.
    teachers, taught_by = load_teachers(args, data, device)
    facts = run_facts(args, data, model, taught_by)
    if world > 1 and not rank:  # here the first process releases the others
        dist.barrier()

    # 4. Epochs. Each one reseeds from (seed, epoch), so a run can resume after any saved epoch.
    # Saved are best.pt, then last.pt (weights, optimiser, history), then history.csv: at the end,
    # and before it at most every 20 seconds. A kill costs the epochs since the last save, which are
    # made again with the same bits, and history.csv is written again from last.pt.
    history = resume(args, facts, model, optimizer)
    print(describe_run(args, model, trainable, data, len(history)), flush=True)
    parallel = torch.nn.parallel.DistributedDataParallel(trainable) if world > 1 else trainable
    best, saved = None, time.perf_counter()
    while not history or not finished(args, history[-1]):
        epoch, start = len(history) + 1, time.perf_counter()
        order = torch.Generator().manual_seed(seed_for(args.seed, epoch, "order, augmentation"))
        torch.manual_seed(seed_for(args.seed, epoch, "dropout", rank))
        lr = args.lr * args.lr_gamma ** ((epoch - 1) // args.lr_step)  # step decay
        optimizer.param_groups[0]["lr"] = lr
        batches = paired_batches(inputs, labels, teachers, args, order, device)
        row = run_epoch(args, epoch, parallel, batches, optimizer, len(labels))
        row = {"epoch": epoch, **row, "lr": lr, "seconds": round(time.perf_counter() - start, 2)}
        figures, validation = validate(args, trainable, val_inputs, data)
        history.append(row | validation)
        if better := is_best(history, data.multilabel):  # a copy: the model goes on learning
            best = copy.deepcopy(model), {**facts, "epoch": epoch, "validation": figures,
                                          "train_accuracy": row["train_accuracy"]}
        if finished(args, history[-1]) or time.perf_counter() - saved >= SAVE_SECONDS:
            save_run(args, model, best, facts, history, optimizer)
            best, saved = None, time.perf_counter()
        print(describe_epoch(args, history[-1]) + ("  best" if better else ""), flush=True)
    print(f"{args.out} is finished, epoch {len(history)}: python evaluate.py {args.out}")

def run_epoch(args, epoch, model, batches, optimizer, n):
    """train_one_epoch as the flags say, with a progress line; its figures over all processes."""
    sums = torch.zeros(6, device=args.device)
    n_steps = args.steps_per_epoch or math.ceil(n / args.batch_size)
    batches = progress(batches, f"epoch {epoch:>2}/{args.epochs}", n_steps, sums)
    row = train_one_epoch(model, batches, optimizer, T=args.T, alpha=args.alpha,
                          label_smoothing=args.label_smoothing, clip=args.clip, amp=use_amp(args),
                          aux_weight=models.AUX_WEIGHT.get(args.arch, 0.0), sums=sums)
    if dist.is_initialized():
        dist.all_reduce(sums)
        row = epoch_figures(sums)
    if not math.isfinite(row["loss"]):
        raise UserError(f"the loss is {row['loss']} in epoch {epoch} at learning rate "
                        f"{optimizer.param_groups[0]['lr']:.2g}. Lower --lr, or set --clip 1")
    return row

def check_sources(args):
    """What the run starts from must be there; ImageNet weights are fetched."""
    existing_folder(args.data)
    if args.weights == "imagenet":
        models.imagenet_weights(args.arch)
    paths = [args.weights, *(args.teacher or [])]
    for path in [path for path in paths if path not in ("none", "imagenet")]:
        models.existing_file(path)

def make_network(args, data, device):
    """The model, and the part of it whose weights change: saving the model saves both."""
    torch.manual_seed(args.seed)  # of the random weights
    model = models.build(args.arch, len(data.classes), args.size, args.weights, args.input)
    models.refuse_foreign(args.weights, model.facts, data)
    model.to(device, memory_format=torch.channels_last)
    trainable = models.freeze(model, args.finetune)
    if args.finetune != "all" and not model.facts["body_loaded"]:
        raise UserError(f"--finetune {args.finetune} would freeze random weights; give --weights "
                        f"imagenet or a file that holds all, or --finetune all")
    if args.finetune != "all" and not model.facts["from_run"]:
        models.initialise_anew(trainable)  # arXiv 2406.08837: all three layers of AlexNet's fc
    return model, trainable

def make_optimizer(args, parameters):
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    # v <- momentum v + gradient; w <- w - lr v
    return torch.optim.SGD(parameters, args.lr, args.momentum, weight_decay=args.weight_decay,
                           fused=True)

def seed_for(*what):
    """A seed for each thing that is random: order and dropout must not draw the same numbers."""
    return int(fingerprint(*what), 16)

def validate(args, trainable, inputs, data):
    """All figures of the validation images, and those that the history keeps."""
    logits, labels = predict(trainable, inputs, args.device), data.val.labels
    if dist.is_initialized():  # BatchNorm's averages differ: all must agree on when to stop
        logits = logits.to(args.device)
        dist.broadcast(logits, 0)
    logits = logits.cpu()
    figures = metrics(logits, labels, data.classes)
    loss, _, _ = distillation_loss(logits, None, labels, T=1, alpha=0)
    kept = ("accuracy", "specificity", "sensitivity", "auc")
    return figures, {"val_loss": loss.item(), **{f"val_{k}": mean(figures[k]) for k in kept}}

def is_best(history, multilabel):
    """Whether the last epoch has the best validation accuracy (mean AUC with findings) so far. The
    validation loss decides ties, and where there is no AUC."""
    score = "val_auc" if multilabel else "val_accuracy"
    quality = [(max(0, row[score]), -row["val_loss"]) for row in history]  # max: NaN becomes 0
    return all(quality[-1] > earlier for earlier in quality[:-1])

def finished(args, row):
    stop_at = math.inf if args.stop_at is None else args.stop_at
    return row["epoch"] >= args.epochs or row["val_accuracy"] > stop_at

# ---- what made a run, and saving and resuming it -------------------------------------------------
# Flags that no comparison of runs looks at. `made` tells of the first three in other words, another
# device rounds otherwise, as another processor does, and the last three change no figure.
NOT_COMPARED = ("teacher", "weights", "no_amp", "device", "out", "recipe", "cache")

def run_facts(args, data, model, taught_by):
    """What a checkpoint remembers beside its network: what made it, and whom it has seen.
    `made` is what runs are compared by: on resuming all of it, in a row of several seeds all but
    the seed, for a gain all but what distillation is (evaluate.without)."""
    place = args.data if args.data in PHANTOM_SOURCES else str(Path(args.data).resolve())
    flags = {k: v for k, v in vars(args).items() if k not in NOT_COMPARED} | {"data": place}
    made = {"flags": flags, "first_weights": model.facts["first_weights"], **data.fingerprints,
            "epoch_length": args.steps_per_epoch or len(data.train.ids),  # or steps would be a gain
            "processes": processes()[1], "precision": "bfloat16" if use_amp(args) else "float32",
            "teachers": [{k: t[k] for k in ("sha256", "state", "made")} for t in taught_by]}
    # Names of images too: PATIENT may have been changed between teacher and student.
    seen = {*data.train.groups, *data.train.ids, *model.facts["seen_groups"]}
    return {"args": vars(args), "classes": data.classes, "multilabel": data.multilabel,
            "made": made, "taught_by": [t["arch"] + t["state"] for t in taught_by],
            "seen_groups": sorted(seen.union(*(t["seen_groups"] for t in taught_by))),
            "provenance": origin(args.device)}

def save_run(args, model, best, facts, history, optimizer):
    """best.pt, then last.pt: the other way round, a kill between them could lose the best epoch.
    Of a finished run, last.pt keeps the history alone: there is nothing to go on from."""
    if processes()[0]:  # one process writes
        return
    out, done = Path(args.out), finished(args, history[-1])
    if best:
        for name in ("metrics.json", "predictions.csv"):  # they judged an earlier best.pt
            (out / name).unlink(missing_ok=True)
        models.save_checkpoint(out / "best.pt", best[0], **best[1])
    state = {} if done else {"optimizer": optimizer.state_dict()}
    models.save_checkpoint(out / "last.pt", model, not done, history=history, **facts, **state)
    write_csv(out / "history.csv", history[0], (row.values() for row in history))

def resume(args, facts, model, optimizer):
    """The history so far: empty for a new run. Weights and optimiser are put back as they were."""
    path = Path(args.out) / "last.pt"
    if not path.exists():
        return []
    if not path.with_name("best.pt").exists():
        raise UserError(f"{path} is there and best.pt is not: delete it to train anew")
    saved = models.read_weights(path)
    with explain(f"{path} is not a checkpoint of this project"):
        history = saved["facts"]["history"]
        before, now = ({**made, **made["flags"], "flags": None}
                       for made in (saved["facts"]["made"], facts["made"]))
        pairs = {name: (before.get(name), now.get(name)) for name in before | now}
        changed = [f"other {name}" if name in ("train", "val", "test") or len(f"{old}{new}") > 119
                   else f"{name} {old} (now {new})"
                   for name, (old, new) in pairs.items() if old != new]
        if changed:
            raise UserError(f"{args.out} was begun with {', '.join(changed)}. Repeat that command, "
                            f"choose another --out, or delete that folder")
        if not finished(args, history[-1]):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["facts"]["optimizer"])
            for p, state in optimizer.state.items():  # torch does not check, and may crash later
                for value in state.values():
                    assert value.dim() == 0 or value.shape == p.shape, "optimiser of other shapes"
    if not processes()[0]:  # a kill may have come between last.pt and this file
        write_csv(path.with_name("history.csv"), history[0], (row.values() for row in history))
    return history

@contextmanager
def locked(folder):
    """The run's folder, made if need be, and kept from any other command until this one ends."""
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another command trains in {folder}: wait, or choose an --out") from error
    try:
        for part in Path(folder).glob(".*.part"):  # of a process that was killed while it wrote
            part.unlink()
        yield
    finally:
        with suppress(OSError):
            os.rmdir(folder)  # if it is empty: a mistake leaves nothing behind
        os.close(handle)

def describe_run(args, model, trainable, data, done):
    total, learning = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, trainable))
    labelled = (data.train.labels >= 0).view(len(data.train.ids), -1).any(1).sum()
    wrong = f", {data.n_wrong} of them wrongly" if data.n_wrong else ""
    return (f"{args.role}: {args.arch} at {args.size} px, {total:.1f} M parameters, "
            f"{learning:.1f} M learning; to {args.out}\n"
            f"{args.data}: {len(data.train.ids)} training images, {labelled} labelled{wrong}; "
            f"{len(data.val.ids)} validation images"
            + (f"\ngoing on after epoch {done}" if done else ""))

def describe_epoch(args, row):
    parts = f" (hard {row['hard']:.3f}, soft {row['soft']:.3f})" if args.teacher else ""
    acc, spec, sens = (100 * row[f"val_{k}"] for k in ("accuracy", "specificity", "sensitivity"))
    return (f"epoch {row['epoch']:>2}/{args.epochs}  loss {row['loss']:.3f}{parts}  val loss "
            f"{row['val_loss']:.3f} acc {acc:.1f} spec {spec:.1f} sens {sens:.1f}  "
            f"lr {row['lr']:.2g}  {row['seconds']:.1f} s")

# ---- recipes and the command line ----------------------------------------------------------------
def recipe(both, teacher, student):
    return {"teacher": both | teacher, "baseline": both | student, "student": both | student}

RECIPES = {  # RECIPES[name][role]: flag -> value
    # Phantoms, a fifth of whose training labels are wrong, as labels read off reports are. The
    # student's network has 20 labels, and a teacher's logits for all 640 images.
    "demo": recipe(
        dict(data="phantoms", wrong_labels=0.2, clip=1.0, batch_size=16, lr_gamma=0.2),
        teacher=dict(arch="inception_v3", size=112, epochs=8, lr=0.02, lr_step=5),
        student=dict(arch="alexnet", size=80, labels_per_class=10, epochs=20, steps_per_epoch=10,
                     lr=0.03, lr_step=14)),
    # arXiv 2406.08837, the paper: sizes, decay and what the student learns. Its rates (5e-3, 2e-4)
    # come without a batch size, so rates, batches, epochs and a teacher that learns in all layers
    # were chosen on validation images. Without clip, T = 10 and more diverge.
    "pneumonia": recipe(
        dict(weights="imagenet", lr_step=7, lr_gamma=0.9, clip=1.0),
        teacher=dict(arch="inception_v3", size=299, epochs=6, lr=0.02),
        student=dict(arch="alexnet", size=224, finetune="fc", epochs=20, lr=0.01, batch_size=128)),
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
             clip=1.0), teacher=dict(arch="resnet18"), student=dict(arch="mnasnet1_0")),
}

LIMITS = dict(T=(1e-3, MAX_T), alpha=(0, 1), val_fraction=(0, 1), wrong_labels=(0, 1), lr=(0, 1e9),
              label_smoothing=(0, 1), stop_at=(0, 1), clip=(0, 1e9), batch_size=(2, 1e9),
              epochs=(1, 1e9), steps_per_epoch=(1, 1e9), lr_step=(1, 1e9), size=(1, 9999),
              per_class=(2, 1e9), labels_per_class=(0, 1e9), lr_gamma=(0, 1), weight_decay=(0, 1))

def get_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(usage="python train.py --role ROLE [FLAGS]", description=__doc__,
                                formatter_class=Help, allow_abbrev=False)
    add = p.add_argument_group("what is trained").add_argument
    add("--role", required=True, choices=RECIPES["demo"], help="what to train")
    add("--recipe", choices=RECIPES, help="defaults: demo, findings, or pneumonia for a folder")
    add("--arch", default="alexnet", help="a classifier of torchvision, or of models.NETWORKS")
    add("--weights", default="none", help="to start from: none (random), imagenet, FILE")
    add("--finetune", default="all", choices=["all", "fc", "head"],
        help="what learns: all layers, the fully connected ones, the new last one")
    add("--out", help="the run's folder, by itself runs/RECIPE/NAME")
    add = p.add_argument_group("on which images").add_argument
    add("--data", default="phantoms", help="a folder; or built in: phantoms, findings")
    add("--size", type=int, default=224, help="side of an image in pixels")
    add("--classes", type=int, choices=[2, 3], help="3: normal, bacterial, viral")
    add("--per-class", type=int, help="a balanced subset, at most so many images of each class")
    add("--labels-per-class", type=int, help="only so many images of each class keep their label")
    add("--val-fraction", type=float, default=0.1, help="share of train that validates")
    add("--wrong-labels", type=float, default=0.0, help="share of the training labels to spoil")
    add("--input", default="image", choices=["image", "residual"],
        help="what networks read: the image, or its noise residuals")
    add("--augment", action="store_true", help="rotate, zoom and shift, anew each epoch")
    add = p.add_argument_group("who teaches a student, and how").add_argument
    add("--teacher", nargs="+", metavar="RUN", help="runs; without, runs/RECIPE/teacher")
    add("--T", type=float, default=1.0, help="temperature, high is soft")
    add("--alpha", type=float, default=0.9, help="0 = labels only, 1 = teacher only")
    add = p.add_argument_group("how does it learn").add_argument
    add("--epochs", type=int, default=20, help="each one pass over the images, unless ...")
    add("--steps-per-epoch", type=int, help="... it is so many batches, be that less or more")
    add("--batch-size", type=int, default=32, help="images a step")
    add("--optimizer", default="sgd", choices=["sgd", "adam"], help="SGD or Adam")
    add("--lr", type=float, default=0.01, help="first learning rate")
    add("--lr-step", type=int, default=7, help="epochs between decays")
    add("--lr-gamma", type=float, default=0.9, help="the rate times this at a decay")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=0.0, help="pull towards zero")
    add("--clip", type=float, default=0.0, help="largest gradient norm, 0: any")
    add("--label-smoothing", type=float, default=0.0, help="share of a label given to all classes")
    add("--stop-at", type=float, metavar="ACCURACY",
        help="a defective teacher: end after the first epoch that validates better")
    add = p.add_argument_group("where does it run, and what is kept").add_argument
    add("--seed", type=int, default=0, help="of weights, order, dropout, --augment; not of data")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N")
    add("--no-amp", action="store_true", help="float32 on a GPU, not bfloat16")
    add("--cache", default="cache", help="folder of tables; may be deleted")

    # Parsed twice: first for role and recipe, then with their defaults.
    asked = [word for word in argv if word not in ("-h", "--help")]
    first, _ = p.parse_known_args(["--role", "teacher", *asked])
    name = first.recipe or {"phantoms": "demo", "findings": "findings"}.get(first.data, "pneumonia")
    p.set_defaults(**RECIPES[name][first.role], recipe=name)
    args = p.parse_args(argv)
    args.out = args.out or f"runs/{name}/{run_name(p, args)}"
    if args.role == "student" and not args.teacher:
        args.teacher = [f"runs/{name}/teacher"]
    check_flags(p, args)
    return args

def check_flags(p, args):
    for flag, (low, high) in LIMITS.items():
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:  # no NaN either
            p.error(f"--{flag.replace('_', '-')} is {value}, expected {low:g} to {high:g}")
    if args.teacher and args.role != "student":
        p.error(f"--teacher belongs to --role student; a {args.role} learns from labels alone")
    if Path(args.out).resolve() in {Path(t).resolve() for t in args.teacher or []}:
        p.error(f"a student cannot be its own teacher: --out is {args.out} and so is --teacher")

def run_name(p, args):
    """student-T10-seed2, teacher-resnet18. Runs that differ in other flags need an --out each."""
    name = args.role + (f"-T{args.T:g}" if args.role == "student" else "")
    name += f"-{args.arch}" if args.arch != p.get_default("arch") else ""
    return name + "".join(f"-{flag}{getattr(args, flag):g}" for flag in ("alpha", "seed")
                          if getattr(args, flag) != p.get_default(flag))

def main(argv=None):
    args = get_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The others wait while the first decodes: 100,000 images outlast torch's 10 minutes.
        dist.init_process_group("nccl" if "cuda" in args.device else "gloo",
                                timeout=timedelta(hours=6))
    if rank := processes()[0]:  # one process prints and writes
        sys.stdout = open(os.devnull, "w")
    with nullcontext() if rank else locked(args.out):
        train(args)
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    cli(main)

"""Train a teacher, a baseline or a student: one loop for all three.

    python train.py --role teacher             built-in phantoms, no download (recipe demo)
    python train.py --role baseline            the student's network, trained on labels only
    python train.py --role student --T 1       the same network, also on the teacher's logits
    python train.py --role student --T 10 --data data/chest_xray       real X-rays, recipe pneumonia

A run is a folder, runs/RECIPE/NAME, with history.csv and best.pt. best.pt holds the weights of the
best epoch (is_best). Until the run ends, it also holds the latest weights and the optimiser, from
which a repeated command resumes. Add --help to a command to see the defaults of its recipe.

train() comes first. The functions that it calls follow, grouped by topic.
"""

import argparse
import copy
import math
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import models
from data import Help, UserError, cli, existing_folder, explain, fingerprint, load_as, progress
from evaluate import (SEEDS, compared, differences, mean, metrics, origin, predict, usable_device,
                      write_csv)
from kd import check_settings, distillation_loss, mix_teachers
from models import forward

SAVE_SECONDS = 20  # at least, between saves before the final one. A save of AlexNet takes 0.7 GB

# ---- a run, from its images to its last epoch ----------------------------------------------------
# What is random? `seed` decides the first weights. `seed` and the epoch's number decide the order
# of the images, their augmentation and dropout (for dropout, also the process's rank). The rest is
# not random: validation patients, --per-class, --labels-per-class and --wrong-labels follow from
# hashes of names. Phantoms and their wrong labels come from fixed seeds, whatever `seed` is.
#
# What does a kill cost? Every epoch is seeded anew, so a run can resume after any saved epoch. An
# epoch is saved if it is the final one or 20 seconds have passed since a save. A kill loses the
# unsaved epochs. The repeated command computes them again, with the same bits on a CPU.
#
# Several processes (torchrun) all hold the same images and weights, and draw the same order and
# augmentation. Each process takes its share of every batch (paired_batches). In backward,
# DistributedDataParallel averages the gradients, so that all processes take the same step. Process
# 0 alone prints and writes. It decodes and precomputes before the others start, and its validation
# logits decide for all.
def train(args):
    device, (rank, world) = torch.device(args.device), processes()
    turn = dist.new_group(backend="gloo", timeout=timedelta(hours=6)) if world > 1 else None
    if rank:  # the others wait here until process 0 reaches the same barrier, after step 3
        dist.barrier(turn)

    # 1. The images: row i of data.train.images, .labels and .ids is the same image.
    data = load_as(vars(args), args.size, ["train", "val"], args.cache)
    labels = data.train.labels.to(device)

    # 2. The network, its trainable part, the optimiser, and what the trainable part reads.
    model, trainable = make_network(args, data, device)
    optimizer = make_optimizer(args, trainable.parameters())
    inputs = input_source(args, model, trainable, data.train, device, args.augment)
    val_inputs = input_source(args, model, trainable, data.val, device)

    # 3. The teachers' logits, and what best.pt keeps with the weights.
    teacher, teachers = load_teachers(args, data, device)
    facts = run_facts(args, data, model, teachers)
    if world > 1 and not rank:  # process 0 has filled the caches, so the others may start
        dist.barrier(turn)

    # 4. The epochs.
    history, best = resume(args, facts["config"], model, optimizer)
    print(describe_run(args, model, trainable, data, len(history)), flush=True)
    parallel = torch.nn.parallel.DistributedDataParallel(trainable) if world > 1 else trainable
    aux_weight = models.AUX_WEIGHT.get(args.arch, 0.0)  # few networks have auxiliary heads
    n_steps = args.steps_per_epoch or math.ceil(len(labels) / args.batch_size)
    saved_epoch, saved_at = len(history), time.perf_counter()
    while not ended(args, history):
        epoch, start = len(history) + 1, time.perf_counter()
        generator = torch.Generator().manual_seed(seed_for(args.seed, epoch, "order, augmentation"))
        torch.manual_seed(seed_for(args.seed, epoch, "dropout", rank))
        lr = args.lr * args.lr_gamma ** ((epoch - 1) // args.lr_step)  # step decay
        optimizer.param_groups[0]["lr"] = lr
        batches = paired_batches(inputs, labels, teacher, args.batch_size, generator,
                                 args.steps_per_epoch, args.augment)
        row = train_one_epoch(
            parallel, batches, optimizer, args.T, args.alpha, args.label_smoothing, aux_weight,
            args.clip, args.precision == "bfloat16", f"epoch {epoch}/{args.epochs}", n_steps)
        seconds = round(time.perf_counter() - start, 2)
        validation, columns = validate(trainable, val_inputs, data, device)
        history.append({"epoch": epoch, **row, "lr": lr, "seconds": seconds, **columns})
        if better := is_best(history, data.multilabel):
            best = copy.deepcopy(model), epoch, validation  # a copy, because training goes on
        if ended(args, history) or time.perf_counter() - saved_at >= SAVE_SECONDS:
            save_run(args, model, optimizer, history, best, facts, saved_epoch)
            saved_epoch, saved_at = epoch, time.perf_counter()
        print(describe_epoch(args, history[-1]) + ("  best" if better else ""), flush=True)
    print(f"{args.out} is finished after epoch {len(history)}. Next: python evaluate.py {args.out}")

def processes():
    """Return this process's rank and the number of processes: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

# ---- the network and what it reads ---------------------------------------------------------------
def make_network(args, data, device):
    """Return the model and its trainable part, which is a submodule or the model itself."""
    torch.manual_seed(args.seed)  # decides the random weights
    model = models.build(args.arch, len(data.classes), args.size, args.weights, args.input)
    models.refuse_foreign(args.weights, model.facts, data)
    model.to(device, memory_format=torch.channels_last)
    trainable = models.freeze(model, args.finetune)
    if args.finetune != "all" and not model.facts["body_loaded"]:
        raise UserError(f"--finetune {args.finetune} would freeze random weights; give --weights "
                        f"imagenet or a file with weights for all layers, or --finetune all")
    if args.finetune != "all" and not model.facts["from_run"]:
        for layer in trainable.modules():  # as in arXiv 2406.08837, these start from random weights
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()
    return model, trainable

def make_optimizer(args, parameters):
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    # v <- momentum v + gradient; w <- w - lr v
    return torch.optim.SGD(parameters, args.lr, args.momentum, weight_decay=args.weight_decay,
                           fused=True)

def input_source(args, model, trainable, split, device, augment=False):
    """Return a source of what the trainable part reads: a function from rows to a tensor.

    If the whole model is trained, it reads images. Otherwise the trainable part reads features,
    the outputs of the frozen part. Without --augment, features are the same in every epoch, so they
    are computed once. With --augment, the recipe pneumonia's student takes nine times as long."""
    if trainable is model:
        return models.from_images(split.images, device)
    body = partial(models.features, model, trainable)
    if augment:
        return models.from_images(split.images, device, body, args.precision == "bfloat16")
    return models.precompute(  # in float16, because VGG16 has 25,088 features per image
        models.from_images(split.images, device, body), len(split.ids), device, torch.float16,
        Path(args.cache, f"features-{args.arch}"), split.key, args.finetune,
        args.input, model.facts["first_weights"])  # a hash of the loaded weights

# ---- the teachers --------------------------------------------------------------------------------
def load_teachers(args, data, device):
    """Return a source of teacher logits, or None without a teacher, and the facts of each teacher.

    A teacher sees the same images in the same order, at its own size, so that row i of its logits
    belongs to image i. Without --augment, its logits depend on neither epoch nor T nor seed: they
    are computed once, in float32. With --augment, the teacher is run at every step, on images that
    are augmented as the student's are. If there are several teachers, their softened probabilities
    are averaged. A teacher that was trained on the student's validation or test patients is
    refused, because its logits would leak their labels into training."""
    sources, teachers = [], []
    for path in args.teacher or []:
        teacher, facts = models.load_run(path)
        models.refuse_foreign(path, facts, data)
        images = data.train
        if facts["size"] != args.size:
            images = load_as(vars(args), facts["size"], ["train"], args.cache).train
        if images.ids != data.train.ids:
            raise UserError(f"the images of {args.data} changed while they were read: start again")
        facts["weights_hash"] = models.weights_hash(teacher.state_dict())
        teacher.to(device, memory_format=torch.channels_last)
        logits = partial(teacher_logits, teacher)
        if args.augment:
            source = models.from_images(images.images, device, logits, args.precision == "bfloat16")
        else:
            source = models.precompute(
                models.from_images(images.images, device, logits), len(images.ids), device,
                torch.float32, Path(args.cache, f"teacher-{facts['arch']}"), images.key,
                facts["weights_hash"])
        sources.append(source)
        teachers.append(facts)
        accuracy = 100 * mean(facts["validation"]["accuracy"])
        print(f"teacher {path}: {facts['arch']}{models.state_of(facts)}, epoch {facts['epoch']}, "
              f"validation accuracy {accuracy:.1f} %, trained on {facts['config']['data']}")
    if not sources:
        return None, teachers

    def mixed_logits(rows, affines=None):
        logits = [source(rows, affines) for source in sources]  # each (B, C)
        return mix_teachers(logits, args.T, data.multilabel)

    return mixed_logits, teachers

def teacher_logits(teacher, images):
    return forward(teacher, images)[0]

def run_facts(args, data, model, teachers):
    """Return what best.pt keeps with weights and epochs. `config` is one flat dict of everything
    that decides the result: flags, and hashes of the contents of their paths."""
    config = {
        **vars(args), **data.fingerprints, "first_weights": model.facts["first_weights"],
        "epoch_length": args.steps_per_epoch or len(data.train.ids),  # must be equal for a gain
        "processes": processes()[1],
        "taught_by": [t["arch"] + models.state_of(t) for t in teachers],
        "teacher_weights": [t["weights_hash"] for t in teachers],
        "teacher_configs": [fingerprint(compared(t["config"], SEEDS)) for t in teachers]}
    # Names of images are kept too, because a change of PATIENT in data.py would rename patients.
    seen = {*data.train.groups, *data.train.ids, *model.facts["seen_groups"]}
    return {"config": config, "classes": data.classes, "multilabel": data.multilabel,
            "seen_groups": sorted(seen.union(*(t["seen_groups"] for t in teachers))),
            "provenance": origin(args.device)}

# ---- batches and the loop ------------------------------------------------------------------------
def seed_for(*use):
    """Return a seed for each use, so that order and dropout do not draw the same numbers."""
    return int(fingerprint(*use), 16)

def paired_batches(inputs, labels, teacher, batch_size, generator, steps=None, augment=False):
    """Yield (x, y, teacher_logits) for the same rows, so each image is paired with its own logits.

    inputs, teacher: sources, functions (rows, affines) -> tensor. Without a teacher, it is None.
    generator: decides the order of the images and, with `augment`, the transform of each image, the
    same for student and teacher. steps: the number of batches, by default those of one pass."""
    rank, world = processes()
    batches = []
    while len(batches) < (steps or 1):
        # The whole order is moved to the device at once: a copy per batch would stall a GPU.
        one_pass = torch.randperm(len(labels), generator=generator).to(labels.device)
        one_pass = list(one_pass.split(batch_size))
        if len(one_pass) > 1 and len(one_pass[-1]) < 2 * world:  # BatchNorm needs two per process
            one_pass[-2:] = [torch.cat(one_pass[-2:])]
        batches += one_pass
    for batch in batches[:steps]:
        # All processes draw the same batches, and each takes its share. A remainder is left out.
        share = slice(rank, len(batch) // world * world, world)
        rows, affines = batch[share], None
        if augment:
            affines = random_affines(len(batch), generator)[share].to(labels.device)
        yield inputs(rows, affines), labels[rows], teacher and teacher(rows, affines)

def random_affines(n, generator):
    """Return (n, 2, 3), a small rotation, zoom and shift per image. A flip would move the heart."""
    angle, zoom, across, down = torch.rand(4, n, generator=generator) * 2 - 1
    angle, zoom = 0.12 * angle, 1 + 0.08 * zoom  # 7 degrees, 8 percent
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    return torch.stack([cos, -sin, 0.06 * across, sin, cos, 0.06 * down], dim=1).view(n, 2, 3)

def train_one_epoch(model, batches, optimizer, T=1.0, alpha=0.9, label_smoothing=0.0,
                    aux_weight=0.0, clip=0.0, amp=False, title="", n_steps=None):
    """Train on `batches`. Return the mean loss, its two parts, and the training accuracy.

    batches: any iterable of (x, y, teacher_logits): what the model reads, the labels, and the
    teacher's logits for the same images, or None. With None this is ordinary training: everything
    that distillation adds to this loop is in kd.distillation_loss.
    title: with it, a progress line shows how many of about n_steps batches are done."""
    model.train()  # the trainable part. models.freeze put the frozen part in eval mode
    sums = torch.zeros(6, device=next(model.parameters()).device)
    for x, y, teacher_logits in progress(batches, title, n_steps) if title else batches:
        # x: images (B, 3, H, W) or features (B, ...). y: (B,) or (B, K). Logits: (B, C) or (B, K)
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
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, hard, soft, right, labelled = (sums[:-1] / sums[-1]).tolist()
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} in {title} at learning rate "
                        f"{optimizer.param_groups[0]['lr']:.2g}. Lower --lr, or set --clip 1")
    # Accuracy on few labels would jump between 0 and 100 %. Below half a label per image it is NaN.
    accuracy = right / labelled if labelled >= 0.5 else math.nan
    return {"loss": loss, "hard": hard, "soft": soft, "train_accuracy": accuracy}

# ---- validation ----------------------------------------------------------------------------------
def validate(trainable, inputs, data, device):
    """Return all validation metrics, and those that are columns of the history."""
    labels = data.val.labels
    logits = predict(trainable, inputs, len(labels), device)
    if dist.is_initialized():  # each has its own BatchNorm averages, but all must stop together
        logits = logits.to(device)
        dist.broadcast(logits, 0)
        logits = logits.cpu()
    figures = metrics(logits, labels)
    loss, _, _ = distillation_loss(logits, None, labels, T=1, alpha=0)
    kept = ("accuracy", "specificity", "sensitivity", "auc")
    return figures, {"val_loss": loss.item(), **{f"val_{k}": mean(figures[k]) for k in kept}}

def is_best(history, multilabel):
    """Return whether the last epoch has the best validation accuracy so far (for findings, the best
    mean AUC). The validation loss breaks ties and stands in for a missing AUC."""
    score = "val_auc" if multilabel else "val_accuracy"
    quality = [(0 if math.isnan(row[score]) else row[score], -row["val_loss"]) for row in history]
    return all(quality[-1] > earlier for earlier in quality[:-1])

def ended(args, history):
    """Return whether all epochs are done, or the validation accuracy has passed --stop-at."""
    stop_at = math.inf if args.stop_at is None else args.stop_at
    return len(history) >= args.epochs or bool(history) and history[-1]["val_accuracy"] > stop_at

# ---- saving and resuming -------------------------------------------------------------------------
def save_run(args, model, optimizer, history, best, facts, saved_epoch):
    """Write best.pt in one atomic step, then history.csv, its history as text. best: a copy of the
    model, its epoch and its validation metrics. saved_epoch: the last epoch of the save before."""
    if processes()[0]:  # only process 0 writes
        return
    best_model, epoch, validation = best
    out, last = Path(args.out), None
    if not ended(args, history):  # `last` is what the run resumes from
        last = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if epoch > saved_epoch:
        for path in [*out.glob("metrics*.json"), *out.glob("predictions*.csv")]:
            path.unlink()  # metrics and predictions of an earlier best epoch
    models.save_checkpoint(out / "best.pt", best_model, **facts, history=history, last=last,
                           epoch=epoch, validation=validation,
                           train_accuracy=history[epoch - 1]["train_accuracy"])
    write_csv(out / "history.csv", history[0], (row.values() for row in history))

def resume(args, config, model, optimizer):
    """Restore weights and optimiser. Return the history, and `best` as save_run takes it."""
    path, history, best = Path(args.out) / "best.pt", [], None
    if not processes()[0]:  # the others could delete a file that process 0 is writing
        for part in path.parent.glob(".*.part"):  # of a process that was killed while it wrote
            part.unlink(missing_ok=True)
    if path.exists():
        best_model, facts = models.load_run(path)
        changed = [f"{name} {old} (now {new})" if len(f"{old}{new}") < 30 else f"another {name}"
                   for name, (old, new) in differences(facts["config"], config).items()]
        if changed:
            raise UserError(f"{args.out} was begun with {', '.join(changed)}. Repeat that command, "
                            f"choose another --out, or delete that folder")
        with explain(f"{path} is damaged. Delete it to train anew"):
            history, last = facts["history"], facts["last"]
            rows = [[*row.values()] for row in history]
            best = best_model, facts["epoch"], facts["validation"]
            if last is not None:
                model.load_state_dict(last["model"])
                optimizer.load_state_dict(last["optimizer"])
                for p, state in optimizer.state.items():  # torch does not check their shapes
                    if any(value.dim() and value.shape != p.shape for value in state.values()):
                        raise ValueError("the optimiser's state has other shapes")
        if not processes()[0]:  # a kill may have come between best.pt and this file
            write_csv(path.with_name("history.csv"), history[0], rows)
        here, there = origin(args.device)["commit"], facts["provenance"]["commit"]
        if last is not None and here != there:
            print(f"resuming a run of commit {there} with the code of commit {here}")
    if dist.is_initialized():
        found = [None] * processes()[1]
        dist.all_gather_object(found, len(history))
        if len({*found}) > 1:
            raise UserError(f"the processes found {found} epochs in {args.out}: machines must "
                            f"share --out, or start with an empty one")
    return history, best

def describe_run(args, model, trainable, data, done):
    total, part = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, trainable))
    labelled = (data.train.labels >= 0).view(len(data.train.ids), -1).any(1).sum()
    wrong = f" ({data.n_wrong} of them wrong)" if data.n_wrong else ""
    return (f"{args.role}: {args.arch} at {args.size} px, {total:.1f} M parameters, {part:.1f} M "
            f"trained; writes to {args.out}\n{args.data}: {len(data.train.ids)} training images, "
            f"{labelled} labelled{wrong}; {len(data.val.ids)} validation images"
            + (f"\nresuming after epoch {done}" if done else ""))

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
    # Phantoms. A fifth of the training labels are wrong, as labels taken from reports often are.
    # Baseline and student have 20 labels. The student also has teacher logits for all 640 images.
    "demo": recipe(
        dict(data="phantoms", wrong_labels=0.2, clip=1.0, batch_size=16, lr_gamma=0.2),
        teacher=dict(arch="inception_v3", size=112, epochs=6, lr=0.02, lr_step=4),
        student=dict(arch="shufflenet_v2_x0_5", size=80, labels_per_class=10, epochs=20,
                     steps_per_epoch=20, lr=0.1, lr_step=14)),
    # The paper, arXiv 2406.08837: image sizes, decay, trainable part of the student. The rest was
    # chosen on validation images. Without clip, students diverge at T >= 10.
    "pneumonia": recipe(
        dict(weights="imagenet", lr_step=7, lr_gamma=0.9, clip=1.0),
        teacher=dict(arch="inception_v3", size=299, epochs=6, lr=0.02),
        student=dict(arch="alexnet", size=224, finetune="fc", epochs=20, lr=0.01, batch_size=128)),
    # A course report (National Tsing Hua University, 2023). --finetune head is its fixed features.
    # Of its 1000 images per class, 200 are for validation. Epochs and learning rate are ours.
    "course": recipe(
        dict(weights="imagenet", per_class=1000, val_fraction=0.2, epochs=25, lr=1e-3,
             lr_gamma=0.1),
        teacher=dict(arch="googlenet"), student=dict(arch="alexnet")),
    # A dissertation (MSc, 2021) after arXiv 1909.11723: 2201 + 250 images per class. T is ours.
    "mura": recipe(
        dict(weights="imagenet", per_class=2451, val_fraction=0.102, optimizer="adam", lr=1e-4,
             lr_gamma=1.0, batch_size=16, epochs=20, T=4.0),
        teacher=dict(arch="seresnet50"), student=dict(arch="resnet18")),
    # arXiv 2305.06244: several findings per image. mnasnet1_0 stands in for its EEEA-Net-C2.
    "multilabel": recipe(
        dict(weights="imagenet", epochs=10, lr_step=4, lr_gamma=0.1, clip=1.0, T=4.0),
        teacher=dict(arch="densenet161"), student=dict(arch="mnasnet1_0")),
    # A miniature of it: phantoms with three findings, random weights.
    "findings": recipe(
        dict(data="findings", size=96, epochs=10, batch_size=16, lr=0.05, lr_step=7, lr_gamma=0.2,
             clip=1.0), teacher=dict(arch="resnet18"), student=dict(arch="mnasnet1_0")),
}

LIMITS = dict(val_fraction=(0, 1), wrong_labels=(0, 1), lr=(0, 1e9), label_smoothing=(0, 1),
              stop_at=(0, 1), clip=(0, 1e9), epochs=(1, 1e9), lr_step=(1, 1e9), lr_gamma=(0, 1),
              steps_per_epoch=(1, 1e9), size=(1, 9999), per_class=(2, 1e9), momentum=(0, 1),
              labels_per_class=(0, 1e9), weight_decay=(0, 1), seed=(0, 2**32))

def get_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(usage="python train.py --role ROLE [FLAGS]", description=__doc__,
                                formatter_class=Help, allow_abbrev=False)
    add = p.add_argument_group("network").add_argument
    add("--role", required=True, choices=RECIPES["demo"], help="what to train")
    add("--recipe", choices=RECIPES, help="by default the one that suits --data")
    add("--arch", default="alexnet", help="a classifier of torchvision, or of models.NETWORKS")
    add("--weights", default="none", help="first weights: none (random), imagenet, or a FILE")
    add("--finetune", default="all", choices=["all", "fc", "head"],
        help="trainable part: all layers, the fully connected ones, or the new last one")
    add("--out", help="the run folder, by default runs/RECIPE/NAME")
    add = p.add_argument_group("images and labels").add_argument
    add("--data", default="phantoms", help="a folder, or built-in images: phantoms, findings")
    add("--size", type=int, default=224, help="side of the images in pixels")
    add("--classes", type=int, choices=[2, 3], help="3: normal, bacterial, viral")
    add("--per-class", type=int, help="use at most this many images of each class")
    add("--labels-per-class", type=int, help="keep the labels of this many images of each class")
    add("--val-fraction", type=float, default=0.1, help="share of train for validation")
    add("--wrong-labels", type=float, default=0.0, help="share of training labels to make wrong")
    add("--input", default="image", choices=["image", "residual"],
        help="what networks read: the image, or its noise residuals")
    add("--augment", action="store_true", help="rotate, zoom and shift, anew in every batch")
    add = p.add_argument_group("distillation").add_argument
    add("--teacher", nargs="+", metavar="RUN", help="run folders, by default runs/RECIPE/teacher")
    add("--T", type=float, default=1.0, help="temperature: higher is softer")
    add("--alpha", type=float, default=0.9, help="0 = labels only, 1 = teacher only")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=20, help="passes over the images, but see --steps-per-epoch")
    add("--steps-per-epoch", type=int, help="let an epoch be this many batches instead of a pass")
    add("--batch-size", type=int, default=32, help="images per step")
    add("--optimizer", default="sgd", choices=["sgd", "adam"], help="SGD or Adam")
    add("--lr", type=float, default=0.01, help="first learning rate")
    add("--lr-step", type=int, default=7, help="epochs between decays")
    add("--lr-gamma", type=float, default=0.9, help="factor of the learning rate at a decay")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=0.0, help="pulls weights towards zero")
    add("--clip", type=float, default=0.0, help="largest gradient norm, 0 for none")
    add("--label-smoothing", type=float, default=0.0, help="share of a label given to all classes")
    add("--stop-at", type=float, metavar="ACCURACY",
        help="make a defective teacher: stop once validation accuracy is above this, 0 to 1")
    add = p.add_argument_group("where and how it runs").add_argument
    add("--seed", type=int, default=0, help="of weights, order, dropout, --augment; not of data")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N")
    add("--precision", choices=["float32", "bfloat16"],
        help="by default bfloat16 on a GPU and float32 on a CPU")
    add("--cache", default="cache", help="decoded images, features and logits; may be deleted")

    # The flags are parsed twice: first for role and recipe, then with the recipe's defaults.
    asked = [word for word in argv if word not in ("-h", "--help")]
    first, _ = p.parse_known_args(["--role", "teacher", *asked])
    name = first.recipe or {"phantoms": "demo", "findings": "findings"}.get(first.data, "pneumonia")
    p.set_defaults(**RECIPES[name][first.role], recipe=name)
    args = p.parse_args(argv)
    args.precision = args.precision or ("bfloat16" if "cuda" in args.device else "float32")
    args.out = args.out or f"runs/{name}/{run_name(p, args)}"
    if args.role == "student" and not args.teacher:
        args.teacher = [f"runs/{name}/teacher"]
    check_flags(p, args)
    return args

def check_flags(p, args):
    try:
        check_settings(args.T, args.alpha)
    except ValueError as error:
        p.error(str(error))
    for flag, (low, high) in LIMITS.items():
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:  # also rejects NaN
            p.error(f"--{flag.replace('_', '-')} is {value}, expected {low:g} to {high:g}")
    if args.batch_size < (least := 2 * int(os.environ.get("WORLD_SIZE", 1))):  # set by torchrun
        p.error(f"--batch-size is {args.batch_size}, expected {least} or more (2 per process)")
    if args.teacher and args.role != "student":
        p.error(f"--teacher belongs to --role student; a {args.role} is trained on labels only")
    if Path(args.out).resolve() in {Path(t).resolve() for t in args.teacher or []}:
        p.error(f"a student cannot be its own teacher: --out is {args.out} and so is --teacher")

def run_name(p, args):
    """Return a name such as student-T10-seed2 or teacher-resnet18. Other flags are not in it."""
    name = args.role + (f"-T{args.T:g}" if args.role == "student" else "")
    name += f"-{args.arch}" if args.arch != p.get_default("arch") else ""
    return name + "".join(f"-{flag}{getattr(args, flag):g}" for flag in ("alpha", "seed")
                          if getattr(args, flag) != p.get_default(flag))

def main(argv=None):
    args = get_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if "cuda" in args.device else "gloo",
                                timeout=timedelta(minutes=10))  # for a process that hangs
    if processes()[0]:  # only process 0 prints and writes
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    # Missing files and an impossible --out are reported before any image is decoded.
    existing_folder(args.data)
    for path in [args.weights, *(args.teacher or [])]:
        if path not in ("none", "imagenet"):
            models.existing_file(path)
    os.makedirs(args.out, exist_ok=True)
    try:
        train(args)
    finally:
        if not processes()[0]:  # the others may end before process 0 has saved
            with suppress(OSError):
                os.rmdir(args.out)  # only if it is empty: a mistake leaves nothing behind
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    cli(main)

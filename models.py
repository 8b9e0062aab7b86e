"""Networks and checkpoints: torchvision's classifiers with a new head, frozen in part, and saved.

    model = build("alexnet", num_classes=2, size=224, weights="imagenet")
    logits, aux = forward(model, images)         aux: auxiliary heads' logits, a list, mostly empty
    trainable = freeze(model, "fc")              the part whose weights change; the rest is frozen
    save_checkpoint(path, model, **facts)        and back: model, facts = load_checkpoint(path)

In this order: a network with a new head, and what of it learns; checkpoints; first weights from
elsewhere; SE-ResNets, noise residuals and cost; Grad-CAM.
"""

import hashlib
import io
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import SqueezeExcitation

from data import MEAN, STD, UserError, atomic, explain, fingerprint, mean, prepare

# torchvision unpickles the weights that it fetches, which runs whatever code a planted file holds.
# With this switch torch.load reads plain tensors alone, whoever calls it.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

FORMAT = 4  # of a checkpoint: raise it when its facts change, so that old ones are refused

# Auxiliary heads (more classifiers half-way up, for training only) are left out for small images:
# InceptionV3's 5x5 window does not fit below 299 pixels; GoogLeNet's pool to 4x4 at 1/16.
AUX_MIN_SIZE = {"inception_v3": 299, "googlenet": 64}
AUX_WEIGHT = {"inception_v3": 0.4, "googlenet": 0.3}  # in the loss, from the networks' own papers
AUX_NAMES = ("AuxLogits", "aux1", "aux2")  # with which the names of their layers begin

# ---- a network with a new head -------------------------------------------------------------------
def build(arch, num_classes, size=None, weights="none", reads="image"):
    """A network with a new, randomly initialised head of `num_classes` outputs.
    weights: "none" (random), "imagenet" (torchvision's) or a file: a checkpoint of ours or a plain
    state_dict of the same network. size: the images' side in pixels, refused if it is impossible.
    reads: the image, or its noise residuals ("residual")."""
    aux = arch in AUX_MIN_SIZE and (size is None or size >= AUX_MIN_SIZE[arch])
    model = bare_network(arch, aux)
    replace_heads(model, num_classes)
    model.transform_input = False
    model.facts = {"arch": arch, "num_classes": num_classes, "size": size, "aux": aux,
                   "input": reads, "first_weights": None, "from_run": False, "body_loaded": False,
                   "seen_groups": []}  # the patients that its weights have learned from
    if weights != "none":
        load_first_weights(model, weights)
    model.facts["transform_input"] = model.transform_input
    if size is not None:
        why = f"{arch} cannot take images of {size} x {size} pixels; choose another --size"
        with torch.no_grad(), explain(why):
            model.eval()(torch.zeros(1, 3, size, size))
    return model.train()

def bare_network(arch, aux):
    """The network as its authors made it: 1000 outputs, random weights."""
    if arch in NETWORKS:
        return NETWORKS[arch]()
    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"no network is called {arch}: see torchvision's, or models.NETWORKS")
    # init_weights=False: torchvision's own initialisation of these two takes seconds, and they
    # learned far more slowly with it than with torch's default, at the same learning rate.
    options = {"aux_logits": aux, "init_weights": False} if arch in AUX_MIN_SIZE else {}
    model = torchvision.models.get_model(arch, weights=None, **options)
    for layer in model.modules() if arch.startswith("mnasnet") else []:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1  # its 0.0003, meant for ImageNet's long epochs, hardly moves here
    return model

def replace_heads(model, num_classes):
    """Exchange the layers with 1000 outputs: the auxiliary heads, and last the classifier, which
    torchvision calls fc, classifier.6 or heads.head; SqueezeNet's is a 1x1 convolution."""
    model.head_names = [name for name, layer in model.named_modules()
                        if isinstance(layer, (nn.Linear, nn.Conv2d)) and len(layer.weight) == 1000]
    if not model.head_names:
        raise UserError(f"{type(model).__name__} has no layer of 1000 outputs: build it with one")
    for name in model.head_names:
        old = model.get_submodule(name)
        new = (nn.Linear(old.in_features, num_classes) if isinstance(old, nn.Linear)
               else nn.Conv2d(old.in_channels, num_classes, old.kernel_size))
        model.set_submodule(name, new)

def forward(model, images):
    """logits (B, C), and a list of the auxiliary heads' logits (empty in eval mode, and mostly)."""
    out = model(as_read(model, images))
    if isinstance(out, torch.Tensor):
        return out.flatten(1), []  # flatten: SqueezeNet ends in 1x1 maps
    return out[0], list(out[1:])

def freeze(model, finetune):
    """Returns the trainable part, a submodule of the model: "all" of it, the "fc" block around the
    head (three layers in AlexNet and VGG, the head itself in most), or the new "head" alone. The
    rest is put in eval mode: even without gradients BatchNorm would move its averages."""
    if finetune == "all":
        return model
    head = model.get_submodule(model.head_names[-1])
    block = model.get_submodule(model.head_names[-1].split(".")[0])
    # In SqueezeNet pooling follows the head: then the block is what learns, also with "head".
    takes_block = isinstance(block, nn.Sequential) and (finetune == "fc" or block[-1] is not head)
    model.requires_grad_(False).eval()
    return (block if takes_block else head).requires_grad_(True)

def initialise_anew(trainable):
    """Random weights for the fully connected layers, as arXiv 2406.08837 has it in AlexNet."""
    for layer in trainable.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()

@torch.no_grad()
def features(model, trainable, images):
    """The input of the trainable part when the model reads the images."""
    caught = []
    with trainable.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0])):
        forward(model, images)  # the trainable part runs too: little beside the rest
    return caught[0]

# ---- checkpoints ---------------------------------------------------------------------------------
# What train.py adds to a network's own facts, and the flags that evaluate.py reads.
RUN_FACTS = {"args", "classes", "multilabel", "made", "seen_groups", "provenance", "taught_by",
             "epoch", "train_accuracy", "validation", "size"}
RUN_FLAGS = {"role", "arch", "data", "T", "alpha", "seed", "epochs", "stop_at", "label_smoothing",
             "per_class", "labels_per_class", "classes", "val_fraction", "wrong_labels"}

def save_checkpoint(path, model, weights=True, **facts):
    """Weights, and whatever is needed to rebuild the network and to judge it: plain values only."""
    content = {"format": FORMAT, "model": model.state_dict() if weights else {},
               "facts": {**model.facts, **facts}}
    with (explain(f"{path} could not be written; make room, and repeat the command"),
          atomic(path) as temporary, open(temporary, "wb") as file):
        torch.save(content, file)  # given a name, it would write that name into the file

def load_checkpoint(path):
    """model, facts: the network rebuilt from its own facts, in eval mode and without gradients."""
    content = read_weights(path)
    with explain(f"{path} is not a checkpoint of this project"):
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, this code reads {FORMAT}. "
                            f"Train it again, or use the code that wrote it")
        facts = {**content["facts"], "sha256": content["sha256"]}
        model = bare_network(facts["arch"], facts["aux"])
        replace_heads(model, facts["num_classes"])
        model.transform_input = facts["transform_input"]
        model.load_state_dict(content["model"])
        model.facts = facts
    return model.eval().requires_grad_(False), facts

def load_run(path):
    """The same for a checkpoint that train.py made, with all that its users read."""
    model, facts = load_checkpoint(path)
    told = {name for name, value in facts.items() if value is not None}
    missing = RUN_FACTS - told | RUN_FLAGS - {*(facts.get("args") or ())}
    if missing:
        raise UserError(f"{path} was not made by train.py: {', '.join(sorted(missing))} is missing")
    return model, facts

def read_weights(path):
    """A checkpoint of ours as it was saved, or {"model": a plain state_dict}; and the "sha256" of
    the bytes that were read. With weights_only a file cannot run code: it holds plain values."""
    path = existing_file(path)
    with explain(f"{path} is not a readable file of weights"):
        raw = path.read_bytes()
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        content = content if "model" in content else {"model": content}
        assert all(isinstance(name, str) for name in content["model"]), "its tensors have no names"
        return {**content, "sha256": hashlib.sha256(raw).hexdigest()}

def run_file(path):
    """A run's folder stands for its best.pt."""
    return Path(path) / "best.pt" if Path(path).is_dir() else Path(path)

def existing_file(path):
    path = run_file(path)
    if not path.exists():
        raise UserError(f"No such file: {path}. Train that run first, or name another folder")
    return path

def refuse_foreign(path, facts, data):
    """A network must know the classes; nothing behind it may have learned from who judges it."""
    if facts.get("classes", data.classes) != data.classes:
        raise UserError(f"{path} was trained on the classes {facts['classes']}, {data.source} has "
                        f"{data.classes}. Give the images it was trained for with --data")
    if seen := {*facts["seen_groups"]} & {*data.val.groups, *data.val.ids, *data.test_groups}:
        raise UserError(f"{path} has learned from {min(seen)}, by whom it or its student is to be "
                        f"judged in {data.source}. Give other images, or the --data, "
                        f"--val-fraction and names of patients (PATIENT) of its training")

def state_of(folder, facts):
    """What a table or a student must know of a run: ", stopped at 0.5" of a defective teacher, ",
    epoch 2 of 6" where it is not known to have ended, or ""."""
    stop_at, epochs = facts["args"]["stop_at"], facts["args"]["epochs"]
    if stop_at is not None and mean(facts["validation"]["accuracy"]) > stop_at:
        return f", stopped at {stop_at:g}"
    history = run_file(folder).parent / "history.csv"
    done = history.read_bytes().count(b"\n") - 1 if history.exists() else 0
    return "" if done >= epochs else f", epoch {done} of {epochs}"

# ---- weights from elsewhere ----------------------------------------------------------------------
def imagenet_weights(arch):
    """torchvision's, in $TORCH_HOME/hub/checkpoints. Its own builder fetches them, and renames what
    an old file calls otherwise. An SE-ResNet starts from the ResNet's weights."""
    plain = arch.removeprefix("se")
    with explain(f"torchvision has no ImageNet weights of {arch}; use --weights none or a file"):
        kinds = torchvision.models.get_model_weights(plain)
        kind = getattr(kinds, "IMAGENET1K_V1", kinds.DEFAULT)
    path = Path(torch.hub.get_dir(), "checkpoints", kind.url.rsplit("/", 1)[1])
    with (explain(f"{kind.url} could not be fetched or is damaged. Put that file at {path}, or "
                  f"start from random weights: --weights none --finetune all"),
          torch.random.fork_rng(devices=[])):  # the builder draws random weights before it loads
        model = torchvision.models.get_model(plain, weights=kind)
    return {"model": model.state_dict(), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

def load_first_weights(model, weights):
    """Load everything but the heads; those of a run of ours too, where they fit."""
    arch, reads = model.facts["arch"], model.facts["input"]
    content = imagenet_weights(arch) if weights == "imagenet" else read_weights(weights)
    state, own = content["model"], model.state_dict()
    heads = tuple(f"{name}." for name in model.head_names)
    with explain(f"{weights} does not hold the weights of {arch}; give a file of this --arch"):
        run = content.get("facts", {})
        for name in [name for name in state if name.startswith(heads)]:
            if not run or name not in own or state[name].shape != own[name].shape:
                del state[name]  # in place: torchvision reads a version noted in this very dict
        missing, unexpected = model.load_state_dict(state, strict=False)
        wrong = [name for name in missing + unexpected if not (
            name.startswith((*heads, *AUX_NAMES))  # auxiliary heads, which small images do without
            or (arch in NETWORKS and ".se." in name))]  # what a ResNet does not have
        assert not wrong, f"{len(wrong)} names differ, such as {wrong[0]}"
        # ImageNet's Inception and GoogLeNet learned on (x - 0.5) / 0.5, not on ImageNet's mean and
        # deviation: with this flag, which no state_dict holds, they convert their input.
        model.transform_input = run.get("transform_input", arch in AUX_MIN_SIZE)
        model.facts |= {"first_weights": content["sha256"], "from_run": bool(run),
                        "body_loaded": not any(".se." in name for name in missing),
                        "seen_groups": list(run.get("seen_groups", []))}
        if run.get("input", reads) != reads:
            raise UserError(f"{weights} reads the --input {run['input']}: add that flag")

# ---- SE-ResNets, noise residuals, cost -----------------------------------------------------------
class SEBottleneck(Bottleneck):
    """ResNet's block, each of its channels then weighed by what the block saw in the whole image
    (squeeze and excitation, Hu et al. 2018)."""

    def __init__(self, inplanes, planes, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        width = planes * self.expansion
        self.se = SqueezeExcitation(width, width // 16)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.se(self.bn3(self.conv3(x))) + shortcut)

# Networks that torchvision lacks, made with 1000 outputs. Add your own: --arch takes its name.
NETWORKS = {"seresnet50": lambda: ResNet(SEBottleneck, [3, 4, 6, 3]),
            "seresnet101": lambda: ResNet(SEBottleneck, [3, 4, 23, 3])}

def as_read(model, images):
    """The images themselves, or their noise residuals for a network that was trained on those."""
    facts = getattr(getattr(model, "module", model), "facts", {})  # .module: DDP's, around ours
    return residuals(images) if facts.get("input") == "residual" else images

def residuals(images):
    """Noise residuals (SRM, Fridrich & Kodovsky 2012; arXiv 2406.08837): (B, 3, H, W) in [-1, 1].
    Predicted minus pixel, divided by c, rounded and cut at 2. The pixel is predicted by one
    neighbour (c = 1) or two opposite ones (c = 3), the least of all directions, or all (c = 6)."""
    x = (255 * (images[:, :1] * STD[0] + MEAN[0])).round()  # grey levels again, free of noise
    wide = F.pad(x, (1, 1, 1, 1), mode="replicate")
    up, down = wide[..., :-2, 1:-1], wide[..., 2:, 1:-1]
    left, right = wide[..., 1:-1, :-2], wide[..., 1:-1, 2:]
    corners = wide[..., :-2, :-2] + wide[..., :-2, 2:] + wide[..., 2:, :-2] + wide[..., 2:, 2:]
    first = torch.stack([right, left, up, down]).amin(0) - x
    second = torch.minimum(right + left, up + down) - 2 * x
    square = 2 * (right + left + up + down) - corners - 4 * x
    return torch.cat([first, second / 3, square / 6], dim=1).round().clamp(-2, 2) / 2

def reading_key(model):
    """A fingerprint of what the network is shown of a probe image: caches of logits and features
    are made anew where `prepare`, its constants or the residuals change."""
    probe = (37 * torch.arange(256)).remainder(256).to(torch.uint8).view(1, 1, 16, 16)
    shown = as_read(model, prepare(probe, torch.device("cpu")))
    return fingerprint(shown.tolist(), model.facts["transform_input"])

def cost(model, size):
    """Parameters (auxiliary heads' apart), multiply-adds of one image (half the operations that
    FlopCounterMode counts), depth (number of Conv2d and Linear layers), megabytes of weights."""
    was_training = model.training
    model.eval()  # so that auxiliary heads do not run
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        # With a gradient, and attention as plain products: not every torch counts its fused form.
        model(torch.zeros(1, 3, size, size, device=device, requires_grad=True))
    model.train(was_training)
    auxiliary = sum(p.numel() for name, p in model.named_parameters() if name.startswith(AUX_NAMES))
    layers = [name for name, layer in model.named_modules()
              if isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.startswith(AUX_NAMES)]
    size_in_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return {"parameters": sum(p.numel() for p in model.parameters()) - auxiliary,
            "auxiliary_parameters": auxiliary, "multiply_adds": counter.get_total_flops() // 2,
            "depth": len(layers), "megabytes": size_in_bytes / 1e6}

# ---- Grad-CAM: where a network looked ------------------------------------------------------------
def last_maps(model, images):
    """The last layer whose output still has a place for every part of the image, pooling aside;
    and how many places a side."""
    order = []

    def note(layer, _, out):
        # A Sequential is as good as its last layer.
        aside = re.search("Pool|Drop|Identity|Sequential", type(layer).__name__) or layer is model
        if not aside and isinstance(out, torch.Tensor) and out.dim() == 4 and out[0, 0].numel() > 1:
            order.append((layer, out.shape[-2]))

    with torch.no_grad(), register_module_forward_hook(note):
        model(images[:1])
    if not order or isinstance(model, torchvision.models.VisionTransformer):  # it works on tokens
        raise UserError("Grad-CAM needs maps, and no late layer of this network has any")
    return order[-1]

def grad_cam(model, images, target, layer=None):
    """Grad-CAM (Selvaraju et al. 2017): heat (N, H, W) in [0, 1] over what speaks for the target.

        heat = ReLU(sum_k a_k A_k),  a_k: mean gradient of the target's logit over the map A_k

    images (N, 3, H, W) as the model reads them; target: a class, or one for each image (N,)."""
    caught = []

    def keep(module, inputs, out):
        caught.append(out)
        return out.clone()  # a ReLU that follows in place changes the copy, not what was kept

    was_training = model.training
    model.eval()
    hooked = layer or last_maps(model, images)[0]
    try:
        with torch.inference_mode(False), torch.enable_grad(), hooked.register_forward_hook(keep):
            # Frozen weights have no gradient, so it starts at the image.
            images = images.detach().clone().requires_grad_(True)
            if isinstance(model, torchvision.models.DenseNet) and layer is None:
                maps = F.relu(model.features(as_read(model, images)))  # this ReLU is not a layer
                logits = model.classifier(maps.mean((2, 3)))
            else:
                logits, _ = forward(model, images)
                maps = caught[0]
            target = torch.as_tensor(target, device=logits.device).expand(len(logits))
            score = logits.gather(1, target[:, None]).sum()
            maps, gradient = maps.detach(), torch.autograd.grad(score, maps)[0]
    finally:
        model.train(was_training)
    heat = (gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).clamp(min=0)
    heat = F.interpolate(heat, images.shape[-2:], mode="bilinear")[:, 0]  # (N, H, W)
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)

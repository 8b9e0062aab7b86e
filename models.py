"""Networks and checkpoints: torchvision's classifiers with a new head, frozen in part, and saved.

    model = build("alexnet", num_classes=2, size=224, weights="imagenet")
    logits, aux = forward(model, images)         aux: auxiliary heads' logits, usually []
    trainable = freeze(model, "fc")              the part whose weights change; the rest is frozen
    source = from_images(images, device)         source(rows) returns a network's input (B, 3, H, W)
    save_checkpoint(path, model, **facts)        and back: model, facts = load_checkpoint(path)

The file holds, in this order: networks, their trainable part, sources, checkpoints, first weights
from elsewhere, SE-ResNets, noise residuals, cost and Grad-CAM.
"""

import hashlib
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

from data import (MEAN, PIXELS, STD, UserError, atomic, cached_array, explain, fingerprint, prepare,
                  progress)

# torchvision unpickles the weights that it fetches, which would run any code in a planted file.
# With this switch, torch.load reads nothing but plain values, whoever calls it.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

FORMAT = 6  # of a checkpoint: raise it when its facts or a network change, to refuse old ones

# Auxiliary heads are further classifiers half-way up, for training only. Small images have none.
# InceptionV3's 5x5 window fits from 299 pixels on. From 64 on, GoogLeNet has 4x4 maps to pool.
AUX_MIN_SIZE = {"inception_v3": 299, "googlenet": 64}
AUX_WEIGHT = {"inception_v3": 0.4, "googlenet": 0.3}  # in the loss, from the networks' own papers
AUX_NAMES = ("AuxLogits", "aux1", "aux2")  # the names of their layers begin with these

# ---- a network with a new head -------------------------------------------------------------------
def build(arch, num_classes, size=None, weights="none", reads="image"):
    """Return a network with a new, randomly initialised head of `num_classes` outputs.
    weights: "none" (random), "imagenet" (torchvision's) or a file: a checkpoint of ours or a plain
    state_dict of the same network. size: the side of the images in pixels, refused if the network
    cannot take it. reads: "image", or "residual" for noise residuals of the image."""
    aux = arch in AUX_MIN_SIZE and (size is None or size >= AUX_MIN_SIZE[arch])
    model = bare_network(arch, aux)
    replace_heads(model, num_classes)
    model.transform_input = False
    model.facts = {"arch": arch, "num_classes": num_classes, "size": size, "aux": aux,
                   "input": reads, "first_weights": None, "from_run": False, "body_loaded": False,
                   "seen_groups": []}  # the patients on whom its weights were trained
    if weights != "none":
        load_first_weights(model, weights)
    model.facts["transform_input"] = model.transform_input
    read_residuals(model)
    if size is not None:
        with torch.no_grad(), explain(f"{arch} cannot take {size} x {size} images; choose a size"):
            model.eval()(torch.zeros(1, 3, size, size))
    return model.train()

def bare_network(arch, aux):
    """Return the network as its authors built it, with 1000 outputs and random weights."""
    if arch in NETWORKS:
        return NETWORKS[arch]()
    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"no network is called {arch}: see torchvision's, or models.NETWORKS")
    # torchvision's own initialisation of these two takes seconds, and they learned far more slowly
    # with it than with torch's default, at the same learning rate.
    options = {"aux_logits": aux, "init_weights": False} if arch in AUX_MIN_SIZE else {}
    model = torchvision.models.get_model(arch, weights=None, **options)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):  # MNASNet has 0.0003 and MobileNetV3 0.01, which were
            layer.momentum = max(layer.momentum, 0.1)  # meant for long epochs: averages would lag
    if isinstance(model, torchvision.models.SqueezeNet):
        model.classifier[2] = nn.Identity()  # no ReLU, because logits below 0 would get no gradient
    return model

def replace_heads(model, num_classes):
    """Exchange the layers with 1000 outputs: auxiliary heads, and last the classifier. torchvision
    calls it fc, classifier.6 or heads.head. SqueezeNet's is a 1x1 convolution."""
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
    """Return logits (B, C) and a list of the auxiliary heads' logits, which is usually empty."""
    out = model(images)
    if isinstance(out, torch.Tensor):
        return out.flatten(1), []  # flatten: SqueezeNet ends in 1x1 maps
    return out[0], list(out[1:])

def freeze(model, finetune):
    """Freeze all but the trainable part, and return that part: "all" of the model, the "fc" block
    around the head (three layers in AlexNet and VGG, the head itself in most), or the new "head".
    The frozen part is put in eval mode, because its BatchNorm averages would move otherwise."""
    if finetune == "all":
        return model
    head = model.get_submodule(model.head_names[-1])
    block = model.get_submodule(model.head_names[-1].split(".")[0])
    # In SqueezeNet, pooling follows the head, so the whole block is trained, also with "head".
    takes_block = isinstance(block, nn.Sequential) and (finetune == "fc" or block[-1] is not head)
    model.requires_grad_(False).eval()
    return (block if takes_block else head).requires_grad_(True)

@torch.no_grad()
def features(model, trainable, images):
    """Return what the trainable part receives when the model reads the images."""
    caught = []
    with trainable.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0])):
        forward(model, images)  # the trainable part runs too: little beside the rest
    return caught[0]

# ---- sources: functions (rows, affines) -> tensor ------------------------------------------------
def from_images(images, device, network=None, amp=False):
    """Return a source of prepared rows of uint8 images (N, 1, H, W), which `affines` may augment.
    With `network`, a function of these images, the source returns its outputs without gradients."""
    images = on_device(images, device)

    def source(rows, affines=None):
        x = prepare(images[rows.to(images.device)], device, affines)
        if network is None:
            return x
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return network(x)

    return source

def from_tensor(tensor, device):
    """Return a source that looks up rows of precomputed features or logits (N, ...)."""
    tensor = on_device(tensor, device)
    return lambda rows, affines=None: tensor[rows.to(tensor.device)].to(device).float()

def on_device(tensor, device):
    """Move a tensor to a GPU once, if it fits there, so that no batch waits for the bus."""
    if device.type == "cuda" and tensor.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return tensor.to(device)
    return tensor

def precompute(source, n, device, dtype, stem, *key):
    """Return a source of the n rows of outputs of `source`, computed once and kept in a file. The
    file's name holds a hash of `key`, which identifies pixels and weights, and of what changes with
    the code: PIXELS (see data.py), the outputs' shape and a few rounded outputs."""
    first = source(torch.arange(min(n, 2), device=device)).float()
    probe = [f"{value:.2e}" for value in first.flatten().tolist()[:100]]
    path = stem.with_name(f"{stem.name}-{fingerprint(*key, PIXELS, list(first.shape), probe)}.npy")
    blocks, shape = output_blocks(source, n, device, dtype), (n, *first.shape[1:])
    return from_tensor(cached_array(path, str(dtype)[6:], shape, blocks), device)  # torch.float16

def output_blocks(source, n, device, dtype):
    """Yield the outputs in blocks, because those of a large data set do not fit into memory."""
    for rows in progress(torch.arange(n, device=device).split(64), "running the frozen network"):
        block = source(rows).to("cpu", dtype)
        if not block.isfinite().all():
            raise UserError(f"a frozen network has outputs that are not finite in {dtype}: it "
                            f"diverged, or they are too large. Use another --teacher or --weights")
        yield block.numpy()

# ---- checkpoints ---------------------------------------------------------------------------------
RUN_FACTS = ["config", "classes", "multilabel", "history", "last", "seen_groups", "provenance",
             "size", "epoch", "validation", "train_accuracy"]  # of a checkpoint made by train.py

def save_checkpoint(path, model, **facts):
    """Write the weights and whatever is needed to rebuild the network: plain values only."""
    content = {"format": FORMAT, "model": model.state_dict(), "facts": {**model.facts, **facts}}
    with (explain(f"{path} could not be written; make room, and repeat the command"),
          atomic(path) as temporary, open(temporary, "wb") as file):
        torch.save(content, file)  # given a name, it would write that name into the file

def load_checkpoint(path):
    """Return the network, rebuilt from its own facts in eval mode without gradients, and facts."""
    content = read_weights(path)
    with explain(f"{path} is not a checkpoint of this project"):
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, this code reads {FORMAT}. "
                            f"Delete it and train it again, or use the code that wrote it")
        facts = content["facts"]
        model = bare_network(facts["arch"], facts["aux"])
        replace_heads(model, facts["num_classes"])
        model.transform_input = facts["transform_input"]
        model.load_state_dict(content["model"])
        model.facts = facts
        read_residuals(model)
    return model.eval().requires_grad_(False), facts

def load_run(path):
    """Return load_checkpoint(path) if train.py made the file. Otherwise name the missing facts."""
    model, facts = load_checkpoint(path)
    with explain(f"{path} was not made by train.py"):
        if missing := [k for k in RUN_FACTS if facts.get(k) is None and k != "last"]:
            raise ValueError(f"{', '.join(missing)} missing")
        state_of(facts), facts["config"]["train"], facts["history"][-1]  # raise if one is missing
    return model, facts

def read_weights(path):
    """Return a checkpoint of ours as it was saved, or {"model": a plain state_dict}. With
    weights_only a file cannot run code, because only plain values are read from it."""
    path = existing_file(path)
    with explain(f"{path} is not a readable file of weights"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        content = content if "model" in content else {"model": content}
        if not all(isinstance(name, str) for name in content["model"]):
            raise ValueError("its tensors have no names")
        return content

def weights_hash(state):
    """Return 16 hex digits of a state_dict: equal for equal weights, whatever file holds them."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

def run_file(path):
    """Return the best.pt of a run folder, and any other path as it is."""
    return Path(path) / "best.pt" if Path(path).is_dir() else Path(path)

def existing_file(path):
    path = run_file(path)
    if not path.exists():
        raise UserError(f"No such file: {path}. Train that run first, or name another folder")
    return path

def refuse_foreign(path, facts, data):
    """Refuse a network with other classes, or one trained on these validation or test patients."""
    if facts.get("classes", data.classes) != data.classes:
        raise UserError(f"{path} was trained on the classes {facts['classes']}, but {data.source} "
                        f"has {data.classes}. Choose --data with the classes of that training")
    if seen := {*facts["seen_groups"]} & {*data.val.groups, *data.val.ids, *data.test_groups}:
        raise UserError(f"{path} was trained on {min(seen)}, a validation or test patient of "
                        f"{data.source}. Use other images, or the same --data, --val-fraction and "
                        f"patients (patients.csv or data.PATIENT) as in its training")

def state_of(facts):
    """Return what sets a run apart: ", stopped at 0.5" for a defective teacher, ", unfinished (2 of
    6 epochs)" while there is something to resume from, or "" for other finished runs."""
    done, epochs = len(facts["history"]), facts["config"]["epochs"]
    if facts["last"] is not None:
        return f", unfinished ({done} of {epochs} epochs)"
    return "" if done >= epochs else f", stopped at {facts['config']['stop_at']:g}"

# ---- weights from elsewhere ----------------------------------------------------------------------
def imagenet_weights(arch):
    """Return torchvision's weights from $TORCH_HOME/hub/checkpoints. Download them if missing.
    torchvision's builder loads them, because it renames the layers in old files (DenseNet). An
    SE-ResNet starts from the weights of the ResNet without SE."""
    plain = arch.removeprefix("se")
    with explain(f"torchvision has no ImageNet weights of {arch}; use --weights none or a file"):
        kinds = torchvision.models.get_model_weights(plain)
        kind = getattr(kinds, "IMAGENET1K_V1", kinds.DEFAULT)
    path = Path(torch.hub.get_dir(), "checkpoints", kind.url.rsplit("/", 1)[1])
    with (explain(f"{kind.url} could not be fetched or is damaged. Put that file at {path}, name "
                  f"another with --weights FILE, or use --weights none --finetune all"),
          torch.random.fork_rng(devices=[])):  # the builder draws random weights before it loads
        return {"model": torchvision.models.get_model(plain, weights=kind).state_dict()}

def load_first_weights(model, weights):
    """Load first weights except the heads. From a checkpoint of ours, load heads that fit, too."""
    arch, reads = model.facts["arch"], model.facts["input"]
    content = imagenet_weights(arch) if weights == "imagenet" else read_weights(weights)
    state, own = content["model"], model.state_dict()
    heads = tuple(f"{name}." for name in model.head_names)
    with explain(f"{weights} does not hold the weights of {arch}; give a file of this --arch"):
        run, first_weights = content.get("facts", {}), weights_hash(state)
        for name in [name for name in state if name.startswith(heads)]:
            if not run or name not in own or state[name].shape != own[name].shape:
                del state[name]  # in place: torchvision reads a version noted in this very dict
        missing, unexpected = model.load_state_dict(state, strict=False)
        wrong = [name for name in missing + unexpected if not (
            name.startswith((*heads, *AUX_NAMES))  # auxiliary heads, which small images do without
            or (arch in NETWORKS and ".se." in name))]  # what a ResNet does not have
        if wrong:
            raise ValueError(f"{len(wrong)} names differ, such as {wrong[0]}")
        # ImageNet's Inception and GoogLeNet were trained on (x - 0.5) / 0.5. With this flag, which
        # no state_dict holds, they convert their input from ImageNet's mean and deviation.
        model.transform_input = run.get("transform_input", arch in AUX_MIN_SIZE)
        model.facts |= {"first_weights": first_weights, "from_run": bool(run),
                        "body_loaded": not any(".se." in name for name in missing),
                        "seen_groups": list(run.get("seen_groups", []))}
        if run.get("input", reads) != reads:
            raise UserError(f"{weights} needs --input {run['input']}. Add that flag")

# ---- SE-ResNets, noise residuals, cost -----------------------------------------------------------
class SEBottleneck(Bottleneck):
    """ResNet's block whose channels are weighted by squeeze and excitation (Hu et al. 2018)."""

    def __init__(self, inplanes, planes, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        width = planes * self.expansion
        self.se = SqueezeExcitation(width, width // 16)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.se(self.bn3(self.conv3(x))) + shortcut)

# Networks that torchvision lacks, with 1000 outputs. Add your own, and --arch takes its name.
NETWORKS = {"seresnet50": lambda: ResNet(SEBottleneck, [3, 4, 6, 3])}

def read_residuals(model):
    """Let a network that was built for noise residuals compute them from images by itself."""
    if model.facts["input"] == "residual":
        model.register_forward_pre_hook(lambda module, inputs: (residuals(inputs[0]),))

def residuals(images):
    """Return noise residuals (SRM, Fridrich & Kodovsky 2012; arXiv 2406.08837): (B, 3, H, W) in
    [-1, 1]. Each compares a grey level x with its neighbours: n - x for one neighbour n, (n + m -
    2 x) / 3 for two opposite ones, both the least over all directions, and (2 s - k - 4 x) / 6 with
    the sums s of the four at the sides and k of the corners. All are rounded, cut at 2, halved."""
    x = (255 * (images[:, :1] * STD[0] + MEAN[0])).round()  # undo prepare: whole grey levels
    wide = F.pad(x, (1, 1, 1, 1), mode="replicate")
    up, down = wide[..., :-2, 1:-1], wide[..., 2:, 1:-1]
    left, right = wide[..., 1:-1, :-2], wide[..., 1:-1, 2:]
    corners = wide[..., :-2, :-2] + wide[..., :-2, 2:] + wide[..., 2:, :-2] + wide[..., 2:, 2:]
    first = torch.stack([right, left, up, down]).amin(0) - x
    second = torch.minimum(right + left, up + down) - 2 * x
    square = 2 * (right + left + up + down) - corners - 4 * x
    return torch.cat([first, second / 3, square / 6], dim=1).round().clamp(-2, 2) / 2

def cost(model, size):
    """Return the number of parameters (auxiliary heads separately), the multiply-adds per image
    (half of what FlopCounterMode counts) and the megabytes of all weights, auxiliary heads too."""
    was_training = model.training
    model.eval()  # so that auxiliary heads do not run
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        # The gradient and MATH avoid fused attention, which not every torch version can count.
        model(torch.zeros(1, 3, size, size, device=device, requires_grad=True))
    model.train(was_training)
    auxiliary = sum(p.numel() for name, p in model.named_parameters() if name.startswith(AUX_NAMES))
    size_in_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return {"parameters": sum(p.numel() for p in model.parameters()) - auxiliary,
            "auxiliary_parameters": auxiliary, "multiply_adds": counter.get_total_flops() // 2,
            "megabytes": size_in_bytes / 1e6}

# ---- Grad-CAM: where a network looked ------------------------------------------------------------
def last_maps(model, images):
    """Return the last layer with feature maps (pooling aside), and the height of these maps."""
    order = []

    def note(layer, _, out):
        aside = re.search("Pool|Drop|Identity|Sequential", type(layer).__name__) or layer is model
        if not aside and isinstance(out, torch.Tensor) and out.dim() == 4 and out[0, 0].numel() > 1:
            order.append((layer, out.shape[-2]))

    with torch.no_grad(), register_module_forward_hook(note):
        model(images[:1])
    if not order or isinstance(model, torchvision.models.VisionTransformer):  # it works on tokens
        raise UserError("Grad-CAM needs feature maps, but this network has none. Use another run")
    return order[-1]

def grad_cam(model, images, target, layer=None):
    """Return Grad-CAM (Selvaraju et al. 2017): heat (N, H, W) in [0, 1].

        heat = ReLU(sum_k a_k A_k),  a_k: mean gradient of the target's logit over the map A_k

    images: (N, 3, H, W), prepared. target: the class to explain, or one per image (N,)."""
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
            logits, _ = forward(model, images)
            maps = caught[0]
            if isinstance(model, torchvision.models.DenseNet) and layer is None:
                maps = F.relu(maps)  # this ReLU is not a layer that a hook could watch
                logits = model.classifier(maps.mean((2, 3)))
            target = torch.as_tensor(target, device=logits.device).expand(len(logits))
            score = logits.gather(1, target[:, None]).sum()
            maps, gradient = maps.detach(), torch.autograd.grad(score, maps)[0]
    finally:
        model.train(was_training)
    heat = (gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).clamp(min=0)
    heat = F.interpolate(heat, images.shape[-2:], mode="bilinear")[:, 0]  # (N, H, W)
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)

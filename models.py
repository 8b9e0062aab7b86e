"""Networks and checkpoints: torchvision's classifiers with a new head, frozen in part, and saved.

    model = build("alexnet", num_classes=2, size=224, weights="imagenet")
    logits, aux = forward(model, images)         aux: auxiliary heads' logits, a list, mostly empty
    learner = freeze(model, "fc")                the part that learns; the rest is frozen
    save_checkpoint(path, model, **facts)        and back: model, facts = load_checkpoint(path)
"""

import argparse
import difflib
import hashlib
import io
import math
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

from data import MEAN, STD, UserError, atomic, explain, mean

FORMAT = 3  # of a checkpoint: raise it when its facts change, so that old ones are refused

# Auxiliary heads (more classifiers half-way up, for training only) are left out for small images:
# InceptionV3's 5x5 window does not fit below 299 pixels; GoogLeNet's pool to 4x4 at 1/16.
AUX_MIN_SIZE = {"inception_v3": 299, "googlenet": 64}
AUX_WEIGHT = {"inception_v3": 0.4, "googlenet": 0.3}  # in the loss, from the networks' own papers
AUX_NAMES = ("AuxLogits", "aux1", "aux2")  # with which the names of their layers begin

SE_RESNETS = {"seresnet50": [3, 4, 6, 3], "seresnet101": [3, 4, 23, 3]}  # blocks a stage


class SEBottleneck(Bottleneck):
    """ResNet's block, each of its channels then weighed by what the block saw in the whole image
    (squeeze and excitation, Hu et al. 2018). torchvision has the layer, but no such ResNet."""

    def __init__(self, inplanes, planes, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        width = planes * self.expansion
        self.se = SqueezeExcitation(width, width // 16)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.se(self.bn3(self.conv3(x))) + shortcut)


# ---- a network with a new head -------------------------------------------------------------------


def architectures():
    return [*SE_RESNETS, *torchvision.models.list_models(module=torchvision.models)]


def known_arch(arch):
    """An argparse type: the name of a network that `build` knows, or an error with the nearest."""
    names = architectures()
    if arch not in names:
        near = difflib.get_close_matches(arch, names, n=4, cutoff=0.3)
        raise argparse.ArgumentTypeError(f"no network is called {arch}; near are {', '.join(near)}")
    return arch


def bare_network(arch, aux):
    """The network as its authors made it: 1000 outputs, random weights."""
    if arch in SE_RESNETS:
        return ResNet(SEBottleneck, SE_RESNETS[arch])
    # init_weights=False: torchvision's own initialisation of these two takes seconds, and they
    # learned far more slowly with it than with torch's default, at the same learning rate.
    options = {"aux_logits": aux, "init_weights": False} if arch in AUX_MIN_SIZE else {}
    model = torchvision.models.get_model(arch, weights=None, **options)
    for layer in model.modules() if arch.startswith("mnasnet") else []:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1  # its 0.0003, meant for ImageNet's long epochs, hardly moves here
    return model


def heads(model):
    """Names of the layers with 1000 outputs: the auxiliary heads, and last the classifier, which
    torchvision calls fc, classifier.6 or heads.head; SqueezeNet's is a 1x1 convolution."""
    return [name for name, layer in model.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and len(layer.weight) == 1000]


def replace_heads(model, num_classes):
    for name in heads(model):
        old = model.get_submodule(name)
        new = (nn.Linear(old.in_features, num_classes) if isinstance(old, nn.Linear)
               else nn.Conv2d(old.in_channels, num_classes, old.kernel_size))
        model.set_submodule(name, new)
        model.head_name = name  # in the end the classifier's, which no longer has 1000 outputs


def build(arch, num_classes, size=None, weights="none", reads="image"):
    """A network with a new, randomly initialised head of `num_classes` outputs.

    weights: "none" (random), "imagenet" (torchvision's) or a file: a checkpoint of ours or a plain
    state_dict of the same network. size: the images' side in pixels, refused if it is impossible.
    reads: the image, or its noise residuals ("residual").
    """
    aux = arch in AUX_MIN_SIZE and (size is None or size >= AUX_MIN_SIZE[arch])
    model, seen_groups, sha256 = bare_network(arch, aux), [], None
    model.transform_input = False
    if weights != "none":
        path = weights_file(arch, weights)
        content = read_weights(path)
        with explain(f"{path} does not hold the weights of {arch}; give a file of this --arch"):
            load_body(model, content["model"], arch)
            facts, sha256 = content.get("facts", {}), content["sha256"]
            # ImageNet's Inception and GoogLeNet learned on (x - 0.5) / 0.5, not on ImageNet's mean
            # and deviation: with this flag, which no state_dict holds, they convert their input.
            model.transform_input = facts.get("transform_input", arch in AUX_MIN_SIZE)
            seen_groups = list(facts.get("seen_groups", []))
            if facts.get("input", reads) != reads:
                raise UserError(f"{path} reads the --input {facts['input']}: add that flag")
    replace_heads(model, num_classes)
    if size is not None:
        why = f"{arch} cannot take images of {size} x {size} pixels; choose another --size"
        with torch.no_grad(), explain(why):
            model.eval()(torch.zeros(1, 3, size, size))
    model.facts = {"arch": arch, "num_classes": num_classes, "size": size, "aux": aux,
                   "input": reads, "transform_input": model.transform_input,
                   "first_weights": sha256,  # of the file they were read from
                   "seen_groups": seen_groups}  # the patients that its weights have learned from
    return model.train()


# ---- weights from elsewhere ----------------------------------------------------------------------


def weights_file(arch, weights):
    """The path behind --weights; torchvision's ImageNet weights are downloaded if need be.

    Their hash is checked every time: torchvision does so only while downloading.
    """
    if weights != "imagenet":
        return existing_file(weights)
    with explain(f"torchvision has no ImageNet weights of {arch}; use --weights none or a file"):
        kinds = torchvision.models.get_model_weights(arch.removeprefix("se"))  # SE: a ResNet's
        url = getattr(kinds, "IMAGENET1K_V1", kinds.DEFAULT).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    prefix = path.stem.rsplit("-", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with explain(f"{url} could not be fetched. Put that file at {path}, or start from random "
                     f"weights: --weights none --finetune all"):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(prefix):
        raise UserError(f"{path} is damaged: its SHA-256 does not begin with {prefix}. Delete it")
    return path


def run_file(path):
    """A run's folder stands for its best.pt."""
    return Path(path) / "best.pt" if Path(path).is_dir() else Path(path)


def existing_file(path):
    path = run_file(path)
    if not path.exists():
        raise UserError(f"No such file: {path}. Train that run first, or name another")
    return path


def read_weights(path):
    """A checkpoint of ours as it was saved, or {"model": a plain state_dict}; and the "sha256" of
    the bytes that were read. With weights_only a file cannot run code: it holds plain values."""
    with explain(f"{path} is not a readable file of weights"):
        raw = path.read_bytes()
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        content = content if "model" in content else {"model": content}
        assert all(isinstance(name, str) for name in content["model"]), "its tensors have no names"
        return {**content, "sha256": hashlib.sha256(raw).hexdigest()}


def load_body(model, state, arch):
    """Load everything but the heads, which are about to be replaced."""
    skip = tuple(f"{name}." for name in heads(model))
    if "densenet" in arch:  # torchvision's files still say norm.1 where its code says norm1
        pattern = r"(denselayer\d+\.(?:norm|conv))\.(\d)"
        state = {re.sub(pattern, r"\1\2", name): value for name, value in state.items()}
    for name in [name for name in state if name.startswith(skip)]:
        del state[name]  # in place: torchvision reads a version that is noted in this very dict
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in missing + unexpected if not (
        name.startswith((*skip, *AUX_NAMES))  # auxiliary heads, which small images do without
        or name.endswith("num_batches_tracked")  # a counter that old files do not have
        or (arch in SE_RESNETS and ".se." in name))]  # what a ResNet does not have
    assert not wrong, f"{len(wrong)} names differ, such as {wrong[0]}"


# ---- forward, and what of a network learns -------------------------------------------------------


def forward(model, images):
    """logits (B, C), and a list of the auxiliary heads' logits (empty in eval mode, and mostly)."""
    out = model(as_read(model, images))
    if isinstance(out, torch.Tensor):
        return out.flatten(1), []  # flatten: SqueezeNet ends in 1x1 maps
    return out[0], [aux for aux in out[1:] if aux is not None]


def as_read(model, images):
    """The images themselves, or their noise residuals for a network that was trained on those."""
    facts = getattr(getattr(model, "module", model), "facts", {})  # .module: DDP's, around ours
    return residuals(images) if facts.get("input") == "residual" else images


def residuals(images):
    """Noise residuals (SRM, Fridrich & Kodovsky 2012; arXiv 2406.08837): (B, 3, H, W) in [-1, 1].

    Predicted minus pixel, divided by c, rounded and cut at 2. The pixel is predicted by one
    neighbour (c = 1) or two opposite ones (c = 3), the least of all directions, or by all (c = 6).
    """
    x = 255 * (images[:, :1] * STD[0] + MEAN[0])  # grey levels again
    wide = F.pad(x, (1, 1, 1, 1), mode="replicate")
    up, down = wide[..., :-2, 1:-1], wide[..., 2:, 1:-1]
    left, right = wide[..., 1:-1, :-2], wide[..., 1:-1, 2:]
    corners = wide[..., :-2, :-2] + wide[..., :-2, 2:] + wide[..., 2:, :-2] + wide[..., 2:, 2:]
    first = torch.stack([right, left, up, down]).amin(0) - x
    second = torch.minimum(right + left, up + down) - 2 * x
    square = 2 * (right + left + up + down) - corners - 4 * x
    return torch.cat([first, second / 3, square / 6], dim=1).round().clamp(-2, 2) / 2


def freeze(model, finetune):
    """The learner, the part that learns: "all", the "fc" block around the head (three layers in
    AlexNet and VGG, the head itself in most), or the new "head" alone.

    The rest is put in eval mode: even without gradients BatchNorm would move its averages, and
    dropout would drop.
    """
    if finetune == "all":
        return model
    head = model.get_submodule(model.head_name)
    block = model.get_submodule(model.head_name.split(".")[0])
    # In SqueezeNet pooling follows the head: then the block is what learns, also with "head".
    takes_block = isinstance(block, nn.Sequential) and (finetune == "fc" or block[-1] is not head)
    learner = block if takes_block else head
    model.requires_grad_(False).eval()
    for layer in learner.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()  # arXiv 2406.08837: all of AlexNet's three "initialised anew"
    return learner.requires_grad_(True)


@torch.no_grad()
def features(model, learner, images):
    """What reaches the learner when the model reads the images: the learner's input."""
    caught = []
    with learner.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0])):
        forward(model, images)  # the learner runs too, for nothing: little beside the rest
    return caught[0]


def frozen_hash(model):
    """A hash of all that made a table of features: frozen weights, averages, form of the input."""
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    digest = hashlib.sha256(str([model.facts["transform_input"], model.facts["input"]]).encode())
    for name, value in model.state_dict().items():
        if name not in learning and not name.startswith(AUX_NAMES):  # which eval mode leaves out
            digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


def cost(model, size):
    """Parameters (auxiliary heads' apart), multiply-adds of one image, depth, megabytes of weights.

    Multiply-adds are half the operations that FlopCounterMode counts: convolutions and matrix
    products, as in torchvision's figures. Depth is the number of Conv2d and Linear layers.
    """
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
    return {
        "parameters": sum(p.numel() for p in model.parameters()) - auxiliary,
        "auxiliary_parameters": auxiliary,
        "multiply_adds": counter.get_total_flops() // 2,
        "depth": len(layers),
        "megabytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6,
    }


# ---- Grad-CAM: where a network looked ------------------------------------------------------------


def last_maps(model, images):
    """The last layer whose output still has a place for every part of the image, pooling aside;
    and how many places a side.

    In a ViT what follows the last attention reaches only the class token, so the layer before that
    is taken; a Swin folds its tokens back into maps by itself.
    """
    if isinstance(model, torchvision.models.VisionTransformer):
        return model.encoder.layers[-1].ln_1, model.image_size // model.patch_size
    order = []

    def note(layer, _, out):
        # A Sequential is as good as its last layer.
        aside = re.search("Pool|Drop|Identity|Sequential", type(layer).__name__) or layer is model
        if not aside and isinstance(out, torch.Tensor) and out.dim() == 4 and out[0, 0].numel() > 1:
            order.append((layer, out.shape[-2]))

    with torch.no_grad(), register_module_forward_hook(note):
        model(images[:1])
    if not order:
        raise UserError("Grad-CAM needs maps, and no layer of this network has any: name a layer")
    return order[-1]


def grad_cam(model, images, target, layer=None):
    """Grad-CAM (Selvaraju et al. 2017): heat (N, H, W) in [0, 1] over what speaks for the target.

        heat = ReLU(sum_k a_k A_k),  a_k: mean gradient of the target's logit over the map A_k

    images (N, 3, H, W) as the model reads them; target: a class, or one for each image (N,). Where
    nothing speaks for the target, the heat is 0 everywhere.
    """
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
    if maps.dim() == 3:  # a ViT's tokens: one for the class, then the patches row by row
        side = math.isqrt(maps.shape[1] - 1)
        maps, gradient = (t[:, 1:].mT.unflatten(2, (side, side)) for t in (maps, gradient))
    heat = (gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).clamp(min=0)
    heat = F.interpolate(heat, images.shape[-2:], mode="bilinear")[:, 0]  # (N, H, W)
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(path, model, weights=True, **facts):
    """Weights, and whatever is needed to rebuild the network and to judge it: plain values only."""
    content = {"format": FORMAT, "model": model.state_dict() if weights else {},
               "facts": {**model.facts, **facts}}
    with (explain(f"{path} could not be written; make room, and repeat the command"),
          atomic(path) as temporary, open(temporary, "wb") as file):
        torch.save(content, file)  # given a name, it would write that name into the file


# What train.py adds to a network's own facts, by type.
RUN_FACTS = {"args": dict, "classes": list, "multilabel": bool, "images": list, "processes": int,
             "seen_groups": list, "provenance": dict, "teachers": list, "taught_by": list,
             "epoch": int, "train_accuracy": float, "validation": dict}
NETWORK_FACTS = {"classes", "multilabel", "seen_groups", "epoch"}  # may be there without the others


def load_checkpoint(path):
    """model, facts: the network rebuilt from its own facts, in eval mode and without gradients."""
    path = existing_file(path)
    content = read_weights(path)
    with explain(f"{path} is not a checkpoint of this project"):
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, this code reads {FORMAT}. "
                            f"Train it again, or use the code that wrote it")
        facts = {**content["facts"], "sha256": content["sha256"]}
        assert facts["size"] is None or 0 < facts["size"] < 10_000, "size"
        if facts.keys() & (RUN_FACTS.keys() - NETWORK_FACTS):  # a run's: all must be there
            for name, kind in RUN_FACTS.items():
                assert isinstance(facts[name], kind), name
        model = bare_network(facts["arch"], facts["aux"])
        replace_heads(model, facts["num_classes"])
        model.transform_input = facts["transform_input"]
        model.load_state_dict(content["model"])
        model.facts = facts
    return model.eval().requires_grad_(False), facts


# ---- what a checkpoint's facts tell --------------------------------------------------------------


def refuse_foreign(path, facts, data):
    """A network must know the classes, and must not have learned from the patients it judges."""
    refuse_leak(path, facts["seen_groups"], data)
    if facts["classes"] != data.classes:
        raise UserError(f"{path} was trained on the classes {facts['classes']}, {data.source} has "
                        f"{data.classes}. Give the images it was trained for with --data")


def refuse_leak(path, groups, data):
    """groups: the patients that a network, its teachers and its first weights have learned from."""
    if seen := set(groups) & {*data.val.groups, *data.val.ids, *data.test_groups}:
        raise UserError(f"{path} has learned from {min(seen)}, by whom it or its student is to be "
                        f"judged in {data.source}. Give other images, or the --data, "
                        f"--val-fraction and names of patients (PATIENT) of its training")


def stopped_at(facts):
    """", stopped at 0.5" for a defective teacher, "" for one that was not stopped."""
    stop_at = facts["args"]["stop_at"]
    early = stop_at is not None and mean(facts["validation"]["accuracy"]) > stop_at
    return f", stopped at {stop_at:g}" if early else ""


def unfinished(folder, facts):
    """", epoch 2 of 6" for a run that has not ended, "" for one that has."""
    path = run_file(folder).parent / "history.csv"
    done = path.read_bytes().count(b"\n") - 1 if path.exists() else math.inf
    ended = done >= facts["args"]["epochs"] or stopped_at(facts)
    return "" if ended else f", epoch {done} of {facts['args']['epochs']}"

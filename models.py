"""Networks and checkpoints: torchvision's classifiers with a new head, taken apart and put together.

    model = build("alexnet", num_classes=2, size=224, weights="imagenet")
    logits, aux = forward(model, images)         aux: the auxiliary heads' logits, a list, mostly empty
    tail = split(model, "fc")                    the part that learns when the rest is frozen
    save_checkpoint(path, model, **facts)        and back: model, facts = load_checkpoint(path)
"""

import hashlib
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import SqueezeExcitation

from data import MEAN, STD, UserError, atomic, file_hash, prepare

FORMAT = 2  # of a checkpoint: raise it when its facts change; a reader of another says so and does not guess

# Auxiliary heads (a second and third classifier half-way up, for training only) need maps of a certain
# size. Where the film is smaller they are left out: InceptionV3's window is 5x5 at 299 / 17 and
# does not fit below 299; GoogLeNet's pools to 4x4 at 1/16, so below 64 it would invent pixels.
AUX_MIN_SIZE = {"inception_v3": 299, "googlenet": 64}
AUX_NAMES = ("AuxLogits.", "aux1.", "aux2.")
AUX_WEIGHT = {"inception_v3": 0.4, "googlenet": 0.3}  # in the loss, from the networks' own papers

SE_RESNETS = {"seresnet50": [3, 4, 6, 3], "seresnet101": [3, 4, 23, 3]}  # blocks; torchvision has none


class SEBottleneck(Bottleneck):
    """ResNet's block, each channel then weighed by what the block saw in the whole film (Hu et al. 2018)."""

    def __init__(self, inplanes, planes, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        width = planes * self.expansion
        self.se = SqueezeExcitation(width, width // 16)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.se(self.bn3(self.conv3(x))) + shortcut)


def architectures():
    return [*SE_RESNETS, *torchvision.models.list_models(module=torchvision.models)]


def bare_network(arch, aux):
    """The network as its authors made it: 1000 outputs, random weights.

    Inception and GoogLeNet have an initialisation of their own (init_weights=True); it takes seconds, and
    they learned far more slowly with it than with torch's, at the same learning rate.
    """
    if arch not in architectures():
        raise UserError(f"--arch needs one of {', '.join(architectures())}; got {arch}")
    if arch in SE_RESNETS:
        return ResNet(SEBottleneck, SE_RESNETS[arch])
    options = {"aux_logits": aux, "init_weights": False} if arch in AUX_MIN_SIZE else {}
    model = torchvision.models.get_model(arch, weights=None, **options)
    if arch.startswith("mnasnet"):  # made for ImageNet's long epochs, its averages hardly move: 3e-4 a step
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.1
    return model


def heads(model):
    """Names of the layers with 1000 outputs: the classifier, and those of the auxiliary heads.

    This one rule finds the head of every classifier in torchvision, whatever it is called there
    (fc, classifier.6, heads.head, SqueezeNet's 1x1 convolution); the main head comes last.
    """
    outputs = {nn.Linear: "out_features", nn.Conv2d: "out_channels"}
    return [name for name, layer in model.named_modules()
            if type(layer) in outputs and getattr(layer, outputs[type(layer)]) == 1000]


def build(arch, num_classes, size=None, weights="none"):
    """A network with a new, randomly initialised head of `num_classes` outputs.

    weights: "none" (random), "imagenet" (torchvision's, or an error that says which file goes where;
    never random ones instead) or a file: a checkpoint of ours or a plain state_dict of the same arch.
    size: the films' side in pixels; a network that cannot take it is refused here, not mid-training.
    """
    aux = arch in AUX_MIN_SIZE and (size is None or size >= AUX_MIN_SIZE[arch])
    model = bare_network(arch, aux)
    # Inception and GoogLeNet learned on (x - 0.5) / 0.5, and say so in a flag that no state_dict holds.
    model.transform_input = weights == "imagenet" and arch in AUX_MIN_SIZE
    if weights != "none":
        path = imagenet_file(arch) if weights == "imagenet" else checkpoint_file(weights)
        content = read_weights(path)
        load_body(model, content.get("model", content), arch, path)
        model.transform_input |= content.get("facts", {}).get("transform_input", False)
    replace_heads(model, num_classes)
    if size is not None:
        refuse_impossible_size(model, arch, size)
    model.facts = dict(arch=arch, num_classes=num_classes, size=size, aux=aux, input="film",
                       transform_input=model.transform_input)
    return model


def replace_heads(model, num_classes):
    if not heads(model):
        raise UserError("a layer with 1000 outputs needed at the network's end, to be replaced, found none: "
                        "give the network one")
    model.head_name = heads(model)[-1]  # remembered, because afterwards it has 1000 outputs no more
    for name in heads(model):
        old = model.get_submodule(name)
        linear = isinstance(old, nn.Linear)
        model.set_submodule(name, nn.Linear(old.in_features, num_classes) if linear
                            else nn.Conv2d(old.in_channels, num_classes, old.kernel_size))


def refuse_impossible_size(model, arch, size):
    def takes(side):
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, side, side))
            return True
        except (RuntimeError, AssertionError):
            return False

    model.eval()
    if not takes(size):
        possible = [s for s in (32, 48, 64, 80, 96, 112, 128, 160, 224, 299) if takes(s)]
        raise UserError(f"{arch} cannot read films of {size} x {size} pixels; of the usual sizes it takes "
                        f"{', '.join(map(str, possible))}: choose one with --size")
    model.train()


def read_weights(path):
    """Tensors and plain values only: with weights_only a file cannot run code while it is read.

    Such a file is a zip, with a checksum for each of its parts that torch writes, but does not look at.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict) and "format" in content:  # ours
            with zipfile.ZipFile(path) as file:
                if spoiled := file.testzip():
                    raise ValueError(f"the checksum of {spoiled} is another")
    except FileNotFoundError:
        raise UserError(f"weights needed at {path}, found no such file: check the path, or train that run "
                        f"first") from None
    except Exception as error:  # torch.load fails in many ways, and says much: its first line is enough
        why = (str(error) or "it ends too soon").splitlines()[0][:80]
        raise UserError(f"{path} is not a readable file of weights, it may be damaged or come from another "
                        f"program ({why}): train or fetch it anew") from None
    for named in (content, content.get("model", content) if isinstance(content, dict) else {}):
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
            raise UserError(f"named tensors needed in {path}, found a {type(named).__name__}: give another")
    return content


def load_body(model, state, arch, source):
    """Load everything but the heads, which are about to be replaced."""
    skip = tuple(f"{name}." for name in heads(model))
    if "densenet" in arch:  # torchvision's files still say norm.1 where the code says norm1
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", k): v for k, v in state.items()}
    for name in [name for name in state if name.startswith(skip)]:
        del state[name]  # in place, for torchvision reads old files by a version noted in this very dict
    try:
        wrong = sum(model.load_state_dict(state, strict=False), [])  # names missing here or there
    except RuntimeError as error:
        wrong = str(error).splitlines()[1:]  # shapes that differ
    # What either may lack: auxiliary heads, a counter that old files do not have, what a ResNet's file
    # does not know of an SE-ResNet.
    wrong = [w for w in wrong if not w.startswith((*skip, *AUX_NAMES))
             and not w.endswith("num_batches_tracked") and not (arch in SE_RESNETS and ".se." in w)]
    if wrong:
        raise UserError(f"{source} does not hold the weights of {arch}: {len(wrong)} names or shapes differ, "
                        f"{wrong[0].strip()} for one; give the file that belongs to this --arch")


def imagenet_file(arch):
    """The path of torchvision's ImageNet weights, downloaded if need be, its hash checked every time:
    torchvision does so only while downloading, and not when a file was put there by hand."""
    try:
        kinds = torchvision.models.get_model_weights(arch.removeprefix("se"))  # an SE-ResNet takes a ResNet's
    except ValueError:
        raise UserError(f"ImageNet weights of {arch} needed, torchvision has none: give --weights none, or a "
                        f"file") from None
    url = getattr(kinds, "IMAGENET1K_V1", kinds.DEFAULT).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    wanted = path.stem.rsplit("-", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=wanted)
        except (OSError, RuntimeError) as error:  # RuntimeError: it came with another hash
            raise UserError(f"ImageNet weights of {arch} needed, {url} could not be fetched ({error}): "
                            f"put the file at {path}, or start from random ones: --recipe scratch") from None
    found = file_hash(path)
    if not found.startswith(wanted):
        raise UserError(f"{path} should have a SHA-256 that begins with {wanted}, found {found[:8]}: "
                        f"the file is damaged or not what its name says; fetch {url} anew")
    return path


def forward(model, images):
    """logits (B, C) and a list of the auxiliary heads' logits (empty in eval mode, and mostly)."""
    if getattr(model, "facts", {}).get("input") == "residual":
        images = residuals(images)
    out = model(images)
    if isinstance(out, torch.Tensor):
        return out.flatten(1), []  # SqueezeNet ends in 1x1 maps
    return out[0], [aux for aux in out[1:] if aux is not None]


def residuals(images):
    """Noise residuals (SRM, Fridrich & Kodovsky 2012; arXiv 2406.08837): (B, 3, H, W) in [-1, 1].

    Predicted minus pixel, divided by c, rounded and cut at 2: predicted from one neighbour (c = 1), from the
    two on either side (order 2, c = 3), both the least over directions, and from all eight (order 4, c = 6).
    """
    x = 255 * (images[:, :1] * STD[0] + MEAN[0])  # grey levels again
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    near = {(i, j): padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)}
    right, left, up, down = (near[place] for place in ((1, 2), (1, 0), (0, 1), (2, 1)))
    corners = near[0, 0] + near[0, 2] + near[2, 0] + near[2, 2]
    first = torch.stack([right, left, up, down]).amin(0) - x
    second = torch.minimum(right + left, up + down) - 2 * x
    square = 2 * (right + left + up + down) - corners - 4 * x
    return torch.cat([(r / c).round().clamp(-2, 2) / 2 for r, c in ((first, 1), (second, 3), (square, 6))], 1)


def split(model, finetune):
    """The part that learns: everything ("all"), the block that holds the head ("fc": three layers in AlexNet
    and VGG, the head itself in most others), or the new head alone ("head").

    The rest is frozen here, and put in eval mode: without gradients BatchNorm would still move its
    averages, and dropout still drop.
    """
    if finetune == "all":
        return model
    head, block = (model.get_submodule(n) for n in (model.head_name, model.head_name.split(".")[0]))
    whole_block = isinstance(block, nn.Sequential) and (finetune == "fc" or block[-1] is not head)
    tail = block if whole_block else head  # in SqueezeNet pooling follows the head: part of the tail
    model.requires_grad_(False).eval()
    for layer in tail.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()  # arXiv 2406.08837: "initialised anew", all three of AlexNet's
    return tail.requires_grad_(True)


def features(model, tail, images):
    """What reaches `tail` when `model` reads the images: the input of the part that learns."""
    caught = []
    with tail.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0])):
        forward(model, images)  # the tail runs too, for nothing: a few products against a whole network
    return caught[0]


def frozen_hash(model):
    """What a table of features was made with: a hash of all that does not learn, BatchNorm's averages too."""
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    digest = hashlib.sha256(str([model.facts["transform_input"], model.facts["input"]]).encode())
    for name, value in model.state_dict().items():
        if name not in learning and not name.startswith(AUX_NAMES):  # which do not run in eval mode
            digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


def cost(model, size):
    """Parameters (auxiliary heads' apart), multiply-adds of one film, depth, and megabytes of weights.

    Multiply-adds are half the operations that FlopCounterMode counts: convolutions and matrix products, as
    in torchvision's own figures. Depth is the number of Conv2d and Linear layers.
    """
    was_training = model.training
    model.eval()  # so that auxiliary heads do not run
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        # With a gradient, and attention as plain products: its short cuts are not counted by every torch.
        model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device, requires_grad=True))
    model.train(was_training)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    auxiliary = sum(n for name, n in sizes.items() if name.startswith(AUX_NAMES))
    return {
        "parameters": sum(sizes.values()) - auxiliary,
        "auxiliary_parameters": auxiliary,
        "multiply_adds": counter.get_total_flops() // 2,
        "depth": sum(isinstance(layer, (nn.Conv2d, nn.Linear)) for name, layer in model.named_modules()
                     if not f"{name}.".startswith(AUX_NAMES)),
        "megabytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6,
    }


class Reader(nn.Module):
    """A network with its normalisation: films as bytes in, logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, films):
        return forward(self.model, prepare(films, films.device))[0]


def exported(model, size):
    """The network and its normalisation as a program of torch.export, for any number of films."""
    reader = Reader(model).eval()
    films = torch.zeros(2, 1, size, size, dtype=torch.uint8, device=next(model.parameters()).device)
    try:
        return torch.export.export(reader, (films,), dynamic_shapes=({0: torch.export.Dim("films")},))
    except Exception as error:  # whatever torch.export cannot follow; its first line is enough
        raise UserError(f"a network that torch.export can follow needed, found one that it cannot "
                        f"({repr(error).splitlines()[0][:80]}): take best.pt instead") from None


def checkpoint_file(path):
    """A run's folder stands for its best.pt."""
    return Path(path) / "best.pt" if Path(path).is_dir() else Path(path)


def save_checkpoint(path, model, **facts):
    """Weights, and whatever is needed to rebuild the network and to judge it: plain values only."""
    content = {"format": FORMAT, "model": model.state_dict(), "facts": {**model.facts, **facts}}
    with atomic(path) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(str(error).splitlines()[0]) from None


def load_checkpoint(path):
    """model, facts: the network rebuilt from its own facts, in eval mode and without gradients."""
    path = checkpoint_file(path)
    content = read_weights(path)
    if content.get("format") != FORMAT or not {"model", "facts"} <= content.keys():
        raise UserError(f"a checkpoint of this project, format {FORMAT}, needed in {path}, found format "
                        f"{content.get('format')}: update the code if that is higher, or train it anew")
    facts = content["facts"]
    model = bare_network(facts["arch"], facts["aux"])
    replace_heads(model, facts["num_classes"])
    model.transform_input = facts["transform_input"]
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {facts['arch']}, the network it names "
                        f"({str(error).splitlines()[1].strip()}): it is damaged") from None
    model.facts = facts
    return model.eval().requires_grad_(False), facts

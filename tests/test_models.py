"""What networks must be after a new head, after freezing, and after a trip through a file."""

import copy
import hashlib
import http.server
import inspect
import re
import threading
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import data
import models
from data import UserError, prepare

CPU = torch.device("cpu")
NETWORKS = ["inception_v3", "alexnet", "resnet18", "googlenet", "densenet121", "squeezenet1_1",
            "mnasnet0_5", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "regnet_y_400mf"]


def small(classes=2, size=32, **more):
    return models.build("squeezenet1_1", classes, size, **more)


def refused(call, *args, **options):
    """What a UserError says: one line."""
    with pytest.raises(UserError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- a network with a new head


@pytest.mark.parametrize("arch", NETWORKS)
def test_every_network_has_one_logit_a_class(arch):
    model = models.build(arch, 3, size=80).eval()
    with torch.no_grad():
        logits, aux = models.forward(model, torch.randn(2, 3, 80, 80))
    assert logits.shape == (2, 3) and aux == []
    assert not any(getattr(layer, "out_features", 0) == 1000 for layer in model.modules())


def test_the_head_is_found_in_every_family():
    """The families are those of torchvision's classifiers."""
    families = {}
    for arch in torchvision.models.list_models(module=torchvision.models):
        families[inspect.getmodule(torchvision.models.get_model_builder(arch))] = arch
    del families[torchvision.models.regnet]  # whose initialisation cannot run without memory: see above
    for arch in families.values():
        with torch.device("meta"):
            model = models.bare_network(arch, aux=True)
            models.replace_heads(model, 2)
        assert len(model.head_names) == {"inception_v3": 2, "googlenet": 3}.get(arch, 1), arch


def test_parameter_counts_are_the_published_ones():
    """The networks have two classes."""
    for arch, size, count in (("alexnet", 64, 57_012_034), ("resnet18", 64, 11_177_538),
                              ("inception_v3", 80, 21_789_666), ("inception_v3", 299, 24_348_900)):
        with torch.device("meta"):
            assert sum(p.numel() for p in models.build(arch, 2, size).parameters()) == count


def test_small_images_have_no_auxiliary_heads():
    """Images that are large enough have them."""
    model = models.build("inception_v3", 2, size=299).train()
    with torch.no_grad():
        logits, aux = models.forward(model, torch.randn(2, 3, 299, 299))
    assert logits.shape == (2, 2) and [a.shape for a in aux] == [(2, 2)]
    assert models.build("inception_v3", 2, size=298).AuxLogits is None
    model = models.build("googlenet", 2, size=64).train()
    assert len(models.forward(model, torch.randn(2, 3, 64, 64))[1]) == 2
    assert models.forward(models.build("googlenet", 2, size=63).train(), torch.randn(2, 3, 63, 63))[1] == []


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "mnasnet0_5", "resnet18"])
def test_batchnorm_averages_follow_within_ten_steps(arch):
    """MNASNet's momentum of 0.0003 and MobileNetV3's of 0.01 are raised, torch's default of 0.1 stays."""
    layers = [layer for layer in models.build(arch, 2, 64).modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(layers) > 9 and {layer.momentum for layer in layers} == {0.1}


@pytest.mark.parametrize("arch", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_negative_logits_are_possible(arch):
    """In torchvision's SqueezeNet, a ReLU follows the head: a logit below 0 becomes 0 and has no gradient."""
    model = models.build(arch, 2, size=80).eval()
    head = model.get_submodule(model.head_names[-1])
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, -1.0)
    logits, _ = models.forward(model, torch.randn(2, 3, 80, 80))
    logits.sum().backward()
    assert logits.allclose(torch.tensor(-1.0)) and head.bias.grad.allclose(torch.tensor(2.0))


@pytest.mark.parametrize("arch, size, says", [
    ("squeezenet1_1", 16, "Output size is too small"), ("inception_v3", 74, "Calculated padded input size"),
])
def test_a_size_too_small_for_a_network_is_refused(arch, size, says):
    """The message has torch's reason."""
    said = refused(models.build, arch, 2, size)
    assert said.startswith(f"{arch} cannot take {size} x {size} images; choose a size")
    assert says in said


def test_an_unknown_network_is_refused_with_what_is_expected():
    said = refused(models.build, "alexnett", 2, 64)
    assert "no network is called alexnett: see torchvision's, or models.NETWORKS" in said


class Own(nn.Module):
    def __init__(self, outputs=1000):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Linear(4, outputs)

    def forward(self, x):
        return self.last(self.body(x).mean((2, 3)))


def test_a_network_of_your_own_is_saved_and_loaded(monkeypatch):
    """It is built, frozen, saved and loaded by its name."""
    monkeypatch.setitem(models.NETWORKS, "own", Own)
    model = models.build("own", 3, 32)
    trainable = models.freeze(model, "head")
    assert trainable is model.last and model.last.out_features == 3
    models.save_checkpoint("own.pt", model.eval())
    again, facts = models.load_checkpoint("own.pt")
    images = torch.randn(2, 3, 32, 32)
    assert facts["arch"] == "own" and torch.equal(again(images), model(images))
    started = models.build("own", 2, 32, weights="own.pt")
    assert same(started.body.state_dict(), model.body.state_dict())


def test_a_network_without_a_layer_of_1000_outputs_is_refused(monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "ten", lambda: Own(10))
    said = refused(models.build, "ten", 2, 32)
    assert said == "Own has no layer of 1000 outputs: build it with one"


# ---- freezing


@pytest.mark.parametrize("arch, finetune, learning", [
    ("alexnet", "fc", 54_542_338), ("alexnet", "head", 8_194), ("googlenet", "head", 2_050),
    ("resnet18", "fc", 1_026), ("squeezenet1_1", "head", 1_026),
])
def test_which_parameters_freezing_leaves(arch, finetune, learning):
    with torch.device("meta"):
        model = models.build(arch, 2, 64)
        trainable = models.freeze(model, finetune)
    assert sum(p.numel() for p in trainable.parameters()) == learning
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == learning


@pytest.mark.parametrize("finetune", ["all", "fc", "head"])
def test_freezing_only_freezes_no_weight_changes_by_it(finetune):
    model = models.build("mobilenet_v3_small", 2, 32)
    before = copied(model)
    trainable = models.freeze(model, finetune)
    assert same(before, model.state_dict())
    inside = {id(layer) for layer in trainable.modules()}
    for layer in model.modules():
        is_trainable = finetune == "all" or id(layer) in inside
        assert all(p.requires_grad == is_trainable for p in layer.parameters(recurse=False))
        assert is_trainable or not layer.training  # BatchNorm's averages and dropout rest as well


@pytest.mark.parametrize("arch", ["alexnet", "googlenet", "shufflenet_v2_x0_5", "squeezenet1_1", "densenet121"])
def test_features_give_the_same_logits_as_images(arch):
    model = models.build(arch, 2, 64).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for finetune in ("fc", "head"):
        trainable = models.freeze(model, finetune)
        model.eval()
        with torch.no_grad():
            whole, parts = model(images), trainable(models.features(model, trainable, images))
        assert torch.allclose(whole, parts.flatten(1), rtol=0, atol=1e-12)
        assert not trainable._forward_pre_hooks


def test_features_use_no_dropout_and_move_no_average():
    model = models.build("googlenet", 2, 64)
    trainable = models.freeze(model, "head")
    trainable.train()  # as the loop does
    before = copied(model)
    a, b = (models.features(model, trainable, torch.ones(2, 3, 64, 64)) for _ in range(2))
    assert torch.equal(a, b) and same(before, model.state_dict())


# ---- checkpoints


def test_a_checkpoint_gives_the_same_logits_and_facts(tmp_path):
    """The network comes back frozen and in eval mode."""
    model = models.build("shufflenet_v2_x0_5", 3, 64).eval()
    models.save_checkpoint(tmp_path / "best.pt", model, classes=["a", "b", "c"], epoch=4)
    again, facts = models.load_checkpoint(tmp_path)  # its folder
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), model(images))
    assert (facts["classes"], facts["epoch"], facts["arch"]) == (["a", "b", "c"], 4, "shufflenet_v2_x0_5")
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_the_hash_of_weights_depends_on_the_weights_alone():
    model = small()
    state, digest = model.state_dict(), models.weights_hash(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    last = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    models.save_checkpoint("a.pt", model, epoch=1, last=None)
    models.save_checkpoint("b.pt", model, epoch=2, last=last)
    torch.save(dict(reversed(state.items())), "plain.pth")
    assert len({Path(name).stat().st_size for name in ("a.pt", "b.pt", "plain.pth")}) == 3
    for name in ("a.pt", "b.pt", "plain.pth"):
        assert models.weights_hash(models.read_weights(name)["model"]) == digest
    model.to(memory_format=torch.channels_last)
    assert models.weights_hash(model.state_dict()) == digest
    for name, value in state.items():
        changed = value.clone()
        changed.view(-1)[-1] += 0.01
        assert models.weights_hash({**state, name: changed}) != digest, name
    a, b = torch.zeros(2), torch.ones(2)
    pairs = [{"a": a, "b": b}, {"a": b, "b": a}, {"b": a, "c": b}, {"a": a[:, None], "b": b}]
    assert len({models.weights_hash(pair) for pair in pairs}) == 4


def test_transform_input_survives_save_and_load():
    model = models.build("googlenet", 2, 64).eval()
    model.transform_input = model.facts["transform_input"] = True
    models.save_checkpoint("a.pt", model)
    again, _ = models.load_checkpoint("a.pt")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images), model(images))
    again.transform_input = False
    assert not torch.equal(again(images), model(images))


def test_plain_facts_survive_save_and_load():
    args = {"lr": 0.1, "teacher": ["a"], "clip": None}
    models.save_checkpoint("a.pt", small(), flags=args, history=[{"a": 1.0}])
    _, facts = models.load_checkpoint("a.pt")
    assert facts["flags"] == args and facts["history"] == [{"a": 1.0}]


class Bomb:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('exploded').touch()",))


def save_run_without(*names, model):
    """Write x.pt, a run's checkpoint that lacks some facts."""
    config = {"train": "", "epochs": 1}
    facts = {**model.facts, **dict.fromkeys(models.RUN_FACTS, 1), "config": config, "history": [{}], "last": None}
    facts = {name: value for name, value in facts.items() if name not in names}
    torch.save({"format": models.FORMAT, "model": model.state_dict(), "facts": facts}, "x.pt")


def test_code_in_a_checkpoint_does_not_run(monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")  # the one for torchvision: here none is needed
    torch.save({"format": models.FORMAT, "model": small().state_dict(), "facts": {"config": Bomb()}}, "x.pt")
    for read in (models.load_checkpoint, models.load_run, models.read_weights):
        assert "x.pt is not a readable file" in refused(read, "x.pt")
    assert "x.pt is not a readable file" in refused(small, weights="x.pt")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content, says", [
    (b"", "not a readable file"),
    (b"PK\x03\x04 truncated", "not a readable file"),
    ({"a": torch.zeros(1)}, "not a checkpoint of this project"),
    ({0: torch.zeros(1)}, "not a readable file of weights.*no names"),
    ({"format": models.FORMAT}, "not a checkpoint of this project"),
    ({"format": models.FORMAT, "model": {}, "facts": {}}, "not a checkpoint of this project"),
    ({"model": torch.zeros(1)}, "not a readable file of weights"),
    ([torch.zeros(1)], "not a readable file of weights"),
    (torch.zeros(1), "not a readable file of weights"),
    ({"format": 99, "model": {}, "facts": {}}, "format 99, this code reads 6.*train it again"),
    ({"format": 5, "model": {}, "facts": {}}, "format 5, this code reads 6.*train it again"),
    (None, "No such file: .*x.pt. Train that run first"),
])
def test_what_is_no_checkpoint_is_refused(content, says):
    if isinstance(content, bytes):
        Path("x.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, "x.pt")
    assert re.search(says, refused(models.load_checkpoint, "x.pt"))


def test_a_run_that_lacks_a_fact_is_refused_with_its_name():
    model = small()
    save_run_without(model=model)
    assert models.load_run("x.pt")[1].keys() >= {*models.RUN_FACTS}
    for name in models.RUN_FACTS:
        save_run_without(name, model=model)
        said = refused(models.load_run, "x.pt")
        assert said.startswith("x.pt was not made by train.py") and name in said
    save_run_without("config", "epoch", model=model)
    assert "config, epoch missing" in refused(models.load_run, "x.pt")


@pytest.mark.parametrize("name", ["arch", "num_classes", "aux", "transform_input"])
def test_a_checkpoint_that_lacks_a_fact_is_refused(name):
    """The message names the fact."""
    models.save_checkpoint("x.pt", small())
    content = torch.load("x.pt", weights_only=True)
    del content["facts"][name]
    torch.save(content, "x.pt")
    said = refused(models.load_checkpoint, "x.pt")
    assert "x.pt is not a checkpoint of this project" in said and name in said


@pytest.mark.parametrize("done, stop_at, last, says", [
    (3, None, None, ""), (2, None, {}, "2 of 3"), (1, 0.8, None, "stopped at 0.8"), (1, 0.8, {}, "1 of 3"),
    (3, 0.8, None, ""),
])
def test_the_state_of_a_run(done, stop_at, last, says):
    """It follows from the epochs that are done and from whether there is something to resume from."""
    config = {"stop_at": stop_at, "epochs": 3}
    state = models.state_of({"history": [{}] * done, "config": config, "last": last})
    assert says in state if says else state == ""


@pytest.mark.parametrize("seen, classes, says", [
    (["a1"], ["x", "y"], ""), (["v1"], ["x", "y"], "trained on v1"), (["v.png"], ["x", "y"], "v.png"),
    (["t1"], ["x", "y"], "trained on t1"), (["t.png"], ["x", "y"], "t.png"), ([], ["y", "x"], "classes"),
])
def test_a_foreign_network_is_refused(seen, classes, says):
    images = SimpleNamespace(classes=["x", "y"], source="xr", test_groups={"t1", "t.png"},
                             val=SimpleNamespace(groups=["v1"], ids=["v.png"]))
    facts = {"seen_groups": seen, "classes": classes}
    if says:
        assert says in refused(models.refuse_foreign, "teacher", facts, images)
    else:
        models.refuse_foreign("teacher", facts, images)


# ---- weights from elsewhere


def test_when_the_head_of_a_run_is_kept():
    """It is kept if the number of classes is the same. Otherwise it is random."""
    source = small(classes=3)
    models.save_checkpoint("run.pt", source)
    for classes in (3, 2):
        torch.manual_seed(1)
        model = small(classes, weights="run.pt")
        torch.manual_seed(1)
        random = small(classes)
        assert same(model.features.state_dict(), source.features.state_dict())
        assert same(model.classifier.state_dict(), (source if classes == 3 else random).classifier.state_dict())


def test_a_file_fills_everything_but_the_new_head():
    source = small(classes=3)
    models.save_checkpoint("ours.pt", source)
    torch.save(source.state_dict(), "plain.pth")
    for file in ("ours.pt", "plain.pth"):
        model = small(classes=2, weights=file)
        assert model.classifier[1].out_channels == 2
        assert same(model.features.state_dict(), source.features.state_dict())
        assert model.facts["first_weights"] == models.weights_hash(source.state_dict())


def test_plain_googlenet_weights_transform_their_input():
    """Torchvision made them for other inputs. A checkpoint of ours records which input it expects."""
    source = models.build("googlenet", 2, 64)
    assert source.transform_input is False  # random weights were made for nothing
    torch.save(source.state_dict(), "plain.pth")
    model = models.build("googlenet", 2, 64, weights="plain.pth")
    assert model.transform_input is True and model.facts["transform_input"] is True
    for said in (False, True):
        source.facts["transform_input"] = said
        models.save_checkpoint("ours.pt", source)
        ours = models.build("googlenet", 2, 64, weights="ours.pt")
        assert ours.transform_input is said and ours.facts["transform_input"] is said


def test_other_plain_weights_leave_the_input_alone():
    torch.save(small().state_dict(), "plain.pth")
    model = small(weights="plain.pth")
    assert model.transform_input is False and model.facts["transform_input"] is False


def test_first_weights_remember_their_patients():
    """Their patients are kept in the file."""
    models.save_checkpoint("a.pt", small(), seen_groups=["patient7"])
    assert small(classes=3, weights="a.pt").facts["seen_groups"] == ["patient7"]
    assert small(classes=3).facts["seen_groups"] == []


def test_mnasnets_weights_load_by_their_version():
    """torchvision stores the version in them."""
    source = models.build("mnasnet0_5", 3, 64)
    models.save_checkpoint("ours.pt", source)
    torch.save(source.state_dict(), "plain.pth")
    for file in ("ours.pt", "plain.pth"):
        model = models.build("mnasnet0_5", 2, 64, weights=file)
        assert torch.equal(model.layers[0].weight, source.layers[0].weight)


def test_weights_of_another_network_are_refused():
    models.save_checkpoint("a.pt", small())
    said = refused(models.build, "resnet18", 2, 64, weights="a.pt")
    assert "a.pt does not hold the weights of resnet18; give a file of this --arch" in said
    torch.save({**small().state_dict(), "one.more": torch.zeros(1)}, "b.pth")
    assert "1 names differ, such as one.more" in refused(small, weights="b.pth")


def test_weights_for_residuals_are_refused_for_images():
    models.save_checkpoint("a.pt", small(reads="residual"))
    assert "a.pt needs --input residual. Add that flag" in refused(small, weights="a.pt")
    assert small(weights="a.pt", reads="residual").facts["from_run"]


# ---- ImageNet's weights, as torchvision publishes them


def published(arch):
    """What torchvision knows of a file of weights, and its name there."""
    kind = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
    return kind, kind.url.rsplit("/", 1)[1]


def bare_state(arch):
    """The tensors of such a file, made here; like the oldest, without BatchNorm's counters."""
    state = models.bare_network(arch, aux=True).state_dict()
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """The folder in which torchvision keeps what it has fetched; here it never fetches anything."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, *_, **__: pytest.fail(f"fetched {url}"))
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's oldest format
@pytest.mark.parametrize("as_zip", [False, True], ids=["as it is", "as torch zipped files once"])
def test_code_in_a_file_of_imagenet_weights_does_not_run(downloaded, as_zip):
    path = downloaded / published("squeezenet1_1")[1]
    torch.save({"features.0.weight": Bomb()}, path, _use_new_zipfile_serialization=not as_zip)
    if as_zip:
        path.rename("inner.pth")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write("inner.pth")
    said = refused(small, weights="imagenet")
    assert f"Put that file at {path}" in said and "--weights none" in said
    assert not Path("exploded").exists()


def test_imagenet_weights_put_there_by_hand_are_used(downloaded):
    state = bare_state("squeezenet1_1")
    torch.save(state, downloaded / published("squeezenet1_1")[1])
    model = small(weights="imagenet")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items()
               if name.startswith("features"))
    assert model.classifier[1].out_channels == 2 and model.facts["body_loaded"]
    assert model.facts["first_weights"] == models.weights_hash(state)  # heads included


def test_inceptions_weights_convert_its_input(downloaded):
    """Small images do without its auxiliary head."""
    state, name = bare_state("inception_v3"), "Mixed_7c.branch1x1.conv.weight"
    path = downloaded / published("inception_v3")[1]
    torch.save(state, path)
    for weights in ("imagenet", str(path)):  # the very file, whoever made it
        model = models.build("inception_v3", 2, 80, weights=weights)
        assert model.AuxLogits is None and model.transform_input and model.facts["transform_input"]
        assert torch.equal(model.state_dict()[name], state[name])


def test_densenets_old_names_are_understood(downloaded):
    state = bare_state("densenet121")
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, downloaded / published("densenet121")[1])
    model = models.build("densenet121", 2, 64, weights="imagenet")
    name = "features.denseblock1.denselayer1.norm1.weight"
    assert torch.equal(model.state_dict()[name], state[name])


def test_imagenet_weights_and_a_file_give_equal_heads(downloaded):
    """The random heads are equal."""
    path = downloaded / published("resnet18")[1]
    torch.save(bare_state("resnet18"), path)
    made = []
    for weights in ("imagenet", str(path)):
        torch.manual_seed(0)
        made.append((copied(models.build("resnet18", 2, 32, weights=weights)), torch.rand(1)))
    assert same(made[0][0], made[1][0]) and made[0][1] == made[1][1]  # and what is drawn next


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    handler = partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever).start()
        yield tmp_path / "served", f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


@pytest.mark.parametrize("truthful", [True, False])
def test_downloaded_weights_must_match_their_hash(truthful, server, tmp_path, monkeypatch):
    """The hash is part of their name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder, address = server
    state = bare_state("squeezenet1_1")
    torch.save(state, folder / "weights")
    digest = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()[:8] if truthful else "0" * 8
    name = (folder / "weights").rename(folder / f"squeezenet1_1-{digest}.pth").name
    monkeypatch.setattr(published("squeezenet1_1")[0].value, "url", f"{address}/{name}")
    path = tmp_path / "torch/hub/checkpoints" / name
    if truthful:
        assert torch.equal(small(weights="imagenet").features[0].weight, state["features.0.weight"])
        assert path.exists()
    else:
        assert "could not be fetched or is damaged" in refused(small, weights="imagenet")
        assert not path.exists()


def test_offline_the_error_says_where_imagenet_weights_go(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(published("squeezenet1_1")[0].value, "url", "http://127.0.0.1:9/a-b8a52dc0.pth")
    path = tmp_path / "torch/hub/checkpoints/a-b8a52dc0.pth"
    said = refused(small, weights="imagenet")
    assert f"Put that file at {path}" in said and "--weights none" in said


def test_a_network_without_published_weights_is_refused(monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "mine", Own)
    said = refused(models.build, "mine", 2, 32, weights="imagenet")
    assert "torchvision has no ImageNet weights of mine; use --weights none or a file" in said


# ---- residuals


def rounded(numerator, denominator):
    """numerator / denominator to the nearest integer, of two equally near the even one: by integers alone."""
    down, rest = np.divmod(numerator, denominator)
    return down + ((2 * rest > denominator) | ((2 * rest == denominator) & (down % 2 == 1)))


def residuals_by_integers(image):
    """(3, H, W) twice the residuals of a uint8 image (H, W): predicted minus pixel, divided, rounded, cut."""
    x = np.pad(image.astype(np.int64), 1, mode="edge")
    c, up, down = x[1:-1, 1:-1], x[:-2, 1:-1], x[2:, 1:-1]
    left, right = x[1:-1, :-2], x[1:-1, 2:]
    corners = x[:-2, :-2] + x[:-2, 2:] + x[2:, :-2] + x[2:, 2:]
    first = np.minimum.reduce([left, right, up, down]) - c
    second = np.minimum(left + right, up + down) - 2 * c
    square = 2 * (left + right + up + down) - corners - 4 * c
    return np.stack([first, rounded(second, 3), rounded(square, 6)]).clip(-2, 2)


def test_residuals_equal_integer_arithmetic():
    """This includes pixels with two equally near values."""
    smooth = data.phantoms(2, 64, seed=5)[0]
    noise = torch.randint(100, 130, (1, 1, 64, 64), dtype=torch.uint8)
    images = torch.cat([smooth, noise])
    ours = models.residuals(prepare(images, CPU))
    by_integers = np.stack([residuals_by_integers(image) for image in images[:, 0].numpy()])
    assert np.array_equal(2 * ours.numpy(), by_integers)
    assert len(np.unique(by_integers[:, 2])) > 3  # something was there to be rounded


def test_a_residual_network_computes_residuals_however_it_is_called():
    model = models.build("resnet18", 2, 32, reads="residual").eval()
    x = prepare(torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8), CPU)
    bare = copy.deepcopy(model)
    bare._forward_pre_hooks.clear()
    wanted = bare(models.residuals(x))
    assert not torch.allclose(wanted, bare(x))
    models.save_checkpoint("a.pt", model)
    for network in (model, models.load_checkpoint("a.pt")[0], copy.deepcopy(model)):
        assert torch.equal(network(x), wanted) and torch.equal(models.forward(network, x)[0], wanted)
    trainable = models.freeze(model, "head")
    assert torch.equal(trainable(models.features(model, trainable, x)), wanted)


def test_grad_cam_of_a_densenet_that_reads_residuals_is_cam():
    """CAM by hand: the classifier's weights times the maps that its pooling averages."""
    model = models.build("densenet121", 2, 64, reads="residual").eval()
    x, target = prepare(data.phantoms(2, 64, seed=1)[0], CPU), torch.tensor([1, 0])
    with torch.no_grad():
        model.features.norm5.bias.normal_()  # about half of what norm5 returns is negative
        maps = F.relu(model.features(models.residuals(x)))
        cam = torch.einsum("nk,nkhw->nhw", model.classifier.weight[target], maps).relu()
    wanted = F.interpolate(cam[:, None], size=64, mode="bilinear")[:, 0]
    wanted = wanted / wanted.amax((1, 2), keepdim=True)
    assert torch.allclose(models.grad_cam(model, x, target), wanted, atol=1e-5) and wanted.std() > 0.01


# ---- precomputed outputs, cost


def test_a_source_of_a_tensor_returns_its_rows_as_float32():
    rows = torch.randn(5, 7, dtype=torch.float16)
    found = models.from_tensor(rows, CPU)(torch.tensor([4, 0, 4]))
    assert torch.equal(found, rows[[4, 0, 4]].float()) and found.dtype == torch.float32


def precomputed(images, network, key="k"):
    """Return the source and the files in the folder afterwards."""
    source = models.precompute(models.from_images(images, CPU, network), len(images), CPU, torch.float32,
                               Path("cache/logits"), key)
    return source, {*Path("cache").iterdir()}


def test_precomputed_outputs_are_computed_once_and_looked_up_by_row():
    images, calls = torch.randint(0, 256, (131, 1, 8, 8), dtype=torch.uint8), []

    def network(x):
        calls.append(len(x))
        return x[:, :2].mean((2, 3))

    rows = torch.tensor([130, 0, 64, 64])
    first, files = precomputed(images, network)
    again, same_files = precomputed(images, network)
    assert calls == [2, 64, 64, 3, 2] and files == same_files  # two rows name the file
    for source in (first, again):
        assert torch.allclose(source(rows), network(prepare(images[rows], CPU)), atol=1e-6)


@pytest.mark.parametrize("change", ["key", "mean", "deviation", "prepare", "residuals", "network"])
def test_precomputed_outputs_are_computed_anew_once_code_changes(change, monkeypatch):
    images = data.phantoms(3, 32, seed=1)[0]
    model = models.build("resnet18", 2, 32, reads="residual" if change == "residuals" else "image").eval()
    key, network = "k", model
    _, before = precomputed(images, network)
    if change in ("mean", "deviation"):
        name = {"mean": "MEAN", "deviation": "STD"}[change]
        monkeypatch.setattr(data, name, getattr(data, name) + torch.tensor([0, 0, 0.1]))
    elif change == "prepare":
        monkeypatch.setattr(models, "prepare", lambda *args: prepare(*args).flip(3))
    elif change == "residuals":
        real = models.residuals
        monkeypatch.setattr(models, "residuals", lambda x: real(x).clamp(max=0.5))
    elif change == "network":
        network = lambda x: model(x).softmax(1)  # noqa: E731
    else:
        key = "other pixels or weights"
    assert len(precomputed(images, network, key)[1] - before) == 1


def test_precompute_refuses_one_infinite_output_and_leaves_no_file():
    images = torch.zeros(70, 1, 4, 4, dtype=torch.uint8)
    images[69] = 255

    def network(x):
        return torch.cat([torch.ones(len(x), 1), torch.where(x[:, :1, 0, 0] > 0, torch.inf, 1.0)], 1)

    assert "not finite" in refused(precomputed, images, network)
    assert not [*Path("cache").iterdir()]
    assert precomputed(images[:69], network)[1]


def test_multiply_adds_include_attention():
    # ViT-B/32 at 224: 50 tokens of 768, 12 layers of 4 projections and 2 products of attention and an MLP
    # of 4 x 768, after the patches' convolution and before the head: torchvision publishes 4.41 G.
    with torch.device("meta"):
        model = models.bare_network("vit_b_32", aux=False)
    model = model.to_empty(device="cpu").requires_grad_(False)
    assert models.cost(model, 224)["multiply_adds"] == pytest.approx(4.41e9, rel=0.01)

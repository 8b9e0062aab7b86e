"""What networks must be after a new head, after freezing, and after a trip through a file."""

import hashlib
import re

import pytest
import torch

import models
import profile_gpu
import train
from data import UserError, prepare

OURS = [
    "inception_v3",
    "alexnet",
    "vgg11",
    "vgg16",
    "resnet18",
    "resnet34",
    "resnet50",
    "googlenet",
    "densenet121",
]
OTHERS = [
    "squeezenet1_1",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "shufflenet_v2_x0_5",
    "regnet_y_400mf",
]


@pytest.mark.parametrize("arch", OURS + OTHERS)
def test_every_network_answers_with_one_logit_a_class(arch):
    model = models.build(arch, 3, size=80).eval()
    with torch.no_grad():
        logits, aux = models.forward(model, torch.randn(2, 3, 80, 80))
    assert logits.shape == (2, 3) and aux == []
    assert not any(getattr(layer, "out_features", 0) == 1000 for layer in model.modules())


def test_the_head_of_every_classifier_in_torchvision_is_found():
    for arch in models.architectures():
        if not arch.startswith("regnet"):  # whose initialisation cannot run without memory
            with torch.device("meta"):
                names = models.heads(models.bare_network(arch, aux=True))
            assert len(names) == {"inception_v3": 2, "googlenet": 3}.get(arch, 1), arch


def test_parameter_counts_with_two_classes_are_the_published_ones():
    for arch, size, count in (
        ("alexnet", 64, 57_012_034),
        ("resnet18", 64, 11_177_538),
        ("inception_v3", 80, 21_789_666),
    ):
        assert sum(p.numel() for p in models.build(arch, 2, size).parameters()) == count


def test_auxiliary_heads_are_there_where_the_image_is_large_enough_and_only_there():
    model = models.build("inception_v3", 2, size=299).train()
    logits, aux = models.forward(model, torch.randn(2, 3, 299, 299))
    assert logits.shape == (2, 2) and [a.shape for a in aux] == [(2, 2)]
    assert sum(p.numel() for p in model.parameters()) == 24_348_900
    assert models.build("inception_v3", 2, size=298).AuxLogits is None
    model = models.build("googlenet", 2, size=64).train()
    assert len(models.forward(model, torch.randn(2, 3, 64, 64))[1]) == 2
    assert models.forward(models.build("googlenet", 2, size=63).train(), torch.randn(2, 3, 63, 63))[1] == []


@pytest.mark.parametrize("arch, size, says", [
    ("alexnet", 62, "Output size is too small"), ("inception_v3", 74, "Calculated padded input size"),
    ("vit_b_16", 112, "Wrong image height"),
])  # fmt: skip
def test_a_size_that_a_network_cannot_take_is_refused_in_one_line_with_torchs_reason(arch, size, says):
    with pytest.raises(UserError, match=f"{arch} cannot take images of {size} x {size} pixels.*--size") as error:
        models.build(arch, 2, size)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("script", [["--role", "teacher", "--arch"], []])
def test_an_unknown_network_is_answered_with_the_nearest_ones(script, capsys):
    with pytest.raises(SystemExit) as end:
        (train.get_args if script else profile_gpu.get_args)([*script, "alexnett"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "no network is called alexnett; near are alexnet" in said


# ---- freezing


@pytest.mark.parametrize("arch, finetune, learning", [
    ("alexnet", "fc", 54_542_338), ("alexnet", "head", 8_194), ("googlenet", "head", 2_050),
    ("resnet18", "fc", 1_026),
])  # fmt: skip
def test_freezing_leaves_exactly_the_stated_parameters_to_learn(arch, finetune, learning):
    model = models.build(arch, 2, 64)
    learner = models.freeze(model, finetune)
    assert sum(p.numel() for p in learner.parameters()) == learning
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == learning


@pytest.mark.parametrize(
    "arch", ["alexnet", "googlenet", "shufflenet_v2_x0_5", "squeezenet1_1", "densenet121"]
)
@pytest.mark.parametrize("finetune", ["fc", "head"])
def test_the_learner_makes_of_the_features_what_the_network_makes_of_the_image(arch, finetune):
    model = models.build(arch, 2, 64)
    learner = models.freeze(model, finetune)
    model.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole, parts = model(images), learner(models.features(model, learner, images))
    assert torch.allclose(whole, parts.flatten(1), atol=1e-5)
    assert not learner._forward_pre_hooks


def test_reading_features_moves_no_average_and_drops_nothing():
    model = models.build("googlenet", 2, 64)
    learner = models.freeze(model, "head")
    learner.train()  # as the loop does
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a, b = (models.features(model, learner, torch.ones(2, 3, 64, 64)) for _ in range(2))
    assert torch.equal(a, b)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_is_frozen_is_known_by_a_hash_that_its_averages_change_and_the_learner_does_not():
    model = models.build("resnet18", 2, 64)
    models.freeze(model, "head")
    before = models.frozen_hash(model)
    with torch.no_grad():
        model.fc.weight.add_(1)
    assert models.frozen_hash(model) == before
    for change in (lambda: model.bn1.running_mean.add_(1), lambda: model.bn1.running_var.mul_(2),
                   lambda: model.conv1.weight.data.mul_(2),
                   lambda: model.facts.update(input="residual"),
                   lambda: model.facts.update(transform_input=True)):  # fmt: skip
        known = models.frozen_hash(model)
        change()
        assert models.frozen_hash(model) != known


# ---- files


def test_a_checkpoint_gives_back_the_same_logits_facts_and_a_frozen_network_in_eval_mode(tmp_path):
    model = models.build("shufflenet_v2_x0_5", 3, 64).eval()
    models.save_checkpoint(tmp_path / "best.pt", model, classes=["a", "b", "c"], epoch=4)
    again, facts = models.load_checkpoint(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), model(images))
    assert (
        facts["classes"] == ["a", "b", "c"] and facts["epoch"] == 4 and facts["arch"] == "shufflenet_v2_x0_5"
    )
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_a_checkpoint_is_known_by_the_hash_of_its_bytes(tmp_path):
    models.save_checkpoint(tmp_path / "best.pt", models.build("squeezenet1_1", 2, 32), epoch=1)
    _, facts = models.load_checkpoint(tmp_path)
    assert facts["sha256"] == hashlib.sha256((tmp_path / "best.pt").read_bytes()).hexdigest()


def test_transform_input_survives_save_and_load(tmp_path):
    model = models.build("inception_v3", 2, 80).eval()
    model.transform_input = model.facts["transform_input"] = True
    models.save_checkpoint(tmp_path / "a.pt", model)
    again, _ = models.load_checkpoint(tmp_path / "a.pt")
    images = torch.randn(1, 3, 80, 80)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        again.transform_input = False
        assert not torch.equal(again(images), model(images))


def test_weights_from_a_file_fill_everything_but_the_new_head(tmp_path):
    source = models.build("inception_v3", 3, 80)
    source.transform_input = source.facts["transform_input"] = True
    models.save_checkpoint(tmp_path / "ours.pt", source)
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    for file in ("ours.pt", "plain.pth"):
        model = models.build("inception_v3", 2, 80, weights=str(tmp_path / file))
        assert model.fc.out_features == 2
        for name, value in source.state_dict().items():
            assert name.startswith("fc.") or torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("arch", ["inception_v3", "googlenet"])
def test_a_plain_state_dict_was_made_for_other_inputs_and_our_own_checkpoint_says_itself(arch, tmp_path):
    source = models.build(arch, 2, 80)
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    model = models.build(arch, 2, 80, weights=str(tmp_path / "plain.pth"))
    assert model.transform_input is True and model.facts["transform_input"] is True
    for said in (False, True):
        source.facts["transform_input"] = said
        models.save_checkpoint(tmp_path / "ours.pt", source)
        ours = models.build(arch, 2, 80, weights=str(tmp_path / "ours.pt"))
        assert ours.transform_input is said and ours.facts["transform_input"] is said
    assert models.build(arch, 2, 80).transform_input is False  # random weights were made for nothing


def test_a_plain_state_dict_of_another_network_changes_nothing_about_its_input(tmp_path):
    torch.save(models.build("squeezenet1_1", 2, 64).state_dict(), tmp_path / "plain.pth")
    model = models.build("squeezenet1_1", 2, 64, weights=str(tmp_path / "plain.pth"))
    assert model.transform_input is False and model.facts["transform_input"] is False


def test_whose_images_first_weights_have_learned_from_is_remembered_through_a_file(tmp_path):
    source = models.build("squeezenet1_1", 2, 64)
    models.save_checkpoint(tmp_path / "a.pt", source, seen_groups=["patient7"])
    model = models.build("squeezenet1_1", 3, 64, weights=str(tmp_path / "a.pt"))
    assert model.facts["seen_groups"] == ["patient7"]
    assert models.build("squeezenet1_1", 3, 64).facts["seen_groups"] == []


def test_mnasnets_weights_load_by_the_version_that_torchvision_notes_in_them(tmp_path):
    source = models.build("mnasnet0_5", 3, 64)
    models.save_checkpoint(tmp_path / "ours.pt", source)
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    for file in ("ours.pt", "plain.pth"):
        model = models.build("mnasnet0_5", 2, 64, weights=str(tmp_path / file))
        assert torch.equal(model.layers[0].weight, source.layers[0].weight)


def test_attention_is_counted_in_the_multiply_adds_of_a_transformer():
    # ViT-B/32 at 224: 50 tokens of 768, 12 layers of 4 projections and 2 products of attention and an MLP
    # of 4 x 768, after the patches' convolution and before the head: torchvision publishes 4.41 G.
    model = models.bare_network("vit_b_32", aux=False).requires_grad_(False)
    assert models.cost(model, 224)["multiply_adds"] == pytest.approx(4.41e9, rel=0.01)


def test_weights_of_another_network_are_refused(tmp_path):
    models.save_checkpoint(tmp_path / "a.pt", models.build("squeezenet1_1", 2, 64))
    with pytest.raises(UserError, match="does not hold the weights of resnet18"):
        models.build("resnet18", 2, 64, weights=str(tmp_path / "a.pt"))


def place_imagenet_file(arch, state, folder, monkeypatch, truthful=True):
    """Put a file where torchvision's weights are looked for, under a name with its own hash.

    Like torchvision's oldest files it lacks BatchNorm's counters.
    """
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, folder / "weights")
    digest = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()[:8] if truthful else "0" * 8
    kinds = models.torchvision.models.get_model_weights(arch)
    name = re.sub(r"-[0-9a-f]{8}\.", f"-{digest}.", kinds.IMAGENET1K_V1.url.rsplit("/", 1)[1])
    path = folder / "hub/checkpoints" / name
    path.parent.mkdir(parents=True)
    (folder / "weights").rename(path)

    class Kinds:
        class IMAGENET1K_V1:
            url = f"http://127.0.0.1:9/{name}"

        DEFAULT = IMAGENET1K_V1

    monkeypatch.setattr(models.torchvision.models, "get_model_weights", lambda _: Kinds)
    return path


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


def test_imagenet_weights_placed_by_hand_are_used_after_their_hash_was_checked(torch_home, monkeypatch):
    source = models.bare_network("inception_v3", aux=True)
    place_imagenet_file("inception_v3", source.state_dict(), torch_home, monkeypatch)
    model = models.build("inception_v3", 2, 80, weights="imagenet")
    assert model.transform_input and model.facts["transform_input"]
    assert torch.equal(model.Mixed_7c.branch1x1.conv.weight, source.Mixed_7c.branch1x1.conv.weight)


def test_densenets_old_names_are_understood(torch_home, monkeypatch):
    source = models.bare_network("densenet121", aux=False).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in source.items()}
    place_imagenet_file("densenet121", old, torch_home, monkeypatch)
    model = models.build("densenet121", 2, 64, weights="imagenet")
    name = "features.denseblock1.denselayer1.norm1.weight"
    assert torch.equal(model.state_dict()[name], source[name])


def test_imagenet_weights_whose_hash_is_wrong_are_refused(torch_home, monkeypatch):
    state = models.bare_network("squeezenet1_1", aux=False).state_dict()
    place_imagenet_file("squeezenet1_1", state, torch_home, monkeypatch, truthful=False)
    with pytest.raises(UserError, match="is damaged: its SHA-256 does not begin with 00000000"):
        models.build("squeezenet1_1", 2, 64, weights="imagenet")


def test_without_a_network_imagenet_weights_are_an_error_that_says_where_the_file_goes(
    torch_home, monkeypatch
):
    path = place_imagenet_file("squeezenet1_1", {}, torch_home, monkeypatch)
    path.unlink()
    with pytest.raises(UserError, match=f"Put that file at {path}, or start from random weights: --weights none"):
        models.build("squeezenet1_1", 2, 64, weights="imagenet")


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
    ({"format": 99, "model": {}, "facts": {}}, "format 99, this code reads 3. Train it again"),
    ({"format": 2, "model": {}, "facts": {}}, "format 2, this code reads 3. Train it again"),
    (None, "No such file: .*x.pt. Train that run first"),
])  # fmt: skip
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=says) as error:
        models.load_checkpoint(path)
    assert "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('exploded').touch()",))


def test_a_pickle_bomb_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    torch.save({"format": models.FORMAT, "model": {}, "facts": Bomb()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a readable file"):
        models.load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "exploded").exists()


def test_saving_keeps_plain_values_only_so_that_loading_runs_no_code(tmp_path):
    args = {"lr": 0.1, "teacher": ["a"], "clip": None}
    model = models.build("squeezenet1_1", 2, 64)
    models.save_checkpoint(tmp_path / "a.pt", model, flags=args, history=[{"a": 1.0}])
    _, facts = models.load_checkpoint(tmp_path / "a.pt")
    assert facts["flags"] == {"lr": 0.1, "teacher": ["a"], "clip": None} and facts["history"] == [{"a": 1.0}]


@pytest.mark.parametrize("facts", [{"args": {}}, {"validation": {}, "epoch": 1}, {"teachers": [], "classes": ["a", "b"]}])
def test_a_checkpoint_with_few_of_a_runs_facts_is_refused_in_one_line(tmp_path, facts):
    models.save_checkpoint(tmp_path / "a.pt", models.build("squeezenet1_1", 2, 32), **facts)
    with pytest.raises(UserError, match="a.pt is not a checkpoint of this project") as error:
        models.load_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


# ---- residuals


def test_residuals_are_predicted_minus_pixel_divided_rounded_and_cut():
    grey = torch.randint(100, 130, (1, 1, 5, 6), dtype=torch.uint8)
    ours = models.residuals(prepare(grey, torch.device("cpu")))[0]
    x = torch.nn.functional.pad(grey.double(), (1, 1, 1, 1), mode="replicate")[0, 0]
    for i in range(1, 6):
        for j in range(1, 7):
            c, left, right, up, down = x[i, j], x[i, j - 1], x[i, j + 1], x[i - 1, j], x[i + 1, j]
            corners = x[i - 1, j - 1] + x[i - 1, j + 1] + x[i + 1, j - 1] + x[i + 1, j + 1]
            by_hand = (
                min(left, right, up, down) - c,
                min(left + right - 2 * c, up + down - 2 * c) / 3,
                (2 * (left + right + up + down) - corners - 4 * c) / 6,
            )
            for channel, value in enumerate(by_hand):
                near_a_half = abs(abs(float(value)) % 1 - 0.5) < 1e-3
                wanted = max(-2, min(2, round(float(value)))) / 2
                assert near_a_half or ours[channel, i - 1, j - 1] == wanted


def test_a_network_for_residuals_reads_them_also_after_loading(tmp_path):
    model = models.build("resnet18", 2, 32)
    model.facts["input"] = "residual"
    models.save_checkpoint(tmp_path / "a.pt", model.eval())
    again, _ = models.load_checkpoint(tmp_path / "a.pt")
    x = prepare(torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8), torch.device("cpu"))
    assert torch.equal(models.forward(again, x)[0], model(models.residuals(x)).flatten(1))
    assert not torch.equal(models.forward(again, x)[0], model(x).flatten(1))


def test_a_network_without_published_weights_is_refused_in_one_line():
    with pytest.raises(UserError, match="torchvision has no ImageNet weights of mine"):
        models.weights_file("mine", "imagenet")

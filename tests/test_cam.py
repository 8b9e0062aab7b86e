"""Grad-CAM: the closed form it has for networks that end in pooling and a linear layer, a published
fixture, and what it must leave as it was."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fit
from PIL import Image

import data
import evaluate
import models

LAYERS = {"resnet18": "layer4", "inception_v3": "Mixed_7c", "googlenet": "inception5b"}


@pytest.mark.parametrize("arch", LAYERS)
def test_it_is_cam_where_pooling_and_a_linear_layer_come_last(arch):
    model = models.build(arch, 3, 160).eval()
    images, target = torch.randn(2, 3, 160, 160), torch.tensor([2, 0])
    maps = []
    hook = model.get_submodule(LAYERS[arch]).register_forward_hook(lambda *a: maps.append(a[2].detach()))
    model(images)
    hook.remove()
    cam = torch.einsum("nk,nkhw->nhw", model.fc.weight[target], maps[0]).detach()
    wanted = heat_of(cam, 160)
    assert wanted.std() > 0.01 and torch.allclose(evaluate.grad_cam(model, images, target), wanted, atol=1e-5)


def heat_of(cam, side):
    """What is in favour, at the image's size, 1 where it is hottest: by the equation."""
    heat = F.interpolate(cam.relu()[:, None], size=(side, side), mode="bilinear")[:, 0]
    return (heat / heat.amax((1, 2), keepdim=True)).nan_to_num()


@pytest.mark.parametrize("arch", ["densenet121", "densenet169"])
def test_a_densenets_maps_are_what_its_pooling_sees(arch):
    model = models.build(arch, 3, 96).eval()
    with torch.no_grad():  # averages of a trained network: half of what norm5 gives is negative, and cut
        model.features.norm5.running_mean.normal_()
        model.features.norm5.bias.normal_()
    images, target = torch.randn(2, 3, 96, 96), torch.tensor([2, 0])
    with torch.no_grad():
        seen = F.relu(model.features(images))
        assert torch.allclose(model.classifier(seen.mean((2, 3))), model(images), atol=1e-5)
        assert 0.1 < (seen == 0).float().mean() < 0.9
        cam = torch.einsum("nk,nkhw->nhw", model.classifier.weight[target], seen)
    wanted = heat_of(cam, 96)
    assert wanted.std() > 0.01 and torch.allclose(evaluate.grad_cam(model, images, target), wanted, atol=1e-5)


class Published(torch.nn.Module):
    """The network of captum's LayerGradCam test, its in-place ReLU included."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(inplace=True)
        self.fc = torch.nn.Linear(8, 4)
        with torch.no_grad():
            self.conv.weight.fill_(1)
            self.conv.bias.copy_(torch.tensor([-50.0, -75.0]))
            self.fc.weight.copy_(torch.tensor([1.0] * 5 + [-1.0] * 3).expand(4, 8))
            self.fc.bias.zero_()

    def forward(self, x):
        return torch.relu(self.fc(self.relu(self.conv(x)).flatten(1)))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_published_fixture(frozen):
    model, x = Published().requires_grad_(not frozen), torch.arange(16.0).view(1, 1, 4, 4)
    for layer, published in ((model.conv, [[11.25, 13.5], [20.25, 22.5]]), (model.relu, [[0, 4], [28, 32.5]])):
        heat = evaluate.grad_cam(model, x, 0, layer)
        assert torch.allclose(heat, heat_of(torch.tensor([published]), 4), atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_the_same_where_gradients_are_switched_off(mode):
    model, x = models.build("squeezenet1_1", 2, 64).eval(), torch.randn(2, 3, 64, 64)
    heat = evaluate.grad_cam(model, x, 1)
    with mode():
        assert torch.equal(evaluate.grad_cam(model, x, 1), heat)


def test_it_leaves_no_hook_no_gradient_and_the_mode_it_found():
    model = models.build("alexnet", 2, 64).train()
    model.features[0].weight.grad = torch.ones_like(model.features[0].weight)
    evaluate.grad_cam(model, torch.randn(2, 3, 64, 64), 1)
    assert model.training and all(not m._forward_hooks for m in model.modules())
    assert all(p.grad is None or (p.grad == 1).all() for p in model.parameters())


def test_a_network_in_training_keeps_its_averages():
    model = models.build("resnet18", 2, 96).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate.grad_cam(model, torch.randn(2, 3, 96, 96), 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_layer_is_the_last_before_the_pooling():
    for arch, name in (("alexnet", "features.11"), ("vgg11", "features.19"), ("mnasnet1_0", "layers.16"),
                       ("densenet121", "features.norm5"), ("resnet18", "layer4.1")):  # fmt: skip
        model = models.build(arch, 2, 64).eval()
        assert evaluate.last_maps(model, torch.zeros(1, 3, 64, 64))[0] is model.get_submodule(name)


def test_a_vision_transformer_works_on_tokens_and_is_refused_in_one_line():
    model, x = models.build("vit_b_32", 2, 224).eval(), torch.zeros(1, 3, 224, 224)
    for call in (lambda: evaluate.last_maps(model, x), lambda: evaluate.grad_cam(model, x, 0)):
        with pytest.raises(data.UserError, match="^Grad-CAM needs maps, and no late layer of this network has any$"):
            call()


def test_a_swins_tokens_lie_in_maps_and_have_heat():
    model = models.build("swin_t", 2, 224).requires_grad_(False).eval()
    heat = evaluate.grad_cam(model, torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))
    assert heat.shape == (2, 224, 224) and heat.min() >= 0 and heat.amax() == pytest.approx(1)


def test_other_weights_give_another_map_and_nothing_in_favour_gives_no_heat():
    x = torch.randn(1, 3, 64, 64)
    a, b = (evaluate.grad_cam(models.build("resnet18", 2, 64), x, 0) for _ in range(2))
    assert (a - b).abs().max() > 0.1
    model = models.build("resnet18", 2, 64).eval()
    with torch.no_grad():
        model.fc.weight[0] = -1.0  # every map speaks against class 0
    assert not evaluate.grad_cam(model, x, 0).any()


@pytest.mark.parametrize("arch", ["resnet18", "densenet121"])
def test_a_network_for_residuals_is_asked_about_residuals(arch):
    model = models.build(arch, 2, 64).eval()
    x = data.prepare(data.phantoms(2, 64, seed=1)[0], torch.device("cpu"))
    seen = evaluate.grad_cam(model, models.residuals(x), 1)
    assert not torch.allclose(evaluate.grad_cam(model, x, 1), seen, atol=1e-3)
    model.facts["input"] = "residual"
    assert torch.allclose(evaluate.grad_cam(model, x, 1), seen, atol=1e-5)


def test_the_layer_that_is_named_is_the_layer_that_is_drawn():
    for arch, early, last in (("resnet18", "layer1", "layer4"),
                              ("densenet121", "features.denseblock1", "features.norm5")):  # fmt: skip
        model, x = models.build(arch, 2, 64).eval(), torch.randn(1, 3, 64, 64)
        heats = [evaluate.grad_cam(model, x, 1, model.get_submodule(name)) for name in (early, last)]
        assert (heats[0] - heats[1]).abs().max() > 0.1, arch


def test_the_hottest_point_lies_on_the_opacity_more_often_than_a_random_point_in_the_lungs():
    """The pointing game, on phantoms that a small network (maps of 8 x 8) learned in seconds to tell apart.

    Ten seeds of this network hit 0.40 to 0.64 of the opacities, and a mirrored map at most 0.18.
    """
    cpu, layers = torch.device("cpu"), []
    labels = torch.arange(800) % 2
    images = data.prepare(data.draw(800, 64, 1, labels[:, None].float())[0], cpu)
    for n, m in ((3, 8), (8, 16), (16, 16)):
        layers += [torch.nn.Conv2d(n, m, 3, 2, 1), torch.nn.BatchNorm2d(m), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                torch.nn.Linear(16, 2))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        rows = torch.randint(800, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    model.eval()
    unseen, masks, lungs = data.draw(200, 64, 2, torch.ones(200, 1))  # an opacity in every one
    unseen = data.prepare(unseen, cpu)
    assert (model(unseen).argmax(1) == 1).double().mean() > 0.8  # it has learned what to look for
    hottest = evaluate.grad_cam(model, unseen, 1).flatten(1).argmax(1, keepdim=True)
    hits = masks.flatten(1).gather(1, hottest).double().mean().item()
    chance = ((masks & lungs).flatten(1).sum(1) / lungs.flatten(1).sum(1)).double().mean().item()
    assert 0.1 < chance < 0.4
    assert hits > chance + 4 * (chance * (1 - chance) / 200) ** 0.5, (hits, chance)


# ---- the command line


def pixels(path):
    """A PNG as (3, H, W) integers."""
    return torch.from_numpy(np.array(Image.open(path))).int().permute(2, 0, 1)


def test_the_picture_has_a_row_an_image_and_a_column_a_run_with_maps_that_are_large_enough(few_phantoms, capsys):
    fit("--out", "t", "--size", "128")
    fit("--out", "s", "--teacher", "t", "--size", "48", role="student")
    capsys.readouterr()
    evaluate.main(["t", "s", "--cam", "cams.png"])
    text = capsys.readouterr().out
    assert text.endswith("no Grad-CAM of s: maps of 2 x 2. Raise its --size\nGrad-CAM: cams.png\n")
    assert Image.open("cams.png").size == (2 * 227 + 3, 6 * 259 + 3)
    evaluate.main(["s", "--cam", "none.png"])
    assert capsys.readouterr().out.endswith("too coarse to draw: none.png is not written\n")
    assert not Path("none.png").exists()


@pytest.mark.parametrize("arch, size, side", [
    ("alexnet", 224, 13), ("inception_v3", 299, 8), ("resnet18", 224, 7), ("swin_t", 224, 7),
])  # fmt: skip
def test_the_maps_are_as_large_as_the_network_is_known_for(arch, size, side):
    model = models.build(arch, 2).eval()
    assert evaluate.last_maps(model, torch.zeros(1, 3, size, size))[1] == side


def test_phantoms_are_shown_with_the_rim_of_their_opacities(few_phantoms):
    fit("--out", "t", "--size", "128")
    evaluate.main(["t", "--cam", "cams.png"])
    tiles, orange = pixels("cams.png")[:, 19:243, 3:227], torch.tensor([255, 90, 0]).view(3, 1, 1)
    assert ((tiles - orange).abs().amax(0) < 60).sum() > 50


def shown(monkeypatch, classes, labels, margins, groups=None):
    """What show_cams draws: titles, rows of the images, targets, calls. margins: of the second class, a list a run."""
    drawn, asked = [], []
    monkeypatch.setattr(evaluate, "draw_cams", lambda path, columns: drawn.extend(columns))
    monkeypatch.setattr(evaluate, "heat_over", lambda folder, images, targets, device: (
        asked.append((images.flatten().tolist(), targets.tolist())), images)[1])
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)  # each knows its own row
    split = SimpleNamespace(labels=torch.tensor(labels), images=images, groups=groups or list(range(len(labels))))
    loaded = SimpleNamespace(multilabel=split.labels.dim() == 2, classes=classes, test=split)
    several = margins if isinstance(margins[0], list) else [margins]
    records = [{"folder": Path(f"run{i}"), "data": loaded, "p": torch.tensor([[0.0, m] for m in each]).softmax(1)}
               for i, each in enumerate(several)]  # fmt: skip
    evaluate.show_cams("cams.png", records, torch.device("cpu"))
    (_, titles, _), *heats = drawn
    assert [names for _, names, _ in heats] == [[f"run{i}"] * len(titles) for i in range(len(several))]
    assert asked == [asked[0]] * len(several)
    return titles, *asked[0], *(calls for *_, calls in heats)


@pytest.mark.parametrize("normal", ["normal", "NORMAL", "Normal"])
def test_a_folder_called_normal_in_any_case_shows_nothing_to_look_for(normal, monkeypatch):
    labels = [0, 1] * 8
    margins = [-9.0 if k == 0 else 1 + i / 10 for i, k in enumerate(labels)]  # surest of what is normal
    titles, rows, targets, calls = shown(monkeypatch, [normal, "pneumonia"], labels, margins)
    assert titles == ["pneumonia"] * 6 and targets == [1] * 6
    assert rows == [15, 13, 11, 9, 7, 5]  # the surest first
    assert calls[0] == f"pneumonia {100 / (1 + math.exp(-2.5)):.0f} %"


def test_where_no_class_is_normal_the_classes_take_turns(monkeypatch):
    margins = [-9.0, 2.0] * 8  # far surer of every ELBOW than of any HAND
    titles, *_ = shown(monkeypatch, ["ELBOW", "HAND"], [0, 1] * 8, margins)
    assert titles == ["ELBOW", "HAND"] * 3


def test_of_a_patient_the_surest_image_alone_is_shown(monkeypatch):
    labels, margins = [1] * 12, [float(i) for i in range(1, 13)]
    _, rows, *_ = shown(monkeypatch, ["normal", "ill"], labels, margins, groups=[f"p{i // 2}" for i in range(12)])
    assert rows == [11, 9, 7, 5, 3, 1]


def test_the_last_two_images_are_called_wrongly_by_some_run_and_every_tile_tells_its_runs_call(monkeypatch):
    margins = [[-3.0, 2.0] * 8, [-3.0, 1.0] * 8]
    margins[0][3], margins[0][7], margins[1][9] = -0.5, -1.0, -2.0  # three of class 1 that a run calls normal
    titles, rows, targets, first, second = shown(monkeypatch, ["normal", "ill"], [0, 1] * 8, margins)
    assert titles == ["ill"] * 6 and targets == [1] * 6 and rows[4:] == [9, 3]  # the first run's surest first
    assert first == ["ill 88 %"] * 5 + ["normal 62 %"]
    assert second == ["ill 73 %"] * 4 + ["normal 88 %", "ill 73 %"]


def test_of_several_findings_the_first_is_drawn_and_what_a_run_says_of_it(monkeypatch):
    labels = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    titles, rows, targets, calls = shown(monkeypatch, ["MASS", "EDEMA"], labels, [-1.0, 2.0, 5.0])
    assert (titles, rows, targets) == (["EDEMA", "MASS"], [0, 1], [1, 0])  # both are missed
    assert calls == ["EDEMA 27 %", "MASS 12 %"]


def test_names_and_calls_stand_in_strips_above_and_below_and_hide_nothing_of_the_image():
    grey = torch.full((2, 3, 224, 224), 128.0)
    long = "student-T1-of-a-teacher-" * 3
    evaluate.draw_cams("cams.png", [(grey, ["title"] * 2, [""] * 2), (grey, [long] * 2, ["ill 97 %", "ill 3 %"])])
    picture = pixels("cams.png")
    assert picture.shape == (3, 2 * 259 + 3, 2 * 227 + 3)
    for row in range(2):
        for column in range(2):
            tile = picture[:, 3 + 259 * row : 259 * (row + 1), 3 + 227 * column : 227 * (column + 1)]
            above, image, below = tile.split([16, 224, 16], 1)
            assert (image == 128).all() and (above > 200).any() and (below > 200).any() == (column == 1)
    first, second = picture[:, 3:19, 3:227], picture[:, 3:19, 230:454]
    assert (second > 200).sum() > 3 * (first > 200).sum() and not (second[:, :, -10:] > 100).any()  # cut by a sign


def test_each_run_draws_its_own_heat_over_the_same_test_images(few_phantoms, monkeypatch):
    sizes, drawn, asked, real = {"a": 128, "b": 160}, [], {}, evaluate.heat_over
    for seed, (name, size) in enumerate(sizes.items()):
        fit("--out", name, "--size", str(size), "--seed", str(seed))
    monkeypatch.setattr(evaluate, "heat_over", lambda folder, images, targets, device: (
        asked.update({folder.name: (images, targets)}), real(folder, images, targets, device))[1])
    real_draw = evaluate.draw_cams
    monkeypatch.setattr(evaluate, "draw_cams", lambda path, columns: (drawn.extend(columns), real_draw(path, columns)))
    evaluate.main(["a", "b", "--cam", "cams.png"])
    picture, yellow = pixels("cams.png"), torch.tensor([255.0, 200, 0]).view(3, 1, 1)
    heats, chosen = [], []
    for i, (name, size) in enumerate(sizes.items()):
        images, targets = asked[name]
        test = data.load("phantoms", size, ("test",)).test
        rows = [next(j for j, image in enumerate(test.images) if torch.equal(image, own)) for own in images]
        chosen.append(rows)
        assert targets.tolist() == test.labels[rows].tolist() and drawn[1 + i][1] == [name] * 6
        model = models.load_checkpoint(name)[0]
        heat = evaluate.grad_cam(model, data.prepare(images, torch.device("cpu")), targets)[:, None]
        warm = F.interpolate(images + 0.6 * heat * (yellow - images), (224, 224), mode="bilinear")
        left = 3 + 227 * (1 + i)
        for row, wanted in enumerate(warm):
            tile = picture[:, 19 + 259 * row : 243 + 259 * row, left : left + 224]
            assert (wanted - tile).abs().max() < 2, (name, row)
        heats.append(F.interpolate(heat, (224, 224), mode="bilinear"))
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 6
    assert (heats[0] - heats[1]).abs().amax((1, 2, 3)).min() > 0.1  # a swap would be seen


def test_residuals_can_be_chosen_as_what_a_network_reads(few_phantoms):
    args = fit("--input", "residual")
    assert models.load_checkpoint(args.out)[0].facts["input"] == "residual"

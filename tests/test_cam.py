"""Grad-CAM: the closed form it has for networks that end in pooling and a linear layer, a published
fixture, and what it must leave as it was."""

import pytest
import torch
import torch.nn.functional as F
from conftest import film, fit
from torchvision.io import decode_image

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
    cam = torch.einsum("nk,nkhw->nhw", model.fc.weight[target], maps[0]) / maps[0][0, 0].numel()
    ours = evaluate.raw_cam(model, images, target)
    assert ours.shape == cam.shape and (ours - cam).abs().max() < 1e-5 * cam.abs().max()
    heat = F.interpolate(cam.relu()[:, None], size=(160, 160), mode="bilinear")[:, 0]
    heat = (heat / heat.amax((1, 2), keepdim=True)).nan_to_num()
    assert torch.allclose(evaluate.grad_cam(model, images, target), heat, atol=1e-5)


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
    assert evaluate.raw_cam(model, x, 0, model.conv).tolist() == [[[11.25, 13.5], [20.25, 22.5]]]
    assert evaluate.raw_cam(model, x, 0, model.relu).tolist() == [[[0, 4], [28, 32.5]]]


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
        assert evaluate.last_maps(model, torch.zeros(1, 3, 64, 64)) is model.get_submodule(name)


@pytest.mark.parametrize("arch", ["swin_t", "vit_b_32"])
def test_transformers_token_maps_are_folded_back(arch):
    model = models.build(arch, 2, 224).requires_grad_(False).eval()
    if arch.startswith("vit"):
        model.heads.head.weight.normal_()  # torchvision starts it at zero
    heat = evaluate.grad_cam(model, torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))
    assert heat.shape == (2, 224, 224) and heat.min() >= 0 and heat.amax() == pytest.approx(1)


def test_other_weights_give_another_map_and_nothing_in_favour_gives_no_heat():
    x = torch.randn(1, 3, 64, 64)
    a, b = (evaluate.raw_cam(models.build("resnet18", 2, 64), x, 0) for _ in range(2))
    assert (a - b).abs().max() > 0.1 * a.abs().max()
    model = models.build("resnet18", 2, 64).eval()
    with torch.no_grad():
        model.fc.weight[0] = -1.0  # every map speaks against class 0
    assert not evaluate.grad_cam(model, x, 0).any()


# ---- the command line


def test_the_grid_has_a_row_a_film_a_column_a_run_and_the_pointing_game_counts_hits(
    few_phantoms, monkeypatch, capsys
):
    fit("--out", "t")
    fit("--out", "s", "--teacher", "t", "--size", "48", role="student")
    capsys.readouterr()
    truth = {size: data.load("phantoms", size, ("test",)).test for size in (32, 48)}

    def all_seeing(model, images, target, layer=None):  # one run is hot exactly where the opacity is
        split = truth[images.shape[-1]]
        films = data.prepare(split.images, "cpu")
        same = torch.stack([(films - x).abs().amax((1, 2, 3)).argmin() for x in images])
        masks = split.masks[same].float()
        return masks if images.shape[-1] == 32 else 1 - masks

    monkeypatch.setattr(evaluate, "grad_cam", all_seeing)
    evaluate.main(["t", "s", "--cam", "cams.png"])
    text = capsys.readouterr().out
    assert "hottest point on an opacity, 8 films" in text and "Grad-CAM of 6 films: cams.png" in text
    hits = {line.split("|")[1].strip(): line.split("|")[2].split()[0] for line in text.splitlines()
            if line.startswith(("| t (", "| s (", "| a random"))}  # fmt: skip
    assert hits["t (squeezenet1_1), maps of 3 x 3"] == "100.0"
    assert [value for name, value in hits.items() if "s (" in name and "maps" in name] == ["0.0"]
    split = truth[32]
    share = (split.masks.flatten(1).sum(1) / split.lungs.flatten(1).sum(1))[split.labels == 1].mean()
    assert hits["a random point in the lungs"] == f"{100 * share:.1f}"
    assert decode_image("cams.png").shape == (3, 6 * 227 + 3, 3 * 227 + 3)


def test_a_film_that_no_data_set_holds_is_read_with_the_runs_alone(few_phantoms, tmp_path, capsys):
    args = fit("--out", "t")
    film(tmp_path / "film.png", side=50)
    capsys.readouterr()
    evaluate.main(["t", "--image", "film.png", "--cam", "one.png"])
    model, facts = models.load_checkpoint("t")
    with torch.no_grad():
        x = data.prepare(data.decode("film.png", args.size)[None], torch.device("cpu"))
        says = 100 * models.forward(model, x)[0].softmax(1)[0]
    out = capsys.readouterr().out
    assert f"t: NORMAL {says[0]:.1f} %, PNEUMONIA {says[1]:.1f} %" in out
    assert decode_image("one.png").shape == (3, 230, 2 * 227 + 3)
    fit("--out", "f", "--data", "findings")
    evaluate.main(["t", "f", "--image", "film.png"])
    with pytest.raises(data.UserError, match="one picture needs runs of the same classes"):
        evaluate.main(["t", "f", "--image", "film.png", "--cam", "two.png"])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(data.UserError, match="a JPEG or PNG needed in text.png"):
        evaluate.main(["t", "--image", "text.png"])


def test_residuals_can_be_chosen_as_what_a_network_reads(few_phantoms):
    args = fit("--input", "residual")
    assert "-inputresidual-" in args.out
    assert models.load_checkpoint(args.out)[0].facts["input"] == "residual"

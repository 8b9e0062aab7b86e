"""Several findings per image: the public CSVs as they are published, the sigmoid loss, and AUC per finding."""

import json
import re

import pytest
import torch
from conftest import NIH_HEADER, TINY, fit, image_file

import data
import evaluate
import kd
import models
import train

def by_id(split):
    return {id: labels for id, labels in zip(split.ids, split.labels.tolist(), strict=True)}


def test_chest_xray14_is_read_as_published(nih):
    loaded = data.load(nih, 16, ("train", "val", "test"), val_fraction=0.3)
    assert loaded.multilabel and len(loaded.classes) == 14 and loaded.classes[12] == "Pleural_Thickening"
    assert sorted(loaded.test.ids) == ["00000005_000.png", "00000006_000.png"]
    labels = {**by_id(loaded.train), **by_id(loaded.val)}
    found = [loaded.classes[k] for k, on in enumerate(labels["00000001_000.png"]) if on]
    assert found == ["Cardiomegaly", "Emphysema"]
    assert not any(labels["00000001_001.png"]) and labels["00000002_000.png"][12] == 1
    assert not set(loaded.train.groups) & set(loaded.val.groups) and len(labels) == 6


def test_chexpert_is_read_as_published(chexpert):
    loaded = data.load(chexpert, 16, ("train", "val", "test"))
    assert all("frontal" in id for id in loaded.train.ids + loaded.val.ids + loaded.test.ids)
    assert set(loaded.test.groups) == {"patient64541", "patient64542"}
    expected = torch.tensor([1.0, 0.0, 9.0, 0.0] + [0.0] * 9)  # 9 instead of NaN: the third is uncertain
    for split in (loaded.train, loaded.val, loaded.test):
        assert torch.equal(split.labels.nan_to_num(9), expected.expand(len(split.ids), -1))


@pytest.mark.parametrize("wrong, says", [
    (("Hernia", "hernia"), "not the CSV that its authors published.*hernia"),
    (("Mass,0,5,", "Mass,0,,"), "not the CSV that its authors published"),
])
def test_wrong_labels_and_patients_are_refused(nih, wrong, says):
    path = nih / "Data_Entry_2017.csv"
    assert wrong[0] in path.read_text()
    path.write_text(path.read_text().replace(*wrong))
    with pytest.raises(data.UserError, match=says):
        data.list_images(nih)


def test_two_images_of_one_name_are_refused(nih):
    image_file(nih / "masks/00000001_000.png", shade=255)
    with pytest.raises(data.UserError, match="Two images below .* have the same name"):
        data.list_images(nih)


def test_a_csv_without_its_images_is_refused(nih):
    for path in nih.glob("images_*/images/*.png"):
        path.unlink()
    with pytest.raises(data.UserError, match="No image of .*Data_Entry_2017.csv is below"):
        data.list_images(nih)


def test_absent_images_and_columns_are_noticed(nih, capsys):
    (nih / "images_001/images/00000001_000.png").unlink()
    assert len(data.list_images(str(nih))[0]) == 7
    assert "1 images of the CSV are not in" in capsys.readouterr().out
    text = (nih / "Data_Entry_2017.csv").read_text().replace("Finding Labels", "Findings")
    (nih / "Data_Entry_2017.csv").write_text(text)
    with pytest.raises(data.UserError, match="Data_Entry_2017.csv is not the CSV .*KeyError.*Finding Labels"):
        data.list_images(str(nih))


@pytest.mark.parametrize("spoiled", ["one", "7.0", "nan"])
def test_a_spoiled_label_is_named(chexpert, spoiled):
    lines = (chexpert / "train.csv").read_text().splitlines()
    lines[1] = lines[1].replace(",1.0,", f",{spoiled},")
    (chexpert / "train.csv").write_text("\n".join(lines))
    with pytest.raises(data.UserError, match=f"is not the CSV that its authors published.*'{spoiled}'") as error:
        data.list_images(str(chexpert))
    assert "\n" not in str(error.value)


def test_the_newest_csv_of_chest_xray14_is_read(nih, capsys):
    text = (nih / "Data_Entry_2017.csv").read_text().replace("Cardiomegaly|Emphysema", "Edema")
    (nih / "Data_Entry_2017_v2020.csv").write_text(text)
    records, names = data.list_images(str(nih))
    assert len(records) == len({r["id"] for r in records}) == 8 and capsys.readouterr().out == ""
    label = next(r["label"] for r in records if r["id"] == "00000001_000.png")
    assert [name for name, on in zip(names, label, strict=True) if on] == ["Edema"]


def test_linked_folders_of_chest_xray14_are_followed(nih):
    whole = data.load(nih, 16, ("test",)).test
    elsewhere = nih.parent / "another disk"
    elsewhere.mkdir()
    for folder in ("images_001", "images_002/images"):
        (nih / folder).rename(elsewhere / folder.replace("/", "-"))
        (nih / folder).symlink_to(elsewhere / folder.replace("/", "-"))
    linked = data.load(nih, 16, ("test",)).test
    assert linked.ids == whole.ids and torch.equal(linked.images, whole.images)
    assert len(data.list_images(str(nih))[0]) == 8


def test_a_missing_test_list_is_named(nih):
    (nih / "test_list.txt").unlink()
    with pytest.raises(data.UserError, match="ChestX-ray14/test_list.txt") as error:
        data.load(nih.name, 16)
    assert "\n" not in str(error.value)


def test_the_header_of_chest_xray14_holds_commas(nih):
    assert NIH_HEADER.count(",") == 11  # of 9 columns: two titles hold a comma
    ages = {row["Patient Age"] for row in data.read_csv(nih / "Data_Entry_2017.csv")}
    assert ages == {"58"}


def test_phantoms_show_their_findings():
    findings = (torch.rand(300, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    images, masks, lungs = data.draw(300, 32, 5, findings)
    assert torch.equal(masks.flatten(1).any(1), findings[:, 0] == 1)
    assert (masks & ~lungs).sum() < 0.02 * masks.sum()
    x = images[:, 0].float()
    for k, (rows, columns) in ((1, (slice(18, 24), slice(22, 26))), (2, (slice(21, 25), slice(4, 12)))):
        place = x[:, rows, columns].mean((1, 2))
        assert place[findings[:, k] == 1].mean() > place[findings[:, k] == 0].mean() + 5
    first = data.draw(300, 32, 5, findings[:, :1])[0][findings[:, 1:].sum(1) == 0]
    assert torch.equal(first, images[findings[:, 1:].sum(1) == 0])  # the plain phantoms


def test_the_audit_counts_positives(capsys):
    data.main(["findings"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train"))
    labels = torch.tensor([r["label"] for r in data.list_images("findings")[0] if r["split"] == "train"])
    wanted = [f"{n:.0f} ({n:.0f})" for n in [*labels.sum(0), len(labels)]]
    assert re.split(" {2,}", line)[1:] == wanted


def test_all_roles_run_on_several_findings(few_phantoms, capsys):
    flags = ("--data", "findings")
    fit("--out", "t", *flags)
    fit("--out", "b", *flags, role="baseline", small=BARE)
    fit("--out", "s", "--teacher", "t", *flags, role="student", small=BARE)
    capsys.readouterr()
    evaluate.main(["t", "b", "s", "--json", "all.json"])
    text = capsys.readouterr().out
    for wanted in ("LARGE_HEART ", "parameters, M ", "  minus b "):
        assert f"\n{wanted}" in text, wanted
    stored = json.loads(open("all.json").read())["runs"]["t"]["test"]
    truth = data.load("findings", 32, ("test",)).test.labels
    assert len(stored["auc"]) == 3 and f"{int(truth[:, 0].sum())} of 16" in text
    header, score = text[text.index("16 test images, %") :].splitlines()[:2]
    assert header.split()[-6:] == ["validation", "auc", "accuracy", "specificity", "sensitivity", "ece"]
    assert score.split() == ["auc"] and score.index("auc") + 3 == header.index("validation") + len("validation")


BARE = ["--arch", "squeezenet1_1", "--size", "32", "--epochs", "2", "--batch-size", "8", "--lr", "0.01"]


def test_several_findings_use_the_sigmoid_loss(few_phantoms, monkeypatch):
    fit("--data", "findings", "--out", "t")
    called, real = [], kd.binary_kd_loss
    monkeypatch.setattr(kd, "binary_kd_loss", lambda *a: (called.append(a), real(*a))[1])
    monkeypatch.setattr(kd, "kd_loss", None)
    args = fit("--data", "findings", "--teacher", "t", "--out", "s", role="student", small=BARE)
    assert len(called) == 2 * 3 and args.data == "findings"  # 24 images in batches of 8, twice
    cpu, images = torch.device("cpu"), data.load("findings", 32).train.images
    teacher = evaluate.predict(models.load_checkpoint("t")[0], models.from_images(images, cpu), len(images), cpu)
    for student_logits, teacher_logits, T in called:
        assert student_logits.shape == teacher_logits.shape == (8, 3) and T == args.T
        assert (torch.cdist(teacher_logits, teacher).amin(1) < 1e-4).all()


def test_a_teacher_teaches_an_unlabelled_finding(chexpert, monkeypatch):
    """The third finding of this CheXpert is uncertain in every image. Without a teacher, the row of the head for this
    finding does not change."""
    flags = ["--data", str(chexpert), "--recipe", "multilabel", "--weights", "none", "--arch", "tiny",
             "--size", "32", "--epochs", "1", "--batch-size", "4", "--clip", "0"]
    for i, path in enumerate(sorted(chexpert.glob("train/*/*/*_frontal.jpg"))):
        image_file(path, shade=20 + 40 * i)  # BatchNorm turns images that are all alike into zeros
    fit("--out", "t", small=flags)
    fit("--out", "labels", "--teacher", "t", "--alpha", "0", role="student", small=flags)
    fit("--out", "taught", "--teacher", "t", role="student", small=flags)
    torch.manual_seed(0)
    start = models.build("tiny", 13, 32).classifier[3].weight
    for run, has_logits in (("t", False), ("labels", False), ("taught", True)):
        moved = (models.load_checkpoint(run)[0].classifier[3].weight - start).abs().amax(1) > 1e-6
        assert moved.tolist() == [k != 2 or has_logits for k in range(13)]


@pytest.mark.parametrize("arch", ["mnasnet1_0", "mobilenet_v3_small", "resnet18"])
def test_batchnorm_has_the_momentum_of_torch(arch):
    layers = [m for m in models.build(arch, 2, 64).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {m.momentum for m in layers} == {0.1}


def test_two_teachers_of_findings_are_averaged_by_sigmoid():
    """Each finding has the mean of the teachers' probabilities at temperature T."""
    for seed in ("0", "1"):
        fit("--data", "findings", "--out", f"t{seed}", "--seed", seed, "--epochs", "1", small=TINY)
    args = train.get_args(["--role", "student", *TINY, "--data", "findings", "--T", "3", "--out", "student",
                           "--teacher", "t0", "t1"])
    loaded = data.load_as(vars(args), 32, ("train", "val"), "cache")
    source, _ = train.load_teachers(args, loaded, torch.device("cpu"))
    rows = torch.arange(5)
    x = data.prepare(loaded.train.images[rows], torch.device("cpu"))
    p = [(models.forward(models.load_run(t)[0], x)[0] / 3).sigmoid() for t in ("t0", "t1")]
    assert not torch.allclose(p[0], p[1], atol=1e-3)
    assert torch.allclose((source(rows) / 3).sigmoid(), (p[0] + p[1]) / 2, atol=1e-4)

"""Several findings a film: the public CSVs as they are published, masks, AUC per finding."""

import csv
import math

import pytest
import torch
from conftest import film, fit

import data
import evaluate
import models

PADCHEST = ["", "ImageID", "ImageDir", "PatientID", "Projection", "PhotometricInterpretation_DICOM", "Labels"]


@pytest.fixture
def padchest(tmp_path):
    root = tmp_path / "padchest"
    root.mkdir()
    with open(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", "w") as file:
        writer = csv.writer(file)
        writer.writerow(PADCHEST)
        for i in range(40):
            words = (
                "['pneumonia', ' infiltrates']"
                if i % 2
                else ["", "['normal']", "['mass', ' COPD signs']"][i % 3]
            )
            kind, view = ("MONOCHROME1", "PA") if i % 4 == 0 else ("MONOCHROME2", "L" if i % 5 == 4 else "AP")
            writer.writerow([i, f"{i}.png", "0", f"p{i // 2}", view, kind, words])
            (root / "0").mkdir(exist_ok=True)
            film(root / f"0/{i}.png", shade=30)
    return root


def by_id(split):
    return {id: labels for id, labels in zip(split.ids, split.labels.tolist(), strict=True)}


def test_chest_xray14_is_read_as_published_with_its_own_test_list_and_patients_kept_whole(nih):
    loaded = data.load(nih, 16, ("train", "val", "test"), val_fraction=0.3)
    assert loaded.multilabel and len(loaded.classes) == 14 and loaded.classes[12] == "Pleural_Thickening"
    assert sorted(loaded.test.ids) == ["00000005_000.png", "00000006_000.png"]
    labels = {**by_id(loaded.train), **by_id(loaded.val)}
    assert [loaded.classes[k] for k, on in enumerate(labels["00000001_000.png"]) if on] == [
        "Cardiomegaly",
        "Emphysema",
    ]
    assert not any(labels["00000001_001.png"]) and labels["00000002_000.png"][12] == 1
    assert not set(loaded.train.groups) & set(loaded.val.groups) and len(labels) == 6


@pytest.mark.parametrize("rule, value", [("ignore", math.nan), ("zero", 0.0), ("one", 1.0)])
def test_chexperts_uncertain_labels_are_what_the_flag_says_and_its_side_views_are_left_out(
    chexpert, rule, value
):
    loaded = data.load(chexpert, 16, ("train", "test"), uncertain=rule)
    assert all("frontal" in id for id in loaded.train.ids + loaded.test.ids)
    assert set(loaded.test.groups) == {"patient64541", "patient64542"}
    expected = torch.tensor([1.0, 0.0, value, 0.0] + [0.0] * 9)
    assert all(torch.equal(row.nan_to_num(9), expected.nan_to_num(9)) for row in loaded.train.labels)


def test_padchests_lists_are_parsed_and_its_negatives_turned(padchest):
    loaded = data.load(padchest, 40, ("train", "val", "test"))
    labels, shades = {}, {}
    for split in (loaded.train, loaded.val, loaded.test):
        labels |= by_id(split)
        shades |= dict(zip(split.ids, split.images.flatten(1).float().mean(1).tolist(), strict=True))
    names = {id: [loaded.classes[k] for k, on in enumerate(row) if on] for id, row in labels.items()}
    assert (
        names["1.png"] == ["infiltrates", "pneumonia"] and names["2.png"] == ["mass"] and names["0.png"] == []
    )
    assert shades["0.png"] == 225 and shades["1.png"] == 30
    assert not any(int(id.split(".")[0]) % 5 == 4 and int(id.split(".")[0]) % 4 for id in labels)
    assert not set(loaded.test.groups) & (set(loaded.train.groups) | set(loaded.val.groups))


def test_a_csv_without_a_needed_column_is_refused_and_absent_films_are_counted(nih, capsys):
    (nih / "images_001/images/00000001_000.png").unlink()
    data.list_films(str(nih))
    assert "1 films of the CSVs are not in" in capsys.readouterr().out
    text = (nih / "Data_Entry_2017.csv").read_text().replace("Finding Labels", "Findings")
    (nih / "Data_Entry_2017.csv").write_text(text)
    with pytest.raises(data.UserError, match="line 3 .KeyError.*Finding Labels"):
        data.list_films(str(nih))


@pytest.mark.parametrize("spoiled", ["one", "7.0", "nan"])
def test_a_spoiled_line_matters_only_if_its_film_is_there(chexpert, spoiled):
    lines = (chexpert / "train.csv").read_text().splitlines()
    lines[1] = lines[1].replace(",1.0,", f",{spoiled},")
    (chexpert / "train.csv").write_text("\n".join(lines))
    with pytest.raises(data.UserError, match=f"line 2 .*{spoiled}"):
        data.list_films(str(chexpert))
    (chexpert / "train/patient00001/study1/view1_frontal.jpg").unlink()
    assert len(data.list_films(str(chexpert))[0]) == 7


def test_the_findings_of_phantoms_are_independent_and_seen_where_they_should_be():
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
    counts = capsys.readouterr().out.splitlines()[1].split()
    labels = data.load("findings", 8, ("train",)).train.labels
    assert counts[1::2][:3] == [str(int(n)) for n in labels.sum(0)]


def test_average_precision_is_the_mean_precision_at_the_positives():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.3, 0.1, 0.1]).double()
    truth, ones = torch.tensor([1, 0, 1, 0, 0, 1]), torch.ones(1, 6, dtype=torch.float64)
    by_hand = (1 / 1 + 2 / 3 + 3 / 6) / 3  # the tie at 0.1 is one step
    assert evaluate.average_precision(scores, truth, ones).item() == pytest.approx(by_hand)
    twice, copied = torch.tensor([[1.0, 2, 1, 1, 1, 1]]).double(), [0, 1, 1, 2, 3, 4, 5]
    again = evaluate.average_precision(scores[copied], truth[copied], torch.ones(1, 7).double())
    assert evaluate.average_precision(scores, truth, twice).item() == pytest.approx(again.item())


def test_teacher_baseline_and_student_run_on_several_findings_and_are_judged_by_auc(few_phantoms, capsys):
    flags = ("--data", "findings")
    fit("--out", "t", *flags)
    fit("--out", "b", *flags, role="baseline", small=BARE)
    fit("--out", "s", "--teacher", "t", *flags, role="student", small=BARE)
    capsys.readouterr()
    evaluate.main(["t", "b", "s", "--json", "all.json", "--grid"])
    text = capsys.readouterr().out
    for wanted in ("| always the same ", "| auc ", "| LARGE_HEART ", "| parameters, M ",
                   "| multiply-adds, G ",
                   "makes its teacher's call", "s (squeezenet1_1) minus b (squeezenet1_1)"):  # fmt: skip
        assert wanted in text, wanted
    stored = evaluate.json.loads(open("all.json").read())["runs"]["t"]["test"]["0.5"]
    truth = data.load("findings", 32, ("test",)).test.labels
    assert len(stored["auc"]) == 3 and f"{int(truth[:, 0].sum())} of 16" in text
    floor = next(line for line in text.splitlines() if line.startswith("| always the same"))
    prevalence = 100 * truth.mean(0).mean().item()
    wanted = ["50.0", f"{prevalence:.1f}", "100.0", "0.0"]  # AUC, AP, specificity, sensitivity
    assert [cell.strip() for cell in floor.split("|")[3:7]] == wanted


BARE = ["--arch", "squeezenet1_1", "--size", "32", "--epochs", "2", "--batch-size", "8", "--lr", "0.01"]


def test_films_with_several_findings_learn_with_the_sigmoid_loss(few_phantoms, monkeypatch):
    import kd

    fit("--data", "findings", "--out", "t")
    asked, real = [], kd.binary_kd_loss
    monkeypatch.setattr(kd, "binary_kd_loss", lambda *a, **k: (asked.append(k["mask"]), real(*a, **k))[1])
    monkeypatch.setattr(kd, "kd_loss", None)
    args = fit("--data", "findings", "--teacher", "t", "--out", "s", role="student", small=BARE)
    assert asked and all(mask.all() for mask in asked)
    assert asked[0].shape == (8, 3) and args.data == "findings"


def test_unknown_labels_teach_nothing(chexpert):
    """CheXpert with uncertain labels ignored: the third finding is unknown in every film, so its row of the
    head moves neither by labels nor by the teacher."""
    flags = ["--data", str(chexpert), "--recipe", "multilabel", "--weights", "none", "--arch", "resnet18",
             "--size", "32", "--epochs", "1", "--batch-size", "4", "--clip", "0"]  # fmt: skip
    fit("--out", "t", small=flags)
    fit("--out", "s", "--teacher", "t", role="student", small=flags)
    torch.manual_seed(0)
    start = models.build("resnet18", 13, 32).fc.weight
    for run in ("t", "s"):
        moved = (models.load_checkpoint(f"{run}/last.pt")[0].fc.weight - start).abs().amax(1) > 0
        assert moved.tolist() == [k != 2 for k in range(13)]


def test_mnasnets_averages_move_as_fast_as_those_of_others():
    model = models.build("mnasnet1_0", 2, 64)
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}

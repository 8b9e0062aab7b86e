"""What the losses must be: the equation by hand, published values, limits, and what must not change them."""

import math

import pytest
import torch
import torch.nn.functional as F

from kd import MAX_T, MIN_T, binary_kd_loss, distillation_loss, kd_loss, mix_teachers

# Values on which three independent implementations and plain Python agree to 12 digits.
S2, T2, Y2 = [[2, -1], [0.5, 0.25]], [[3, -2], [-1, 1.5]], [0, 1]
TWO_CLASSES = [  # T, alpha, T^2 KL, total, gradient of the total with respect to s[0][0] and s[1][0]
    (1, 0.5, 0.283462995882, 0.360363190804, -0.022039723858, 0.262123705438),
    (4, 0.9, 0.640664231168, 0.620324146624, -0.178989385258, 0.328663429745),
    (20, 0.7, 0.718848640756, 0.634373064247, -0.180340469771, 0.324666803923),
]
S3, T3, Y3 = [[1, 2, 3], [0, -1, 0.5]], [[3, 1, 0.2], [-2, 0, 2]], [2, 0]


def tensor(values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


@pytest.mark.parametrize("T, alpha, soft, total, grad0, grad1", TWO_CLASSES)
def test_two_classes_match_the_published_fixture(T, alpha, soft, total, grad0, grad1):
    s = tensor(S2, requires_grad=True)
    got_total, got_hard, got_soft = distillation_loss(s, tensor(T2), torch.tensor(Y2), T, alpha)
    got_total.backward()
    assert got_hard.item() == pytest.approx(0.437263385726, abs=1e-9)
    assert got_soft.item() == pytest.approx(soft, abs=1e-9)
    assert got_total.item() == pytest.approx(total, abs=1e-9)
    assert s.grad[0, 0].item() == pytest.approx(grad0, abs=1e-9)
    assert s.grad[1, 0].item() == pytest.approx(grad1, abs=1e-9)


def test_three_classes_match_the_published_fixture():
    s = tensor(S3, requires_grad=True)
    total, hard, soft = distillation_loss(s, tensor(T3), torch.tensor(Y3), T=4, alpha=0.9)
    total.backward()
    assert hard.item() == pytest.approx(0.755868284891, abs=1e-9)
    assert soft.item() == pytest.approx(1.507188549467, abs=1e-9)
    assert total.item() == pytest.approx(1.432056523009, abs=1e-9)
    wanted = [
        [-0.393676008306, 0.080815761420, 0.312860246886],
        [0.249334890208, -0.065445036486, -0.183889853722],
    ]
    assert torch.allclose(s.grad, tensor(wanted), atol=1e-9)


def test_sigmoid_loss_matches_the_published_fixture():
    assert binary_kd_loss(tensor(S3), tensor(T3), 4).item() == pytest.approx(0.402535425684, abs=1e-9)


def test_kd_loss_is_the_equation_in_plain_floats():
    T, loss = 3.0, 0.0
    for s, t in zip(S3, T3, strict=True):
        p = [math.exp(z / T) / sum(math.exp(w / T) for w in t) for z in t]
        q = [math.exp(z / T) / sum(math.exp(w / T) for w in s) for z in s]
        loss += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)) / len(S3)
    assert kd_loss(tensor(S3), tensor(T3), T).item() == pytest.approx(T**2 * loss, rel=1e-12)


def test_equal_logits_have_loss_and_gradient_zero():
    for loss in (kd_loss, binary_kd_loss):
        s = torch.randn(64, 3, requires_grad=True)
        value = loss(s, s.detach().clone(), 20.0)
        value.backward()
        assert value.item() == 0.0
        assert s.grad.abs().max() < 1e-6


def test_the_gradient_is_T_times_q_minus_p():
    for T in (1.0, 5.0):
        s, t = (
            torch.randn(8, 4, dtype=torch.float64, requires_grad=True),
            torch.randn(8, 4, dtype=torch.float64),
        )
        kd_loss(s, t, T).backward()
        gap = (s.detach() / T).softmax(1) - (t / T).softmax(1)
        assert torch.allclose(s.grad, T * gap / 8, atol=1e-14)


def test_the_gradient_is_that_of_cross_entropy_with_soft_labels():
    s, t, T = (
        torch.randn(6, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(6, 3, dtype=torch.float64),
        2.5,
    )
    kd_loss(s, t, T).backward()
    ours, s.grad = s.grad, None
    (T**2 * F.cross_entropy(s / T, (t / T).softmax(1))).backward()
    assert torch.allclose(ours, s.grad, atol=1e-14)


def test_a_high_T_regresses_centred_logits():
    """This holds for the loss and its gradient."""
    B, C = 16, 5
    s = torch.randn(B, C, dtype=torch.float64, requires_grad=True)
    t = torch.randn(B, C, dtype=torch.float64) + 3
    gap = (s - s.mean(1, keepdim=True) - t + t.mean(1, keepdim=True)).detach()
    value = kd_loss(s, t, 1e3)
    value.backward()
    assert value.item() == pytest.approx((gap**2).sum(1).mean().item() / (2 * C), rel=2e-3)
    assert torch.allclose(s.grad, gap / (C * B), atol=2e-3 * gap.abs().max() / (C * B))


def test_T_squared_keeps_the_gradient_from_shrinking():
    norms = []
    for T in (32.0, 64.0):
        s = tensor(S2, requires_grad=True)
        kd_loss(s, tensor(T2), T).backward()
        norms.append(s.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def test_the_loss_is_a_mean_over_images_and_not_over_classes():
    s, t = tensor(S3), tensor(T3)
    assert kd_loss(s.repeat(2, 1), t.repeat(2, 1), 4).item() == pytest.approx(
        kd_loss(s, t, 4).item(), rel=1e-12
    )
    impossible = torch.full((2, 1), -1e4, dtype=torch.float64)  # a class that neither network ever names
    wider = kd_loss(torch.cat([s, impossible], 1), torch.cat([t, impossible], 1), 4)
    assert wider.item() == pytest.approx(kd_loss(s, t, 4).item(), rel=1e-12)


def test_only_sigmoid_sees_a_shift_of_logits():
    """Softmax does not change if all logits of an image grow by the same number."""
    s, t = tensor(S3), tensor(T3)
    assert kd_loss(s + 7, t - 3, 4).item() == pytest.approx(kd_loss(s, t, 4).item(), rel=1e-9)
    assert kd_loss(t + 2, t, 4).item() == pytest.approx(0, abs=1e-12)
    assert binary_kd_loss(t + 2, t, 4).item() > 0.1


def test_teacher_and_student_are_not_interchangeable():
    assert kd_loss(tensor(S2), tensor(T2), 1).item() != pytest.approx(
        kd_loss(tensor(T2), tensor(S2), 1).item(), rel=1e-3
    )


def test_the_teacher_gets_no_gradient():
    s, t = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    (kd_loss(s, t, 2.0) + binary_kd_loss(s, t, 2.0)).backward()
    assert t.grad is None and s.grad is not None


def test_permuting_the_teachers_rows_changes_the_loss():
    s, t = torch.randn(32, 2), torch.randn(32, 2)
    assert not torch.isclose(kd_loss(s, t, 2.0), kd_loss(s, t[torch.randperm(32)], 2.0))


@pytest.mark.parametrize("T", [MIN_T, 1.0])
@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
def test_huge_logits_and_bfloat16_stay_finite(loss, T):
    s = torch.tensor([[1e4, -1e4], [0.0, 1e4]], requires_grad=True)
    t = torch.tensor([[-1e4, 1e4], [1e4, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in ((s, t), (s.bfloat16(), t.bfloat16())):
            value = loss(a, b, T)
            value.backward()
            assert value.isfinite() and value.dtype == torch.float32
    assert s.grad.isfinite().all()


def test_bfloat16_logits_are_softened_in_float32():
    s, t = torch.randn(64, 2).bfloat16(), torch.randn(64, 2).bfloat16()
    assert kd_loss(s, t, 3.0).item() == pytest.approx(kd_loss(s.double(), t.double(), 3.0).item(), rel=1e-5)


def test_the_two_ends_of_alpha():
    """At alpha 0 the loss is cross-entropy, to the bit. At alpha 1 it is the teacher's part alone."""
    s, t, y = torch.randn(8, 2), torch.randn(8, 2), torch.randint(2, (8,))
    assert torch.equal(distillation_loss(s, t, y, 4.0, 0.0)[0], F.cross_entropy(s, y))
    assert torch.equal(distillation_loss(s, t, y, 4.0, 1.0)[0], kd_loss(s, t, 4.0))
    near_zero = distillation_loss(s, t, y, 4.0, 1e-9)[0]
    assert near_zero.item() == pytest.approx(F.cross_entropy(s, y).item(), rel=1e-6)


def test_alpha_one_ignores_the_labels():
    s, t, y = torch.randn(8, 2), torch.randn(8, 2), torch.randint(2, (8,))
    assert torch.equal(distillation_loss(s, t, y, 4.0, 1.0)[0], distillation_loss(s, t, 1 - y, 4.0, 1.0)[0])


def test_a_finding_is_a_softmax_over_two_classes():
    s, t = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    as_two_classes = [torch.stack([z.flatten(), torch.zeros(45, dtype=torch.float64)], 1) for z in (s, t)]
    assert binary_kd_loss(s, t, 3.0).item() == pytest.approx(kd_loss(*as_two_classes, 3.0).item(), rel=1e-12)


def label_loss(logits, labels, smoothing=0.0):
    """The loss of a network without a teacher; T and alpha are there, and must not matter."""
    return distillation_loss(logits, None, labels, 7.0, 0.9, smoothing)


def test_without_a_teacher_it_is_the_label_loss():
    """T and alpha do not matter then."""
    s, y = torch.randn(8, 3), torch.randint(3, (8,))
    total, hard, soft = label_loss(s, y)
    assert torch.equal(total, F.cross_entropy(s, y)) and torch.equal(hard, total) and soft == 0
    several = torch.randint(2, (8, 3)).float()
    total, hard, soft = label_loss(s, several)
    assert torch.isclose(total, F.binary_cross_entropy_with_logits(s, several))
    assert torch.equal(hard, total) and soft == 0


def test_the_hard_loss_is_divided_by_all_images():
    """It is the sum over labelled images, divided by the number of all images."""
    s, y = torch.randn(32, 3, dtype=torch.float64), torch.full((32,), -1)
    y[::4] = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])  # 8 of 32
    by_hand = -sum(s[i].log_softmax(0)[y[i]] for i in range(0, 32, 4)) / 32
    assert torch.isclose(label_loss(s, y)[1], by_hand, rtol=1e-12)
    assert torch.isclose(distillation_loss(s, s, y, 4.0, 0.25)[0], 0.75 * by_hand, rtol=1e-12)


def test_the_hard_loss_of_findings_is_divided_by_all():
    """It is the sum over labelled findings, divided by the number of all findings."""
    s, y = torch.randn(4, 3, dtype=torch.float64), torch.full((4, 3), math.nan, dtype=torch.float64)
    y[0, 1], y[2, 0], y[2, 2] = 1, 0, 1  # 3 of 12
    q = s.sigmoid()
    by_hand = -(q[0, 1].log() + (1 - q[2, 0]).log() + q[2, 2].log()) / 12
    assert torch.isclose(label_loss(s, y)[1], by_hand, rtol=1e-12)


@pytest.mark.parametrize("labels", [[-1] * 6, [[math.nan] * 3] * 6])
def test_without_labels_the_label_loss_is_zero(labels):
    """Its gradient is zero, too."""
    s = torch.randn(6, 3, requires_grad=True)
    value = label_loss(s, torch.tensor(labels), 0.1)[0]
    value.backward()
    assert value == 0 and not s.grad.any()


def test_the_soft_loss_includes_unlabelled_images():
    s, t, T = torch.randn(6, 3), torch.randn(6, 3), 2.0
    one, several = torch.tensor([0, -1, 2, -1, -1, 0]), torch.tensor([[1.0, math.nan, 0.0]] * 6)
    for labels, loss in ((one, kd_loss), (several, binary_kd_loss)):
        total, hard, soft = distillation_loss(s, t, labels, T, 0.25)
        assert torch.equal(soft, loss(s, t, T)) and torch.equal(hard, label_loss(s, labels)[0])
        assert torch.isclose(total, 0.75 * hard + 0.25 * soft)
        changed = t.clone()
        changed[1, 1] += 5  # has no label in either
        assert not torch.isclose(distillation_loss(s, changed, labels, T, 0.25)[2], soft)
        unlabelled = torch.full_like(labels, -1 if labels.dim() == 1 else math.nan)
        assert torch.isclose(distillation_loss(s, t, unlabelled, T, 0.25)[0], 0.25 * soft)


@pytest.mark.parametrize("labels", [
    [0, 1, 2, 2, -1, -1, -1, -1], [-1] * 7 + [1],
    [[1, 0, 1]] * 3 + [[1, math.nan, math.nan]] + [[math.nan] * 3] * 4,
])
def test_two_halves_of_a_batch_average_to_its_loss(labels):
    """It does not matter how labels are spread over the halves."""
    s, t = (torch.randn(8, 3, dtype=torch.float64) for _ in range(2))
    y = torch.tensor(labels)
    whole = distillation_loss(s, t, y, 3.0, 0.4, 0.1)
    halves = [distillation_loss(s[i : i + 4], t[i : i + 4], y[i : i + 4], 3.0, 0.4, 0.1)
              for i in (0, 4)]
    for both, one in zip(zip(*halves, strict=True), whole, strict=True):
        assert torch.isclose(sum(both) / 2, one, rtol=1e-12)


def test_label_smoothing_is_torchs_own():
    """For findings, it is torch's form for two classes."""
    logits, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(3, (8,))
    smooth = F.cross_entropy(logits, y, label_smoothing=0.1)
    assert torch.isclose(label_loss(logits, y, 0.1)[0], smooth, rtol=1e-12)
    z, y = torch.randn(8, 1, dtype=torch.float64), torch.randint(2, (8,))
    two = F.cross_entropy(torch.cat([torch.zeros_like(z), z], 1), y, label_smoothing=0.1)
    assert torch.isclose(label_loss(z, y[:, None].double(), 0.1)[0], two)


def test_label_smoothing_leaves_the_soft_loss_alone():
    """It changes the hard loss only."""
    s, t, y = torch.randn(8, 3), torch.randn(8, 3), torch.randint(3, (8,))
    total, hard, soft = distillation_loss(s, t, y, 4.0, 0.3, 0.1)
    assert torch.isclose(hard, F.cross_entropy(s, y, label_smoothing=0.1))
    assert torch.equal(soft, kd_loss(s, t, 4.0))
    assert torch.isclose(total, 0.7 * hard + 0.3 * soft)


def test_mix_teachers_averages_softened_probabilities():
    a, b, T = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), 4.0
    together = mix_teachers([a, b], T)
    assert torch.allclose((together / T).softmax(1), ((a / T).softmax(1) + (b / T).softmax(1)) / 2)
    together = mix_teachers([a, b], T, multilabel=True)
    assert torch.allclose((together / T).sigmoid(), ((a / T).sigmoid() + (b / T).sigmoid()) / 2)
    assert mix_teachers([a], T) is a


@pytest.mark.parametrize("multilabel", [False, True])
def test_teachers_under_bfloat16_are_averaged_in_float32(multilabel):
    halves = [(8 * torch.randn(40, 3)).bfloat16() for _ in range(3)]
    together = mix_teachers(halves, 2.0, multilabel)
    exact = mix_teachers([z.double() for z in halves], 2.0, multilabel)
    assert together.dtype == torch.float32 and torch.allclose(together.double(), exact, atol=1e-4)


@pytest.mark.parametrize("T, shapes, says", [
    (1.0, ((4, 1), (4, 1)), "binary_kd_loss"),
    (1.0, ((4, 2), (4, 3)), "same images and classes"),
    (1.0, ((4,), (4,)), r"\(images, classes\)"),
    *[(T, ((4, 2), (4, 2)), f"0.001 and 1000, got {T}") for T in (0.0, 0.0009, -1.0, math.nan, 1000.5)],
])
def test_what_cannot_be_distilled_is_refused(T, shapes, says):
    with pytest.raises(ValueError, match=says):
        kd_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), T)
    if min(shapes[0]) > 1:  # sigmoid is made for one logit
        with pytest.raises(ValueError, match=says):
            binary_kd_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), T)


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
def test_at_the_highest_T_allowed_float32_still_has_the_gradient(loss):
    s, t = torch.randn(64, 3, requires_grad=True), torch.randn(64, 3)
    loss(s, t, MAX_T).backward()
    q, p = ((z.detach().double() / MAX_T) for z in (s, t))
    exact = MAX_T * ((q.softmax(1) - p.softmax(1)) / 64 if loss is kd_loss
                     else (q.sigmoid() - p.sigmoid()) / (64 * 3))
    assert torch.allclose(s.grad.double(), exact, rtol=0, atol=1e-3 * exact.abs().max())


@pytest.mark.parametrize("T, alpha, says", [
    (1.0, -0.1, "alpha must lie between 0 .* and 1 .*, got -0.1"), (1.0, 1.5, "got 1.5"), (1.0, math.nan, "got nan"),
    (0.0, 0.5, "0.001 and 1000, got 0.0"),
])
@pytest.mark.parametrize("teacher", [None, torch.zeros(1, 2)])
def test_settings_out_of_range_are_refused(T, alpha, says, teacher):
    """This holds without a teacher, too."""
    with pytest.raises(ValueError, match=says):
        distillation_loss(torch.zeros(1, 2), teacher, torch.zeros(1).long(), T, alpha)

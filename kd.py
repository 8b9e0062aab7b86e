"""The losses of knowledge distillation, and nothing else: pure functions from tensors to a scalar.

A teacher's logits for an image, divided by a temperature T and put through softmax, say more than
the label: not "pneumonia" but "pneumonia 0.83, normal 0.17". The student learns to say the same.

    p = softmax(teacher_logits / T)          the teacher's softened answer
    q = softmax(student_logits / T)          the student's softened answer
    soft = T^2 KL(p || q)                    how far the student is from the teacher
    hard = cross-entropy(student_logits, label)
    loss = (1 - alpha) hard + alpha soft     alpha = 0: labels only; alpha = 1: teacher only

Shapes: B images; C classes, of which an image has exactly one (softmax), or K findings, of which it
may have several (sigmoid). A name in an equation is the same name in the code; `log_q` holds a log.
A label of -1 or NaN is unknown: the label loss leaves it out.
"""

import math

import torch
import torch.nn.functional as F


def check_logits(student_logits, teacher_logits, T):
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        shapes = f"student {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}"
        raise ValueError(f"need logits (images, classes) of the same images and classes: {shapes}")
    if not T > 0:
        raise ValueError(f"the temperature T must be above 0, got {T}")


def at_least_float32(logits):
    """Logits under bfloat16 autocast have 8 significant bits: soften them in float32 or float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kd_loss(student_logits, teacher_logits, T):
    """Soft-target loss of Hinton et al. (2015), for one label out of C classes.

        loss = T^2 * mean over the batch of  sum_c p_c (log p_c - log q_c)

    student_logits, teacher_logits: (B, C), before any softmax. Returns a scalar.

    - The mean runs over images, not over images and classes ("batchmean" in F.kl_div). Its default,
      "mean", makes the loss C times smaller, and alpha then means something else.
    - T^2 undoes the 1/T^2 by which a high temperature shrinks the gradient. The gradient becomes
      T (q - p) / B, so alpha and the learning rate need little retuning for another T. But it may
      be T times as long: a student far from its teacher can diverge unless gradients are clipped.
    - Both sides stay logs until the product: equal logits give exactly 0, and a probability that
      underflows gives 0 * finite instead of NaN.
    - The trap: softmax of a single logit is always 1, so the loss would be 0 and train nothing. A
      network with one logit, or with several findings at once, needs binary_kd_loss.
    """
    check_logits(student_logits, teacher_logits, T)
    if student_logits.shape[1] < 2:
        raise ValueError("softmax of one logit is always 1: use binary_kd_loss, or 2 classes")
    log_q = F.log_softmax(at_least_float32(student_logits) / T, dim=1)  # (B, C)
    log_p = F.log_softmax(at_least_float32(teacher_logits.detach()) / T, dim=1)  # (B, C)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)  # (B,)
    return T**2 * kl.mean()


def binary_kd_loss(student_logits, teacher_logits, T, mask=None):
    """The same for K findings that may occur together: each has a probability of its own.

        p = sigmoid(teacher_logits / T)        q = sigmoid(student_logits / T)
        loss = T^2 * mean of  p (log p - log q) + (1 - p) (log (1 - p) - log (1 - q))

    student_logits, teacher_logits, mask: (B, K). The mean runs over the findings that count: where
    the mask is True, or all. Returns a scalar.

    The trap: kd_loss accepts such logits, but softmax cannot see a shift that all findings share: a
    student that gives every finding twice the odds would look perfect.
    """
    check_logits(student_logits, teacher_logits, T)
    z_student = at_least_float32(student_logits) / T
    z_teacher = at_least_float32(teacher_logits.detach()) / T
    log_p, log_not_p = F.logsigmoid(z_teacher), F.logsigmoid(-z_teacher)
    log_q, log_not_q = F.logsigmoid(z_student), F.logsigmoid(-z_student)
    kl = log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)  # (B, K)
    counts = torch.ones_like(kl) if mask is None else mask.to(kl.dtype)
    return T**2 * (kl * counts).sum() / counts.sum().clamp(min=1)


def label_loss(logits, labels, label_smoothing=0.0, n_known=None):
    """Cross-entropy with the labels alone, mean over the labels that are known; 0 if none is.

    labels: (B,) integers, one class an image, -1 unknown; or (B, K) floats 0, 1 or NaN, unknown.
    label_smoothing moves that share of the label to the uniform distribution.
    n_known: what to divide by instead. Several processes pass their mean number of known labels;
    otherwise their averaged gradients would weight labels unequally.
    """
    logits, known = at_least_float32(logits), labels >= 0  # NaN >= 0 is False
    if labels.dim() == 1:
        total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1,
                                label_smoothing=label_smoothing)
    else:
        target = labels.nan_to_num() * (1 - label_smoothing) + label_smoothing / 2
        total = F.binary_cross_entropy_with_logits(
            logits, target.to(logits.dtype), weight=known.to(logits.dtype), reduction="sum")
    n_known = known.sum() if n_known is None else n_known
    return total / n_known.clamp(min=1e-6)  # a mean count may lie below 1


def distillation_loss(student_logits, teacher_logits, labels, T, alpha, n_known=None):
    """(1 - alpha) * hard + alpha * soft; returns total, hard, soft, so that both can be watched.

    Softmax where labels are (B,), sigmoid where they are (B, K). The teacher is heard on every
    image: its answer needs no label.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 (labels) and 1 (teacher), got {alpha}")
    hard = label_loss(student_logits, labels, n_known=n_known)
    soft = (kd_loss if labels.dim() == 1 else binary_kd_loss)(student_logits, teacher_logits, T)
    return (1 - alpha) * hard + alpha * soft, hard, soft


def mean_teacher(logits, T, multilabel=False):
    """Several teachers as one: their softened probabilities are averaged.

        p = mean over teachers of softmax(logits / T);  T log p is returned  (sigmoid: T logit p)

    logits: a list of (B, C), one a teacher. T is that of the loss in which the result is used.
    """
    if len(logits) == 1:
        return logits[0]
    z = torch.stack([at_least_float32(one) for one in logits]) / T  # (teachers, B, C)
    if multilabel:
        return T * (F.logsigmoid(z).logsumexp(dim=0) - F.logsigmoid(-z).logsumexp(dim=0))
    return T * (F.log_softmax(z, dim=2).logsumexp(dim=0) - math.log(len(logits)))

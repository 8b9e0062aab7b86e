"""The losses of knowledge distillation: pure functions from tensors to a scalar.

For a chest X-ray, a label is just "pneumonia". A trained network, the teacher, outputs "pneumonia
0.83, normal 0.17". The student is trained to output the same probabilities. Dividing the logits by
a temperature T > 1 before softmax makes the probabilities more even ("softer").

    p = softmax(teacher_logits / T)          the teacher's softened probabilities
    q = softmax(student_logits / T)          the student's softened probabilities
    soft = T^2 KL(p || q)                    how far the student is from the teacher
    hard = cross-entropy(student_logits, label)
    loss = (1 - alpha) hard + alpha soft     alpha = 0: labels only; alpha = 1: teacher only

Shapes: B images. An image has exactly one of C classes (softmax), or any number of K findings
(sigmoid). The code uses the names of the equations, and `log_q` is the logarithm of q.
"""

import math

import torch
import torch.nn.functional as F

MIN_T, MAX_T = 0.001, 1000  # at T = 1000, gradients in float32 are accurate to 0.04 %

def distillation_loss(student_logits, teacher_logits, labels, T, alpha, label_smoothing=0.0):
    """Return loss = (1 - alpha) hard + alpha soft, and both parts, so that they can be watched.

    student_logits: (B, C) or (B, K), before any softmax or sigmoid.
    teacher_logits: the teacher's for the same images, or None. Then the loss is the hard loss.
    labels: (B,) class indices, or (B, K) floats, 0 or 1 per finding.

    Both parts are means over images, or over images and findings. An unlabelled image (-1 or NaN)
    adds nothing to the hard loss but still counts in the average. This way the mean over two
    processes equals the loss of one process on the whole batch. (data.load_as leaves unlabelled
    images out if no teacher's logits are used.)"""
    check_settings(T, alpha)
    logits = at_least_float32(student_logits)
    if labels.dim() == 1:
        hard = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1,
                               label_smoothing=label_smoothing)
    else:
        target = labels.nan_to_num() * (1 - label_smoothing) + label_smoothing / 2
        has_label = (labels >= 0).to(logits.dtype)  # NaN >= 0 is False
        hard = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), has_label,
                                                  reduction="sum")
    hard = hard / labels.numel()
    if teacher_logits is None:
        return hard, hard, torch.zeros_like(hard)
    soft_loss = kd_loss if labels.dim() == 1 else binary_kd_loss
    soft = soft_loss(student_logits, teacher_logits, T)
    return (1 - alpha) * hard + alpha * soft, hard, soft

def kd_loss(student_logits, teacher_logits, T):
    """Return the soft loss of Hinton et al. (2015) for one of C classes; logits (B, C).

        loss = T^2 * mean over the batch of  sum_c p_c (log p_c - log q_c)

    - The mean runs over images, not over images and classes ("batchmean" in F.kl_div). "mean", the
      default of F.kl_div, makes the loss C times smaller, and alpha then means something else.
    - The gradient is T (q - p) / B. Without the factor T^2, it would shrink as 1/T^2 for large T.
      As T grows, the gradient tends to the difference of the centred logits divided by C B, as in
      a regression of logits. If student and teacher are far apart, it is so large that a student
      can diverge unless gradients are clipped.
    - p and q stay logarithms until the product. Equal logits give exactly 0, and a probability
      that underflows gives 0 * finite instead of NaN.
    - The trap: softmax of a single logit is always 1, so the loss would be 0 and train nothing. A
      network with one logit, or with several findings at once, needs binary_kd_loss."""
    check_logits(student_logits, teacher_logits, T)
    if student_logits.shape[1] < 2:
        raise ValueError("softmax of one logit is always 1: use binary_kd_loss, or 2 classes")
    log_q = F.log_softmax(at_least_float32(student_logits) / T, dim=1)  # (B, C)
    log_p = F.log_softmax(at_least_float32(teacher_logits.detach()) / T, dim=1)  # (B, C)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)  # (B,)
    return T**2 * kl.mean()

def binary_kd_loss(student_logits, teacher_logits, T):
    """Return the soft loss for K findings that may occur together; logits (B, K).

        p = sigmoid(teacher_logits / T)        q = sigmoid(student_logits / T)
        loss = T^2 * mean of  p (log p - log q) + (1 - p) (log (1 - p) - log (1 - q))

    The mean runs over images and findings. The trap: kd_loss accepts such logits too, but softmax
    does not change when all findings are shifted alike. A student that doubles the teacher's odds
    of every finding would look perfect."""
    check_logits(student_logits, teacher_logits, T)
    z_student = at_least_float32(student_logits) / T  # (B, K)
    z_teacher = at_least_float32(teacher_logits.detach()) / T
    log_p, log_not_p = F.logsigmoid(z_teacher), F.logsigmoid(-z_teacher)
    log_q, log_not_q = F.logsigmoid(z_student), F.logsigmoid(-z_student)
    kl = log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)  # (B, K)
    return T**2 * kl.mean()

def mix_teachers(logits, T, multilabel=False):
    """Combine a list of teachers' logits, each (B, C), into logits whose softened p is the mean of
    the teachers' softened p. For classes these are T log p, and for findings T logit p."""
    if len(logits) == 1:
        return logits[0]
    z = torch.stack([at_least_float32(one) for one in logits]) / T  # (teachers, B, C)
    if multilabel:
        return T * (F.logsigmoid(z).logsumexp(dim=0) - F.logsigmoid(-z).logsumexp(dim=0))
    return T * (F.log_softmax(z, dim=2).logsumexp(dim=0) - math.log(len(logits)))

def check_settings(T, alpha=0.0):
    if not MIN_T <= T <= MAX_T:  # also rejects NaN
        raise ValueError(f"T, the temperature, must lie between {MIN_T} and {MAX_T}, got {T}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 (labels) and 1 (teacher), got {alpha}")

def check_logits(student_logits, teacher_logits, T):
    check_settings(T)
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(f"need logits (images, classes) of the same images and classes: student "
                         f"{tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}")

def at_least_float32(logits):
    """Convert bfloat16 logits, which have 8 significant bits, to float32 before softening."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

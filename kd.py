"""The losses of knowledge distillation, and nothing else: pure functions from tensors to a scalar.

A teacher's logits for a film, divided by a temperature T and put through softmax, say more than its
label does: not "pneumonia" but "pneumonia 0.83, normal 0.17". The student learns to say the same.

    p = softmax(teacher_logits / T)          the teacher's softened answer
    q = softmax(student_logits / T)          the student's
    soft = T^2 KL(p || q)                    how far the student is from the teacher
    hard = cross-entropy(student_logits, label)
    loss = (1 - alpha) hard + alpha soft     alpha = 0: labels only; alpha = 1: teacher only

Shapes: B films, C classes of which a film has exactly one (softmax), or K findings of which it may
have several (sigmoid). Names in the equations are names in the code; `log_q` holds a log, `q` does not.
"""

import torch
import torch.nn.functional as F


def check(student_logits, teacher_logits, T):
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(
            f"distillation needs two logits tensors of one shape (films, classes), got student "
            f"{tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)}: "
            f"ask both networks about the same films and classes"
        )
    if not T > 0:
        raise ValueError(f"the temperature T must be above 0, got {T}: T = 1 leaves logits as they are")


def at_least_float32(logits):
    """Logits under bfloat16 autocast have 8 significant bits: soften in float32 (or float64)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kd_loss(student_logits, teacher_logits, T):
    """Soft-target loss of Hinton et al. (2015), for one label out of C classes.

        loss = T^2 * mean over the batch of  sum_c p_c (log p_c - log q_c)

    student_logits, teacher_logits: (B, C), before any softmax. Returns a scalar.

    - The mean runs over films, not over films and classes ("batchmean", not "mean", in the words of
      F.kl_div): the other one makes the loss C times smaller, and alpha mean something else.
    - T^2 undoes the 1/T^2 by which a high temperature shrinks the gradient, which becomes
      T (q - p) / B, so that alpha and the learning rate need little retuning for every T.
    - Both sides are logs until the last moment: equal logits give exactly 0, and a probability that
      underflows gives 0 * finite instead of NaN.
    - The trap: on a single logit softmax is always 1, so the loss is 0 and trains nothing. Such
      networks, and those with several findings at once, need binary_kd_loss.
    """
    check(student_logits, teacher_logits, T)
    if student_logits.shape[1] < 2:
        raise ValueError("kd_loss needs at least 2 classes, got 1: softmax of one logit is always 1; "
                         "use binary_kd_loss")
    log_q = F.log_softmax(at_least_float32(student_logits) / T, dim=1)  # (B, C)
    log_p = F.log_softmax(at_least_float32(teacher_logits.detach()) / T, dim=1)  # (B, C)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)  # (B,)
    return T**2 * kl.mean()


def binary_kd_loss(student_logits, teacher_logits, T, mask=None):
    """The same for K findings that may occur together: one coin per finding instead of one die.

        p = sigmoid(teacher_logits / T)        q = sigmoid(student_logits / T)
        loss = T^2 * mean of  p (log p - log q) + (1 - p) (log (1 - p) - log (1 - q))

    student_logits, teacher_logits: (B, K); mask: (B, K), True where a label is known (all, if left
    out). The mean runs over films and findings that are not masked. Returns a scalar.

    The trap: kd_loss runs on such logits without complaint, but softmax cannot see a shift that all
    findings share, so a student that gives every finding twice the odds would be thought perfect.
    """
    check(student_logits, teacher_logits, T)
    z_student = at_least_float32(student_logits) / T
    z_teacher = at_least_float32(teacher_logits.detach()) / T
    log_p, log_not_p = F.logsigmoid(z_teacher), F.logsigmoid(-z_teacher)
    log_q, log_not_q = F.logsigmoid(z_student), F.logsigmoid(-z_student)
    kl = log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)  # (B, K)
    known = torch.ones_like(kl) if mask is None else mask.to(kl.dtype)
    return T**2 * (kl * known).sum() / known.sum().clamp(min=1)


def label_loss(logits, labels, label_smoothing=0.0):
    """Cross-entropy with the labels alone, mean over the batch.

    labels: (B,) integers, one class a film; or (B, K) floats 0, 1 or NaN (unknown: left out).
    label_smoothing moves that share of the label to the uniform distribution.
    """
    if labels.dim() == 1:
        return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=label_smoothing)
    logits, known = at_least_float32(logits), ~labels.isnan()
    target = labels.nan_to_num() * (1 - label_smoothing) + label_smoothing / 2
    loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


def distillation_loss(student_logits, teacher_logits, labels, T, alpha):
    """(1 - alpha) * hard + alpha * soft; returns total, hard, soft, so that both can be watched.

    Softmax when a film has one label, labels (B,); sigmoid when it may have several, labels (B, K).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha mixes labels (0) and teacher (1), so it must lie in [0, 1], got {alpha}")
    hard = label_loss(student_logits, labels)
    if labels.dim() == 1:
        soft = kd_loss(student_logits, teacher_logits, T)
    else:
        soft = binary_kd_loss(student_logits, teacher_logits, T, mask=~labels.isnan())
    return (1 - alpha) * hard + alpha * soft, hard, soft


def mean_teacher(logits, T, multilabel=False):
    """Several teachers as one: logits whose softened probabilities are the mean of the teachers' own.

        p = mean over teachers of softmax(logits / T);  T log p is returned  (sigmoid: T logit p)

    logits: a list of (N, C). The temperature in the mean is the one the student will be taught at.
    """
    if len(logits) == 1:
        return logits[0]
    z, n = torch.stack(logits) / T, torch.tensor(float(len(logits)))  # (teachers, N, C)
    if not multilabel:
        return T * (F.log_softmax(z, dim=2).logsumexp(dim=0) - n.log())
    return T * (F.logsigmoid(z).logsumexp(dim=0) - F.logsigmoid(-z).logsumexp(dim=0))

"""Every loss in its plainest form: one token, one chunk, one column at a time, in float64. Slow; the truth in tests.

Sources: X-Token (arXiv 2605.21699) and NVIDIA NeMo-RL's cross-tokenizer distillation (pull request 2797 for several teachers), whose
arithmetic the defaults with `topk_scope: batch` are; GOLD's uncommon columns are those of Universal Logit Distillation (arXiv 2402.12030).

Notation: row t of the logits z predicts token t+1, so the predictor row of the token at p is p-1. τ is the temperature. A chunk c holds
student tokens and teacher tokens; S_c and T_c are their predictor rows. It is valid when the batch calls it valid, its sample
counts, and neither S_c nor T_c is empty. A token counts when its mask and its sample's are nonzero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from xtoken_core.losses.cell_scores import CellScores
from xtoken_core.losses.logits import HiddenLogits, Logits, TopKLogits
from xtoken_core.losses.selection import EPSILON, FLOOR
from xtoken_core.losses.tables import H_KL_THRESHOLD
from xtoken_core.losses.types import TeacherBatch
from xtoken_core.projection import Projection
from xtoken_core.spec import LossSpec


class ReferenceOutput(NamedTuple):
    """What `distillation_loss` answers here."""

    loss: Tensor
    """0-dim float64, differentiable."""
    metrics: dict[str, float]


class Masks(NamedTuple):
    """The student's side of a batch without its logits."""

    input_ids: Tensor
    token_mask: Tensor
    sample_mask: Tensor


def distillation_loss(
    student_logits: Tensor | HiddenLogits,
    input_ids: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    teachers: Sequence[TeacherBatch],
    spec: LossSpec,
) -> ReferenceOutput:
    """The loss of one whole batch; arguments, loss and metrics as `xtoken_core.losses.distillation_loss` has them.

    loss = kd_weight · KD + ce_weight · CE; with dynamic_scaling sg(ratio · |CE| / |KD|) · KD + CE, the factor taken as 1 where KD = 0.

    Where teachers teach some samples only (`TeacherBatch.taught`): KD_i is multiplied by s_i, the share of the counted tokens in samples that
    teacher i teaches; the scale looks at the part of CE that is of samples with a teacher; the other part is added once more, times kd_weight
    or the ratio. So a sample weighs the same, taught or not.

    KD over the teachers i:
        sum: Σ w_i f_i s_i KD_i, f_i = log V_i / log min_j V_j with normalize_by_vocab, else 1, and w_i the fixed weights or, with a
            weight_metric, softmax_i(alpha · f_i · score_i) of the teachers' `score`s.
        averaged_logits: the full-vocabulary KL to the teacher of logits Σ w_i z_i / Σ w_i.
        select_teacher: KD_i of the teacher whose CE is lowest.
    """
    z = _float64(student_logits)
    targets = [
        (b, t) for b in range(z.shape[0]) for t in range(z.shape[1] - 1) if sample_mask[b] != 0 and token_mask[b, t + 1] != 0
    ]
    ce = cross_entropy(z, input_ids, targets)
    correct = sum(int(z[b, t].argmax() == input_ids[b, t + 1]) for b, t in targets)
    metrics: dict[str, Tensor | float] = {
        "ce_loss": ce,
        "accuracy": correct / max(len(targets), 1),
        "num_valid_samples": float(z.shape[0]),
    }

    def term(i: int) -> Tensor:
        value, details = teacher_loss(z, teachers[i], targets, Masks(input_ids, token_mask, sample_mask), spec)
        metrics[f"kl_loss_t{i}"] = value
        metrics.update({f"{name}_t{i}": detail for name, detail in details.items()})
        return value

    def teacher_score(i: int) -> float:
        teacher = teachers[i]
        if teacher.projection is None:
            return score(teacher.logits, input_ids, token_mask, sample_mask, teacher.token_bytes, spec)
        assert teacher.input_ids is not None and teacher.token_mask is not None
        own = _float64(teacher.logits)[..., : _vocabulary(teacher)]
        return score(own, teacher.input_ids, teacher.token_mask, sample_mask, teacher.token_bytes, spec)

    count = range(len(teachers))
    own = [[(b, t) for b, t in targets if teacher.taught is None or teacher.taught[b]] for teacher in teachers]
    untaught = [place for place in targets if teachers and all(place not in part for part in own)]
    rest = len(untaught) / max(len(targets), 1) * cross_entropy(z, input_ids, untaught)
    teachers = [_where_taught(teacher, token_mask) for teacher in teachers]
    kd = z.new_zeros(())
    if spec.aggregation == "averaged_logits":
        total = sum(teacher.weight for teacher in teachers)
        average = sum((_float64(teacher.logits) * (teacher.weight / total) for teacher in teachers), start=z.new_zeros(()))
        assert isinstance(average, Tensor)
        everything = list(range(z.shape[-1]))
        kd = same_vocabulary(z, average, targets, [everything] * z.shape[0], spec)
    elif spec.aggregation == "select_teacher":
        scores = [teacher_score(i) for i in count]
        selected = scores.index(max(scores))
        metrics["selected_teacher"] = float(selected)
        kd = term(selected)
    else:
        sizes = [math.log(_vocabulary(teacher)) for teacher in teachers]
        factors = [size / min(sizes) if spec.normalize_by_vocab else 1.0 for size in sizes]
        weights = [teacher.weight for teacher in teachers]
        if spec.weight_metric is not None:
            powers = [math.exp(spec.alpha * factors[i] * teacher_score(i)) for i in count]
            weights = [power / sum(powers) for power in powers]
        for i in count:
            metrics[f"weight_t{i}"] = weights[i]
            kd = kd + weights[i] * factors[i] * (len(own[i]) / max(len(targets), 1) if targets else 1.0) * term(i)

    scale = 1.0
    if spec.dynamic_scaling:
        scale = spec.share * abs((ce - rest).item() / kd.item()) if kd.item() != 0 else 1.0
        loss = scale * kd + ce
    else:
        loss = spec.kd_weight * kd + spec.ce_weight * ce
    loss = loss + (spec.share if spec.dynamic_scaling else spec.kd_weight) * rest
    metrics |= {"loss": loss, "kl_loss": kd, "kl_loss_scale": scale}
    return ReferenceOutput(loss, {name: torch.as_tensor(value, dtype=torch.float64).item() for name, value in metrics.items()})


def _where_taught(teacher: TeacherBatch, token_mask: Tensor) -> TeacherBatch:
    """Masked on the samples that it does not teach."""
    if teacher.taught is None:
        return teacher
    if teacher.projection is None:
        own = token_mask if teacher.token_mask is None else teacher.token_mask
        return replace(teacher, token_mask=own * teacher.taught[:, None])
    assert teacher.chunk_valid is not None
    return replace(teacher, chunk_valid=teacher.chunk_valid & teacher.taught[:, None])


def cross_entropy(z: Tensor, input_ids: Tensor, targets: list[tuple[int, int]]) -> Tensor:
    """CE = mean over the rows (b, t) of `targets` of -log softmax(z_t)[token t+1], in nats; τ plays no part."""
    total = z.sum() * 0
    for b, t in targets:
        total = total - z[b, t].log_softmax(-1)[input_ids[b, t + 1]]
    return total / max(len(targets), 1)


def score(
    logits: Logits, input_ids: Tensor, token_mask: Tensor, sample_mask: Tensor, token_bytes: Tensor | None, spec: LossSpec
) -> float:
    """How sure a teacher is of its own text, at τ = 1: the greater the surer.

    ce (and select_teacher): minus the sum of -log p over the next tokens that count, per token, or with `score_unit: byte` per byte of
    those tokens. entropy: minus the mean entropy over the positions that count. max_prob: the mean of the largest probability over them.
    """
    z = _float64(logits).detach()
    metric = spec.weight_metric or "ce"
    total, units = 0.0, 0
    for b in range(z.shape[0]):
        for t in range(z.shape[1]):
            log_probs = z[b, t].log_softmax(-1)
            if sample_mask[b] == 0:
                continue
            if metric == "ce":
                if t + 1 < z.shape[1] and token_mask[b, t + 1] != 0:
                    total += float(log_probs[input_ids[b, t + 1]])
                    units += 1 if token_bytes is None or spec.score_unit == "token" else int(token_bytes[b, t + 1])
            elif token_mask[b, t] != 0:
                total += float((log_probs.exp() * log_probs).sum() if metric == "entropy" else log_probs.max().exp())
                units += 1
    return total / max(units, 1)


def teacher_loss(
    z: Tensor, teacher: TeacherBatch, targets: list[tuple[int, int]], masks: Masks, spec: LossSpec
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """KD_i of one teacher, and details of it for the metrics."""
    if isinstance(teacher.logits, CellScores):
        z_t = z.new_zeros(0)  # not known
    else:
        z_t = _float64(teacher.logits)[..., : _vocabulary(teacher)]
    if teacher.projection is None:
        own = masks.token_mask if teacher.token_mask is None else teacher.token_mask
        taught = [(b, t) for b, t in targets if own[b, t + 1] != 0]
        return same_vocabulary(z, z_t, taught, top_columns(z_t, own, spec), spec), {}
    mode = teacher.mode or spec.mode
    if mode == "auto":
        raise ValueError("mode: auto is resolved before the loss")
    if mode == "partition_kl":
        chunks = valid_chunks(teacher, masks.sample_mask, spec.model_copy(update={"chunk_distribution": "first"}))
        return partition_kl(z, z_t, teacher, masks.input_ids, chunks, spec), {"num_valid_chunks": float(len(chunks))}
    chunks = valid_chunks(teacher, masks.sample_mask, spec)
    if mode == "p_kl":
        assert teacher.token_mask is not None
        columns = top_columns(z_t, teacher.token_mask, spec)
        loss = p_kl(z, z_t, teacher.projection, chunks, columns, spec)
        return loss, {"num_valid_chunks": float(len(chunks)), "num_valid_pairs": float(len(chunks))}
    common, l1 = common_and_uncommon(z, z_t, common_pairs(teacher.projection, mode, z.shape[-1]), chunks, spec)
    details: dict[str, Tensor | float] = {"num_valid_chunks": float(len(chunks)), "kl_common": common, "l1_uncommon": l1}
    return spec.temperature**2 * (common + l1), details


def valid_chunks(teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> list[tuple[int, list[int], list[int]]]:
    """(b, S_c, T_c) of every valid chunk. `first`: only the predictor row of the chunk's first token, if that has one."""
    assert teacher.student_chunk_id is not None and teacher.teacher_chunk_id is not None
    assert teacher.chunk_valid is not None
    chunks = []
    for b in range(teacher.chunk_valid.shape[0]):
        for c in range(teacher.chunk_valid.shape[1]):
            if not teacher.chunk_valid[b, c] or sample_mask[b] == 0:
                continue
            if spec.exact_match_only and teacher.chunk_exact is not None and not teacher.chunk_exact[b, c]:
                continue
            student_rows = _predictor_rows(teacher.student_chunk_id[b], c, spec)
            teacher_rows = _predictor_rows(teacher.teacher_chunk_id[b], c, spec)
            if student_rows and teacher_rows:
                chunks.append((b, student_rows, teacher_rows))
    return chunks


def _predictor_rows(chunk_id: Tensor, c: int, spec: LossSpec) -> list[int]:
    tokens = [p for p in range(len(chunk_id)) if chunk_id[p] == c]
    if spec.chunk_distribution == "first":
        tokens = tokens[:1]
    return [p - 1 for p in tokens if p >= 1]


def top_columns(z_t: Tensor, token_mask: Tensor, spec: LossSpec) -> list[list[int]]:
    """K per sequence: the vocab_topk teacher columns whose largest logit over the scope is largest, ascending; of equals the lowest.

    batch: over every row of the tensor (one K for all). sequence: over the sequence's unmasked rows whose next token is unmasked.
    """
    batch, rows, vocab = z_t.shape
    scopes: list[list[tuple[int, int]]]
    if spec.topk_scope == "batch":
        scopes = [[(b, t) for b in range(batch) for t in range(rows)]] * batch
    else:
        scopes = [[(b, t) for t in range(rows - 1) if token_mask[b, t] != 0 and token_mask[b, t + 1] != 0] for b in range(batch)]
    columns = []
    for scope in scopes:
        importance = [max((float(z_t[b, t, j]) for b, t in scope), default=-math.inf) for j in range(vocab)]
        best = sorted(range(vocab), key=lambda j: (-importance[j], j))[: spec.vocab_topk]
        columns.append(sorted(best))
    return columns


def common_pairs(projection: Projection, mode: str, student_vocab: int) -> list[tuple[int, int]]:
    """(student id, teacher id) of the common vocabulary, each id at most once.

    gold: rows of W that are one entry of weight 1 (its `exact` mask, where it has one); on collision the lowest student id.
    h_kl: rows whose largest weight is at least 0.6; on collision the largest weight, then the lowest student id.
    """
    candidates = []
    for s in range(student_vocab):
        entries = [
            (float(weight), int(t))
            for t, weight in zip(projection.indices[s], projection.weights[s], strict=True)
            if t >= 0 and weight > 0
        ]
        if not entries:
            continue
        weight, t = max(entries, key=lambda entry: entry[0])
        if mode == "h_kl" and weight >= H_KL_THRESHOLD:
            candidates.append((-weight, s, t))
        elif mode == "gold":
            exact = entries == [(1.0, t)] if projection.exact is None else bool(projection.exact[s])
            if exact:
                candidates.append((-1.0, s, t))
    taken: set[int] = set()
    pairs = []
    for _, s, t in sorted(candidates):
        if t not in taken:
            taken.add(t)
            pairs.append((s, t))
    return sorted(pairs)


def kl(target: Tensor, other: Tensor, reverse: bool) -> Tensor:
    """Of log-probabilities: Σ_j exp(target_j) (target_j - other_j); reverse: with the two exchanged."""
    total = target.new_zeros(())
    for r, l in zip(target, other, strict=True):  # noqa: E741 - the formula's letters
        total = total + (l.exp() * (l - r) if reverse else r.exp() * (r - l))
    return total


def p_kl(
    z: Tensor,
    z_t: Tensor,
    projection: Projection,
    chunks: list[tuple[int, list[int], list[int]]],
    columns: list[list[int]],
    spec: LossSpec,
) -> Tensor:
    """Projected KL: τ² / N · Σ_c KL_c over the N valid chunks.

    Student: p = softmax(z_S / τ) over its whole vocabulary, q = p W[:, K]. Teacher: r = log_softmax(z_T[:, K] / τ).
    mean: Q_c = mean of q over S_c, then Q_c / (Σ Q_c + 1e-10); R_c = mean of r over T_c, in log space, not renormalised; l = log(Q_c + 1e-10).
    first: Q_c and R_c from the one row, both renormalised within K, l = log Q_c without epsilons (log of less than 2^-126 is log 2^-126).
    KL_c = Σ_j exp(R_c)(R_c - l); reverse Σ_j exp(l)(l - R_c).
    """
    w = z.new_zeros(z.shape[-1], z_t.shape[-1])
    for slot in range(projection.indices.shape[1]):
        t = projection.indices[: z.shape[-1], slot]
        s = (t >= 0).nonzero().squeeze(1)
        w = w.index_put((s, t[s]), projection.weights[s, slot].double(), accumulate=True)
    total = z.sum() * 0
    for b, student_rows, teacher_rows in chunks:
        k = columns[b]
        q = torch.stack([(z[b, t] / spec.temperature).softmax(-1) @ w[:, k] for t in student_rows]).mean(0)
        r = torch.stack([(z_t[b, t][k] / spec.temperature).log_softmax(-1) for t in teacher_rows]).mean(0)
        if spec.chunk_distribution == "mean":
            log_q = (q / (q.sum() + EPSILON) + EPSILON).log()
        else:
            log_q = (q / q.sum().clamp(min=FLOOR)).clamp(min=FLOOR).log()
        total = total + kl(r, log_q, spec.reverse_kl)
    return spec.temperature**2 * total / max(len(chunks), 1)


def partition_kl(
    z: Tensor,
    z_t: Tensor,
    teacher: TeacherBatch,
    student_ids: Tensor,
    chunks: list[tuple[int, list[int], list[int]]],
    spec: LossSpec,
) -> Tensor:
    """KL between two coarse-grainings of one event: which text follows. 1 / N · Σ_c (first_c + realised_c) over the N valid chunks.

    The cell of a token is the longest byte string that is an ordinary token of both vocabularies and that its bytes begin with; for
    tokenizers that take the longest piece, the next cell is a function of the text (`xtoken_core.partition`).
    first: P_S, P_T = the cells' sums of softmax(z) in the rows that predict the chunk's first token, each power 1/τ and renormalised (a
        sum of less than 2^-126 counts as that); τ² KL(P_T || P_S), or with reverse_kl the other way round.
    realised, τ = 1, for a chunk whose bytes are equal on both sides, that is not one token on both sides and whose first tokens are of one
        cell: by the chain rule that cell is cut in two, this chunk and the rest. a = Π p_T(token), b = Π p_S(token) over the chunk;
        the cell's probability P_T times the KL of (a / M_T, 1 - a / M_T) from (b / M_S, 1 - b / M_S), M the cell's sum, or with
        reverse_kl P_S times the other way round. Shares above 1 - 1e-6 count as that.
    Tokens without a cell are left out on both sides. Never negative, and zero where the models agree.

    Of a teacher's scores the listed cells are known and Σ P_T^(1/τ) of the others. first: KL of {each listed cell, the others}, both sides'
    powers 1/τ summed over the others before they are renormalised. The realised part is the same, since the cell that it cuts is listed.
    """
    assert teacher.projection is not None and teacher.projection.cells is not None
    assert teacher.input_ids is not None and teacher.student_chunk_id is not None and teacher.teacher_chunk_id is not None
    cells, tau = teacher.projection.cells, spec.temperature
    scores = teacher.logits if isinstance(teacher.logits, CellScores) else None
    tokens_s = _token_log_probs(z, student_ids)
    tokens_t = _token_log_probs(z_t, teacher.input_ids) if scores is None else scores.realised.double()
    total = z.sum() * 0
    for b, (student_row,), (teacher_row,) in chunks:
        s = _cell_masses(z[b, student_row], cells.student, cells.num_cells)
        if scores is None:
            known, t = list(range(cells.num_cells)), _cell_masses(z_t[b, teacher_row], cells.teacher, cells.num_cells)
            softened, other, all_theirs = s / tau, t / tau, t.logsumexp(-1)
        else:
            known, t = scores.indices[b, teacher_row].tolist(), scores.values[b, teacher_row].double()
            softened, other = _listed_and_rest(s / tau, t / tau, known, scores.rest[b, teacher_row].double())
            all_theirs = scores.total[b, teacher_row].double()
        total = total + tau**2 * kl(other.log_softmax(-1), softened.log_softmax(-1), spec.reverse_kl)

        chunk = int(teacher.student_chunk_id[b, student_row + 1])
        spelled = [
            _chunk_log_prob(tokens_s[b], teacher.student_chunk_id[b], chunk),
            _chunk_log_prob(tokens_t[b], teacher.teacher_chunk_id[b], chunk),
        ]
        cell = int(cells.student[student_ids[b, student_row + 1]])
        same = cell >= 0 and cell == int(cells.teacher[teacher.input_ids[b, teacher_row + 1]])
        exact = teacher.chunk_exact is not None and bool(teacher.chunk_exact[b, chunk])
        if not (same and exact and max(tokens for _, tokens in spelled) > 1):
            continue
        masses = s[cell], t[known.index(cell)]
        shares = [(spell - mass).clamp(max=math.log1p(-1e-6)) for (spell, _), mass in zip(spelled, masses, strict=True)]
        halves = [torch.stack([share, torch.log1p(-share.exp())]) for share in shares]
        mass = (masses[0] - s.logsumexp(-1) if spec.reverse_kl else masses[1] - all_theirs).exp()
        total = total + mass * kl(halves[1], halves[0], spec.reverse_kl)
    return total / max(len(chunks), 1)


def _cell_masses(z: Tensor, table: Tensor, count: int) -> Tensor:
    """[count]: the log of each cell's sum of softmax(z), at least that of 2^-126."""
    p = z.softmax(-1)
    of_cell = [[int(i) for i in (table[: len(p)] == c).nonzero()] for c in range(count)]
    return torch.stack([p[ids].sum() for ids in of_cell]).clamp(min=FLOOR).log()


def _listed_and_rest(s: Tensor, t: Tensor, known: list[int], t_rest: Tensor) -> tuple[Tensor, Tensor]:
    """Logs of both sides' masses of the `known` cells, and of all others together, if there are any. s: of all cells, t: of the known."""
    rest = sorted(set(range(len(s))) - set(known))
    if not rest:
        return s[known], t
    return torch.cat([s[known], s[rest].logsumexp(-1)[None]]), torch.cat([t, t_rest[None]])


def _token_log_probs(z: Tensor, ids: Tensor) -> Tensor:
    """[B, T]: of the token that each row predicts; the last row predicts none."""
    return z.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def _chunk_log_prob(tokens: Tensor, chunk_id: Tensor, chunk: int) -> tuple[Tensor, int]:
    """The sum of the log-probabilities of a chunk's tokens, of which row p - 1 of `tokens` has that of p, and how many they are."""
    of_chunk = [p for p in range(1, len(chunk_id)) if chunk_id[p] == chunk]
    return sum((tokens[p - 1] for p in of_chunk), start=tokens.new_zeros(())), len(of_chunk)


def common_and_uncommon(
    z: Tensor, z_t: Tensor, pairs: list[tuple[int, int]], chunks: list[tuple[int, list[int], list[int]]], spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """gold and h_kl, whose loss is τ² (KL + L1): both parts, each a mean over the valid chunks.

    Each side of a chunk: the mean over its rows of the full-vocabulary log_softmax(z / τ) (`first`: of the one row).
    KL over the common pairs as they are, not renormalised. L1: the probabilities of the uncommon columns of both sides, each sorted
    descending and cut to min(|U_s|, |U_t|, uncommon_topk), Σ |student - teacher|.
    """
    common_s, common_t = [s for s, _ in pairs], [t for _, t in pairs]
    rest_s = [s for s in range(z.shape[-1]) if s not in set(common_s)]
    rest_t = [t for t in range(z_t.shape[-1]) if t not in set(common_t)]
    depth = min(len(rest_s), len(rest_t), spec.uncommon_topk)
    divergence = difference = z.sum() * 0
    for b, student_rows, teacher_rows in chunks:
        s = torch.stack([(z[b, t] / spec.temperature).log_softmax(-1) for t in student_rows]).mean(0)
        t = torch.stack([(z_t[b, t] / spec.temperature).log_softmax(-1) for t in teacher_rows]).mean(0)
        divergence = divergence + kl(t[common_t], s[common_s], spec.reverse_kl)
        s_sorted = s[rest_s].exp().sort(descending=True, stable=True).values[:depth]
        t_sorted = t[rest_t].exp().sort(descending=True, stable=True).values[:depth]
        for a, b_ in zip(s_sorted, t_sorted, strict=True):
            difference = difference + (a - b_).abs()
    return divergence / max(len(chunks), 1), difference / max(len(chunks), 1)


def same_vocabulary(z: Tensor, z_t: Tensor, targets: list[tuple[int, int]], columns: list[list[int]], spec: LossSpec) -> Tensor:
    """τ² times the mean over the counted tokens of the KL between log_softmax(z / τ) of both within K.

    A teacher known by its k largest logits a row has -inf elsewhere: each row compares the columns of K that it holds.
    """
    total = z.sum() * 0
    for b, t in targets:
        k = [j for j in columns[b] if z_t[b, t, j] != -math.inf]
        if k:
            s, r = ((x[b, t][k] / spec.temperature).log_softmax(-1) for x in (z, z_t))
            total = total + kl(r, s, spec.reverse_kl)
    return spec.temperature**2 * total / max(len(targets), 1)


def _float64(logits: Logits) -> Tensor:
    """Dense logits [B, T, V] in float64, -inf where a top-k teacher holds none."""
    if isinstance(logits, TopKLogits):
        full = torch.full(logits.shape, -math.inf, dtype=torch.float64, device=logits.device)
        return full.scatter(2, logits.indices.long(), logits.values.double())
    if isinstance(logits, HiddenLogits):
        bias = None if logits.bias is None else logits.bias.double()
        return replace(logits, hidden=logits.hidden.double(), weight=logits.weight.double(), bias=bias).dense()
    assert isinstance(logits, Tensor)
    return logits.double()


def _vocabulary(teacher: TeacherBatch) -> int:
    """Columns of a teacher's logits, padding left out."""
    columns = teacher.logits.shape[-1]
    known = None if teacher.projection is None else teacher.projection.teacher_vocab_size
    return columns if known is None else min(columns, known)

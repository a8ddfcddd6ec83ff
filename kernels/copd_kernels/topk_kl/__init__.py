"""Divergence per token between a student and a teacher known by k of its log-probs and the mass of the rest.

Shapes: T tokens, K ids per token. Everything outside the K ids is one more outcome, the tail, so both sides
are distributions on K + 1 outcomes and the result is a divergence: >= 0, at most the full-vocabulary one
(data processing inequality), and equal to it at K = V.

``topk_divergence(student_logprobs_TK, teacher_logprobs_TK, teacher_log_tail_T, kind, jsd_weight)``, [T] nats:
  reverse  KL(student || teacher)
  forward  KL(teacher || student)
  jsd      w KL(teacher || m) + (1 - w) KL(student || m), m = w teacher + (1 - w) student
The student's tail is 1 - sum p; a tail without mass contributes 0. Gradient: of the student's log-probs only.

FLOPs: about 10 T K. Bytes: 2 T K x itemsize read, T x itemsize written; backward T K more written.
Limits: 1 <= K <= V; ids distinct within a row; float32 or float64 (Triton: float32); finite log-probs. Tails under
eps / 8 count as eps / 8 inside logarithms: a finite stand-in for the infinite reverse KL to a teacher without a tail.
"""

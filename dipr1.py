"""DIP-R1: reinforcement learning that teaches Qwen2.5-VL to see individuals in a crowd (arXiv 2505.23179).

    for each prompt q (an image and a question):
        o_1 .. o_G  ~  pi(. | q)                    a group of completions: <think> <look> <answer>
        r_i  =  w_f format + w_l look + w_a accuracy           three rewards by rule, no learned judge
        A_i  =  (r_i - mean r) / (std r + 1e-4)                better or worse than its siblings?
        minimise  mean_t [ -min(rho A, clip(rho, 1-eps, 1+eps) A) + beta KL(pi || pi_ref) ]

    python dipr1.py --demo                          no GPU, no download: watch a tiny Qwen2.5-VL learn
    torchrun --nproc_per_node 8 dipr1.py            the real thing: Qwen2.5-VL-3B on data/train.jsonl
    python dipr1.py --eval --model DIR --data FILE  precision, recall, F1, Jaccard index of a checkpoint
    python dipr1.py --demo --compare 3              Perception-R1, DIP-R1 without look, DIP-R1, three seeds
    python dipr1.py --help                          every knob

The paper's exact equations for the look and the accuracy reward are not public: where a definition is ours,
the words "our reading" stand beside it. How this file departs from textbook GRPO: a group is scored as ONE
row, prompt and picture shared by its G completions; the loss is normalised by token over the group; the look
reward is credited to the tokens that can have earned it.

`--method perception-r1` is Perception-R1 (arXiv 2504.07954) in the same harness, the baseline to beat: no
look, a format reward of +1 or -1, and one answer reward for each of four tasks. What is asked (QUESTION,
PERCEPTION_QUESTIONS) and what is rewarded (`group_rewards`) tell the methods apart; the rest is shared.

Read from the top: knobs, template and parser, boxes, rewards, advantages and loss; then the model, the
rollout, the data and one training step. There the method is told; what follows is checkpoints, evaluation
and the command line.
"""
import bisect
import contextlib
import copy
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config


def knob(default, help, **parser):
    """A field of Config: its default, the sentence that `--help` shows, and what else its parser takes."""
    return field(default=default, metadata={"help": help, **parser})


@dataclass
class Config:
    """Every knob, each explained on its line. The command line is made from this."""

    demo: bool = knob(False, "draw scenes, make a tiny model, train it, show before and after")
    compare: int = knob(0, "with --demo: both methods from one warm-up, side by side, on so many seeds")
    eval: bool = knob(False, "evaluate --model on --data instead of training")
    predictions: str = knob("", "score this predictions.jsonl on --data, without a model")
    method: Literal["dip-r1", "perception-r1"] = knob("dip-r1", "what is asked, and what is rewarded")
    task: Literal["detection", "grounding", "counting", "ocr"] = knob(
        "detection", "of the demo, with --method perception-r1; a line of the data names its own")
    model: str = knob("Qwen/Qwen2.5-VL-3B-Instruct", "a Qwen2.5-VL: a name on the hub or a folder")
    data: str = knob("data/train.jsonl", "one image a line, as data_prep.py writes it")
    output_dir: str = knob("runs/dipr1", "where metrics.jsonl, pictures and checkpoints go")
    seed: int = knob(0, "of data order and sampling; the same seed repeats a run exactly (on a CPU)")
    max_pixels: int = knob(1280 * 28 * 28, "larger images are scaled down; 28 x 28 pixels are a token")
    max_prompt_tokens: int = knob(2048, "the image of a longer prompt is scaled down further")

    steps: int = knob(1000, "GRPO steps")
    prompts_per_step: int = knob(8, "prompts (groups) a step, over all ranks together")
    group_size: int = knob(8, "G, completions a prompt")
    max_new_tokens: int = knob(1024, "a completion is cut here")
    temperature: float = knob(1.0, "of sampling, and of the distribution that is trained")
    lr: float = knob(1e-6, "peak learning rate: linear warm-up, then linear decay to 0")
    warmup_steps: int = knob(10, "steps of warm-up, of SFT and of GRPO alike")
    beta: float = knob(0.04, "weight of the KL to the reference model; 0 loads none")
    clip_eps: float = knob(0.2, "eps of the clipped ratio")
    num_iterations: int = knob(1, "updates on each batch of rollouts")
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm")

    format_weight: float = knob(1.0, "w_f")
    look_weight: float = knob(0.25, "w_l; the look is learned fast, and more of it costs precision")
    accuracy_weight: float = knob(1.0, "w_a")
    recall_weight: float = knob(0.65, "w, recall's share of accuracy; at 0.5 the policy turns cautious")
    look_credit: Literal["section", "completion"] = knob("section", "tokens that earn the look reward")

    sft_steps: int = knob(0, "supervised steps before GRPO, on the truth written in the template")
    sft_lr: float = knob(1e-5, "their peak learning rate")
    sft_batch: int = knob(32, "images a supervised step, over all ranks together")

    freeze_vision: bool = knob(False, "do not train the vision tower; its features are computed once a step")
    gradient_checkpointing: bool = knob(False, "recompute activations in the backward: slower, less memory")
    groups_per_forward: int = knob(1, "groups scored in one forward; more is faster, if it fits")
    batch_size: int = knob(8, "prompts decoded at once in evaluation")
    samples: int = knob(8, "answers sampled an image in evaluation, beside the greedy one; 0 = none")
    pictures: int = knob(8, "draw the first so many images of an evaluation")
    limit: int = knob(0, "evaluate on the first so many images only; 0 = all")
    picture_every: int = knob(20, "steps between pictures; 0 = none")
    save_every: int = knob(100, "steps between checkpoints (one more at the end); 0 = none")
    keep: int = knob(3, "so many checkpoints are kept, the newest; 0 = all")
    resume: str = knob("", "go on from this checkpoint; without a name, from the newest complete one",
                       nargs="?", const="newest")


# ------------------------------------------------------------------------------------------------------------
# Template and parsing: a prompt that asks to look first, and a parser that no completion can crash

CHAT = (  # Qwen2.5-VL's chat template, written out
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
QUESTION = (  # our reading: the paper's prompt is not public
    "Find every {target} in the image, also where one hides behind another. First describe the whole scene "
    "between <think> and </think>. Then list the regions where one is hard to tell from the next between "
    "<look> and </look>. Last list one box for each between <answer> and </answer>. Boxes are a JSON list of "
    "[x1, y1, x2, y2] in pixels. Example:\n<think>Two, one in front of the other.</think>"
    "<look>[[10, 20, 58, 90]]</look><answer>[[10, 20, 40, 88], [31, 24, 58, 90]]</answer>"
)
PERCEPTION_QUESTIONS = {  # Perception-R1 asks for the answer alone; our wording
    "detection": (
        "Find every {target} in the image. List one box for each between <answer> and </answer>. Boxes are a "
        "JSON list of [x1, y1, x2, y2] in pixels. Example:\n"
        "<answer>[[10, 20, 40, 88], [31, 24, 58, 90]]</answer>"
    ),
    "grounding": (
        "Find {target} in the image. Give its one box between <answer> and </answer>, as a JSON list of "
        "[x1, y1, x2, y2] in pixels. Example:\n<answer>[[31, 24, 58, 90]]</answer>"
    ),
    "counting": (
        "Count every {target} in the image. List one point on each between <answer> and </answer>. Points "
        "are a JSON list of [x, y] in pixels. Example:\n<answer>[[25, 54], [45, 57]]</answer>"
    ),
    "ocr": "Read the image. Write its text between <answer> and </answer>.",
}
LABELLED = ' Instead of a bare box write {"bbox_2d": [x1, y1, x2, y2], "label": what it is}.'


def question(record):
    """What a record's method and task ask."""
    asked = QUESTION if record["method"] == "dip-r1" else PERCEPTION_QUESTIONS[record["task"]]
    return asked.format(target=record["target"]) + (LABELLED if "labels" in record else "")


# Linear on every input: no two neighbouring parts of these patterns can match the same text.
NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"  # at most six digits: finite, whatever the policy writes
BOX, POINT = (re.compile(r"\[" + ",".join([NUMBER] * k) + r"\]") for k in (4, 2))
LABEL = r'"label"\s*:\s*"([^"{}]*)"\s*'
QWEN_ROW = re.compile(
    r"\{\s*(?:" + LABEL + r",\s*)?" + r'"(?:bbox|point)_2d"\s*:\s*(\[[^][{}]*\])\s*'
    r"(?:,\s*" + LABEL + r")?\}"
)


@dataclass
class Response:
    """A completion taken apart.

    `look` and `answer` are (n, 4) arrays of x1, y1, x2, y2 in pixels as the model sees them, not yet clipped
    to the image. None: the section is missing or no list of boxes, which is not the same as an empty list,
    (0, 4).
    """

    think: str | None
    look: np.ndarray | None
    answer: np.ndarray | None
    well_formed: bool


def parse_rows(text, row):
    """A JSON list of n rows of k numbers, as BOX and POINT have them, or Qwen's own form of it -> (n, k), or
    None. Qwen writes `[{"bbox_2d": [1, 2, 3, 4], "label": "person"}]`, and of points "point_2d"."""
    text, k = text.strip(), row.groups
    if text.startswith("```") and text.endswith("```"):
        text = text.removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    glue_and_numbers = row.split(QWEN_ROW.sub(r"\2", text))  # glue, x1, y1, x2, y2, glue, ..., glue
    glue = [piece.strip() for piece in glue_and_numbers[:: k + 1]]
    n = len(glue) - 1
    if n == 0:
        return np.zeros((0, k)) if re.fullmatch(r"\[\s*\]", text) else None
    if glue != ["["] + [","] * (n - 1) + ["]"]:
        return None
    del glue_and_numbers[:: k + 1]
    return np.array(glue_and_numbers, dtype=float).reshape(n, k)


def parse_boxes(text):
    """`[[1, 2, 3, 4], ...]`, or the same in Qwen's form -> (n, 4), or None."""
    return parse_rows(text, BOX)


def sections(text, names):
    """Split a completion on the tags of these sections -> ([the text of each, or None], well-formed?).

    Well-formed: exactly these tags, once each, in order, and nothing but white space outside the sections.
    Of a malformed completion the sections that stand there once are still read: a right answer stays right.
    """
    expected = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
    pieces = re.split("(" + "|".join(expected) + ")", text)
    tags, between = pieces[1::2], pieces[2::2]
    outside = [pieces[0], *between[1::2]]

    def section(opening, closing):
        if tags.count(opening) != 1 or tags.count(closing) != 1:
            return None
        start = tags.index(opening)
        return between[start] if tags[start + 1 : start + 2] == [closing] else None

    found = [section(f"<{name}>", f"</{name}>") for name in names]
    return found, tags == expected and not "".join(outside).strip()


def parse_response(text):
    """DIP-R1's completion -> Response. Never raises; linear in the length of the text."""
    (think, look, answer), well_formed = sections(text, ["think", "look", "answer"])
    look, answer = (None if part is None else parse_boxes(part) for part in (look, answer))
    return Response(think, look, answer, well_formed)


def read_answer(text, record):
    """What a completion answers, of either method -> boxes (n, 4); points (n, 2) if the task is counting; a
    string if it is ocr; None if there is none or it does not parse."""
    (answer,), _ = sections(text, ["answer"])
    if answer is None or record["task"] == "ocr":
        return answer
    return parse_rows(answer, POINT if record["task"] == "counting" else BOX)


def read_labels(text, n):
    """The labels of the n boxes that a completion answers in Qwen's form, None where one is missing; all None
    if some boxes are bare, for then nobody knows which label is whose."""
    (answer,), _ = sections(text, ["answer"])
    labels = [before or after or None for before, _, after in QWEN_ROW.findall(answer)]
    return labels if len(labels) == n else [None] * n


# ------------------------------------------------------------------------------------------------------------
# Boxes and matching


def as_boxes(boxes):
    """Anything that holds boxes, an empty list too -> (n, 4) floats."""
    return np.asarray(boxes, float).reshape(-1, 4)


def clip_boxes(boxes, width, height):
    """(n, 4) boxes cut to the image. One outside becomes empty, overlaps nothing, and still counts."""
    return np.clip(as_boxes(boxes), 0, [width, height, width, height])


def box_area(boxes):
    """(n, 4) -> (n,) in square pixels; 0 for an inverted box."""
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)


def box_intersection(a, b):
    """(n, 4), (m, 4) -> (n, m) in square pixels."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.prod(np.maximum(bottom_right - top_left, 0), axis=2)


# IoU(a, b) = |a n b| / |a u b|
def box_iou(a, b):
    """(n, 4), (m, 4) -> (n, m) in [0, 1]; 0 where either box is empty."""
    a, b = as_boxes(a), as_boxes(b)
    intersection = box_intersection(a, b)
    union = box_area(a)[:, None] + box_area(b)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def match_boxes(pred, gt, iou_threshold=0.5, allowed=True):
    """The one-to-one pairs with IoU >= threshold of largest total IoU -> (pred_idx, gt_idx, ious). Only those
    pairs may be that are `allowed`, (n, m)."""
    iou = box_iou(pred, gt)
    iou[(iou < iou_threshold) | ~np.broadcast_to(allowed, iou.shape)] = 0
    rows, cols = linear_sum_assignment(iou, maximize=True)
    paired = iou[rows, cols] > 0
    return rows[paired], cols[paired], iou[rows, cols][paired]


def share_inside(boxes, regions):
    """(n, 4), (m, 4) -> (n,) in [0, 1]: the largest share of each box that lies in one of the regions."""
    boxes, regions = as_boxes(boxes), as_boxes(regions)
    inside, area = box_intersection(boxes, regions).max(axis=1, initial=0), box_area(boxes)
    return np.divide(inside, area, out=np.zeros_like(area), where=area > 0)


def crowded(boxes, iou_threshold):
    """(n, 4) -> (n,) bool: which boxes overlap another one by more than this IoU."""
    return (box_iou(boxes, boxes) - np.eye(len(boxes)) > iou_threshold).any(axis=1)


def crowds(boxes, iou_threshold):
    """(n, 4) -> (k, 4): a box around each cluster of boxes, those that overlap by more than this IoU."""
    k, cluster = connected_components(box_iou(boxes, boxes) > iou_threshold, directed=False)
    members = [boxes[cluster == number] for number in range(k)]
    return as_boxes([[*m[:, :2].min(axis=0), *m[:, 2:].max(axis=0)] for m in members if len(m) > 1])


def excused(pred, matched, ignore=None):
    """How many unmatched predictions lie more than half inside an ignore region. They are not counted: nobody
    annotated there, so nobody can say that they are wrong."""
    inside = share_inside(pred, [] if ignore is None else ignore) > 0.5
    return int(np.delete(inside, matched).sum())


def count_matches(pred, gt, ignore=None, iou_threshold=0.5):
    """-> (true positives, predictions less those excused, truths)."""
    pred_idx, _, _ = match_boxes(pred, gt, iou_threshold)
    return len(pred_idx), len(pred) - excused(pred, pred_idx, ignore), len(gt)


# ------------------------------------------------------------------------------------------------------------
# The three rewards


# r_fmt = 1[well-formed, a thought, and two lists of boxes]
def format_reward(text):
    """1.0 if the completion has the template's shape and both lists parse, else 0.0 (paper)."""
    response = parse_response(text)
    parsed = response.look is not None and response.answer is not None
    return float(response.well_formed and parsed and bool(response.think.strip()))


def coverage(boxes, width, height, cell=14):
    """C(x): how many boxes cover the centre of each 14-pixel cell x -> (height / 14, width / 14) counts."""
    boxes, x, y = as_boxes(boxes), np.arange(cell / 2, width, cell), np.arange(cell / 2, height, cell)
    in_columns = (boxes[:, 0:1] <= x) & (x <= boxes[:, 2:3])  # (n, W)
    in_rows = (boxes[:, 1:2] <= y) & (y <= boxes[:, 3:4])  # (n, H)
    return in_rows.T.astype(float) @ in_columns.astype(float)


# u(x) = min(1, 4 Var_j C_j(x))
def disagreement(counts):
    """Where J >= 2 answers disagree: their coverages (J, H, W) -> (H, W) in [0, 1].

    1 = they split like a fair coin on one person. Counts, not masks: one box around two people and a box for
    each must disagree, since merging individuals is the very failure that the paper starts from.
    """
    return np.minimum(1, 4 * np.var(counts, axis=0))


# r_look,i = 2 sum_x L_i u_i / (sum_x L_i + sum_x u_i),   u_i from the others' answers, L_i = 1 where i looks
def look_rewards(responses, width, height):
    """How well each completion's look finds what the *others* disagree about: G Responses -> (G,) in [0, 1].

    Our reading of the paper's variance-guided look reward: a soft Dice score. Leaving itself out, a
    completion cannot manufacture the uncertainty that it is paid for. An answer that does not parse is left
    out of the variance (fewer than two others: u = 0); a look that does not parse earns 0, and so does any
    where u is 0.
    """
    counts = {j: coverage(r.answer, width, height) for j, r in enumerate(responses) if r.answer is not None}
    rewards = np.zeros(len(responses))
    for i, response in enumerate(responses):
        others = [count for j, count in counts.items() if j != i]
        if response.look is None or len(others) < 2:
            continue
        u = disagreement(others)
        looked = coverage(response.look, width, height) > 0
        if u.any():
            rewards[i] = 2 * u[looked].sum() / (looked.sum() + u.sum())
    return rewards


# r_acc = (1-w) P + w R,   P = TP / n_pred,   R = TP / n_gt
def accuracy_reward(pred, gt, ignore=None, recall_weight=0.65, iou_threshold=0.5):
    """Weighted precision and recall of (n, 4) boxes in [0, 1]; `pred` None (unparseable) earns 0.

    Our reading of the paper's weighted precision-recall. Nothing there and nothing predicted: 1; one of the
    two empty: 0. A trap: with w = 0.5, dropping a doubtful box pays whenever its chance to be right is below
    half the current precision, so the policy turns cautious - precision up, recall down. Hence w = 0.65.
    """
    if pred is None:
        return 0.0
    tp, n_pred, n_gt = count_matches(pred, gt, ignore, iou_threshold)
    if n_pred == 0 or n_gt == 0:
        return float(n_pred == n_gt)
    return (1 - recall_weight) * tp / n_pred + recall_weight * tp / n_gt


# ------------------------------------------------------------------------------------------------------------
# Perception-R1's rewards: the right form earns +1 and any other -1; the answer earns up to 1, by its task.
# Where the paper's summary is silent the definitions are ours: what an empty answer or a wrong number of them
# earns, and that everything is divided by the larger count


# r = IoU(pred, truth)
def grounding_reward(pred, truth):
    """(n, 4) boxes against the one box (1, 4) that the phrase means -> [0, 1]; 0 unless n = 1."""
    return float(box_iou(pred, truth)[0, 0]) if len(pred) == len(truth) == 1 else 0.0


# r = 1 - (sum over pairs |p - t| / diagonal  +  unmatched) / max(n, m)
def counting_reward(pred, truth, width, height):
    """(n, 2) points against one on each of m instances (m, 2), paired by the Hungarian algorithm -> [0, 1].

    Every point or instance left over counts as distance 1, and so does a pair farther apart than the image's
    diagonal. No points where nothing is: 1.
    """
    if not len(pred) or not len(truth):
        return float(len(pred) == len(truth))
    distances = np.linalg.norm(pred[:, None] - truth[None], axis=2) / np.hypot(width, height)
    distances = np.minimum(distances, 1)
    paired, n, m = distances[linear_sum_assignment(distances)], len(pred), len(truth)
    return float(1 - (paired.sum() + abs(n - m)) / max(n, m))


def levenshtein(a, b):
    """The fewest insertions, deletions and substitutions that turn string a into b.

    Myers' bit-parallel algorithm (J. ACM 46, 1999) in Hyyrö's form (2003): a column of the usual table is two
    integers, whose bits say where it goes up or down by one. Pages of 3,000 characters take milliseconds.
    """
    if not a:
        return len(b)
    where, full = {}, (1 << len(a)) - 1
    for i, character in enumerate(a):
        where[character] = where.get(character, 0) | 1 << i
    up, down, distance = full, 0, len(a)
    for character in b:
        equal = where.get(character, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right_up, right_down = down | ~(diagonal | up) & full, diagonal & up
        distance += (right_up >> len(a) - 1 & 1) - (right_down >> len(a) - 1 & 1)
        right_up, right_down = right_up << 1 | 1, right_down << 1
        up, down = (right_down | ~(diagonal | right_up)) & full, diagonal & right_up & full
    return distance


# r = 1 - levenshtein(pred, truth) / max(|pred|, |truth|)
def ocr_reward(pred, truth):
    """Two strings, white space around them aside -> [0, 1]; two empty ones earn 1."""
    pred, truth = pred.strip(), truth.strip()
    return 1 - levenshtein(pred, truth) / max(len(pred), len(truth), 1)


# r = sum over pairs IoU / max(n, m)
def detection_reward(pred, truth, ignore=None, pred_labels=None, labels=None):
    """(n, 4) boxes against m truths (m, 4), paired so that the total IoU is largest -> [0, 1].

    A pair of different labels counts 0, where the truth has `labels`. Unmatched predictions in an ignore
    region are not counted, as in DIP-R1. Nothing there and nothing predicted: 1.
    """
    allowed = True
    if labels is not None:
        allowed = np.array(pred_labels, object)[:, None] == np.array(labels, object)
    pred_idx, _, ious = match_boxes(pred, truth, 0, allowed)
    count = max(len(pred) - excused(pred, pred_idx, ignore), len(truth))
    return float(ious.sum() / count) if count else 1.0


# ------------------------------------------------------------------------------------------------------------
# Advantages and loss


# A_i = (r_i - mean_j r_j) / (std_j r_j + 1e-4)
def group_advantages(rewards):
    """How much better each completion did than its siblings: (P, G) rewards -> (P, G) advantages.

    std is the sample one (ddof 1). A group whose rewards all agree teaches nothing: exactly 0, not rounding.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    spread = centred.square().sum(dim=1, keepdim=True).div(max(rewards.shape[1] - 1, 1)).sqrt()
    return (centred / (spread + 1e-4)).masked_fill(all_equal, 0.0)


# L = 1/N sum_t [ -min(rho_t A_t, clip(rho_t, 1-eps, 1+eps) A_t) + beta k3_t ],           rho = pi / pi_old
# k3 = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1,          never negative; its mean is KL(pi,
# pi_ref)
def grpo_loss(logp, old_logp, ref_logp, advantages, clip_eps, beta):
    """The loss of one group on flat (N,) tensors, N = sum_i |o_i|: every token of the group weighs the same.

    `ref_logp` None leaves the KL out. Returns (loss, {"kl", "clip_fraction"}). Exponents are clamped at 20,
    so that a token which a policy has abandoned gives a large number and not infinity.
    """
    rho = (logp - old_logp).clamp(max=20).exp()
    clipped = rho.clamp(1 - clip_eps, 1 + clip_eps)
    per_token = -torch.min(rho * advantages, clipped * advantages)
    k3 = torch.zeros_like(logp)
    if ref_logp is not None:
        difference = (ref_logp - logp).clamp(max=20)
        k3 = difference.exp() - difference - 1
    with torch.no_grad():
        clip_active = rho * advantages > clipped * advantages
        stats = {"kl": k3.mean().item(), "clip_fraction": clip_active.float().mean().item()}
    return (per_token + beta * k3).mean(), stats


# ------------------------------------------------------------------------------------------------------------
# The model, and prompts as it sees them


@dataclass
class Prompt:
    """One image with its question, encoded; boxes in model space: pixels of the image after Qwen's resize."""

    index: int  # its line in the data: names the prompt to the sampler
    record: dict
    ids: torch.Tensor  # (L,) the chat, one <|image_pad|> for each visual token
    positions: torch.Tensor  # (3, L) M-RoPE: time, row, column
    pixels: torch.Tensor  # (patches, 1176) what the vision tower reads
    grid: torch.Tensor  # (1, 3) patches in time, height, width
    width: int
    height: int
    truth: np.ndarray  # (n, 4); of counting, points (n, 2)
    ignore: np.ndarray  # (m, 4)
    weight: float = 1.0  # of its loss; 0 for one whose image was lost
    features: torch.Tensor | None = None  # (visual tokens, D), kept where the tower runs once for all


def to_model_space(boxes, size, grid):
    """Boxes (n, 4) or points (n, 2) in pixels of an image of size (W, H) -> pixels of its resized copy, which
    Qwen2.5-VL speaks.

    Each axis has its own scale: both sides are rounded to multiples of 28 (1920 x 1080 becomes 1316 x 728).
    """
    _, rows, columns = grid.flatten().tolist()
    boxes, scale = np.asarray(boxes, float), [14 * columns / size[0], 14 * rows / size[1]]
    return boxes * np.tile(scale, boxes.shape[-1] // 2)


def to_image_space(boxes, size, grid):
    """The way back: `to_image_space(to_model_space(b, size, grid), size, grid)` is b."""
    return boxes / to_model_space(np.ones_like(boxes), size, grid)


def load_model(cfg, device):
    """A Qwen2.5-VL by name or folder -> (model, tokenizer, image processor), or SystemExit says why not."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(cfg.model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(cfg.model)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SystemExit(f"cannot load --model {cfg.model}: {reason}") from None
    image_processor.size["longest_edge"] = cfg.max_pixels  # "edges", in Qwen's config, are areas
    model.model.visual.requires_grad_(not cfg.freeze_vision)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model.to(device), tokenizer, image_processor


class Encoder:
    """Records to prompts and truths to target texts: all that needs the tokenizer or the image processor."""

    def __init__(self, model, tokenizer, image_processor, max_prompt_tokens=2048):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.max_prompt_tokens = max_prompt_tokens
        self.rope_index, self.device = model.model.get_rope_index, model.device
        self.image_token = model.config.image_token_id
        eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.eos = [eos] if isinstance(eos, int) else list(eos)  # Qwen2.5-VL has two

    def prompt(self, index, record):
        """Read the image and build the chat around it -> Prompt. SystemExit names an image that fails."""
        try:
            return self.encode(index, record, open_image(record["path"]))
        except OSError as error:
            raise SystemExit(f"{record['path']}: cannot be read ({error})") from None

    def encode(self, index, record, image):
        """The same with the image at hand."""
        if image.size != (record["width"], record["height"]):
            said = (record["width"], record["height"])
            raise SystemExit(f"{record['path']} is {image.size}, but its line in the data says {said}")
        limits = self.image_processor.size
        room = self.max_prompt_tokens - len(self.chat(question(record), 0, 0)[0])  # a token is 28 x 28 pixels
        least, most = limits["shortest_edge"], min(limits["longest_edge"], room * 28 * 28)
        if most < least:
            raise SystemExit(f"{record['path']}: --max_prompt_tokens leaves room for {room} visual tokens")
        size = {"shortest_edge": least, "longest_edge": most}
        seen = self.image_processor(images=[image], size=size, return_tensors="pt")
        grid = seen["image_grid_thw"]
        rows, columns = grid[0, 1].item(), grid[0, 2].item()
        ids, positions = self.chat(question(record), rows, columns)
        counting = record["task"] == "counting"
        return Prompt(
            index, record, ids, positions, seen["pixel_values"].to(self.device), grid.to(self.device),
            14 * columns, 14 * rows,
            truth=to_model_space(record["points" if counting else "boxes"], image.size, grid),
            ignore=to_model_space(record["ignore"], image.size, grid),
        )

    @functools.lru_cache(maxsize=1024)
    def chat(self, question, rows, columns):
        """The question about an image of rows x columns patches -> ids (L,), M-RoPE positions (3, L)."""
        chat = CHAT.format(question=question)
        chat = chat.replace("<|image_pad|>", "<|image_pad|>" * (rows * columns // 4))  # 2 x 2 patches a token
        ids = torch.tensor([self.tokenizer(chat, add_special_tokens=False).input_ids])
        # Without the token types positions would silently be 1-D, and the model blind to where things are.
        token_types, grid = (ids == self.image_token).int(), torch.tensor([[1, rows, columns]])
        positions, _ = self.rope_index(ids, token_types, grid)
        return ids[0].to(self.device), positions[:, 0].to(self.device)

    def decode(self, completion):
        """Token ids -> text, less the closing EOS. Other special tokens stay visible and break the format."""
        ids = completion.tolist()
        return self.tokenizer.decode(ids[:-1] if ids[-1] in self.eos else ids, skip_special_tokens=False)

    def look_length(self, completion):
        """How many tokens run up to and including `</look>`; all of them if it never comes."""
        closed = lambda n: "</look>" in self.tokenizer.decode(completion[:n])  # false up to some n, then true
        return min(bisect.bisect_left(range(len(completion) + 1), True, key=closed), len(completion))

    def target(self, prompt):
        """The supervised target: the truth in the method's template, left to right."""
        order, record = np.argsort(prompt.truth[:, 0], kind="stable"), prompt.record
        truth = np.clip(prompt.truth[order], 0, [prompt.width, prompt.height] * (prompt.truth.shape[1] // 2))
        answer = truth.round().astype(int).tolist()
        if record["task"] == "ocr":
            answer = record["transcript"]
        elif "labels" in record:
            labels = [record["labels"][i] for i in order]
            answer = json.dumps([{"bbox_2d": box, "label": label} for box, label in zip(answer, labels)])
        text = f"<answer>{answer}</answer>"
        if record["method"] == "dip-r1":  # a thought and a weak look (our reading) come first
            look = weak_look(truth, prompt.width, prompt.height, prompt.index).round().astype(int).tolist()
            who = "people" if record["target"] == "person" else record["target"] + "s"
            text = f"<think>{len(truth)} {who}, {len(look)} to look at</think><look>{look}</look>{text}"
        ids = self.tokenizer(text, add_special_tokens=False).input_ids + self.eos[:1]
        return torch.tensor(ids, device=self.device)


def weak_look(truth, width, height, seed):
    """The supervised look at people, (n, 4) -> (k, 4). Nobody annotated where to look: this is a weak label.

    A region around each cluster of people who overlap; each is left out one time in four, and one time in two
    there is one more somewhere, between a quarter and half the image wide and high. So the answer learns to
    trust the picture and not the look. If it copies people from the look, or takes a region as proof of a
    crowd, it invents people as soon as GRPO teaches the look to point at doubtful places.
    """
    rng = np.random.default_rng(seed)
    look = crowds(truth, 0.2)
    look = look[rng.random(len(look)) < 0.75]
    if rng.random() < 0.5:
        size = rng.uniform(0.25, 0.5, 2) * [width, height]
        corner = rng.uniform(0, [width, height] - size)
        look = np.vstack([look, [*corner, *(corner + size)]])
    return look[np.argsort(look[:, 0], kind="stable")]


@dataclass
class Group:
    """One prompt and its completions o_1 .. o_G; flat tensors run over all their N = sum_i |o_i| tokens."""

    prompt: Prompt
    completions: list  # G tensors of token ids, EOS included
    rollout_logp: torch.Tensor | None = None  # (N,) log-probabilities with which the sampler drew them
    texts: list | None = None  # G decoded completions
    advantages: torch.Tensor | None = None  # (N,)
    old_logp: torch.Tensor | None = None  # (N,) log pi_old, before the first update
    ref_logp: torch.Tensor | None = None  # (N,) log pi_ref

    @property
    def n_tokens(self):
        return sum(map(len, self.completions))


def pack(group):
    """Lay a group out as one row [ image + prompt | o_1 | o_2 | ... | o_G ] of length L.

    Returns ids (L,), M-RoPE positions (L, 3) and source (N,): for each completion token the place in the row
    whose hidden state predicts it. Every completion starts at the position where the prompt ended, so to
    itself it is the only one.
    """
    prompt, end = group.prompt, len(group.prompt.ids)
    device, first = prompt.ids.device, prompt.positions.max() + 1
    ids, positions, sources, start = [prompt.ids], [prompt.positions.T], [], end
    for completion in group.completions:
        steps = torch.arange(len(completion), device=device)
        ids.append(completion)
        positions.append((first + steps)[:, None].expand(-1, 3))
        sources.append(torch.where(steps == 0, end - 1, start + steps - 1))
        start += len(completion)
    return torch.cat(ids), torch.cat(positions), torch.cat(sources)


@dataclass
class Tree:
    """How R packed rows of length L branch: a prompt of up to P tokens, G completions of up to T."""

    prompt: int  # P
    there: torch.Tensor  # (R, G T) the column of each completion token; of padding, any
    back: torch.Tensor  # (R, L) the place of each column in [ prompt, P | o_1, T | ... | o_G, T ]
    mask: torch.Tensor  # (R G, 1, T, P + T) True where a completion's token may look: its prompt, and back


def branch(groups):
    """The Tree of these groups, one to a row."""
    R, G = len(groups), max(len(group.completions) for group in groups)
    P = max(len(group.prompt.ids) for group in groups)
    T = max(len(o) for group in groups for o in group.completions)
    L = max(len(group.prompt.ids) + group.n_tokens for group in groups)
    there, back = torch.zeros(R, G, T, dtype=torch.long), torch.zeros(R, L, dtype=torch.long)
    mask = torch.ones(T, P + T, dtype=torch.bool).tril(P).repeat(R, G, 1, 1)
    for row, group in enumerate(groups):
        start = len(group.prompt.ids)
        back[row, :start] = torch.arange(start)
        mask[row, ..., start:P] = False
        for i, o in enumerate(group.completions):
            there[row, i, : len(o)] = torch.arange(start, start + len(o))
            back[row, start : start + len(o)] = torch.arange(P + i * T, P + i * T + len(o))
            start += len(o)
    device = groups[0].prompt.ids.device
    return Tree(P, there.flatten(1).to(device), back.to(device), mask.flatten(0, 1)[:, None].to(device))


# o = softmax(q k^T / sqrt(d)) v
def attend(query, key, value, mask):
    """(B, H, Q, D), (B, H', K, D) x 2, mask or None (causal) -> (B, Q, H, D); heads share keys, H' <= H."""
    if query.is_cuda and mask is not None:  # those kernels know no shared heads
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    causal = mask is None and query.shape[2] > 1
    out = scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def tree_attention(module, query, key, value, attention_mask, **options):
    """Causal attention in which completions do not see each other: (R, H, L, D) x 3, Tree -> (R, L, H, D).

    A prompt's token attends to the prompt, a token of o_i to the prompt and to o_i. Exact, and cheaper than a
    mask over the whole row: what siblings would contribute has weight 0, so it is not computed, which leaves
    about a quarter, and no (L, L) mask exists. transformers calls this in every layer; without a Tree (in
    prefill) it is the usual attention.
    """
    if not isinstance(attention_mask, Tree):
        return attend(query, key, value, attention_mask), None
    tree, R, P = attention_mask, len(query), attention_mask.prompt
    G = len(tree.mask) // R

    def stem(x):  # (R, H, P, D)
        return x[:, :, :P]

    def branches(x):  # (R G, H, T, D)
        there = tree.there[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, there).unflatten(2, (G, -1)).transpose(1, 2).flatten(0, 1)

    def both(x):  # (R G, H, P + T, D)
        return torch.cat([stem(x).repeat_interleave(G, 0), branches(x)], dim=2)

    of_prompt = attend(stem(query), stem(key), stem(value), None)
    of_tokens = attend(branches(query), both(key), both(value), tree.mask)
    out = torch.cat([of_prompt, of_tokens.unflatten(0, (R, G)).flatten(1, 2)], dim=1)
    return out.gather(1, tree.back[..., None, None].expand(-1, -1, *out.shape[2:])), None


# log pi(y) = z_y - log sum_v exp z_v,    z = W h + b;              d log pi(y) / d z_v = [v = y] - pi(v)
class TokenLogprobs(torch.autograd.Function):
    """log pi of each target: h (N, D), W (V, D), b (V,), targets (N,) -> (N,) in fp32.

    A chunk of tokens at a time, and again in the backward: so the logits of a whole group (8 x 1,024 x 152k:
    5 GB) never exist at once. The backward is written out, so that z becomes pi, and pi the gradient, in
    place; autograd would keep a tensor of that size for each step of the way.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk=512):
        found = []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):
            z = linear(h, weight, bias).float()
            found.append(torch.stack([z.gather(1, y[:, None])[:, 0], z.logsumexp(1)]))
        z_y, log_sum = torch.cat(found, dim=1)
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum)
        ctx.chunk = chunk
        return z_y - log_sum

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, *of_tokens = ctx.saved_tensors
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        columns = [x[:, None] for x in (*of_tokens, grad)]  # targets, log sum exp z, gradient: (N, 1) each
        for h, of_h, y, log_sum, g in zip(*(x.split(ctx.chunk) for x in (hidden, of_hidden, *columns))):
            pi = linear(h, weight, bias).float().sub_(log_sum).exp_()
            of_z = pi.mul_(-g).scatter_add_(1, y, g).to(weight.dtype)  # g ([v = y] - pi)
            of_h.copy_(of_z @ weight)
            of_weight.addmm_(of_z.T, h)
        return of_hidden, of_weight, None, None, None


class Policy(nn.Module):
    """A Qwen2.5-VL, and the one question of training: how likely was each token of these groups?

    Its forward is the one that DDP wraps; prompt and vision tower run once in it for all G completions.
    """

    def __init__(self, model, tokenizer, temperature=1.0):
        super().__init__()
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        self.model, self.temperature = model, temperature
        AttentionInterface.register("tree", tree_attention)
        AttentionMaskInterface.register("tree", sdpa_mask)  # where no Tree is given
        model.model.language_model.set_attn_implementation("tree")
        config = model.config
        # A sampled placeholder would want an image that is not there; ids beyond the tokenizer have no text.
        # A bias of -1e4 takes their probability to exactly 0; -inf would give NaN.
        forbidden = torch.zeros(config.text_config.vocab_size)
        forbidden[len(tokenizer) :] = -1e4
        forbidden[[config.image_token_id, config.video_token_id]] = -1e4
        forbidden[[config.vision_start_token_id, config.vision_end_token_id]] = -1e4
        self.register_buffer("forbidden", forbidden.to(model.device, model.dtype), persistent=False)

    def see(self, prompts):
        """The vision tower over all images at once, whatever their sizes -> a list of (visual tokens, D)."""
        if prompts[0].features is not None:
            return [prompt.features for prompt in prompts]
        pixels, grid = torch.cat([p.pixels for p in prompts]), torch.cat([p.grid for p in prompts])
        return list(self.model.get_image_features(pixels, grid).pooler_output)

    def embed(self, ids, features):
        """Token ids (L,) -> (L, D), the image's features in the prompt's placeholders. A placeholder that
        a completion holds stays an ordinary token."""
        embeds = self.model.get_input_embeddings()(ids)
        places = (ids == self.model.config.image_token_id).nonzero()[: len(features)]
        return embeds.scatter(0, places.expand(-1, embeds.shape[1]), features.to(embeds.dtype))

    def head(self, hidden):
        """What logits are made of: hidden states (N, D) over T, W (V, D), and the bias (V,) that forbids."""
        return hidden / self.temperature, self.model.lm_head.weight, self.forbidden

    def forward(self, groups):
        """Groups -> the flat (N,) log-probabilities of all their tokens, group by group. Rows of different
        length are padded to the longest; nothing else is."""
        features = self.see([group.prompt for group in groups])
        ids, positions, sources = zip(*map(pack, groups))
        embeds = pad_sequence([self.embed(i, f) for i, f in zip(ids, features)], batch_first=True)
        positions = pad_sequence(positions, batch_first=True).permute(2, 0, 1)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False,
            attention_mask={"full_attention": branch(groups)},  # in this form it goes to the layers untouched
        ).last_hidden_state
        hidden = torch.cat([row[source] for row, source in zip(hidden, sources)])
        targets = torch.cat([completion for group in groups for completion in group.completions])
        return TokenLogprobs.apply(*self.head(hidden), targets)


def in_chunks(items, size):
    """A list or range in pieces of `size`; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def unwrap(policy):
    """The Policy inside DDP, or the policy itself."""
    return getattr(policy, "module", policy)


# ------------------------------------------------------------------------------------------------------------
# Rollout: every prompt is read once, its G completions are written side by side


def draw_uniforms(seed, step, index, shape):
    """The random numbers of one prompt at one step, from a generator of its own: sampling is a function of
    (seed, step, prompt), the same on whichever rank and in whatever batch the prompt comes up."""
    return torch.from_numpy(np.random.default_rng([seed, step, index]).random(shape, dtype=np.float32))


# token = min { v : sum_{w <= v} p_w > U },   U uniform in [0, 1)
def inverse_cdf(logprobs, uniform):
    """Sample tokens (B,) of the distributions (B, V) with uniforms (B,).

    The full softmax: no top-k, no top-p, none of the checkpoint's generation defaults, for the sampled
    distribution must be the scored one.
    """
    cdf = logprobs.exp().cumsum(-1)
    total = cdf[:, -1:]  # 1, but for rounding; U * total must stay below it, whichever way that rounds
    level = (uniform[:, None] * total).clamp(max=torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, level, right=True)[:, 0]


def prefill(policy, prompts, copies, room):
    """Read every prompt once, and make `copies` rows of each, with room for `room` more tokens.

    Returns the log-probabilities (B, V) of the first token, B = prompts x copies; the cache, for each layer
    keys and values (B, H', L + room, D'); and visible (B, 1, 1, L + room), the columns that hold a token.
    Prompts are padded on the right to L: under causal attention no real token sees the padding.
    """
    from transformers import DynamicCache

    features = policy.see(prompts)
    embeds = pad_sequence([policy.embed(p.ids, f) for p, f in zip(prompts, features)], batch_first=True)
    positions = pad_sequence([p.positions.T for p in prompts], batch_first=True).permute(2, 0, 1)
    lengths = torch.tensor([len(p.ids) for p in prompts], device=embeds.device)
    prefix = DynamicCache()
    hidden = policy.model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, past_key_values=prefix, use_cache=True
    ).last_hidden_state
    last = hidden[torch.arange(len(prompts)), lengths - 1]
    logprobs = linear(*policy.head(last)).float().log_softmax(-1)

    def rows(x):
        return pad(x.repeat_interleave(copies, 0), (0, 0, 0, room))

    cache = [(rows(layer.keys), rows(layer.values)) for layer in prefix.layers]
    visible = torch.arange(embeds.shape[1] + room, device=embeds.device) < lengths[:, None]
    return logprobs.repeat_interleave(copies, 0), cache, visible.repeat_interleave(copies, 0)[:, None, None]


def linear_of_few(rows):
    """-> a function: x W^T + b for x (rows, D), while the weights stay as they are.

    Each token takes every weight for a handful of rows, so what counts is how fast weights are read. MKL, on
    Intel's and AMD's CPUs, reads a copy packed for so many rows faster (by the op that torch.compile uses);
    the copies, as large as the decoder, live as long as the function. Elsewhere the same sums are taken as
    (W x^T)^T.
    """
    has_mkl, packed = torch.backends.mkl.is_available(), {}

    def linear_here(x, weight, bias=None):
        if not (has_mkl and weight.is_cpu):
            out = (weight @ x.T).T
            return out if bias is None else out + bias
        if id(weight) not in packed:
            packed[id(weight)] = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return torch.ops.mkl._mkl_linear(x, packed[id(weight)], weight, bias, rows)

    return linear_here


def rotate(x, cos, sin):
    """Rotary position embedding: x (B, H, D) at the angles of its position, cos and sin (B, 1, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def decode_step(policy, cache):
    """-> a function: one more token a row, token and position (B,) -> log-probabilities (B, V) of the next.

    It writes the token's keys and values to `column` (1,) of the cache and attends to the `visible` columns.
    This is Qwen2.5-VL's decoder, written out, with the model's own weights: so its products can take the form
    that is fast for few rows, and all its tensors keep their places, as a CUDA graph needs it.
    """
    decoder, linear_here = policy.model.model.language_model, linear_of_few(len(cache[0][0]))

    def project(layer, x):
        return linear_here(x, layer.weight, layer.bias)

    def step(token, position, column, visible):
        x = decoder.embed_tokens(token)
        angles = decoder.rotary_emb(x, position[:, None])  # of a text's token all three axes agree
        for layer, (keys, values) in zip(decoder.layers, cache):
            attention, mlp, h = layer.self_attn, layer.mlp, layer.input_layernorm(x)
            q, k, v = (project(one, h).unflatten(1, (-1, attention.head_dim))
                       for one in (attention.q_proj, attention.k_proj, attention.v_proj))
            keys.index_copy_(2, column, rotate(k, *angles)[:, :, None])
            values.index_copy_(2, column, v[:, :, None])
            q = rotate(q, *angles).unflatten(1, (keys.shape[1], -1))  # heads that share keys: a longer query
            o = scaled_dot_product_attention(q.contiguous(), keys, values, visible)
            x = x + project(attention.o_proj, o.flatten(1))
            h = layer.post_attention_layernorm(x)
            x = x + project(mlp.down_proj, mlp.act_fn(project(mlp.gate_proj, h)) * project(mlp.up_proj, h))
        return linear_here(*policy.head(decoder.norm(x))).float().log_softmax(-1)

    return step


def captured(step, *inputs):
    """A decode step as a CUDA graph: recorded once, then replayed with new inputs copied to the old places.

    A step is a thousand small kernels, and Python takes longer to launch them than the GPU to run them; a
    replay launches all at once. It is exact: the same kernels on the same memory. If something in the model
    cannot be recorded, the step runs as it is, with a warning.
    """
    places = [value.clone() for value in inputs]
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries set themselves up on first use, which must not be recorded
                step(*places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logprobs = step(*places)
    except RuntimeError as error:
        warnings.warn(f"the decode step is not captured as a CUDA graph, and slower: {error}", stacklevel=2)
        return step

    def replay(*inputs):
        for place, value in zip(places, inputs):
            place.copy_(value)
        graph.replay()
        return logprobs

    return replay


@torch.no_grad()
def rollout(policy, encoder, prompts, max_new_tokens, uniforms=None):
    """Complete each prompt G times -> a list of Groups.

    `uniforms` (P, G, max_new_tokens) are the random numbers; None decodes greedily, G = 1. All rows write
    their t-th token to the same column of the cache; rows that have met EOS are dropped once they are the
    half.
    """
    policy.eval()
    P, G = len(prompts), 1 if uniforms is None else uniforms.shape[1]
    device, eos = policy.model.device, torch.tensor(encoder.eos, device=policy.model.device)
    logprobs, cache, visible = prefill(policy, prompts, G, max_new_tokens)
    first = torch.stack([p.positions.max() + 1 for p in prompts]).repeat_interleave(G)
    uniforms = None if uniforms is None else uniforms.flatten(0, 1).to(device)
    tokens = torch.zeros(P * G, max_new_tokens, dtype=torch.long, device=device)
    chosen = torch.zeros(P * G, max_new_tokens, device=device)  # log-probabilities of the tokens
    written = torch.zeros(P * G, dtype=torch.long, device=device)
    running = torch.ones(P * G, dtype=torch.bool, device=device)
    rows, step = torch.arange(P * G, device=device), None  # the rows still in the batch, and how to go on
    for t in range(max_new_tokens):
        token = logprobs.argmax(-1) if uniforms is None else inverse_cdf(logprobs, uniforms[rows, t])
        tokens[rows, t], chosen[rows, t] = token, logprobs.gather(1, token[:, None])[:, 0]
        written[rows] += running[rows]  # EOS is the last token written
        running[rows] &= ~torch.isin(token, eos)
        going = running[rows]
        if not going.any() or t + 1 == max_new_tokens:
            break
        if going.sum() <= len(rows) // 2:
            rows, token, visible, first = rows[going], token[going], visible[going], first[going]
            cache = [(keys[going], values[going]) for keys, values in cache]
            step = None  # a recorded step has a fixed number of rows
        column = visible.shape[-1] - max_new_tokens + t  # behind the prompts
        visible[..., column] = True
        inputs = token, first + t, torch.tensor([column], device=device), visible
        if step is None:
            step = decode_step(policy, cache)
            step = captured(step, *inputs) if device.type == "cuda" else step
        logprobs = step(*inputs)

    completions = [tokens[row, : written[row]] for row in range(P * G)]
    logp = [chosen[row, : written[row]] for row in range(P * G)]
    texts = [encoder.decode(completion) for completion in completions]
    parts = zip(prompts, in_chunks(completions, G), in_chunks(logp, G), in_chunks(texts, G))
    return [Group(prompt, os, torch.cat(logps), words) for prompt, os, logps, words in parts]


# ------------------------------------------------------------------------------------------------------------
# Data, and who reads which part of it


def rank_and_world():
    """(this process, how many there are); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print0(*args):
    """Print once, on rank 0."""
    if rank_and_world()[0] == 0:
        print(*args, flush=True)


def barrier():
    """Wait for the other ranks, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def over_ranks(values, reduction):
    """A list of numbers, reduced over the ranks ("SUM", "MIN", "MAX") -> list of floats."""
    values = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values, getattr(dist.ReduceOp, reduction))
    return values.tolist()


def progress(items, title, total, start=0):
    """A bar, on rank 0."""
    return tqdm(items, title, total, initial=start, disable=rank_and_world()[0] > 0)


def open_image(path):
    """An image as people see it: upright (EXIF), RGB. OSError if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow, of broken files
        raise OSError(error) from None


def read_jsonl(path, check):
    """A JSON object a line -> a list of check(object). SystemExit names the line at which that fails."""
    checked = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            if line.strip():
                checked.append(check(json.loads(line)))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise SystemExit(f"{path}, line {number}: {type(error).__name__}: {error}") from None
    return checked


TRUTH = {"detection": "boxes", "grounding": "boxes", "counting": "points", "ocr": "transcript"}  # of a line


def load_records(path, method="dip-r1"):
    """Read a JSONL that data_prep.py wrote, check every line, and say where each image lies (`path`)."""
    path = Path(path)
    if not path.is_file():
        raise SystemExit(
            f"{path} is not there. Make it from CrowdHuman,\n"
            f"    python data_prep.py crowdhuman ROOT --split train --out {path}\n"
            f"or draw scenes,\n    python data_prep.py synthetic --out {path.parent}\n"
            f"or see the whole method at work without any data,\n    python dipr1.py --demo"
        )

    def check(line):
        record = {"target": "person", "task": "detection", "method": method, "ignore": [], **line}
        if record["method"] not in ("dip-r1", "perception-r1"):
            raise ValueError(f"no method {record['method']!r}")
        if record["method"] == "dip-r1" and record["task"] != "detection":
            raise ValueError(f"the task {record['task']} needs --method perception-r1")
        truth = record[TRUTH[record["task"]]]
        if isinstance(truth, str) != (record["task"] == "ocr"):
            raise ValueError(f"its {TRUTH[record['task']]} cannot be {truth!r}")
        for name, k in (("boxes", 4), ("ignore", 4), ("points", 2)):
            record[name] = np.array(record.get(name, []), float).reshape(-1, k)
            if not np.isfinite(record[name]).all():
                raise ValueError(f"{name} must be finite")
        if not (record["width"] > 0 and record["height"] > 0):
            raise ValueError("sizes must be positive")
        if record["task"] == "grounding" and len(record["boxes"]) != 1:
            raise ValueError("grounding is of one box")
        if "labels" in record and len(record["labels"]) != len(record["boxes"]):
            raise ValueError("as many labels as boxes")
        return record | {"path": str(path.parent / record["image"])}

    records = read_jsonl(path, check)
    if not records:
        raise SystemExit(f"{path} holds no image")
    return records


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The order in which an epoch takes its n records."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(n, batch, seed, step):
    """Which of n records step `step` takes: a fresh shuffle an epoch, a function of (seed, step) alone."""
    return [int(epoch_order(n, seed, k // n)[k % n]) for k in range(step * batch, (step + 1) * batch)]


def batches(encoder, records, batch, seed, steps, start=0):
    """Yield (step, this rank's prompts) from `start` on; the next step's images are read while one trains."""
    rank, world = rank_and_world()
    if batch % world:
        raise SystemExit(f"{batch} images a step cannot be shared out evenly over {world} processes")
    lost = set()

    def read(index):
        record = records[index]
        try:
            return encoder.encode(index, record, open_image(record["path"]))
        except OSError as error:  # it was readable when prepared: a grey image of weight 0 takes its place
            lost.add(index)
            about = f"{record['path']}: no longer readable ({error}); {len(lost)} lost so far"
            if len(lost) > 0.01 * len(records):
                raise SystemExit(f"{about}: more than 1% of the images") from None
            tqdm.write(about, file=sys.stderr)
            grey = Image.new("RGB", (record["width"], record["height"]), (128, 128, 128))
            return replace(encoder.encode(index, record, grey), weight=0.0)

    def load(step):
        return [read(index) for index in batch_indices(len(records), batch, seed, step)[rank::world]]

    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(load, start) if start < steps else None
        for step in range(start, steps):
            prompts = upcoming.result()
            upcoming = reader.submit(load, step + 1) if step + 1 < steps else None
            yield step, prompts


# ------------------------------------------------------------------------------------------------------------
# One training step


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 copies of the weights (of fp32 weights, the "copy" is the weight itself).

    At learning rate 1e-6 an update is far below bf16's resolution: 98% of bf16 weights would never move.
    """

    def __init__(self, params, **options):
        groups = list(params)  # weights, or a shard of them as groups, from ZeroRedundancyOptimizer
        self.weights = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
        self.masters = [weight.detach().float() for weight in self.weights]
        super().__init__(self.masters, **options)

    @torch.no_grad()
    def step(self):
        for weight, master in zip(self.weights, self.masters):  # hand over: no gradient is kept twice
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        super().step()
        for weight, master in zip(self.weights, self.masters):
            weight.copy_(master)
            master.grad = None


def make_optimizer(policy):
    """AdamW, its 12 bytes a weight (fp32 copy, two moments) shared out over the ranks."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    trained = [p for p in policy.parameters() if p.requires_grad]
    options = dict(lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if dist.is_initialized():
        options |= dict(optimizer_class=MasterAdamW, parameters_as_bucket_view=True)  # few, large broadcasts
        return ZeroRedundancyOptimizer(trained, **options)
    return MasterAdamW(trained, **options)


def learning_rate(step, steps, peak, warmup):
    """Linear from 0 to `peak` over the warm-up, then linear to 0 at `steps`."""
    return peak * min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1), 1.0)


@torch.no_grad()
def keep_features(policy, prompts):
    """One pass of the vision tower for all that follows: rollout, reference and policy, if it is frozen."""
    for prompt, features in zip(prompts, policy.see(prompts)):
        prompt.features = features


@contextlib.contextmanager
def naming_what_did_not_fit(prompts, completions, flag):
    """Turn an out-of-memory into what a user needs: the image, the lengths, and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        prompt = max(prompts, key=lambda prompt: len(prompt.ids))
        raise SystemExit(
            f"out of memory at {prompt.record['path']} and {len(prompts) - 1} more: a prompt of "
            f"{len(prompt.ids)} tokens, {completions} of completions. Lower --max_prompt_tokens, "
            f"--group_size or {flag}; --gradient_checkpointing saves memory too. PyTorch says: {error}"
        ) from None


def update(policy, optimizer, chunks, loss_of, lr, max_grad_norm):
    """One optimizer step on sum_chunks loss_of(chunk), gradients averaged over the ranks by DDP -> metrics.

    Each rank runs one backward a chunk, also where nothing is to be learned. Only the last one synchronises.
    A loss or gradient that is not finite on one rank is so on all after that: they skip the update together.
    """
    policy.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    total = 0.0
    for number, chunk in enumerate(chunks, 1):
        wait = isinstance(policy, nn.parallel.DistributedDataParallel) and number < len(chunks)
        prompts, longest = [group.prompt for group in chunk], max(group.n_tokens for group in chunk)
        with (policy.no_sync() if wait else contextlib.nullcontext(),  # around forward and backward both
              naming_what_did_not_fit(prompts, longest, "--groups_per_forward")):
            loss = loss_of(chunk)
            loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    finite = bool(np.isfinite([norm.item(), *over_ranks([total], "SUM")]).all())
    if finite:
        optimizer.step()
    policy.zero_grad(set_to_none=True)
    return {"loss": total, "grad_norm": norm.item(), "lr": lr, "skipped": float(not finite)}


def sft_step(policy, optimizer, encoder, prompts, cfg, lr):
    """One supervised step through the same scoring function: a group of one, the truth -> metrics."""
    groups = [Group(prompt, [encoder.target(prompt)]) for prompt in prompts]

    def loss_of(chunk):
        logp = policy(chunk).split([group.n_tokens for group in chunk])
        return -sum(group.prompt.weight * part.mean() for group, part in zip(chunk, logp)) / len(groups)

    groups.sort(key=lambda group: group.n_tokens)  # rows of one forward are padded to the longest
    chunks = in_chunks(groups, cfg.groups_per_forward * cfg.group_size)  # as many completions as in GRPO
    return update(policy, optimizer, chunks, loss_of, lr, cfg.max_grad_norm)


def perception_rewards(text, prompt):
    """Perception-R1's (format in {-1, 1}, answer in [0, 1]) of a completion, by its record's task."""
    record, pred = prompt.record, read_answer(text, prompt.record)
    if pred is None:
        return -1.0, 0.0
    if record["task"] == "ocr":
        answer = ocr_reward(pred, record["transcript"])
    elif record["task"] == "counting":
        answer = counting_reward(pred, prompt.truth, prompt.width, prompt.height)
    elif record["task"] == "grounding":
        answer = grounding_reward(clip_boxes(pred, prompt.width, prompt.height), prompt.truth)
    else:
        labels = read_labels(text, len(pred)), record.get("labels")
        pred = clip_boxes(pred, prompt.width, prompt.height)
        answer = detection_reward(pred, prompt.truth, prompt.ignore, *labels)
    return (1.0 if sections(text, ["answer"])[1] else -1.0), answer


def group_rewards(group, recall_weight):
    """(G, 3): the format, look and accuracy reward of each completion; of Perception-R1 the answer's is the
    accuracy, and no look is asked for."""
    prompt = group.prompt
    if prompt.record["method"] == "perception-r1":
        rewards = [perception_rewards(text, prompt) for text in group.texts]
        return torch.tensor([[form, 0.0, answer] for form, answer in rewards], dtype=torch.float64)
    responses, width, height = [parse_response(text) for text in group.texts], prompt.width, prompt.height
    answers = [None if r.answer is None else clip_boxes(r.answer, width, height) for r in responses]
    accuracy = [accuracy_reward(answer, prompt.truth, prompt.ignore, recall_weight) for answer in answers]
    look = look_rewards(responses, width, height)
    return torch.tensor(np.stack([[format_reward(text) for text in group.texts], look, accuracy], axis=1))


def reward_weights(cfg):
    """(w_f, w_l, w_a)"""
    return torch.tensor([cfg.format_weight, cfg.look_weight, cfg.accuracy_weight], dtype=torch.float64)


def token_advantages(encoder, groups, rewards, cfg):
    """Rewards (P, G, 3) -> for each group the flat (N,) advantages of its tokens.

    r_look,i does not depend on completion i's own answer, and the answer is written after the look: its
    tokens cannot have earned it. Up to </look> tokens get the advantage of the whole r, after it that of r
    without the look term, each with its own mean and std. Our reading; `--look_credit completion` is the
    paper's plain sum for every token.
    """
    whole = group_advantages(rewards @ reward_weights(cfg))
    after_look = group_advantages(rewards @ (reward_weights(cfg) * torch.tensor([1, 0, 1])))
    if cfg.look_credit == "completion":
        after_look = whole
    flat = []
    for group, early, late in zip(groups, whole.tolist(), after_look.tolist()):
        parts = []
        for completion, a, b in zip(group.completions, early, late):
            advantage = torch.full(completion.shape, b, device=completion.device)
            if a != b:
                advantage[: encoder.look_length(completion)] = a
            parts.append(advantage)
        flat.append(torch.cat(parts))
    return flat


def grpo_step(policy, reference, optimizer, encoder, prompts, cfg, step, lr):
    """Sample a group for each prompt, reward it, and update the policy -> (metrics, groups)."""
    started = time.perf_counter()
    if cfg.freeze_vision:
        keep_features(unwrap(policy), prompts)
    shape = (cfg.group_size, cfg.max_new_tokens)
    uniforms = torch.stack([draw_uniforms(cfg.seed, step, prompt.index, shape) for prompt in prompts])
    with naming_what_did_not_fit(prompts, f"{cfg.group_size} x {cfg.max_new_tokens}", "--max_new_tokens"):
        groups = rollout(unwrap(policy), encoder, prompts, cfg.max_new_tokens, uniforms)
    rolled_out = time.perf_counter()

    rewards = torch.stack([group_rewards(group, cfg.recall_weight) for group in groups])  # (P, G, 3)
    for group, advantages in zip(groups, token_advantages(encoder, groups, rewards, cfg)):
        group.advantages = advantages
    stats = []

    def score(model, chunk):
        return zip(chunk, model(chunk).split([group.n_tokens for group in chunk]))

    def loss_of(chunk):
        if reference is not None and chunk[0].ref_logp is None:
            with torch.no_grad():
                for group, logp in score(reference, chunk):
                    group.ref_logp = logp
        loss = 0.0
        for group, logp in score(policy, chunk):
            if group.old_logp is None:  # until the first update, pi_old is pi itself
                group.old_logp = logp.detach()
            terms = logp, group.old_logp, group.ref_logp, group.advantages
            part, part_stats = grpo_loss(*terms, cfg.clip_eps, cfg.beta)
            loss = loss + group.prompt.weight * part / len(groups)
            stats.append(part_stats)
        return loss

    by_length = sorted(groups, key=lambda group: group.n_tokens)  # rows of a forward are padded
    chunks = in_chunks(by_length, cfg.groups_per_forward)
    for _ in range(cfg.num_iterations):
        metrics = update(policy, optimizer, chunks, loss_of, lr, cfg.max_grad_norm)
    metrics |= {name: float(np.mean([s[name] for s in stats])) for name in stats[0]}
    metrics |= describe(groups, rewards, encoder, cfg)
    seconds = time.perf_counter() - started
    metrics |= {"seconds": seconds, "seconds_rollout": rolled_out - started}
    metrics |= {"tokens_per_second": sum(group.n_tokens for group in groups) / seconds}
    return metrics, groups


def describe(groups, rewards, encoder, cfg):
    """What a step's rollouts look like: the metrics that need no gradient. The README defines each."""
    completions = [o for group in groups for o in group.completions]
    answers = [read_answer(text, group.prompt.record) for group in groups for text in group.texts]
    total = rewards @ reward_weights(cfg)
    sampled = torch.cat([group.rollout_logp for group in groups])
    scored = torch.cat([group.old_logp for group in groups])
    return {
        "reward": total.mean().item(),
        "reward_format": rewards[..., 0].mean().item(),
        "reward_look": rewards[..., 1].mean().item(),
        "reward_accuracy": rewards[..., 2].mean().item(),
        "reward_std": total.std(dim=1).mean().item() if total.shape[1] > 1 else 0.0,
        "frac_zero_std": (total == total[:, :1]).all(dim=1).double().mean().item(),
        "entropy": -scored.mean().item(),
        "sampler_gap": (scored - sampled).abs().mean().item(),
        "completion_length": float(np.mean([len(o) for o in completions])),
        "truncated": float(np.mean([o[-1].item() not in encoder.eos for o in completions])),
        "boxes": float(np.mean([len(a) if isinstance(a, np.ndarray) else 0 for a in answers])),
        "truth_boxes": float(np.mean([len(group.prompt.truth) for group in groups])),
        "lost_images": float(sum(group.prompt.weight == 0 for group in groups)),
    }


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, log, pictures


def save_checkpoint(policy, encoder, optimizer, step, cfg):
    """Write `checkpoint-<step>` (SFT's steps and GRPO's counted together) -> the folder, or None.

    It is a Hugging Face folder for `from_pretrained`, with every rank's optimizer shard, the step, the config
    and the size of each file, by which a copy that was cut short is recognised. There is no generator state
    to keep: all randomness, the order of the data too, is a function of (seed, step, prompt). It is written
    beside its place and renamed. If that fails on any rank (a full disk), what there was stays, and None.
    """
    rank, world = rank_and_world()
    final = Path(cfg.output_dir) / f"checkpoint-{step:06d}"
    beside = final.with_name(final.name + ".tmp")

    def begin():
        if rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)

    def write():
        local = getattr(optimizer, "optim", optimizer)  # this rank's shard
        with open(beside / f"optimizer-{rank}.pt", "wb") as file:  # given a path, torch would not say "full"
            torch.save({"adamw": local.state_dict(), "masters": local.masters}, file)
        if rank == 0:
            for part in (unwrap(policy).model, encoder.tokenizer, encoder.image_processor):
                part.save_pretrained(beside)

    def finish():
        if rank == 0:
            sizes = {path.name: path.stat().st_size for path in beside.iterdir()}
            state = {"step": step, "world_size": world, "data_sha256": digest(cfg.data),
                     "config": asdict(cfg), "files": sizes}
            write_text(beside / "dipr1.json", json.dumps(state, indent=2))
            for path in beside.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())  # on the disk before the name says so
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)

    for part in (begin, write, finish):
        if not all(over_ranks([tried(part, final)], "MIN")):  # and so no rank runs ahead
            shutil.rmtree(beside, ignore_errors=True)
            return None
    if rank == 0 and cfg.keep:
        for old in sorted(final.parent.glob("checkpoint-??????"))[: -cfg.keep]:
            shutil.rmtree(old)
    return final


def tried(write, what):
    """write() -> did it work? A full disk is said, and is no reason to end a run of days."""
    try:
        write()
        return True
    except (OSError, SafetensorError) as error:
        tqdm.write(f"warning: {what} could not be written: {error}", file=sys.stderr)
        return False


def digest(path):
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def complete(folder):
    """What dipr1.json says of a checkpoint, or None if it or any file beside it is missing or cut short."""
    try:
        state = json.loads((folder / "dipr1.json").read_text())
        right = all((folder / name).stat().st_size == size for name, size in state["files"].items())
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None
    return state if right else None


FREE_TO_CHANGE = {"resume", "output_dir", "save_every", "keep", "picture_every", "gradient_checkpointing",
                  "eval", "predictions", "batch_size", "samples", "pictures", "limit"}


def find_checkpoint(cfg):
    """What `--resume` goes on from -> (folder, step), or (None, 0) where nothing was saved yet. SystemExit if
    the run would not be the same: another setting, another number of processes, other data."""
    newest_first = sorted(Path(cfg.output_dir).glob("checkpoint-??????"), reverse=True)
    for folder in newest_first if cfg.resume == "newest" else [Path(cfg.resume)]:
        state = complete(folder)
        if state is None:
            if cfg.resume != "newest":
                raise SystemExit(f"--resume {folder}: it is not there, or not complete")
            print0(f"warning: {folder} is not complete; trying the one before it")
            continue
        was = state["config"] | {"processes": state["world_size"], "data's content": state["data_sha256"]}
        now = asdict(cfg) | {"processes": rank_and_world()[1], "data's content": digest(cfg.data)}
        for name in was | now:
            before, after = was.get(name, "unknown"), now.get(name, "unknown")  # to another version
            if name not in FREE_TO_CHANGE and before != after:
                raise SystemExit(f"--resume {folder}: its {name} was {before!r} and is {after!r} now")
        return folder, state["step"]
    return None, 0


def restore(optimizer, folder):
    """Put this rank's shard of a checkpoint's optimizer back."""
    local = getattr(optimizer, "optim", optimizer)
    device = local.masters[0].device
    saved = torch.load(folder / f"optimizer-{rank_and_world()[0]}.pt", map_location=device, weights_only=True)
    local.load_state_dict(saved["adamw"])
    with torch.no_grad():
        for master, value in zip(local.masters, saved["masters"]):
            master.copy_(value)


SIGNALS = []  # what asked this process to stop


@contextlib.contextmanager
def noting_signals():
    """SIGTERM and Ctrl-C wait in SIGNALS until the step is done; the second one ends the process at once."""
    def note(signum, frame):
        SIGNALS.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        SIGNALS.clear()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_after_step(policy, encoder, optimizer, step, cfg):
    """If SIGTERM or Ctrl-C reached any rank: write a checkpoint, and all leave together."""
    (asked,) = map(int, over_ranks([max(SIGNALS, default=0)], "MAX"))
    if asked:
        folder = save_checkpoint(policy, encoder, optimizer, step, cfg)
        last = f"go on with --resume from {folder}" if folder else "this step could not be saved"
        print0(f"\nstopped by {signal.Signals(asked).name}; {last}")
        raise SystemExit(128 + asked)


class Log:
    """metrics.jsonl, the figures on the bar, TensorBoard if it happens to be installed; rank 0 writes."""

    def __init__(self, folder, steps_done=0):
        self.file, self.board, self.skipped = None, None, 0
        if rank_and_world()[0] != 0:
            return
        path = Path(folder) / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if steps_done else []
        write_text(path, "".join(lines[:steps_done]))  # steps after the checkpoint come again
        self.file = open(path, "a", encoding="utf-8")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder)

    def write(self, phase, step, metrics, bar):
        """Average a step's metrics over the ranks (all of them must call) and write them down."""
        totals, world = over_ranks(list(metrics.values()), "SUM"), rank_and_world()[1]
        metrics = {name: total / world for name, total in zip(metrics, totals)}
        if self.file:
            line = {name: value if np.isfinite(value) else None for name, value in metrics.items()}
            try:
                self.file.write(json.dumps({"phase": phase, "step": step, **line}) + "\n")
                self.file.flush()
            except OSError as error:
                raise SystemExit(f"{self.file.name}: {error}; make room, and go on with --resume") from None
        self.skipped = self.skipped + 1 if metrics["skipped"] else 0
        if self.skipped == 10:
            seen = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
            raise SystemExit(f"{phase} step {step}: ten updates in a row not finite ({seen}); lower the rate")
        if self.file:
            shown = ("loss", "reward", "reward_format", "reward_look", "reward_accuracy", "kl", "boxes")
            shown = {name: f"{metrics[name]:.3g}" for name in shown if name in metrics}
            bar.set_postfix({name.removeprefix("reward_"): value for name, value in shown.items()})
        if self.board:
            for name, value in metrics.items():
                self.board.add_scalar(f"{phase}/{name}", value, step)


def draw_boxes(image, boxes, scale, color, line):
    """Outline (n, 4) boxes, None for none, on an image `scale` times as large; no area, no outline."""
    pen = ImageDraw.Draw(image)
    for x1, y1, x2, y2 in as_boxes([] if boxes is None else boxes) * scale:
        if x1 < x2 and y1 < y2:
            pen.rectangle([x1, y1, x2, y2], outline=color, width=line)


def as_marks(answer):
    """An answer as boxes to draw: those it has, or small ones around its points; None if it has neither."""
    if not isinstance(answer, np.ndarray):
        return None
    return answer if answer.shape[1] == 4 else np.hstack([answer - 2, answer + 2])


def draw_picture(group, path, height=448):
    """PNG of a group: its first completion on the image (truth thin white, answer orange, look green) and the
    map of where the group's answers disagree, which is what the look is paid to find."""
    prompt, look = group.prompt, parse_response(group.texts[0]).look
    answers = [read_answer(text, prompt.record) for text in group.texts]
    reads = prompt.record["task"] == "ocr"
    colors = "truth white, answer orange" + ", look green" * (prompt.record["method"] == "dip-r1")
    caption = f"reads {answers[0]!r}" if reads else f"{prompt.record['target']}: {colors}"
    first, *others = map(as_marks, answers)
    scale = height / prompt.height
    size = (round(prompt.width * scale), height)
    image = open_image(prompt.record["path"]).resize(size)
    counts = [coverage(marks, prompt.width, prompt.height) for marks in (first, *others) if marks is not None]
    unsure = disagreement(counts) if len(counts) > 1 else np.zeros((prompt.height // 14, prompt.width // 14))
    heat = Image.fromarray((190 * unsure).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    dimmed = image.convert("L").convert("RGB").point([value // 2 for value in range(256)] * 3)
    doubt = Image.composite(Image.new("RGB", size, (255, 120, 0)), dimmed, heat)
    draw_boxes(image, first, scale, (255, 140, 0), 4)
    draw_boxes(image, as_marks(prompt.truth), scale, (255, 255, 255), 1)
    for side in (image, doubt):
        draw_boxes(side, look, scale, (60, 220, 60), 2)

    sheet = Image.new("RGB", (2 * size[0] + 8, height + 24), (24, 24, 24))
    sheet.paste(image, (0, 24))
    sheet.paste(doubt, (size[0] + 8, 24))
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 6), caption.encode("ascii", "replace").decode(), fill=(230, 230, 230))
    pen.text((size[0] + 14, 6), f"where {len(answers)} answers disagree", fill=(230, 230, 230))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------------
# Evaluation: what a detection researcher would ask, in pixels of the original image

EVALUATION = 2**31  # stands where training has its step: evaluation draws numbers that training never sees
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)


def ratio(a, b):
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.shape(a)), where=np.asarray(b) > 0)


# JI = k / (m + n - k),   k pairs of m predictions and n truths
def jaccard_index(pred, truth, ignore):
    """CrowdHuman's index of one image, in [0, 1]; it needs no confidence. Unmatched boxes that lie more than
    half in an ignore region leave both counts; 1 if nothing is there and nothing was predicted."""
    pred_idx, truth_idx, _ = match_boxes(pred, truth)
    left_over = 0
    for boxes, matched in ((pred, pred_idx), (truth, truth_idx)):
        left_over += (np.delete(share_inside(boxes, ignore), matched) <= 0.5).sum()
    k = len(pred_idx)
    return k / (k + left_over) if k + left_over else 1.0


def coco_hits(pred, truth, ignore, iou_threshold):
    """COCO's greedy matching of one image -> a list of 1 (hit) and 0 (miss), in the order written.

    Each of the first 100 predictions takes the free truth that it overlaps most. One that finds none is a
    miss, unless a share of it as large as the threshold lies in an ignore region: then it is left out.
    """
    free, hits, pred = np.ones(len(truth), bool), [], pred[:100]
    for overlaps, inside in zip(box_iou(pred, truth), share_inside(pred, ignore)):
        candidates = np.flatnonzero(free & (overlaps >= iou_threshold))
        if len(candidates):
            free[candidates[overlaps[candidates].argmax()]] = False
            hits.append(1)
        elif inside < iou_threshold:
            hits.append(0)
    return hits


# AP = mean over recalls r in {0, .01, .., 1} of  max { precision at k : recall at k >= r }
def average_precision(images, iou_threshold):
    """COCO's 101-point average precision of (pred, truth, ignore) for every image, in [0, 1].

    A language model gives no confidences: all are equal, and COCO breaks the tie by order - images as they
    come, boxes as they are written. So this AP depends on the answers' order.
    """
    hits = [hit for image in images for hit in coco_hits(*image, iou_threshold)]
    tp, n_truth = np.cumsum(hits), sum(len(truth) for _, truth, _ in images)
    precision = tp / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or any higher one
    at = np.searchsorted(tp / max(n_truth, 1), np.linspace(0, 1, 101), side="left")
    return np.append(best, 0.0)[at].mean()


def detection_figures(images):
    """(pred (n, 4), truth (m, 4), ignore (k, 4)) of every image -> dict of figures; see the README."""
    counts = np.array([[count_matches(*image, iou) for iou in IOU_THRESHOLDS] for image in images])
    tp, n_pred, n_truth = counts.sum(axis=0).T  # each by IoU threshold
    precision, recall, f1 = ratio(tp, n_pred), ratio(tp, n_truth), ratio(2 * tp, n_pred + n_truth)
    matches = [match_boxes(pred, truth) for pred, truth, _ in images]
    hidden = [crowded(truth, 0.2) for _, truth, _ in images]  # the paper's own concern
    found = [hides[truth_idx].sum() for hides, (_, truth_idx, _) in zip(hidden, matches)]
    ious = np.concatenate([iou for _, _, iou in matches])
    aps = [average_precision(images, iou) for iou in IOU_THRESHOLDS]
    return {
        "precision": precision[0], "recall": recall[0], "f1": f1[0],
        "precision_50_95": precision.mean(), "recall_50_95": recall.mean(), "f1_50_95": f1.mean(),
        "mean_iou": ious.mean() if len(ious) else 0.0,
        "jaccard": np.mean([jaccard_index(*image) for image in images]),
        "ap50": aps[0], "ap": np.mean(aps),
        "crowded_recall": ratio(sum(found), np.concatenate(hidden).sum()),
        "count_mae": np.abs(counts[:, 0, 1] - counts[:, 0, 2]).mean(),
        "boxes_per_image": np.mean([len(pred) for pred, _, _ in images]),
        "truth_boxes_per_image": np.mean([len(truth) for _, truth, _ in images]),
    }


def grounding_figures(images):
    """(pred (n, 4), truth (1, 4), _) of every image -> dict of figures."""
    ious = np.array([grounding_reward(pred, truth) for pred, truth, _ in images])
    accuracies = {f"acc_{threshold:g}": (ious >= threshold).mean() for threshold in (0.5, 0.75, 0.95)}
    return accuracies | {"mean_iou": ious.mean()}


def counting_figures(images):
    """(pred (n, 2), truth (m, 2), _) of every image -> dict of figures."""
    off = np.array([abs(len(pred) - len(truth)) for pred, truth, _ in images])
    return {"exact_count": (off == 0).mean(), "count_mae": off.mean()}


def ocr_figures(images):
    """(pred, truth, _), strings, of every image -> dict of figures; words are compared as bags of words."""
    common = [sum((Counter(pred.split()) & Counter(truth.split())).values()) for pred, truth, _ in images]
    words = [len(pred.split()) + len(truth.split()) for pred, truth, _ in images]
    distance = [1 - ocr_reward(pred, truth) for pred, truth, _ in images]
    return {"edit_distance": np.mean(distance), "word_f1": ratio(2 * sum(common), sum(words))}


FIGURES = {"detection": detection_figures, "grounding": grounding_figures, "counting": counting_figures,
           "ocr": ocr_figures}


def beside_truth(record, answer):
    """An entry of predictions.jsonl -> (pred, truth, ignore) of its record's task."""
    name = TRUTH[record["task"]]
    pred = answer[name]
    if name == "boxes":
        pred = clip_boxes(pred, record["width"], record["height"])
    return pred, record[name], record["ignore"]


def task_figures(records, predictions):
    """-> dict of the figures of each task, with the task's name before them if there are several."""
    images = {}
    for record, prediction in zip(records, predictions):
        images.setdefault(record["task"], []).append(beside_truth(record, prediction))
    by_task = {task: FIGURES[task](images[task]) for task in images}
    if len(by_task) == 1:
        return next(iter(by_task.values()))
    return {f"{task} {name}": value for task in by_task for name, value in by_task[task].items()}


def score(records, predictions):
    """Predictions, one a record, as predictions.jsonl holds them -> dict of figures.

    All need their task's answer ("boxes", "points" or "transcript"). "rewards" and "samples", where they are
    known, give the mean rewards of the greedy answers and of those sampled at temperature T.
    """
    figures = task_figures(records, predictions)
    pairs = zip(records, predictions)
    samples = [(record, sample) for record, p in pairs for sample in p.get("samples", [])]
    looks = bool(samples) and all(record["method"] == "dip-r1" for record in records)
    if samples and all(record["task"] == "detection" for record in records):
        counts = [count_matches(*beside_truth(*pair)) for pair in samples]
        tp, n_pred, n_truth = np.sum(counts, axis=0)
        figures["sampled_f1"] = ratio(2 * tp, n_pred + n_truth)
    for prefix, entries in (("", predictions), ("sampled_", [sample for _, sample in samples])):
        if entries and all("rewards" in entry for entry in entries):
            rewards = np.array([entry["rewards"] for entry in entries])
            figures[f"{prefix}format_rate"] = (rewards[:, 0] > 0).mean()
            if looks:
                figures[f"{prefix}look_reward"] = rewards[:, 1].mean()
            figures[f"{prefix}accuracy_reward"] = rewards[:, 2].mean()
    return {name: float(value) for name, value in figures.items()}


def answers(prompt, texts, rewards):
    """Completions of a prompt as predictions.jsonl keeps them, with their rewards; boxes and points in pixels
    of the original image. An answer that does not parse is empty."""
    record, name = prompt.record, TRUTH[prompt.record["task"]]
    for text, reward in zip(texts, rewards):
        answer = read_answer(text, record)
        if name == "boxes":
            answer = clip_boxes([] if answer is None else answer, prompt.width, prompt.height)
        if name != "transcript":
            size = record["width"], record["height"]
            answer = [] if answer is None else to_image_space(answer, size, prompt.grid).round(2).tolist()
        yield {"text": text, name: "" if answer is None else answer, "rewards": reward}


@torch.no_grad()
def predict(policy, encoder, records, cfg, folder):
    """Answer every image once greedily, as the model would be used, and `--samples` times at temperature T,
    as it is trained; images are shared out over the ranks -> predictions in order, on every rank.

    The greedy look is rewarded against the disagreement of the sampled answers: alone it has no siblings.
    """
    policy, (rank, world) = unwrap(policy), rank_and_world()
    chunks = in_chunks(list(enumerate(records))[rank::world], cfg.batch_size)
    shape, predictions = (cfg.samples, cfg.max_new_tokens), {}
    for chunk in progress(chunks, "evaluating", len(chunks)):
        prompts = [encoder.prompt(index, record) for index, record in chunk]
        keep_features(policy, prompts)
        groups = rollout(policy, encoder, prompts, cfg.max_new_tokens)
        if cfg.samples:
            uniforms = torch.stack([draw_uniforms(cfg.seed, EVALUATION, p.index, shape) for p in prompts])
            sampled = rollout(policy, encoder, prompts, cfg.max_new_tokens, uniforms)
            for group, siblings in zip(groups, sampled):
                group.texts += siblings.texts
        for group in groups:
            prompt, siblings = group.prompt, Group(group.prompt, [], texts=group.texts[1:])
            rewards = [group_rewards(g, cfg.recall_weight).tolist() for g in (group, siblings)]
            first, *rest = answers(prompt, group.texts, rewards[0][:1] + rewards[1])
            about = {name: prompt.record[name] for name in ("image", "target", "task")}
            predictions[prompt.index] = about | first | {"samples": rest}
            if prompt.index < cfg.pictures:
                draw_picture(group, Path(folder) / "pictures" / f"{prompt.index:06d}.png")
    return gather(predictions)


def gather(predictions):
    """{index: prediction} of all ranks -> one list, in the order of the index."""
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, predictions)
        predictions = {index: p for part in everyone for index, p in part.items()}
    return [predictions[index] for index in sorted(predictions)]


def evaluate(policy, encoder, records, cfg, folder):
    """Answer held-out images, write predictions.jsonl and pictures to `folder` -> dict of figures."""
    predictions = predict(policy, encoder, records, cfg, folder)
    if rank_and_world()[0] == 0:
        lines = [json.dumps(prediction) + "\n" for prediction in predictions]
        write_text(Path(folder) / "predictions.jsonl", "".join(lines))
    return score(records, predictions)


def load_predictions(path, records):
    """predictions.jsonl, ours or another tool's (`image` and `boxes` suffice), in the order of the records.
    A record that has no prediction counts as answered by nothing, with a warning."""
    places, predictions = {}, {}
    for number, record in enumerate(records):
        places.setdefault((record["image"], record["target"], record["task"]), []).append(number)

    def check(entry):
        key = entry["image"], entry.get("target", "person"), entry.get("task", "detection")
        if not places.get(key):
            raise ValueError(f"{key} " + ("comes too often" if key in places else "is not in the data"))
        name = TRUTH[key[2]]
        for answer in (entry, *entry.get("samples", [])):
            if name == "transcript":
                answer[name].split()  # a string
            else:
                answer[name] = np.array(answer[name], float).reshape(-1, 4 if name == "boxes" else 2)
                if not np.isfinite(answer[name]).all():
                    raise ValueError(f"{name} must be finite")
        predictions[places[key].pop(0)] = entry

    read_jsonl(path, check)
    missing = len(records) - len(predictions)
    if missing:
        print0(f"{path}: no prediction for {missing} of {len(records)} images: they count as empty answers")
    nothing = {"boxes": [], "points": [], "transcript": ""}
    return [predictions.get(number, nothing) for number in range(len(records))]


def print_table(columns):
    """Print {name: figures} side by side."""
    print0(f"\n{'held-out images':<26}" + "".join(f"{name:>15}" for name in columns))
    for figure in next(iter(columns.values())):
        print0(f"{figure:<26}" + "".join(f"{values[figure]:>15.3f}" for values in columns.values()))


def write_text(path, text):
    """Write a file, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# Main: load, warm up, GRPO; or evaluate; or the demo

DEMO = dict(  # what `--demo` puts in place of the defaults; flags on the command line still win
    output_dir="runs/demo", max_new_tokens=72, batch_size=64, sft_steps=950, sft_lr=2e-3, sft_batch=16,
    steps=95, prompts_per_step=32, groups_per_forward=4, lr=2e-4, save_every=0,
)
DEMO_SCENES, DEMO_HELD_OUT = 4000, 200


def join_processes():
    """Take a GPU, if there are any, and meet the other processes, if torchrun started this one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        patience = timedelta(minutes=30)  # of a collective: a rank that never comes ends the run, no hang
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # This store outlives a restart, addresses of the dead in it: each start has its own part.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def setup(cfg):
    """Load the model to this process's device -> (policy, encoder)."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    model, tokenizer, image_processor = load_model(cfg, device)
    encoder = Encoder(model, tokenizer, image_processor, cfg.max_prompt_tokens)
    return Policy(model, tokenizer, cfg.temperature), encoder


def train_sft(policy, encoder, records, cfg, log, start=0, folder=None):
    """The supervised warm-up: the paper's SFT baseline, and the demo's cold start."""
    optimizer = make_optimizer(policy)
    if start < cfg.sft_steps and folder:
        restore(optimizer, folder)
    steps = batches(encoder, records, cfg.sft_batch, cfg.seed, cfg.sft_steps, start)
    bar = progress(steps, "SFT", cfg.sft_steps, start)
    for step, prompts in bar:
        lr = learning_rate(step, cfg.sft_steps, cfg.sft_lr, cfg.warmup_steps)
        log.write("sft", step, sft_step(policy, optimizer, encoder, prompts, cfg, lr), bar)
        done = step + 1
        if cfg.save_every and done % cfg.save_every == 0:
            save_checkpoint(policy, encoder, optimizer, done, cfg)
        stop_after_step(policy, encoder, optimizer, done, cfg)


def reference_policy(policy, cfg, start):
    """The frozen policy that GRPO started from, after the warm-up if there was one; None without a KL.

    After a warm-up it is kept as `reference`, since a run that resumes could not make it again.
    """
    if not cfg.beta:
        return None
    from transformers import Qwen2_5_VLForConditionalGeneration

    reference = copy.deepcopy(unwrap(policy)).eval().requires_grad_(False)
    kept = Path(cfg.output_dir) / "reference"
    if start:
        first = Qwen2_5_VLForConditionalGeneration.from_pretrained(kept if cfg.sft_steps else cfg.model)
        reference.model.load_state_dict(first.state_dict())
    elif cfg.sft_steps and cfg.save_every and rank_and_world()[0] == 0:
        if not tried(lambda: reference.model.save_pretrained(kept), kept):
            raise SystemExit("without it this run could not be resumed")
    barrier()
    return reference


def train_grpo(policy, encoder, records, cfg, log, start=0, folder=None):
    """GRPO, with checkpoints and pictures."""
    optimizer = make_optimizer(policy)
    reference = reference_policy(policy, cfg, start)
    if start:
        restore(optimizer, folder)
    steps = batches(encoder, records, cfg.prompts_per_step, cfg.seed, cfg.steps, start)
    bar = progress(steps, "GRPO", cfg.steps, start)
    for step, prompts in bar:
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup_steps)
        metrics, groups = grpo_step(policy, reference, optimizer, encoder, prompts, cfg, step, lr)
        log.write("grpo", step, metrics, bar)
        done = step + 1
        if rank_and_world()[0] == 0 and cfg.picture_every and done % cfg.picture_every == 0:
            path = Path(cfg.output_dir) / "pictures" / f"step-{done:06d}.png"
            tried(lambda: draw_picture(groups[0], path), path)
        if cfg.save_every and (done % cfg.save_every == 0 or done == cfg.steps):
            saved = save_checkpoint(policy, encoder, optimizer, cfg.sft_steps + done, cfg)
            if done == cfg.steps and not saved:
                raise SystemExit("the last checkpoint could not be written: make room, and --resume")
        stop_after_step(policy, encoder, optimizer, cfg.sft_steps + done, cfg)


def parallel(policy):
    """Under torchrun, the policy in DDP: a forward through it averages the gradients over the ranks."""
    if not dist.is_initialized():
        return policy
    options = dict(forward_sync_buffers=False, gradient_as_bucket_view=True)  # no buffer ever changes
    return nn.parallel.DistributedDataParallel(policy, **options)


def train(cfg):
    """Warm-up and GRPO on --data."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun --max_restarts: a rank died
        cfg.resume = cfg.resume or "newest"
    if (Path(cfg.output_dir) / "metrics.jsonl").exists() and not cfg.resume:
        raise SystemExit(f"{cfg.output_dir} holds a run already: --resume it, or choose another --output_dir")
    records = load_records(cfg.data, cfg.method)
    folder, step = find_checkpoint(cfg) if cfg.resume else (None, 0)
    barrier()  # nobody writes before all have looked
    policy, encoder = setup(replace(cfg, model=str(folder)) if folder else cfg)
    policy, log = parallel(policy), Log(cfg.output_dir, step)
    with noting_signals():
        if step < cfg.sft_steps:
            train_sft(policy, encoder, records, cfg, log, step, folder)
        train_grpo(policy, encoder, records, cfg, log, max(step - cfg.sft_steps, 0), folder)


def run_evaluation(cfg):
    """`--eval`, or `--predictions FILE` of any tool: print the table and write eval.json."""
    records, source = load_records(cfg.data, cfg.method), cfg.predictions or cfg.model
    if cfg.predictions:
        predictions = load_predictions(cfg.predictions, records)
        figures = score(records[: cfg.limit or None], predictions[: cfg.limit or None])
    else:
        policy, encoder = setup(cfg)
        figures = evaluate(policy, encoder, records[: cfg.limit or None], cfg, cfg.output_dir)
    print_table({Path(source).name: figures})
    if rank_and_world()[0] == 0:
        about = {"source": source, "data": cfg.data, "images": len(records[: cfg.limit or None])}
        write_text(Path(cfg.output_dir) / "eval.json", json.dumps(about | figures, indent=2))


NAMES = {"dip-r1": "DIP-R1", "perception-r1": "Perception-R1"}


def prepare_demo(cfg, questions):
    """Draw the scenes and make the tiny model, once for all ranks -> (policy, encoder)."""
    import data_prep

    folder = Path(cfg.output_dir)
    if rank_and_world()[0] == 0:
        count = DEMO_SCENES + DEMO_HELD_OUT
        data_prep.synthetic(folder / "scenes", count, cfg.seed, val=DEMO_HELD_OUT, task=cfg.task)
        data_prep.tiny(folder / "tiny", cfg.seed, questions=questions)
    barrier()
    policy, encoder = setup(replace(cfg, model=str(folder / "tiny")))
    return parallel(policy), encoder


def demo_records(cfg):
    """-> (training, held-out) records of the demo's scenes, asked as the method asks."""
    folder = Path(cfg.output_dir) / "scenes"
    return [load_records(folder / f"{name}.jsonl", cfg.method) for name in ("train", "val")]


def run_demo(cfg):
    """`--demo`: scenes and a tiny model, SFT, GRPO, and the same held-out scenes before and after."""
    started, folder = float(os.environ.get("DEMO_STARTED", time.time())), Path(cfg.output_dir)
    asked = QUESTION if cfg.method == "dip-r1" else PERCEPTION_QUESTIONS[cfg.task]
    policy, encoder = prepare_demo(cfg, [asked])
    (records, held_out), log = demo_records(cfg), Log(folder)
    cfg.data = str(folder / "scenes" / "train.jsonl")
    train_sft(policy, encoder, records, cfg, log)
    sft = evaluate(policy, encoder, held_out, cfg, folder / "sft")
    train_grpo(policy, encoder, records, cfg, log)
    after = evaluate(policy, encoder, held_out, cfg, folder / cfg.method)
    print_table({"SFT": sft, NAMES[cfg.method]: after})
    seconds = round(time.time() - started)
    summary = {"seed": cfg.seed, "seconds": seconds, "sft": sft, cfg.method: after}
    if rank_and_world()[0] == 0:
        write_text(folder / "summary.json", json.dumps(summary, indent=2))
    print0(f"\n{seconds} s. Written: {folder}/summary.json, metrics.jsonl and pictures/")


def compare_once(cfg):
    """One seed of `--compare` -> {what was trained: its figures on the held-out scenes}.

    The warm-up writes each scene in both templates, so that all start from the same weights. From there each
    takes the same steps of as many completions, cut at the same length.
    """
    folder = Path(cfg.output_dir)
    looking = replace(cfg, method="dip-r1", data=str(folder / "scenes" / "train.jsonl"))
    answering = replace(looking, method="perception-r1")
    policy, encoder = prepare_demo(cfg, [QUESTION, PERCEPTION_QUESTIONS["detection"]])
    both = demo_records(looking)[0] + demo_records(answering)[0]
    train_sft(policy, encoder, both, cfg, Log(folder / "warm-up"))
    start, figures = copy.deepcopy(unwrap(policy).state_dict()), {}
    ways = {"SFT": looking, "SFT, answer alone": answering, "Perception-R1": answering,
            "DIP-R1 without look": replace(looking, look_weight=0.0), "DIP-R1": looking}
    for name, way in ways.items():
        records, held_out = demo_records(way)
        if not name.startswith("SFT"):
            unwrap(policy).load_state_dict(start)
            train_grpo(policy, encoder, records, way, Log(folder / name))
        figures[name] = evaluate(policy, encoder, held_out, way, folder / name)
    return figures


def run_comparison(cfg):
    """`--demo --compare N`: Perception-R1 and DIP-R1 from one warm-up, on seeds 0 .. N-1; prints the mean and
    the standard deviation over the seeds, and writes them to compare.json."""
    folder, runs = Path(cfg.output_dir), []
    for seed in range(cfg.compare):
        runs.append(compare_once(replace(cfg, seed=seed, output_dir=str(folder / f"seed-{seed}"))))
        if rank_and_world()[0] == 0:
            write_text(folder / "compare.json", json.dumps(runs, indent=2))
    print0(f"\n{'held-out images':<26}" + "".join(f"{name:>21}" for name in runs[0]))
    for figure in runs[0]["DIP-R1"]:
        values = [[run[name].get(figure, np.nan) for run in runs] for name in runs[0]]  # nan: no look
        cells = [f"{np.mean(v):.3f} +- {np.std(v):.3f}" for v in values]
        print0(f"{figure:<26}" + "".join(f"{cell:>21}" for cell in cells))


def start_twice(argv):
    """Start this command under torchrun, in two processes of one thread each: the demo's matrices are too
    small to be shared by two threads, but a batch is easily shared by two processes."""
    os.environ |= {"DEMO_STARTED": str(time.time()), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    os.execv(sys.executable, [*torchrun, sys.argv[0], *argv])  # this process becomes torchrun


def main(argv=None):
    """The command line: every field of Config is a flag."""
    from transformers import HfArgumentParser
    from transformers.utils import logging

    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0])
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    (cfg,) = parser.parse_args_into_dataclasses(argv)
    logging.disable_progress_bar()
    other_task = cfg.task != "detection" and not (cfg.demo and cfg.method == "perception-r1")
    if other_task or cfg.compare and not cfg.demo:
        raise SystemExit("--task goes with --demo --method perception-r1, and --compare with --demo")
    if cfg.demo and "RANK" not in os.environ and not torch.cuda.is_available() and os.cpu_count() > 1:
        start_twice(argv)
    join_processes()  # until then every process takes itself for rank 0
    evaluates = cfg.eval or cfg.predictions
    run = run_comparison if cfg.compare else run_demo
    (run if cfg.demo else run_evaluation if evaluates else train)(cfg)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

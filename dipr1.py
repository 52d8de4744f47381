"""DIP-R1: reinforcement learning that teaches Qwen2.5-VL to see individuals in a crowd (arXiv 2505.23179).

    for each prompt q (an image and a question):
        o_1 .. o_G  ~  pi(. | q)                       a group of completions: <think> <look> <answer>
        r_i  =  w_f format_i + w_l look_i + accuracy_i            three rewards by rule, no learned judge
        A_i  =  (r_i - mean r) / (std r + 1e-4)                   better or worse than its siblings?
        minimise  mean_t [ -min(rho A, clip(rho, 1-eps, 1+eps) A) + beta KL(pi || pi_ref) ]

    torchrun --nproc_per_node 2 dipr1.py --demo     no GPU, no download: watch a tiny Qwen2.5-VL learn
    torchrun --nproc_per_node 8 dipr1.py            the real thing: Qwen2.5-VL-3B on data/train.jsonl
    python dipr1.py --eval --model DIR --data FILE  precision, recall, F1, AP of a checkpoint
    python dipr1.py --help                          every setting

What is unusual here:
  1) A prompt and its image are read once for all G completions, which follow it in one sequence (`pack`).
  2) The loss is averaged over all tokens of a group, as in DIP-R1, and not over each completion first.
  3) The look reward is credited to the tokens that can have earned it (`token_advantages`).
  4) SFT is the same update with one completion, the truth, and advantage 1 (`sft_step`).

We did not have the paper's exact equations for the look and the accuracy reward. Where a definition is ours,
the words "our reading" stand beside it. `--method perception-r1` is Perception-R1 (arXiv 2504.07954), the
baseline to beat: the two differ in what they ask and what they reward, which is one table, TASKS.

Read from the top: template, boxes, rewards, advantages and loss, the model, the rollout, one training step.
That is the whole method. Loading, data, checkpoints, evaluation and the command line follow.
"""
import argparse
import bisect
import contextlib
import copy
import functools
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import string
import sys
import time
import unicodedata
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Callable, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy, linear, pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoTokenizer, DynamicCache
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils.logging import disable_progress_bar

import data_prep
from data_prep import check_count, check_rows, check_size, draw_rows, open_image, read_jsonl, written_whole


def flag(default, help, least=None, most=sys.float_info.max):
    """A field of Config: its default, the sentence that `--help` shows, the values between which it works."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass
class Config:
    """Every flag, explained on its line. The command line is made from these fields."""

    demo: bool = flag(False, "draw crowds, make a tiny model, train it by SFT and by --method, compare")
    eval: bool = flag(False, "evaluate --model on --data instead of training")
    predictions: str = flag("", "score this predictions.jsonl on --data; needs no model")
    method: Literal["dip-r1", "perception-r1"] = flag("dip-r1", "what is asked, and what is rewarded")
    model: str = flag("Qwen/Qwen2.5-VL-3B-Instruct", "a Qwen2.5-VL: a name on the hub or a folder")
    data: str = flag("data/train.jsonl", "one image per line, as data_prep.py writes it")
    output_dir: str = flag("runs/dipr1", "where metrics.jsonl, pictures and checkpoints go")
    seed: int = flag(0, "of data order and sampling; on a CPU the same seed repeats a run bit for bit", 0)
    max_pixels: int = flag(1280 * 28 * 28, "larger images are scaled down; 28 x 28 pixels a token", 56 * 56)

    steps: int = flag(1000, "GRPO steps", 0)
    prompts_per_step: int = flag(8, "prompts (groups) per step, over all processes together", 1)
    group_size: int = flag(8, "G, completions per prompt; advantages compare at least two", 2)
    max_new_tokens: int = flag(1280, "a completion is cut here; a box costs some 21 tokens", 1)
    temperature: float = flag(1.0, "of sampling, and of the distribution that is trained", 1e-3)
    lr: float = flag(1e-6, "peak learning rate: linear warm-up, then linear decay to 0", 0)
    warmup_steps: int = flag(10, "steps of warm-up, of SFT and of GRPO alike", 0)
    beta: float = flag(0.04, "weight of the KL to the reference model; 0 loads none", 0)
    clip_eps: float = flag(0.2, "eps of the clipped ratio", 0)
    num_iterations: int = flag(1, "updates on each batch of rollouts", 1)

    format_weight: float = flag(1.0, "w_f", 0)
    look_weight: float = flag(0.1, "w_l, our reading; the look is learned fast, and more costs precision", 0)
    recall_weight: float = flag(0.8, "w, recall's share of accuracy; at 0.5 the policy turns cautious", 0, 1)
    look_credit: Literal["section", "completion"] = flag("section", "tokens up to </look> earn it, or all")

    sft_steps: int = flag(0, "supervised steps before GRPO, on the truth written in the template", 0)
    sft_lr: float = flag(1e-5, "peak learning rate of SFT", 0)
    sft_batch: int = flag(32, "images per supervised step, over all processes together", 1)

    freeze_vision: bool = flag(False, "do not train the vision tower; it then runs once per step")
    gradient_checkpointing: bool = flag(True, "recompute activations: needs a third of the memory")
    tokens_per_forward: int = flag(12_000, "groups share a forward up to this many tokens; more is faster", 1)
    samples: int = flag(8, "answers sampled per image in evaluation, besides the greedy one", 0)
    picture_every: int = flag(20, "GRPO steps between pictures; 0: none", 0)
    save_every: int = flag(100, "steps between checkpoints; 0: only where SFT and GRPO end", 0)
    keep: int = flag(3, "the newest checkpoints to keep, besides the one that ended SFT; 0: all", 0)
    resume: bool = flag(False, "go on from the newest complete checkpoint in --output_dir, if there is one")


# ------------------------------------------------------------------------------------------------------------
# Template and parsing: a prompt that asks to look first, and a parser that no completion can crash

CHAT = (  # Qwen2.5-VL's chat template, written out
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
QUESTION = (  # our reading: we did not have the paper's prompt
    "Find every {target} in the image, also where one hides behind another. First describe the whole scene "
    "between <think> and </think>. Then list the regions where one is hard to tell from the next between "
    "<look> and </look>. Last list one box for each between <answer> and </answer>. Boxes are a JSON list of "
    "[x1, y1, x2, y2] in pixels; [] means none. Example:\n<think>Two, one in front of the other.</think>"
    "<look>[[10, 20, 58, 90]]</look><answer>[[10, 20, 40, 88], [31, 24, 58, 90]]</answer>"
)
LABELLED = ' Instead of a bare box write {"bbox_2d": [x1, y1, x2, y2], "label": its name}.'
SECTIONS = ("think", "look", "answer")  # of the template, in order
nfc = functools.partial(unicodedata.normalize, "NFC")  # one spelling per accented letter


@dataclass
class Response:
    """A parsed completion. `look` and `answer` are boxes (n, 4), x1, y1, x2, y2 in pixels of the resized
    image, not yet clipped to it: (0, 4) for an empty list, None for one that is missing or not a list."""

    think: str | None
    look: np.ndarray | None
    answer: np.ndarray | str | None  # points (n, 2) or text where the task asks for those
    well_formed: bool  # the template's tags, in order, and nothing outside
    complete: bool = False  # and a thought, and every list parses
    labels: list | None = None  # of the rows of `answer`, a string or None each


def section(text, name):
    """The text from the first <name> to the last </name>, or None. So a list that is written twice fails to
    parse, and a page of text may itself contain the tags."""
    _, opened, rest = text.partition(f"<{name}>")
    inside, closed, _ = rest.rpartition(f"</{name}>")
    return inside if opened and closed else None


def parse_rows(text, columns):
    """A JSON list of boxes (columns 4) or points (2), bare or in Qwen's own form `{"bbox_2d": [1, 2, 3, 4],
    "label": "person"}`, perhaps in a ``` fence -> ((n, columns), n labels or Nones), or (None, None). One row
    alone is a list of one: models answer so for a single object."""
    text, key = text.strip(), "bbox_2d" if columns == 4 else "point_2d"
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].lstrip(string.ascii_letters)  # ```json, ```JSON, ```python
    try:
        rows = json.loads(text)
        if not isinstance(rows, list) or rows and not isinstance(rows[0], (list, dict)):
            rows = [rows]  # one row that is not in a list
        rows = [row if isinstance(row, dict) else {key: row} for row in rows]
        labels = [row.get("label") for row in rows]
        labels = [label if label is None else nfc(str(label)) for label in labels]
        return check_rows(key, [row.get(key) for row in rows], columns), labels
    except (ValueError, RecursionError):
        return None, None


def parse_boxes(text):
    """`[[1, 2, 3, 4], ...]`, or the same in Qwen's form -> (n, 4), or None."""
    return parse_rows(text, 4)[0]


def parse_response(text, names=SECTIONS, columns=4):
    """A completion -> Response. Never raises; linear in the length of the text.

    `names` are the template's sections, `columns` the numbers per row of the answer; 0: the answer is text.
    Well-formed: exactly the template's tags, in order, and nothing but white space outside the sections. In
    a malformed completion a section is still read: a right answer stays right.
    """
    think, look, answer = (section(text, name) for name in SECTIONS)
    tags, labels = [f"<{slash}{name}>" for name in names for slash in ("", "/")], None
    if columns:
        pieces = re.split("(" + "|".join(tags) + ")", text)  # outside, tag, inside, tag, outside, ...
        well_formed = pieces[1::2] == tags and not "".join(pieces[::4]).strip()
        answer, labels = (None, None) if answer is None else parse_rows(answer, columns)
    else:  # a page of text may hold anything, the tags too
        well_formed = text.strip().startswith(tags[0]) and text.strip().endswith(tags[1])
        answer = answer and nfc(answer)
    look = None if look is None else parse_boxes(look)
    found = {"think": (think or "").strip() or None, "look": look, "answer": answer}
    complete = well_formed and all(found[name] is not None for name in names)
    return Response(think, look, answer, well_formed, complete, labels)


# ------------------------------------------------------------------------------------------------------------
# Boxes and matching


def as_boxes(boxes):
    """None or anything that holds boxes, an empty list too -> (n, 4) floats."""
    return np.asarray([] if boxes is None else boxes, float).reshape(-1, 4)


# IoU(a, b) = |a n b| / |a u b|
def box_iou(a, b, of_first=False):
    """(n, 4), (m, 4) -> (n, m) in [0, 1]; 0 where either box is empty, or inverted. With `of_first` the share
    of a that lies in b, |a n b| / |a|."""
    a, b = as_boxes(a), as_boxes(b)
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    intersection = np.prod(np.maximum(sides, 0), axis=2)
    area_a, area_b = (np.prod(np.maximum(x[:, 2:] - x[:, :2], 0), axis=1) for x in (a, b))
    whole = area_a[:, None] + (0 if of_first else area_b - intersection)
    return np.divide(intersection, whole, out=np.zeros_like(intersection), where=whole > 0)


def match_boxes(pred, gt, iou_threshold=0.5):
    """The one-to-one pairs with IoU >= threshold of largest total IoU -> (pred_idx, gt_idx, ious)."""
    iou = box_iou(pred, gt)
    iou[iou < iou_threshold] = 0
    rows, cols = linear_sum_assignment(iou, maximize=True)
    paired = iou[rows, cols] > 0
    return rows[paired], cols[paired], iou[rows, cols][paired]


def count_ignored(boxes, matched, ignore):
    """How many unmatched boxes lie more than half inside an ignore region. They are not counted: nothing is
    annotated there, so they are neither right nor wrong."""
    others = np.delete(boxes, matched, axis=0)
    return int((box_iou(others, ignore, of_first=True) > 0.5).any(axis=1).sum())


def crowds(boxes, iou_threshold=0.2):
    """(n, 4) -> (k, 4): a box around each cluster of boxes that overlap by more than this IoU."""
    k, cluster = connected_components(box_iou(boxes, boxes) > iou_threshold, directed=False)
    members = [boxes[cluster == number] for number in range(k)]
    return as_boxes([[*m[:, :2].min(axis=0), *m[:, 2:].max(axis=0)] for m in members if len(m) > 1])


def against_truth(pred, truth, ignore, pred_labels, record, width, height):
    """Boxes as rewards and figures compare them -> (pred clipped to the image, truth, ignore).

    Where the record has several classes, each class is moved to a place of its own, so that boxes of
    different labels cannot overlap (as in torchvision's batched_nms): no other function knows of labels.
    """
    pred = as_boxes(pred).clip(0, [width, height, width, height])  # one entirely outside is empty, and counts
    if "labels" not in record:
        return pred, truth, ignore
    classes = sorted({*record["labels"], *record["ignore_labels"]})
    place = {label: 2 * width * number for number, label in enumerate(classes)}

    def moved(boxes, labels):
        shift = np.array([place.get(label, -2 * width) for label in labels]).reshape(-1, 1)
        return boxes + shift * [1, 0, 1, 0]

    return moved(pred, pred_labels), moved(truth, record["labels"]), moved(ignore, record["ignore_labels"])


# ------------------------------------------------------------------------------------------------------------
# The three rewards


# r_fmt = 1[well-formed, a thought, and two lists of boxes]
def format_reward(text):
    """1.0 if the completion has the template's shape and both lists parse, else 0.0 (paper)."""
    return float(parse_response(text).complete)


def coverage(boxes, width, height, cell=14):
    """C(x): how many boxes cover the centre of each 14-pixel cell x -> (height / 14, width / 14) counts."""
    boxes, x, y = as_boxes(boxes), np.arange(cell / 2, width, cell), np.arange(cell / 2, height, cell)
    in_columns = (boxes[:, 0:1] <= x) & (x <= boxes[:, 2:3])  # (n, W)
    in_rows = (boxes[:, 1:2] <= y) & (y <= boxes[:, 3:4])  # (n, H)
    return in_rows.T.astype(float) @ in_columns.astype(float)


# u(x) = min(1, 4 Var_j C_j(x))
def disagreement(counts):
    """Where J >= 2 answers disagree: their coverages (J, H, W) -> (H, W) in [0, 1].

    1: half of them count one box more than the other half. Counts, not masks: one box around two people and
    a box for each must disagree, since merging individuals is the very failure that the paper starts from.
    """
    return np.minimum(1, 4 * np.var(counts, axis=0))


# r_look,i = 2 sum_x L_i u_i / (sum_x L_i + sum_x u_i),   u_i from the others' answers, L_i = 1 where i looks
def look_rewards(responses, width, height):
    """How well each completion's look finds what the *others* disagree about: G Responses -> (G,) in [0, 1].

    Our reading of the paper's variance-guided look reward: a soft Dice score. Because u_i leaves completion
    i's own answer out, a completion cannot manufacture the uncertainty that it is paid for. An answer that
    does not parse is left out of the variance (fewer than two others: u = 0). A look that does not parse
    earns 0, and so does any look where u is 0 everywhere.
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
def accuracy_reward(pred, gt, ignore=None, recall_weight=0.8, iou_threshold=0.5):
    """Weighted precision and recall: (n, 4) boxes, m true ones (m, 4) -> [0, 1].

    Our reading of the paper's weighted precision-recall. Nothing there and nothing predicted: 1; one of the
    two empty: 0. A trap: with w = 0.5, dropping a doubtful box pays whenever its chance to be right is below
    about half the precision, so the policy turns cautious - precision up, recall down. Hence w = 0.8.
    """
    pred_idx, _, _ = match_boxes(pred, gt, iou_threshold)
    tp, n_pred, n_gt = len(pred_idx), len(pred) - count_ignored(pred, pred_idx, ignore), len(gt)
    if n_pred == 0 or n_gt == 0:
        return float(n_pred == n_gt)
    return (1 - recall_weight) * tp / n_pred + recall_weight * tp / n_gt


# ------------------------------------------------------------------------------------------------------------
# Perception-R1's four rewards. Our reading where the paper's summary is silent: what an empty answer or a
# wrong number of boxes earns, the unit of a distance, and that everything is divided by the larger count


# r = IoU(pred, truth)
def grounding_reward(pred, truth):
    """(n, 4) boxes against the one box (1, 4) that the phrase means -> [0, 1]; 0 unless n = 1."""
    return float(box_iou(pred, truth)[0, 0]) if len(pred) == len(truth) == 1 else 0.0


# r = 1 - (sum over pairs |p - t| / diagonal  +  unmatched) / max(n, m)
def counting_reward(pred, truth, width, height):
    """(n, 2) points against one on each of m instances (m, 2), paired by the Hungarian algorithm -> [0, 1].

    Every point or instance left over counts as distance 1, and so does a pair farther apart than the image's
    diagonal. No points where nothing is: 1. NaN where only the number of instances is known (truth None).
    """
    if truth is None:
        return float("nan")
    if not len(pred) or not len(truth):
        return float(len(pred) == len(truth))
    distances = np.linalg.norm(pred[:, None] - truth[None], axis=2) / np.hypot(width, height)
    distances = np.minimum(distances, 1)
    paired, n, m = distances[linear_sum_assignment(distances)], len(pred), len(truth)
    return float(1 - (paired.sum() + abs(n - m)) / max(n, m))


def levenshtein(a, b):
    """The fewest insertions, deletions and substitutions that turn string a into b: the usual table, a row at
    a time, in which the deletions along a row are a running minimum."""
    codes, steps = np.array([ord(character) for character in a], int), np.arange(len(a) + 1)
    row = steps
    for i, character in enumerate(b, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(character)))  # insert, or substitute
        row = np.minimum.accumulate(np.concatenate([[i], best]) - steps) + steps
    return int(row[-1])


# r = 1 - levenshtein(pred, truth) / max(|pred|, |truth|)
def ocr_reward(pred, truth):
    """Two strings, compared without surrounding white space -> [0, 1]; two empty ones earn 1."""
    pred, truth = pred.strip(), truth.strip()
    return 1 - levenshtein(pred, truth) / max(len(pred), len(truth), 1)


# r = sum over pairs IoU / max(n, m)
def detection_reward(pred, truth, ignore=None):
    """(n, 4) boxes against m truths (m, 4), paired so that the total IoU is largest -> [0, 1]. Unmatched
    predictions in an ignore region are not counted, as in DIP-R1. Nothing there and nothing predicted: 1."""
    pred_idx, _, ious = match_boxes(pred, truth, 0)
    count = max(len(pred) - count_ignored(pred, pred_idx, ignore), len(truth))
    return float(ious.sum() / count) if count else 1.0


# ------------------------------------------------------------------------------------------------------------
# The two methods on one screen: a row per task. Whatever depends on method or task asks this table


@dataclass(frozen=True)
class Task:
    """What is asked, how it is answered, what an evaluation reports of it, and what an answer earns."""

    question: str
    sections: tuple  # of the template, in order
    broken_format: float  # the format reward where the form is wrong; a right form earns 1
    truth: str  # the field of a record that holds the truth
    columns: int  # numbers per row of the answer: 4 a box, 2 a point, 0 the answer is text
    figures: Callable  # [(answer, truth, ignore, labels, record)] of all images -> {name: value}
    reward: Callable  # (prompt, answer, truth, ignore, recall weight) -> [0, 1]; NaN for a bare count


TASKS = {  # the figures' functions are defined with the evaluation, further down: hence the lambdas
    ("dip-r1", "detection"): Task(
        QUESTION, SECTIONS, 0.0, "boxes", 4, lambda images: detection_figures(images),
        lambda prompt, pred, truth, ignore, w: accuracy_reward(pred, truth, ignore, w)),
    ("perception-r1", "detection"): Task(
        "Find every {target} in the image. List one box for each between <answer> and </answer>. Boxes are a "
        "JSON list of [x1, y1, x2, y2] in pixels; [] means none. Example:\n"
        "<answer>[[10, 20, 40, 88], [31, 24, 58, 90]]</answer>",
        ("answer",), -1.0, "boxes", 4, lambda images: detection_figures(images),
        lambda prompt, pred, truth, ignore, w: detection_reward(pred, truth, ignore)),
    ("perception-r1", "grounding"): Task(
        "Find {target} in the image. Give its one box between <answer> and </answer>, as a JSON list of "
        "[x1, y1, x2, y2] in pixels. Example:\n<answer>[[31, 24, 58, 90]]</answer>",
        ("answer",), -1.0, "boxes", 4, lambda images: grounding_figures(images),
        lambda prompt, pred, truth, ignore, w: grounding_reward(pred, truth)),
    ("perception-r1", "counting"): Task(
        "Count every {target} in the image. List one point on each between <answer> and </answer>. Points "
        "are a JSON list of [x, y] in pixels; [] means none. Example:\n<answer>[[25, 54], [45, 57]]</answer>",
        ("answer",), -1.0, "points", 2, lambda images: counting_figures(images),
        lambda prompt, pred, truth, ignore, w: counting_reward(pred, truth, prompt.width, prompt.height)),
    ("perception-r1", "ocr"): Task(
        "Read the image. Write its text between <answer> and </answer>.",
        ("answer",), -1.0, "transcript", 0, lambda images: ocr_figures(images),
        lambda prompt, pred, truth, ignore, w: ocr_reward(pred, truth)),
}


def task_of(record):
    """The row of TASKS that a record belongs to."""
    return TASKS[record["method"], record["task"]]


def group_rewards(group, recall_weight):
    """(G, 3): the format, look and accuracy reward of each completion. Perception-R1 asks for no look, and
    its answer reward stands in the place of the accuracy."""
    prompt, task = group.prompt, task_of(group.prompt.record)

    def answer_reward(response):
        if response.answer is None and prompt.truth is not None:  # of a bare count every answer earns NaN
            return 0.0
        triple = response.answer, prompt.truth, prompt.ignore
        if task.columns == 4:
            triple = against_truth(*triple, response.labels, prompt.record, prompt.width, prompt.height)
        return task.reward(prompt, *triple, recall_weight)

    form = [1.0 if response.complete else task.broken_format for response in group.responses]  # format_reward
    look = np.zeros(len(form))
    if "look" in task.sections:
        look = look_rewards(group.responses, prompt.width, prompt.height)
    return torch.tensor(np.stack([form, look, [answer_reward(r) for r in group.responses]], axis=1))


# ------------------------------------------------------------------------------------------------------------
# Advantages and loss


# A_i = (r_i - mean_j r_j) / (std_j r_j + 1e-4)
def group_advantages(rewards):
    """How much better each completion did than its siblings: (P, G) rewards -> (P, G) advantages.

    std is the sample one (ddof 1). A group whose rewards all agree teaches nothing: exactly 0, not rounding.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    std = centred.square().sum(dim=1, keepdim=True).div(rewards.shape[1] - 1).sqrt()
    return (centred / (std + 1e-4)).masked_fill(all_equal, 0.0)


# L = 1/N sum_t [ -min(rho_t A_t, clip(rho_t, 1-eps, 1+eps) A_t) + beta k3_t ],           rho = pi / pi_old
# k3 = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1 >= 0;   its mean over samples of pi is the KL
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

    index: int  # its line in the data: a part of the seed that it is sampled with
    record: dict
    ids: torch.Tensor  # (L,) the chat, one <|image_pad|> for each visual token
    positions: torch.Tensor  # (3, L) M-RoPE: time, row, column
    pixels: torch.Tensor  # (patches, 1176) what the vision tower reads
    grid: torch.Tensor  # (1, 3) patches in time, height, width
    width: int
    height: int
    truth: np.ndarray | str | None  # boxes (n, 4), points (n, 2) or text; None: only a count is known
    ignore: np.ndarray  # (m, 4)
    weight: float = 1.0  # of its loss; 0 if its image could not be opened
    features: torch.Tensor | None = None  # (visual tokens, D), kept where the tower runs once per step

    def to(self, device):
        """The same prompt with its tensors on a device."""
        names = ("ids", "positions", "pixels", "grid")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass
class Group:
    """One prompt and its completions o_1 .. o_G; flat tensors run over all their N = sum_i |o_i| tokens."""

    prompt: Prompt
    completions: list  # G tensors of token ids, with EOS unless cut at max_new_tokens
    rollout_logp: torch.Tensor | None = None  # (N,) the sampler's log-probabilities, only to compare
    texts: list | None = None  # G decoded completions
    advantages: torch.Tensor | None = None  # (N,)
    old_logp: torch.Tensor | None = None  # (N,) log pi_old, as it is scored before the first update
    ref_logp: torch.Tensor | None = None  # (N,) log pi_ref

    @property
    def n_tokens(self):
        return sum(map(len, self.completions))

    @functools.cached_property
    def responses(self):
        task = task_of(self.prompt.record)
        return [parse_response(text, task.sections, task.columns) for text in self.texts]


def to_model_space(boxes, size, grid):
    """Boxes (n, 4) or points (n, 2) in pixels of an image of size (W, H) -> pixels of its resized copy, in
    which Qwen2.5-VL is trained to answer.

    Each axis has its own scale: both sides are rounded to multiples of 28 (1920 x 1080 becomes 1316 x 728).
    """
    _, rows, columns = grid.flatten().tolist()
    boxes, scale = np.asarray(boxes, float), [14 * columns / size[0], 14 * rows / size[1]]
    return boxes * np.tile(scale, boxes.shape[-1] // 2)


def to_image_space(boxes, size, grid):
    """The way back: `to_image_space(to_model_space(b, size, grid), size, grid)` is b."""
    return boxes / to_model_space(np.ones_like(boxes), size, grid)


class Encoder:
    """Records to prompts and truths to target texts: all that needs the tokenizer or the image processor."""

    def __init__(self, model, tokenizer, image_processor):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.plain = copy.deepcopy(tokenizer)  # for special tokens as text; switching one is not thread-safe
        self.chat = functools.lru_cache(maxsize=1024)(self.chat)
        self.rope_index, self.device = model.model.get_rope_index, model.device
        self.image_token = model.config.image_token_id
        eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.eos = [eos] if isinstance(eos, int) else list(eos)  # Qwen2.5-VL has two

    def prompt(self, index, record, image=None):
        """Read the image and build the chat around it -> Prompt, on the CPU. OSError if the image cannot be
        opened, SystemExit if it has another size than its line in the data says."""
        image = open_image(record["path"]) if image is None else image
        said = record["width"], record["height"]
        if image.size != said:
            raise SystemExit(f"{record['path']} is {image.size}, but its line in the data says {said}")
        grid, width, height, truth, ignore = self.to_model(record)
        question = task_of(record).question.format(target=record["target"])
        ids, positions = self.chat(question + LABELLED * ("labels" in record), height // 14, width // 14)
        pixels = self.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        return Prompt(index, record, ids, positions, pixels, grid, width, height, truth, ignore)

    def to_model(self, record):
        """A record in model space, without opening its image -> (grid, width, height, truth, ignore)."""
        limits, size = self.image_processor.size, (record["width"], record["height"])
        height, width = smart_resize(*size[::-1], 28, limits["shortest_edge"], limits["longest_edge"])
        grid, truth = torch.tensor([[1, height // 14, width // 14]]), record["truth"]
        truth = to_model_space(truth, size, grid) if isinstance(truth, np.ndarray) else truth
        return grid, width, height, truth, to_model_space(record["ignore"], size, grid)

    def chat(self, question, rows, columns):
        """The question about an image of rows x columns patches -> ids (L,), M-RoPE positions (3, L)."""
        before, after = CHAT.split("{question}")
        before = before.replace("<|image_pad|>", "<|image_pad|>" * (rows * columns // 4))  # 2 x 2 patches
        ids = self.tokens(before, special=True) + self.tokens(question) + self.tokens(after, special=True)
        ids, grid = torch.tensor([ids]), torch.tensor([[1, rows, columns]])
        # Without the token types positions would silently be 1-D, and the model blind to where things are.
        positions, _ = self.rope_index(ids, (ids == self.image_token).int(), grid)
        return ids[0], positions[:, 0]

    def tokens(self, text, special=False):
        """Text -> ids. Special tokens are read as such only where asked for: a label may hold any string."""
        tokenizer = self.tokenizer if special else self.plain
        return tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids

    def decode(self, completion):
        """Token ids -> text, less the closing EOS. Other special tokens stay visible and break the format."""
        ids = completion.tolist()
        ids = ids[:-1] if ids[-1] in self.eos else ids
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def look_length(self, completion):
        """How many tokens run up to and including `</look>`; all of them if it never comes."""
        closed = lambda n: "</look>" in self.tokenizer.decode(completion[:n])  # false up to some n, then true
        return min(bisect.bisect_left(range(len(completion) + 1), True, key=closed), len(completion))

    def target(self, index, record):
        """The supervised target (n,): the truth in the task's template, boxes from left to right, and EOS."""
        task, (_, width, height, truth, _) = task_of(record), self.to_model(record)
        answer = truth
        if task.columns:
            order = np.argsort(truth[:, 0], kind="stable")
            answer = truth[order].round().astype(int)
            if task.columns == 4:  # a box thinner than a pixel keeps one, inside the image
                answer[:, :2] = np.minimum(answer[:, :2], [width - 1, height - 1])
                answer[:, 2:] = np.maximum(answer[:, 2:], answer[:, :2] + 1)
            answer = answer.tolist()
            if "labels" in record:
                names = [record["labels"][i] for i in order]
                answer = [{"bbox_2d": box, "label": name} for box, name in zip(answer, names)]
            # Escape "<", which could close a section, and combining accents, which the tokenizer's NFC joins.
            answer = json.dumps(answer, ensure_ascii=False)
            answer = re.sub("[<\u0300-\u036f]", lambda found: f"\\u{ord(found[0]):04x}", answer)
        text = f"<answer>{answer}</answer>"
        if "look" in task.sections:
            look = weak_look(truth, width, height, index).round().astype(int).tolist()
            text = f"<think>{len(truth)} in sight, {len(look)} to look at</think><look>{look}</look>{text}"
        return torch.tensor(self.tokens(text) + self.eos[:1], device=self.device)


def weak_look(truth, width, height, seed):
    """The supervised look at boxes (n, 4) -> (k, 4): a weak label, our reading, since nothing is annotated.

    A region around each cluster of overlapping boxes, left out with probability 1/4; with probability 1/2 one
    more at a random place, each side a quarter to half of the image's; drawn once per image. So the answer
    learns to trust the image and not the look. If it copied boxes from the look, or took a region as proof of
    a crowd, it would invent boxes as soon as GRPO teaches the look to point at doubtful places.
    """
    rng = np.random.default_rng(seed)
    look = crowds(truth)
    look = look[rng.random(len(look)) < 0.75]
    if rng.random() < 0.5:
        size = rng.uniform(0.25, 0.5, 2) * [width, height]
        corner = rng.uniform(0, [width, height] - size)
        look = np.vstack([look, [*corner, *(corner + size)]])
    return look[np.argsort(look[:, 0], kind="stable")]


# ------------------------------------------------------------------------------------------------------------
# Scoring: a prompt and its image are read once, and all its completions follow them in one sequence


@dataclass
class Packed:
    """Groups, one behind the other and without padding: [ prompt | o_1 | .. | o_G | prompt | o_1 | .. ], T
    tokens in all."""

    ids: torch.Tensor  # (T,)
    positions: torch.Tensor  # (3, T); a completion starts one past its prompt's largest, as if it were alone
    sources: torch.Tensor  # (N,) for each token of a completion the place of the one that predicts it
    lengths: list  # for each group [|prompt|, |o_1|, .., |o_G|]


def pack(groups):
    """Lay groups out for one forward -> Packed. A prompt p p p of text with the completions [a b] and [c]
    becomes p p p a b c, at positions 0 1 2 3 4 3, predicted from the places [2 3] and [2]."""
    ids, positions, sources, lengths, at = [], [], [], [], 0
    for group in groups:
        prompt, device = group.prompt, group.prompt.ids.device
        ids += [prompt.ids, *group.completions]
        lengths.append([len(prompt.ids), *map(len, group.completions)])
        positions.append(prompt.positions)
        at += len(prompt.ids)
        last, start = at - 1, prompt.positions.max() + 1
        for n in map(len, group.completions):
            positions.append((start + torch.arange(n, device=device)).expand(3, -1))
            sources += [last, *range(at, at + n - 1)]  # the prompt's last token predicts the first
            at += n
    sources = torch.tensor(sources, dtype=torch.long, device=device)
    return Packed(torch.cat(ids), torch.cat(positions, dim=1), sources, lengths)


# o = softmax(q k^T / sqrt(D') + M) v,   M = 0 where the key's token is not later than the query's, else -inf
def attend(query, key, value):
    """q (1, H, Q, D'), k and v (1, H', K, D') -> (1, Q, H, D'). The queries are those of the last Q of the K
    tokens; heads share keys, H' <= H."""
    Q, K, mask = query.shape[2], key.shape[2], None
    if Q < K:
        mask = torch.ones(Q, K, dtype=torch.bool, device=query.device).tril(K - Q)
        if query.is_cuda:  # CUDA's fused kernels with a mask do not support shared heads
            shared = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    out = scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def tree_attention(module, query, key, value, packed, **options):
    """Causal attention in which completions do not see each other: q (1, H, T, D'), k and v (1, H', T, D'),
    Packed -> (1, T, H, D'), and None for the weights.

    A token of the prompt attends to the prompt, a token of o_i to the prompt and to o_i. Exact, and cheaper
    than a mask over the whole sequence: what siblings would contribute has weight 0 and is not computed, and
    no (T, T) mask exists. transformers calls this in every layer.
    """
    out, flat = [], [n for lengths in packed.lengths for n in lengths]
    parts = zip(*(x.split(flat, dim=2) for x in (query, key, value)))
    for lengths in packed.lengths:
        q, prompt_k, prompt_v = next(parts)
        out.append(attend(q, prompt_k, prompt_v))
        for _ in lengths[1:]:
            q, k, v = next(parts)
            out.append(attend(q, torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)))
    return torch.cat(out, dim=1), None


# log pi(y) = z_y - log sum_v exp z_v,    z = W h / temperature + b
def token_logprobs(hidden, weight, bias, targets, chunk=512):
    """log pi of each target: h (N, D), W (V, D), b (V,), targets (N,) -> (N,) in fp32.

    A chunk of tokens at a time, recomputed in the backward, so that the logits of a whole group
    (8 x 1,024 x 152k in fp32: 5 GB) never exist at once.
    """
    def of_chunk(h, y):
        return -cross_entropy(linear(h, weight, bias).float(), y, reduction="none")

    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(of_chunk, h, y, use_reentrant=False) for h, y in chunks])


class Policy(nn.Module):
    """A Qwen2.5-VL, and what training asks of it: how likely was each token of these groups?

    Its forward is the one that DDP wraps.
    """

    def __init__(self, model, tokenizer, temperature=1.0):
        super().__init__()
        self.model, self.temperature = model, temperature
        AttentionInterface.register("tree", tree_attention)
        model.model.language_model.set_attn_implementation("tree")
        config = model.config
        # A sampled image token would have no image; ids beyond the tokenizer have no text.
        # A bias of -1e4 takes their probability to exactly 0; with -inf a target among them would be NaN.
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
        trained = any(weight.requires_grad for weight in self.model.model.visual.parameters())
        # Gradient checkpointing would run a frozen tower again in the backward, for gradients of its input.
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return list(self.model.get_image_features(pixels, grid).pooler_output)

    def head(self, hidden):
        """Hidden states (N, D) -> h / temperature, W (V, D), b (V,): `linear` makes logits of the three."""
        return hidden / self.temperature, self.model.lm_head.weight, self.forbidden

    def read(self, groups, cache=None):
        """Groups -> (Packed, the hidden state of each of its tokens (T, D)). A `cache` is filled with their
        keys and values."""
        packed, features = pack(groups), torch.cat(self.see([group.prompt for group in groups]))
        embeds = self.model.get_input_embeddings()(packed.ids)
        visual = (packed.ids == self.model.config.image_token_id).nonzero()[:, 0]
        embeds = embeds.index_copy(0, visual, features.to(embeds.dtype))
        hidden = self.model.model.language_model(
            inputs_embeds=embeds[None], position_ids=packed.positions[:, None],
            past_key_values=cache, use_cache=cache is not None,
            attention_mask={"full_attention": packed},  # a dict is passed on to the layers as it is
        ).last_hidden_state[0]
        return packed, hidden

    def forward(self, groups):
        """Groups -> for each the flat (N,) log-probabilities of its tokens."""
        packed, hidden = self.read(groups)
        targets = torch.cat([completion for group in groups for completion in group.completions])
        logp = token_logprobs(*self.head(hidden[packed.sources]), targets)
        return logp.split([group.n_tokens for group in groups])


def unwrap(policy):
    """The Policy inside DDP, or the policy itself."""
    return getattr(policy, "module", policy)


# ------------------------------------------------------------------------------------------------------------
# Rollout: every prompt is read once, its G completions are written side by side


def draw_uniforms(seed, step, index, shape):
    """The random numbers of one prompt at one step: a function of (seed, step, prompt), whatever rank and
    batch the prompt comes up in. (The tokens sampled with them may then differ, but only by rounding.)"""
    return torch.from_numpy(np.random.default_rng([seed, step, index]).random(shape, dtype=np.float32))


# token = min { v : sum_{w <= v} p_w > U },   U uniform in [0, 1)
def inverse_cdf(logprobs, uniform):
    """Sample tokens (B,) of the distributions (B, V) with uniforms (B,); NaN takes the likeliest token.

    The full softmax: no top-k, no top-p, none of the checkpoint's generation defaults, because the sampled
    distribution must be the scored one.
    """
    cdf = logprobs.exp().cumsum(-1)  # up to 1, but for rounding
    sampled = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    return torch.where(uniform.isnan(), logprobs.argmax(-1), sampled)


def prefill(policy, prompts, copies, room):
    """Read every prompt once, and make `copies` rows of each, with `room` empty columns behind them.

    Returns the log-probabilities (B, V) of the first token, B = prompts x copies; the cache, for each layer
    keys and values (B, H', L + room, D'); and visible (B, 1, 1, L + room), the columns that hold a token.
    The cache is padded on the right to the longest prompt, L.
    """
    prefix = DynamicCache()
    packed, hidden = policy.read([Group(prompt, []) for prompt in prompts], prefix)
    lengths = torch.tensor(packed.lengths, device=hidden.device)[:, 0]
    last = hidden[lengths.cumsum(0) - 1]
    logprobs = linear(*policy.head(last)).float().log_softmax(-1)

    def spread(x):  # (1, H', T, D'), prompts end to end -> (B, H', L + room, D')
        by_prompt = [part[0].transpose(0, 1) for part in x.split(lengths.tolist(), dim=2)]
        x = pad_sequence(by_prompt, batch_first=True).transpose(1, 2)
        return pad(x, (0, 0, 0, room)).repeat_interleave(copies, 0)

    cache = [(spread(layer.keys), spread(layer.values)) for layer in prefix.layers]
    visible = torch.arange(lengths.max() + room, device=hidden.device) < lengths[:, None]
    return logprobs.repeat_interleave(copies, 0), cache, visible.repeat_interleave(copies, 0)[:, None, None]


def decode_step(policy, cache):
    """-> a function: one more token per row, token and position (B,) -> log-probabilities (B, V) of the next.

    It writes the token's keys and values to `column` (1,) of the cache and attends to the `visible` columns.
    This is Qwen2.5-VL's decoder, written out, with the model's own layers: every tensor keeps its address,
    as CUDA graphs require, and heads that share keys need no copies of them.
    """
    decoder = policy.model.model.language_model

    def step(token, position, column, visible):
        x = decoder.embed_tokens(token)
        angles = decoder.rotary_emb(x, position[:, None])  # of a text token all three axes agree
        for layer, (keys, values) in zip(decoder.layers, cache):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (project(h).unflatten(1, (-1, 1, attention.head_dim))  # (B, H, 1, D)
                       for project in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = apply_rotary_pos_emb(q, k, *angles)
            keys.index_copy_(2, column, k)
            values.index_copy_(2, column, v)
            q = q.reshape(len(q), keys.shape[1], -1, attention.head_dim)  # (B, H', H / H', D')
            o = scaled_dot_product_attention(q, keys, values, visible)
            x = x + attention.o_proj(o.flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        h, weight, bias = policy.head(decoder.norm(x))
        logits = (weight @ h.T).T + bias  # for few rows, CPUs read a large W faster in this form
        return logits.float().log_softmax(-1)

    return step


@torch.no_grad()
def rollout(policy, encoder, prompts, uniforms):
    """Complete each prompt G times -> a list of Groups.

    `uniforms` (P, G, max_new_tokens) are the random numbers, NaN where the likeliest token is wanted. All
    rows write their t-th token to the same column of the cache. A row that has met EOS writes on; what
    follows its EOS is cut at the end, and such rows are dropped once they make up half of the batch.
    """
    policy.eval()
    torch.cuda.empty_cache()  # gives back the memory of the last rollout's CUDA graphs
    device, (_, G, max_new_tokens) = policy.model.device, uniforms.shape
    uniforms, eos = uniforms.flatten(0, 1).to(device), torch.tensor(encoder.eos, device=device)
    logprobs, cache, visible = prefill(policy, prompts, G, max_new_tokens)
    first = torch.stack([p.positions.max() + 1 for p in prompts]).repeat_interleave(G)  # position of token 0
    column = torch.tensor([visible.shape[-1] - max_new_tokens], device=device)  # behind the prompts
    tokens = torch.zeros(len(first), max_new_tokens, dtype=torch.long, device=device)
    chosen = torch.zeros(len(first), max_new_tokens, device=device)  # log-probabilities of the tokens
    lengths, rows = torch.zeros_like(first), torch.arange(len(first), device=device)
    running = torch.ones_like(rows, dtype=torch.bool)  # which of the rows have no EOS yet
    decode = None  # built in the loop, and anew whenever rows are dropped
    for t in range(max_new_tokens):
        token = inverse_cdf(logprobs, uniforms[rows, t])
        tokens[rows, t], chosen[rows, t] = token, logprobs.gather(1, token[:, None])[:, 0]
        lengths[rows] += running  # EOS is the last token of a completion
        running &= ~torch.isin(token, eos)
        n_running = running.sum().item()  # in most steps the only place where the CPU waits for the GPU
        if n_running == 0 or t + 1 == max_new_tokens:
            break
        if n_running <= len(rows) // 2:
            rows, token, visible, first = (x[running] for x in (rows, token, visible, first))
            cache = [(keys[running], values[running]) for keys, values in cache]
            running, decode = torch.ones_like(rows, dtype=torch.bool), None  # CUDA graphs have fixed shapes
        visible.index_fill_(-1, column, True)
        inputs = token, first + t, column, visible
        if decode is None:
            decode = decode_step(policy, cache)
            decode = captured(decode, *inputs) if device.type == "cuda" else decode  # as a CUDA graph
        logprobs = decode(*inputs)
        column += 1
    groups = []
    by_prompt = (x.unflatten(0, (-1, G)) for x in (tokens, chosen, lengths.cpu()))
    for prompt, ids, logps, ends in zip(prompts, *by_prompt):
        completions = [row[:n] for row, n in zip(ids, ends)]
        logp = torch.cat([row[:n] for row, n in zip(logps, ends)])
        groups.append(Group(prompt, completions, logp, [encoder.decode(o) for o in completions]))
    return groups


# ------------------------------------------------------------------------------------------------------------
# One training step


def forwards(groups, tokens_per_forward):
    """Groups in order, split into forwards of at most so many tokens (a longer one goes alone) -> lists."""
    lists, room = [], 0
    for group in groups:
        length = len(group.prompt.ids) + group.n_tokens
        if not lists or length > room:
            lists.append([])
            room = tokens_per_forward
        lists[-1].append(group)
        room -= length
    return lists


def update(policy, optimizer, groups, cfg, lr, max_grad_norm=1.0):
    """One optimizer step on the groups' mean loss, gradients averaged over the ranks by DDP -> metrics.

    Every rank runs all its backwards, since DDP waits for them, even if its advantages are all 0; gradients
    are averaged in the last one. If a loss or gradient is not finite on any rank, all ranks skip the update.
    """
    policy.train()
    for options in optimizer.param_groups:
        options["lr"] = lr
    total, stats, lists = 0.0, [], forwards(groups, cfg.tokens_per_forward)
    for number, together in enumerate(lists, 1):
        local = isinstance(policy, nn.parallel.DistributedDataParallel) and number < len(lists)
        with policy.no_sync() if local else contextlib.nullcontext():  # around forward and backward both
            loss = 0.0
            for group, logp in zip(together, policy(together)):
                if group.old_logp is None:  # until the first update, pi_old is pi itself
                    group.old_logp = logp.detach()
                terms = logp, group.old_logp, group.ref_logp, group.advantages
                group_loss, group_stats = grpo_loss(*terms, cfg.clip_eps, cfg.beta)
                loss = loss + group.prompt.weight * group_loss / len(groups)
                stats.append(group_stats | {"nll": -logp.mean().item()})
            loss.backward()
        total += loss.item()
    trained = [p for p in policy.parameters() if p.grad is not None]
    norm = torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in trained]).norm()
    nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
    finite = bool(np.isfinite([norm.item(), *over_ranks([total], "SUM")]).all())
    if finite:
        optimizer.step()
    policy.zero_grad(set_to_none=True)
    metrics = {"loss": total, "grad_norm": norm.item(), "lr": lr, "skipped": float(not finite)}
    return metrics | {name: float(np.mean([s[name] for s in stats])) for name in stats[0]}


# One completion, the truth, A = 1 and pi_old = pi: rho = 1, and the gradient of -rho A is that of -log pi
def sft_step(policy, optimizer, encoder, prompts, cfg, lr):
    """One supervised step, which is an update on the truth -> (metrics, groups)."""
    targets = [encoder.target(prompt.index, prompt.record) for prompt in prompts]
    groups = [Group(p, [o], advantages=torch.ones(len(o), device=o.device)) for p, o in zip(prompts, targets)]
    return update(policy, optimizer, groups, cfg, lr), groups


def total_reward(rewards, cfg):
    """(P, G, 3) -> (P, G): w_f format + w_l look + accuracy. The accuracy needs no weight of its own, since
    advantages hardly change when all rewards are scaled."""
    return rewards @ torch.tensor([cfg.format_weight, cfg.look_weight, 1.0], dtype=rewards.dtype)


def token_advantages(encoder, groups, rewards, cfg):
    """Rewards (P, G, 3) -> for each group the flat (N,) advantages of its tokens.

    r_look,i does not depend on completion i's own answer, and the answer is written after the look: its
    tokens cannot have earned it. Up to </look> tokens get the advantage of the whole r, after it that of r
    without the look term, each with its own mean and std. Our reading; `--look_credit completion` is the
    paper's plain sum for every token.
    """
    answer_cfg = cfg if cfg.look_credit == "completion" else replace(cfg, look_weight=0.0)
    whole = group_advantages(total_reward(rewards, cfg)).tolist()
    after_look = group_advantages(total_reward(rewards, answer_cfg)).tolist()
    flat = []
    for group, early, late in zip(groups, whole, after_look):
        parts = []
        for completion, a, b in zip(group.completions, early, late):
            parts.append(torch.full(completion.shape, b, device=completion.device))
            if a != b:
                parts[-1][: encoder.look_length(completion)] = a
        flat.append(torch.cat(parts))
    return flat


def grpo_step(policy, reference, optimizer, encoder, prompts, cfg, step, lr):
    """Sample a group for each prompt, reward it, and update the policy -> (metrics, groups)."""
    started = time.perf_counter()
    if cfg.freeze_vision:
        features = unwrap(policy).see(prompts)  # one pass of the vision tower for all that follows
        prompts = [replace(prompt, features=seen) for prompt, seen in zip(prompts, features)]
    shape = (cfg.group_size, cfg.max_new_tokens)
    uniforms = torch.stack([draw_uniforms(cfg.seed, step, prompt.index, shape) for prompt in prompts])
    groups = rollout(unwrap(policy), encoder, prompts, uniforms)
    rolled_out = time.perf_counter()

    rewards = torch.stack([group_rewards(group, cfg.recall_weight) for group in groups])  # (P, G, 3)
    for group, advantages in zip(groups, token_advantages(encoder, groups, rewards, cfg)):
        group.advantages = advantages
    if reference is not None:
        for together in forwards(groups, cfg.tokens_per_forward):
            with torch.no_grad():
                for group, logp in zip(together, reference(together)):
                    group.ref_logp = logp
    updates = [update(policy, optimizer, groups, cfg, lr) for _ in range(cfg.num_iterations)]
    metrics = updates[-1] | {"skipped": max(metrics["skipped"] for metrics in updates)}

    seconds, n_tokens = time.perf_counter() - started, sum(group.n_tokens for group in groups)
    metrics |= describe(groups, rewards, encoder, cfg) | {
        "seconds_rollout": rolled_out - started, "tokens_per_second": n_tokens / seconds}
    return metrics, groups


# ------------------------------------------------------------------------------------------------------------
# The method ends here. What it stands on: a loaded model, an optimizer for bf16, a fast decode step


def device_of(cfg):
    """Where the model lives: on the current GPU, if there is one. The demo stays on the CPU, where a seed
    repeats a run bit for bit."""
    return "cuda" if torch.cuda.is_available() and not cfg.demo else "cpu"


def setup(cfg):
    """Load `--model`, a name or a folder, to this process's device -> (policy, encoder). SystemExit gives the
    reason if it cannot be loaded, or not completely: a weight that is not in the file would be random."""
    device = device_of(cfg)
    try:
        kind = AutoConfig.from_pretrained(cfg.model).model_type
        if kind != "qwen2_5_vl":
            raise ValueError(f"it is a {kind}, not a qwen2_5_vl")
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            cfg.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights, the first is {missing[0]}")
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        if tokenizer.convert_tokens_to_ids("<|image_pad|>") != model.config.image_token_id:
            raise ValueError("its tokenizer is missing, or belongs to another model")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(cfg.model)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"cannot load --model {cfg.model}: {' '.join(str(error).split())[:300]}") from None
    image_processor.size["longest_edge"] = cfg.max_pixels  # "edges", in Qwen's config, are areas
    model.model.visual.requires_grad_(not cfg.freeze_vision)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return Policy(model.to(device), tokenizer, cfg.temperature), Encoder(model, tokenizer, image_processor)


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 copies of the weights (of fp32 weights, in one process, the "copy" is the weight itself).

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
    """AdamW, its 12 bytes per weight (fp32 copy, two moments) shared out over the ranks."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    options = dict(lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if rank_and_world()[1] == 1:  # torchrun or not, so that either can resume the other's checkpoint
        return MasterAdamW(trained, **options)
    return ZeroRedundancyOptimizer(  # with bucket views, broadcasts are few and large
        trained, MasterAdamW, parameters_as_bucket_view=True, **options)


def learning_rate(step, steps, peak, warmup):
    """Linear up to `peak` over the warm-up, then linear down to 0 at `steps`."""
    return peak * min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1), 1.0)


capture_stream = functools.cache(lambda: torch.cuda.Stream())  # one for all: each keeps a cuBLAS workspace


def captured(step, *inputs):
    """A decode step as a CUDA graph: recorded once, then replayed with new inputs copied to the old places.

    A step is a thousand small kernels, and Python takes longer to launch them than the GPU to run them; a
    replay launches all at once. It is exact: the same kernels on the same memory. If something in the model
    cannot be recorded, the step runs as it is, with a warning.
    """
    places = [value.clone() for value in inputs]
    try:
        graph, stream = torch.cuda.CUDAGraph(), capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(*places)  # libraries set themselves up on first use, which must not be recorded
            graph.capture_begin(capture_error_mode="thread_local")  # other threads, such as NCCL's, go on
            try:
                logprobs = step(*places)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
    except RuntimeError as error:
        warnings.warn(f"the decode step is not captured as a CUDA graph, and slower: {error}", stacklevel=2)
        return step

    def replay(*inputs):
        for place, value in zip(places, inputs):
            place.copy_(value)
        graph.replay()
        return logprobs

    return replay


# ------------------------------------------------------------------------------------------------------------
# Processes, and who reads which part of the data


def rank_and_world():
    """(this process, how many there are); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print0(*args):
    """Print once, on rank 0."""
    if rank_and_world()[0] == 0:
        print(*args, flush=True)


def over_ranks(values, reduction="SUM"):
    """Numbers, reduced over the ranks (SUM, MIN, MAX) -> list of floats; the ranks wait for each other."""
    values = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values, getattr(dist.ReduceOp, reduction))
    return values.tolist()


def barrier():
    """Wait for the other ranks, if there are any."""
    over_ranks([0])


def join_processes(cfg):
    """Take a GPU, if there are any, and meet the other processes, if torchrun started this one."""
    if device_of(cfg) == "cuda":
        mine, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if mine >= gpus:
            raise SystemExit(f"there is no GPU for process {mine + 1}: torchrun --nproc_per_node {gpus}")
        torch.cuda.set_device(mine)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and most of ours are new
    if "RANK" in os.environ and not dist.is_initialized():
        patience = timedelta(minutes=30)  # if a rank never arrives, stop
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # This store outlives a restart, addresses of dead ranks in it: each start has a part of its own.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "nccl" if device_of(cfg) == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def as_record(line, method):
    """A line of the data, checked -> a record, with its truth in `truth`. ValueError says what is wrong."""
    def text(value):
        if not isinstance(value, str):
            raise ValueError(f"a text is expected, not {value!r:.40}")
        value.encode()  # ValueError for half a surrogate pair, which no tokenizer can write
        return nfc(value)

    record = {"target": "person", "task": "detection", "method": method, "ignore": [], **line}
    size, task = (record["width"], record["height"]), TASKS.get((record["method"], record["task"]))
    if task is None:
        raise ValueError(f"the task {record['task']!r} does not go with --method {record['method']}")
    if not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"width and height are {size}, not positive whole numbers")
    check_size(size)
    for name, columns in (("boxes", 4), ("ignore", 4), ("points", 2)):
        if name in record:
            record[name] = check_rows(name, record[name], columns, *size)
    for name, rows in (("labels", "boxes"), ("ignore_labels", "ignore")) if "labels" in record else ():
        record[name] = [text(label) for label in record.get(name, [])]
        if len(record[name]) != len(record[rows]):
            raise ValueError(f"{len(record[name])} {name} for {len(record[rows])} {rows}")
    record |= {name: text(record[name]) for name in ("target", "transcript") if name in record}
    if "count" in record:  # points are None where their number is known and their places are not
        check_count(record["count"], record.setdefault("points"))
    if record["task"] == "grounding" and len(record["boxes"]) != 1:
        raise ValueError("a phrase means one box")
    if "labels" in record and task.columns != 4:
        raise ValueError(f"labels are of boxes, which the task {record['task']!r} does not ask for")
    return record | {"truth": record[task.truth]}


def load_records(path, method="dip-r1"):
    """Read a JSONL that data_prep.py wrote -> records, and say where each image lies (`path`). SystemExit
    names the file, the line and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise SystemExit(
            f"{path} is not there. Make it from CrowdHuman,\n"
            f"    python data_prep.py crowdhuman ROOT --split train (or val) --out {path}\n"
            f"or draw scenes,\n    python data_prep.py synthetic --out data/synthetic\n"
            f"or see the whole method at work without any data,\n    python dipr1.py --demo")
    located = lambda line: {"path": str(path.parent / line["image"])}
    records = read_jsonl(path, lambda line: as_record(line, method) | located(line))
    if not records:
        raise SystemExit(f"{path} holds no image")
    return records


def batch_indices(n, batch, seed, step):
    """Which of n records step `step` takes: a fresh shuffle per epoch, a function of (seed, step) alone."""
    order = functools.cache(lambda epoch: np.random.default_rng([seed, epoch]).permutation(n))
    return [int(order(k // n)[k % n]) for k in range(step * batch, (step + 1) * batch)]


def read_ahead(encoder, records, plan, tolerated=0.01):
    """Yield the prompts of each list of indices in `plan`, while the images of the next list are read. An
    image that no longer opens is replaced by a grey one of weight 0; SystemExit if this process has lost more
    than the share `tolerated`."""
    lost, plan = set(), iter(plan)

    def read(index):
        record = records[index]
        try:
            return encoder.prompt(index, record)
        except OSError as error:
            lost.add(index)
            about = f"{record['path']}: no longer readable ({error}); {len(lost)} lost so far"
            if len(lost) > tolerated * len(records):
                raise SystemExit(f"{about}: more than {tolerated:.0%} of the images") from None
            tqdm.write(about, file=sys.stderr)
            grey = Image.new("RGB", (record["width"], record["height"]), (128, 128, 128))
            return replace(encoder.prompt(index, record, grey), weight=0.0)

    with ThreadPoolExecutor(1) as reader:  # it prepares on the CPU; only the main thread uses the GPU
        upcoming = reader.map(read, next(plan, []))
        while prompts := list(upcoming):
            upcoming = reader.map(read, next(plan, []))
            yield [prompt.to(encoder.device) for prompt in prompts]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, log, pictures. The run is crash-only: an error that a restart repairs ends it with one line


def identity(cfg):
    """What makes a run: its settings, the number of processes, the content of --data (not of the images)."""
    content = hashlib.sha256(Path(cfg.data).read_bytes()).hexdigest()
    return asdict(cfg) | {"processes": rank_and_world()[1], "data_sha256": content}


def save_checkpoint(policy, encoder, optimizer, step, cfg):
    """Write `checkpoint-<step>` (SFT's and GRPO's steps counted together) as a .tmp folder, then rename it.

    It is a Hugging Face folder for `from_pretrained`, with every rank's optimizer shard, the step, the run's
    identity and the size of each file, by which a copy that was cut short is recognised. There is no
    generator state to keep: all randomness, the order of the data too, is a function of (seed, step, prompt).
    """
    rank, final = rank_and_world()[0], Path(cfg.output_dir) / f"checkpoint-{step:06d}"
    beside, local = final.with_name(final.name + ".tmp"), getattr(optimizer, "optim", optimizer)  # the shard
    try:
        if rank == 0:
            for cut_short in final.parent.glob("checkpoint-??????.tmp"):
                shutil.rmtree(cut_short)
            for part in (unwrap(policy).model, encoder.tokenizer, encoder.image_processor):
                part.save_pretrained(beside)
        barrier()
        shard = {"adamw": local.state_dict(), "masters": local.masters}
        torch.save(shard, beside / f"optimizer-{rank}.pt")
        barrier()
        if rank == 0:
            sizes = {path.name: path.stat().st_size for path in beside.iterdir()}
            state = {"step": step, "run": identity(cfg), "files": sizes}
            (beside / "dipr1.json").write_text(json.dumps(state, indent=2))
            for path in beside.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())  # on the disk before the name promises it
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
            for old in sorted(final.parent.glob("checkpoint-??????"))[: -cfg.keep if cfg.keep else 0]:
                if old.name not in (final.name, f"checkpoint-{cfg.sft_steps:06d}"):  # GRPO's reference model
                    shutil.rmtree(old)
    except torch.OutOfMemoryError:
        raise  # `main` reports it: no disk is full
    except (OSError, SafetensorError, RuntimeError) as error:  # the last: torch.save, of a full disk
        raise SystemExit(f"{final} could not be written: {error}. If the disk is full, make room; "
                         "then --resume") from None
    barrier()


MAY_CHANGE = {  # between a run and its --resume: what does not change the result, and what saves memory
    "resume", "output_dir", "save_every", "keep", "picture_every", "samples", "gradient_checkpointing",
    "tokens_per_forward", "max_new_tokens", "max_pixels"}


def complete(folder):
    """What dipr1.json says of a checkpoint, or None if it or any file beside it is missing or cut short."""
    try:
        state = json.loads((folder / "dipr1.json").read_text())
        whole = all((folder / name).stat().st_size == size for name, size in state["files"].items())
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None
    return state if whole else None


def find_checkpoint(cfg):
    """The newest complete checkpoint of `--output_dir` -> (folder, step); (None, 0) where there is none.
    SystemExit if the run would not be the same: another setting, another number of processes, other data."""
    for folder in sorted(Path(cfg.output_dir).glob("checkpoint-??????"), reverse=True):
        state = complete(folder)
        if state is None:
            print0(f"warning: {folder} is not complete; trying the one before it")
            continue
        before, now = state["run"], identity(cfg)
        for name in sorted((before.keys() | now.keys()) - MAY_CHANGE):
            if before.get(name) != now.get(name):
                was = f"its {name} was {before.get(name)!r} and is {now.get(name)!r} now"
                raise SystemExit(f"--resume {folder}: {was}")
        return folder, state["step"]
    return None, 0


def restore(optimizer, folder):
    """Put this rank's shard of a checkpoint's optimizer back."""
    local = getattr(optimizer, "optim", optimizer)
    device = local.masters[0].device
    saved = torch.load(folder / f"optimizer-{rank_and_world()[0]}.pt", map_location=device, weights_only=True)
    local.load_state_dict(saved["adamw"])
    for master, value in zip(local.masters, saved["masters"]):
        master.copy_(value)


@contextlib.contextmanager
def noting_signals():
    """SIGTERM and Ctrl-C are noted in a list until the step is done. A second Ctrl-C stops at once;
    a second SIGTERM does not, since scheduler and torchrun may both send one."""
    received = []

    def note(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(groups, rewards, encoder, cfg):
    """What a step's rollouts look like: the metrics that need no gradient. The README defines each."""
    completions = [o for group in groups for o in group.completions]
    n_rows = lambda answer: len(answer) if isinstance(answer, np.ndarray) else 0  # neither text nor None
    total, parts = total_reward(rewards, cfg), rewards.mean(dim=(0, 1)).tolist()
    gaps = [(group.old_logp - group.rollout_logp).abs() for group in groups]
    return {
        "reward": total.mean().item(),
        "reward_format": parts[0], "reward_look": parts[1], "reward_accuracy": parts[2],
        "reward_std": total.std(dim=1).mean().item(),
        "frac_zero_std": (total == total[:, :1]).all(dim=1).double().mean().item(),
        "sampler_gap": torch.cat(gaps).mean().item(),
        "completion_length": float(np.mean([len(o) for o in completions])),
        "truncated": float(np.mean([o[-1].item() not in encoder.eos for o in completions])),
        "boxes": float(np.mean([n_rows(r.answer) for group in groups for r in group.responses])),
        "truth_boxes": float(np.mean([n_rows(group.prompt.truth) for group in groups])),
        "lost_images": float(sum(group.prompt.weight == 0 for group in groups)),
    }


class Log:
    """metrics.jsonl and the figures on the progress bar; rank 0 writes."""

    def __init__(self, folder, steps_done=0):
        self.path, self.file, self.skipped = Path(folder) / "metrics.jsonl", None, 0
        if rank_and_world()[0] == 0:
            lines = self.path.read_text().splitlines(keepends=True) if steps_done else []
            with written_whole(self.path) as file:
                file.writelines(lines[:steps_done])  # steps after the checkpoint come again
            self.file = open(self.path, "a")

    def write(self, phase, step, metrics, bar):
        """Average a step's metrics over the ranks (all of them must call) and write them down."""
        totals, world = over_ranks(list(metrics.values())), rank_and_world()[1]
        metrics = {name: total / world for name, total in zip(metrics, totals)}
        line = {name: value if np.isfinite(value) else None for name, value in metrics.items()}
        try:
            if self.file:
                print(json.dumps({"phase": phase, "step": step, **line}), file=self.file, flush=True)
        except OSError as error:
            raise SystemExit(f"{self.path}: {error}. Make room, then --resume") from None
        shown = {"nll", "reward", "reward_format", "reward_look", "reward_accuracy", "kl", "boxes"}
        bar.set_postfix({n.removeprefix("reward_"): f"{v:.3g}" for n, v in metrics.items() if n in shown})
        self.skipped = self.skipped + 1 if metrics["skipped"] else 0
        if self.skipped == 10:
            seen = f"(loss {metrics['loss']}, gradient norm {metrics['grad_norm']}); lower the learning rate"
            raise SystemExit(f"{phase} step {step}: ten updates in a row not finite {seen}")


def draw_picture(group, path, height=448):
    """PNG of a group: its first completion on the image (truth thin white, answer orange, look green) and the
    map of where the group's answers disagree, which is what the look is paid to find."""
    prompt, first, scale = group.prompt, group.responses[0], height / group.prompt.height
    size = (round(prompt.width * scale), height)
    image = open_image(prompt.record["path"]).resize(size)
    answers = [r.answer for r in group.responses if np.ndim(r.answer) == 2 and r.answer.shape[1] == 4]
    unsure = disagreement([coverage(boxes, prompt.width, prompt.height) for boxes in answers or [None]])
    heat = Image.fromarray((190 * unsure).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    dimmed = image.convert("L").convert("RGB").point([value // 2 for value in range(256)] * 3)
    doubt = Image.composite(Image.new("RGB", size, (255, 120, 0)), dimmed, heat)
    scaled = lambda rows: rows * scale if isinstance(rows, np.ndarray) else ()  # neither text nor None
    draw_rows(image, scaled(first.answer), (255, 140, 0), 4)
    draw_rows(image, scaled(prompt.truth), (255, 255, 255), 1)
    said = repr(first.answer) if isinstance(first.answer, str) else "truth white, answer orange, look green"
    captions = f"{prompt.record['target']}: {said}", f"where {len(group.responses)} answers disagree"
    sheet = Image.new("RGB", (2 * size[0] + 8, height + 24), (24, 24, 24))
    for x, side, caption in zip((0, size[0] + 8), (image, doubt), captions):
        draw_rows(side, scaled(first.look), (60, 220, 60), 2)
        sheet.paste(side, (x, 24))
        ImageDraw.Draw(sheet).text((x + 6, 6), caption.encode("ascii", "replace").decode(), (230, 230, 230))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------------
# Evaluation: what a detection researcher would ask, in pixels of the original image

EVALUATION = 2**31  # the "step" in the seed of an evaluation: training never draws these numbers


# JI = k / (m + n - k),   k pairs of m predictions and n truths
def image_counts(pred, truth, ignore, *_):
    """One image, matched at IoU 0.5 -> [pairs, predictions, truths, crowded truths, those found, JI].

    JI is CrowdHuman's Jaccard index, as its toolkit computes it: pairs have an IoU above 0.5; unmatched boxes
    of either side that lie more than half in an ignore region do not count; NaN where no box counts.
    """
    pred_idx, truth_idx, _ = match_boxes(pred, truth)
    crowded = (box_iou(truth, truth) - np.eye(len(truth)) > 0.2).any(axis=1)  # overlaps another truth
    n_pred = len(pred) - count_ignored(pred, pred_idx, ignore)
    above, truth_above, _ = match_boxes(pred, truth, np.nextafter(0.5, 1))
    k, m = len(above), len(pred) - count_ignored(pred, above, ignore)
    n = len(truth) - count_ignored(truth, truth_above, ignore)
    jaccard = k / (m + n - k) if m + n else np.nan
    return [len(pred_idx), n_pred, len(truth), crowded.sum(), crowded[truth_idx].sum(), jaccard]


# AP = mean over recalls r in {0, .01, .., 1} of  max { precision at k : recall at k >= r }
def average_precision(images, iou_threshold):
    """COCO's 101-point average precision of `compared` images, in [0, 1]: the mean over the classes that have
    truth. Where there are no labels, everything is one class.

    Each of an image's first 100 predictions of a class takes the free truth that it overlaps most. One that
    finds none is a miss, unless a share of it as large as the threshold lies in an ignore region. A language
    model gives no confidences: all are equal, and COCO breaks the tie by order - images as they come, boxes
    as they are written. So this AP depends on the order of the answer.
    """
    hits, n_truth, by_class = defaultdict(list), Counter(), []
    for pred, truth, ignore, labels, record in images:
        n_truth.update(record.get("labels", [None] * len(truth)))
        overlaps, ignored = box_iou(pred, truth), box_iou(pred, ignore, of_first=True)
        written = Counter()
        for label, overlap, shares in zip(labels, overlaps, ignored):
            written[label] += 1
            if written[label] > 100:
                continue
            if overlap.max(initial=0) >= iou_threshold - 1e-9:  # so that rounding does not decide
                overlaps[:, overlap.argmax()] = 0  # this truth is taken
                hits[label].append(1)
            elif shares.max(initial=0) < iou_threshold:
                hits[label].append(0)
    for label, n in n_truth.items():
        tp = np.cumsum(hits[label])
        precision = tp / np.arange(1, len(tp) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or any higher one
        at = np.searchsorted(tp / n, np.linspace(0, 1, 101), side="left")
        by_class.append(np.append(best, 0.0)[at].mean())
    return np.mean(by_class or [0.0])


def detection_figures(images):
    """`compared` images -> dict of figures; the README defines each. A share of nothing is 0."""
    counts = np.array([image_counts(*image) for image in images], float)
    tp, n_pred, n_truth, n_crowded, n_found = counts[:, :5].sum(axis=0)
    jaccard = counts[~np.isnan(counts[:, 5]), 5]
    aps = [average_precision(images, iou) for iou in np.linspace(0.5, 0.95, 10)]
    return {
        "precision": tp / max(n_pred, 1), "recall": tp / max(n_truth, 1),
        "f1": 2 * tp / max(n_pred + n_truth, 1), "jaccard": jaccard.sum() / max(len(jaccard), 1),
        "ap": np.mean(aps), "ap50": aps[0], "ap70": aps[4], "crowded_recall": n_found / max(n_crowded, 1),
        "count_mae": np.abs(counts[:, 1] - counts[:, 2]).mean(),
        "boxes_per_image": np.mean([len(pred) for pred, *_ in images]),
        "truth_boxes_per_image": n_truth / len(images),
    }


def grounding_figures(images):
    """`compared` images -> the share of images whose one box reaches an IoU, and the mean IoU."""
    ious = np.array([grounding_reward(pred, truth) for pred, truth, *_ in images])
    return {f"acc_{iou:g}": (ious >= iou).mean() for iou in (0.5, 0.75, 0.95)} | {"mean_iou": ious.mean()}


def counting_figures(images):
    """`compared` images, whose truth may be only a count -> figures of the number of points."""
    true = [record["count"] if truth is None else len(truth) for _, truth, *_, record in images]
    off = np.abs([len(pred) - n for (pred, *_), n in zip(images, true)])
    return {"exact_count": (off == 0).mean(), "count_mae": off.mean()}


def ocr_figures(images):
    """`compared` pages -> edit distance over the longer length, and F1 of words as bags of words."""
    words = [(Counter(pred.split()), Counter(truth.split())) for pred, truth, *_ in images]
    common, total = sum((a & b).total() for a, b in words), sum((a + b).total() for a, b in words)
    distance = [1 - ocr_reward(pred, truth) for pred, truth, *_ in images]
    return {"edit_distance": np.mean(distance), "word_f1": 2 * common / max(total, 1)}


def compared(record, prediction):
    """An entry of predictions.jsonl beside its record -> (pred, truth, ignore, labels of pred, record)."""
    task = task_of(record)
    sides = prediction[task.truth], record["truth"], record["ignore"]
    labels = prediction.get("labels") if "labels" in record else None
    labels = labels or [None] * len(sides[0])
    if task.columns == 4:
        sides = against_truth(*sides, labels, record, record["width"], record["height"])
    return *sides, labels, record


def evaluate_predictions(records, predictions):
    """Predictions, one per record, as predictions.jsonl holds them -> dict of figures.

    All need their task's answer ("boxes", "points" or "transcript"). "rewards" and "samples", where they are
    known, give the mean rewards of the greedy answers and of those sampled at temperature T.
    """
    pairs, figures, tasks = list(zip(records, predictions)), {}, sorted({r["task"] for r in records})
    samples = [(record, sample) for record, p in pairs for sample in p.get("samples", [])]
    for task in tasks:
        images = [compared(*pair) for pair in pairs if pair[0]["task"] == task]
        prefix = f"{task} " if len(tasks) > 1 else ""
        figures |= {prefix + n: value for n, value in task_of(images[0][-1]).figures(images).items()}
    if samples and tasks == ["detection"]:
        tp, n_pred, n_truth, *_ = np.sum([image_counts(*compared(*sample)) for sample in samples], axis=0)
        figures["sampled_f1"] = 2 * tp / max(n_pred + n_truth, 1)
    for prefix, entries in (("", predictions), ("sampled_", [sample for _, sample in samples])):
        if entries and all("rewards" in entry for entry in entries):
            form, look, accuracy = np.array([entry["rewards"] for entry in entries], float).T
            means = {"format_rate": (form > 0).mean(), "accuracy_reward": accuracy.mean()}
            if samples and all("look" in task_of(record).sections for record in records):
                means["look_reward"] = look.mean()
            figures |= {prefix + name: value for name, value in means.items()}
    return {name: float(value) for name, value in figures.items() if value == value}  # NaN: not defined here


def as_prediction(response, text, rewards, prompt):
    """A completion as predictions.jsonl keeps it, boxes and points in pixels of the original image. An answer
    that does not parse is empty."""
    record, task, answer = prompt.record, task_of(prompt.record), response.answer
    if task.columns and answer is not None:
        inside = answer.clip(0, [prompt.width, prompt.height] * (task.columns // 2))
        answer = to_image_space(inside, (record["width"], record["height"]), prompt.grid).round(2).tolist()
    rewards = [None if r != r else r for r in rewards]  # JSON has no NaN
    entry = {"text": text, "rewards": rewards, task.truth: answer or unanswered(record)[task.truth]}
    return entry | ({"labels": response.labels or []} if "labels" in record else {})


def unanswered(record):
    """The prediction of an image that was not answered."""
    about = {name: record[name] for name in ("image", "target", "task")}
    return about | {task_of(record).truth: [] if task_of(record).columns else "", "rewards": [0.0] * 3}


def predict(policy, encoder, prompts, cfg):
    """Answer images once greedily, as the model would be used, and `--samples` times at temperature T, as it
    is trained. Yields (prediction, the group of all answers, the greedy one first).

    The greedy look is rewarded against the disagreement of the sampled answers: alone it has no siblings.
    """
    shape = (1 + cfg.samples, cfg.max_new_tokens)
    uniforms = torch.stack([draw_uniforms(cfg.seed, EVALUATION, p.index, shape) for p in prompts])
    uniforms[:, 0] = float("nan")
    for group in rollout(policy, encoder, prompts, uniforms):
        rewards = group_rewards(group, cfg.recall_weight).tolist()
        siblings = Group(group.prompt, [], texts=group.texts[1:])  # samples are rewarded as in training
        rewards[1:] = group_rewards(siblings, cfg.recall_weight).tolist()
        answers = zip(group.responses, group.texts, rewards)
        first, *rest = [as_prediction(*answer, group.prompt) for answer in answers]
        yield unanswered(group.prompt.record) | first | {"samples": rest}, group


def evaluate(policy, encoder, records, cfg, folder, pictures=8):
    """Answer held-out images, shared out over the ranks; write predictions.jsonl and the first pictures to
    `folder` -> dict of figures. An image that cannot be opened counts as unanswered."""
    (rank, world), predictions = rank_and_world(), {}
    mine, batch = range(rank, len(records), world), max(cfg.prompts_per_step // world, 1)
    plan = [mine[start : start + batch] for start in range(0, len(mine), batch)]
    bar = tqdm(read_ahead(encoder, records, plan, tolerated=1), "evaluating", len(plan), disable=rank > 0)
    for prompts in bar:
        seen = [prompt for prompt in prompts if prompt.weight]
        for prediction, group in predict(policy, encoder, seen, cfg) if seen else ():
            predictions[group.prompt.index] = prediction
            if group.prompt.index < pictures:
                draw_picture(group, Path(folder) / "pictures" / f"{group.prompt.index:06d}.png")
    by_rank = [predictions] * world
    if dist.is_initialized():
        dist.all_gather_object(by_rank, predictions)
    predictions = [by_rank[k % world].get(k) or unanswered(record) for k, record in enumerate(records)]
    if rank == 0:
        with written_whole(Path(folder) / "predictions.jsonl") as file:
            file.writelines(json.dumps(prediction) + "\n" for prediction in predictions)
    return evaluate_predictions(records, predictions)


def load_predictions(path, records):
    """predictions.jsonl, ours or another tool's (`image` and `boxes` suffice), in the order of the records.
    A record that has no prediction counts as unanswered, with a warning."""
    questions, predictions = {}, {}
    for number, record in enumerate(records):
        questions.setdefault(nfc(record["image"]), []).append(number)

    def check(entry):
        entry = json.loads(nfc(json.dumps(entry, ensure_ascii=False)))  # all of its texts
        asked = [k for k in questions.get(entry["image"], [])
                 if all(entry.get(name, records[k][name]) == records[k][name] for name in ("target", "task"))]
        free = [k for k in asked if k not in predictions]
        if not free:
            raise ValueError(f"{entry['image']} " + ("comes too often" if asked else "is not in the data"))
        if len({(records[k]["target"], records[k]["task"]) for k in asked}) > 1:
            raise ValueError(f"{entry['image']} is asked several questions: name target and task")
        task = task_of(records[free[0]])
        for answer in (entry, *entry.get("samples", [])):
            np.array(answer.get("rewards", [0, 0, 0]), float).reshape(3)  # ValueError unless they are three
            if not task.columns:
                answer[task.truth] = str(answer[task.truth])
                continue
            rows = answer[task.truth] = check_rows(task.truth, answer[task.truth], task.columns)
            good = [name is None or isinstance(name, str) for name in answer.get("labels", [])]
            if "labels" in records[free[0]] and not sum(good) == len(good) == len(rows):
                raise ValueError(f"{sum(good)} labels (texts) for {len(rows)} {task.truth}")
        predictions[free[0]] = entry

    read_jsonl(path, check)
    if missing := len(records) - len(predictions):
        print0(f"{path}: no prediction for {missing} of {len(records)} questions: they count as unanswered")
    return [predictions.get(number) or unanswered(record) for number, record in enumerate(records)]


def report(path, columns, about):
    """Print {name: figures} side by side, and write `about` as JSON."""
    print0(f"\n{'images evaluated':<32}" + "".join(f"{name:>15}" for name in columns))
    for figure in next(iter(columns.values())):
        print0(f"{figure:<32}" + "".join(f"{values[figure]:>15.3f}" for values in columns.values()))
    if rank_and_world()[0] == 0:
        with written_whole(path) as file:
            json.dump(about, file, indent=2)


def run_evaluation(cfg):
    """`--eval`, or `--predictions FILE` of any tool: print the table and write eval.json."""
    records, source = load_records(cfg.data, cfg.method), cfg.predictions or cfg.model
    if cfg.predictions:
        figures = evaluate_predictions(records, load_predictions(cfg.predictions, records))
    else:
        figures = evaluate(*setup(cfg), records, cfg, cfg.output_dir)
    about = {"source": source, "data": cfg.data, "images": len(records), **figures}
    report(Path(cfg.output_dir) / "eval.json", {Path(source).name: figures}, about)


# ------------------------------------------------------------------------------------------------------------
# Main: train, evaluate, or the demo


def parallel(policy):
    """With several processes, the policy in DDP: its backward averages the gradients over the ranks."""
    if rank_and_world()[1] == 1:  # DDP's copy of the gradients would not fit one GPU
        return policy
    options = dict(forward_sync_buffers=False, gradient_as_bucket_view=True)  # no buffer ever changes
    return nn.parallel.DistributedDataParallel(policy, **options)


def train_phase(phase, policy, encoder, records, cfg, log, done, received):
    """SFT or GRPO. `first` steps come before this phase; of all steps, `done` are done already."""
    first, steps, batch, peak = {
        "sft": (0, cfg.sft_steps, cfg.sft_batch, cfg.sft_lr),
        "grpo": (cfg.sft_steps, cfg.steps, cfg.prompts_per_step, cfg.lr)}[phase]
    folder, reference = Path(cfg.output_dir), None
    if phase == "grpo" and cfg.beta:  # the policy that GRPO starts from, frozen
        before = folder / f"checkpoint-{first:06d}" if first else cfg.model
        reference = setup(replace(cfg, model=str(before)))[0].eval().requires_grad_(False)
    gc.collect()  # the optimizer of SFT, 12 bytes per weight, is part of a reference cycle
    optimizer = make_optimizer(policy)
    if done > first:
        restore(optimizer, folder / f"checkpoint-{done:06d}")
    start, (rank, world) = done - first, rank_and_world()
    plan = (batch_indices(len(records), batch, cfg.seed, k)[rank::world] for k in range(start, steps))
    bar = tqdm(read_ahead(encoder, records, plan), phase, steps, initial=start, disable=rank > 0)
    ended = time.perf_counter()
    for step, prompts in enumerate(bar, start):
        lr = learning_rate(step, steps, peak, cfg.warmup_steps)
        if phase == "sft":
            metrics, groups = sft_step(policy, optimizer, encoder, prompts, cfg, lr)
        else:
            metrics, groups = grpo_step(policy, reference, optimizer, encoder, prompts, cfg, step, lr)
        began, ended = ended, time.perf_counter()  # waiting for data, checkpoints and pictures count, too
        log.write(phase, step, metrics | {"seconds": ended - began}, bar)
        pictured = phase == "grpo" and cfg.picture_every and (step + 1) % cfg.picture_every == 0
        if pictured and rank == 0 and groups[0].prompt.weight:  # there is nothing to draw of a lost image
            draw_picture(groups[0], folder / "pictures" / f"step-{step + 1:06d}.png")
        asked = int(over_ranks([max(received, default=0)], "MAX")[0])  # to stop, on any rank
        if asked or step + 1 == steps or cfg.save_every and (step + 1) % cfg.save_every == 0:
            save_checkpoint(policy, encoder, optimizer, first + step + 1, cfg)
        if asked:
            print0(f"\nstopped by {signal.Signals(asked).name}; go on with --resume")
            raise SystemExit(128 + asked)


def refuse_second_run(cfg):
    """SystemExit if `--output_dir` holds the steps of a run that is not to be resumed."""
    metrics = Path(cfg.output_dir) / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size and not cfg.resume:
        raise SystemExit(f"{cfg.output_dir} holds a run already: --resume it, or choose another --output_dir")


def check_training(cfg, records):
    """SystemExit, before anything is loaded or written, if this run cannot do what it is asked to."""
    for name, steps in ("sft_batch", cfg.sft_steps), ("prompts_per_step", cfg.steps):
        if steps and getattr(cfg, name) % rank_and_world()[1]:
            raise SystemExit(f"--{name} {getattr(cfg, name)} cannot be shared out evenly over the processes")
    if cfg.steps + cfg.sft_steps == 0:
        raise SystemExit("--steps 0 and --sft_steps 0 train nothing: ask for some of either")
    refuse_second_run(cfg)
    missing = [record["path"] for record in records if not os.path.isfile(record["path"])]
    if len(missing) > 0.01 * len(records):
        raise SystemExit(f"{cfg.data}: {len(missing)} of {len(records)} images are not there, the first is "
                         f"{missing[0]}. Paths are relative to the file")
    if any(record["truth"] is None for record in records):
        raise SystemExit(f"{cfg.data} holds counts without points: they can be evaluated, not trained on")


def warn_of_long_truths(encoder, records, max_new_tokens):
    """Say how many images cannot earn everything, since a right answer is longer than a completion may be."""
    lengths = [len(encoder.target(index, record)) for index, record in enumerate(records)]
    if too_long := sum(n > max_new_tokens for n in lengths):
        print0(f"warning: --max_new_tokens {max_new_tokens} cuts the truth of {too_long} of {len(records)} "
               f"images, which takes up to {max(lengths)} tokens")


def train(cfg):
    """SFT for `--sft_steps`, then GRPO for `--steps`, on --data."""
    records = load_records(cfg.data, cfg.method)
    check_training(cfg, records)
    folder, done = find_checkpoint(cfg) if cfg.resume else (None, 0)
    if over_ranks([done], "MIN") != over_ranks([done], "MAX"):  # and no rank writes before all have looked
        raise SystemExit(f"{cfg.output_dir}: not every process sees the same checkpoints. Is it shared?")
    policy, encoder = setup(replace(cfg, model=str(folder or cfg.model)))
    warn_of_long_truths(encoder, records, cfg.max_new_tokens)
    policy, log = parallel(policy), Log(cfg.output_dir, done)
    with noting_signals() as received:
        for phase, last in ("sft", cfg.sft_steps), ("grpo", cfg.sft_steps + cfg.steps):
            if done < last:
                train_phase(phase, policy, encoder, records, cfg, log, done, received)
                done = last


DEMO = dict(  # what `--demo` puts in place of the defaults; flags on the command line still win
    output_dir="runs/demo", max_new_tokens=96, sft_steps=990, sft_lr=6.25e-6, sft_batch=16, steps=264,
    lr=3e-4, beta=0.07, freeze_vision=True, gradient_checkpointing=False, tokens_per_forward=2000,
    save_every=0)
PRETRAINING = dict(  # stands for what Qwen2.5-VL knows already
    sft_steps=3400, sft_lr=2e-3, steps=0, freeze_vision=False)
SCENES = {  # of each crowd: how many to train on, how many held out
    "sparse": (12_000, 150), "dense": (50, 150), "night": (0, 150)}
SHOWN = ("precision", "recall", "f1", "ap50", "crowded_recall", "boxes_per_image", "truth_boxes_per_image",
         "sampled_f1", "sampled_look_reward")


def trained(cfg, name, **changes):
    """Train in the folder `name` of --output_dir -> cfg of the trained model."""
    run = replace(cfg, output_dir=str(Path(cfg.output_dir) / name), **changes)
    train(run)
    return replace(run, model=str(Path(run.output_dir) / f"checkpoint-{run.sft_steps + run.steps:06d}"))


def pretrained(cfg):
    """Draw the scenes of all crowds, and pretrain a tiny model on the sparse ones -> cfg of the model. It
    learns the templates of both methods, so that both can go on from the same weights."""
    folder, both = Path(cfg.output_dir), Path(cfg.output_dir) / "sparse/both.jsonl"
    if rank_and_world()[0] == 0:
        for crowd, (n_train, n_held_out) in SCENES.items():
            data_prep.synthetic(folder / crowd, n_train + n_held_out, cfg.seed, val=n_held_out, crowd=crowd)
        data_prep.tiny(folder / "tiny", cfg.seed, texts=[CHAT, *(task.question for task in TASKS.values())])
        lines = read_jsonl(folder / "sparse/train.jsonl", dict)
        with written_whole(both) as file:
            file.writelines(json.dumps(line | {"method": method}) + "\n"
                            for method in ("dip-r1", "perception-r1") for line in lines)
    barrier()  # nothing is read before it is drawn
    return trained(replace(cfg, model=str(folder / "tiny"), data=str(both)), "start", **PRETRAINING)


def evaluated(run, folder, crowds=tuple(SCENES)):
    """Evaluate run.model on the held-out scenes of each crowd in `folder` -> {crowd: figures}."""
    policy, encoder = setup(run)
    held_out = {crowd: load_records(folder / crowd / "val.jsonl", run.method) for crowd in crowds}
    return {crowd: evaluate(policy, encoder, records, run, Path(run.output_dir) / crowd, pictures=4)
            for crowd, records in held_out.items()}


def run_demo(cfg):
    """`--demo`, the paper's situation in miniature: a model that can see meets a crowd, with few labels.

    From one pretrained start SFT and `--method` train for the numbers of steps that take the same time on two
    cores of an AMD EPYC. All three answer held-out scenes: the sparse ones, which may be forgotten, the dense
    crowd, and a night that nobody was trained on.
    """
    began, folder = time.time(), Path(cfg.output_dir)
    if not (cfg.sft_steps and cfg.steps):
        raise SystemExit(f"--demo compares SFT and {cfg.method}: neither --sft_steps nor --steps may be 0")
    refuse_second_run(replace(cfg, output_dir=str(folder / "start")))
    start = pretrained(cfg)
    cfg = replace(cfg, model=start.model, data=str(folder / "dense/train.jsonl"))
    runs = {"start": start, "sft": trained(cfg, "sft", steps=0),
            cfg.method: trained(cfg, cfg.method, sft_steps=0)}
    found = {name: evaluated(run, folder) for name, run in runs.items()}
    seconds = round(time.time() - began)
    columns = {name: {f"{crowd}: {figure}": figures[figure] for crowd, figures in by_crowd.items()
                      for figure in SHOWN if figure in figures} for name, by_crowd in found.items()}
    report(folder / "summary.json", columns, {"seed": cfg.seed, "seconds": seconds, **found})
    if rank_and_world()[0] == 0:  # one crowd as all of them answer it
        sheets = [Image.open(folder / name / "dense/pictures/000000.png") for name in runs]
        for name, sheet in zip(runs, sheets):
            ImageDraw.Draw(sheet).text((sheet.width // 2 - 80, 6), name, (255, 255, 255))
        Image.fromarray(np.vstack(sheets)).save(folder / "crowd.png")
    print0(f"\n{seconds} s. Written: {folder}/summary.json, crowd.png, and each run's metrics and pictures")


def parse_flags(argv):
    """The command line -> Config. SystemExit names a flag that is out of its range."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for option in fields(Config):
        how = dict(type=option.type)
        if option.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif get_args(option.type):
            how = dict(choices=get_args(option.type))
        parser.add_argument(f"--{option.name}", default=option.default, help=option.metadata["help"], **how)
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    cfg = Config(**vars(parser.parse_args(argv)))
    for option in fields(Config):
        value, (about, least, most) = getattr(cfg, option.name), option.metadata.values()
        if least is not None and not least <= value <= most:  # NaN neither
            allowed = f"at least {least}" + f", at most {most}" * (most < sys.float_info.max)
            raise SystemExit(f"--{option.name} {value}: {allowed} ({about})")
    return cfg


def main(argv=None):
    """The command line: every field of Config is a flag."""
    cfg = parse_flags(sys.argv[1:] if argv is None else argv)
    disable_progress_bar()
    join_processes(cfg)  # until then every process believes that it is rank 0
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by torchrun, after a rank died
    if over_ranks([restarts], "MAX")[0]:
        cfg = replace(cfg, resume=True)
    try:
        (run_demo if cfg.demo else run_evaluation if cfg.eval or cfg.predictions else train)(cfg)
    except torch.OutOfMemoryError as error:
        raise SystemExit("out of memory. Go on with --resume and a lower --max_new_tokens, --max_pixels or "
                         "--tokens_per_forward; evaluate with a lower --prompts_per_step or --samples. "
                         f"PyTorch says: {error}") from None
    except OSError as error:  # a file or folder that cannot be made or read: the message names it
        raise SystemExit(str(error)) from None
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

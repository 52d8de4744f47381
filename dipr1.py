"""DIP-R1: reinforcement learning that teaches Qwen2.5-VL to see individuals in a crowd (arXiv 2505.23179).

    for each prompt q (an image and a question):
        o_1 .. o_G  ~  pi(. | q)                       a group of completions: <think> <look> <answer>
        r_i  =  w_f format_i + w_l look_i + accuracy_i            three rewards by rule, no learned judge
        A_i  =  (r_i - mean r) / (std r + 1e-4)                   better or worse than its siblings?
        minimise  mean_t [ -min(rho A, clip(rho, 1-eps, 1+eps) A) + beta KL(pi || pi_ref) ]

    torchrun --nproc_per_node 2 dipr1.py --demo     no GPU, no download: watch a tiny Qwen2.5-VL learn
    torchrun --nproc_per_node 8 dipr1.py            the real thing: Qwen2.5-VL-3B on data/train.jsonl
    python dipr1.py --eval --model DIR --data FILE  precision, recall, F1, AP of a checkpoint
    python dipr1.py --image FILE --model DIR        answer a picture, or each picture of a folder
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
import types
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
from huggingface_hub import snapshot_download
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import cross_entropy, linear, pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoTokenizer, DynamicCache
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb
from transformers.utils.logging import disable_progress_bar

import data_prep
from data_prep import check_count, check_rows, check_size, check_text, draw_rows, open_image, opened
from data_prep import read_jsonl, reading, written_whole


def flag(default, help, least=None, most=sys.float_info.max):
    """A field of Config: its default, the sentence that `--help` shows, the values between which it works."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass
class Config:
    """Every flag, explained on its line. The command line is made from these fields."""

    demo: bool = flag(False, "draw crowds, make a tiny model, train it by SFT and by --method, compare")
    eval: bool = flag(False, "evaluate --model on --data instead of training")
    predictions: str = flag("", "score this predictions.jsonl on --data; needs no model")
    image: str = flag("", "answer this picture, or each picture of this folder, with --model")
    target: str = flag("person", "what --image looks for; for all else the data say it")
    method: str = flag("dip-r1", "task of lines that name none: dip-r1, perception-r1 or another of TASKS")
    model: str = flag("Qwen/Qwen2.5-VL-3B-Instruct", "a Qwen2.5-VL: a name on the hub or a folder")
    data: str = flag("data/train.jsonl", "one image per line, as data_prep.py writes it")
    output_dir: str = flag("", "what is written goes here, by default to runs/dipr1, runs/eval or runs/demo")
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
    picture_every: int = flag(20, "steps between pictures of GRPO; 0: none", 0)
    save_every: int = flag(100, "steps between checkpoints; 0: only where SFT and GRPO end", 0)
    keep: int = flag(3, "the newest checkpoints to keep, besides the one that ended SFT; 0: all", 0)
    resume: bool = flag(False, "go on from the newest checkpoint in --output_dir, if there is one")


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
SECTIONS = ("think", "look", "answer")  # of the template, in order


@dataclass
class Response:
    """A parsed completion. `look` and `answer` are boxes (n, 4), x1, y1, x2, y2 in pixels of the resized
    image: (0, 4) for an empty list, None for one that is missing or not a list."""

    think: str | None
    look: np.ndarray | None
    answer: np.ndarray | str | None  # points (n, 2) or text where the task asks for those
    well_formed: bool  # the template's tags, in order, and nothing outside
    complete: bool = False  # and a thought, and every list parses


def section(text, name):
    """The text from the first <name> to the last </name>, or None. So a list that is written twice fails to
    parse, and a page of text may itself contain the tags."""
    _, opened, rest = text.partition(f"<{name}>")
    inside, closed, _ = rest.rpartition(f"</{name}>")
    return inside if opened and closed else None


def parse_boxes(text, columns=4):
    """A JSON list of boxes, or of points (columns 2) -> (n, columns); None for anything else. It may stand in
    a ``` fence, its rows may have Qwen's own form `{"bbox_2d": [1, 2, 3, 4], "label": "person"}`, and one row
    alone is a list of one: models answer so for a single object."""
    text, key = text.strip(), "bbox_2d" if columns == 4 else "point_2d"
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].lstrip(string.ascii_letters)  # ```json, ```JSON, ```python
    try:
        rows = json.loads(text)
        if not isinstance(rows, list) or rows and not isinstance(rows[0], (list, dict)):
            rows = [rows]  # one row that is not in a list
        rows = [row.get(key) if isinstance(row, dict) else row for row in rows]
        return check_rows(key, rows, columns)
    except (ValueError, RecursionError):
        return None


def follows_template(text, names=SECTIONS, columns=4):
    """Are the template's tags there, once each and in order, and nothing but white space outside of them?

    `<look>[]</look> <answer>[]</answer>` splits into "", <look>, [], </look>, " ", <answer>, [], </answer>,
    "": texts and tags by turns, of which every fourth piece lies outside.
    """
    tags = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
    if not columns:  # a page of text may hold anything, the tags too
        return text.strip().startswith(tags[0]) and text.strip().endswith(tags[1])
    pieces = re.split("(" + "|".join(tags) + ")", text)
    return pieces[1::2] == tags and not "".join(pieces[::4]).strip()


def parse_response(text, names=SECTIONS, columns=4):
    """A completion -> Response. Never raises; linear in the length of the text.

    `names` are the template's sections, `columns` the numbers per row of the answer; 0: the answer is text.
    In a malformed completion a section is still read: a right answer stays right.
    """
    think, look, answer = (section(text, name) for name in SECTIONS)
    look = None if look is None else parse_boxes(look)
    answer = parse_boxes(answer, columns) if columns and answer is not None else answer
    found = {"think": (think or "").strip() or None, "look": look, "answer": answer}
    well_formed = follows_template(text, names, columns)
    complete = well_formed and all(found[name] is not None for name in names)
    return Response(think, look, answer, well_formed, complete)


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


def left_over(boxes, matched, ignore):
    """The unmatched boxes (k, 4), less those that lie more than half inside an ignore region: nothing is
    annotated there, so they are neither right nor wrong."""
    others = np.delete(as_boxes(boxes), matched, axis=0)
    return others[~(box_iou(others, ignore, of_first=True) > 0.5).any(axis=1)]


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
    tp, n_gt = len(pred_idx), len(gt)
    n_pred = tp + len(left_over(pred, pred_idx, ignore))
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
    diagonal. No points where nothing is: 1. NaN where only the number of instances is known: m rows of NaN.
    """
    if np.isnan(truth).any():
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
    pred, truth = (unicodedata.normalize("NFC", text).strip() for text in (pred, truth))  # as written
    return 1 - levenshtein(pred, truth) / max(len(pred), len(truth), 1)


# r = sum over pairs IoU / max(n, m)
def detection_reward(pred, truth, ignore=None):
    """(n, 4) boxes against m truths (m, 4), paired so that the total IoU is largest -> [0, 1]. Unmatched
    predictions in an ignore region are not counted, as in DIP-R1. Nothing there and nothing predicted: 1."""
    pred_idx, _, ious = match_boxes(pred, truth, 0)
    count = max(len(pred_idx) + len(left_over(pred, pred_idx, ignore)), len(truth))
    return float(ious.sum() / count) if count else 1.0


# ------------------------------------------------------------------------------------------------------------
# The two methods on one screen: a row per task. Whatever depends on the task asks this table


@dataclass(frozen=True)
class Task:
    """What is asked, how it is answered, what an evaluation reports of it, and what an answer earns."""

    question: str
    sections: tuple  # of the template, in order: some of SECTIONS
    broken_format: float  # the format reward where the form is wrong; a right form earns 1
    truth: str  # the field of a record that holds the truth
    columns: int  # numbers per row of the answer: 4 a box, 2 a point, 0 the answer is text
    figures: Callable  # [(answer, truth, ignore, target)] of all images -> {name: value}, NaN: not defined
    reward: Callable  # (answer, prompt, recall weight) -> [0, 1]; NaN where the truth is a bare count


TASKS = {  # a record names its task, or has that of `--method`; figures are defined below: hence the lambdas
    "dip-r1": Task(
        QUESTION, SECTIONS, 0.0, "boxes", 4, lambda images: detection_figures(images),
        lambda pred, prompt, w: accuracy_reward(pred, prompt.truth, prompt.ignore, w)),
    "perception-r1": Task(
        "Find every {target} in the image. List one box for each between <answer> and </answer>. Boxes are a "
        "JSON list of [x1, y1, x2, y2] in pixels; [] means none. Example:\n"
        "<answer>[[10, 20, 40, 88], [31, 24, 58, 90]]</answer>",
        ("answer",), -1.0, "boxes", 4, lambda images: detection_figures(images),
        lambda pred, prompt, w: detection_reward(pred, prompt.truth, prompt.ignore)),
    "grounding": Task(
        "Find {target} in the image. Give its one box between <answer> and </answer>, as a JSON list of "
        "[x1, y1, x2, y2] in pixels. Example:\n<answer>[[31, 24, 58, 90]]</answer>",
        ("answer",), -1.0, "boxes", 4, lambda images: grounding_figures(images),
        lambda pred, prompt, w: grounding_reward(pred, prompt.truth)),
    "counting": Task(
        "Count every {target} in the image. List one point on each between <answer> and </answer>. Points "
        "are a JSON list of [x, y] in pixels; [] means none. Example:\n<answer>[[25, 54], [45, 57]]</answer>",
        ("answer",), -1.0, "points", 2, lambda images: counting_figures(images),
        lambda pred, prompt, w: counting_reward(pred, prompt.truth, *prompt.size)),
    "ocr": Task(
        "Read the image. Write its text between <answer> and </answer>.",
        ("answer",), -1.0, "transcript", 0, lambda images: ocr_figures(images),
        lambda pred, prompt, w: ocr_reward(pred, prompt.truth)),
}


def group_rewards(group, recall_weight):
    """(G, 3): the format, look and accuracy reward of each completion. Perception-R1 asks for no look, and
    its answer reward stands in the place of the accuracy."""
    prompt, task, responses = group.prompt, group.prompt.task, group.responses
    form = [1.0 if r.complete else task.broken_format for r in responses]  # format_reward
    look = np.zeros(len(responses))
    if "look" in task.sections:
        look = look_rewards(responses, *prompt.size)
    answer = [0.0 if r.answer is None else task.reward(r.answer, prompt, recall_weight) for r in responses]
    return torch.tensor(np.stack([form, look, answer], axis=1))


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
    task: Task  # what the record asks: its row of TASKS
    ids: torch.Tensor  # (L,) the chat, one <|image_pad|> for each visual token
    positions: torch.Tensor  # (3, L) M-RoPE: time, row, column
    pixels: torch.Tensor  # (patches, 1176) what the vision tower reads
    grid: torch.Tensor  # (1, 3) patches in time, height, width
    size: tuple  # (width, height)
    truth: np.ndarray | str  # boxes (n, 4), points (n, 2) or text
    ignore: np.ndarray  # (m, 4)
    features: torch.Tensor | None = None  # (visual tokens, D), kept where the tower runs once per step

    def to(self, device):
        """The same prompt with its tensors on a device."""
        return replace(self, ids=self.ids.to(device), positions=self.positions.to(device),
                       pixels=self.pixels.to(device), grid=self.grid.to(device))


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
        """The texts, parsed; boxes are clipped to the image. One entirely outside is empty, and counts."""
        task, size = self.prompt.task, self.prompt.size
        responses = [parse_response(text, task.sections, task.columns) for text in self.texts]
        for response in responses:
            if task.columns == 4 and response.answer is not None:
                response.answer = response.answer.clip(0, size + size)
        return responses


def rescaled(rows, size, new_size):
    """Boxes (n, 4) or points (n, 2) in pixels of an image of `size` (W, H) -> in those of its resized copy,
    in which Qwen2.5-VL is trained to answer, or back. Each axis has its own scale: both sides are rounded to
    multiples of 28 (1920 x 1080 becomes 1316 x 728)."""
    rows = np.asarray(rows, float)
    return rows * np.tile(np.divide(new_size, size), rows.shape[-1] // 2)


class Encoder:
    """Records to prompts and truths to target texts: all that needs the tokenizer or the image processor."""

    def __init__(self, model, tokenizer, image_processor, folder):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.folder = folder  # where they were loaded from; checkpoints copy its small files
        self.chat = functools.lru_cache(maxsize=1024)(self.chat)
        self.rope_index, self.device = model.model.get_rope_index, model.device
        self.image_token = model.config.image_token_id
        eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.eos = [eos] if isinstance(eos, int) else list(eos)  # Qwen2.5-VL has two

    def prompt(self, index, record):
        """Read the image and build the chat around it -> Prompt, on the CPU. SystemExit if the image cannot
        be opened, or has another size than its line in the data says."""
        size = record["width"], record["height"]
        try:
            image = open_image(record["path"])
            if image.size != size:
                raise OSError(f"it has {image.size} pixels, but its line in the data says {size}")
        except OSError as error:
            raise SystemExit(f"{record['path']}: {error}. Repair it; --resume goes on") from None
        task, truth = TASKS[record["task"]], record["truth"]
        seen = self.image_processor([image], return_tensors="pt")
        _, rows, columns = seen["image_grid_thw"][0].tolist()
        ids, positions = self.chat(task.question.replace("{target}", record["target"]), rows, columns)
        new_size, pixels, grid = (14 * columns, 14 * rows), seen["pixel_values"], seen["image_grid_thw"]
        truth = rescaled(truth, size, new_size) if task.columns else truth
        ignore = rescaled(record["ignore"], size, new_size)
        return Prompt(index, record, task, ids, positions, pixels, grid, new_size, truth, ignore)

    def chat(self, question, rows, columns):
        """The question about an image of rows x columns patches -> ids (L,), M-RoPE positions (3, L)."""
        text = CHAT.replace("<|image_pad|>", "<|image_pad|>" * (rows * columns // 4))  # 2 x 2 patches each
        ids, grid = self.tokens(text.replace("{question}", question)), torch.tensor([[1, rows, columns]])
        # Without the token types positions would silently be 1-D, and the model blind to where things are.
        positions, _ = self.rope_index(ids[None], (ids == self.image_token).int()[None], grid)
        return ids, positions[:, 0]

    def tokens(self, text):
        """Text -> ids (L,)."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, completion):
        """Token ids -> text, less the closing EOS. Other special tokens stay visible and break the format."""
        ids = completion.tolist()
        ids = ids[:-1] if ids[-1] in self.eos else ids
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def look_length(self, completion):
        """How many tokens run up to and including `</look>`; all of them if it never comes."""
        closed = lambda n: "</look>" in self.tokenizer.decode(completion[:n])  # false up to some n, then true
        return min(bisect.bisect_left(range(len(completion) + 1), True, key=closed), len(completion))

    def target(self, prompt):
        """The supervised target (n,): the truth in the task's template, boxes from left to right, and EOS.
        What the look is, nobody annotated: `weak_look`, further down, with the data."""
        task, truth, answer = prompt.task, prompt.truth, prompt.truth
        if task.columns:
            answer = as_written(truth[np.argsort(truth[:, 0], kind="stable")])
        text = f"<answer>{answer}</answer>"
        if "look" in task.sections:
            look = weak_look(truth, *prompt.size, prompt.index).round()
            think = f"{len(truth)} in sight, {len(look)} to look at"
            text = f"<think>{think}</think><look>{as_written(look)}</look>{text}"
        return torch.cat([self.tokens(text), torch.tensor(self.eos[:1])]).to(self.device)


# ------------------------------------------------------------------------------------------------------------
# Scoring: a prompt and its image are read once, and all its completions follow them in one sequence


@dataclass
class Packed:
    """Groups, end to end without padding: [ prompt | o_1 | .. | o_G | prompt | o_1 | .. ], T tokens."""

    ids: torch.Tensor  # (T,)
    positions: torch.Tensor  # (3, T); a completion starts one past its prompt's largest, as if it were alone
    sources: torch.Tensor  # (N,) for each token of a completion the place of the one that predicts it
    lengths: list  # for each group [|prompt|, |o_1|, .., |o_G|]


def pack(groups):
    """Lay groups out for one forward -> Packed. A prompt p q r of text with the completions [a b] and [c]:

        place            0    1    2    3    4    5
        ids              p    q    r    a    b    c
        position         0    1    2    3    4    3
        predicted from                  2    3    2
        may see          p    pq   pqr  pqra pqrab pqrc
    """
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
    tokens; heads share keys, H' <= H. On a GPU this form of the mask is never written out."""
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)


def tree_attention(module, query, key, value, packed, **options):
    """Causal attention in which completions do not see each other: q (1, H, T, D'), k and v (1, H', T, D'),
    Packed -> (1, T, H, D'), and None for the weights.

    A token of the prompt attends to the prompt, a token of o_i to the prompt and to o_i. Exact, and cheaper
    than a mask over the whole sequence: what siblings would contribute has weight 0 and is not computed, and
    no (T, T) mask exists.
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


# Every layer calls the function registered under the decoder's `attn_implementation`, and hands it the
# `attention_mask` that the decoder was given, as it is: we give the layout in the place of a (T, T) mask.
AttentionInterface.register("tree", tree_attention)
in_place_of_mask = lambda packed: {"full_attention": packed}  # a dict by kind of layer; Qwen's are all of one


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
        model.model.language_model.set_attn_implementation("tree")
        if model.device.type == "cuda":
            without_convolution(model.model.visual.patch_embed)
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
            attention_mask=in_place_of_mask(packed), past_key_values=cache, use_cache=cache is not None,
        ).last_hidden_state[0]
        return packed, hidden

    def forward(self, groups):
        """Groups -> for each the flat (N,) log-probabilities of its tokens."""
        packed, hidden = self.read(groups)
        targets = torch.cat([completion for group in groups for completion in group.completions])
        logp = token_logprobs(*self.head(hidden[packed.sources]), targets)
        return logp.split([group.n_tokens for group in groups])


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
    sampled = sampled.clamp(max=logprobs.shape[-1] - 1)  # of NaN it would be V; `check_finite` tells
    return torch.where(uniform.isnan(), logprobs.argmax(-1), sampled)


@dataclass
class Rows:
    """The completions that are being written, one a row, B in all."""

    number: torch.Tensor  # (B,) which of the P x G completions it is
    start: torch.Tensor  # (B,) the position of its first token: one past its prompt's largest
    running: torch.Tensor  # (B,) no EOS has been written yet
    mask: torch.Tensor  # (B, 1, 1, C) 0 at the columns of the cache that hold a token, else -inf
    cache: list  # for each layer its keys and values, both (B, H', C, D')

    def keep(self, kept):
        """Drop all rows but those where `kept` (B,) is True."""
        cache = [(keys[kept], values[kept]) for keys, values in self.cache]
        return Rows(self.number[kept], self.start[kept], self.running[kept], self.mask[kept], cache)


def prefill(policy, prompts, copies, room):
    """Read every prompt once, and make `copies` rows of each -> Rows, B = prompts x copies of them, and the
    log-probabilities (B, V) of their first tokens.

    The cache holds the prompts, on the left, and `room` columns for what is written, on the right.
    """
    prefix = DynamicCache()
    packed, hidden = policy.read([Group(prompt, []) for prompt in prompts], prefix)
    lengths = torch.tensor(packed.lengths, device=hidden.device)[:, 0]
    last = hidden[lengths.cumsum(0) - 1]
    logprobs = linear(*policy.head(last)).float().log_softmax(-1)
    columns = lengths.max().item() + room
    columns += -columns % 8 if hidden.is_cuda else 0  # fast kernels want a multiple of 8

    def spread(x):  # (1, H', T, D'), prompts end to end -> (B, H', C, D')
        by_prompt = [part[0].transpose(0, 1) for part in x.split(lengths.tolist(), dim=2)]
        x = pad_sequence(by_prompt, batch_first=True).transpose(1, 2)
        return pad(x, (0, 0, 0, columns - x.shape[2])).repeat_interleave(copies, 0)

    cache = [(spread(layer.keys), spread(layer.values)) for layer in prefix.layers]
    empty = torch.arange(columns, device=hidden.device) >= lengths[:, None, None, None]
    mask = torch.zeros_like(empty, dtype=hidden.dtype).masked_fill(empty, -torch.inf)
    mask = mask.repeat_interleave(copies, 0)
    start = torch.stack([prompt.positions.max() + 1 for prompt in prompts]).repeat_interleave(copies)
    number = torch.arange(len(start), device=hidden.device)
    return Rows(number, start, number >= 0, mask, cache), logprobs.repeat_interleave(copies, 0)


def decode_step(policy, cache):
    """-> a function: one more token per row, token and position (B,) -> log-probabilities (B, V) of the next.

    It writes the token's keys and values to `column` (1,) of the cache and attends where `mask` is 0. This
    is Qwen2.5-VL's decoder, written out, with the model's own layers: every tensor keeps its address, as CUDA
    graphs require, and heads that share keys need no copies of them.
    """
    decoder = policy.model.model.language_model

    def step(token, position, column, mask):
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
            o = scaled_dot_product_attention(q, keys, values, mask)
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
    tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=device)  # (P x G, max_new_tokens)
    chosen = torch.zeros(uniforms.shape, device=device)  # the log-probabilities of the tokens
    lengths = torch.zeros(len(tokens), dtype=torch.long, device=device)
    rows, logprobs = prefill(policy, prompts, G, max_new_tokens)
    column = torch.tensor([rows.mask.shape[-1] - max_new_tokens], device=device)  # behind the prompts
    decode = None  # built in the loop, and anew whenever rows are dropped
    for t in range(max_new_tokens):
        token = inverse_cdf(logprobs, uniforms[rows.number, t])
        tokens[rows.number, t], chosen[rows.number, t] = token, logprobs.gather(1, token[:, None])[:, 0]
        lengths[rows.number] += rows.running  # EOS is the last token of a completion
        rows.running &= ~torch.isin(token, eos)
        n_running = rows.running.sum().item()  # in most steps the only place where the CPU waits for the GPU
        if n_running == 0 or t + 1 == max_new_tokens:
            break
        if n_running <= len(token) // 2:
            token, rows, decode = token[rows.running], rows.keep(rows.running), None
        rows.mask.index_fill_(-1, column, 0)
        inputs = token, rows.start + t, column, rows.mask
        if decode is None:  # a CUDA graph has fixed shapes, and the addresses of one cache
            decode = decode_step(policy, rows.cache)
            decode = captured(decode, *inputs) if device.type == "cuda" else decode
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
                if group.old_logp is None:  # the first update: pi_old is pi itself, which is scored here
                    group.old_logp = logp.detach()  # anyway (scored beforehand, it would cost a forward)
                terms = logp, group.old_logp, group.ref_logp, group.advantages
                group_loss, group_stats = grpo_loss(*terms, cfg.clip_eps, cfg.beta)
                loss = loss + group_loss / len(groups)
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
    targets = [encoder.target(prompt) for prompt in prompts]
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
    check_finite(groups, f"step {cfg.sft_steps + step + 1}")
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

SMALL_FILES = "*.json", "*.jinja", "*.txt"  # of a model's folder: config, tokenizer, chat template, processor


def device_of(cfg):
    """Where the model lives: on the current GPU, if there is one. The demo stays on the CPU, where a seed
    repeats a run bit for bit."""
    return "cuda" if torch.cuda.is_available() and not cfg.demo else "cpu"


def setup(cfg):
    """Load `--model`, a name or a folder, to this process's device -> (policy, encoder). SystemExit gives the
    reason if it cannot be loaded, or not completely: a weight that is not in the file would be random."""
    device = device_of(cfg)
    try:
        folder = Path(cfg.model)
        if not folder.is_dir():
            if folder.parent.is_dir():
                raise OSError("names on the hub are of the form Qwen/Qwen2.5-VL-3B-Instruct")
            folder = Path(snapshot_download(cfg.model, allow_patterns=[*SMALL_FILES, "*.safetensors"]))
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"it is a {config.model_type}, not a qwen2_5_vl")
        if getattr(config, "quantization_config", None):
            raise ValueError("it is quantised: train the original weights, and quantise what comes out")
        for path in folder.glob("*.safetensors"):
            with reading(path):
                safe_open(path, "pt")  # names a file that is cut short
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights, the first is {missing[0]}")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.convert_tokens_to_ids("<|image_pad|>") != model.config.image_token_id:
            raise ValueError("its tokenizer is missing, or belongs to another model")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except Exception as error:  # readers of configurations, weights and tokenizers raise nearly anything
        name = cfg.model if os.path.isdir(cfg.model) else f"{cfg.model}, which is no folder"
        raise SystemExit(f"cannot load --model {name}: {' '.join(str(error).split())[:300]}") from None
    image_processor.size["longest_edge"] = cfg.max_pixels  # "edges", in Qwen's config, are areas
    model.model.visual.requires_grad_(not cfg.freeze_vision)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    encoder = Encoder(model.to(device), tokenizer, image_processor, folder)
    return Policy(model, tokenizer, cfg.temperature), encoder


def without_convolution(embed):
    """Qwen's patch embedding is a convolution whose stride is its kernel, and so one product of each patch
    with the same weights. On a GPU compute that: in bf16 some versions of cuDNN take seconds to convolve."""
    def product(embed, pixels):  # (patches, 1176) -> (patches, D)
        weight = embed.proj.weight.flatten(1)
        return linear(pixels.to(weight.dtype), weight)

    embed.forward = types.MethodType(product, embed)  # of this module, and of its copies their own


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
    several = dist.get_world_size() > 1  # then with bucket views: broadcasts are few and large
    return ZeroRedundancyOptimizer(
        trained, MasterAdamW, parameters_as_bucket_view=several, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0,
        fused=True)


def learning_rate(step, steps, peak, warmup):
    """Linear up to `peak` over the warm-up, then linear down to 0 at `steps`."""
    return peak * min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1), 1.0)


capture_stream = functools.cache(lambda: torch.cuda.Stream())  # one for all: each keeps a cuBLAS workspace
not_captured = []  # why a capture failed; it is not tried again, since what it took of the memory is lost


def captured(step, *inputs):
    """A decode step as a CUDA graph: recorded once, then replayed with new inputs copied to the old places.

    A step is a thousand small kernels, and Python takes longer to launch them than the GPU to run them; a
    replay launches all at once. It is exact: the same kernels on the same memory. If something in the model
    cannot be recorded, this step and all later ones run as they are, with a warning.
    """
    if not_captured:
        return step
    places, graph, stream = [value.clone() for value in inputs], torch.cuda.CUDAGraph(), capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            step(*places)  # libraries set themselves up on first use, which must not be recorded
            graph.capture_begin(capture_error_mode="thread_local")  # other threads, such as NCCL's, go on
            try:
                logprobs = step(*places)
            finally:
                graph.capture_end()
    except RuntimeError as error:
        if torch.OutOfMemoryError in (type(error), type(error.__context__)):
            raise
        warnings.warn(f"the decode step is not captured as a CUDA graph, and slower: {error}", stacklevel=2)
        not_captured.append(error)
        return step
    finally:
        torch.cuda.current_stream().wait_stream(stream)

    def replay(*inputs):
        for place, value in zip(places, inputs):
            place.copy_(value)
        graph.replay()
        return logprobs

    return replay


def check_finite(groups, when):
    """SystemExit if the model that wrote these groups is broken: a weight is NaN, or a layer overflows."""
    if not all(group.rollout_logp.isfinite().all() for group in groups):
        raise SystemExit(f"{when}: the model's probabilities are not finite; its weights are broken. Go back "
                         "to an earlier checkpoint (--model, with another --output_dir) and a lower --lr")


# ------------------------------------------------------------------------------------------------------------
# Processes, and who reads which part of the data


def print0(*args):
    """Print once, on rank 0."""
    if dist.get_rank() == 0:
        print(*args, flush=True)


def over_ranks(values, reduction="SUM"):
    """Numbers, reduced over the ranks (SUM, MIN, MAX) -> list of floats; the ranks wait for each other."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values, getattr(dist.ReduceOp, reduction))
    return values.tolist()


def join_processes(cfg):
    """Take a GPU, if there are any, and meet the other processes, if torchrun started several."""
    if device_of(cfg) == "cuda":
        mine, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if mine >= gpus:
            raise SystemExit(f"there is no GPU for process {mine + 1}: torchrun --nproc_per_node {gpus}")
        torch.cuda.set_device(mine)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and most of ours are new
        # Long sums are kept in fp32, so that sampler and scorer round alike.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if dist.is_initialized():
        return
    store, rank, world, patience = dist.HashStore(), 0, 1, timedelta(minutes=30)
    if "RANK" in os.environ:  # torchrun started us; if a rank does not arrive in time, stop
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # This store outlives a restart, addresses of dead ranks in it: each start has a part of its own.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if device_of(cfg) == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def parallel(policy):
    """With several processes, the policy in DDP: its backward averages the gradients over the ranks."""
    if dist.get_world_size() == 1:  # DDP's copy of the gradients would not fit one GPU
        return policy
    options = dict(forward_sync_buffers=False, gradient_as_bucket_view=True)  # no buffer ever changes
    return nn.parallel.DistributedDataParallel(policy, **options)


def unwrap(policy):
    """The Policy inside DDP, or the policy itself."""
    return getattr(policy, "module", policy)


def as_record(line, method):
    """A line of the data, checked -> a record, with its truth in `truth`. ValueError says what is wrong."""
    record = {"target": "person", "task": method, "ignore": [], **line}
    size, task = (record["width"], record["height"]), TASKS.get(record["task"])
    if "labels" in record:
        raise ValueError("labels: write a line for each class instead, with the class as its target")
    if task is None:
        raise ValueError(f"the task {record['task']!r} is none of {', '.join(TASKS)}")
    if not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"width and height are {size}, not positive whole numbers")
    check_size(size)
    check_text(record["target"])
    if "count" in record:
        check_count(record["count"], record.get("points"))
        record.setdefault("points", None)  # so many, in unknown places
    truth = record[task.truth]
    if task.columns == 0:
        truth = check_text(truth)
    elif truth is None and "count" in record:
        truth = np.full((record["count"], task.columns), np.nan)
    else:
        truth = check_rows(task.truth, truth, task.columns, *size)
    if record["task"] == "grounding" and len(truth) != 1:
        raise ValueError("a phrase means one box")
    return record | {"truth": truth, "ignore": check_rows("ignore", record["ignore"], 4, *size)}


def load_records(path, method="dip-r1"):
    """Read a JSONL that data_prep.py wrote -> records, and say where each image lies (`path`). SystemExit
    names the file, the line and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"{path} is not there: make it with data_prep.py (python data_prep.py --help), or "
                         "see the whole method at work without any data: python dipr1.py --demo")
    located = lambda line: {"path": str(path.parent / line["image"])}
    records = read_jsonl(path, lambda line: as_record(line, method) | located(line))
    if not records:
        raise SystemExit(f"{path} holds no image")
    return records


def check_images(records):
    """Read the header of every image, shared out over the ranks. SystemExit names the first that is missing,
    is none, or has other sides than its line says (in either order: a camera may have turned it)."""
    stated = {record["path"]: (record["width"], record["height"]) for record in records}
    mine = list(stated)[dist.get_rank() :: dist.get_world_size()]
    for path in tqdm(mine, "checking images", delay=2, disable=dist.get_rank() > 0):  # if it takes long
        with reading(path), opened(path) as image:
            if sorted(image.size) != sorted(stated[path]):
                raise ValueError(f"it has {image.size} pixels, but its line in the data says {stated[path]}")


def batch_indices(n, batch, seed, step):
    """Which of n records step `step` takes: a fresh shuffle per epoch, a function of (seed, step) alone."""
    order = functools.cache(lambda epoch: np.random.default_rng([seed, epoch]).permutation(n))
    return [int(order(k // n)[k % n]) for k in range(step * batch, (step + 1) * batch)]


def read_ahead(encoder, records, plan):
    """Yield the prompts of each list of indices in `plan`, while the images of the next list are read."""
    plan, read = iter(plan), lambda index: encoder.prompt(index, records[index])
    with ThreadPoolExecutor(1) as reader:  # it prepares on the CPU; only the main thread uses the GPU
        upcoming = reader.map(read, next(plan, []))
        while prompts := list(upcoming):
            upcoming = reader.map(read, next(plan, []))
            yield [prompt.to(encoder.device) for prompt in prompts]


def as_written(rows):
    """Boxes or points -> a JSON list. In whole pixels, but for boxes of less than 4: to a tenth, since whole
    pixels may be too coarse for an IoU of 0.5."""
    small = (rows[:, 2:] - rows[:, :-2] < 4).any(axis=1, keepdims=True)  # a point is never small
    rows = np.where(small, rows.round(1), rows.round())
    return str([[int(v) if v == int(v) else v for v in row] for row in rows.tolist()])


def weak_look(truth, width, height, seed):
    """The supervised look at boxes (n, 4) -> (k, 4): a weak label, our reading, since nothing is annotated.

    A region around each cluster of overlapping boxes, left out with probability 1/4; with probability 1/2 one
    more at a random place, each side a quarter to half of the image's; drawn once per image. So the answer
    learns to trust the image and not the look. If it copied boxes from the look, or took a region as proof of
    a crowd, it would invent boxes as soon as GRPO teaches the look to point at doubtful places.
    """
    rng = np.random.default_rng(seed)
    k, cluster = connected_components(box_iou(truth, truth) > 0.2, directed=False)
    crowds = [members for members in (truth[cluster == number] for number in range(k)) if len(members) > 1]
    look = as_boxes([[*crowd[:, :2].min(axis=0), *crowd[:, 2:].max(axis=0)] for crowd in crowds])
    look = look[rng.random(len(look)) < 0.75]
    if rng.random() < 0.5:
        size = rng.uniform(0.25, 0.5, 2) * [width, height]
        corner = rng.uniform(0, [width, height] - size)
        look = np.vstack([look, [*corner, *(corner + size)]])
    return look[np.argsort(look[:, 0], kind="stable")]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, log, pictures. The run is crash-only: an error that a restart repairs ends it with one line


def identity(cfg):
    """What makes a run: its settings, the number of processes, the content of --data (not of the images)."""
    content = hashlib.sha256(Path(cfg.data).read_bytes()).hexdigest()
    model = os.path.realpath(cfg.model) if os.path.isdir(cfg.model) else cfg.model
    return asdict(cfg) | {"model": model, "processes": dist.get_world_size(), "data_sha256": content}


MAY_CHANGE = {  # between a run and its --resume: what does not change the result, and what saves memory
    "resume", "data", "output_dir", "target", "save_every", "keep", "picture_every", "samples",
    "gradient_checkpointing", "tokens_per_forward", "max_new_tokens", "max_pixels"}


def save_model(model, source, folder, max_pixels):
    """Write the model's folder with new weights. The small files of `source` are copied as they are, since
    transformers would rewrite them in a form that its versions before 5, and what is built on these, misread;
    only `max_pixels` is the run's."""
    model.save_pretrained(folder)  # the weights, under the names that the hub's folder uses
    for path in [path for pattern in SMALL_FILES for path in source.glob(pattern)]:
        if path.name == "preprocessor_config.json":
            settings = json.loads(path.read_text()) | {"max_pixels": max_pixels}
            (folder / path.name).write_text(json.dumps(settings, indent=2))
        elif not path.name.endswith(".index.json"):  # which says where the old weights are
            shutil.copyfile(path, folder / path.name)


def save_checkpoint(policy, encoder, optimizer, step, cfg):
    """Write `checkpoint-<step>` as a .tmp folder, flush, then rename it: one that has its name is complete.

    It is a Hugging Face folder for `from_pretrained`, with every rank's optimizer shard, the step, and the
    run's identity. There is no generator state to keep: all randomness, the order of the data too, is a
    function of (seed, step, prompt).
    """
    rank, final, shard = dist.get_rank(), Path(cfg.output_dir) / f"checkpoint-{step:06d}", optimizer.optim
    beside = final.with_name(final.name + ".tmp")
    try:
        if rank == 0:
            for cut_short in final.parent.glob("checkpoint-??????.tmp"):
                shutil.rmtree(cut_short)
            save_model(unwrap(policy).model, encoder.folder, beside, cfg.max_pixels)
            (beside / "dipr1.json").write_text(json.dumps({"step": step, "run": identity(cfg)}, indent=2))
        written = list(beside.glob("*")) if rank == 0 else []  # by this rank, on its own node
        dist.barrier()
        written.append(beside / f"optimizer-{rank}.pt")
        torch.save({"adamw": shard.state_dict(), "masters": shard.masters}, written[-1])
        for path in written:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        dist.barrier()
    except (OSError, SafetensorError, RuntimeError) as error:  # the last: torch.save, of a full disk
        raise SystemExit(f"{final} could not be written: {error}. If the disk is full, make room; "
                         "then --resume") from None
    if rank == 0:
        os.replace(beside, final)
        for old in sorted(final.parent.glob("checkpoint-??????"))[: -cfg.keep if cfg.keep else 0]:
            if old.name != f"checkpoint-{cfg.sft_steps:06d}":  # GRPO's reference model
                shutil.rmtree(old)
    dist.barrier()


def find_checkpoint(cfg):
    """The newest checkpoint of `--output_dir` -> (folder, step); (None, 0) where there is none. SystemExit if
    the run would not be the same: another setting, another number of processes, other data."""
    folder = max(Path(cfg.output_dir).glob("checkpoint-??????"), default=None)
    if folder is None:
        print0(f"{cfg.output_dir} has no checkpoint: beginning with step 1")
        return None, 0
    with reading(folder / "dipr1.json"):
        state = json.loads((folder / "dipr1.json").read_text())
        step, before, now = state["step"], state["run"], identity(cfg)
    for name in sorted((before.keys() | now.keys()) - MAY_CHANGE):
        if before.get(name) != now.get(name):
            was = f"its {name} was {before.get(name)!r} and is {now.get(name)!r} now"
            raise SystemExit(f"--resume {folder}: {was}. Change it back, or begin a new run with these "
                             f"weights, but with a new optimizer, reference and order of the data: --model "
                             f"{folder} --output_dir NEW")
    print0(f"going on from {folder}")
    return folder, step


def restore(optimizer, folder):
    """Put this rank's shard of a checkpoint's optimizer back. SystemExit names a file that cannot be read."""
    path, shard = folder / f"optimizer-{dist.get_rank()}.pt", optimizer.optim
    with reading(path):
        saved = torch.load(path, map_location=shard.masters[0].device, weights_only=True)
    shard.load_state_dict(saved["adamw"])
    for master, value in zip(shard.masters, saved["masters"]):
        master.copy_(value)


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
    }


class Log:
    """metrics.jsonl, the figures on the progress bar and, where TensorBoard is installed, its events. A run
    that goes on keeps the lines of the steps that are `done`; later ones come again."""

    def __init__(self, folder, done):
        self.path, self.board, self.warned = Path(folder) / "metrics.jsonl", None, False
        self.in_a_row = Counter()  # steps until now without an update, or whose rewards were all alike
        if dist.get_rank() == 0:
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]  # a killed run may leave half a line
            with written_whole(self.path) as file:
                file.writelines(line for line in whole if json.loads(line)["step"] <= done)
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(folder, purge_step=done + 1)

    def write(self, phase, step, metrics, bar):
        """Average a step's metrics over the ranks (all of them must call) and write them down."""
        totals, world = over_ranks(list(metrics.values())), dist.get_world_size()
        metrics = {name: total / world for name, total in zip(metrics, totals)}
        line = {name: value if np.isfinite(value) else None for name, value in metrics.items()}
        if dist.get_rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"phase": phase, "step": step, **line}) + "\n")
        for name, value in metrics.items() if self.board else ():
            self.board.add_scalar(f"{phase}/{name}", value, step)
        shown = {"nll", "reward", "reward_format", "reward_look", "reward_accuracy", "kl", "boxes"}
        bar.set_postfix({n.removeprefix("reward_"): f"{v:.3g}" for n, v in metrics.items() if n in shown})
        for name in ("skipped", "frac_zero_std"):
            self.in_a_row[name] = self.in_a_row[name] + 1 if metrics.get(name) == 1 else 0
        if self.in_a_row["skipped"] == 10:
            seen = f"(loss {metrics['loss']}, gradient norm {metrics['grad_norm']}); lower the learning rate"
            raise SystemExit(f"{phase} step {step}: ten updates in a row not finite {seen}")
        if self.in_a_row["frac_zero_std"] == 10 and not self.warned:
            self.warned = True
            print0("\nwarning: for ten steps all completions of a group earned the same: nothing is learned."
                   " A model that does not know the form of an answer needs --sft_steps first")


ORANGE, RED, BLUE, GREEN = (255, 150, 0), (235, 30, 60), (70, 180, 255), (60, 220, 60)


def draw_answer(image, response, prompt, scale):
    """Draw a completion on its image -> what the caption says of it. The look is green, right boxes orange,
    wrong ones red, people who were missed blue; what cannot be judged, or is no box, is orange."""
    target, columns = prompt.record["target"], prompt.task.columns
    if columns == 0:
        return f"{target}: {response.answer!r}"
    rows = np.zeros((0, columns)) if response.answer is None else response.answer
    said, right, wrong, missed = f"{target}: {len(rows)} found", slice(None), [], []
    if columns == 4 and prompt.task.truth in prompt.record:
        right, found, _ = match_boxes(rows, prompt.truth)
        wrong, missed = left_over(rows, right, prompt.ignore), np.delete(prompt.truth, found, axis=0)
        said = f"{len(found)} of {len(prompt.truth)} found, {len(wrong)} wrong (red), missed ones blue"
    for boxes, color in (missed, BLUE), (wrong, RED), (rows[right], ORANGE):
        draw_rows(image, np.multiply(boxes, scale), color, 4)
    draw_rows(image, as_boxes(response.look) * scale, GREEN, 2)
    return said


def draw_picture(group, path, name="", height=448):
    """PNG of a group: its first completion on the image, and the map of where the group's answers disagree,
    which is what the look is paid to find -> the picture. `name` begins the caption."""
    prompt, first, scale = group.prompt, group.responses[0], height / group.prompt.size[1]
    size = (round(prompt.size[0] * scale), height)
    image = open_image(prompt.record["path"]).resize(size)
    answers = [r.answer for r in group.responses if np.ndim(r.answer) == 2 and r.answer.shape[1] == 4]
    unsure = disagreement([coverage(boxes, *prompt.size) for boxes in answers or [None]])
    heat = Image.fromarray((190 * unsure).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    dimmed = image.convert("L").convert("RGB").point([value // 2 for value in range(256)] * 3)
    doubt = Image.composite(Image.new("RGB", size, (255, 120, 0)), dimmed, heat)
    draw_rows(doubt, as_boxes(first.look) * scale, GREEN, 2)
    said = f"{name} {draw_answer(image, first, prompt, scale)}".strip()
    sides = [(image, said), (doubt, f"where {len(group.responses)} answers disagree")]
    sides = sides[: len(group.responses)]  # one alone disagrees with none
    sheet = Image.new("RGB", (len(sides) * (size[0] + 8) - 8, height + 24), (24, 24, 24))
    for x, (side, caption) in zip((0, size[0] + 8), sides):
        sheet.paste(side, (x, 24))
        ImageDraw.Draw(sheet).text((x + 6, 6), caption.encode("ascii", "replace").decode(), (230, 230, 230))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return sheet


# ------------------------------------------------------------------------------------------------------------
# Evaluation: what a detection researcher would ask, in pixels of the original image

EVALUATION = 2**31  # the "step" in the seed of an evaluation: training never draws these numbers


def share(part, whole):
    """part / whole; NaN, which means not defined and is left out, of nothing."""
    return part / whole if whole else np.nan


# JI = k / (m + n - k),   k pairs of m predictions and n truths
def image_counts(pred, truth, ignore, *_):
    """One image, matched at IoU 0.5 -> [pairs, predictions, truths, crowded truths, those found, JI].

    JI is CrowdHuman's Jaccard index, as its toolkit computes it: pairs have an IoU above 0.5; unmatched boxes
    of either side that lie more than half in an ignore region do not count; NaN where no box counts.
    """
    pred_idx, truth_idx, _ = match_boxes(pred, truth)
    crowded = (box_iou(truth, truth) - np.eye(len(truth)) > 0.2).any(axis=1)  # overlaps another truth
    n_pred = len(pred_idx) + len(left_over(pred, pred_idx, ignore))
    above, truth_above, _ = match_boxes(pred, truth, np.nextafter(0.5, 1))
    wrong, missed = left_over(pred, above, ignore), left_over(truth, truth_above, ignore)
    jaccard = share(len(above), len(above) + len(wrong) + len(missed))
    return [len(pred_idx), n_pred, len(truth), crowded.sum(), crowded[truth_idx].sum(), jaccard]


# AP = mean over recalls r in {0, .01, .., 1} of  max { precision at k : recall at k >= r }
def average_precision(images, iou_threshold):
    """COCO's 101-point average precision, in [0, 1]: the mean over the targets that have truth.

    Each of an image's first 100 predictions takes the free truth that it overlaps most. One that finds none
    is a miss, unless a share of it as large as the threshold lies in an ignore region. A language model gives
    no confidences: all are equal, and COCO breaks the tie by order - images as they come, boxes as they are
    written. So this AP depends on the order of the answer.
    """
    hits, n_truth, by_target = defaultdict(list), Counter(), []
    for pred, truth, ignore, target in images:
        n_truth[target] += len(truth)
        overlaps, ignored = box_iou(pred, truth), box_iou(pred, ignore, of_first=True)
        for overlap, shares in zip(overlaps[:100], ignored):
            if overlap.max(initial=0) >= iou_threshold - 1e-9:  # so that rounding does not decide
                overlaps[:, overlap.argmax()] = 0  # this truth is taken
                hits[target].append(1)
            elif shares.max(initial=0) < iou_threshold:
                hits[target].append(0)
    for target, n in (+n_truth).items():  # those above 0
        tp = np.cumsum(hits[target])
        precision = tp / np.arange(1, len(tp) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or any higher one
        at = np.searchsorted(tp / n, np.linspace(0, 1, 101), side="left")
        by_target.append(np.append(best, 0.0)[at].mean())
    return np.mean(by_target) if by_target else np.nan


def detection_figures(images):
    """[(answer, truth, ignore, target)] of all images -> dict of figures; the README defines each."""
    counts = np.array([image_counts(*image) for image in images], float)
    tp, n_pred, n_truth, n_crowded, n_found = counts[:, :5].sum(axis=0)
    jaccard = counts[~np.isnan(counts[:, 5]), 5]
    aps = [average_precision(images, iou) for iou in np.linspace(0.5, 0.95, 10)]
    return {
        "precision": share(tp, n_pred), "recall": share(tp, n_truth), "f1": share(2 * tp, n_pred + n_truth),
        "jaccard": share(jaccard.sum(), len(jaccard)), "ap": np.mean(aps), "ap50": aps[0], "ap70": aps[4],
        "crowded_recall": share(n_found, n_crowded), "count_mae": np.abs(counts[:, 1] - counts[:, 2]).mean(),
        "boxes_per_image": np.mean([len(pred) for pred, *_ in images]),
        "truth_boxes_per_image": n_truth / len(images),
    }


def grounding_figures(images):
    """The share of images whose one box reaches an IoU of 0.5, and the mean IoU."""
    ious = np.array([grounding_reward(pred, truth) for pred, truth, *_ in images])
    return {"acc_0.5": (ious >= 0.5).mean(), "mean_iou": ious.mean()}


def counting_figures(images):
    """Figures of the number of points, whose places may be unknown."""
    off = np.abs([len(pred) - len(truth) for pred, truth, *_ in images])
    return {"exact_count": (off == 0).mean(), "count_mae": off.mean()}


def ocr_figures(images):
    """Edit distance over the longer length."""
    return {"edit_distance": np.mean([1 - ocr_reward(pred, truth) for pred, truth, *_ in images])}


def images_of(records, entries, task):
    """Those of one task, as its figures want them -> [(answer, truth, ignore, target)]."""
    field, columns = TASKS[task].truth, TASKS[task].columns
    answer = lambda entry: np.reshape(entry[field], (-1, columns)) if columns else entry[field]
    return [(answer(entry), record["truth"], record["ignore"], record["target"])
            for record, entry in zip(records, entries) if record["task"] == task]


def figures_of(records, entries):
    """An entry of predictions.jsonl for each record -> dict of figures, by task if there are several."""
    figures, tasks = {}, sorted({record["task"] for record in records})
    for task in tasks:
        prefix = f"{task} " if len(tasks) > 1 else ""
        of_task = TASKS[task].figures(images_of(records, entries, task))
        figures |= {prefix + name: float(value) for name, value in of_task.items() if value == value}
    return figures


def as_prediction(response, text, prompt):
    """A completion as predictions.jsonl keeps it, rows in pixels of the original image. An answer that does
    not parse is an empty list; an inverted box, which matches nothing, becomes an empty one."""
    record, task, answer = prompt.record, prompt.task, response.answer
    if answer is None:
        answer = [] if task.columns else ""
    elif task.columns:
        rows = answer.clip(0, prompt.size * (task.columns // 2))
        rows[:, 2:] = np.maximum(rows[:, 2:], rows[:, : task.columns - 2])
        answer = rescaled(rows, prompt.size, (record["width"], record["height"])).round(2).tolist()
    return {"text": text, task.truth: answer}


def predict(policy, encoder, prompts, cfg):
    """Answer images once greedily, as the model would be used, and `--samples` times at temperature T, as it
    is trained. Yields the group of all answers, the greedy one first, and its line of predictions.jsonl.

    The greedy look is rewarded against the disagreement of the sampled answers: alone it has no siblings.
    """
    shape = (1 + cfg.samples, cfg.max_new_tokens)
    uniforms = torch.stack([draw_uniforms(cfg.seed, EVALUATION, p.index, shape) for p in prompts])
    uniforms[:, 0] = float("nan")
    groups = rollout(policy, encoder, prompts, uniforms)
    check_finite(groups, f"evaluating {cfg.model}")
    for group in groups:
        siblings = Group(group.prompt, [], texts=group.texts[1:])  # samples are rewarded as in training
        rewards = [*group_rewards(group, cfg.recall_weight)[:1], *group_rewards(siblings, cfg.recall_weight)]
        first, *rest = [as_prediction(*answer, group.prompt) for answer in zip(group.responses, group.texts)]
        for entry, row in zip((first, *rest), () if cfg.image else rewards):  # a picture's truth is unknown
            entry["rewards"] = [None if r != r else r for r in row.tolist()]  # JSON has no NaN
        about = {name: group.prompt.record[name] for name in ("image", "target", "task")}
        yield group, about | first | {"samples": rest}


def answered(policy, encoder, records, cfg, folder, pictures):
    """Answer images, shared out over the ranks -> a line for each; rank 0 writes them to predictions.jsonl
    in `folder`, where the first `pictures` images are drawn."""
    rank, world, lines = dist.get_rank(), dist.get_world_size(), {}
    mine, batch = range(rank, len(records), world), max(cfg.prompts_per_step // world, 1)
    plan = [mine[start : start + batch] for start in range(0, len(mine), batch)]
    for prompts in tqdm(read_ahead(encoder, records, plan), "answering", len(plan), disable=rank > 0):
        for group, line in predict(policy, encoder, prompts, cfg):
            lines[group.prompt.index] = line
            if group.prompt.index < pictures:
                draw_picture(group, Path(folder) / "pictures" / f"{group.prompt.index:06d}.png")
    by_rank = [None] * world
    dist.all_gather_object(by_rank, lines)
    lines = [by_rank[k % world][k] for k in range(len(records))]
    if rank == 0:
        with written_whole(Path(folder) / "predictions.jsonl") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return lines


def evaluate(policy, encoder, records, cfg, folder, pictures=8):
    """Answer held-out images; predictions.jsonl and the first pictures go to `folder` -> dict of figures: of
    the greedy answers and, `sampled_`, the F1 and the mean rewards of those at temperature T."""
    entries = answered(policy, encoder, records, cfg, folder, pictures)
    samples = [(record, sample) for record, entry in zip(records, entries) for sample in entry["samples"]]
    figures, tasks = figures_of(records, entries), {record["task"] for record in records}
    if samples and "f1" in figures:  # they all have one task
        images = images_of(*zip(*samples), *tasks)
        tp, n_pred, n_truth, *_ = np.sum([image_counts(*image) for image in images], axis=0)
        figures["sampled_f1"] = share(2 * tp, n_pred + n_truth)
    for prefix, answers in ("", entries), ("sampled_", [sample for _, sample in samples]):
        form, look, accuracy = np.reshape([answer["rewards"] for answer in answers], (-1, 3)).astype(float).T
        if answers:
            figures[prefix + "format_rate"] = (form > 0).mean()
            figures[prefix + "accuracy_reward"] = accuracy.mean()
        if samples and all("look" in TASKS[task].sections for task in tasks):
            figures[prefix + "look_reward"] = look.mean()
    return {name: float(value) for name, value in figures.items() if value == value}  # less the NaN


def load_predictions(path, records):
    """predictions.jsonl, ours or another tool's -> an answer to each record. A line has `image` and its
    task's answer, `target` and `task` where an image is asked several questions; nothing else is read. A
    question without a line is unanswered, and their number is printed."""
    waiting, answers = defaultdict(list), []
    for number, record in enumerate(records):
        waiting[record["image"]].append(number)
        task = TASKS[record["task"]]
        answers.append({task.truth: [] if task.columns else ""})

    def check(line):
        fits = [k for k in waiting[line["image"]]
                if all(line.get(name, records[k][name]) == records[k][name] for name in ("target", "task"))]
        if len({(records[k]["target"], records[k]["task"]) for k in fits}) != 1:
            raise ValueError(f"{len(fits)} questions of the data wait for an answer to {line['image']}: its "
                             "name and, where it is asked several, target and task must tell one")
        number, record = fits[0], records[fits[0]]
        size, task = (record["width"], record["height"]), TASKS[record["task"]]
        answer = line[task.truth]
        if task.columns:
            answer = check_rows(task.truth, answer, task.columns, *size, predicted=True)
        answers[number][task.truth] = answer
        waiting[line["image"]].remove(number)

    read_jsonl(path, check)
    if missing := sum(map(len, waiting.values())):
        print0(f"{path}: no line for {missing} of {len(records)} questions: they count as unanswered")
    return answers


def report(path, columns, about):
    """Print {name: figures} side by side, and write `about` as JSON."""
    print0(f"\n{'images evaluated':<32}" + "".join(f"{name:>15}" for name in columns))
    for figure in dict.fromkeys(figure for figures in columns.values() for figure in figures):
        cells = [f"{figures[figure]:.3f}" if figure in figures else "-" for figures in columns.values()]
        print0(f"{figure:<32}" + "".join(f"{cell:>15}" for cell in cells))
    if dist.get_rank() == 0:
        with written_whole(path) as file:
            json.dump(about, file, indent=2)


def picture_records(cfg):
    """The picture `--image`, or the pictures of that folder, as records of which no truth is known."""
    root, columns, records = Path(cfg.image), TASKS[cfg.method].columns, []
    truth = np.zeros((0, columns)) if columns else ""
    with reading("--target"):
        asked = {"target": check_text(cfg.target), "task": cfg.method, "ignore": [], "truth": truth}
    for path in sorted(root.iterdir()) if root.is_dir() else [root]:
        if path == root or path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            with reading(path):
                width, height = open_image(path).size
            records.append({"image": str(path), "path": str(path), "width": width, "height": height, **asked})
    if not records:
        raise SystemExit(f"--image {cfg.image}: no .jpg, .png or .webp in this folder")
    return records


def run_evaluation(cfg):
    """`--eval`, or `--predictions FILE` of any tool: print the table and write eval.json. `--image`: print
    each thought, and the number of boxes."""
    folder, source = Path(cfg.output_dir), cfg.predictions or cfg.model
    if cfg.image:
        records = picture_records(cfg)
        lines = answered(*setup(cfg), records, cfg, folder, pictures=len(records))
        for number, line in enumerate(lines):
            answer, thought = line[TASKS[line["task"]].truth], parse_response(line["text"]).think or ""
            found = repr(answer) if isinstance(answer, str) else f"{len(answer)} found"
            print0(f"{line['image']}: {found}. {' '.join(thought.split())}  (pictures/{number:06d}.png)")
        return print0(f"Written: {folder}/predictions.jsonl and pictures")
    records = load_records(cfg.data, cfg.method)
    if cfg.predictions:
        figures, written = figures_of(records, load_predictions(cfg.predictions, records)), ""
    else:
        check_images(records)
        figures, written = evaluate(*setup(cfg), records, cfg, folder), ", predictions.jsonl and pictures"
    about = {"source": source, "data": cfg.data, "images": len(records), **figures}
    report(folder / "eval.json", {Path(source).name: figures}, about)
    print0(f"\nWritten: {folder}/eval.json{written}")


# ------------------------------------------------------------------------------------------------------------
# Main: train, evaluate, answer a picture, or the demo


def train_phase(phase, policy, encoder, records, cfg, done, received):
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
    log, start, rank, world = Log(folder, done), done - first, dist.get_rank(), dist.get_world_size()
    plan = (batch_indices(len(records), batch, cfg.seed, k)[rank::world] for k in range(start, steps))
    bar = tqdm(read_ahead(encoder, records, plan), phase, steps, initial=start, disable=rank > 0)
    ended = time.perf_counter()
    for step, prompts in enumerate(bar, start):
        lr, number = learning_rate(step, steps, peak, cfg.warmup_steps), first + step + 1
        if phase == "sft":
            metrics, groups = sft_step(policy, optimizer, encoder, prompts, cfg, lr)
        else:
            metrics, groups = grpo_step(policy, reference, optimizer, encoder, prompts, cfg, step, lr)
        began, ended = ended, time.perf_counter()  # waiting for data, checkpoints and pictures count, too
        log.write(phase, number, metrics | {"seconds": ended - began}, bar)
        if phase == "grpo" and rank == 0 and cfg.picture_every and number % cfg.picture_every == 0:
            sheet = draw_picture(groups[0], folder / "pictures" / f"step-{number:06d}.png")
            if log.board:
                log.board.add_image("first prompt", np.asarray(sheet), number, dataformats="HWC")
        asked = int(over_ranks([max(received, default=0)], "MAX")[0])  # to stop, on any rank
        if asked or step + 1 == steps or cfg.save_every and number % cfg.save_every == 0:
            save_checkpoint(policy, encoder, optimizer, number, cfg)
        if asked:
            print0(f"\nstopped by {signal.Signals(asked).name}; go on with --resume")
            raise SystemExit(128 + asked)


def check_training(cfg, records):
    """SystemExit, before anything is loaded or written, if this run cannot do what it is asked to."""
    for name, steps in ("sft_batch", cfg.sft_steps), ("prompts_per_step", cfg.steps):
        if steps and getattr(cfg, name) % dist.get_world_size():
            raise SystemExit(f"--{name} {getattr(cfg, name)} cannot be shared out evenly over the processes")
    if cfg.steps + cfg.sft_steps == 0:
        raise SystemExit("--steps 0 and --sft_steps 0 train nothing: ask for some of either")
    if any(record["task"] == "counting" and np.isnan(record["truth"]).any() for record in records):
        raise SystemExit(f"{cfg.data} holds counts without points: they can be evaluated, not trained on")
    check_images(records)


def train(cfg):
    """SFT for `--sft_steps`, then GRPO for `--steps`, on --data -> cfg of the trained model.

    SIGTERM and Ctrl-C are noted until the step is done. A second Ctrl-C stops at once; a second SIGTERM does
    not, since scheduler and torchrun may both send one.
    """
    def note(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    records, received, last = load_records(cfg.data, cfg.method), [], cfg.sft_steps + cfg.steps
    check_training(cfg, records)
    folder, done = find_checkpoint(cfg) if cfg.resume else (None, 0)
    if over_ranks([done], "MIN") != over_ranks([done], "MAX"):  # and no rank writes before all have looked
        raise SystemExit(f"{cfg.output_dir}: not every process sees the same checkpoints. Is it shared?")
    if done < last:
        policy, encoder = setup(replace(cfg, model=str(folder or cfg.model)))
        policy = parallel(policy)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for phase, end in ("sft", cfg.sft_steps), ("grpo", last):
            if done < end:
                train_phase(phase, policy, encoder, records, cfg, done, received)
                done = end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    checkpoint = f"{cfg.output_dir}/checkpoint-{last:06d}"
    print0(f"\n{last} steps are done. Written: {checkpoint}, and beside it metrics.jsonl and pictures")
    return replace(cfg, model=checkpoint)


DEMO = dict(  # what `--demo` puts in place of the defaults; flags on the command line still win
    max_new_tokens=96, sft_steps=990, sft_lr=6.25e-6, sft_batch=16, steps=264, lr=3e-4, beta=0.07,
    freeze_vision=True, gradient_checkpointing=False, tokens_per_forward=2000, save_every=0)
PRETRAINING = dict(  # stands for what Qwen2.5-VL knows already
    sft_steps=3400, sft_lr=2e-3, steps=0, freeze_vision=False)
SCENES = {  # of each crowd: how many to train on, how many held out
    "sparse": (12_000, 150), "dense": (50, 150), "night": (0, 150)}
SHOWN = ("precision", "recall", "f1", "ap50", "crowded_recall", "boxes_per_image", "truth_boxes_per_image",
         "sampled_f1", "sampled_look_reward")


def pretrained(cfg):
    """Draw the scenes of all crowds, and pretrain a tiny model on the sparse ones -> cfg of the model. It
    learns the templates of both methods, so that both can go on from the same weights."""
    folder, both = Path(cfg.output_dir), Path(cfg.output_dir) / "sparse/both.jsonl"
    if dist.get_rank() == 0:
        for crowd, (n_train, n_held_out) in SCENES.items():
            data_prep.synthetic(folder / crowd, n_train, n_held_out, cfg.seed, crowd=crowd)
        data_prep.tiny(folder / "tiny", cfg.seed)
        lines = read_jsonl(folder / "sparse/train.jsonl", dict)
        with written_whole(both) as file:
            file.writelines(json.dumps(line | {"task": method}) + "\n"
                            for method in ("dip-r1", "perception-r1") for line in lines)
    dist.barrier()  # nothing is read before it is drawn
    start = dict(output_dir=f"{folder}/start", model=f"{folder}/tiny", data=str(both))
    return train(replace(cfg, **start, **PRETRAINING))


def evaluated(run, folder):
    """Evaluate run.model on the held-out scenes of each crowd in `folder` -> {crowd: figures}."""
    policy, encoder = setup(run)
    held_out = {crowd: load_records(folder / crowd / "val.jsonl", run.method) for crowd in SCENES}
    return {crowd: evaluate(policy, encoder, records, run, Path(run.output_dir) / crowd, pictures=4)
            for crowd, records in held_out.items()}


def draw_crowd(cfg, found):
    """Draw one held-out dense scene as each of the models answers it: the scene on which the F1 of all are
    closest to their F1 on the whole set."""
    folder, (_, encoder) = Path(cfg.output_dir), setup(cfg)
    records, off = load_records(folder / "dense/val.jsonl", cfg.method), 0
    entries = {name: read_jsonl(folder / name / "dense/predictions.jsonl", dict) for name in found}
    for name, figures in found.items():
        each = [detection_figures([image])["f1"] for image in images_of(records, entries[name], cfg.method)]
        off = off + abs(np.array(each) - figures["dense"]["f1"])
    chosen, sheets = int(np.nanargmin(off)), []
    for name, answers in entries.items():
        texts = [answers[chosen]["text"], *(sample["text"] for sample in answers[chosen]["samples"])]
        group = Group(encoder.prompt(chosen, records[chosen]), [], texts=texts)
        sheets.append(draw_picture(group, folder / name / "dense/pictures/crowd.png", f"{name}:"))
    Image.fromarray(np.vstack(sheets)).save(folder / "crowd.png")


def run_demo(cfg):
    """`--demo`, the paper's situation in miniature: a model that can see meets a crowd, with few labels.

    From one pretrained start SFT and `--method` train for the numbers of steps that take the same time on two
    cores of an AMD EPYC. As soon as each of the three is there, it answers held-out scenes: the sparse ones,
    which may be forgotten, the dense crowd, and a night that nobody was trained on.
    """
    began, folder, found = time.time(), Path(cfg.output_dir), {}
    if not (cfg.sft_steps and cfg.steps):
        raise SystemExit(f"--demo compares SFT and {cfg.method}: neither --sft_steps nor --steps may be 0")
    start = pretrained(cfg)
    cfg = replace(cfg, model=start.model, data=str(folder / "dense/train.jsonl"))
    for name, changes in {"start": {}, "sft": dict(steps=0), cfg.method: dict(sft_steps=0)}.items():
        run = train(replace(cfg, output_dir=f"{folder}/{name}", **changes)) if changes else start
        found[name] = evaluated(run, folder)
        columns = {name: {f"{crowd}: {figure}": figures[figure] for crowd, figures in by_crowd.items()
                          for figure in SHOWN if figure in figures} for name, by_crowd in found.items()}
        about = {"seed": cfg.seed, "seconds": round(time.time() - began), **found}
        report(folder / "summary.json", columns, about)
    if dist.get_rank() == 0:
        draw_crowd(cfg, found)
    seconds = about["seconds"]
    print0(f"\n{seconds} s. Written: {folder}/summary.json, crowd.png, each run's metrics and pictures")


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
    if cfg.method not in TASKS:
        raise SystemExit(f"--method {cfg.method} is none of {', '.join(TASKS)}")
    kind = "demo" if cfg.demo else "eval" if cfg.eval or cfg.predictions or cfg.image else "dipr1"
    return replace(cfg, output_dir=cfg.output_dir or f"runs/{kind}")


def main(argv=None):
    """The command line: every field of Config is a flag."""
    cfg = parse_flags(sys.argv[1:] if argv is None else argv)
    disable_progress_bar()
    join_processes(cfg)  # until then every process believes that it is rank 0
    answering = cfg.eval or cfg.predictions or cfg.image
    folder = Path(cfg.output_dir, "start" if cfg.demo else "")
    kept = [*folder.glob("checkpoint-??????"), *folder.glob("metrics.jsonl")]
    if not (answering or cfg.resume) and any(path.stat().st_size for path in kept):
        raise SystemExit(f"{cfg.output_dir} holds a run already: --resume it, or choose another --output_dir")
    try:
        (run_demo if cfg.demo else run_evaluation if answering else train)(cfg)
    except torch.OutOfMemoryError as error:
        raise SystemExit("out of memory. Go on with --resume and a lower --max_new_tokens, --max_pixels or "
                         "--tokens_per_forward; evaluate with a lower --prompts_per_step or --samples. "
                         f"PyTorch says: {error}") from None
    except OSError as error:  # a file or folder that cannot be made, read or written: the message names it
        raise SystemExit(f"{error}. If the disk is full, make room, then --resume") from None
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What can go wrong in DIP-R1, told as tests: `pytest test_dipr1.py`, on a laptop CPU, with a tiny model.

`python test_dipr1.py` times the naive way of these tests and ours, side by side.

Each clever thing in dipr1.py is held against an independent, naive way of computing the same.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if __name__ != "__main__" and "gpu" not in sys.argv:  # tests run on the CPU, unless `-m gpu` asks for a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, PngImagePlugin
from safetensors.torch import load_file, save
from scipy.io import savemat
from tokenizers import normalizers
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import data_prep
import dipr1
from dipr1 import Config, Group, Response

HERE = Path(__file__).parent
REAL = HERE.parent / "shared" / "real"  # real annotation files are not a part of the project
ONE, CROWD = [[0, 0, 10, 10]], [[10, 10, 30, 50], [25, 12, 45, 52], [50, 40, 70, 90], [75, 20, 95, 70]]
MIDDLES = [[20, 30], [35, 32], [60, 65], [85, 45]]  # of that crowd
METHODS = "dip-r1", "perception-r1"
TWO = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10]])
PERSON, OTHER = [0, 0, 28, 56], [56, 0, 84, 56]
NAN, INF = float("nan"), float("inf")
SCENARIOS = [dict(), dict(zero_odd=True, beta=0.0), dict(freeze_vision=True, tokens_per_forward=10_000),
             dict(num_iterations=2, gradient_checkpointing=True)]  # of training with two processes
IMAGE = (100, 80)  # width, height of the pictures that we make
replaced = functools.partial(mock.patch.multiple, dipr1)  # names of dipr1, for a while
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the real annotation files")


def completion(look="[[0, 0, 28, 28]]", answer="[[0, 0, 28, 56]]", think="two people"):
    return f"<think>{think}</think><look>{look}</look><answer>{answer}</answer>"


def boxes(*rows):
    return np.array(rows, float).reshape(-1, 4)


def random_boxes(rng, n, size=20):
    corners = rng.integers(0, size, (n, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1) + 1], axis=1).astype(float)


def prompt_of(task, truth=(), method="perception-r1", ignore=(), **fields):
    """What the rewards need of a prompt: an image of 100 x 100 pixels."""
    record = {"method": method, "task": task, "ignore_labels": []} | fields
    truth = truth if isinstance(truth, str) else np.array(truth, float)
    return SimpleNamespace(width=100, height=100, truth=truth, ignore=boxes(*ignore), record=record)


def judged(text, prompt):
    """The format and the answer reward of a completion."""
    form, _, answer = dipr1.group_rewards(Group(prompt, [], texts=[text]), 0.65)[0].tolist()
    return form, answer


def main(*flags):
    """The command line, in this process."""
    dipr1.main([str(flag) for flag in flags])


def write(path, *content):
    """Bytes or text as they are, anything else as JSON, a line each -> the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [part if isinstance(part, (bytes, str)) else json.dumps(part) for part in content]
    path.write_bytes(b"\n".join(part if isinstance(part, bytes) else part.encode() for part in texts))
    return path


def refused(said, call, *args, **options):
    """The call ends the program with one line, which matches."""
    with pytest.raises(SystemExit, match=said) as stop:
        call(*args, **options)
    assert type(stop.value.code) is str and "\n" not in stop.value.code


def read_lines(path):
    return data_prep.read_jsonl(path, dict)


def line_of(**fields):
    """A line of data, as data_prep.py writes it."""
    line = {"image": "x.png", "width": 50, "height": 50, "target": "person", "boxes": [], "ignore": []}
    return line | fields


# ------------------------------------------------------------------------------------------------------------
# Parsing: no completion crashes it, none gets more credit than it should, and right answers are understood


@pytest.mark.parametrize("text, labels", [
    ("[[1, 2, 3, 4], [5, 6, 7.5, 8]]", [None, None]),
    ("```json\n[[1e0,2,3,4.00000000000000000000],[5,6,75e-1,8]]```", [None, None]),
    ('```JSON [{"bbox_2d": [1, 2, 3, 4], "score": 0.9, "attributes": {"hidden": [true]}, "label": "a"},'
     '{"label": "b", "bbox_2d": [5, 6, 7.5, 8]}]```', ["a", "b"]),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": 7}, {"bbox_2d": [5, 6, 7.5, 8], "label": null}]', ["7", None]),
    (r'[{"bbox_2d": [1, 2, 3, 4], "label": "cafe\u0301"}, [5, 6, 7.5, 8]]', ["caf\u00e9", None]),
])
def test_what_models_write_is_understood_bare_in_qwens_form_and_fenced(text, labels):
    assert dipr1.parse_boxes(text).tolist() == [[1, 2, 3, 4], [5, 6, 7.5, 8]]
    assert dipr1.parse_response(completion(answer=text)).labels == labels
    assert dipr1.format_reward(completion(answer=text)) == dipr1.format_reward(completion(look=text)) == 1


@pytest.mark.parametrize("text", [
    "[[1, 2, 3]]", "[[1, 2, 3, 4, 5]]", "[[1, 2], [3, 4]]", "[1, 2]", "[[1, 2, 3, 4],]", "[[1, 2, 3, 4]] x",
    "[[1, 2, 3, NaN]]", "[[1e9, 2, 3, 4]]", "[-1e6, 2, 3, 4]", "[[1, 2, 3, true]]", '[[1, 2, 3, "4"]]',
    f"[[1, 2, 3, {'9' * 400}]]", f"[[1, 2, 3, {'9' * 200_000}]]", f"[[1.{'1' * 200_000}, 2, 3]]", "4",
    "[[[1, 2, 3, 4]]]", "[[1, 2, 3, 4], 5]", "[[__import__('os'), 2, 3, 4]]", '[{"bbox_2d": [1]}]',
    '[{"box": [1, 2, 3, 4]}]', '[{"bbox_2d": "1, 2, 3, 4"}]', "```json\n[[1, 2, 3, 4]]",
    *(piece * 20_000 for piece in ("[", '{"bbox_2d":', "[[1, 2, 3, 4", '{"bbox_2d": [1, 2, 3, 4]', "```json",
                                   '[{"label": "', "<answer>", "<look>", "\0", "e\u0301\u0323", "\ud800")),
    "[" * 100_000 + "]" * 100_000, "[[1" + " " * 100_000 + "," + " " * 100_000 + "2",
    '[{"label": "' + "x" * 200_000, '[{"label": "' + '\\"' * 100_000,
], ids=lambda text: ascii(text[:20]))
def test_what_is_not_a_list_of_boxes_is_none_in_no_time(text):
    started = time.process_time()
    rewards = dipr1.format_reward(completion(answer=text)), dipr1.format_reward(completion(look=text))
    assert dipr1.parse_boxes(text) is None and rewards == (0, 0)
    assert time.process_time() - started < 0.3


def test_format_rewards_want_the_whole_template_and_nothing_else():
    good = completion()
    for text in (good, f"\n {good.replace('><', '> <')} \n", completion(look="[]", answer="[]")):
        assert dipr1.format_reward(text) == 1
    for bad in (good + "x", "x" + good, good.replace("</look>", "</look>x"), good + good, good[:-1],
                good.replace("look", "LOOK"), "<answer>[]</answer><look>[]</look><think>t</think>",
                completion(think="a <look>"), completion(think=" \n"), "",
                good.replace("<look>[[0, 0, 28, 28]]</look>", "")):
        assert dipr1.format_reward(bad) == 0, bad
    # A right answer in a broken frame is still read, but not an ambiguous one.
    assert dipr1.parse_response("hm <answer>[[1, 2, 3, 4]]</answer>").answer.tolist() == [[1, 2, 3, 4]]
    for text in ("<answer>[]</answer>" * 2, "</answer>[]<answer>", "<answer>[<look>]</answer>"):
        assert dipr1.parse_response(text).answer is None
    # Perception-R1's format is one or minus one.
    for text, rewards in ((f"<answer>{ONE}</answer>", (1, 1)), ("\n <answer>[]</answer> ", (1, 0)),
                          ("<answer>nobody</answer>", (-1, 0)), (str(ONE), (-1, 0)),
                          (f"<think>hm</think><answer>{ONE}</answer>", (-1, 1))):
        assert judged(text, prompt_of("detection", ONE)) == rewards, text
    for text, rewards in (("<answer>a</answer> b", (-1, 1)), ("a", (-1, 0)), ("</answer>a<answer>", (-1, 0))):
        assert judged(text, prompt_of("ocr", "a")) == rewards, text


@pytest.mark.slow
def test_a_hundred_thousand_mutated_completions_earn_finite_rewards_within_bounds():
    rng, malformed, earned = np.random.default_rng(0), 0, 0
    truth = boxes([10, 10, 40, 60], [30, 12, 70, 66])
    truths = {"grounding": truth[:1], "counting": truth[:, :2], "ocr": "[[12, 30]] and", "detection": truth}
    prompts = [prompt_of(task, truths[task], method, [[80, 0, 100, 30]]) for method, task in dipr1.TASKS]
    prompts += [prompt_of("detection", truth, method, labels=["a", "b"]) for method in METHODS]
    qwen = '[{"bbox_2d": [9, 11, 41, 58], "label": "a"}, {"bbox_2d": [31, 12, 69, 66], "label": "b"}]'
    whole = [completion(), completion(answer=qwen), completion(look="[]", answer=f"```json\n{qwen}\n```"),
             completion(look="[[5, 5, 80, 80]]", answer="[[10, 10, 40.5, 60], [30, 12, 70, 66]]")]
    tags = [f"<{slash}{name}>" for name in dipr1.SECTIONS for slash in ("", "/")]
    def mutated(text):
        """A few accidents: of pieces lost, repeated or replaced by a character, a tag or another piece."""
        for _ in range(rng.integers(1, 6)):
            a, b, c = sorted(rng.integers(0, len(text) + 1, 3))
            b = rng.choice([a, a + 1, b])
            others = ["", text[a:b] * 2, text[b:c], "9" * (c - b), *tags, *'0123456789-.,[]{}"<>/ \\\n\0é']
            text = text[:a] + others[rng.integers(len(others))] + text[b:]
        return text
    for number in range(12_500):
        prompt = prompts[number % len(prompts)]
        looks = prompt.record["method"] == "dip-r1"
        start = whole if looks else [text.partition("</look>")[2] for text in whole]
        texts = [mutated(start[rng.integers(4)]) for _ in range(8)]
        rewards = dipr1.group_rewards(Group(prompt, [], texts=texts), 0.65)
        assert rewards.shape == (8, 3) and bool((rewards <= 1).all()), texts
        assert bool((rewards >= torch.tensor([looks - 1, 0, 0])).all()), texts
        malformed += (rewards[:, 0] <= 0).sum().item()
        earned += (rewards[:, 2] > 0).sum().item()
    assert malformed > 50_000 and earned > 5_000, "the accidents should be bad, and not all fatal"


# ------------------------------------------------------------------------------------------------------------
# Boxes, rewards and loss: by hand, by brute force, and what known hacks earn


def test_iou_equals_counting_pixels_odd_boxes_overlap_nothing_and_crowds_are_chains_of_overlap():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 6), random_boxes(rng, 5)
    def pixels(box):
        return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}
    for of_first in (False, True):
        naive = [[len(p & q) / len(p if of_first else p | q) for q in map(pixels, b)] for p in map(pixels, a)]
        assert np.allclose(dipr1.box_iou(a, b, of_first), naive)
    odd = [[10, 10, 5, 5], [3, 3, 3, 9], [99, 99, 120, 120], [-50, -50, -9, -9]]  # inverted, empty, outside
    assert (dipr1.box_iou(odd, [[0, 0, 20, 20]]) == 0).all() and dipr1.box_iou([], a).shape == (0, 6)
    row = [[10 * k, 0, 10 * k + 16, 20] for k in (0, 1, 2)]  # the first and the third do not touch
    alone, pair = [200, 0, 210, 20], [[100, 0, 120, 20], [105, 5, 120, 25]]
    mixed = boxes(row[2], pair[1], alone, row[0], pair[0], row[1])
    assert dipr1.crowds(mixed).tolist() == [[0, 0, 36, 20], [100, 0, 120, 25]]
    assert len(dipr1.crowds(mixed[1:4])) == len(dipr1.crowds(boxes())) == 0


def test_matching_and_the_rewards_made_of_it_equal_trying_every_pairing():
    def best(worth):
        worth = worth if len(worth) <= len(worth.T) else worth.T
        pairings = itertools.permutations(range(worth.shape[1]), len(worth))
        return max(sum(row[j] for row, j in zip(worth, pairing)) for pairing in pairings)
    rng = np.random.default_rng(1)
    for n, m in rng.integers(1, 6, (200, 2)).tolist():
        points, places = rng.uniform(-20, 130, (n, 2)), rng.uniform(0, 100, (m, 2))
        far = np.array([[min(1, math.dist(p, q) / math.hypot(100, 80)) for q in places] for p in points])
        truth = random_boxes(rng, m)
        pred = np.concatenate([truth + rng.normal(0, 2, truth.shape), random_boxes(rng, n)])
        pred = rng.permutation(pred)[:n]
        iou = dipr1.box_iou(pred, truth)
        rows, cols, ious = dipr1.match_boxes(pred, truth)
        assert len(set(rows)) == len(rows) and len(set(cols)) == len(cols) and (ious >= 0.5).all()
        assert np.array_equal(ious, iou[rows, cols]) and np.isclose(ious.sum(), best(iou * (iou >= 0.5)))
        assert dipr1.detection_reward(pred, truth) == pytest.approx(best(iou) / max(n, m))
        assert dipr1.counting_reward(points, places, 100, 80) == pytest.approx(best(1 - far) / max(n, m))


@pytest.mark.parametrize("pred, gt, ignore, expected", [
    (TWO, TWO, None, 1), (TWO[:1], TWO, None, 0.25 + 0.75 / 2), (TWO, TWO[:1], None, 0.25 / 2 + 0.75),
    (boxes(), boxes(), None, 1), (boxes(), TWO, None, 0), (TWO, boxes(), None, 0),
    (np.repeat(TWO, 5, axis=0), TWO, None, 0.25 / 5 + 0.75),  # duplicates
    (boxes([0, 0, 30, 10]), TWO, None, 0),  # one box around everybody
    (boxes(*TWO, [900, 900, 950, 950], [9, 9, 3, 3]), TWO, None, 0.25 / 2 + 0.75),  # boxes nowhere count, too
    (TWO, TWO[:1], boxes([18, 0, 40, 40]), 1),  # the second lies in an ignore region
    (TWO, TWO[:1], boxes([26, 0, 40, 40]), 0.25 / 2 + 0.75),  # ... less than half of it
    (TWO, TWO, boxes([0, 0, 99, 99]), 1), (TWO, boxes(), boxes([0, 0, 99, 99]), 1),  # matched ones count
    (boxes([9, 9, 3, 3]), boxes(), boxes([0, 0, 99, 99]), 0),  # an inverted box lies nowhere
])
def test_accuracy_reward_by_hand(pred, gt, ignore, expected):
    assert dipr1.accuracy_reward(pred, gt, ignore, recall_weight=0.75) == pytest.approx(expected)


def test_equal_weights_reward_dropping_a_doubtful_box_and_the_default_does_not():
    """The known trap, on a box that is right in 35% of the cases while four of five others are."""
    gt, wrong = boxes(*[[20 * i, 0, 20 * i + 15, 40] for i in range(6)]), [500, 0, 515, 40]
    def gain(**w):
        without, right, missed = (dipr1.accuracy_reward(boxes(*gt[:4], wrong, *doubtful), gt, **w)
                                  for doubtful in ([], [gt[4]], [[600, 0, 615, 40]]))
        return 0.35 * right + 0.65 * missed - without
    assert gain(recall_weight=0.5) < 0 < gain()


def test_look_rewards_equal_the_definition_a_cell_and_a_completion_at_a_time():
    def count(boxes, x, y):
        return sum(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes)
    def naive(response, others):
        both = looks = unsure = 0.0
        for y, x in itertools.product(range(7, 56, 14), range(7, 84, 14)):
            u = min(1, 4 * np.var([count(other.answer, x, y) for other in others])) if len(others) > 1 else 0
            look = count(response.look, x, y) > 0
            both, looks, unsure = both + look * u, looks + look, unsure + u
        return 2 * both / (looks + unsure) if unsure else 0.0
    rng = np.random.default_rng(2)
    rows = lambda: None if rng.random() < 0.15 else random_boxes(rng, rng.integers(0, 4), 80)
    for _ in range(30):
        responses = [Response("t", rows(), rows(), True) for _ in range(rng.integers(2, 8))]
        for response, reward in zip(responses, dipr1.look_rewards(responses, 84, 56)):
            others = [other for other in responses if other is not response and other.answer is not None]
            assert reward == pytest.approx(0 if response.look is None else naive(response, others))


def test_dip_r1s_rewards_and_what_hacks_of_the_look_earn_by_hand():
    def rewards(*looks_and_answers):
        prompt = prompt_of("detection", [PERSON, [56, 0, 84, 100]], "dip-r1")
        texts = [completion(str(look), str(answer)) for look, answer in looks_and_answers]
        return dipr1.group_rewards(Group(prompt, [], texts=texts), 0.65)
    split = ([], [PERSON]), ([], [PERSON, OTHER])  # two completions that split over OTHER
    look = lambda regions: rewards((regions, []), *split)[0, 1].item()
    assert look([OTHER]) == look([OTHER] * 50) == 1  # the doubtful person; duplicates change nothing
    assert look([PERSON]) == look([]) == look(None) == 0  # all agree on that person
    assert look([[56, 0, 84, 28]]) == pytest.approx(2 * 4 / (4 + 8))
    assert look([[0, 0, 100, 100]]) == pytest.approx(2 * 8 / (49 + 8))  # the whole image: 0.28
    # Being the outlier does not manufacture what one is paid for: the others agree, there is nothing to find.
    assert rewards(([[84, 84, 98, 98]], [[84, 84, 98, 98]]), split[0], split[0])[0, 1] == 0
    # Format and accuracy; the third answer is clipped to the image, which makes it right.
    found = rewards(*split, ([], [PERSON, [56, 0, 84, 999]]), (None, [])).tolist()
    assert found == [[1, 0, pytest.approx(0.35 + 0.65 / 2)], [1, 0, 1], [1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("task, truth, answer, reward", [
    ("grounding", ONE, ONE, 1), ("grounding", ONE, "[0, 0, 10, 5]", 0.5), ("grounding", ONE, ONE * 2, 0),
    ("grounding", ONE, [], 0), ("grounding", ONE, '```\n{"bbox_2d": [0, 0, 10, 10], "label": "a"}```', 1),
    ("grounding", [[90, 90, 100, 100]], [[90, 90, 900, 900]], 1), ("grounding", ONE, [[0, 0, 99, 99]], 0.01),
    ("counting", [[0, 0]], [[100, 100]], 0), ("counting", [[0, 0]], [[9999, 0]], 0), ("counting", ONE, [], 0),
    ("counting", [[0, 0]], "[50, 50]", 0.5), ("counting", [[0, 0]], '{"point_2d": [0, 0], "label": "a"}', 1),
    ("counting", np.zeros((0, 2)), [], 1), ("counting", np.zeros((0, 2)), [[1, 1]], 0),
    ("counting", MIDDLES, [[50, 50]] * 4, 0.8),  # the weak spot of the definition: a right count, anywhere
    ("detection", CROWD, CROWD * 10, 0.1), ("detection", CROWD, [[0, 0, 100, 100]] * 4, 0.09),
    ("detection", boxes(), [], 1), ("detection", boxes(), ONE, 0), ("detection", ONE, [[10, 10, 0, 0]], 0),
    ("ocr", "kitten", " kitten\n", 1), ("ocr", "kitten", "sitting", 4 / 7), ("ocr", "kitten", "", 0),
    ("ocr", "", "", 1), ("ocr", "", "x", 0), ("ocr", "caf\u00e9", "cafe\u0301", 1),
    ("ocr", "cat", "cat " * 400, 3 / 1599), ("ocr", "<answer> a </answer>", "<answer> a </answer>", 1),
])
def test_answer_rewards_and_what_hacks_of_them_earn_by_hand(task, truth, answer, reward):
    form, earned = judged(f"<answer>{answer}</answer>", prompt_of(task, truth))
    assert form == 1 and earned == pytest.approx(reward, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_labels_that_differ_pair_nothing(method):
    truth, labels = [[0, 0, 10, 10], [50, 50, 60, 60]], ["dog", "cat"]
    def earned(rows, prompt=prompt_of("detection", truth, method, labels=labels)):
        text = completion(answer=json.dumps(rows))
        return judged(text if method == "dip-r1" else text.partition("</look>")[2], prompt)[1]
    rows = [{"bbox_2d": box, "label": label} for box, label in zip(truth, labels)]
    assert earned(rows) == earned(rows[::-1]) == 1
    assert earned([rows[0], rows[1] | {"label": "dog"}]) == earned([rows[0], truth[1]]) == 0.5
    assert earned([row | {"label": "bird"} for row in rows]) == earned(truth) == 0  # nobody's label; none
    empty = prompt_of("detection", boxes(), method, labels=[])
    assert earned([], empty) == 1 and earned("none", empty) == 0  # what does not parse is not the empty list
    ignoring = prompt_of("detection", truth, method, [[0, 0, 99, 99]], labels=labels, ignore_labels=["cat"])
    stray = {"bbox_2d": [20, 20, 30, 30], "label": "cat"}
    assert earned([*rows, stray], ignoring) == 1 > earned([*rows, stray | {"label": "dog"}], ignoring)


def test_levenshtein_equals_the_textbooks_recursion():
    @functools.cache
    def naive(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(naive(a[1:], b) + 1, naive(a, b[1:]) + 1, naive(a[1:], b[1:]) + (a[0] != b[0]))
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 5, 30) * 30:
        a, b = ("".join(rng.choice(list("abcé😀"), rng.integers(0, length + 1))) for _ in range(2))
        assert dipr1.levenshtein(a, b) == naive(a, b)


def test_advantages_equal_the_formula_and_vanish_where_all_agree():
    row = [0.0, 1.0, 2.0, 5.0]
    std = math.sqrt(sum((r - 2) ** 2 for r in row) / 3)
    advantages = dipr1.group_advantages(torch.tensor([row, [0.1] * 4], dtype=torch.float64))
    assert advantages[0].tolist() == pytest.approx([(r - 2) / (std + 1e-4) for r in row], abs=1e-12)
    for value in (0.1, 1 / 3, 0.7, 1e9):
        assert (dipr1.group_advantages(torch.full((3, 7), value)) == 0).all()  # exactly, not rounding


@pytest.mark.parametrize("with_kl", [False, True])
def test_loss_and_gradient_equal_the_formula(with_kl):
    """A token at a time, in double precision, and its slope by differences."""
    def naive(lp, lo, lr, a, eps=0.2, beta=0.3):
        rho, d = math.exp(lp - lo), lr - lp if with_kl else 0
        return -min(rho * a, min(max(rho, 1 - eps), 1 + eps) * a) + beta * (math.exp(d) - d - 1)
    ratios = [0.5, 0.79, 0.9, 1.0, 1.1, 1.21, 2.0]  # inside and outside the clip
    old = torch.full((14,), -1.3, dtype=torch.float64)
    logp = (old + torch.tensor(ratios * 2, dtype=torch.float64).log()).requires_grad_()
    ref = old + torch.linspace(-2, 2, 14, dtype=torch.float64)
    advantage = torch.tensor([1.7] * 7 + [-0.6] * 7, dtype=torch.float64)
    loss, stats = dipr1.grpo_loss(logp, old, ref if with_kl else None, advantage, clip_eps=0.2, beta=0.3)
    loss.backward()
    tokens = list(zip(logp.tolist(), *(x.tolist() for x in (old, ref, advantage))))
    slopes = [(naive(lp + 1e-6, *others) - naive(lp - 1e-6, *others)) / 2e-6 / 14 for lp, *others in tokens]
    assert loss.item() == pytest.approx(np.mean([naive(*token) for token in tokens]), abs=1e-12)
    assert logp.grad.tolist() == pytest.approx(slopes, abs=1e-8)
    assert stats["clip_fraction"] == pytest.approx(4 / 14)  # 1.21, 2.0 where A > 0; 0.5, 0.79 where A < 0
    for far in (-1e4, 1e4):  # a token that a policy has abandoned gives a large number, not infinity
        loss, _ = dipr1.grpo_loss(logp, logp.detach() + far, ref + far, advantage, 0.2, 0.04)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()


# ------------------------------------------------------------------------------------------------------------
# The model: a packed group against the plain way


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny Qwen2.5-VL on disk with six images of several sizes: (folder of the model, JSONL)."""
    folder = tmp_path_factory.mktemp("tiny")
    data_prep.tiny(folder / "model", texts=[dipr1.CHAT, *(task.question for task in dipr1.TASKS.values())])
    rng, records = np.random.default_rng(0), []
    sizes = [(112, 112), (168, 84), (70, 150), (112, 112), (300, 40), (56, 56)]
    for number, (width, height) in enumerate(sizes):
        image = folder / f"{number}.png"
        people = [[5, 5, 30, 35], [20, 10, 45, 38], [1, 1, 9, 12]][: number % 4]
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(image)
        records.append(line_of(image=str(image), width=width, height=height, boxes=people))
    return folder / "model", write(folder / "train.jsonl", *records)


def load(tiny, eos=0.0, gradient_checkpointing=False, **options):
    """A fresh (policy, encoder, prompts); with `eos` above 0 it writes its second EOS now and then."""
    cfg = Config(model=str(tiny[0]), gradient_checkpointing=gradient_checkpointing, **options)
    policy, encoder = dipr1.setup(cfg)
    noise = torch.randn(128, generator=torch.Generator().manual_seed(0)).to(encoder.device)
    policy.model.lm_head.weight.data[encoder.eos[1]] += eos * noise
    prompts = [encoder.prompt(*pair) for pair in enumerate(dipr1.load_records(tiny[1]))]
    return policy, encoder, [prompt.to(encoder.device) for prompt in prompts]


def random_group(prompt, lengths=(5, 9, 1, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Group(prompt, [torch.randint(300, 400, (n,), generator=generator) for n in lengths])


def plain(policy):
    """A copy of the policy that attends as transformers has it."""
    policy = copy.deepcopy(policy)
    policy.model.model.language_model.set_attn_implementation("sdpa")
    return policy


def plain_logits(policy, prompt, completions, keep):
    """What a careful user of transformers writes: a padded row a completion, each with a copy of the image ->
    (G, keep, V) log-softmax of the last columns."""
    longest, G = max(map(len, completions)), len(completions)
    ids = torch.stack([torch.cat([prompt.ids, o, o.new_zeros(longest - len(o))]) for o in completions])
    lengths = torch.tensor([[len(prompt.ids) + len(o)] for o in completions], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths
    logits = policy.model(
        input_ids=ids, attention_mask=mask.long(), use_cache=False,
        pixel_values=prompt.pixels.repeat(G, 1), image_grid_thw=prompt.grid.repeat(G, 1),
        mm_token_type_ids=(ids == policy.model.config.image_token_id).int(), logits_to_keep=keep,
    ).logits.float() / policy.temperature
    logits[..., policy.forbidden < 0] = -float("inf")
    return logits.log_softmax(-1)


def plain_logprobs(policy, group):
    logp = plain_logits(policy, group.prompt, group.completions, max(map(len, group.completions)) + 1)
    return torch.cat([logp[i, torch.arange(len(o)), o] for i, o in enumerate(group.completions)])


@pytest.mark.parametrize("temperature, checkpointing", [(1.0, False), (0.7, True)])
def test_packed_groups_equal_one_padded_forward_a_completion(tiny, temperature, checkpointing):
    """For prompts of several lengths with 1 to 5 completions; the softmax is computed in three chunks."""
    policy, _, prompts = load(tiny, temperature=temperature, gradient_checkpointing=checkpointing)
    naive = plain(policy.train())
    lengths = {2: (5, 9, 1, 7), 1: (3, 12), 5: (40,), 0: (2, 2, 2, 2, 2)}
    groups = [random_group(prompts[k], lengths[k], seed=k) for k in lengths]
    weight = torch.linspace(-1, 1, sum(group.n_tokens for group in groups))
    with replaced(token_logprobs=functools.partial(dipr1.token_logprobs, chunk=32)):
        packed = torch.cat(policy(groups))
    (packed * weight).mean().backward()
    padded = torch.cat([plain_logprobs(naive, group) for group in groups])
    (padded * weight).mean().backward()
    assert torch.allclose(packed, padded, atol=1e-5)
    groups[0].completions[0] += 7  # whose siblings do not see it
    changed = torch.cat(policy(groups))
    assert torch.equal(changed[5:], packed[5:]) and not torch.equal(changed[:5], packed[:5])
    for (name, ours), parameter in zip(policy.named_parameters(), naive.parameters()):
        assert torch.allclose(ours.grad, parameter.grad, atol=1e-5, rtol=1e-4), name
        assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name, name


def test_a_prompt_is_the_checkpoints_template_in_three_dimensions_and_boxes_are_scaled_along_each_axis(tiny):
    """Without token types transformers silently counts 0, 1, 2, ... through the picture."""
    _, encoder, prompts = load(tiny)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "who?"}]}]
    chat, shipped = dipr1.CHAT.format(question="who?"), REAL / "qwen2.5-vl-3b/chat_template.jinja"
    if shipped.exists():
        assert chat == encoder.tokenizer.apply_chat_template(
            messages, chat_template=shipped.read_text(), tokenize=False, add_generation_prompt=True)
    seen = chat.replace("<|image_pad|>", "<|image_pad|>" * 6)  # 4 x 6 patches are 2 x 3 tokens
    ids, positions = encoder.chat("who?", 4, 6)
    assert ids.tolist() == encoder.tokenizer(seen, add_special_tokens=False).input_ids
    # A thread reads prompts while targets are written: no tokenizer may be switched to and fro between them.
    assert len(encoder.tokens("<|im_end|>", special=True)) == 1 < len(encoder.tokens("<|im_end|>"))
    assert not encoder.tokenizer.backend_tokenizer.encode_special_tokens
    _, row, column = positions[:, ids == encoder.image_token]
    assert (row - row[0]).tolist() == [0, 0, 0, 1, 1, 1] and (column - column[0]).tolist() == [0, 1, 2] * 2
    grid, size = torch.tensor([[1, 728 // 14, 1316 // 14]]), (1920, 1080)
    there = dipr1.to_model_space([[0, 0, 1920, 1080], [960, 540, 1920, 1080]], size, grid)
    assert there.tolist() == [[0, 0, 1316, 728], [658, 364, 1316, 728]]
    assert np.allclose(dipr1.to_image_space(there, size, grid), [[0, 0, 1920, 1080], [960, 540, 1920, 1080]])
    assert dipr1.to_model_space([[960, 540]], size, grid).tolist() == [[658, 364]]  # a point
    for prompt in prompts:  # boxes are scaled to the size that the tower sees
        assert prompt.grid.tolist() == [[1, prompt.height // 14, prompt.width // 14]]
        assert len(prompt.pixels) == prompt.grid.prod() == 4 * (prompt.ids == encoder.image_token).sum()
    assert np.allclose(prompts[2].truth / np.tile([56 / 70, 140 / 150], 2), prompts[2].record["boxes"])


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])  # Qwen's tokenizer has the second
def test_the_truths_own_target_earns_everything_for_every_task_and_any_string(tiny, tmp_path, normalizer):
    """Through file, tokenizer and parser; and no string becomes a special token."""
    _, encoder, _ = load(tiny)
    encoder.tokenizer.backend_tokenizer.normalizer = normalizer
    rng, image = np.random.default_rng(0), Image.new("RGB", (112, 112))  # so large that nothing is resized
    odd = ["人", "café", "cafe\u0301", "a\tb", "\\", '"A"', "{A}", "<look>", "</look>", "</answer>",
           "<answer>", "", "<|im_end|>", "<|image_pad|>", " x ", "null", "[]", "```", "{target}", "\u2028"]
    odd += ["\0", "\u0338", "\n\u0303", "<\u0301"]  # accents may join a tag's >, an escape's n or its c
    letters = [range(0x250), range(0x300, 0x370), range(0x5D0, 0x6FF), range(0x4E00, 0x4F00)]
    letters = [*map(chr, itertools.chain(*letters)), *odd, *'<>\\"{}人😀\u1100\u1161\u200d']
    strings, texts = odd + ["".join(rng.choice(letters, 8)) for _ in range(60)], []
    for (method, task), text in itertools.product(dipr1.TASKS, strings):
        corners = rng.integers(0, 60, (1 if task == "grounding" else len(texts) % 5, 2))
        rows = np.hstack([corners, corners + rng.integers(20, 52, corners.shape)]).tolist()
        line = line_of(width=112, height=112, method=method, task=task, target=text, boxes=rows,
                       points=corners.tolist(), transcript=text)
        line |= {"labels": [text, "person", text * 2, "a"][: len(rows)]} if task == "detection" else {}
        texts.append(json.dumps(line, ensure_ascii=len(texts) % 3 == 0))
    for index, record in enumerate(dipr1.load_records(write(tmp_path / "odd.jsonl", *texts))):
        prompt, task = encoder.prompt(index, record, image), record["task"]
        question, target = encoder.tokenizer.decode(prompt.ids), encoder.target(index, record)
        assert (prompt.ids == encoder.image_token).sum() == 16  # no string adds a placeholder
        assert torch.isin(target, torch.tensor(encoder.eos)).tolist() == [False] * (len(target) - 1) + [True]
        assert record["target"] in question or task == "ocr"
        assert ('"label": its name' in question) == ("labels" in record)
        assert ("[] means none" in question) == (task in ("detection", "counting"))
        if normalizer and task == "ocr" and record["transcript"][:1] == "\u0338":
            continue  # it strikes through the > of the tag: Unicode makes one character of the two
        group = Group(prompt, [target], texts=[encoder.decode(target)])
        assert dipr1.group_rewards(group, 0.65).tolist() == [[1, 0, 1]], (record, group.texts)


# ------------------------------------------------------------------------------------------------------------
# Rollout: what is sampled is what is scored


def sampled(policy, encoder, prompts, G, length, seed=0, step=0):
    uniforms = torch.stack([dipr1.draw_uniforms(seed, step, p.index, (G, length)) for p in prompts])
    return dipr1.rollout(policy, encoder, prompts, uniforms)


@pytest.mark.parametrize("frozen, greedy", [(False, False), (True, False), (False, True)])
def test_the_rollout_is_scored_as_sampled_and_equals_a_naive_loop_token_for_token(tiny, frozen, greedy):
    """The loop has no cache, shared prompt, dropped rows or decoder of our own: it computes the whole row,
    image and all, anew for every token. A completion ends with its first EOS, one of two."""
    policy, encoder, prompts = load(tiny, eos=0.4, temperature=0.9, freeze_vision=frozen)
    naive, prompts, lengths, n = plain(policy), prompts[1:3], [], 40
    if frozen:
        prompts = [dataclasses.replace(p, features=seen) for p, seen in zip(prompts, policy.see(prompts))]
    likeliest = torch.full((len(prompts), 1, n), NAN)
    groups = (dipr1.rollout(policy, encoder, prompts, likeliest) if greedy
              else sampled(policy, encoder, prompts, 4, n))
    with torch.no_grad():
        for group, logp in zip(groups, policy(groups)):
            assert torch.allclose(group.rollout_logp, logp, atol=1e-4)
        for group, row in itertools.product(groups, range(1 if greedy else 4)):
            uniforms, written = dipr1.draw_uniforms(0, 0, group.prompt.index, (4, n))[row], []
            while len(written) < n and not set(written) & set(encoder.eos):
                so_far = torch.tensor(written, dtype=torch.long)
                logp = plain_logits(naive, group.prompt, [so_far], 1)[0].clamp(min=-1e4)
                token = logp.argmax() if greedy else dipr1.inverse_cdf(logp, uniforms[len(written)][None])
                written.append(token.item())
            assert group.completions[row].tolist() == written
            lengths.append(len(written))
    assert len(encoder.eos) == 2 and len(group.completions) == row + 1
    assert greedy or sorted(lengths)[3] < n == max(lengths)  # half of the rows were dropped
    draws = [dipr1.draw_uniforms(*key, (2, 3)) for key in ((5, 3, 0), (6, 3, 0), (5, 4, 0), (5, 3, 1))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2)), "seed, step and prompt"


def test_inverse_cdf_draws_the_distribution_and_never_an_impossible_token():
    p = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    drawn = dipr1.inverse_cdf(p.log().clamp(min=-1e4).expand(8000, -1), torch.arange(8000) / 8000)
    assert torch.allclose(torch.bincount(drawn, minlength=6) / 8000, p, atol=1e-3)
    logits = torch.randn(500, 3000, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, :100] = logits[:, 2000:] = -1e4
    for uniform in (0.0, 1 - 2**-24):  # the smallest and the largest number that is drawn
        drawn = dipr1.inverse_cdf(logits.log_softmax(-1), torch.full((500,), uniform))
        assert 100 <= drawn.min() and drawn.max() < 2000


def test_placeholders_are_never_sampled_and_other_special_tokens_break_the_format(tiny):
    """The policy may love <|image_pad|>: neither sampler nor scorer gives it a chance."""
    policy, encoder, prompts = load(tiny)
    policy.model.lm_head.weight.data[encoder.image_token] *= 1000  # dwarfs all others, or is dwarfed
    groups = sampled(policy, encoder, prompts[:2], 4, 20)
    assert encoder.image_token not in torch.cat([o for group in groups for o in group.completions])
    hidden, every = torch.randn(1, 128), torch.arange(len(policy.forbidden))
    scored = dipr1.token_logprobs(*policy.head(hidden.expand(len(every), -1)), every).exp()
    assert scored.sum().item() == pytest.approx(1, abs=1e-5) and (scored[policy.forbidden < 0] == 0).all()
    names = encoder.tokenizer.convert_ids_to_tokens(torch.where(policy.forbidden < 0)[0].tolist())
    assert set(names) == {f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    ids, stray, eos = encoder.tokens(completion()), encoder.tokens("<|im_start|>", special=True), encoder.eos
    for rest, reward in (([], 1), (eos[:1], 1), (eos[1:], 1), (stray, 0), (stray + eos[:1], 0), (eos, 0)):
        assert dipr1.format_reward(encoder.decode(torch.tensor(ids + rest))) == reward


@pytest.mark.parametrize("refuse", [False, True])
def test_a_captured_step_answers_as_the_step_itself(monkeypatch, refuse):
    """CUDA's part is played: what is recorded is not run, a replay runs it on the same memory. Where a step
    cannot be recorded there is a warning."""
    graph = mock.Mock()
    def step(*places):
        result = sum(places)
        if graph.capture_begin.called and not graph.capture_end.called:
            if refuse:
                raise RuntimeError("operation not permitted when stream is capturing")
            result = torch.full((2,), NAN)
            graph.replay = lambda: result.copy_(sum(places))
        return result
    monkeypatch.setattr(torch, "cuda", mock.MagicMock(CUDAGraph=lambda: graph))
    inputs = torch.ones(2), torch.arange(2.0)
    with pytest.warns(UserWarning, match="not captured as a CUDA") if refuse else contextlib.nullcontext():
        run = dipr1.captured(step, *inputs)
    graph.capture_begin.assert_called_once_with(capture_error_mode="thread_local")
    for others in (inputs, (torch.ones(2), torch.ones(2)), inputs):
        assert torch.equal(run(*others), sum(others))
    assert graph.capture_end.called and inputs[1].tolist() == [0, 1]


# ------------------------------------------------------------------------------------------------------------
# Credit, targets, data, training steps


def test_the_look_reward_reaches_exactly_the_tokens_up_to_its_closing_tag(tiny):
    _, encoder, prompts = load(tiny)
    texts = [completion(look="[[0, 0, 28, 28]]"), completion(look="[]"), "never closes <look>"]
    tokens = [torch.tensor(encoder.tokens(text)) for text in texts]
    for o, text in zip(tokens, texts):
        n = encoder.look_length(o)
        assert "</look>" not in encoder.tokenizer.decode(o[: n - 1])
        assert ("</look>" in encoder.tokenizer.decode(o[:n])) == ("</look>" in text)
    group, n = Group(prompts[0], tokens, texts=texts), encoder.look_length(tokens[0])
    only_looks_differ = torch.tensor([[[1, 0.9, 0.5], [1, 0, 0.5], [1, 0.2, 0.5]]], dtype=torch.float64)
    ours, plain = (dipr1.token_advantages(encoder, [group], only_looks_differ, Config(look_credit=credit))[0]
                   for credit in ("section", "completion"))
    assert (ours[:n] > 0).all() and (ours[n : len(tokens[0])] == 0).all()
    assert (plain[: len(tokens[0])] == ours[0]).all()


def test_the_supervised_look_is_weak():
    """Around the two of three people who overlap, three times in four; as often as not somewhere else too."""
    truth, crowd = boxes([5, 5, 30, 35], [20, 10, 45, 38], [80, 80, 90, 99]), [5, 5, 45, 38]
    looks = [dipr1.weak_look(truth, 112, 56, seed) for seed in range(1000)]
    kept = [crowd in look.tolist() for look in looks]
    extra = [[box for box in look.tolist() if box != crowd] for look in looks]
    counts = [len(boxes) for boxes in extra]
    assert 0.7 < np.mean(kept) < 0.8 and 0.45 < np.mean(counts) < 0.55
    assert abs(np.corrcoef(kept, counts)[0, 1]) < 0.1
    assert all(0 <= x1 < x2 <= 112 and 0 <= y1 < y2 <= 56 for x1, y1, x2, y2 in itertools.chain(*extra))


def test_every_epoch_takes_each_record_once_in_an_order_of_its_own_and_the_rate_decays_to_zero():
    steps = [dipr1.batch_indices(10, 4, seed=0, step=s) for s in range(5)]  # the third step spans two epochs
    order = list(itertools.chain(*steps))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert steps[3] == dipr1.batch_indices(10, 4, 0, 3) != dipr1.batch_indices(10, 4, 1, 3)
    assert len(dipr1.batch_indices(3, 8, seed=0, step=0)) == 8  # fewer records than a batch holds
    rates = [dipr1.learning_rate(step, 10, 2.0, 4) for step in range(11)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4:] == sorted(rates[4:])[::-1] and rates[10] == 0
    assert dipr1.learning_rate(0, 3, 2.0, 10) > 0, "a run shorter than its warm-up learns as well"


@pytest.mark.parametrize("line, said", [
    ("{", "Expecting"), ("[]", "object is expected, not .."), ('{"image": "x.png"}', "no 'width'"),
    ("\xff", "utf-8"), ('{"a": ' + "[" * 100_000, "RecursionError"), ('{"a": ' + "9" * 5000 + "}", "digits"),
    *[(json.dumps(line_of(**fields)), said) for fields, said in [
        ({"boxes": [[1, 2, 3, 4], [1, 2, 3]]}, r"boxes, row 2: \[1, 2, 3\] is not 4 numbers below a million"),
        ({"boxes": [[1, 2, NAN, 4]]}, "below a million"), ({"boxes": "1234"}, "a list of"),
        ({"boxes": [[3, 9, 8, 4]]}, "y1 < y2"), ({"boxes": [[-2, 2, 9, 4]]}, "outside"),
        ({"boxes": [[50, 9, 50.5, 14]]}, "x1 < x2"), ({"boxes": [[1, 2, 52, 4]]}, "outside the 50 x 50"),
        ({"points": [[20, 51.5]]}, "outside"), ({"ignore": [[1]]}, "ignore, row 1"),
        ({"boxes": [[0.1, 0.2, 0.5, 1], [0, 0, 1, 1]]}, "fractions"), ({"target": None}, "a text"),
        ({"width": 0}, "width and height"), ({"width": "50"}, "width and height"), ({"image": 3}, "operand"),
        ({"width": 10_100}, "10100 x 50 pixels: a ratio above 200"), ({"points": [], "count": 2}, "0 points"),
        ({"count": "5"}, "count is '5'"), ({"count": -1}, "count is -1"), ({"target": "\ud800"}, "surrogate"),
        ({"task": "singing"}, "singing"), ({"boxes": [[1, 2, 3, 4]], "labels": []}, "0 labels for 1 boxes"),
        ({"ignore": [[1, 2, 3, 4]], "labels": []}, "0 ignore_labels for 1 ignore"),
        ({"method": "perception-r1", "task": "grounding"}, "one box"),
        ({"method": "perception-r1", "task": "ocr", "transcript": "a", "labels": []}, "labels are of boxes"),
        ({"method": "perception-r1", "task": "ocr", "transcript": ["a"]}, "a text is e"),
        ({"method": "perception-r1", "task": "counting", "points": [[1, 2, 3, 4]]}, "points, row 1")]],
], ids=lambda text: ascii(text[-40:]))
def test_a_malformed_line_is_named_with_its_number_and_what_is_wrong(tmp_path, line, said):
    path = write(tmp_path / "d.jsonl", line_of(), "", line.encode("latin-1"))
    refused(f"d.jsonl, line 3: .*{said}", dipr1.load_records, path)


def test_a_line_ends_at_a_line_feed_may_hold_any_character_and_a_box_may_overhang_by_a_pixel(tmp_path):
    line = line_of(target="a\u2028b\x85c e\u0301", boxes=[[-1, 2, 51, 50], [0, 0, 1, 1]], points=[[50.5, 3]],
                   ignore=[[0, 0, 9, 9]], labels=["d\u2029", "e"], ignore_labels=["d"])
    text = json.dumps(line, ensure_ascii=False)
    first, second = dipr1.load_records(write(tmp_path / "d.jsonl", f"\ufeff{text}\r\n \r\n{text}"))
    assert first["target"] == second["target"] == "a\u2028b\x85c \xe9" and first["labels"][0] == "d\u2029"
    assert first["boxes"].tolist() == [[0, 2, 50, 50], [0, 0, 1, 1]] and first["points"].tolist() == [[50, 3]]
    assert first["path"] == str(tmp_path / "x.png")
    refused("gone: No such file", read_lines, tmp_path / "gone")


def test_an_image_that_is_lost_while_training_weighs_nothing_and_many_stop_the_run(tiny, tmp_path, capsys):
    lines, encoder = read_lines(tiny[1]) * 40, load(tiny)[1]
    write(tmp_path / "cut.png", Path(lines[1]["image"]).read_bytes()[:-400])
    lines[1] = lines[1] | {"image": "cut.png"}
    records = dipr1.load_records(write(tmp_path / "train.jsonl", *lines))
    plan = [dipr1.batch_indices(240, 24, 0, step) for step in range(10)]
    prompts = list(itertools.chain(*dipr1.read_ahead(encoder, records, plan)))
    (lost,) = [prompt for prompt in prompts if prompt.weight == 0]
    assert lost.index == 1 and "cut.png: no longer readable" in capsys.readouterr().err
    for record in records[:3]:
        record["path"] = "gone.png"
    refused("more than 1% of the images", list, dipr1.read_ahead(encoder, records, plan))


def step_config(**options):
    small = dict(prompts_per_step=4, group_size=3, max_new_tokens=12, tokens_per_forward=1, lr=1e-4)
    return Config(**{**small, "gradient_checkpointing": False, **options})


def rewards_by_index(zero_odd=False):
    """Random rewards, a function of the prompt; all equal for odd prompts if so asked."""
    def rewards(group, recall_weight):
        drawn = np.random.default_rng(group.prompt.index).random((len(group.completions), 3))
        return torch.from_numpy(np.full_like(drawn, 0.5) if zero_odd and group.prompt.index % 2 else drawn)
    return rewards


def three_steps(tiny, rank, world, zero_odd=False, **options):
    """Weights after three GRPO steps on four prompts, of which this rank takes every world-th. A rank whose
    prompts are the odd ones has zero advantage throughout where `zero_odd`."""
    cfg, (policy, encoder, prompts) = step_config(**options), load(tiny, **options)
    reference, parallel = load(tiny)[0].eval() if cfg.beta else None, dipr1.parallel(policy)
    optimizer = dipr1.make_optimizer(parallel)
    with replaced(group_rewards=rewards_by_index(zero_odd)):
        for step in range(3):
            dipr1.grpo_step(parallel, reference, optimizer, encoder, prompts[rank:4:world], cfg, step, cfg.lr)
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def worker(rank, tiny, folder):
    """One of two processes: updates with loss = factor * mean log p + term, then the scenarios."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    policy, _, prompts = load(tiny)
    optimizer = dipr1.make_optimizer(parallel := dipr1.parallel(policy))
    one, other = (1.0, INF if rank else 0.0), (NAN if rank else 1.0, 0.0)
    for (factor, term), skipped in ((one, True), (other, True), ((1.0, 0.0), False)):
        before = copy.deepcopy(policy.state_dict())
        with replaced(grpo_loss=lambda logp, *_: (logp.mean() * factor + term, {"kl": 0.0})):
            metrics = dipr1.update(parallel, optimizer, [random_group(prompts[0])], Config(), 1e-3)
        moved = not all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        assert metrics["skipped"] == skipped != moved, "both skip"
    torch.save([three_steps(tiny, rank, 2, **scenario) for scenario in SCENARIOS], f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_end_with_the_weights_of_one(tiny, tmp_path):
    """Also where one rank's groups all have zero advantage, with a frozen tower, with two updates a rollout
    and gradient checkpointing. And a loss that is not finite on one of them is skipped by both."""
    torch.multiprocessing.spawn(worker, (tiny, tmp_path), nprocs=2)
    two = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    start = dict(load(tiny)[0].named_parameters())
    for number, scenario in enumerate(SCENARIOS):
        one = three_steps(tiny, 0, 1, **scenario)
        moved = max((one[name] - start[name]).abs().max().item() for name in one)
        assert moved > 2e-4, "three steps at 1e-4 should have moved something"
        for name in one:
            assert torch.equal(two[0][number][name], two[1][number][name]), (scenario, name)
            assert torch.allclose(one[name], two[0][number][name], atol=1e-5, rtol=0), (scenario, name)
        frozen = all(torch.equal(one[name], start[name]) for name in one if ".visual." in name)
        assert frozen == bool(scenario.get("freeze_vision"))


def test_sft_has_the_gradient_of_the_mean_log_likelihood_of_the_truth(tiny):
    """Of each image's mean over its tokens, averaged over images, of which a lost one adds nothing."""
    policy, encoder, prompts = load(tiny)
    naive, prompts, kept = plain(policy), [*prompts[:3], dataclasses.replace(prompts[3], weight=0.0)], {}
    keep = lambda: kept.update({name: p.grad.clone() for name, p in policy.named_parameters()})
    optimizer = SimpleNamespace(param_groups=[{}], step=keep)
    cfg = step_config(tokens_per_forward=500)
    metrics, _ = dipr1.sft_step(policy, optimizer, encoder, prompts, cfg, 1e-3)
    logps = [plain_logprobs(naive, Group(prompt, [encoder.target(prompt.index, prompt.record)]))
             for prompt in prompts]
    (-sum(logp.mean() for logp in logps[:3]) / 4).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in naive.parameters()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 1, "clipping should be seen too"
    assert metrics["nll"] == pytest.approx(-sum(logp.mean().item() for logp in logps) / 4, abs=1e-5)
    for name, p in naive.named_parameters():
        assert torch.allclose(kept[name] * norm, p.grad, atol=1e-4 * norm), name


def test_a_forward_holds_as_many_tokens_as_allowed_and_not_more():
    rng = np.random.default_rng(0)
    groups = [SimpleNamespace(prompt=SimpleNamespace(ids=range(rng.integers(50, 300))), n_tokens=int(n))
              for n in rng.integers(1, 400, 40)]
    length = lambda group: len(group.prompt.ids) + group.n_tokens
    for budget in (1, 500, 2000, 10**6):
        lists = dipr1.forwards(groups, budget)
        assert list(itertools.chain(*lists)) == groups
        for together, after in itertools.zip_longest(lists, lists[1:]):
            assert len(together) == 1 or sum(map(length, together)) <= budget
            assert not after or sum(map(length, [*together, after[0]])) > budget


def test_a_step_makes_likelier_what_earned_more_and_runs_tower_and_layers_no_more_often_than_needed(tiny):
    """Rollout, then reference and policy for each of three groups, of which the last has lost its image and
    weighs nothing; gradient checkpointing, which is the default, runs the policy's layers again in the
    backward, and frozen features are computed once."""
    for options, tower, decoder, of_sft in (
            (dict(gradient_checkpointing=True), 7 + 3, 1 + 3 + 6, 3 + 3), (dict(), 7, 7, 3),
            (dict(freeze_vision=True, gradient_checkpointing=True), 1, 1 + 3 + 6, 3)):
        policy, encoder, prompts = load(tiny, **options)
        cfg, calls, prompts = step_config(max_new_tokens=1, **options), [], prompts[:3]
        prompts[2].weight, reference = 0.0, copy.deepcopy(policy).eval()
        for model in (policy.model.model, reference.model.model):
            model.visual.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append("tower"))
            model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("decoder"))
        optimizer = dipr1.make_optimizer(policy)
        with replaced(group_rewards=rewards_by_index()):
            metrics, groups = dipr1.grpo_step(policy, reference, optimizer, encoder, prompts, cfg, 0, 1e-3)
        assert (calls.count("tower"), calls.count("decoder")) == (tower, decoder), options
        assert metrics["lost_images"] == 1
        for group in groups[:2]:  # every completion is a token long
            earned = dipr1.total_reward(rewards_by_index()(group, 0), cfg)
            assert ((policy([group])[0] - group.rollout_logp) * (earned - earned.mean())).sum() > 0
        calls.clear()
        dipr1.sft_step(policy, optimizer, encoder, prompts, cfg, 1e-3)
        assert calls.count("tower") == of_sft, "recomputation does not run a frozen tower again"


def test_ten_skipped_updates_in_a_row_stop_the_run_and_so_do_metrics_that_cannot_be_written(tmp_path):
    log, bar = dipr1.Log(tmp_path), tqdm(disable=True)
    metrics = {"loss": NAN, "grad_norm": INF, "skipped": 1.0}
    for step in range(19):
        log.write("grpo", step, metrics | {"skipped": float(step != 9)}, bar)
    said = "grpo step 19: ten updates in a row not finite .loss nan, .*inf"
    refused(said, log.write, "grpo", 19, metrics, bar)
    written = [json.loads(line, parse_constant=pytest.fail) for line in open(tmp_path / "metrics.jsonl")]
    assert len(written) == 20 and written[0]["loss"] is None, "NaN is not JSON"
    log.file = mock.Mock(write=mock.Mock(side_effect=OSError(28, "No space left on device")))
    refused("metrics.jsonl: .* No space left on device. Make room", log.write, "grpo", 20, metrics, bar)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_is_torchs_adamw_on_fp32_masters(monkeypatch, dtype):
    """Steps below bf16's resolution must add up: 14 bytes a weight. No gradient is kept twice."""
    weight = torch.nn.Parameter(torch.linspace(0.5, 1, 1000).to(dtype))
    exact, before = torch.nn.Parameter(weight.detach().float()), weight.detach().clone()
    ours = dipr1.MasterAdamW([weight], lr=1e-5, weight_decay=0.1)
    theirs, step = torch.optim.AdamW([exact], lr=1e-5, weight_decay=0.1), torch.optim.AdamW.step
    def handed_over(self):
        assert self is theirs or weight.grad is None
        return step(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", handed_over)
    for number in range(500):
        weight.grad = (1.5 + torch.sin(torch.arange(1000.0) + number)).to(dtype)
        exact.grad = weight.grad.float()
        ours.step()
        theirs.step()
    assert torch.allclose(ours.masters[0], exact, atol=1e-7)
    assert torch.equal(weight, ours.masters[0].to(dtype)) and (weight != before).float().mean() > 0.9
    assert weight.grad is ours.masters[0].grad is None
    moments = [t for state in ours.state.values() for t in state.values() if t.numel() > 1]
    size = sum(t.element_size() for t in [weight, *ours.masters, *moments])
    assert size == 14 or dtype is torch.float32


# ------------------------------------------------------------------------------------------------------------
# Evaluation: every figure against a slow, independent way of computing it


def random_detections(rng, n=200):
    """(pred, truth, ignore) of n images: some empty, some crowded, answers jittered, doubled, invented."""
    def some(most, size):
        corner = rng.uniform(0, 80, (rng.integers(0, most), 2))
        return np.hstack([corner, corner + rng.uniform(5, size, corner.shape)])
    images = []
    for _ in range(n):
        truth, ignore = some(6, 40), some(3, 50)
        truth = np.vstack([truth, truth[1:3] + rng.normal(0, 2, truth[1:3].shape)])  # behind one another
        pred = rng.permutation(np.vstack([truth, truth[:2], some(3, 40), ignore[:1]]))[: rng.integers(0, 9)]
        pred = (pred + rng.normal(0, rng.choice([0.3, 3]), pred.shape)).clip(0, 140)
        images.append((pred[(pred[:, 2:] > pred[:, :2]).all(axis=1)], truth, ignore))
    return images


def scored(images, labels=None):
    """The figures of (pred, truth, ignore) images; `labels`, if any, name the boxes of all three."""
    records, predictions = [], []
    for (pred, truth, ignore), names in zip(images, labels or itertools.repeat(None)):
        records.append(line_of(width=140, height=140, method="dip-r1", task="detection"))
        records[-1] |= {"boxes": truth, "truth": truth, "ignore": ignore}
        records[-1] |= {"labels": names[1], "ignore_labels": names[2]} if names else {}
        predictions.append({"boxes": pred, "labels": names[0] if names else None})
    return dipr1.evaluate_predictions(records, predictions)


def slow_counts(pred, truth, ignore, threshold):
    """-> (pairs of `match_boxes`, which has a test of its own, predictions and truths that count)."""
    pairs = list(zip(*dipr1.match_boxes(pred, truth, threshold)[:2]))
    excused = lambda box: (dipr1.box_iou([box], ignore, of_first=True) > 0.5).any()
    counting = [sum(k in [pair[side] for pair in pairs] or not excused(box) for k, box in enumerate(boxes))
                for side, boxes in enumerate((pred, truth))]
    return pairs, *counting


def slow_figures(images):
    """The definitions of the README, box by box."""
    tp = n_pred = n_truth = 0
    jaccard, errors, hidden_found, mean = [], [], [], lambda values: sum(values) / len(values)
    for pred, truth, ignore in images:
        pairs, counted, _ = slow_counts(pred, truth, ignore, 0.5)
        tp, n_pred, n_truth = tp + len(pairs), n_pred + counted, n_truth + len(truth)
        errors.append(abs(counted - len(truth)))
        hidden = [sum(row > 0.2) > 1 for row in dipr1.box_iou(truth, truth)]  # by more than itself
        hidden_found += [t in {t for _, t in pairs} for t, is_hidden in enumerate(hidden) if is_hidden]
        pairs, m, n = slow_counts(pred, truth, ignore, np.nextafter(0.5, 1))
        jaccard += [len(pairs) / (m + n - len(pairs))] if m + n else []
    p, r = tp / n_pred, tp / n_truth
    return {"precision": p, "recall": r, "f1": 2 * p * r / (p + r), "jaccard": mean(jaccard),
            "count_mae": mean(errors), "crowded_recall": mean(hidden_found),
            "truth_boxes_per_image": n_truth / len(images),
            "boxes_per_image": mean([len(pred) for pred, *_ in images])}


def slow_average_precision(images, threshold):
    """COCO's rule, detection by detection, and the interpolated precision by looking at every point."""
    hits, n_truth = [], sum(len(truth) for _, truth, _ in images)
    for pred, truth, ignore in images:
        taken = set()
        for box in pred[:100]:
            overlaps = enumerate(dipr1.box_iou([box], truth)[0])
            iou, k = max(((iou, k) for k, iou in overlaps if k not in taken), default=(0, None))
            if iou >= threshold:
                taken.add(k)
                hits.append(True)
            elif not (dipr1.box_iou([box], ignore, of_first=True) >= threshold).any():
                hits.append(False)
    points = [(sum(hits[:k]) / n_truth, sum(hits[:k]) / k) for k in range(1, len(hits) + 1)]
    return sum(max((p for r, p in points if r >= level), default=0) for level in np.linspace(0, 1, 101)) / 101


def test_every_figure_equals_its_definition_on_200_images_and_the_jaccard_index_is_crowdhumans():
    images = random_detections(np.random.default_rng(0))
    figures, slow = scored(images), slow_figures(images)
    slow |= {"ap50": slow_average_precision(images, 0.5), "ap70": slow_average_precision(images, 0.7),
             "ap": np.mean([slow_average_precision(images, t) for t in np.linspace(0.5, 0.95, 10)])}
    assert figures == pytest.approx(slow, abs=1e-9) and min(slow.values()) > 0.1, "0 tests nothing"
    nothing = scored([(boxes(), boxes(), boxes())])
    assert set(nothing) == set(slow) and set(nothing.values()) == {0}
    images[0] = (np.vstack([images[0][0]] * 90), *images[0][1:])  # more than the 100 that COCO looks at
    assert scored(images)["ap50"] == pytest.approx(slow_average_precision(images, 0.5), abs=1e-9)
    # Two pairs of exactly .5 add up to more than the one of .9, which alone counts for CrowdHuman's index.
    pred, truth = boxes([0, 0, 90, 9], [50, 0, 100, 9]), boxes([0, 0, 45, 9], [0, 0, 100, 9])
    assert scored([(pred, truth, boxes())])["jaccard"] == 1 / 3


def test_labelled_boxes_count_as_if_each_class_were_an_image_of_its_own():
    rng, images, labels, apart = np.random.default_rng(1), random_detections(np.random.default_rng(2)), [], []
    for image in images:
        labels.append([list(rng.choice(["bus", "car", "dog"], len(side))) for side in image])
        apart += [[side[np.array(names, "U3") == name] for side, names in zip(image, labels[-1])]
                  for name in ("bus", "car", "dog")]
    figures, slow = scored(images, labels), slow_figures(apart)
    for name in ("precision", "recall", "f1", "crowded_recall"):
        assert figures[name] == pytest.approx(slow[name], abs=1e-9), name
    aps = [slow_average_precision(apart[k::3], t) for k in range(3) for t in np.linspace(0.5, 0.95, 10)]
    assert figures["ap"] == pytest.approx(np.mean(aps), abs=1e-9)


@needs_real
def test_a_real_coco_file_has_the_map_that_the_toolkit_gives_with_equal_scores(tmp_path):
    """80 categories, through the converter; pictures are blank, answers come in order of their score."""
    path, found = REAL / "coco100/instances_val2014_100.json", tmp_path / "found.json"
    data = json.loads(path.read_text())
    for image in data["images"]:
        Image.new("1", (image["width"], image["height"])).save(tmp_path / image["file_name"], "PNG")
    entries = json.loads((REAL / "coco100/instances_val2014_fakebbox100_results.json").read_text())
    write(found, data | {"annotations": sorted(entries, key=lambda entry: -entry["score"])})
    for annotations, name in ((path, "truth"), (found, "answers")):
        command = "coco --split val --category all --no_verify --annotations"
        convert(command, tmp_path, annotations, out=tmp_path / name)
    assert totals(tmp_path / "truth") == (100, 830, 9)
    records = dipr1.load_records(tmp_path / "truth")
    predictions = dipr1.load_predictions(tmp_path / "answers", records)
    assert round(dipr1.evaluate_predictions(records, predictions)["ap"], 4) == 0.5145
    assert records[0]["target"].split(", ") == [entry["name"] for entry in data["categories"]]


def evaluation_of(folder, *flags):
    """What `dipr1.py --eval` or `--predictions` writes to eval.json."""
    main(*flags, "--output_dir", folder)
    return json.loads((Path(folder) / "eval.json").read_text())


def test_sft_learns_by_heart_and_evaluation_and_its_predictions_file_agree_on_it(tiny, tmp_path, capsys):
    """And an image that cannot be opened counts as unanswered, in every figure, while the others go on."""
    policy, encoder, prompts = load(tiny)
    lines = read_lines(tiny[1])
    write(tmp_path / "cut.png", Path(lines[1]["image"]).read_bytes()[:-400])
    lines[1]["image"] = "cut.png"
    records = dipr1.load_records(write(tmp_path / "d.jsonl", *lines))
    cfg = step_config(max_new_tokens=80, samples=3, tokens_per_forward=2000)
    optimizer, greedy = dipr1.make_optimizer(policy), dataclasses.replace(cfg, samples=0)
    assert dipr1.evaluate(policy, encoder, records, greedy, tmp_path / "before")["recall"] == 0
    for _ in range(60):
        metrics, _ = dipr1.sft_step(policy, optimizer, encoder, prompts, cfg, 3e-3)
    assert metrics["nll"] < 0.1
    figures = dipr1.evaluate(policy, encoder, records, cfg, tmp_path, pictures=3)
    assert "cut.png: no longer readable" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"000000.png", "000002.png"}
    assert figures["recall"] == 6 / 7 and figures["precision"] == 1 and figures["format_rate"] == 5 / 6
    written = tmp_path / "predictions.jsonl"
    samples = [line["samples"] for line in read_lines(written) if "samples" in line]
    rates = np.mean([sample["rewards"] for sample in itertools.chain(*samples)], axis=0).tolist()
    assert len(samples) == 5 and figures["sampled_f1"] > 0.5 and figures["look_reward"] >= 0
    assert rates == [figures["sampled_" + x] for x in ("format_rate", "look_reward", "accuracy_reward")]
    alone = dipr1.evaluate(policy, encoder, records, greedy, tmp_path / "greedy")
    assert alone["recall"] == 6 / 7 and not {"look_reward", "sampled_f1"} & set(alone)
    again = evaluation_of(tmp_path, "--predictions", written, "--data", tmp_path / "d.jsonl")
    assert again["images"] == 6 and {name: again[name] for name in figures} == figures


def test_predictions_of_another_tool_need_an_image_and_boxes_alone(tmp_path, capsys):
    """In any order, with any boxes. Where a line is wrong, the error names file, line and value."""
    data = [line_of(image=f"{n}.png", target="car", boxes=[[n, 1, 20, 20], [30, 30, 40, 40]])
            for n in range(4)]
    data.append(data[3] | {"target": "cafe\u0301", "boxes": [[1, 2, 30, 40]]})
    write(tmp_path / "d.jsonl", *data)
    lines = [{"image": line["image"], "boxes": line["boxes"]} for line in data[:3]]
    lines += [{name: line[name] for name in ("image", "target", "boxes")} for line in data[:2:-1]]
    one_box = {"image": "0.png", "boxes": [[9, 9, -5, 1]]}
    def score(*entries):
        path = write(tmp_path / "p.jsonl", *entries)
        return evaluation_of(tmp_path, "--predictions", path, "--data", tmp_path / "d.jsonl")
    lines[3]["target"] = "caf\xe9"  # the other spelling of the same word
    figures = score(*lines)
    assert figures["f1"] == figures["jaccard"] == 1 and not {"format_rate", "sampled_f1"} & set(figures)
    assert score(*lines[1:])["recall"] == 7 / 9 and "no prediction for 1 of 5" in capsys.readouterr().out
    assert score(one_box, *lines[1:])["precision"] == 7 / 8
    for line, said in (
            (lines[1], "1.png comes too often"), (one_box | {"target": "dog"}, "0.png is not in the data"),
            (one_box | {"image": "3.png"}, "name target and task"), ({"image": "0.png"}, "no 'boxes'"),
            (one_box | {"boxes": [[1, 2, 3, 4, 0.9]]}, r"boxes, row 1: \[1, 2, 3, 4, 0.9\] is not 4"),
            (one_box | {"samples": [{"boxes": [[1]]}]}, "boxes, row 1"),
            (one_box | {"rewards": [1, 0]}, "cannot reshape"), (one_box | {"rewards": "good"}, "float")):
        refused(f"p.jsonl, line {1 + (line is lines[1])}: .*{said}", score, line, *lines[1:])
    # Where the data have labels, boxes without them are an oversight, and no answer that is wrong throughout.
    write(tmp_path / "d.jsonl", data[0] | {"labels": ["car", "bus"]})
    assert score(lines[0] | {"labels": ["car", None]})["recall"] == 0.5
    for labels in ([], ["car"], [3, 6], [["car"], ["bus"]], ["car", "bus", 3]):
        refused("line 1: [012] labels .texts. for 2 boxes", score, lines[0] | {"labels": labels})


def test_mixed_tasks_train_and_are_evaluated_together(tiny, tmp_path):
    lines = []
    for number, line in enumerate(line for line in read_lines(tiny[1]) if line["boxes"]):
        first, points = line["boxes"][:1], [[x, y] for x, y, *_ in line["boxes"]]
        lines += [line, line | {"task": "grounding", "target": "the first", "boxes": first},
                  line | {"task": "counting", "points": points},
                  line | {"task": "ocr", "transcript": f"page {number}"}]
    lines[0]["labels"] = ["person"] * len(lines[0]["boxes"])
    four_tasks = write(tmp_path / "all.jsonl", *lines)
    flags = ["--method", "perception-r1", "--data", four_tasks, "--max_new_tokens", 16, "--group_size", 3]
    main(*flags, "--model", tiny[0], "--output_dir", tmp_path, "--sft_steps", 2, "--sft_batch", 4,
         "--steps", 2, "--prompts_per_step", 4, "--picture_every", 1)
    lines, model = lines_of(tmp_path), tmp_path / "checkpoint-000004"
    assert len(lines) == 4 and not any(line["skipped"] for line in lines) and lines[-1]["reward_look"] == 0
    assert all(line["truth_boxes"] < 4 for line in lines[2:]), "characters of a page are no boxes"
    figures = evaluation_of(tmp_path / "eval", *flags, "--eval", "--model", model, "--samples", 2)
    assert {"detection f1", "grounding acc_0.5", "counting count_mae", "ocr word_f1", "format_rate",
            "sampled_accuracy_reward"} <= set(figures)
    assert len(list((tmp_path / "eval/pictures").iterdir())) == 8
    again = evaluation_of(tmp_path / "again", *flags, "--predictions", tmp_path / "eval/predictions.jsonl")
    assert again | {"source": 0} == figures | {"source": 0}
    refused("line 2: .*'grounding' does not go with --method dip-r1", dipr1.load_records, four_tasks)
    *_, counted, page = read_lines(four_tasks)
    silent = write(tmp_path / "silent.jsonl", {name: page[name] for name in ("image", "target", "task")})
    refused("silent.jsonl, line 1: .*transcript", main, *flags, "--predictions", silent)
    # A count without points is evaluated by its number, and not trained on.
    counted["count"] = len(counted.pop("points"))
    flags += ["--data", write(tmp_path / "d.jsonl", counted), "--model", tiny[0]]
    figures = evaluation_of(tmp_path / "count", *flags, "--eval", "--samples", 2)
    assert {"exact_count", "count_mae", "format_rate"} <= set(figures) and "accuracy_reward" not in figures
    said = "without points: they can be evaluated, not trained on"
    refused(said, main, *flags, "--output_dir", tmp_path / "run")


def test_figures_of_the_other_tasks_by_hand(tmp_path):
    def figures(task, *pairs):
        """Of (answer, truth) pairs; a whole number as truth of counting is a count without points."""
        field = dipr1.TASKS["perception-r1", task].truth
        lines = [line_of(image=f"{n}.png", task=task, **({"count": t} if type(t) is int else {field: t}))
                 for n, (_, t) in enumerate(pairs)]
        records = dipr1.load_records(write(tmp_path / "d.jsonl", *lines), "perception-r1")
        answers = [{"image": f"{n}.png", field: answer} for n, (answer, _) in enumerate(pairs)]
        predictions = dipr1.load_predictions(write(tmp_path / "p.jsonl", *answers), records)
        return dipr1.evaluate_predictions(records, predictions)
    box, points = [[0, 0, 10, 10]], lambda n: [[k, k] for k in range(n)]
    assert figures("grounding", (box, box), ([[0, 0, 10, 6]], box), ([], box), ([[0, 0, 10, 8]], box)) == {
        "acc_0.5": 0.75, "acc_0.75": 0.5, "acc_0.95": 0.25, "mean_iou": pytest.approx(0.6)}
    assert figures("counting", (points(3), points(3)), (points(0), 2), (points(5), points(4)), ([], 0)) == {
        "exact_count": 0.5, "count_mae": 0.75}
    assert figures("ocr", ("the cat", "the cat"), ("the the", "the dog"), ("", "x")) == pytest.approx({
        "word_f1": 2 * 3 / (4 + 2 + 2 + 0 + 1), "edit_distance": (0 + 3 / 7 + 1) / 3})


# ------------------------------------------------------------------------------------------------------------
# The command line, as a user types it

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(*command, before=()):
    """A command of Python in a process of its own, which leads a session so that all of it can be killed."""
    return subprocess.Popen([*before, sys.executable, *map(str, command)], cwd=HERE, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def run(*command, expect=0, **options):
    """Such a command, until it ends -> what it printed."""
    process = start(*command, **options)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == expect, said[-3000:]
    return said


def training(tiny, folder, *more):
    """The flags of a small run: two supervised steps, four of GRPO, a checkpoint after each."""
    return [str(flag) for flag in (
        "--model", tiny[0], "--data", tiny[1], "--output_dir", folder, "--sft_steps", 2, "--sft_batch", 4,
        "--sft_lr", 1e-3, "--steps", 4, "--prompts_per_step", 4, "--group_size", 3, "--max_new_tokens", 40,
        "--lr", 1e-3, "--save_every", 1, "--keep", 0, "--picture_every", 0, *more)]


def lines_of(folder):
    """metrics.jsonl without what a clock says."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def test_training_under_torchrun_writes_metrics_pictures_and_a_checkpoint_to_evaluate(tiny, tmp_path):
    flags = ["--steps", 2, "--picture_every", 1, "--save_every", 0]
    run(*TORCHRUN, "dipr1.py", *training(tiny, tmp_path, *flags))
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(x["phase"], x["step"]) for x in lines] == [("sft", 0), ("sft", 1), ("grpo", 0), ("grpo", 1)]
    assert all(math.isfinite(value) for line in lines for name, value in line.items() if name != "phase")
    readme = (HERE / "README.md").read_text()
    assert not {name for name in lines[0] | lines[2] if f"`{name}`" not in readme}, "undefined metrics"
    assert all(Image.open(tmp_path / f"pictures/step-{n:06d}.png").size[0] > 400 for n in (1, 2))
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoint*")) == ["2", "4"]
    checkpoint = tmp_path / "checkpoint-000004"
    assert "tree" not in (checkpoint / "config.json").read_text(), "others know no tree attention"
    assert all(torch.load(checkpoint / f"optimizer-{n}.pt", weights_only=True)["masters"] for n in (0, 1))
    flags = ["--eval", "--model", checkpoint, "--data", tiny[1], "--max_new_tokens", 12, "--samples", 2]
    figures = evaluation_of(tmp_path / "one", *flags)
    shown = run(*TORCHRUN, "dipr1.py", *flags, "--output_dir", tmp_path / "two")
    assert figures == json.loads((tmp_path / "two/eval.json").read_text()) and shown.count("jaccard") == 1
    one, two = ((tmp_path / folder / "predictions.jsonl").read_text() for folder in ("one", "two"))
    assert one == two and one.count("\n") == 6  # shared out over ranks, and in order again


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["python", "torchrun"])
def test_the_demo_end_to_end_in_small(tmp_path, launcher):
    """The trap: two processes draw the scenes, and one replaces the file that the other reads."""
    (tmp_path / "small.py").write_text(f"""if __name__ == "__main__":
    import sys
    sys.path.insert(0, {str(HERE)!r})
    import data_prep, dipr1
    dipr1.SCENES, synthetic = {{"sparse": (12, 2), "dense": (6, 4), "night": (0, 2)}}, data_prep.synthetic
    dipr1.PRETRAINING = dict(sft_steps=2, steps=0)
    data_prep.synthetic = lambda *args, **more: (print("scenes are drawn"), synthetic(*args, **more))
    dipr1.main()
""")
    shown = run(*launcher, tmp_path / "small.py", "--demo", "--output_dir", tmp_path, "--seed", 3,
                "--sft_steps", 3, "--steps", 1, "--prompts_per_step", 2, "--group_size", 2, "--picture_every",
                1, "--max_new_tokens", 16)
    assert shown.count("scenes are drawn") == 3 and shown.count("images evaluated") == 1
    assert "Traceback" not in shown and "UserWarning" not in shown
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seed"] == 3 and summary["seconds"] > 0
    names = {"precision", "f1", "jaccard", "format_rate", "look_reward", "sampled_f1", "sampled_look_reward"}
    for name, steps in {"start": 2, "sft": 3, "dip-r1": 1}.items():
        assert all(names <= set(summary[name][crowd]) for crowd in ("sparse", "dense", "night"))
        assert len(lines_of(tmp_path / name)) == steps
    assert list((tmp_path / "dip-r1/pictures").iterdir())
    assert Image.open(tmp_path / "crowd.png").height == 3 * 472
    again = run(tmp_path / "small.py", "--demo", "--output_dir", tmp_path, expect=1)
    assert "holds a run already" in again and "are drawn" not in again  # nothing is overwritten


def test_every_process_has_a_gpu_of_its_own_and_the_demo_needs_none(monkeypatch):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 1))
    monkeypatch.setenv("LOCAL_RANK", "1")
    refused("no GPU for process 2: torchrun --nproc_per_node 1", dipr1.join_processes, Config())
    assert (dipr1.device_of(Config()), dipr1.device_of(Config(demo=True))) == ("cuda", "cpu")
    dipr1.join_processes(Config(demo=True))


def test_what_cannot_run_is_said_in_a_line_with_the_remedy_before_anything_is_written(tiny, tmp_path, capsys):
    out, flags = tmp_path / "out", training(tiny, tmp_path / "out")
    def refused_at_once(said, *more):
        refused(said, main, *flags, *more)
        assert not out.exists()
    message = run("dipr1.py", *flags, "--data", tmp_path / "no.jsonl", expect=1)
    assert "data_prep.py crowdhuman" in message and "--demo" in message and "Traceback" not in message
    for flag, value in (("group_size", 1), ("temperature", 0), ("lr", "nan"), ("recall_weight", 1.5)):
        refused_at_once(f"--{flag} {value}.*: at least ", f"--{flag}", value)
    refused_at_once("--steps 0 and --sft_steps 0 train nothing", "--steps", 0, "--sft_steps", 0)
    refused_at_once("--demo compares SFT and dip-r1: neither", "--demo", "--steps", 0)
    with replaced(rank_and_world=lambda: (0, 3)):  # nor can the SFT batch of 4, which nobody asks for here
        refused_at_once("--prompts_per_step 4 cannot be shared out", "--sft_steps", 0)
    lost = write(tmp_path / "d.jsonl", *(line_of(image=f"{number}.png") for number in range(6)))
    refused_at_once("6 of 6 images are not there, the first is .*0", "--data", lost)
    config, file = (tiny[0] / "config.json").read_text(), tiny[0] / "model.safetensors"
    weights = load_file(file)
    for number, (said, name, content) in enumerate([
            ("lacks 1 w", file.name, save({n: w for n, w in weights.items() if "s.1.self_attn.o" not in n})),
            ("", file.name, file.read_bytes()[:-9]), ("", "config.json", b"{}"), ("", "tokenizer.json", b""),
            ("it is a qwen2_vl", "config.json", config.replace('"qwen2_5_vl"', '"qwen2_vl"'))]):
        shutil.copytree(tiny[0], model := tmp_path / str(number))
        write(model / name, content)
        refused_at_once(f"cannot load --model {model}: .*{said}.*", "--model", model)
    model = tmp_path / "model"  # without its tokenizer: transformers would make an empty one
    shutil.copytree(tiny[0], model, ignore=shutil.ignore_patterns("tokenizer*"))
    refused_at_once("its tokenizer is missing", "--model", model)
    refused_at_once("File exists: .*config.json", "--output_dir", model / "config.json")
    # That images have another size than their lines say is found later, and it can be started again.
    lines = read_lines(tiny[1])
    data = write(tmp_path / "d.jsonl", *(line | {"width": 500} for line in lines))
    flags += ["--sft_steps", "3", "--steps", "0", "--data", str(data)]
    refused(r".png is \(.*its line in the data says \(500", main, *flags)
    write(data, *lines)
    capsys.readouterr()
    _, encoder, prompts = load(tiny)
    longest = max(len(encoder.target(prompt.index, prompt.record)) for prompt in prompts)
    main(*flags, "--max_new_tokens", longest - 1)
    said = capsys.readouterr().out
    assert f"--max_new_tokens {longest - 1}" in said and "1 of 6 images" in said, "that do not fit"
    assert (out / "checkpoint-000003").exists(), "--steps 0 ends with a checkpoint, too"
    refused("holds a run already: --resume it", main, *flags)


# ------------------------------------------------------------------------------------------------------------
# Kill it, and go on


@pytest.fixture(scope="session")
def taught(tiny, tmp_path_factory):
    """The tiny model and its data, after some lessons: its answers earn rewards, which differ."""
    policy, encoder, prompts = load(tiny)
    optimizer, folder = dipr1.make_optimizer(policy), tmp_path_factory.mktemp("taught")
    for _ in range(20):
        dipr1.sft_step(policy, optimizer, encoder, prompts, step_config(tokens_per_forward=2000), 3e-3)
    for part in (policy.model, encoder.tokenizer, encoder.image_processor):
        part.save_pretrained(folder)
    return folder, tiny[1]


@pytest.fixture(scope="session")
def finished(taught, tmp_path_factory):
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    main(*training(taught, folder))
    assert all(line["reward_std"] > 0 and line["kl"] > 0 for line in lines_of(folder)[4:]), "it should learn"
    return folder


def until(done, finished, folder):
    """A copy of the run as it was after so many steps, but for the metrics of later ones."""
    later = [f"checkpoint-{step:06d}" for step in range(done + 1, 7)]
    return shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(*later))


def assert_same_run(folder, finished):
    a, b = (load_file(run / "checkpoint-000006/model.safetensors") for run in (folder, finished))
    assert all(torch.equal(a[name], b[name]) for name in b) and set(a) == set(b)
    assert lines_of(folder) == lines_of(finished) and len(lines_of(folder)) == 6


@pytest.mark.parametrize("done, torchrun", [(1, False), (2, False), (4, True)])  # warm-up, its end, GRPO
def test_a_resumed_run_ends_bit_for_bit_as_one_never_interrupted(taught, finished, tmp_path, done, torchrun):
    """Nor does it matter whether torchrun started the one process."""
    environment = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    with mock.patch.dict(os.environ, environment if torchrun else {}):
        main(*training(taught, until(done, finished, tmp_path / "run"), "--resume"))
    assert_same_run(tmp_path / "run", finished)


def test_a_cut_checkpoint_is_recognised_and_another_run_is_refused(taught, finished, tmp_path, capsys):
    last, rng = until(6, finished, tmp_path / "run") / "checkpoint-000006", np.random.default_rng(0)
    assert dipr1.complete(last)["step"] == 6
    for path in rng.choice(sorted(last.iterdir()), 20):
        whole = path.read_bytes()
        path.write_bytes(whole[: rng.integers(0, len(whole))])
        assert dipr1.complete(last) is None, path
        path.write_bytes(whole)
    (last / "model.safetensors").unlink()
    found = dipr1.find_checkpoint(dipr1.parse_flags(training(taught, tmp_path / "run", "--resume")))
    assert found == (tmp_path / "run/checkpoint-000005", 5)
    assert "checkpoint-000006 is not complete" in capsys.readouterr().out
    changed = dipr1.parse_flags(training(taught, finished, "--resume", "--lr", "1e-4"))
    refused("its lr was 0.001 and is 0.0001", dipr1.find_checkpoint, changed)
    same, content = dipr1.parse_flags(training(taught, finished, "--resume")), taught[1].read_bytes()
    with replaced(rank_and_world=lambda: (0, 2)):
        refused("its processes was 1 and is 2", dipr1.find_checkpoint, same)
    with mock.patch.object(Path, "read_bytes", lambda path: content + b"\n"):
        refused("its data_sha256 was", dipr1.find_checkpoint, same)
    with replaced(over_ranks=lambda values, how: [values[0] + (how == "MAX")]):  # another node sees more
        refused("not every process sees the same checkpoints", dipr1.train, same)


def test_sigterm_finishes_the_step_and_writes_a_checkpoint_old_ones_go(taught, finished, tmp_path, capsys):
    step = dipr1.grpo_step
    def terminated(*args):
        for _ in (1, 2) if args[-2] == 0 else ():  # in the first step, a scheduler's and torchrun's
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)
    write(tmp_path / "checkpoint-000137.tmp/model.safetensors", b"of a run killed while it saved")
    with replaced(grpo_step=terminated), pytest.raises(SystemExit) as stop:
        main(*training(taught, tmp_path, "--save_every", 100))
    assert stop.value.code == 128 + signal.SIGTERM and "stopped by SIGTERM" in capsys.readouterr().out
    assert sorted(path.name[-1] for path in tmp_path.glob("check*")) == ["2", "3"]
    assert len(lines_of(tmp_path)) == 3 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    write(tmp_path / "checkpoint-000009/config.json", "cut short")  # and newer than all that follow
    main(*training(taught, tmp_path, "--resume", "--keep", 1))
    assert_same_run(tmp_path, finished)
    left = sorted(path.name[-1] for path in tmp_path.glob("check*"))
    assert left == ["2", "6", "9"], "old checkpoints go, but the one that ended SFT stays"


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(taught, finished, tmp_path):
    """SIGKILL at random moments, by preference while a checkpoint is being written."""
    rng = np.random.default_rng(0)
    for number in range(10):
        process = start("dipr1.py", *training(taught, tmp_path, "--resume"))
        while process.poll() is None and not list(tmp_path.glob("*.tmp" if number % 2 else "metrics.jsonl")):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02 if number % 2 else 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    main(*training(taught, tmp_path, "--resume"))
    assert_same_run(tmp_path, finished)


@pytest.mark.slow
def test_under_torchrun_a_run_that_lost_a_rank_goes_on(taught, tmp_path):
    """SIGKILL to one of two ranks, in GRPO; torchrun starts both again. It keeps its store, and in it stand
    the addresses of the dead: a rank that reads one waits for it forever."""
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    run(*TORCHRUN, "dipr1.py", *training(taught, whole))
    process = start(*TORCHRUN, "--max_restarts", 1, "dipr1.py", *training(taught, hurt))
    while not (hurt / "checkpoint-000003").exists() and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    assert_same_run(hurt, whole)


@pytest.mark.parametrize("full", ["model.safetensors", "optimizer-0.pt"])
def test_a_full_disk_ends_the_run_with_one_line_and_with_room_it_goes_on(taught, finished, tmp_path, full):
    """The run wants to write checkpoints 4 to 6, and there is room for half of this file of one."""
    folder = until(3, finished, tmp_path / "run")
    blocks = (folder / "checkpoint-000003" / full).stat().st_size // 1024  # of 512 bytes
    quota = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh"]
    said = run("dipr1.py", *training(taught, folder, "--resume"), before=quota, expect=1)
    assert "Traceback" not in said and "--resume" in said
    assert said.count("could not be written") == said.count("checkpoint-000004 could") == 1
    assert len(lines_of(folder)) == 4
    main(*training(taught, folder, "--resume"))
    assert_same_run(folder, finished)


# ------------------------------------------------------------------------------------------------------------
# With a GPU: pytest -m gpu test_dipr1.py


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


@on_gpu
def test_the_captured_step_samples_as_the_eager_one_and_bf16_scores_as_exactly_as_naively(tiny, recwarn):
    policy, encoder, prompts = load(tiny)
    groups = sampled(policy, encoder, prompts, 4, 60)
    assert not [warning for warning in recwarn if "CUDA graph" in str(warning.message)]
    with replaced(captured=lambda step, *inputs: step):
        eager = sampled(policy, encoder, prompts, 4, 60)
    for a, b in zip(groups, eager):
        assert [o.tolist() for o in a.completions] == [o.tolist() for o in b.completions]
        assert torch.allclose(a.rollout_logp, b.rollout_logp, atol=1e-5)
    precise = copy.deepcopy(policy).float()
    with torch.no_grad():
        exact, naive = (torch.cat([plain_logprobs(plain(p), group) for group in groups])
                        for p in (precise, policy))
        ours, rough = torch.cat(precise(groups)), torch.cat(policy(groups))
        assert policy.model.dtype == torch.bfloat16 and torch.allclose(ours, exact, atol=1e-3)
        assert (rough - exact).abs().max() < 2 * (naive - exact).abs().max() + 0.01


@on_gpu
def test_a_run_under_torchrun_trains_on_every_gpu(tiny, tmp_path):
    gpus = torch.cuda.device_count()
    flags = training(tiny, tmp_path, "--prompts_per_step", gpus, "--sft_batch", gpus)
    run(*TORCHRUN[:-1], gpus, "dipr1.py", *flags)
    lines = lines_of(tmp_path)
    assert len(lines) == 6 and not any(line["skipped"] for line in lines) and lines[-1]["sampler_gap"] < 0.1


@on_gpu
def test_a_step_at_3b_fits_80_gb():
    policy, prompt = random_policy("3b", "cuda")
    reference, optimizer = copy.deepcopy(policy).eval().requires_grad_(False), dipr1.make_optimizer(policy)
    torch.cuda.reset_peak_memory_stats()
    group = our_rollout(policy, prompt, 8, 1024)
    group.advantages = torch.linspace(-1, 1, group.n_tokens, device="cuda")
    with torch.no_grad():
        group.ref_logp = reference([group])[0]
    assert not dipr1.update(policy, optimizer, [group], Config(), 1e-6)["skipped"]
    assert torch.cuda.max_memory_allocated() < 80e9


# ------------------------------------------------------------------------------------------------------------
# data_prep.py: images, scenes, and every data set laid out as it ships, with pictures that we make

ODGT, WIDER18, WIDER19, COCO = ("annotation_val.odgt", "val_annotations.txt", "Annotations/val_bbox.txt",
                                "annotations/instances_val2017.json")
GREY = np.array([[0.0, 0.5, 1.0]])
INK = Image.fromarray(np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8))  # on a transparent ground


def make_images(paths, size=IMAGE):
    """An image of this size at each path."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (90, 120, 150)).save(path)


def convert(command, root, *more, out=None):
    """Run the command line -> the records that it wrote."""
    (source, *flags), out = command.split(), out or Path(root).parent / "out.jsonl"
    data_prep.main([source, str(root), "--out", str(out), *flags, *map(str, more)])
    return data_prep.read_jsonl(out, dict)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
def test_images_are_upright_odd_orientations_do_no_harm_and_headers_give_the_size(tmp_path, kind):
    path, corner = tmp_path / f"a.{kind}", np.zeros((80, 100, 3), np.uint8)
    corner[:40, :50] = 255  # white in the top left, when upright
    for value in [None, *range(10), 65000] + [b"II*\0\xff\xff"] * (kind != "tiff"):
        undo, exif = {6: 8, 8: 6}.get(value, value), Image.Exif()  # the orientation that undoes this one
        stored = Image.fromarray(corner)
        stored.getexif()[0x0112] = undo
        stored = ImageOps.exif_transpose(stored)
        exif.update({} if value is None else {0x0112: value})
        stored.save(path, exif=value if isinstance(value, bytes) else exif)
        with mock.patch.object(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("decoded")):
            assert data_prep.image_size(path, no_verify=True) == IMAGE
        image = data_prep.open_image(path)
        assert image.size == IMAGE and image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int)[[20, 60], [20, 80], 0] - [255, 0]).max() < 10


@pytest.mark.parametrize("name, image, expected", [
    ("16.png", (GREY * 65535).astype("u2"), [0, 127, 255]), ("low.png", (GREY * 514).astype("u2"), [0, 1, 2]),
    ("32.tiff", (GREY * 65535).astype("i4"), [0, 127, 255]), ("1.tiff", GREY.astype("f4"), [0, 128, 255]),
    ("byte.tiff", (GREY * 254).astype("f4"), [0, 127, 254]), ("one.png", GREY > 0.7, [0, 0, 255]),
    ("word.tiff", (GREY * 65535).astype("f4"), [0, 127, 255]), ("RGBA.png", INK, [0, 255]),
    ("nan.tiff", np.array([[np.nan, 0.5, 1, np.inf]], "f4"), [0, 128, 255, 0]),
    ("LA.png", INK.convert("LA"), [0, 255]), ("P.png", INK.quantize(2), [0, 255]),
])
def test_every_depth_and_transparency_becomes_8_bit_rgb(tmp_path, name, image, expected):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(tmp_path / name)
    opened = np.asarray(data_prep.open_image(tmp_path / name))
    assert opened.shape[2] == 3 and np.abs(opened[0].astype(int).mean(axis=1) - expected).max() <= 1


def test_what_cannot_be_opened_is_an_oserror_with_a_reason(tmp_path):
    make_images([tmp_path / "whole.jpg"])
    whole, path = (tmp_path / "whole.jpg").read_bytes(), tmp_path / "a"
    for content in (whole[:-100], b"\x89PNG\r\n\x1a\n" + bytes(40), b"hello", b""):
        with pytest.raises(OSError, match=r"\w+ \w+"):
            data_prep.open_image(write(path, content))
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 100), pytest.raises(OSError, match="exceeds limit"):
        data_prep.open_image(tmp_path / "whole.jpg")  # a header may claim 30 GB
    for name, said in {"gone.png": "^No such file or directory$", "": "^Is a directory$"}.items():
        with pytest.raises(OSError, match=said):
            data_prep.open_image(tmp_path / name)
    for size in ((2010, 10), (10, 2010), (2000, 10), (1, 1)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        for no_verify in (False, True):
            measured = data_prep.image_size(tmp_path / "a.png", no_verify)
            assert "ratio above 200" in str(measured) if 2010 in size else measured == size


def test_scenes_repeat_from_their_seed_and_are_what_they_say(tmp_path):
    records, pixels = {}, {}
    for name, crowd in {"a": "sparse", "b": "sparse", "dense": "dense", "night": "night"}.items():
        data_prep.synthetic(tmp_path / name, 30, seed=4, crowd=crowd)
        records[name] = [record for part in ("train.jsonl", "val.jsonl")
                         for record in read_lines(tmp_path / name / part)]
        pixels[name] = [np.asarray(data_prep.open_image(tmp_path / name / r["image"])) for r in records[name]]
    assert records["a"] == records["b"] and len(pixels["a"]) == 30
    assert np.array_equal(pixels["a"], pixels["b"])
    assert not np.array_equal(pixels["a"][0][0], pixels["dense"][0][0])  # another street, too
    for measure in (np.mean, np.std):
        assert measure(pixels["night"]) < 0.7 * measure(pixels["a"])  # dark, and of low contrast
    for name, least, most, overlap in (("a", 1, 5, 0.4), ("dense", 3, 8, 0.5), ("night", 1, 6, 0.45)):
        for record in records[name]:
            people = record["boxes"] + record["ignore"]
            assert least <= len(people) <= most and record["boxes"]
            data_prep.check_rows("boxes", people, 4, 112, 112)
            assert all(data_prep.iou(a, b) < overlap for k, a in enumerate(people) for b in people[:k])
    assert 0 < sum(len(record["ignore"]) for record in records["dense"]) < 30  # the hidden, and no others
    solid = np.array(data_prep.draw_person(np.random.default_rng(0), 60).getchannel("A")) > 127
    assert solid[0].any() and solid[-1].any() and solid[:, 0].any() and solid[:, -1].any(), "a tight box"


def test_the_tiny_tokenizer_has_a_token_for_each_sentence():
    texts = ["<|im_start|>user\n{question}<|im_end|>\n", "Find every {target} here."]
    tokenizer = data_prep.tiny_tokenizer(20, texts)
    assert len(tokenizer.encode("Find every cat here.")) == 1 + 3 + 1
    assert len(tokenizer.encode("[[1, 2, 3, 20]]")) == 6
    assert len(tokenizer.encode("<think>3 in sight, 2 to look at</think>")) == 6  # as dipr1.py writes targets


def crowdhuman_layout(root, entries):
    make_images([root / "Images" / f"{name}.jpg" for name in entries])
    write(root / "annotation_train.odgt", *({"ID": name, "gtboxes": entries[name]} for name in entries))
    return root


def person(fbox, tag="person", **extra):
    return {"tag": tag, "fbox": fbox, "extra": extra, "head_attr": {"ignore": 1}}


def test_crowdhuman_converts_and_says_what_became_of_everything(tmp_path, capsys):
    people = [person([10, 10, 20, 30]), person([90, 70, 40, 40]), person([5, 5, -3, 9]),
              person([50, 0, 9, 9], "mask"), person([0, 0, 9, 9], ignore=1),
              {"tag": "person", "fbox": [1, 2, 3, 4]}]
    root = crowdhuman_layout(tmp_path / "ch", {"1,a": people, "2,b": [person([0, 0, 5, 5])] * 41, "3,c": [],
                                               "cut": [], "gone": []})
    write(root / "Images/cut.jpg", (root / "Images/1,a.jpg").read_bytes()[:-20])
    (root / "Images/gone.jpg").unlink()
    first, empty = convert("crowdhuman --split train --draw 1", root)
    # The second is clipped, the one of negative width dropped; a person without the optional keys counts.
    assert first == {"image": "ch/Images/1,a.jpg", "width": 100, "height": 80, "target": "person",
                     "boxes": [[10, 10, 30, 40], [90, 70, 100, 80], [1, 2, 4, 6]],
                     "ignore": [[50, 0, 59, 9], [0, 0, 9, 9]]}
    assert empty["boxes"] == [] and (tmp_path / "out-0.png").exists()
    said = capsys.readouterr()
    for part in ("2 lines", "3  boxes", "2  ignore", "median 1.5, max 3", "1  left out: boxes without area",
                 "1  left out: images with more than 40 boxes", "2  left out: unreadable"):
        assert part in said.out, said.out
    assert all(f"{name}.jpg: " in said.err for name in ("cut", "gone"))
    assert len(convert("crowdhuman --split train --max_boxes 41", root)) == 3
    assert len(convert("crowdhuman --split train --no_verify", root)) == 3  # a header does not show the cut
    (root / "annotation_train.odgt").rename(root / "annotation_val.odgt")  # only training has a limit unasked
    assert [len(r["boxes"]) for r in convert("crowdhuman --split val", root)] == [3, 41, 0]
    refused("out.jsonl", convert, "crowdhuman --split val", root, out=root / "annotation_val.odgt/out.jsonl")
    for out in tmp_path, root / "annotation_val.odgt":
        refused("--out .* is a folder or a file to read", convert, "crowdhuman --split val", root, out=out)
    write(root / "annotation_val.odgt", {"ID": "cut", "gtboxes": []})
    refused("cut.jpg: .*truncated", convert, "crowdhuman --split val --no_verify --draw 4", root)
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")  # whose .. is not where the link lies
    (linked,) = convert("crowdhuman --split val --no_verify", root, out=tmp_path / "link/out.jsonl")
    assert (tmp_path / "link" / linked["image"]).exists()


@pytest.mark.parametrize("command, said", [
    ("crowdhuman x --split train --out o --stride 2", "unrecognized"), ("coco x --out o", "required"),
    ("uavdt x --split val --out o", "invalid choice"), ("uavdt x --split train --out o --stride 0", "than 1"),
    ("synthetic --out o --images 1 --val 2", "images 1 is too few"), ("synthetic --out o --size 20", "small"),
])
def test_what_a_command_does_not_take_is_refused_before_anything_is_written(command, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        data_prep.main(command.replace(" o", f" {tmp_path}/o").split())
    assert said in capsys.readouterr().err + str(stop.value) and not list(tmp_path.iterdir())


def test_both_forms_of_citypersons_say_the_same_and_numbers_do_not_wrap_around(tmp_path):
    names = ["ignore", "pedestrian", "rider", "sitting person", "person (other)", "person group"]
    rows = np.array([[k, 200 + k, 100, 100, 250, 0, 0, 0, 0, 0] for k in range(6)], np.uint8)
    tables = {"a": rows, "b": -rows.astype(np.int16), "c": np.zeros((0, 10), np.uint8)}
    cells, kind = np.empty((1, 3), object), [("cityname", "O"), ("im_name", "O"), ("bbs", "O")]
    for k, (name, table) in enumerate(tables.items()):  # nested as in the real file: 1 x 1 structs in cells
        image = f"{name}_leftImg8bit.png"
        cells[0, k] = np.array([[(np.array(["bonn"]), np.array([image]), table)]], dtype=kind)
        objects = [{"label": names[abs(row[0])], "bbox": row[1:5]} for row in table.tolist()]
        file = tmp_path / f"json/gtBboxCityPersons/val/bonn/{name}_gtBboxCityPersons.json"
        write(file, {"imgWidth": 2048, "imgHeight": 1024, "objects": objects})
        images = [tmp_path / form / "leftImg8bit/val/bonn" / image for form in ("mat", "json")]
        make_images(images, (2048, 1024))
    (tmp_path / "mat/annotations").mkdir()
    savemat(tmp_path / "mat/annotations/anno_val.mat", {"anno_val_aligned": cells})
    mat, parsed = (convert("citypersons --split val", tmp_path / form) for form in ("mat", "json"))
    assert [r | {"image": ""} for r in mat] == [r | {"image": ""} for r in parsed] and len(mat) == 3
    assert mat[0]["boxes"] == [[201, 100, 301, 350]] and len(mat[0]["ignore"]) == 5  # 301, and not 45
    assert mat[0]["target"] == "pedestrian" and mat[1]["boxes"] == mat[2]["boxes"] == []
    write(file, {"imgWidth": 1024, "imgHeight": 512, "objects": objects})
    assert len(convert("citypersons --split val", tmp_path / "json")) == 2


def test_the_two_wider_forms_are_told_apart(tmp_path):
    """Twenty numbers are four boxes of 2018 and five of 2019; read in the wrong form they are nonsense."""
    text = " ".join(map(str, [1, 10, 20, 5, 6] * 4))
    write(tmp_path / "w18/val_annotations.txt", f"img1.jpg {text}\nimg2.jpg\nimg3.jpg 2 1 2 3 4\n")
    write(tmp_path / "w18/ignore_part_val.txt", "img1.jpg 0 0 9 9\n")
    make_images([tmp_path / f"w18/{split}/img{k}.jpg" for k in (1, 2, 3) for split in ("val", "train")])
    first, bare, cyclist = convert("widerpedestrian --split val", tmp_path / "w18")
    assert first["boxes"] == [[10, 20, 15, 26]] * 4 and first["ignore"] == [[0, 0, 9, 9]]
    assert bare["boxes"] == [] and cyclist["boxes"] == [[1, 2, 4, 6]]
    assert first["image"] == "w18/val/img1.jpg"  # and not the other split's, of the same name
    write(tmp_path / "w19/Annotations/train_bbox.txt", f"ad1.jpg {text}\nsur2.jpg\n")
    write(tmp_path / "w19/Annotations/train_ignore.txt", "sur2.jpg 1 1 7 7 2 2 9 9\n")
    make_images([tmp_path / "w19/ad_train/ad_03/ad1.jpg", tmp_path / "w19/sur_train/sur2.jpg"])
    first, bare = convert("widerpedestrian --split train", tmp_path / "w19")
    assert len(first["boxes"]) == 5 and first["boxes"][0] == [1, 10, 21, 15]
    assert len(bare["ignore"]) == 2 and first["image"] == "w19/ad_train/ad_03/ad1.jpg"


def test_uavdt_rows_are_sorted_by_target_and_a_file_without_classes_is_refused(tmp_path):
    root, images = tmp_path / "u", tmp_path / "u/UAV-benchmark-M"
    names = [*(f"M0101/img00000{frame}.jpg" for frame in (1, 2, 3, 4)), "M0203/img000001.jpg"]
    names += ["M0101/img000001_det.jpg"]  # somebody's own
    make_images([images / name for name in names])
    rows = [f"{frame},{target},{10 * target},5,8,9,1,1,{target}" for target in (1, 2, 3) for frame in (3, 1)]
    write(root / "GT/M0101_gt_whole.txt", *rows)
    write(root / "GT/M0203_gt_whole.txt", "1,1,0,0,9,9,1,1,1")  # of the test split
    write(root / "GT/M0101_gt_ignore.txt", "1,9,60,8,5,4,1,-1,-1\n")
    records = convert("uavdt --split train", root)
    assert [[box[0] for box in r["boxes"]] for r in records] == [[10, 20, 30], [], [10, 20, 30], []]
    assert records[0]["ignore"] == [[60, 8, 65, 12]] and len(convert("uavdt --split test", root)) == 1
    strided = convert("uavdt --split train --stride 2 --target car", root)
    assert [(r["image"][-7:], r["target"]) for r in strided] == [("001.jpg", "car"), ("003.jpg", "car")]
    write(root / "GT/M0101_gt_whole.txt", "1,1,0,0,9,9,1,1,-1")  # gt.txt under the name of gt_whole.txt
    refused("M0101_gt_whole.txt, line 1.*gt_whole.txt", convert, "uavdt --split train", root)
    (root / "GT/M0101_gt_whole.txt").rename(root / "GT/M0101_gt.txt")
    refused("looked there for M0101_gt_whole.txt", convert, "uavdt --split train", root)


def coco_layout(root, rows, images=("a.jpg", "b.jpg"), names=((1, "person"), (90, "toothbrush")), **sizes):
    """`rows`: (image number, category, box, further keys); `sizes`: {an image's stem: stated size}."""
    listed = [{"id": k, "file_name": image} for k, image in enumerate(images)]
    for entry in listed:
        entry |= dict(zip(("width", "height"), sizes.get(Path(entry["file_name"]).stem, ())))
    annotations = [{"image_id": image, "category_id": category, "bbox": box, **dict(*more)}
                   for image, category, box, *more in rows]
    categories = [{"id": number, "name": name} for number, name in names]
    write(root / COCO, {"images": listed[::-1], "annotations": annotations, "categories": categories})
    make_images([root / "val2017" / image for image in images])
    return root


def test_coco_takes_one_category_or_all_with_labels_that_follow_their_boxes(tmp_path):
    rows = [(0, 90, [500, 2, 3, 4]), (0, 1, [1.5, 2, 3, 4], {"iscrowd": 0, "ignore": 0}),
            (0, 2, [0, 0, 50, 60], {"iscrowd": 1}), (0, 2, [5, 5, 9, 9], {"iscrowd": 0, "ignore": 1}),
            (0, 90, [9, 9, 9, 9])]
    root = coco_layout(tmp_path / "co", rows, names=((1, "cat"), (2, "dog"), (90, "cat")))
    a, b = convert("coco --split val --category all", root)  # the file lists b.jpg first
    assert (a["image"], a["target"]) == ("co/val2017/a.jpg", "cat, dog")
    assert (a["labels"], a["ignore_labels"]) == (["cat", "cat"], ["dog", "dog"])
    assert (a["boxes"], a["ignore"]) == ([[1.5, 2, 4.5, 6], [9, 9, 18, 18]], [[0, 0, 50, 60], [5, 5, 14, 14]])
    assert b["boxes"] == b["labels"] == b["ignore_labels"] == []
    (cat, _), (dog, _) = (convert(f"coco --split val --category {name}", root) for name in ("cat", "dog"))
    assert cat["boxes"] == a["boxes"] and cat["ignore"] == [] and "labels" not in cat  # both ids of a cat
    assert dog["boxes"] == [] and dog["ignore"] == a["ignore"] and dog["target"] == "dog"
    (root / "val2017").rename(root / "test2017")
    assert len(convert("coco --split test --category cat --annotations", root, root / COCO)) == 2


def test_coco_annotations_are_believed_only_where_they_agree_with_the_image(tmp_path, capsys):
    boxes = [[], [1, 2, 3], [1, 2, 3, None], [1, 2, float("nan"), 4], [0.1, 0.2, 0.3, 0.4]]
    rows = [(k, 1, box) for k, box in enumerate(boxes)]
    rows += [(5, 7, [1, 2, 3, 4]), (99, 1, [1, 2, 3, 4]), (6, 1, [1, 2, 3, 4]), (6, 90, [])]
    stated = {"6": IMAGE, "other": (200, 160), "turned": IMAGE, "none": (0, None)}
    root = coco_layout(tmp_path / "co", rows, [f"{k}.jpg" for k in (*range(6), *stated)], **stated)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", IMAGE).save(root / "val2017/turned.jpg", exif=exif)
    for flags in ("", " --no_verify"):
        found = [r["image"] for r in convert("coco --split val" + flags, root)]
        assert found == ["co/val2017/6.jpg", "co/val2017/none.jpg"]
        said = capsys.readouterr()
        assert "9  left out: faulty annotations" in said.out and "image 99, which is not listed" in said.err
        assert all(f"{k}.jpg: annotation {k + 1}: " in said.err for k in (0, 1, 2, 3, 5))
        assert "4.jpg: boxes are all between 0 and 1" in said.err
        assert "other.jpg: the image has 100 x 80 pixels, the annotation 200 x 160" in said.err
        assert "turned.jpg: the image has 80 x 100 pixels, the annotation 100 x 80" in said.err
    coco_layout(root, [(0, 1, [1, 2, 3, 4]), (1, 1, [5, 6, 7, 8])], ["6.jpg", "6.jpg", "5.jpg"])
    assert [r["image"] for r in convert("coco --split val", root)] == ["co/val2017/5.jpg"]
    assert "6.jpg: listed 2 times" in capsys.readouterr().err
    coco_layout(root, [("0", 1, [1, 2, 3, 4])])
    refused("no annotation refers to an image that is listed", convert, "coco --split val", root)


def test_images_are_found_by_all_that_their_name_says(tmp_path, capsys):
    names = ("seq1/0001.jpg", "seq2/0001.jpg", "21--Festival/x.jpg", "y.jpg", "bare.jpg")
    root = coco_layout(tmp_path / "co", [], names)
    (root / "val2017/seq2/0001.jpg").unlink()
    (root / "contest").mkdir()
    (root / "val2017/y.jpg").rename(root / "contest/y.jpg")  # of no split, although "test" is in the word
    make_images([root / "train_images/bare.jpg"], (8, 8))  # of the other split
    found = [r["image"][3:] for r in convert("coco --split val", root)]
    assert found == ["val2017/" + names[0], "val2017/" + names[2], "contest/y.jpg", "val2017/bare.jpg"]
    assert "seq2/0001.jpg: No such file" in capsys.readouterr().err
    for link in ("loop", "val2017/loop", "z"):  # two circles, and another name for a folder
        (root / link).symlink_to(root / "val2017" if link == "z" else root)
    assert [r["image"][3:] for r in convert("coco --split val", root)] == found
    make_images([root / "more/bare.jpg"])
    refused("bare.jpg may be", convert, "coco --split val", root)


def test_refcoco_gives_a_line_for_each_phrase_and_runs_no_pickle(tmp_path, capsys):
    def reference(ann, split, *phrases):
        return {"ann_id": ann, "image_id": 7, "split": split, "sentences": [{"sent": x} for x in phrases]}
    root, refs = tmp_path / "r", tmp_path / "r/refs(unc).p"
    make_images([root / "train2014/7.jpg"])
    write(root / "instances.json", {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [
        {"id": 1, "bbox": [10, 20, 30, 40]}, {"id": 2, "bbox": [200, 0, 9, 9]}]})
    phrases = [reference(1, "train", "the left one", "red shirt"), reference(1, "testA", "x"),
               reference(2, "train", "outside")]
    write(refs, pickle.dumps(phrases, protocol=2))
    a, b = convert("refcoco --split train --draw 1", root)
    assert a == {"image": "r/train2014/7.jpg", "width": 100, "height": 80, "task": "grounding",
                 "target": "the left one", "boxes": [[10, 20, 40, 60]]} and b["target"] == "red shirt"
    assert "1  left out: faulty annotations" in capsys.readouterr().out  # outside the image
    write(root / "refs(google).p")
    refused("found refs.google..p, refs.unc..p; name it as ROOT", convert, "refcoco --split train", root)
    assert len(convert("refcoco --split testA", refs)) == 1
    refused("needs --split", convert, "refcoco", refs)
    refused("a file to read", convert, "refcoco --split testA", refs, out=refs)
    names = "refs.unc..p: UnpicklingError: it names"
    for content, said in ((pickle.dumps(os.system), names), (pickle.dumps([Path("x")]), names),
                          (pickle.dumps(phrases)[:-9], "refs.unc..p: ")):
        write(refs, content)
        refused(said, convert, "refcoco --split train", refs, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


PEOPLE = {"images": [{"id": 1}], "categories": [{"id": 7, "name": "person"}], "annotations": []}
PROMPT = "<image>Please provide the bounding box coordinate of the region this sentence describes: the lady."
ENTRY = {"image": "a.jpg", "problem": "the lady", "solution": [10, 20, 40, 60]}
LADY = {"task": "grounding", "target": "the lady", "boxes": [[10, 20, 40, 60]]}
BIRDS = {"image": "a.jpg", "points": [{"x": 10, "y": 20.5}, {"x": 99, "y": 79}], "count": 2, "label": "bird"}
URL = {"image_url": "https://host/some%20path/b.jpg?size=big", "points": {"x": [10, 99], "y": [20.5, 79]},
       "image_sha256": "SHA", "count": 2, "label": "bird"}
POINTS = {"task": "counting", "target": "bird", "points": [[10, 20.5], [99, 79]]}
TURNS = [{"from": "human", "value": "<image> Read."}, {"from": "gpt", "value": "Two\nlines"}]


@pytest.mark.parametrize("as_lines", [False, True])
@pytest.mark.parametrize("command, entry, fields", [
    ("refcoco", ENTRY | {"problem": "Where is it?", "normal_caption": "the lady"}, LADY),
    ("refcoco", ENTRY | {"solution": "[10.0, 20, 40, 60]"}, LADY),
    ("refcoco", {"image": "a.jpg", "conversations": [{"from": "human", "value": PROMPT}, {
        "from": "gpt", "value": '<answer>{"bbox_2d": [10, 20, 40, 60]}</answer>'}]}, LADY),
    ("refcoco --scale 1000", ENTRY | {"problem": PROMPT, "solution": [100, 250, 400, 750]}, LADY),
    ("pixmo_count", BIRDS, POINTS), ("pixmo_count", URL, POINTS),
    ("pixmo_count", URL | {"points": None, "count": 5}, {"task": "counting", "target": "bird", "count": 5}),
    ("pixmo_count", BIRDS | {"points": [], "count": 0}, POINTS | {"points": []}),
    ("ocr", {"image": "a.jpg", "conversations": TURNS},
     {"task": "ocr", "target": "text", "transcript": "Two\nlines"}),
])
def test_lists_of_questions_are_read(tmp_path, command, entry, fields, as_lines):
    make_images([tmp_path / "images/a.jpg"])
    digest = hashlib.sha256((tmp_path / "images/a.jpg").read_bytes()).hexdigest()
    text = json.dumps(entry).replace("SHA", digest)
    path = write(tmp_path / "list", f"{text}\n{text}" if as_lines else f"\n[{text},\n{text}]")
    records = convert(command, path, "--draw", "1", "--image_folder", tmp_path / "images")
    assert records == [{"image": "images/a.jpg", "width": 100, "height": 80, **fields}] * 2


@pytest.mark.parametrize("command, file, content, said", [
    ("crowdhuman", ODGT, '{"ID": "1", "gtboxes": []}\n{"ID": "2"}\n', "odgt, line 2: no 'gtboxes'"),
    ("crowdhuman", ODGT, "\n", "nothing converted"), ("crowdhuman", "else", "", "there for annotation_val"),
    ("widerpedestrian", WIDER18, "img1.jpg 1 2 3 4 5\nimg2.jpg 1 2 3 4\n", "line 2.*4 numbers"),
    ("widerpedestrian", WIDER18, "img1.jpg 7 2 3 4 5", "line 1.*class"),
    ("widerpedestrian", WIDER19, "cat.jpg 1 2 3 4", "line 1.*cat.jpg"),
    *[("coco", COCO, PEOPLE | changes, said) for changes, said in [
        ({"annotations": [{}]}, "annotation 1: no 'image_id'"), ({"annotations": None}, "2017.json: TypeE"),
        ({"images": [{"id": 1}, {"id": 1, "file_name": "b"}]}, "entries have the id 1"),
        ({"categories": [{"id": 1, "name": "dog"}]}, "no category 'person', but 'dog'")]],
    ("citypersons", "gtBboxCityPersons/val/a/b_gtBboxCityPersons.json", {"objects": [{}]}, "b_gt.*no 'la"),
    ("citypersons", "annotations/anno_val.mat", "no matlab file at all", "anno_val.mat: "),
    *[("refcoco", "list", ENTRY | changes, said) for changes, said in [
        ({"solution": [1, 2, 3]}, "line 1: .*not 4"), ({"solution": "none"}, "line 1: one box is expected"),
        ({"problem": None}, "1: no 'conversations'"), ({"problem": "<image>"}, "line 1: a text is expected"),
        ({"problem": "\ud83d"}, "1: .*surrogates"), ({"image": ["a", "b"]}, "line 1: a text is expected"),
        ({"solution": [9, 250, 40, 750]}, "a.jpg: .*outside.*--scale N"),
        ({"solution": [9, 9, 4, 20]}, "nothing converted.*1 left out: faulty")]],
    ("refcoco --scale 1000", "list", ENTRY | {"solution": [9, 9, 1300, 20]}, "1 left out: faulty"),
    *[("pixmo_count", "list", BIRDS | changes, said) for changes, said in [
        ({"count": 3}, "line 1: count is 3, but there are 2 points"), ({"count": None}, "count is None"),
        ({"points": {"x": [1], "y": []}}, "line 1: zip"), ({"points": [{"x": 1, "y": None}] * 2}, "not 2"),
        ({"points": [{"x": 200, "y": 1}] * 2}, "nothing converted.*1 left out: faulty")]],
    ("pixmo_count --image_folder nowhere", "list", URL, "nothing converted.*1 left out: unreadable"),
    ("pixmo_count", "list", URL, "1: .*image_folder"), ("refcoco --split val", "list", ENTRY, "one split"),
    ("ocr", "list", [{"image": "a.jpg", "conversations": TURNS[:1]}], "list, entry 1: "),
])
def test_what_is_malformed_is_said_with_its_place_and_no_file_is_left(tmp_path, command, file, content, said):
    root, is_list = tmp_path / "root", file == "list"
    make_images([root / "a.jpg", root / "Images/a.jpg", root / "leftImg8bit/val/a.jpg"])
    path, command = write(root / file, content), command + " --split val" * (not is_list)
    refused(said, convert, command, path if is_list else root, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def sizes_from(size_of):
    """For a while, a function of its path says how large an image is, which need not be there."""
    here = SimpleNamespace(map=lambda function, *items, chunksize: map(function, *items))
    return mock.patch.multiple(data_prep, ProcessPoolExecutor=lambda: contextlib.nullcontext(here),
                               image_size=lambda path, no_verify: size_of(path))


def totals(path):
    """(lines, boxes, ignore regions) of what dipr1.py accepts."""
    records = dipr1.load_records(path)
    return len(records), *(sum(len(record[name]) for record in records) for name in ("boxes", "ignore"))


def test_an_image_with_many_phrases_is_opened_once(tmp_path):
    path = write(tmp_path / "l.json", [ENTRY | {"image": f"{k % 3}.jpg"} for k in range(30)])
    with sizes_from(opened := mock.Mock(return_value=IMAGE)):
        assert len(convert("refcoco", path)) == 30 and opened.call_count == 3


def test_converting_takes_the_same_memory_however_long_the_file(tmp_path):
    crowd, peaks = [person([k, 2, 30, 60], box_id=k, occ=0) for k in range(23)], []
    for n in (600, 1200):
        root = crowdhuman_layout(tmp_path / f"{n}", {str(k): crowd for k in range(n)})
        tracemalloc.start()
        data_prep.convert(data_prep.crowdhuman(root, "train"), tmp_path / "o.jsonl", no_verify=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 300_000, peaks  # the 600 lines more are 1.6 MB of text, and more parsed


@needs_real
@pytest.mark.parametrize("command, file, source, right", [
    ("crowdhuman --split train", "annotation_train.odgt", "crowdhuman*.odgt", (5, 41, 2)),
    ("citypersons --split val", "annotations/anno_val.mat", "city*.mat", (500, 3157, 2638)),
    ("widerpedestrian --split train", "train_annotations.txt", "wider2018*", (5, 37, 0)),
    ("uavdt --split test", "M0208", "uavdt/M0208*", (265, 790, 265)),
    ("uavdt --split train --max_boxes 99", "M0101", "uavdt_M0101*", (407, 5414, 670)),
    ("coco --split val --category pedestrian", COCO, "citypersons/val_gt*", (500, 3157, 2638)),
    ("coco --split val --category pedestrain", COCO, "wider2019*", (200, 781, 0)),
])
def test_real_files_convert_to_the_right_counts(tmp_path, command, file, source, right):
    """Without their images: COCO's form states their sizes, the others get one that is large."""
    root, sources, stated = tmp_path / "root", sorted(REAL.glob(source)), {}
    for folder in ("Images", "leftImg8bit/val", f"UAV-benchmark-M/{file}"):
        (root / folder).mkdir(parents=True)
    if "uavdt" in command:
        for path in sources:
            write(root / "GT" / path.name.removeprefix("uavdt_"), path.read_bytes())
        for frame in range(1, right[0] + 1):
            write(root / f"UAV-benchmark-M/{file}/img{frame:06d}.jpg")
    else:
        write(root / file, *(path.read_bytes() for path in sources))
    if file == COCO:
        images = json.loads(sources[0].read_text())["images"]
        stated = {Path(image["file_name"]).name: (image["width"], image["height"]) for image in images}
    with sizes_from(lambda path: stated.get(path.name, (4096, 4096))):
        convert(command, root)
    assert totals(tmp_path / "out.jsonl") == right


# ------------------------------------------------------------------------------------------------------------
# python test_dipr1.py: the naive way of the tests and ours, timed side by side; --compare N: SFT,
# Perception-R1 and DIP-R1 from one start, on the same scenes, for the same time

SFT_RATES = 3.125e-6, 6.25e-6, 1.25e-5  # SFT has the best of them, found on seed 0
WAYS = {  # what goes on from the start, beside SFT; Perception-R1's steps are shorter, so it takes more
    "Perception-R1": dict(method="perception-r1", steps=306), "DIP-R1 without look": dict(look_weight=0.0),
    "DIP-R1": dict()}
TRIED = {"DIP-R1, plain sum": dict(look_credit="completion")}  # on seed 0 alone, as the other rates of SFT
CURVES, MOMENTS = {"SFT": "#d1495b", "DIP-R1": "#00798c"}, 6  # the colour of each; checkpoints of a way
SHAPES = {  # of tower and decoder; are the embeddings tied?; the image's patches; tokens of a completion
    "small": ((6, 256, 512, 4, 512), (16384, 512, 1536, 4, 8, [8, 12, 12]), False, (32, 32), [128]),
    "3b": ((32, 1280, 3420, 16, 2048), (151936, 2048, 11008, 36, 16, [16, 24, 24]), True, (64, 80),
           [512, 1024])}


def curve(run, start, folder):
    """A trained way, and the figures of its start -> for each checkpoint [minutes of training, figures of the
    greedy answers on the dense and the sparse crowd], and the cfg of the checkpoint that is best at dense."""
    rows, best = [[0.0, start]], None
    seconds = [line["seconds"] for line in read_lines(Path(run.output_dir) / "metrics.jsonl")]
    for checkpoint in sorted(Path(run.output_dir).glob("checkpoint-??????")):
        then = dataclasses.replace(run, model=str(checkpoint), samples=0, output_dir=str(checkpoint))
        rows.append([sum(seconds[: int(checkpoint.name[-6:])]) / 60,
                     dipr1.evaluated(then, folder, crowds=("dense", "sparse"))])
        if rows[-1][1]["dense"]["f1"] == max(figures["dense"]["f1"] for _, figures in rows[1:]):
            best = dataclasses.replace(then, samples=run.samples, output_dir=f"{run.output_dir}, best moment")
    return rows, best


def compare_once(seed, folder, rates, **options):
    """One seed -> the best of SFT's rates, the figures of each way on each crowd, its minutes of training,
    and the curves of SFT and DIP-R1. SFT and DIP-R1 do what the demo does. Interrupted, it goes on."""
    always = dict(demo=True, seed=seed, output_dir=str(folder), resume=True, keep=0)
    cfg = Config(**{**dipr1.DEMO, **always, **options})
    start = dipr1.pretrained(cfg)
    cfg = dataclasses.replace(cfg, model=start.model, data=str(folder / "dense/train.jsonl"))
    sft = {f"SFT, lr {rate:g}": dict(steps=0, save_every=cfg.sft_steps // MOMENTS, sft_lr=rate)
           for rate in rates}
    ways = WAYS | (TRIED if seed == 0 else {})
    grpo = {name: dict(sft_steps=0, save_every=cfg.steps // MOMENTS, **way) for name, way in ways.items()}
    if seed == 0:  # with 400 labels, and the best of SFT's rates for them: .598 at 1.25e-5, .615 at 2.5e-5
        if dipr1.rank_and_world()[0] == 0:
            data_prep.synthetic(folder / "many", 400, 1000, val=0, crowd="dense")
        dipr1.barrier()
        many = dict(data=str(folder / "many/train.jsonl"))
        sft["SFT, 400 labels"] = dict(steps=0, sft_lr=5e-5) | many
        grpo["DIP-R1, 400 labels"] = grpo["DIP-R1"] | many
    runs = {"start": start, "start, answer alone": dataclasses.replace(start, method="perception-r1")}
    runs |= {name: dipr1.trained(cfg, name, **changes) for name, changes in (sft | grpo).items()}
    figures = {name: dipr1.evaluated(run, folder) for name, run in runs.items()}
    rate = max(rates, key=lambda rate: figures[f"SFT, lr {rate:g}"]["dense"]["f1"])
    curves, moments = {}, {}
    for name, run in zip(CURVES, (runs[f"SFT, lr {rate:g}"], runs["DIP-R1"])):
        curves[name], moments[name] = curve(run, figures["start"], folder)
    figures["SFT"] = figures[f"SFT, lr {rate:g}"]
    figures["SFT, best moment"] = dipr1.evaluated(moments["SFT"], folder)
    minutes = {name: sum(line["seconds"] for line in read_lines(folder / name / "metrics.jsonl")) / 60
               for name in (*sft, *grpo)}
    return dict(seed=seed, rate=rate, figures=figures, minutes=minutes, curves=curves)


def compare(seeds, folder, **options):
    """Compare on seeds 0 .. N-1; print mean and standard deviation, write all figures to compare.json and the
    curves to curves.svg."""
    runs, rates = [], SFT_RATES
    for seed in range(seeds):
        runs.append(compare_once(seed, folder / f"seed-{seed}", rates, **options))
        rates = [runs[0]["rate"]]
        if dipr1.rank_and_world()[0] == 0:
            (folder / "compare.json").write_text(json.dumps(runs, indent=2))
            draw_curves(runs, folder / "curves.svg")
    spread = lambda values: np.std(values, ddof=1) if len(values) > 1 else 0.0
    mean = lambda values: f"{np.mean(values):.3f} +- {spread(values):.3f}"
    names = ["start", "SFT", "SFT, best moment", "start, answer alone", *WAYS]
    dipr1.print0(f"\n{seeds} seeds, held-out images; SFT's rate: {rates[0]:g}")
    dipr1.print0(f"{'':<32}" + "".join(f"{name:>21}" for name in names))
    for crowd, figure in itertools.product(dipr1.SCENES, dipr1.SHOWN):
        values = [[run["figures"][name][crowd].get(figure, np.nan) for run in runs] for name in names]
        dipr1.print0(f"{crowd + ': ' + figure:<32}" + "".join(f"{mean(value):>21}" for value in values))
    for name in [name for name in runs[0]["figures"] if name not in names]:
        dipr1.print0(f"seed 0, {name}: dense F1 {runs[0]['figures'][name]['dense']['f1']:.3f}")
    for name in runs[0]["minutes"]:
        minutes = [run["minutes"][name] for run in runs if name in run["minutes"]]
        dipr1.print0(f"minutes of {name}: {mean(minutes)}")


def draw_curves(runs, path, width=420, height=280):
    """F1 on the dense and the sparse crowd against minutes of training, a line per seed, as an SVG."""
    last = max(minutes for run in runs for rows in run["curves"].values() for minutes, _ in rows)
    shapes = []
    def text(x, y, words, color="#333"):
        shapes.append(f'<text x="{x:.0f}" y="{y:.0f}" fill="{color}">{words}</text>')
    for left, crowd in (50, "dense"), (120 + width, "sparse"):
        at = lambda minutes, f1: (left + width * minutes / last, 40 + height * (0.9 - f1) / 0.7)
        text(left, 20, f"F1 on held-out {crowd} scenes; minutes of training on the dense ones")
        for tick in np.arange(0.2, 0.91, 0.1):
            x, y = at(0, tick)
            shapes.append(f'<path d="M{x},{y:.1f} h{width}" stroke="#ddd"/>')
            text(x - 30, y + 5, f"{tick:.1f}")
        for minute in range(int(last) + 1):
            text(at(minute, 0)[0] - 4, height + 60, minute)
        for number, (name, color) in enumerate(CURVES.items()):
            text(left + 8 + 40 * number, height + 30, name, color)
            for run in runs:
                points = [at(minutes, figures[crowd]["f1"]) for minutes, figures in run["curves"][name]]
                line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                shapes.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
    size = f'width="{2 * width + 160}" height="{height + 75}"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
                    f'<rect {size} fill="white"/>{"".join(shapes)}</svg>\n')


def test_the_comparison_starts_all_from_the_same_weights_and_goes_on_where_it_was(tmp_path):
    starts, plain = [], dipr1.grpo_step
    def watched(policy, reference, optimizer, encoder, prompts, cfg, *rest):
        starts.append(policy.model.lm_head.weight.clone())
        assert {prompt.record["method"] for prompt in prompts} == {cfg.method}
        return plain(policy, reference, optimizer, encoder, prompts, cfg, *rest)
    small = dict(sft_steps=2, sft_batch=4, steps=2, prompts_per_step=2, group_size=2, max_new_tokens=16,
                 samples=2)
    ways = {name: way | {"steps": 2} for name, way in WAYS.items()}
    scenes = {"sparse": (6, 2), "dense": (6, 2), "night": (0, 2)}
    with replaced(SCENES=scenes, PRETRAINING=dict(sft_steps=2, steps=0), grpo_step=watched), mock.patch.dict(
            WAYS, ways), mock.patch.dict(globals(), MOMENTS=2):
        for seeds in (1, 2):
            compare(seeds, tmp_path, **small)
    runs = json.loads((tmp_path / "compare.json").read_text())
    assert len(runs) == 2 and {"start", "SFT", "SFT, best moment", *WAYS} < set(runs[0]["figures"])
    assert [len(rows) for run in runs for rows in run["curves"].values()] == 4 * [1 + 2]
    assert len(runs[0]["minutes"]) == len(runs[1]["minutes"]) + len(SFT_RATES) - 1 + len(TRIED) + 2
    best = max((row[1]["dense"]["f1"] for row in runs[0]["curves"]["SFT"][1:]))
    assert runs[0]["figures"]["SFT, best moment"]["dense"]["f1"] == best
    assert len(starts) == 2 * (5 + 3), "two steps, five ways and three: what is done is not done again"
    assert all(torch.equal(starts[0], starts[k]) for k in (2, 4, 6, 8)) and not starts[0].equal(starts[10])
    assert (tmp_path / "curves.svg").read_text().count("<polyline") == 2 * 2 * 2  # crowds, ways, seeds


def random_policy(name, device):
    """A Qwen2.5-VL with random weights and a prompt for it: an image of noise between 56 random words. At 3B
    both ways recompute activations in the backward: otherwise the naive one would keep more than 80 GB."""
    tower, (vocabulary, *decoder, heads, sections), tied, (rows, columns), _ = SHAPES[name]
    tower = dict(zip(("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size"), tower))
    decoder = dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers"), decoder))
    decoder |= dict(
        vocab_size=vocabulary, num_attention_heads=heads, num_key_value_heads=2, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sections))
    config = Qwen2_5_VLConfig(
        vision_config=tower, text_config=decoder, tie_word_embeddings=tied, image_token_id=1,
        video_token_id=2, vision_start_token_id=3, vision_end_token_id=4)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    if name == "3b":
        model.activation_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, vocabulary, (56,), generator=generator)
    ids = torch.cat([words[:20], torch.tensor([3, *[1] * (rows * columns // 4), 4]), words[20:]]).to(device)
    grid = torch.tensor([[1, rows, columns]], device=device)
    pixels = torch.rand(rows * columns, 1176, generator=generator).to(device)
    positions, _ = model.model.get_rope_index(ids[None], (ids == 1).int()[None], grid)
    size = 14 * columns, 14 * rows
    prompt = dipr1.Prompt(0, {}, ids, positions[:, 0], pixels, grid, *size, boxes(), boxes())
    return dipr1.Policy(model, range(vocabulary)), prompt


def naive_rollout(policy, prompt, G, new_tokens):
    """`generate`, which reads image and prompt G times."""
    ids = prompt.ids[None]
    out = policy.eval().model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 1).int(),
        pixel_values=prompt.pixels, image_grid_thw=prompt.grid, num_return_sequences=G, do_sample=True,
        top_k=0, min_new_tokens=new_tokens, max_new_tokens=new_tokens, suppress_tokens=[1, 2, 3, 4])
    return Group(prompt, list(out[:, ids.shape[1]:]))


def our_rollout(policy, prompt, G, new_tokens):
    """`rollout`, with an EOS that never comes."""
    encoder = SimpleNamespace(eos=[-1], decode=lambda ids: "")
    return sampled(policy, encoder, [prompt], G, new_tokens)[0]


def one_step(policy, reference, prompt, G, new_tokens, rollout, score):
    """Rollout, then scoring: reference, policy forward, backward -> (group, seconds of both and of all)."""
    def now():
        if prompt.ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
    started = now()
    group = rollout(policy, prompt, G, new_tokens)
    written = now()
    with torch.no_grad():
        ref = score(reference, group)
    logp = score(policy.train(), group)
    advantages = torch.linspace(-1, 1, len(logp), device=logp.device)
    dipr1.grpo_loss(logp, logp.detach(), ref, advantages, 0.2, 0.04)[0].backward()
    ended = now()
    policy.zero_grad()
    return group, (written - started, ended - written, ended - started)


def added_memory(policy, group, score):
    """Megabytes that a policy forward adds at its peak, kept for the backward or not."""
    if group.prompt.ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        score(policy, group)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(profile_memory=True) as profiler:
        score(policy, group)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 1e6


def benchmark(shapes, new_tokens, G=8, repeats=5):
    """Measure both ways, turn by turn, and print the table: medians, and naive over ours."""
    policy, prompt = random_policy(shapes, "cuda" if torch.cuda.is_available() else "cpu")
    reference, measured = copy.deepcopy(policy).eval().requires_grad_(False), {"sdpa": [], "tree": []}
    ours = lambda policy, group: policy([group])[0]
    for _ in tqdm(range(repeats + 1), f"G {G}, {new_tokens} new tokens"):
        for attention, *way in (("sdpa", naive_rollout, plain_logprobs), ("tree", our_rollout, ours)):
            for model in (policy, reference):
                model.model.model.language_model.set_attn_implementation(attention)
            group, seconds = one_step(policy, reference, prompt, G, new_tokens, *way)
            measured[attention].append([*seconds, added_memory(policy, group, way[1])])
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    print(f"\n{millions:.0f}M parameters, prompt {len(prompt.ids)} tokens, G = {G}, {new_tokens} new tokens: "
          f"medians of {repeats}")
    print(f"{'':<28}{'naive':>10}{'ours':>10}{'ratio':>8}")
    medians = [np.median(turns[1:], axis=0) for turns in measured.values()]  # the first warms up
    for name, a, b in zip(("rollout", "scoring", "whole step", "added memory, MB"), *medians):
        print(f"{name:<28}{a:>10.{3 if a < 1000 else 0}f}{b:>10.{3 if a < 1000 else 0}f}{a / b:>8.1f}")


def run_script():
    parser = argparse.ArgumentParser(description="Time the naive way and ours, or compare the methods.")
    parser.add_argument("--shapes", choices=SHAPES, default="small", help="3b wants a GPU of 80 GB")
    parser.add_argument("--compare", type=int, metavar="N",
                        help="instead, compare the methods on N seeds, in runs/compare; if interrupted it "
                             "goes on; torchrun --nproc_per_node 2 is faster")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.compare:
        dipr1.join_processes(Config(demo=True))
        return compare(args.compare, Path("runs/compare"))
    for new_tokens in SHAPES[args.shapes][-1]:
        benchmark(args.shapes, new_tokens)


if __name__ == "__main__":
    run_script()
